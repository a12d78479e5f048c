"""The networks: their sizes and initial weights, a user's own ones, and those that a stack cannot train."""

from collections import OrderedDict

import pytest
import torch
from conftest import QUICK, load_copy, read_metrics, run_here
from torch import nn

CPU = torch.device("cpu")


@pytest.mark.parametrize(("model", "name", "weights", "biases"), [
    ("mlp", "LeNet-300-100", 784 * 300 + 300 * 100 + 100 * 10, 410),
    ("lenet", "LeNet-5", 6 * 25 + 6 * 16 * 25 + 400 * 120 + 120 * 84 + 84 * 10, 236)])
def test_networks_have_the_sizes_of_the_literature(lth, model, name, weights, biases):
    """266,200 weights are the paper's 266K; what PyTorch counts is what the script counts, plus biases."""
    lth.use(MODEL=model)
    network = lth.build_network(model, 0.2)
    assert (network.name, lth.count_weights(network)) == (name, weights)
    assert sum(parameter.numel() for parameter in network.parameters()) == weights + biases
    drawn = lth.initial_weights(torch.Generator().manual_seed(1))
    assert [*drawn] == [*network.state_dict()]
    assert sum(mask.numel() for mask in lth.full_masks(drawn).values()) == weights
    with pytest.raises(lth.UserError, match=r"^MODEL must be mlp or lenet, not 'vgg'\.$"):
        lth.build_network("vgg", 0)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize("init", ["kaiming_normal", "xavier_normal"])
def test_initial_weights_have_their_variance(lth, model, init):
    """He's by a unit's inputs, Glorot's by the mean of inputs and outputs, but for four standard errors."""
    lth.use(MODEL=model, INIT=init)
    weights = lth.initial_weights(torch.Generator().manual_seed(1))
    for name, layer in lth.weighted_layers(lth.build_network(model, 0)).items():
        inputs, outputs = layer.weight[0].numel(), layer.weight[:, 0].numel()
        variance = 2 / inputs if init == "kaiming_normal" else 2 / (inputs + outputs)
        weight = weights[f"{name}.weight"]
        error = (2 / weight.numel()) ** 0.5
        assert weight.square().mean().item() == pytest.approx(variance, rel=4 * error), name
        assert weight.mean().abs().item() < 4 * (variance / weight.numel()) ** 0.5
        assert weight.pow(4).mean().item() == pytest.approx(3 * variance**2, rel=0.25 + 8 * error)      # normal
        assert not weights[f"{name}.bias"].any()


def test_trial_k_starts_the_same_among_few_and_many(lth):
    """Seeds come from purpose, trial and level: no two of them share their numbers, and TRIALS changes none."""
    start = {}
    for trials in (2, 5):
        lth.use(TRIALS=trials)
        for trial in range(trials):
            weight = lth.start_network(("dense", trial), lth.State(), 0, {})[0]["fc2.weight"]
            assert torch.equal(start.setdefault(trial, weight), weight)
    streams = [("init", 0, 0), ("init", 1, 0), ("init", 0, 1), ("order", 0, 0), ("arm init", 0, 0)]
    seeds = {lth.generator(*stream).initial_seed() for stream in streams}
    assert len(seeds) == len(streams) and len({weight.sum().item() for weight in start.values()}) == 5
    lth.use(SEED=43)
    assert lth.generator("init", 0, 0).initial_seed() not in seeds


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
        lth.check_network(CPU)


@pytest.mark.parametrize("layers", [(nn.AvgPool2d(2), nn.Tanh()), (nn.MaxPool2d(2), nn.Conv2d(1, 4, 5))])
def test_layers_before_flatten_compute_what_they_do_alone(lth, layers):
    """Of two networks, on images of two trials that are not contiguous; without a convolution, too."""
    network = network_of(*layers, nn.Flatten())
    lth.use(build_network=lambda *_: network)
    weights = [lth.initial_weights(torch.Generator().manual_seed(seed)) for seed in range(4)]
    images = torch.rand(28, 28, 1, 3, 2, generator=torch.Generator().manual_seed(9)).permute(4, 3, 2, 0, 1)
    found = lth.forward(network, lth.stack(weights), images)
    for n in range(4):
        expected = lth.as_plain_network(network, weights[n])(images[n // 2])
        torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-5)


def test_a_network_of_ones_own_is_trained_and_pruned(lth, few, tmp_path):
    """Defined in a copy of the script, under another name, with a layer more than the others."""
    copy = load_copy(tmp_path, few, ('        elif model == "lenet":', """\
        elif model == "deep":
            network = nn.Sequential(OrderedDict(
                pool1=nn.AvgPool2d(2), flatten=nn.Flatten(),
                fc1=nn.Linear(196, 60), tanh1=nn.Tanh(), drop1=nn.Dropout(dropout),
                fc2=nn.Linear(60, 40), relu2=nn.ReLU(),
                fc3=nn.Linear(40, 20), relu3=nn.ReLU(), drop3=nn.Dropout(dropout),
                output=nn.Linear(20, 10)))
            network.name = "a deep one"
        elif model == "lenet":"""))
    run_here(copy, tmp_path / "deep", *QUICK, "MODEL=deep", "BATCH_SIZE=50", "ARMS=rewind,small_dense")
    rows = read_metrics(tmp_path / "deep")
    survivors = [196 * 60, 60 * 40, 40 * 20, 200]
    for level in range(3):
        tickets = rows[(rows["level"] == level) & (rows["arm"] != "small_dense")]
        assert set(tickets["weights_remaining"]) == {float(f"{100 * sum(survivors) / (15_160):.6g}")}
        survivors = [count - round(rate * count) for count, rate in zip(survivors, (0.6, 0.6, 0.6, 0.3), strict=True)]
    dense = rows[rows["arm"] == "dense"].set_index("step")["test_accuracy"]
    assert dense.max() > dense[0] + 20
