"""Training: a stack against plain PyTorch, one network at a time, and what a network's numbers may depend on."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BAR, seeded, use_model
from torch import nn

BATCH = 32
STEPS = 30


def plain_logits(network: nn.Sequential, images: torch.Tensor, factors: list) -> torch.Tensor:
    """What the layers give one after the other; dropout multiplies by the next of the factors, if there are any."""
    factors = iter(factors)
    for layer in network:
        images = images * next(factors, 1) if isinstance(layer, nn.Dropout) else layer(images)
    return images


def drawn(network: nn.Sequential, images: int, trial: int, level: int):
    """Image numbers and dropout's factors (batch, units), step by step: whole batches of an epoch's permutation, then
    of another one's; 64 random bits decide about four units, the smallest 30 % of 16-bit numbers drop theirs."""
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


def plain_training(network: nn.Sequential, masks: dict, data: dict, trial: int, level: int, begin: int):
    """Train a plain network for the steps after `begin`; yields, from there on, each step, its loss and its norm."""
    images, labels = data["train"]
    yield begin, float("nan"), 1.0
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.3)
    for step, (batch, kept) in zip(range(1, STEPS + 1), drawn(network, len(images), trial, level), strict=False):
        if step <= begin:
            continue
        optimizer.zero_grad()
        loss = F.cross_entropy(plain_logits(network, images[batch], kept), labels[batch])
        loss.backward()
        for name, mask in masks.items():
            network.get_parameter(name).grad *= mask
        norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item(), norm.item()


def starting_networks(lth) -> tuple[dict, dict]:
    """Four networks in double precision, with weights of different scales; two are pruned by half."""
    weights = lth.stack([{name: scale * tensor.double() for name, tensor in lth.initial_weights(seeded("", n)).items()}
                         for n, scale in enumerate((1, 0.3, 2, 0.7))])
    masks = {name: (torch.rand(tensor.shape, generator=seeded("half")) < 0.5).double()
             for name, tensor in weights.items() if "weight" in name}
    for mask in masks.values():
        mask[:2] = 1
    return lth.masked(weights, masks), masks


def check_evaluation(measures: list, n: int, plain: nn.Sequential, data: dict, loss: float) -> None:
    """An evaluation's n-th numbers are those of the plain network, with all of its units."""
    expected = [loss]
    for part in ("validation", "test"):
        images, labels = data[part]
        logits = plain_logits(plain, images, []).detach()
        expected += [F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()]
    del expected[3]                                         # there is no test loss
    assert [measure[n].item() for measure in measures] == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(("model", "level", "arms", "rewind_step", "begin"), [
    ("mlp", 0, ("dense",), 15, 0), ("mlp", 5, ("rewind", "reinit"), 0, 0), ("mlp", 2, ("shuffle", "finetune"), 15, 15),
    ("mlp", 5, ("reinit", "small"), 15, 0), ("lenet", 5, ("rewind", "reinit"), 0, 0),
    ("own", 3, ("oneshot", "transfer"), 20, 20)])
def test_a_stack_trains_as_plain_networks_do(lth, mnist, model, level, arms, rewind_step, begin):
    """Over two epochs: the order of the images, dropout, masks before clipping, AdamW, evaluations. Late networks take
    the steps that are left, with the images and the dropout of these steps."""
    use_model(lth, model)
    lth.use(SEED=3, BATCH_SIZE=BATCH, EVAL_EVERY=10, EPOCHS=3, steps_per_epoch=lambda: STEPS // 3, CLIP_NORM=1.0,
            REWIND_STEP=rewind_step, LEARNING_RATE=2e-3, WEIGHT_DECAY=0.3, DROPOUT=0.3)
    # An epoch of 21 batches leaves out 28 images; of 1,100 images to validate, the last hundred go by themselves.
    sizes = {"train": 700, "validation": 1_100 if model == "mlp" else 200, "test": 100}
    images, labels = mnist["train"]
    data = {part: (images[:size].double(), labels[:size]) for part, size in sizes.items()}
    lth.check_network(torch.device("cpu"))                  # is not refused
    weights, masks = starting_networks(lth)
    networks = [(arm, trial) for trial in range(4 // len(arms)) for arm in arms]
    early, trained, evaluations = lth.train(weights, masks, data, networks, level, BAR)
    assert [step for step, *_ in evaluations] == [begin, *(step for step in (10, 20, 25, 30) if step > begin)]
    norms = []
    for n, (_, trial) in enumerate(networks):
        plain = lth.as_plain_network(lth.build_network(model, 0.3), lth.pick(weights, n))
        measured = {step: measures for step, *measures in evaluations}
        losses = []
        for step, loss, norm in plain_training(plain, lth.pick(masks, n), data, trial, level, begin):
            losses.append(loss)
            norms.append(norm)
            if step == rewind_step:
                torch.testing.assert_close(lth.pick(early, n), dict(plain.state_dict()), rtol=1e-7, atol=1e-9)
            if step in measured:
                check_evaluation(measured[step], n, plain, data, np.mean(losses))
                losses = []
        torch.testing.assert_close(lth.pick(trained, n), dict(plain.state_dict()), rtol=1e-7, atol=1e-9)
    assert min(norms) < 1 < max(norms)                      # some were clipped, and some were not


def trained_alike(lth, mnist: dict, networks: list, randoms: list) -> dict:
    """All that training gives, network by network, as a list of tensors; networks start dense, drawn by `randoms`."""
    start = lth.stack([lth.initial_weights(random) for random in randoms])
    data = {part: (images[:300], labels[:300]) for part, (images, labels) in mnist.items()}
    early, trained, evaluations = lth.train(start, lth.full_masks(start), data, networks, 1, BAR)
    measures = [measure.nan_to_num() for _, *measures in evaluations for measure in measures]
    return {network: [tensor[n] for tensor in (*early.values(), *trained.values(), *measures)]
            for n, network in enumerate(networks)}


@pytest.mark.parametrize("batch", [10, 128])
@pytest.mark.parametrize(("model", "stacks"), [
    ("lenet", [(1, [0, 1, 2, 3, 4], 2), (1, [1], 2), (1, [4, 2], 2)]),
    ("lenet", [(2, [0, 1, 2, 3, 4], 2), (2, [1], 2), (2, [4, 2], 2)]),
    ("mlp", [(3, [0, 1, 2, 3, 4], 2), (1, [1], 2), (1, [4, 2], 2), (2, [2], 2), (2, [4, 0], 1)])])
def test_a_network_trains_the_same_whoever_its_neighbours_are(lth, mnist, request, model, stacks, batch):
    """To the bit, with dropout: in stacks of one, two or five trials; an MLP also among other arms and with another
    number of threads. A lone product is rounded otherwise than one of many, and so is the end of AdamW's tensor."""
    lth.use(MODEL=model, BATCH_SIZE=batch, EVAL_EVERY=4, EPOCHS=1, steps_per_epoch=lambda: 8)
    threads_before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads_before))
    found = {}
    for arms, trials, threads in stacks:
        networks = [(arm, trial) for trial in trials for arm in ("rewind", "reinit", "shuffle")[:arms]]
        torch.set_num_threads(threads)
        results = trained_alike(lth, mnist, networks, [seeded(arm, trial) for arm, trial in networks])
        for network, tensors in results.items():
            assert all(map(torch.equal, found.setdefault(network, tensors), tensors)), (network, arms, trials)


@pytest.mark.parametrize("dropout", [0.2, 0])
def test_trials_have_dropout_of_their_own_and_arms_share_their_trials(lth, mnist, dropout):
    """Of the same initial weights and order of images, dropout alone tells trials apart; without it, nothing does."""
    draw = lth.generator
    lth.use(DROPOUT=dropout, EPOCHS=1, steps_per_epoch=lambda: 5, generator=lambda purpose, trial=0, *rest: (
        draw(purpose, 0 if purpose == "order" else trial, *rest)))
    networks = [("rewind", 0), ("reinit", 0), ("rewind", 1), ("reinit", 1)]
    a, b, c, d = trained_alike(lth, mnist, networks, [seeded("start") for _ in networks]).values()
    assert all(map(torch.equal, a, b)) and all(map(torch.equal, c, d))
    assert all(map(torch.equal, a, c)) == (dropout == 0)


def test_pruned_weights_stay_zero_and_nothing_is_carried_over(lth, mnist):
    """Exactly zero after decay, moments and clipping. What training starts from keeps every bit."""
    lth.use(EPOCHS=1, steps_per_epoch=lambda: 20)
    start, masks = (lth.copied(tensors) for tensors in starting_networks(lth))
    data = {part: (images[:500].double(), labels[:500]) for part, (images, labels) in mnist.items()}
    networks = [(arm, trial) for trial in range(2) for arm in ("rewind", "reinit")]
    (early, trained, _), (_, again, _) = (lth.train(start, masks, data, networks, 1, BAR) for _ in range(2))
    for name, tensor in starting_networks(lth)[0].items():
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


@pytest.mark.parametrize(("device", "most"), [("cpu", 20), ("cuda", 200)])
def test_stacks_hold_all_networks_once_and_the_arms_of_a_trial_together(lth, device, most):
    """Of 50 trials: trial by trial, all starting at one step, and no more stacks than their size asks for."""
    late = {"rewind", "permute", "finetune", "shuffle", "oneshot", "transfer"}
    for arms, step in itertools.product((("rewind",), ("reinit", "rewind"), tuple(lth.ARM_TABLE)), (0, 100)):
        lth.use(TRIALS=50, ARMS=arms, REWIND_STEP=step)
        groups = [[arm for arm in arms if step * (arm in late) == begin] for begin in sorted({0, step})]
        expected = [[(arm, trial) for trial in range(begin, min(begin + most // len(group), 50)) for arm in group]
                    for group in groups if group for begin in range(0, 50, most // len(group))]
        assert list(lth.stacks(1, torch.device(device))) == expected
        assert [*itertools.chain(*lth.stacks(0, torch.device(device)))] == [("dense", trial) for trial in range(50)]
