"""The networks: their sizes and initial weights, a user's own, and those that a stack cannot train."""

from collections import OrderedDict

import pytest
import torch
from conftest import QUICK, load_copy, read_metrics, run_here
from torch import nn


@pytest.mark.parametrize(("model", "weights", "biases"), [
    ("mlp", 784 * 300 + 300 * 100 + 100 * 10, 410), ("lenet", 150 + 2_400 + 400 * 120 + 120 * 84 + 84 * 10, 236)])
@pytest.mark.parametrize("init", ["kaiming_normal", "xavier_normal"])
def test_networks_have_the_literatures_sizes_and_initial_weights(lth, model, weights, biases, init):
    """266,200 are the paper's 266K. He's variance is 2 / inputs, Glorot's 2 / (inputs + outputs)."""
    lth.use(MODEL=model, INIT=init)
    network = lth.build_network(model, 0.2)
    drawn = lth.initial_weights(torch.Generator().manual_seed(1))
    assert lth.count_weights(network) == sum(mask.numel() for mask in lth.full_masks(drawn).values()) == weights
    assert sum(tensor.numel() for tensor in drawn.values()) == weights + biases
    assert {name: tensor.shape for name, tensor in drawn.items()} == {
        name: tensor.shape for name, tensor in network.state_dict().items()}
    for name, weight in drawn.items():
        if weight.dim() == 1:
            assert not weight.any()
            continue
        inputs, outputs = weight[0].numel(), weight[:, 0].numel()
        variance = 2 / inputs if init == "kaiming_normal" else 2 / (inputs + outputs)
        assert weight.square().mean().item() == pytest.approx(variance, rel=4 * (2 / weight.numel()) ** 0.5), name


def network_of(*layers: nn.Module, last: str = "output") -> nn.Sequential:
    """Build a network of these layers and, behind whatever they give, a linear one with this name."""
    units = nn.Sequential(*layers)(torch.zeros(2, 1, 28, 28)).flatten(1).shape[1]
    named = OrderedDict((f"layer{number}", layer) for number, layer in enumerate(layers))
    named[last] = nn.Linear(units, 10)
    return nn.Sequential(named)


REFUSED = {
    "batch normalisation": lambda: network_of(nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.Flatten()),
    "groups": lambda: network_of(nn.Conv2d(1, 4, 5), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()),
    "in place": lambda: network_of(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(inplace=True)),
    "convolution without bias": lambda: network_of(nn.Conv2d(1, 4, 5, bias=False), nn.Flatten()),
    "softmax over the last dimension": lambda: network_of(nn.Flatten(), nn.Linear(784, 20), nn.Softmax(dim=-1)),
    "last layer with another name": lambda: network_of(nn.Flatten(), last="fc3"),
    "dropout of another share": lambda: network_of(nn.Flatten(), nn.Linear(784, 20), nn.Dropout(0.3))}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_network_that_a_stack_cannot_train_is_refused(lth, kind):
    lth.use(build_network=lambda *_: REFUSED[kind]())
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
