"""The networks: counts, initial weights, and a stack that computes just what its plain networks do."""

from collections import OrderedDict

import pytest
import torch
from conftest import use_model
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


@pytest.mark.parametrize(("arms", "sets"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("model", ["mlp", "lenet", "own"])
def test_a_stack_gives_the_logits_and_gradients_of_its_plain_networks(lth, model, arms, sets):
    """In double precision. Those that see one set of images, as the arms of a trial do, follow each other."""
    use_model(lth, model)
    lth.check_network(torch.device("cpu"))                                      # is not refused
    torch.manual_seed(1)
    plains = [lth.build_network(model, 0.2).double().eval() for _ in range(arms * sets)]
    weights = {name: torch.stack([plain.get_parameter(name).detach() for plain in plains]).requires_grad_()
               for name, _ in plains[0].named_parameters()}
    images = torch.randn(sets, 7, 1, 28, 28, dtype=torch.double)
    logits = lth.forward(lth.build_network(model, 0.2), weights, images)
    assert logits.shape == (arms * sets, 7, 10)
    logits.square().sum().backward()
    for n, plain in enumerate(plains):
        expected = plain(images[n // arms])
        expected.square().sum().backward()
        torch.testing.assert_close(logits[n], expected, rtol=1e-10, atol=1e-10)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(weights[name].grad[n], parameter.grad, rtol=1e-9, atol=1e-9)


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
    """None of its layers is passed over, or taken for what it is not."""
    lth.use(build_network=lambda *_: REFUSED[kind]())
    with pytest.raises(lth.UserError, match=r"^the network in build_network cannot be trained in a stack: [^\n]*$"):
        lth.check_network(torch.device("cpu"))
