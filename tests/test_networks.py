"""A user's own networks, and those that a stack cannot train."""

from collections import OrderedDict

import pytest
import torch
from conftest import QUICK, load_copy, read_metrics, run_here
from torch import nn


@pytest.mark.parametrize(("last", "layers"), [
    ("output", [nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.Flatten()]),
    ("output", [nn.Conv2d(1, 4, 5), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()]),
    ("output", [nn.Flatten(), nn.Linear(784, 20), nn.ReLU(inplace=True)]),
    ("output", [nn.Flatten(), nn.Linear(784, 20), nn.Softmax(dim=-1)]),
    ("output", [nn.Flatten(), nn.Linear(784, 20), nn.Dropout(0.3)]), ("fc3", [nn.Flatten()])])
def test_a_network_that_a_stack_cannot_train_is_refused(lth, last, layers):
    units = nn.Sequential(*layers)(torch.zeros(2, 1, 28, 28)).flatten(1).shape[1]
    network = nn.Sequential(OrderedDict([*((f"layer{n}", layer) for n, layer in enumerate(layers)),
                                         (last, nn.Linear(units, 10))]))
    network.name = "mine"
    lth.use(build_network=lambda *_: network)
    with pytest.raises(lth.UserError, match=r"^the network in build_network cannot be trained in a stack: [^\n]*$"):
        lth.check_network(torch.device("cpu"))


def test_a_network_of_ones_own_is_trained_and_pruned(few, tmp_path):
    """In a copy of the script: kernels that are not square, a stride, uneven padding, overlapping pools, tanh."""
    copy = load_copy(tmp_path, few, ('        elif model == "lenet":', """\
        elif model == "own":
            network = nn.Sequential(OrderedDict(
                conv1=nn.Conv2d(1, 5, (5, 3), stride=2, padding=(2, 1)), relu1=nn.ReLU(),
                pool1=nn.MaxPool2d(3, stride=2, padding=1), conv2=nn.Conv2d(5, 4, (1, 3)), flatten=nn.Flatten(),
                fc1=nn.Linear(140, 20), tanh1=nn.Tanh(), drop1=nn.Dropout(dropout), output=nn.Linear(20, 10)))
            network.name = "my own"
        elif model == "lenet":"""))
    run_here(copy, tmp_path / "own", *QUICK, "MODEL=own", "BATCH_SIZE=10", "EPOCHS=4", "ARMS=rewind,small_dense")
    rows = read_metrics(tmp_path / "own")
    survivors = 0.7**2 * (75 + 60 + 200) + 0.4**2 * 2_800   # after two levels, but for rounding
    last = rows[(rows["level"] == 2) & (rows["arm"] == "rewind")]
    assert last["weights_remaining"].to_numpy() == pytest.approx(100 * survivors / 3_135, abs=0.05)
    dense = rows[rows["arm"] == "dense"]["test_accuracy"]
    assert dense.iloc[-1] > dense.iloc[0] + 30
