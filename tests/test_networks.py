"""The networks: their initial weights, and those that a stack cannot train. (What a stack trains: test_training.py.)"""

from collections import OrderedDict

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_glorots_initial_weights_have_their_variance(lth, model):
    """2 by the sum of a unit's inputs and outputs, but for four standard errors. (He's: see the arm reinit.)"""
    lth.use(MODEL=model, INIT="xavier_normal")
    weights = lth.initial_weights(torch.Generator().manual_seed(1))
    for name, layer in lth.weighted_layers(lth.build_network(model, 0)).items():
        variance = 2 / (layer.weight[0].numel() + layer.weight[:, 0].numel())
        measured = weights[f"{name}.weight"].square().mean().item()
        assert measured == pytest.approx(variance, rel=4 * (2 / layer.weight.numel()) ** 0.5), name
        assert not weights[f"{name}.bias"].any()


def network_of(*layers: nn.Module, last: str = "output") -> nn.Sequential:
    """These layers, and behind whatever they give a linear one with this name."""
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


@pytest.mark.parametrize("layers", [(nn.AvgPool2d(2), nn.Tanh()), (nn.MaxPool2d(2), nn.Conv2d(1, 4, 5))])
def test_layers_before_flatten_compute_what_they_do_alone(lth, layers):
    """Of two networks, on images of two trials that are not contiguous; without a convolution, too."""
    network = network_of(*layers, nn.Flatten())
    lth.use(build_network=lambda *_: network)
    weights = [lth.initial_weights(torch.Generator().manual_seed(seed)) for seed in range(4)]
    images = torch.rand(28, 28, 1, 3, 2).permute(4, 3, 2, 0, 1)
    found = lth.forward(network, lth.stack(weights), images)
    for n in range(4):
        expected = lth.as_plain_network(network, weights[n])(images[n // 2])
        torch.testing.assert_close(found[n], expected, rtol=1e-4, atol=1e-5)
