"""Training: a stack against plain PyTorch, one network at a time, and what a network's numbers may depend on."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BAR, seeded, use_model
from torch import nn

CPU = torch.device("cpu")
BATCH = 32
STEPS = 30


def plain_logits(network: nn.Sequential, images: torch.Tensor, factors: list) -> torch.Tensor:
    """Apply the layers one after the other; dropout multiplies by the next of the factors, if there are any."""
    factors = iter(factors)
    for layer in network:
        images = images * next(factors, 1) if isinstance(layer, nn.Dropout) else layer(images)
    return images


def drawn(network: nn.Sequential, images: int, trial: int, level: int) -> Iterator[tuple[torch.Tensor, list]]:
    """Yield image numbers and dropout's factors (batch, units): whole batches of an epoch's permutation, then of
    another one's; 64 random bits decide about four units, the smallest 30 % of 16-bit numbers drop theirs."""
    order = seeded("order", trial, level, seed=3)
    dropout = seeded("dropout", trial, level, seed=3)
    layers = list(network)
    sizes = [BATCH * layers[n - 2].out_features for n, layer in enumerate(layers) if isinstance(layer, nn.Dropout)]
    while True:
        for batch in torch.randperm(images, generator=order)[:images // BATCH * BATCH].split(BATCH):
            words = torch.empty(-(-sum(sizes) // 4), dtype=torch.int64).random_(-2**63, None, generator=dropout)
            ranks = words.numpy().view(np.int16)[:sum(sizes)].astype(int) + 2**15               # 0 to 65535
            factors = torch.from_numpy(np.where(ranks < round(0.3 * 2**16), 0, np.float32(1 / 0.7)))
            yield batch, [part.view(-1, BATCH).T for part in factors.split(sizes)]


def plain_training(network: nn.Sequential, masks: dict, data: dict, trial: int, level: int, start: int,
                   falls: bool) -> Iterator[tuple[int, float, float]]:
    """Train a plain network for the steps after `start`; yield, from there on, each step, its loss and its norm."""
    images, labels = data["train"]
    yield start, float("nan"), 1.0
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.3)
    for step, (batch, kept) in zip(range(1, STEPS + 1), drawn(network, len(images), trial, level), strict=False):
        if step <= start:
            continue
        if falls:                                           # evenly; the last step still has some learning rate
            optimizer.param_groups[0]["lr"] = np.linspace(2e-3, 0, STEPS + 1)[step - 1]
        optimizer.zero_grad()
        loss = F.cross_entropy(plain_logits(network, images[batch], kept), labels[batch])
        loss.backward()
        for name, mask in masks.items():
            network.get_parameter(name).grad *= mask
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item(), norm.item()


def starting_networks(lth, nets: int = 4, sparse: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """Return networks in double precision, with weights of different scales, and their masks: half of the networks
    are dense and the others pruned by half, but all keep 10 % of each sparse layer, each its own."""
    weights = lth.stack([{name: scale * tensor.double() for name, tensor in lth.initial_weights(seeded("", n)).items()}
                         for n, scale in enumerate((1, 0.3, 2, 0.7)[:nets])])
    masks = {}
    for name, tensor in weights.items():
        ranks = torch.rand(nets, tensor[0].numel(), generator=seeded(name)).argsort(1)
        if name.removesuffix(".weight") in sparse:
            masks[name] = (ranks < tensor[0].numel() // 10).double().view(tensor.shape)
        elif name.endswith(".weight"):
            masks[name] = (ranks < tensor[0].numel() // 2).double().view(tensor.shape)
            masks[name][:nets // 2] = 1
    return lth.masked(weights, masks), masks


def check_evaluation(measures: list, n: int, plain: nn.Sequential, data: dict, loss: float) -> None:
    """Assert that an evaluation's n-th numbers are those of the plain network, with all of its units."""
    expected = [loss]
    for part in ("validation", "test"):
        images, labels = data[part]
        logits = plain_logits(plain, images, []).detach()
        expected += [F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()]
    del expected[3]                                         # there is no test loss
    assert [measure[n].item() for measure in measures] == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(("model", "level", "nets", "arms", "rewind_step", "start", "schedule", "sparse"), [
    ("mlp", 0, 4, ("dense",), 15, 0, "constant", ()),
    ("mlp", 5, 4, ("rewind", "reinit"), 0, 0, "linear", ("fc1", "fc2")),
    ("mlp", 2, 4, ("shuffle_mask", "finetune"), 15, 15, "linear", ("fc1", "fc2", "output")),
    ("mlp", 2, 1, ("rewind",), 0, 0, "constant", ("fc1", "output")),
    ("mlp", 5, 4, ("reinit", "small_dense"), 15, 0, "constant", ("fc2",)),
    ("lenet", 5, 4, ("rewind", "reinit"), 0, 0, "constant", ()),
    ("lenet", 5, 4, ("reinit", "keep_signs"), 15, 0, "constant", ("fc1", "fc2")),
    ("own", 3, 4, ("oneshot", "transfer"), 20, 20, "constant", ())])
def test_a_stack_trains_as_plain_networks_do(
        lth, mnist, model, level, nets, arms, rewind_step, start, schedule, sparse):
    """Over two epochs: the order of the images, dropout, masks before clipping, AdamW, evaluations. Late networks take
    the remaining steps, with the images, the dropout and the learning rates of these steps."""
    use_model(lth, model)
    lth.use(SEED=3, BATCH_SIZE=BATCH, EVAL_EVERY=10, EPOCHS=3, steps_per_epoch=lambda: STEPS // 3, CLIP_NORM=1.0,
            REWIND_STEP=rewind_step, LEARNING_RATE=2e-3, WEIGHT_DECAY=0.3, DROPOUT=0.3, SCHEDULE=schedule)
    # An epoch of 21 batches leaves out 28 images; of 1,100 images to validate, the last hundred go by themselves.
    sizes = {"train": 700, "validation": 1_100 if model == "mlp" else 200, "test": 100}
    images, labels = mnist["train"]
    data = {part: (images[:size].double(), labels[:size]) for part, size in sizes.items()}
    lth.check_network(CPU)                                  # is not refused
    weights, masks = starting_networks(lth, nets, sparse)
    assert [*lth.sparse_layers(masks, {1, nets}, CPU)] == [f"{name}.weight" for name in sparse]
    networks = [(arm, trial) for trial in range(nets // len(arms)) for arm in arms]
    rewind_weights, trained, evaluations = lth.train(weights, masks, data, networks, level, BAR)
    assert [step for step, *_ in evaluations] == [start, *(step for step in (10, 20, 25, 30) if step > start)]
    norms = []
    for n, (_, trial) in enumerate(networks):
        plain = lth.as_plain_network(lth.build_network(model, 0.3), lth.pick(weights, n))
        measured = {step: measures for step, *measures in evaluations}
        losses = []
        for step, loss, norm in plain_training(plain, lth.pick(masks, n), data, trial, level, start,
                                               schedule == "linear"):
            losses.append(loss)
            norms.append(norm)
            if step == rewind_step:
                torch.testing.assert_close(lth.pick(rewind_weights, n), dict(plain.state_dict()), rtol=0, atol=1e-11)
            if step in measured:
                check_evaluation(measured[step], n, plain, data, np.mean(losses))
                losses = []
        torch.testing.assert_close(lth.pick(trained, n), dict(plain.state_dict()), rtol=0, atol=1e-11)
    assert min(norms) < 1 < max(norms)                      # some were clipped, and some were not


def trained_alike(lth, mnist: dict, networks: list, rngs: list, density: float = 1) -> dict:
    """Return all that training gives, network by network, as a list of tensors; networks are drawn by `rngs`."""
    start = lth.stack([lth.initial_weights(rng) for rng in rngs])
    masks = lth.full_masks(start)
    for name, mask in masks.items():
        if mask.dim() == 3:
            kept = torch.rand(mask[0].numel(), generator=seeded(name)).argsort() < density * mask[0].numel()
            mask[:] = kept.view(mask[0].shape)
    data = {part: (images[:300], labels[:300]) for part, (images, labels) in mnist.items()}
    early, trained, evaluations = lth.train(lth.masked(start, masks), masks, data, networks, 1, BAR)
    measures = [measure.nan_to_num() for _, *measures in evaluations for measure in measures]
    return {network: [tensor[n] for tensor in (*early.values(), *trained.values(), *measures)]
            for n, network in enumerate(networks)}


@pytest.mark.parametrize("batch", [10, 128])
@pytest.mark.parametrize(("model", "density", "stacks"), [
    ("lenet", 1, [(1, [0, 1, 2, 3, 4], 1), (1, [1], 1), (1, [4, 2], 1)]),
    ("lenet", 0.1, [(2, [0, 1, 2, 3, 4], 1), (2, [1], 1), (2, [4, 2], 1)]),
    ("mlp", 1, [(3, [0, 1, 2, 3, 4], 2), (1, [1], 2), (1, [4, 2], 2), (2, [2], 2), (2, [4, 0], 1)]),
    ("mlp", 0.1, [(3, [0, 1, 2, 3, 4], 2), (1, [1], 2), (1, [4, 2], 1), (2, [2], 2), (2, [4, 0], 1)])])
def test_a_network_trains_the_same_whoever_its_neighbours_are(lth, mnist, request, model, density, stacks, batch):
    """To the bit, with dropout: in stacks of one, two or five trials; an MLP also among other arms and with another
    number of threads. A lone product is rounded otherwise than one of many, and so is the end of AdamW's tensor."""
    lth.use(MODEL=model, BATCH_SIZE=batch, EVAL_EVERY=4, EPOCHS=1, steps_per_epoch=lambda: 8)
    threads_before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads_before))
    found = {}
    for arms, trials, threads in stacks:
        networks = [(arm, trial) for trial in trials for arm in ("rewind", "reinit", "shuffle_mask")[:arms]]
        torch.set_num_threads(threads)
        results = trained_alike(lth, mnist, networks, [seeded(arm, trial) for arm, trial in networks], density)
        for network, tensors in results.items():
            assert all(map(torch.equal, found.setdefault(network, tensors), tensors)), (network, arms, trials)


@pytest.mark.parametrize(("dropout", "shared", "density"), [(0.2, "order", 1), (0, "dropout", 1), (0, "order", 0.1)])
def test_arms_share_batches_and_dropout_and_trials_do_not(lth, mnist, dropout, shared, density):
    """Networks with the same initial weights: what their trials do not share tells them apart, and nothing else."""
    draw = lth.generator
    lth.use(DROPOUT=dropout, EPOCHS=1, steps_per_epoch=lambda: 5, generator=lambda purpose, trial=0, *rest: (
        draw(purpose, 0 if purpose == shared else trial, *rest)))
    networks = [("rewind", 0), ("reinit", 0), ("rewind", 1), ("reinit", 1)]
    a, b, c, d = trained_alike(lth, mnist, networks, [seeded("start") for _ in networks], density).values()
    assert all(map(torch.equal, a, b)) and all(map(torch.equal, c, d))
    assert all(map(torch.equal, a, c)) == (dropout == 0 and shared == "order")


def test_dropout_drops_as_many_units_as_it_says_and_keeps_the_mean(lth):
    """But for five standard errors of 200,000 units; a trial's next draw is another one."""
    lth.use(DROPOUT=0.3, BATCH_SIZE=500)
    draws = lth.dropout_masks(lth.build_network("mlp", 0.3), [0], 2, CPU)
    first, second = (torch.cat(next(draws), 1) for _ in range(2))
    assert (first == 0).double().mean().item() == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / 200_000) ** 0.5)
    assert first.double().mean().item() == pytest.approx(1, abs=5 * (0.3 / 0.7 / 200_000) ** 0.5)
    assert (first != second).any()


@pytest.mark.parametrize("sparse", [(), ("fc1", "fc2")])
def test_pruned_weights_stay_zero_and_nothing_is_carried_over(lth, mnist, sparse):
    """Exactly zero after decay, moments and clipping. What training starts from keeps every bit."""
    lth.use(EPOCHS=1, steps_per_epoch=lambda: 20)
    start, masks = starting_networks(lth, 4, sparse)
    data = {part: (images[:500].double(), labels[:500]) for part, (images, labels) in mnist.items()}
    networks = [(arm, trial) for trial in range(2) for arm in ("rewind", "reinit")]
    (early, trained, _), (_, again, _) = (lth.train(start, masks, data, networks, 1, BAR) for _ in range(2))
    for name, tensor in starting_networks(lth, 4, sparse)[0].items():
        assert torch.equal(start[name], tensor) and torch.equal(early[name], tensor)
        assert not torch.equal(trained[name], tensor) and torch.equal(trained[name], again[name])
        assert name not in masks or torch.equal(trained[name] != 0, masks[name] == 1)


def test_a_training_that_diverges_says_whose_and_when(lth, mnist):
    """Of two networks, the first one is right about all images and does not move. A training loss alone will do."""
    lth.use(EPOCHS=1, steps_per_epoch=lambda: 60, BATCH_SIZE=BATCH, LEARNING_RATE=1e30, WEIGHT_DECAY=0)
    data = {name: (images[:100], 0 * labels[:100]) for name, (images, labels) in mnist.items()}
    start = {name: tensor[:2].float() for name, tensor in starting_networks(lth)[0].items()}
    start["output.bias"][0, 0] = 1e4
    networks = [("rewind", 7), ("reinit", 7)]
    for step in (25, 0):
        with pytest.raises(lth.UserError, match=rf"of reinit, trial 7, at level 3 was not finite by step {step}\."):
            lth.train(start, lth.full_masks(start), data, networks, 3, BAR)
        start["fc1.bias"][1, 0] = float("nan")
    with pytest.raises(lth.UserError, match="reinit, trial 7, at level 3 was not finite by step 25"):
        lth.check_finite(torch.tensor([1, torch.nan]), (25, *torch.ones(4, 2)), networks, 3)
