"""Sparse layers: the same products and gradients; a network's own survivors decide, whoever its neighbours are."""

import itertools

import pytest
import torch
from conftest import BAR, QUICK, check_same_results, read_metrics, run_here, seeded

CPU = torch.device("cpu")
TRIALS = 3


def random_masks(counts: list[int], outputs: int, inputs: int) -> torch.Tensor:
    """Return masks (nets, out, in) that keep so many weights each, at random places."""
    ranks = torch.rand(len(counts), outputs * inputs, generator=seeded("places")).argsort(1).argsort(1)
    return (ranks < torch.tensor(counts).unsqueeze(1)).float().view(-1, outputs, inputs)


@pytest.mark.parametrize(("nets", "sets"), [(6, 1), (6, 3), (6, 6), (1, 1)])
def test_a_sparse_layer_computes_and_differentiates_as_a_dense_one(lth, nets, sets):
    """For inputs that all networks share, that a trial's arms share, and of each network's own; in double precision.

    Some rows and columns have no survivor. Shared inputs are images, which need no gradient. The weights themselves
    are not touched.
    """
    mask = random_masks(nets * [40], 30, 17)
    mask[:, 3] = 0
    mask[0, :, 5] = 0
    counts = mask.flatten(1).sum(1).long()
    mask[:, 20, 6:] = 1                                     # all networks keep equally many survivors
    counts = mask.flatten(1).sum(1).long()
    for n, surplus in enumerate(counts - counts.min()):
        mask[n].view(-1)[mask[n].flatten().nonzero().flatten()[:surplus]] = 0
    weight = torch.randn(mask.shape, generator=seeded("weight")).double()
    bias = torch.randn(nets, 30, generator=seeded("bias")).double().requires_grad_()
    # As images come: (sets, batch, in), turned.
    x = torch.randn(sets, 8, 17, generator=seeded("x")).double().mT.requires_grad_(sets == nets)
    upstream = torch.randn(nets, 30, 8, generator=seeded("upstream")).double()

    survivors = lth.find_survivors(mask, {sets})
    values = lth.take_survivors({"layer": weight}, {"layer": survivors})["layer"].requires_grad_()
    before = values.detach().clone()
    found = lth.linear(x, values, bias, survivors)
    behind = [x, bias] if sets == nets else [bias]
    gradients = torch.autograd.grad((found * upstream).sum(), [values, *behind])

    dense = (weight * mask).requires_grad_()
    own_inputs = x.repeat_interleave(nets // sets, 0)
    expected = torch.einsum("noi,nib->nob", dense, own_inputs) + bias.unsqueeze(2)
    at_all, *others = torch.autograd.grad((expected * upstream).sum(), [dense, *behind])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0], at_all[mask.bool()].view(nets, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[1:], tuple(others), rtol=0, atol=1e-12)
    assert torch.equal(values, before)
    back = lth.put_back({"layer": values.detach(), "other": bias}, {"layer": survivors})
    assert torch.equal(back["layer"], weight * mask) and back["other"] is bias


def test_a_layer_is_sparse_by_its_own_count_alone(lth):
    """Below 23 % of its weights, on a CPU, if it is linear: whoever is beside it."""
    counts = [229, 230, 231, 1, 1000]
    masks = {"fc1.weight": random_masks(counts, 25, 40), "conv1.weight": torch.zeros(5, 6, 1, 5, 5),
             "output.weight": random_masks([0, 20, 23, 22, 100], 10, 10)}
    stored = lth.sparse_counts(masks, CPU)
    assert {name: count.tolist() for name, count in stored.items()} == {
        "fc1.weight": [229, 0, 0, 1, 0], "output.weight": [0, 20, 0, 22, 0]}
    for n in range(5):
        alone = lth.sparse_counts(lth.pick(masks, [n]), CPU)
        assert all(torch.equal(count, stored[name][[n]]) for name, count in alone.items())
    assert not lth.sparse_counts(masks, torch.device("cuda"))
    assert not lth.sparse_layers(masks, {1}, CPU)           # their counts differ
    assert [*lth.sparse_layers(lth.pick(masks, [0]), {1}, CPU)] == ["fc1.weight"]
    assert [*lth.sparse_layers(lth.pick(masks, [3, 3]), {1}, CPU)] == ["fc1.weight", "output.weight"]


def start_with(counts: dict):
    """Return a `start_network` whose networks keep so many of 100 weights, by arm or by arm and trial."""
    def start(network, *_):
        kept = counts.get(network, counts.get(network[0], 100))
        mask = torch.zeros(100)
        mask[:kept] = 1
        return {"output.weight": mask.view(10, 10) * 2}, {"output.weight": mask.view(10, 10)}

    return start


@pytest.mark.parametrize("counts", [
    {}, {"rewind": 20, "reinit": 20}, {"rewind": 20, "reinit": 20, "small_dense": 21}, {"rewind": 20, "reinit": 40},
    {("rewind", 0): 20, ("reinit", 0): 20, ("rewind", 1): 22, ("reinit", 1): 22, "rewind": 24, "reinit": 26},
    {"rewind": 20, "reinit": 20, ("reinit", 1): 19}, {"rewind": 50, "reinit": 24}])
@pytest.mark.parametrize("rewind_step", [0, 100])
def test_stacks_hold_every_network_once_among_equally_sparse_ones(lth, counts, rewind_step):
    """A network that stores another number of survivors has a stack of its own; arms of a trial stay neighbours.

    Of all trials in a stack, equally many arms: `train` deals its batches so. Networks start at the same step.
    """
    arms = ("small_dense", "rewind", "reinit", "finetune")
    lth.use(TRIALS=TRIALS, ARMS=arms, REWIND_STEP=rewind_step, start_network=start_with(counts))
    seen = []
    for networks, weights, masks in lth.stacks(lth.State(), 1, {}, CPU):
        seen += networks
        kept = masks["output.weight"].flatten(1).sum(1)
        assert torch.equal(weights["output.weight"], 2 * masks["output.weight"])
        for n, network in enumerate(networks):
            assert kept[n] == counts.get(network, counts.get(network[0], 100))
        stored = [int(count) if count < 23 else 0 for count in kept]
        assert len(set(stored)) == 1, stored
        assert bool(lth.sparse_layers(masks, {1}, CPU)) == (stored[0] > 0)
        assert len({lth.first_step(arm) for arm, _ in networks}) == 1
        by_trial = [[arm for arm, _ in group] for _, group in itertools.groupby(networks, lambda network: network[1])]
        assert len(by_trial) == len({trial for _, trial in networks})
        assert len({len(of_trial) for of_trial in by_trial}) == 1
    assert sorted(seen) == sorted(itertools.product(arms, range(TRIALS))) and len(seen) == len(set(seen))


@pytest.mark.parametrize(("device", "size", "most"), [("cpu", None, 20), ("cuda", None, 200), ("cpu", 7, 7),
                                                      ("cpu", 1, 1)])
def test_stacks_are_as_large_as_they_may_be(lth, device, size, most):
    """Of 50 trials: trial by trial, all starting at one step, and no more stacks than their size asks for."""
    late = {"rewind", "shuffle_weights", "finetune", "shuffle_mask", "oneshot", "transfer"}
    for arms, step in itertools.product((("rewind",), ("reinit", "rewind"), tuple(lth.ARM_TABLE)), (0, 100)):
        lth.use(TRIALS=50, ARMS=arms, REWIND_STEP=step, STACK_SIZE=size, start_network=start_with({}))
        groups = [[arm for arm in arms if step * (arm in late) == start] for start in sorted({0, step})]
        expected = []
        for group in filter(None, groups):
            trials = max(1, most // len(group))             # the arms of a trial are never parted
            expected += [[(arm, trial) for trial in range(first, min(first + trials, 50)) for arm in group]
                         for first in range(0, 50, trials)]
        found = [networks for networks, _, _ in lth.stacks(lth.State(), 1, {}, torch.device(device))]
        assert found == expected
        dense = [networks for networks, _, _ in lth.stacks(lth.State(), 0, {}, torch.device(device))]
        assert [*itertools.chain(*dense)] == [("dense", trial) for trial in range(50)]


@pytest.mark.parametrize(("model", "options"), [
    ("mlp", ("ARMS=rewind,small_dense,shuffle_mask,reinit", "REWIND_STEP=2", "LEVELS=3", "EVAL_EVERY=4")),
    ("mlp", ("PRUNE_SCOPE=global",)), ("lenet", ("ARMS=rewind,reinit,small_dense",))])
def test_a_runs_numbers_do_not_depend_on_stack_size(lth, undrawn, tmp_path, model, options):
    """Byte for byte, with sparse levels, uneven counts and late rewinding.

    Dense throughout, the same run is the same but for rounding: sparse layers change the speed, not the results.
    """
    used = []
    find = lth.sparse_layers
    lth.use(sparse_layers=lambda *given: used.append(find(*given)) or used[-1])
    options = (*QUICK, f"MODEL={model}", "TRIALS=2", "BATCH_SIZE=100", *options)
    run_here(lth, tmp_path / "one", *options, "STACK_SIZE=1")
    lone = len(used)
    run_here(lth, tmp_path / "default", *options)
    assert lone >= len(used) - lone and any(map(len, used[:lone])) and any(map(len, used[lone:]))
    check_same_results(tmp_path / "one", tmp_path / "default")

    lth.use(SPARSE_BELOW=0)
    run_here(lth, tmp_path / "dense", *options)
    assert not any(map(len, used[-3:]))
    rows, dense = (read_metrics(tmp_path / folder) for folder in ("default", "dense"))
    assert rows[["arm", "trial", "level", "step"]].equals(dense[["arm", "trial", "level", "step"]])
    assert abs(rows["val_loss"] / dense["val_loss"] - 1).max() < 1e-3


def test_a_global_scope_trains_networks_of_uneven_counts_alone(lth, mnist):
    """Two trials whose counts differ train as each does alone; nothing is sparse for one because of the other."""
    lth.use(EPOCHS=1, steps_per_epoch=lambda: 6, BATCH_SIZE=20, TRIALS=2, ARMS=("rewind",))
    masks = {}
    for trial, share in enumerate((0.1, 0.25)):             # of the second layer; the first one is sparse for both
        masks["rewind", trial] = {
            "fc1.weight": random_masks([20_000 + trial], 300, 784)[0],
            "fc2.weight": random_masks([int(share * 30_000)], 100, 300)[0], "output.weight": torch.ones(10, 100)}
    weights = {network: lth.masked(lth.initial_weights(seeded("start", network[1])), mask)
               for network, mask in masks.items()}
    lth.use(start_network=lambda network, *_: (weights[network], masks[network]))
    data = {part: (images[:200], labels[:200]) for part, (images, labels) in mnist.items()}
    groups = list(lth.stacks(lth.State(), 1, {}, CPU))
    assert [networks for networks, _, _ in groups] == [[("rewind", 0)], [("rewind", 1)]]
    layers = [[*lth.sparse_layers(mask, {1}, CPU)] for _, _, mask in groups]
    assert layers == [["fc1.weight", "fc2.weight"], ["fc1.weight"]]
    for networks, start, mask in groups:
        _, trained, _ = lth.train(start, mask, data, networks, 1, BAR)
        for name in mask:
            assert trained[name].shape == mask[name].shape and not trained[name][mask[name] == 0].any()
            assert (trained[name] != start[name])[mask[name] == 1].float().mean() > 0.5
