"""Masks, arms and tickets, against torch.nn.utils.prune and numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

BAR = tqdm(disable=True)


def dense_stack(lth, nets: int = 3):
    """Networks at their initial weights, all weights remaining."""
    weights = lth.stack([lth.initial_weights(torch.Generator().manual_seed(n)) for n in range(nets)])
    return weights, lth.full_masks(weights)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_pruning_removes_what_l1_unstructured_removes(lth, model):
    """Four levels with weights that change in between; PyTorch prunes the same networks one by one."""
    lth.use(MODEL=model, PRUNE_RATE=0.3)
    weights, masks = dense_stack(lth)
    network = lth.build_network(model, 0)
    rates = lth.prune_rates(network)
    plains = [lth.as_plain_network(network, lth.pick(weights, n)) for n in range(3)]
    for level in range(4):
        before = masks
        weights = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(level))
                   for name, tensor in weights.items()}
        masks = lth.prune(lth.masked(weights, masks), masks, rates, "layer")
        assert all((mask <= before[name]).all() for name, mask in masks.items())            # nested
        for n, plain in enumerate(plains):
            layers = lth.weighted_layers(plain)
            for name, layer in lth.weighted_layers(lth.as_plain_network(network, lth.pick(weights, n))).items():
                original = "weight_orig" if torch_prune.is_pruned(layers[name]) else "weight"
                getattr(layers[name], original).data = layer.weight.data
            plain(torch.zeros(1, 1, 28, 28))                    # PyTorch masks the new weights in the forward pass
            for name, layer in layers.items():
                torch_prune.l1_unstructured(layer, "weight", amount=rates[f"{name}.weight"])
                ours = masks[f"{name}.weight"][n]
                assert torch.equal(ours.T if isinstance(layer, nn.Linear) else ours, layer.weight_mask), (level, name)


def test_output_layer_and_convolutions_are_pruned_at_half_the_rate(lth):
    lth.use(PRUNE_RATE=0.2)
    mlp, lenet = lth.build_network("mlp", 0), lth.build_network("lenet", 0)
    assert lth.prune_rates(mlp) == {"fc1.weight": 0.2, "fc2.weight": 0.2, "output.weight": 0.1}
    assert lth.prune_rates(lenet) == {"conv1.weight": 0.1, "conv2.weight": 0.1, "fc1.weight": 0.2, "fc2.weight": 0.2,
                                      "output.weight": 0.1}
    lth.use(PRUNE_SCOPE="global")
    assert set(lth.prune_rates(lenet).values()) == {0.2}


def test_counts_are_exact_and_ties_go_by_index(lth):
    weights = torch.tensor([[3.0, -1.0, 1.0, 1.0, -1.0, 2.0]])
    left = lth.remove_smallest(weights, torch.ones(1, 6), 3)
    assert left.tolist() == [[1, 0, 0, 0, 1, 1]]
    assert lth.remove_smallest(weights, left, 0).tolist() == left.tolist()
    constant = {"fc1.weight": torch.ones(2, 70, 30)}
    masks = lth.full_masks(constant)
    for survivors in (1680, 1344, 1075, 860):                                   # 2100 * 0.8, rounded level by level
        masks = lth.prune(constant, masks, {"fc1.weight": 0.2}, "layer")
        assert masks["fc1.weight"].flatten(1).sum(1).tolist() == [survivors] * 2


def test_negative_weights_are_judged_by_magnitude(lth):
    """Without the absolute value every negative weight would go first."""
    weights = {"fc1.weight": torch.linspace(-1, 1, 1000).view(1, 20, 50)}
    left = lth.prune(weights, lth.full_masks(weights), {"fc1.weight": 0.5}, "layer")["fc1.weight"]
    survivors = weights["fc1.weight"][left == 1]
    assert survivors.abs().min() > weights["fc1.weight"][left == 0].abs().max()
    assert (survivors < 0).sum() == 250


def test_global_pruning_compares_all_layers(lth):
    weights, masks = dense_stack(lth)
    left = lth.prune(weights, masks, dict.fromkeys(masks, 0.4), "global")
    for n in range(3):
        magnitudes = np.concatenate([weights[name][n].abs().flatten().numpy() for name in masks])
        kept = np.concatenate([left[name][n].flatten().numpy() for name in masks]).astype(bool)
        assert kept.sum() == len(kept) - round(0.4 * len(kept))
        assert magnitudes[kept].min() >= magnitudes[~kept].max()


def test_weights_remaining_counts_weights_and_no_biases(lth):
    _, masks = dense_stack(lth, nets=2)
    assert not [name for name in masks if "bias" in name]
    masks["fc1.weight"][1, :392] = 0
    assert lth.weights_remaining(masks).tolist() == pytest.approx([100, 100 * (1 - 117_600 / 266_200)])


@pytest.fixture
def ticket(lth):
    """One network's theta0 with biases that are not zero, and masks that keep 20 % of the weights."""
    weights, masks = dense_stack(lth, nets=1)
    weights = {name: tensor + 0.1 if "bias" in name else tensor for name, tensor in weights.items()}
    masks = lth.prune(weights, masks, dict.fromkeys(masks, 0.8), "layer")
    return lth.pick(weights, 0), lth.pick(masks, 0)


def test_rewind_gives_the_survivors_back_bit_by_bit(lth, ticket):
    theta0, masks = ticket
    start, same = lth.rewind(theta0=theta0, masks=masks)
    assert same is masks
    for name, tensor in start.items():
        kept = masks[name] == 1 if name in masks else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor[kept], theta0[name][kept])
        assert not tensor[~kept].any()
        assert tensor.data_ptr() != theta0[name].data_ptr()


def test_reinit_draws_other_weights_on_the_same_masks(lth, ticket):
    theta0, masks = ticket
    start, same = lth.reinit(masks=masks, random=torch.Generator().manual_seed(99))
    fresh = lth.initial_weights(torch.Generator().manual_seed(99))
    assert same is masks
    for name, mask in masks.items():
        assert not start[name][mask == 0].any()
        assert torch.equal(start[name][mask == 1], fresh[name][mask == 1])
        assert (start[name] != theta0[name])[mask == 1].all()


def test_shuffle_keeps_each_layers_count_but_not_the_places(lth, ticket):
    theta0, masks = ticket
    start, other = lth.shuffle(theta0=theta0, masks=masks, random=torch.Generator().manual_seed(5))
    for name, mask in other.items():
        assert mask.sum() == masks[name].sum()
        assert not torch.equal(mask, masks[name])
        assert torch.equal(start[name], theta0[name] * mask)


def test_oneshot_keeps_the_dense_networks_largest_as_many_as_the_ticket(lth, ticket):
    theta0, masks = ticket
    dense = lth.initial_weights(torch.Generator().manual_seed(77))
    start, other = lth.oneshot(theta0=theta0, masks=masks, dense=dense)
    for name, mask in other.items():
        assert mask.sum() == masks[name].sum()
        assert dense[name].abs()[mask == 1].min() >= dense[name].abs()[mask == 0].max()
        assert torch.equal(start[name], theta0[name] * mask)


def test_training_leaves_theta0_and_pruned_weights_alone(lth, some_mnist):
    """The pruned weights are exactly zero after training, decay, moments, clipping and all; theta0 keeps every bit."""
    lth.use(TRIALS=2, BATCH_SIZE=100, WEIGHT_DECAY=0.5)
    weights, masks = dense_stack(lth, nets=2)
    masks = lth.prune(weights, masks, dict.fromkeys(masks, 0.9), "layer")
    start = lth.masked(weights, masks)
    before = {name: tensor.clone() for name, tensor in start.items()}
    data = {name: (images.float(), labels) for name, (images, labels) in some_mnist.items()}
    trained, _ = lth.train(start, masks, data, ("rewind",), level=1, steps=30, bar=BAR)
    for name, tensor in trained.items():
        assert torch.equal(start[name], before[name])
        assert not torch.equal(tensor, before[name])
        if name in masks:
            assert not tensor[masks[name] == 0].any()
            assert (tensor[masks[name] == 1] != 0).all()
    # Nothing is carried over to the next training.
    again, _ = lth.train(start, masks, data, ("rewind",), level=1, steps=30, bar=BAR)
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


def test_clipping_is_per_network(lth):
    sizes = torch.tensor([[100.0], [1e-3], [1.0]])
    gradients = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * sizes
    expected = []
    for row in gradients:
        parameter = nn.Parameter(torch.zeros(1000))
        parameter.grad = row.clone()
        nn.utils.clip_grad_norm_([parameter], 1.0)
        expected.append(parameter.grad)
    small = gradients[1].clone()
    lth.clip_per_network(gradients, 1.0)
    torch.testing.assert_close(gradients, torch.stack(expected))
    assert torch.equal(gradients[1], small)


def test_one_seed_one_set_of_random_numbers_whatever_the_purpose(lth):
    def draw(*key):
        return tuple(torch.rand(4, generator=lth.generator(*key)).tolist())

    keys = [(purpose, trial, level) for purpose in lth.PURPOSES for trial in range(3) for level in range(3)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw("init", 1) == draw("init", 1)
    first = draw("init", 1)
    lth.use(SEED=43)
    assert draw("init", 1) != first
