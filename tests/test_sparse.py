"""Sparse layers: the same products and gradients; a network's own survivors decide, whoever its neighbours are."""

import itertools

import pytest
import torch
from conftest import QUICK, check_same_results, read_metrics, run_here, seeded

CPU = torch.device("cpu")


@pytest.mark.parametrize(("nets", "sets"), [(6, 1), (6, 3), (6, 6), (1, 1)])
def test_a_sparse_layer_computes_and_differentiates_as_a_dense_one(lth, nets, sets):
    """In double precision, for inputs that all networks share, that a trial's arms share, or of each network's own."""
    mask = torch.zeros(nets, 30, 17)
    for n in range(nets):
        mask[n].view(-1)[torch.randperm(30 * 17, generator=seeded("", n))[:40]] = 1
    assert (mask.sum(1) == 0).any() and (mask.sum(2) == 0).any()
    weight, bias, upstream = (torch.randn(shape, generator=seeded("numbers")).double().requires_grad_()
                              for shape in ((nets, 30, 17), (nets, 30), (nets, 30, 8)))
    # Shared inputs are images, which need no gradient.
    x = torch.randn(sets, 8, 17, generator=seeded("x")).double().mT.requires_grad_(sets == nets)
    behind = [x, bias] if sets == nets else [bias]

    survivors = lth.find_survivors(mask, {sets})
    values = lth.take_survivors({"layer": weight.detach()}, {"layer": survivors})["layer"].requires_grad_()
    before = values.detach().clone()
    found = lth.linear(x, values, bias, survivors)
    at_survivors, *others = torch.autograd.grad((found * upstream).sum(), [values, *behind])

    expected = torch.einsum("noi,nib->nob", weight * mask, x.repeat_interleave(nets // sets, 0)) + bias.unsqueeze(2)
    at_all, *expected_others = torch.autograd.grad((expected * upstream).sum(), [weight, *behind])
    torch.testing.assert_close((found, at_survivors), (expected, at_all[mask == 1].view(nets, 40)), rtol=0, atol=1e-12)
    torch.testing.assert_close(others, expected_others, rtol=0, atol=1e-12)
    back = lth.put_back({"layer": values.detach(), "other": bias}, {"layer": survivors})
    assert torch.equal(values, before) and torch.equal(back["layer"], weight * mask) and back["other"] is bias


def some_of_100(*counts: int) -> torch.Tensor:
    """Return masks (nets, 10, 10) that keep so many weights each."""
    return (torch.arange(100) < torch.tensor(counts).unsqueeze(1)).float().view(-1, 10, 10)


@pytest.mark.parametrize("rewind_step", [0, 100])
@pytest.mark.parametrize("counts", [
    {}, {"rewind": 22, "reinit": 23}, {"rewind": 20, "reinit": 20, "small_dense": 21}, {"rewind": 0, "reinit": 1},
    {("rewind", 0): 20, ("reinit", 0): 20, ("rewind", 1): 22, ("reinit", 1): 22, "rewind": 24, "reinit": 26},
    {"rewind": 20, "reinit": 20, ("reinit", 1): 19}])
@pytest.mark.parametrize(("device", "size", "most"), [("cpu", None, 20), ("cuda", None, 200), ("cpu", 9, 9)])
def test_stacks_hold_every_network_once_among_equally_sparse_ones(lth, counts, rewind_step, device, size, most):
    """A layer is sparse by its own count alone: below 23 %, on a CPU, if it is linear. Networks of a stack store as
    many survivors and start at the same step; the arms of a trial are neighbours, equally many of each trial."""
    arms = ("small_dense", "rewind", "reinit", "finetune")  # two of them start late
    lth.use(TRIALS=60, ARMS=arms, REWIND_STEP=rewind_step, STACK_SIZE=size)
    kept = {network: counts.get(network, counts.get(network[0], 100)) for network in itertools.product(arms, range(60))}
    lth.use(start_network=lambda network, *_: 2 * [{"conv1.weight": torch.zeros(6, 1, 5, 5),
                                                    "output.weight": some_of_100(kept[network])[0]}])
    found = [*lth.stacks(lth.State(), 1, {}, torch.device(device))]
    for networks, weights, masks in found:
        assert torch.equal(masks["output.weight"], some_of_100(*map(kept.get, networks)))
        assert torch.equal(weights["output.weight"], masks["output.weight"])
        stored = {kept[network] if device == "cpu" and kept[network] < 23 else 0 for network in networks}
        assert len(stored) == len({lth.first_step(arm) for arm, _ in networks}) == 1
        sparse = lth.sparse_layers(masks, {1}, torch.device(device))
        assert [*sparse] == ([] if stored == {0} else ["output.weight"])
        of_trial = [[arm for arm, _ in group] for _, group in itertools.groupby(networks, lambda network: network[1])]
        assert len(of_trial) == len({trial for _, trial in networks}) and len({*map(len, of_trial)}) == 1
        assert len(networks) <= max(most, len(of_trial[0]))
    networks = [network for networks, _, _ in found for network in networks]
    assert sorted(networks) == sorted(kept)
    if not counts or device == "cuda":
        together = [4] if rewind_step == 0 else [2, 2]
        assert len(found) == sum(-(-60 // max(1, most // number)) for number in together)


@pytest.mark.parametrize(("model", "options"), [
    ("mlp", ("ARMS=rewind,small_dense,shuffle_mask,reinit", "REWIND_STEP=2", "LEVELS=3", "EVAL_EVERY=4")),
    ("mlp", ("PRUNE_SCOPE=global",)), ("lenet", ("ARMS=rewind,reinit,small_dense",))])
def test_a_runs_numbers_do_not_depend_on_stack_size(lth, undrawn, tmp_path, model, options):
    """Byte for byte, with sparse levels and uneven counts. Dense throughout, the run is the same but for rounding."""
    used = []
    find = lth.sparse_layers
    options = (*QUICK, f"MODEL={model}", "TRIALS=2", "BATCH_SIZE=100", *options)
    for folder, size, below in (("one", 1, 0.23), ("default", None, 0.23), ("dense", None, 0)):
        lth.use(SPARSE_BELOW=below, sparse_layers=lambda *given: used.append(find(*given)) or used[-1])
        used.clear()
        run_here(lth, tmp_path / folder, *options, f"STACK_SIZE={size}")
        assert any(used) == (below > 0)
    check_same_results(tmp_path / "one", tmp_path / "default")
    rows, dense = (read_metrics(tmp_path / folder) for folder in ("default", "dense"))
    assert rows[["arm", "trial", "level", "step"]].equals(dense[["arm", "trial", "level", "step"]])
    assert abs(rows["val_loss"] / dense["val_loss"] - 1).max() < 1e-3
