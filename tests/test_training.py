"""Training: a stack against plain PyTorch, one network at a time, and what a network's numbers may depend on."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BAR, QUICK, check_same_results, read_metrics, run_here, seeded
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


def drawn(network: nn.Sequential, images: int, trial: int, level: int, dropped: float) -> Iterator[tuple]:
    """Yield image numbers, permuted for each epoch, and dropout's factors (batch, units): 16 random bits for a unit."""
    order = seeded("order", trial, level, seed=3)
    dropout = seeded("dropout", trial, level, seed=3)
    layers = list(network)
    sizes = [BATCH * layers[n - 2].out_features for n, layer in enumerate(layers) if isinstance(layer, nn.Dropout)]
    while True:
        for batch in torch.randperm(images, generator=order)[:images // BATCH * BATCH].split(BATCH):
            words = torch.empty(-(-sum(sizes) // 4), dtype=torch.int64).random_(-2**63, None, generator=dropout)
            ranks = words.numpy().view(np.int16)[:sum(sizes)].astype(int) + 2**15               # 0 to 65535
            factors = torch.from_numpy(np.where(ranks < round(dropped * 2**16), 0, np.float32(1 / (1 - dropped))))
            yield batch, [part.view(-1, BATCH).T for part in factors.split(sizes)]


def plain_training(lth, network: nn.Sequential, masks: dict, data: dict, trial: int, level: int,
                   start: int) -> Iterator[tuple[int, float, float]]:
    """Train a plain network for the steps after `start`; yield, from there on, each step, its loss and its norm."""
    images, labels = data["train"]
    yield start, float("nan"), 1.0
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=lth.WEIGHT_DECAY)
    draws = drawn(network, len(images), trial, level, lth.DROPOUT)
    for step, (batch, kept) in zip(range(1, STEPS + 1), draws, strict=False):
        if step <= start:
            continue
        if lth.SCHEDULE == "linear":                        # evenly; the last step still has some learning rate
            optimizer.param_groups[0]["lr"] = np.linspace(2e-3, 0, STEPS + 1)[step - 1]
        optimizer.zero_grad()
        loss = F.cross_entropy(plain_logits(network, images[batch], kept), labels[batch])
        loss.backward()
        for name, mask in masks.items():
            network.get_parameter(name).grad *= mask
        norm = nn.utils.clip_grad_norm_(network.parameters(), lth.CLIP_NORM or float("inf"))
        optimizer.step()
        yield step, loss.item(), norm.item()


def starting_networks(lth, nets: int = 4, sparse: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """Return networks in double precision, of different scales, and their masks: half of the networks are dense, the
    others pruned by half, but all keep 10 % of each sparse layer, each its own, with a row and a column of none."""
    weights = lth.stack([{name: scale * tensor.double() for name, tensor in lth.initial_weights(seeded("", n)).items()}
                         for n, scale in enumerate((1, 0.3, 2, 0.7)[:nets])])
    masks = {}
    for name, tensor in lth.full_masks(weights).items():
        order = torch.rand(tensor.shape, generator=seeded(name))
        share = 2
        if name.removesuffix(".weight") in sparse:
            order[:, 0] = order[:, :, 0] = 1
            share = 10
        ranks = order.flatten(1).argsort(1).argsort(1)
        masks[name] = (ranks < tensor[0].numel() // share).double().view(tensor.shape)
        if share == 2:
            masks[name][:nets // 2] = 1
    return lth.masked(weights, masks), masks


def plain_evaluation(plain: nn.Sequential, data: dict) -> list[float]:
    """Return the loss and accuracy on the validation images, and the accuracy on the test images, with all units."""
    found = []
    for images, labels in (data["validation"], data["test"]):
        logits = plain_logits(plain, images, []).detach()
        found += [F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()]
    return [*found[:2], found[3]]


FALLING = {"SCHEDULE": "linear"}
AS_IN_THE_PAPER = {"DROPOUT": 0, "CLIP_NORM": None, "WEIGHT_DECAY": 0}


@pytest.mark.parametrize(("model", "level", "arms", "nets", "rewind_step", "start", "sparse", "constants"), [
    ("mlp", 0, ("dense",), 4, 15, 0, (), {}),
    ("mlp", 5, ("rewind", "reinit"), 4, 0, 0, ("fc1", "fc2"), FALLING),
    ("mlp", 2, ("shuffle_mask", "finetune"), 4, 15, 15, ("fc1", "fc2", "output"), FALLING),
    ("mlp", 2, ("rewind",), 1, 0, 0, ("fc1", "output"), {}),
    ("mlp", 5, ("reinit", "small_dense"), 4, 15, 0, ("fc2",), AS_IN_THE_PAPER),
    ("lenet", 5, ("rewind", "reinit"), 4, 0, 0, (), AS_IN_THE_PAPER),
    ("lenet", 3, ("oneshot", "transfer"), 4, 20, 20, ("fc1", "fc2"), FALLING)])
def test_a_stack_trains_as_plain_networks_do(
        lth, mnist, model, level, arms, nets, rewind_step, start, sparse, constants):
    """Over two epochs: the order of the images, dropout, masks before clipping, AdamW, evaluations. Late networks take
    the remaining steps, with the images, the dropout and the learning rates of these steps. Zeros stay zero."""
    lth.use(MODEL=model, SEED=3, BATCH_SIZE=BATCH, EVAL_EVERY=10, EPOCHS=3, steps_per_epoch=lambda: STEPS // 3,
            REWIND_STEP=rewind_step, LEARNING_RATE=2e-3, WEIGHT_DECAY=0.3, DROPOUT=0.3)
    lth.use(**constants)
    # An epoch of 21 batches leaves out 28 images; of 1,100 images to validate, the last hundred go by themselves.
    sizes = {"train": 700, "validation": 1_100 if model == "mlp" else 200, "test": 100}
    images, labels = mnist["train"]
    data = {part: (images[:size].double(), labels[:size]) for part, size in sizes.items()}
    weights, masks = starting_networks(lth, nets, sparse)
    assert [*lth.sparse_layers(masks, {1, nets}, CPU)] == [f"{name}.weight" for name in sparse]
    networks = [(arm, trial) for trial in range(nets // len(arms)) for arm in arms]
    rewind_weights, trained, evaluations = lth.train(weights, masks, data, networks, level, BAR)
    assert [step for step, *_ in evaluations] == [start, *(step for step in (10, 20, 25, 30) if step > start)]
    for name, tensor in starting_networks(lth, nets, sparse)[0].items():
        assert torch.equal(weights[name], tensor)           # nobody's workspace
        assert name not in masks or torch.equal(trained[name] != 0, masks[name] == 1)
    measured = {step: metrics for step, *metrics in evaluations}
    norms = []
    for n, (_, trial) in enumerate(networks):
        plain = lth.as_plain_network(lth.build_network(model, lth.DROPOUT), lth.pick(weights, n))
        losses = []
        for step, loss, norm in plain_training(lth, plain, lth.pick(masks, n), data, trial, level, start):
            losses.append(loss)
            norms.append(norm)
            if step == rewind_step:
                torch.testing.assert_close(lth.pick(rewind_weights, n), dict(plain.state_dict()), rtol=0, atol=1e-11)
            if step in measured:
                expected = [np.mean(losses), *plain_evaluation(plain, data)]
                assert [metric[n].item() for metric in measured[step]] == pytest.approx(expected, rel=1e-6, nan_ok=True)
                losses = []
        torch.testing.assert_close(lth.pick(trained, n), dict(plain.state_dict()), rtol=0, atol=1e-11)
    assert min(norms) < 1 < max(norms)                      # some were clipped, and some were not


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
    data = {part: (images[:300], labels[:300]) for part, (images, labels) in mnist.items()}
    found = {}
    for arms, trials, threads in stacks:
        torch.set_num_threads(threads)
        networks = [(arm, trial) for trial in trials for arm in ("rewind", "reinit", "shuffle_mask")[:arms]]
        start = lth.stack([lth.initial_weights(seeded(*network)) for network in networks])
        masks = lth.full_masks(start)
        for name, mask in masks.items():
            if mask.dim() == 3:
                mask[:] = torch.rand(mask[0].shape, generator=seeded(name)) < density
        early, trained, evaluations = lth.train(lth.masked(start, masks), masks, data, networks, 1, BAR)
        measures = [measure.nan_to_num() for _, *measures in evaluations for measure in measures]
        for n, network in enumerate(networks):
            results = [tensor[n] for tensor in (*early.values(), *trained.values(), *measures)]
            assert all(map(torch.equal, found.setdefault(network, results), results)), (network, arms, trials)


def test_the_networks_of_a_stack_are_equally_sparse_and_equally_many_of_each_trial(lth):
    """A linear layer is sparse by its own count alone: below 23 %, on a CPU."""
    networks = [(arm, trial) for trial in range(3) for arm in ("rewind", "reinit", "small_dense")]
    counts = torch.tensor([20, 20, 20, 22, 22, 20, 23, 30, 20])
    masks = {"conv1.weight": torch.zeros(9, 6, 1, 5, 5),
             "output.weight": (torch.arange(100) < counts.unsqueeze(1)).float().view(9, 10, 10)}
    assert lth.equally_sparse(networks, masks, CPU) == [[0, 1, 2], [3, 4], [5, 8], [6, 7]]
    assert lth.equally_sparse(networks, masks, torch.device("cuda")) == [[*range(9)]]


def test_a_stack_has_no_more_networks_than_asked_or_than_is_fast(lth):
    dense = {"output.weight": torch.ones(10, 10)}
    lth.use(TRIALS=12, ARMS=("rewind", "reinit"), start_network=lambda *_: (dense, dense))
    for size, device, expected in ((9, CPU, [8, 8, 8]), (None, CPU, [20, 4]), (None, torch.device("cuda"), [24])):
        lth.use(STACK_SIZE=size)
        assert [len(networks) for networks, *_ in lth.stacks(lth.State(), 1, {}, device)] == expected


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


def test_a_training_that_diverges_says_whose_and_when(lth, mnist):
    """Of two networks, the first one is right about all images and does not move."""
    lth.use(EPOCHS=1, steps_per_epoch=lambda: 60, BATCH_SIZE=BATCH, LEARNING_RATE=1e30, WEIGHT_DECAY=0)
    data = {name: (images[:100], 0 * labels[:100]) for name, (images, labels) in mnist.items()}
    start = {name: tensor.float() for name, tensor in starting_networks(lth, 2)[0].items()}
    start["output.bias"][0, 0] = 1e4
    networks = [("rewind", 7), ("reinit", 7)]
    with pytest.raises(lth.UserError, match=r"of reinit, trial 7, at level 3 was not finite by step 25\. .*another"):
        lth.train(start, lth.full_masks(start), data, networks, 3, BAR)
