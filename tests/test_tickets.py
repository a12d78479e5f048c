"""Pruning, arms and the level loop, against torch.nn.utils.prune and numpy; nothing is trained here."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BAR, seeded
from torch import nn
from torch.nn.utils import prune as torch_prune

import lth_pruning

ON_ITS_MASK = ("rewind", "reinit", "shuffle_weights", "keep_signs", "finetune")             # the ticket's
ARMS = (*ON_ITS_MASK, "shuffle_mask", "oneshot", "magnitude_at_init", "small_dense", "transfer")
# The units of each model's hidden layers, and how many weights it has with so many or fewer
HIDDEN = {"LeNet-300-100": ((300, 100), lambda a, b: 784 * a + a * b + 10 * b),
          "LeNet-5": ((6, 16, 120, 84), lambda a, b, c, d: 25 * a + 25 * a * b + 25 * b * c + c * d + 10 * d)}
EACH = list(product(range(2), range(1, 4)))       # trials and levels


def without_smallest(values: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return, by numpy, the mask without its `count` survivors of smallest magnitude, the first of equal ones."""
    remaining = mask.flatten().numpy().copy()
    survivors = np.flatnonzero(remaining)
    order = np.argsort(np.abs(values.flatten().numpy()[survivors]), kind="stable")
    remaining[survivors[order[:count]]] = 0
    return torch.from_numpy(remaining).view(mask.shape)


@pytest.mark.parametrize(("model", "scope"), [("mlp", "layer"), ("lenet", "layer"), ("mlp", "global")])
def test_pruning_removes_what_pytorch_removes(lth, model, scope):
    """Over four levels, with new weights at each: what was pruned stays so. A layer must keep some weight."""
    lth.use(MODEL=model, PRUNE_RATE=0.3, PRUNE_SCOPE=scope)
    plain = lth.build_network(model, 0).to_empty(device="cpu")
    rates = lth.prune_rates(plain)
    layers = {f"{name}.weight": layer for name, layer in plain.named_children() if hasattr(layer, "weight")}
    masks = {name: torch.ones(layer.weight.shape) for name, layer in layers.items()}
    for level in range(4):
        weights = {name: scale * torch.randn(mask.shape, generator=seeded(name, 0, level))
                   for scale, (name, mask) in enumerate(masks.items(), start=1)}
        masks = lth.prune(weights, masks, rates, scope)
        if scope == "global":
            scores = {(layer, "weight"): weights[name] for name, layer in layers.items()}
            torch_prune.global_unstructured([*scores], torch_prune.L1Unstructured, scores, amount=0.3)
        for name, layer in layers.items():
            if scope == "layer":
                rate = 0.15 if name == "output.weight" or isinstance(layer, nn.Conv2d) else 0.3
                torch_prune.l1_unstructured(layer, "weight", amount=rate, importance_scores=weights[name])
            assert torch.equal(masks[name], layer.weight_mask), (level, name)
    weights["output.weight"] /= 1e9
    if scope == "global":
        with pytest.raises(lth.UserError, match=r"leave no weight of output\.weight: lower LEVELS [^\n]*$"):
            lth.prune(weights, masks, rates, scope)


@pytest.fixture(scope="module", params=[("mlp", "kaiming_normal", 0), ("lenet", "xavier_normal", 3)])
def run(request):
    """Two trials and three levels of all arms: what each network started from, and what came out of a training that
    adds REWIND_STEP to weights until this step, and afterwards noise to survivors, rounded so that many are equal."""
    model, init, rewind_step = request.param
    run = SimpleNamespace(init=init, start={}, trained={}, source={}, state=lth_pruning.State(), saved=[])

    def train(weights, masks, _data, networks, level, _bar):
        early = {name: tensor + rewind_step for name, tensor in weights.items()}
        trained = {name: (tensor + 0.1 * torch.randn(tensor.shape, generator=seeded(name, len(networks), level)))
                   .round(decimals=2) * masks.get(name, 1) for name, tensor in weights.items()}
        for n, (arm, trial) in enumerate(networks):
            assert (arm, trial, level) not in run.start
            run.start[arm, trial, level] = lth_pruning.pick(weights, n), lth_pruning.pick(masks, n)
            run.trained[arm, trial, level] = lth_pruning.to_cpu(lth_pruning.pick(trained, n))
        return early, trained, [(9, *[torch.ones(len(networks))] * 4)]

    assert set(lth_pruning.ARM_TABLE) == set(ARMS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODEL": model, "INIT": init, "TRIALS": 2, "LEVELS": 3, "PRUNE_RATE": 0.7,
                            "ARMS": ARMS, "REWIND_STEP": rewind_step, "train": train,
                            "report_level": lambda *_: None, "progress_bar": lambda _: BAR}.items():
            patch.setattr(lth_pruning, name, value)
        run.plain = lth_pruning.build_network(model, 0)
        for trial in range(2):
            weights = fresh(run, "source", trial)
            run.source[trial] = weights, {name: torch.randint(0, 5, tensor.shape, generator=seeded(name, trial))
                                          for name, tensor in weights.items() if "weight" in name}
        lth_pruning.run_experiment(run.state, {"train": (torch.zeros(1),)}, run.source,
                                   lambda state: run.saved.append(state.level))
    run.theta0 = [fresh(run, "init", trial) for trial in range(2)]
    run.late = [{name: tensor + rewind_step for name, tensor in theta0.items()} for theta0 in run.theta0]
    return run


def variance(run, weight: torch.Tensor) -> float:
    """Return He's variance of initial weights, or Glorot's."""
    inputs, outputs = weight[0].numel(), weight[:, 0].numel()
    return 2 / inputs if run.init == "kaiming_normal" else 2 / (inputs + outputs)


def fresh(run, purpose: str, trial: int, level: int = 0) -> dict:
    """Draw initial weights with a purpose's random numbers, a second time; biases are zero."""
    rng = seeded(purpose, trial, level)
    return {name: torch.zeros(tensor.shape) if "bias" in name else torch.empty(tensor.shape).normal_(
        0, variance(run, tensor) ** 0.5, generator=rng) for name, tensor in run.plain.named_parameters()}


def check_start(run, arm: str, trial: int, level: int, weights: dict, masks: dict) -> None:
    """Assert that an arm's network started from these weights, zero where these masks are."""
    expected = {name: tensor * masks.get(name, 1) for name, tensor in weights.items()}
    torch.testing.assert_close(run.start[arm, trial, level], (expected, masks), rtol=1e-6, atol=0)


def test_each_level_prunes_the_smallest_weights_of_the_rewind_networks_of_the_level_before(run):
    """Of the dense ones at first, and of no other arm. After each level the state is saved; no arm has changed it."""
    assert run.saved == [0, 1, 2, 3]
    for trial in range(2):
        torch.testing.assert_close(run.state.theta_k[trial], run.late[trial])
        torch.testing.assert_close(run.state.dense[trial], run.trained["dense", trial, 0], rtol=0, atol=0)
        masks = dict(run.start["dense", trial, 0][1])
        assert all(mask.all() for mask in masks.values())
        for level in range(1, 4):
            trained = run.trained["dense" if level == 1 else "rewind", trial, level - 1]
            for name, mask in masks.items():
                rate = 0.35 if "conv" in name or "output" in name else 0.7
                masks[name] = without_smallest(trained[name], mask, round(rate * mask.sum().item()))
                assert torch.equal(lth_pruning.masks_at(run.state.pruned_at[trial], level)[name], masks[name])
                for arm in ON_ITS_MASK:
                    assert torch.equal(run.start[arm, trial, level][1][name], masks[name])


def test_arms_start_from_what_they_say(run):
    """theta0 is the first weights, for late arms those of REWIND_STEP. Values are permuted within each layer."""
    for trial, level in EACH:
        theta0, late = run.theta0[trial], run.late[trial]
        masks = run.start["rewind", trial, level][1]
        ones = {name: torch.ones_like(mask) for name, mask in masks.items()}
        check_start(run, "dense", trial, 0, theta0, ones)
        check_start(run, "rewind", trial, level, late, masks)
        check_start(run, "reinit", trial, level, fresh(run, "arm reinit", trial, level), masks)
        drawn = fresh(run, "arm keep_signs", trial, level)
        signed = {name: abs(drawn[name]) * tensor.sign() for name, tensor in theta0.items()}
        check_start(run, "keep_signs", trial, level, signed, masks)
        trained = run.trained["dense" if level == 1 else "rewind", trial, level - 1]
        check_start(run, "finetune", trial, level, trained, masks)
        for arm, start, judged in (("oneshot", late, run.trained["dense", trial, 0]),
                                   ("magnitude_at_init", theta0, theta0)):
            largest = {name: without_smallest(judged[name], ones[name], int(ones[name].sum() - mask.sum()))
                       for name, mask in masks.items()}
            check_start(run, arm, trial, level, start, largest)
        rng = seeded("arm shuffle_mask", trial, level)
        moved = {name: mask.flatten()[torch.randperm(mask.numel(), generator=rng)].view(mask.shape)
                 for name, mask in masks.items()}
        check_start(run, "shuffle_mask", trial, level, late, moved)
        rng = seeded("arm shuffle_weights", trial, level)
        permuted = dict(late)
        for name, mask in masks.items():
            values = late[name][mask == 1]
            permuted[name] = torch.zeros(mask.shape)
            permuted[name][mask == 1] = values[torch.randperm(len(values), generator=rng)]
        check_start(run, "shuffle_weights", trial, level, permuted, masks)
        weights, levels = run.source[trial]
        found = {name: ((pruned == 0) | (pruned > level)).float() for name, pruned in levels.items()}
        check_start(run, "transfer", trial, level, weights, found)


def test_small_dense_is_a_narrower_network_with_about_as_many_weights(run):
    """No other scale of its hidden layers comes nearer: of at least 10 units, or a feature map. INIT draws it."""
    units, count = HIDDEN[run.plain.name]
    for trial, level in EACH:
        weights, blocks = run.start["small_dense", trial, level]
        survivors = sum(int(mask.sum()) for mask in run.start["rewind", trial, level][1].values())
        distances = [abs(count(*(max(10 if full > 16 else 1, round(full * k / 1000)) for full in units)) - survivors)
                     for k in range(1001)]
        assert abs(sum(int(block.sum()) for block in blocks.values()) - survivors) == min(distances)
        for name, block in blocks.items():
            rows, columns = (int(side.flatten(1).any(1).sum()) for side in (block, block.transpose(0, 1)))
            values = weights[name][:rows, :columns]         # of the first units, all
            assert torch.equal(weights[name] != 0, block == 1)
            assert block.sum() == values.numel() == values.count_nonzero()
            expected = pytest.approx(variance(run, values), rel=4.5 * (2 / values.numel()) ** 0.5)
            assert values.square().mean().item() == expected, name


@pytest.mark.parametrize("start", [
    lambda given: (given.theta0, given.masks), lambda given: None, lambda given: ({}, given.masks),
    lambda given: ({name: 0 * tensor for name, tensor in given.theta0.items()},
                   {name: mask / 2 for name, mask in given.masks.items()}),
    lambda given: ({name: tensor / 0 for name, tensor in given.theta0.items()}, given.masks),
    lambda given: ([tensor.zero_() for tensor in given.theta0.values()], (given.theta0, given.masks))[1]])
def test_an_arm_that_cannot_be_trained_is_refused_before_the_work(lth, start):
    """Pruned weights that are not zero, nothing, no weights, a mask of halves, infinite weights, theta0 changed."""
    lth.use(ARM_TABLE=lth.ARM_TABLE | {"mine": lth.Arm(start, "mine", "red", "o")}, ARMS=("rewind", "mine"))
    with pytest.raises(lth.UserError, match=r"the arm mine in ARM_TABLE cannot be used \([^\n]*$"):
        lth.check_arms()
