"""Masks, arms and tickets, against torch.nn.utils.prune and numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

BAR = tqdm(disable=True)


def dense_network(lth, seed: int = 0):
    """A network at its initial weights, all weights remaining."""
    weights = lth.initial_weights(torch.Generator().manual_seed(seed))
    return weights, lth.full_masks(weights)


@pytest.mark.parametrize("model", ["mlp", "lenet"])
def test_pruning_removes_what_l1_unstructured_removes(lth, model):
    """Four levels with weights that change in between, of three networks."""
    lth.use(MODEL=model, PRUNE_RATE=0.3)
    rates = lth.prune_rates(lth.build_network(model, 0))
    for seed in range(3):
        weights, masks = dense_network(lth, seed)
        plain = lth.as_plain_network(lth.build_network(model, 0), weights)
        layers = lth.weighted_layers(plain)
        for level in range(4):
            before, random = masks, torch.Generator().manual_seed(10 * seed + level)
            weights = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=random)
                       for name, tensor in weights.items()}
            masks = lth.prune(lth.masked(weights, masks), masks, rates, "layer")
            assert all((mask <= before[name]).all() for name, mask in masks.items())        # nested
            changed = lth.as_plain_network(lth.build_network(model, 0), weights)
            for name, layer in lth.weighted_layers(changed).items():
                original = "weight_orig" if torch_prune.is_pruned(layers[name]) else "weight"
                getattr(layers[name], original).data = layer.weight.data
            plain(torch.zeros(1, 1, 28, 28))                    # PyTorch masks the new weights in the forward pass
            for name, layer in layers.items():
                torch_prune.l1_unstructured(layer, "weight", amount=rates[f"{name}.weight"])
                ours = masks[f"{name}.weight"]
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
    """In a tensor of any shape, by the index in the flat one, and whatever the memory's own order is."""
    weights, expected = torch.tensor([3.0, -1.0, 1.0, 1.0, -1.0, 2.0]), torch.tensor([1, 0, 0, 0, 1, 1])
    for shape in ((6,), (1, 6), (6, 1), (2, 3), (3, 2), (3, 1, 2, 1)):
        left = lth.remove_smallest(weights.view(shape), torch.ones(shape), 3)
        assert left.tolist() == expected.view(shape).tolist()
        assert lth.remove_smallest(weights.view(shape), left, 0).tolist() == left.tolist()
        assert lth.remove_smallest(weights.view(shape), left, 1).flatten().tolist() == [1, 0, 0, 0, 0, 1]
    left = lth.remove_smallest(weights.view(2, 3).T.contiguous().T, torch.ones(3, 2).T, 3)
    assert left.tolist() == [[1, 0, 0], [0, 1, 1]]
    constant = {"fc1.weight": torch.ones(70, 30)}
    masks = lth.full_masks(constant)
    for survivors in (1680, 1344, 1075, 860):                                   # 2100 * 0.8, rounded level by level
        masks = lth.prune(constant, masks, {"fc1.weight": 0.2}, "layer")
        assert masks["fc1.weight"].sum() == survivors
        assert masks["fc1.weight"].flatten().tolist() == [0.0] * (2100 - survivors) + [1.0] * survivors


def test_negative_weights_are_judged_by_magnitude(lth):
    """Without the absolute value every negative weight would go first."""
    weights = {"fc1.weight": torch.linspace(-1, 1, 1000).view(20, 50)}
    left = lth.prune(weights, lth.full_masks(weights), {"fc1.weight": 0.5}, "layer")["fc1.weight"]
    survivors = weights["fc1.weight"][left == 1]
    assert survivors.abs().min() > weights["fc1.weight"][left == 0].abs().max()
    assert (survivors < 0).sum() == 250


def test_global_pruning_compares_all_layers(lth):
    for seed in range(3):
        weights, masks = dense_network(lth, seed)
        left = lth.prune(weights, masks, dict.fromkeys(masks, 0.4), "global")
        magnitudes = np.concatenate([weights[name].abs().flatten().numpy() for name in masks])
        kept = np.concatenate([left[name].flatten().numpy() for name in masks]).astype(bool)
        assert kept.sum() == len(kept) - round(0.4 * len(kept))
        assert magnitudes[kept].min() >= magnitudes[~kept].max()


def test_weights_remaining_counts_weights_and_no_biases(lth):
    masks = lth.full_masks(lth.stack([dense_network(lth, seed)[0] for seed in range(2)]))
    assert not [name for name in masks if "bias" in name]
    masks["fc1.weight"][1, :392] = 0
    new = {"level": 1, "records": [], "trained": {}}
    lth.record(new, [("rewind", 3), ("reinit", 3)], masks, {}, {}, [(5, *torch.ones(4, 2))])
    rows = new["records"]
    assert [(row["arm"], row["trial"], row["step"]) for row in rows] == [("rewind", 3, 5), ("reinit", 3, 5)]
    assert [row["weights_remaining"] for row in rows] == pytest.approx([100, 100 * (1 - 117_600 / 266_200)])


@pytest.fixture
def ticket(lth):
    """One network's theta0 with biases that are not zero, and masks that keep 20 % of the weights."""
    weights, masks = dense_network(lth)
    weights = {name: tensor + 0.1 if "bias" in name else tensor for name, tensor in weights.items()}
    return weights, lth.prune(weights, masks, dict.fromkeys(masks, 0.8), "layer")


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


def test_permute_moves_the_survivors_values_among_the_survivors_of_a_layer(lth, ticket):
    theta0, masks = ticket
    start, same = lth.permute(theta0=theta0, masks=masks, random=torch.Generator().manual_seed(5))
    assert same is masks
    for name, tensor in start.items():
        mask = masks.get(name, torch.ones_like(tensor))
        assert not tensor[mask == 0].any()
        assert torch.equal(tensor[mask == 1].sort().values, theta0[name][mask == 1].sort().values)
        moved = (tensor != theta0[name])[mask == 1].double().mean()
        assert moved > 0.9 if name in masks else moved == 0
        assert tensor.data_ptr() != theta0[name].data_ptr()


def test_signs_are_the_original_ones_and_magnitudes_are_fresh(lth, ticket):
    theta0, masks = ticket
    start, same = lth.signs(theta0=theta0, masks=masks, random=torch.Generator().manual_seed(99))
    fresh = lth.initial_weights(torch.Generator().manual_seed(99))
    assert same is masks
    for name, mask in masks.items():
        assert not start[name][mask == 0].any()
        kept, original = start[name][mask == 1], theta0[name][mask == 1]
        assert torch.equal(kept.sign(), original.sign())
        assert torch.equal(kept.abs(), fresh[name][mask == 1].abs())
        assert (kept != original).all()


def test_finetune_keeps_the_trained_survivors(lth, ticket):
    _, masks = ticket
    trained = lth.initial_weights(torch.Generator().manual_seed(77))
    start, same = lth.finetune(theta0=None, trained=trained, masks=masks)
    assert same is masks
    for name, tensor in start.items():
        assert torch.equal(tensor, trained[name] * masks.get(name, 1))
        assert tensor.data_ptr() != trained[name].data_ptr()


def test_magnitude_keeps_the_largest_initial_weights_as_many_as_the_ticket(lth, ticket):
    theta0, masks = ticket
    start, other = lth.magnitude(theta0=theta0, masks=masks)
    for name, mask in other.items():
        assert mask.sum() == masks[name].sum()
        assert theta0[name].abs()[mask == 1].min() >= theta0[name].abs()[mask == 0].max()
        assert torch.equal(start[name], theta0[name] * mask)


@pytest.mark.parametrize(("model", "share"), [("mlp", 0.5), ("mlp", 0.1), ("lenet", 0.5), ("lenet", 0.1)])
def test_small_is_a_narrower_dense_network(lth, model, share):
    """A plain network with fewer units gives its logits; it has the ticket's number of weights within 2 %, and its
    weights have the variance that is INIT's for its own sizes."""
    lth.use(MODEL=model)
    weights, masks = dense_network(lth)
    masks = lth.prune(weights, masks, dict.fromkeys(masks, 1 - share), "layer")
    start, blocks = lth.small(theta0=weights, masks=masks, random=torch.Generator().manual_seed(3))
    survivors = sum(int(mask.sum()) for mask in masks.values())
    assert sum(int(block.sum()) for block in blocks.values()) == pytest.approx(survivors, rel=0.02)

    def kept(name, dimension):
        others = [axis for axis in range(blocks[name].ndim) if axis != dimension]
        return int(blocks[name].sum(others).count_nonzero())

    linear, narrow = ["fc1", "fc2", "output"], nn.Sequential()
    if model == "lenet":
        conv1, conv2 = kept("conv1.weight", 0), kept("conv2.weight", 0)
        assert kept("conv2.weight", 1) == conv1 and kept("fc1.weight", 0) == 25 * conv2
        narrow = nn.Sequential(nn.Conv2d(1, conv1, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
                               nn.Conv2d(conv1, conv2, 5), nn.MaxPool2d(2), nn.ReLU())
    narrow.append(nn.Flatten())
    for name in linear:
        narrow.extend([nn.Linear(kept(f"{name}.weight", 0), kept(f"{name}.weight", 1)), nn.ReLU()])
    narrow = narrow[:-1]
    layers = [layer for layer in narrow if isinstance(layer, nn.Linear | nn.Conv2d)]
    for layer, (name, block) in zip(layers, blocks.items(), strict=True):
        values = start[name].T if isinstance(layer, nn.Linear) else start[name]
        assert not start[name][block == 0].any() and (start[name][block == 1] != 0).all()
        outputs, inputs = layer.weight.shape[:2]
        layer.weight.data = values[:outputs, :inputs].clone()
        layer.bias.data.zero_()
        assert layer.weight.count_nonzero() == layer.weight.numel() == block.sum()          # the first units, and all
        variance = 2 / layer.weight[0].numel()
        assert abs(layer.weight.var().item() / variance - 1) < 5 * (2 / layer.weight.numel()) ** 0.5, name
    images = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    logits = lth.forward(lth.build_network(model, 0), lth.stack([start]), images[None])
    torch.testing.assert_close(logits[0], narrow(images), rtol=1e-4, atol=1e-4)


def test_training_leaves_theta0_and_pruned_weights_alone(lth, some_mnist):
    """The pruned weights are exactly zero after training, decay, moments, clipping and all; theta0 keeps every bit."""
    lth.use(TRIALS=2, BATCH_SIZE=100, WEIGHT_DECAY=0.5, EPOCHS=1, steps_per_epoch=lambda: 30)
    singles = [dense_network(lth, seed) for seed in range(2)]
    masks = lth.stack([lth.prune(weights, masks, dict.fromkeys(masks, 0.9), "layer") for weights, masks in singles])
    start = lth.masked(lth.stack([weights for weights, _ in singles]), masks)
    before = {name: tensor.clone() for name, tensor in start.items()}
    data = {name: (images.float(), labels) for name, (images, labels) in some_mnist.items()}
    networks = [("rewind", 0), ("rewind", 1)]
    early, trained, _ = lth.train(start, masks, data, networks, level=1, bar=BAR)
    for name, tensor in trained.items():
        assert torch.equal(start[name], before[name]) and torch.equal(early[name], before[name])
        assert not torch.equal(tensor, before[name])
        if name in masks:
            assert not tensor[masks[name] == 0].any()
            assert (tensor[masks[name] == 1] != 0).all()
    # Nothing is carried over to the next training.
    _, again, _ = lth.train(start, masks, data, networks, level=1, bar=BAR)
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
