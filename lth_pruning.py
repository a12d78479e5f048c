"""The Lottery Ticket Hypothesis on MNIST (Frankle & Carbin 2019, arXiv:1803.03635).

When a trained network is pruned, was it the surviving connections, or their original initial weights, that made
training work? Train dense networks, remove the smallest weights round after round, and start the survivors again:
from their original initial weights ("rewind"), or from fresh random ones on the very same connections ("reinit").

    python lth_pruning.py                                      the defaults: some five minutes on two CPU cores
    python lth_pruning.py TRIALS=2 LEVELS=4 PRUNE_RATE=0.5     any constant below can be set for one run

Out come figures, metrics.csv, summary.md and tickets.pt in results/. A run that is stopped resumes where it was.

HEADLINE
"""

import ast
import copy
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------------
# Constants: edit them here, or set them for one run as NAME=VALUE arguments
# ------------------------------------------------------------------------------------------------------------------

# What is trained, and on what
DATASET       = "MNIST"               # or "FashionMNIST", "KMNIST": 28x28 grey images of 10 classes
MODEL         = "mlp"                 # 784-300-100-10 (LeNet-300-100), or "lenet" (LeNet-5, convolutional)
INIT          = "kaiming_normal"      # or "xavier_normal" (Glorot), which the paper uses; biases start at zero
DROPOUT       = 0.2                   # after each hidden fully connected layer; 0 switches it off

# The experiment
ARMS          = ("rewind", "reinit")  # how a pruned network starts; also "shuffle", "oneshot", "transfer"
TRIALS        = 5                     # initialisations, each with its own data order
LEVELS        = 16                    # pruning rounds; 0 trains the dense networks alone
PRUNE_RATE    = 0.2                   # of the surviving weights, per level; half of it in convolutions and the output
PRUNE_SCOPE   = "layer"               # smallest weights layer by layer, or "global": over all layers at one rate
REWIND_STEP   = 0                     # rewind to the weights after this many steps instead of the initial ones
TICKETS_FROM  = None                  # the tickets.pt of another run, for the arm "transfer"
SEED          = 42                    # one seed, one result

# Training: the same for every network, dense or pruned
EPOCHS        = 3
BATCH_SIZE    = 128
LEARNING_RATE = 1.2e-3                # the paper's, for Adam
WEIGHT_DECAY  = 1e-2                  # AdamW's decoupled decay; 0 makes it Adam
CLIP_NORM     = 1.0                   # largest gradient norm of a network; None: no clipping
EVAL_EVERY    = 200                   # steps between evaluations; there is always one after the last step

# Where
DATA_DIR      = "data"                # relative paths start beside this script
RESULTS_DIR   = "results"
DEVICE        = "auto"                # cuda, else mps, else cpu

Weights = dict[str, Tensor]           # "fc1.weight" -> tensor; a stack's tensors have a leading nets dimension
Masks = dict[str, Tensor]             # prunable weights only; 1 where a weight remains, 0 where it was pruned


def fail(sentence: str) -> NoReturn:
    """End the program with one sentence for the user and exit code 2."""
    print(f"lth_pruning: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def beside_script(path: str) -> Path:
    """The path itself if absolute, else taken from the folder of this script."""
    return Path(__file__).resolve().parent / Path(path).expanduser()


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: nobody ever sees half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


PURPOSES = ("init", "reinit", "shuffle", "split", "order", "dropout")


def generator(purpose: str, trial: int = 0, level: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers for one purpose, whatever else is drawn: trial k is the same among 5 trials and among 50."""
    seeds = np.random.SeedSequence([SEED, trial, level, PURPOSES.index(purpose)])
    return torch.Generator(device).manual_seed(int(seeds.generate_state(1, np.uint64)[0]))


# ------------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------------

VALIDATION_SIZE = 5_000               # of the 60,000 training images, as in the paper
UNPACKED_BYTES = {"train-images-idx3-ubyte": 16 + 60_000 * 784, "train-labels-idx1-ubyte": 8 + 60_000,
                  "t10k-images-idx3-ubyte": 16 + 10_000 * 784, "t10k-labels-idx1-ubyte": 8 + 10_000}


def load_dataset(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 1, 28, 28), normalised once by the training images' mean and deviation, and labels (n,), on device.

    The 60,000 training images give "train" (55,000) and "validation" (5,000); "test" (10,000) is only ever reported.
    Torchvision downloads what is missing, but takes any unpacked file for good. So each is first compared with its
    archive, or in size where there is none, and unpacked again, or left to be downloaded, where it is damaged.
    """
    source = getattr(torchvision.datasets, DATASET)
    folder = beside_script(DATA_DIR)
    raw = folder / DATASET / "raw"
    try:
        for name, md5 in source.resources:
            archive, unpacked = raw / name, raw / name.removesuffix(".gz")
            if check_integrity(archive, md5):
                content = gzip.decompress(archive.read_bytes())
                if not unpacked.exists() or unpacked.read_bytes() != content:
                    write_whole(unpacked, content)
            elif unpacked.exists() and unpacked.stat().st_size != UNPACKED_BYTES[unpacked.name]:
                unpacked.unlink()
        parts = [source(folder, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        names = ", ".join(name for name, _ in source.resources)
        reason = str(error).strip().splitlines()[-1]
        fail(f"{DATASET} could be neither read nor downloaded ({reason}): put its archives {names} into {raw}.")
    (images, labels), (test_images, test_labels) = ((part.data, part.targets) for part in parts)
    order = torch.randperm(len(images), generator=generator("split"))
    rest, held_out = order[VALIDATION_SIZE:], order[:VALIDATION_SIZE]
    deviation, mean = torch.std_mean(images[rest] / 255)
    splits = {"train": (images[rest], labels[rest]), "validation": (images[held_out], labels[held_out]),
              "test": (test_images, test_labels)}
    return {name: ((x.unsqueeze(1) / 255 - mean).div_(deviation).to(device), y.to(device))
            for name, (x, y) in splits.items()}


# ------------------------------------------------------------------------------------------------------------------
# Networks: the stack holds many networks side by side, and one matrix product serves them all
# ------------------------------------------------------------------------------------------------------------------

def build_network(model: str, dropout: float) -> nn.Sequential:
    """One plain network, "mlp" or "lenet". Its layers are also the plan by which `forward` runs a whole stack."""
    if model == "mlp":
        layers = OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300), relu1=nn.ReLU(), drop1=nn.Dropout(dropout),
            fc2=nn.Linear(300, 100), relu2=nn.ReLU(), drop2=nn.Dropout(dropout),
            output=nn.Linear(100, 10))
    else:
        layers = OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2), pool1=nn.MaxPool2d(2), relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 16, 5), pool2=nn.MaxPool2d(2), relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120), relu3=nn.ReLU(), drop1=nn.Dropout(dropout),
            fc2=nn.Linear(120, 84), relu4=nn.ReLU(), drop2=nn.Dropout(dropout),
            output=nn.Linear(84, 10))
    return nn.Sequential(layers)


def weighted_layers(network: nn.Sequential) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that have weights, by name, from the input to the output."""
    return {name: layer for name, layer in network.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)}


def initial_weights(random: torch.Generator) -> Weights:
    """One network's initial weights by INIT, biases zero; linear weights are (in, out), their biases (1, out).

    With (out, in), PyTorch's own layout, a third of the training time would go into copying transposes.
    """
    weights = {}
    for name, layer in weighted_layers(build_network(MODEL, DROPOUT)).items():
        weight = torch.empty_like(layer.weight, requires_grad=False)
        getattr(nn.init, INIT + "_")(weight, generator=random)
        linear = isinstance(layer, nn.Linear)
        weights[f"{name}.weight"] = weight.T.contiguous() if linear else weight
        weights[f"{name}.bias"] = torch.zeros(1, layer.out_features) if linear else torch.zeros(layer.out_channels)
    return weights


def stack(networks: list[Weights]) -> Weights:
    """Single networks' tensors, stacked along a new leading nets dimension."""
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def pick(tensors: Weights, n: int) -> Weights:
    """The tensors of a stack's n-th network, without the nets dimension."""
    return {name: tensor[n] for name, tensor in tensors.items()}


def as_plain_network(network: nn.Sequential, weights: Weights) -> nn.Sequential:
    """A copy of a plain network, on the CPU, that holds a single network's weights."""
    network = copy.deepcopy(network)
    for name, layer in weighted_layers(network).items():
        weight = weights[f"{name}.weight"].detach().cpu()
        layer.weight.data = weight.T.clone() if isinstance(layer, nn.Linear) else weight.clone()
        layer.bias.data = weights[f"{name}.bias"].detach().cpu().flatten().clone()
    return network


def forward(network: nn.Sequential, weights: Weights, x: Tensor, dropout: torch.Generator | None = None) -> Tensor:
    """Logits (nets, batch, 10) of a stack's networks, each on its own images x (nets, batch, 1, 28, 28).

    With a generator, hidden units are dropped by one mask for the whole stack: a mask per network costs as much time
    as a matrix product, and would make a trial's result depend on how many others run beside it.
    """
    for name, layer in network.named_children():
        if isinstance(layer, nn.Linear):
            x = torch.baddbmm(weights[f"{name}.bias"], x, weights[f"{name}.weight"])
        elif isinstance(layer, nn.Conv2d):
            kernels = zip(x, weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
            x = torch.stack([F.conv2d(*images_and_kernel, padding=layer.padding) for images_and_kernel in kernels])
        elif isinstance(layer, nn.Flatten):
            x = x.flatten(2)
        elif isinstance(layer, nn.Dropout):
            if dropout is not None and layer.p > 0:
                keep = torch.empty(x.shape[1:], device=x.device).bernoulli_(1 - layer.p, generator=dropout)
                x = x * keep.div_(1 - layer.p)                                      # (batch, units), for all networks
        else:                                                                       # ReLU and pooling hold no weights
            x = layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    return x


# ------------------------------------------------------------------------------------------------------------------
# Tickets: a ticket is a mask together with the initial weights that it was found from
# ------------------------------------------------------------------------------------------------------------------

def full_masks(weights: Weights) -> Masks:
    """Masks with every prunable weight remaining: biases are never pruned, and not counted."""
    return {name: torch.ones_like(tensor) for name, tensor in weights.items() if name.endswith(".weight")}


def masked(weights: Weights, masks: Masks) -> Weights:
    """The weights, zero where they are pruned."""
    return {name: tensor * masks[name] if name in masks else tensor.clone() for name, tensor in weights.items()}


def weights_remaining(masks: Masks) -> Tensor:
    """Percent of its prunable weights that each network of a stack has left, (nets,)."""
    left = sum(mask.flatten(1).sum(1) for mask in masks.values())
    return 100 * left / sum(mask[0].numel() for mask in masks.values())


def prune_rates(network: nn.Sequential) -> dict[str, float]:
    """The share of its survivors that each layer loses per level (section 2 and figure 2 of the paper).

    Half of PRUNE_RATE in the output layer and in convolutions; a global scope compares all layers at one rate.
    """
    gentle = {f"{name}.weight" for name, layer in weighted_layers(network).items()
              if PRUNE_SCOPE == "layer" and (name == "output" or isinstance(layer, nn.Conv2d))}
    return {f"{name}.weight": PRUNE_RATE / 2 if f"{name}.weight" in gentle else PRUNE_RATE
            for name in weighted_layers(network)}


def remove_smallest(weights: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask (nets, weights) without the `count` survivors of smallest magnitude; ties go by index."""
    magnitude = weights.abs().masked_fill(mask == 0, torch.inf)
    return mask.scatter(1, magnitude.argsort(dim=1, stable=True)[:, :count], 0)


def prune(weights: Weights, masks: Masks, rates: dict[str, float], scope: str) -> Masks:
    """Remove the smallest survivors of each network of a stack, `rates` of them, layer by layer or globally.

    Step 3 of the paper's iterative pruning (its appendix B). Counts are exact: round(rate * survivors).
    """
    pruned = {}
    for group in [[name] for name in masks] if scope == "layer" else [list(masks)]:
        flat_weights, flat_masks = (torch.cat([stacked[name].flatten(1) for name in group], 1)
                                    for stacked in (weights, masks))                # (nets, weights of the group)
        survivors = int(flat_masks[0].sum())                                        # the same in every network
        left = remove_smallest(flat_weights, flat_masks, round(rates[group[0]] * survivors))
        parts = left.split([masks[name][0].numel() for name in group], dim=1)
        pruned |= {name: part.reshape(masks[name].shape) for name, part in zip(group, parts, strict=True)}
    return pruned


# The arms. Each gets one network's theta0 and ticket masks, and returns the weights and masks that training starts from.

def rewind(theta0: Weights, masks: Masks, **_) -> tuple[Weights, Masks]:
    """The winning ticket: the survivors' original initial weights."""
    return masked(theta0, masks), masks


def reinit(masks: Masks, random: torch.Generator, **_) -> tuple[Weights, Masks]:
    """The same connections with a fresh draw of initial weights (section 2, "random reinitialization")."""
    return masked(initial_weights(random), masks), masks


def shuffle(theta0: Weights, masks: Masks, random: torch.Generator, **_) -> tuple[Weights, Masks]:
    """The original initial weights on connections chosen at random, as many in each layer as the ticket has."""
    masks = {name: mask.flatten()[torch.randperm(mask.numel(), generator=random)].reshape(mask.shape)
             for name, mask in masks.items()}
    return masked(theta0, masks), masks


def oneshot(theta0: Weights, masks: Masks, dense: Weights, **_) -> tuple[Weights, Masks]:
    """The original initial weights on the trained dense network's largest, as many in each layer as the ticket has."""
    masks = {name: remove_smallest(dense[name].view(1, -1), torch.ones(1, mask.numel()), int((mask == 0).sum()))
             .reshape(mask.shape) for name, mask in masks.items()}
    return masked(theta0, masks), masks


def transfer(ticket: tuple[Weights, Masks], **_) -> tuple[Weights, Masks]:
    """Masks and initial weights of the same trial and level from the file TICKETS_FROM."""
    return rewind(*ticket)


ARM_STARTS = {"rewind": rewind, "reinit": reinit, "shuffle": shuffle, "oneshot": oneshot, "transfer": transfer}


def masks_at(pruned_at: Masks, level: int) -> Masks:
    """The masks of a level, from the level at which each weight was pruned (0: never)."""
    return {name: ((levels == 0) | (levels > level)).float() for name, levels in pruned_at.items()}


def load_tickets(path: str | Path) -> dict:
    """What a tickets.pt holds: the run's constants, theta0, and for each prunable weight its level of pruning."""
    try:
        tickets = torch.load(beside_script(str(path)), weights_only=True)
        return {name: tickets[name] for name in ("constants", "theta0", "pruned_at")}
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        fail(f"no tickets could be read from {path} ({type(error).__name__}): name the tickets.pt of a finished run.")


def load_ticket(path: str | Path, trial: int, level: int) -> nn.Sequential:
    """One ticket as an ordinary network at its initial weights, with `torch.nn.utils.prune` masks, ready to train.

    Raises IndexError for a trial or a level that the file does not hold.
    """
    tickets = load_tickets(path)
    trials, levels = tickets["constants"]["TRIALS"], tickets["constants"]["LEVELS"]
    if not (0 <= trial < trials and 0 <= level <= levels):
        raise IndexError(f"{path} holds trials 0 to {trials - 1} and levels 0 to {levels}")
    network = build_network(tickets["constants"]["MODEL"], tickets["constants"]["DROPOUT"])
    network = as_plain_network(network, pick(tickets["theta0"], trial))
    masks = masks_at(pick(tickets["pruned_at"], trial), level)
    for name, layer in weighted_layers(network).items():
        mask = masks[f"{name}.weight"]
        torch_prune.custom_from_mask(layer, "weight", mask.T if isinstance(layer, nn.Linear) else mask)
    return network


# ------------------------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------------------------

def steps_per_epoch() -> int:
    """Whole batches in an epoch: each epoch's order leaves out another remainder of the training images."""
    return (60_000 - VALIDATION_SIZE) // BATCH_SIZE


def batches(images: int, level: int, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of image numbers (trials, batch): an order of its own for every trial, level and epoch."""
    orders = [generator("order", trial, level) for trial in range(TRIALS)]
    while True:
        epoch = torch.stack([torch.randperm(images, generator=order) for order in orders]).to(device)
        yield from epoch.split(BATCH_SIZE, dim=1)[:steps_per_epoch()]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each network's mean cross-entropy, (nets,), from logits (nets, batch, 10) and labels (nets, batch)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def clip_gradients(weights: Weights, max_norm: float) -> None:
    """`clip_grad_norm_` for each network of the stack alone: one network's large gradient never scales another's."""
    gradients = [tensor.grad for tensor in weights.values()]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)    # (nets,)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))


@torch.no_grad()
def evaluate(network: nn.Sequential, weights: Weights, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy in percent, both (nets,), of every network on all of the images."""
    nets = len(weights["output.bias"])
    loss, correct = torch.zeros(2, nets, device=images.device)
    for x, y in zip(images.split(1_000), labels.split(1_000), strict=True):
        logits, y = forward(network, weights, x.expand(nets, *x.shape)), y.expand(nets, -1)
        loss += losses(logits, y) * y.shape[1]
        correct += (logits.argmax(2) == y).sum(1)
    return loss / len(images), 100 * correct / len(images)


def train(weights: Weights, masks: Masks, data: dict[str, tuple[Tensor, Tensor]], level: int, steps: int,
          bar: tqdm) -> tuple[Weights, list[tuple]]:
    """Train a stack of networks, arm after arm of TRIALS each; the trials of all arms see the same batches.

    Pruned weights stay exactly zero: they start so, their gradient is masked before it is clipped, and in a fresh
    AdamW zero gradients leave zero moments, which decoupled decay leaves alone.
    Returns the trained weights, and for each evaluation (step, train_loss, val_loss, val_accuracy, test_accuracy),
    all but the step (nets,) on the CPU; train_loss is the mean over the batches since the evaluation before.
    """
    network = build_network(MODEL, DROPOUT)
    images, labels = data["train"]
    nets = len(weights["output.bias"])
    weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}   # theta0 stays as it is
    optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    dropout = generator("dropout", level=level, device=images.device)
    order = batches(len(images), level, images.device)
    train_loss, since, evaluations = torch.zeros(nets, device=images.device), 0, []

    for step in range(1, steps + 1):
        batch = next(order).repeat(nets // TRIALS, 1)                                       # (nets, batch)
        loss = losses(forward(network, weights, images[batch], dropout), labels[batch])     # (nets,)
        loss.sum().backward()                     # the sum: every network gets just its own gradient, unscaled
        for name, mask in masks.items():
            weights[name].grad.mul_(mask)
        if CLIP_NORM is not None:
            clip_gradients(weights, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        train_loss += loss.detach()
        since += 1
        if step % EVAL_EVERY == 0 or step == steps:
            val_loss, val_accuracy = evaluate(network, weights, *data["validation"])
            _, test_accuracy = evaluate(network, weights, *data["test"])
            evaluations.append((step, *(x.cpu() for x in (train_loss / since, val_loss, val_accuracy, test_accuracy))))
            if not (train_loss + val_loss).isfinite().all():
                fail(f"training diverged at level {level}, step {step}: try a LEARNING_RATE below {LEARNING_RATE}.")
            train_loss, since = torch.zeros_like(train_loss), 0
        bar.update(nets)
    return {name: tensor.detach() for name, tensor in weights.items()}, evaluations


# ------------------------------------------------------------------------------------------------------------------
# Experiment
# ------------------------------------------------------------------------------------------------------------------

COLUMNS = ("dataset", "model", "arm", "trial", "level", "weights_remaining", "step",
           "train_loss", "val_loss", "val_accuracy", "test_accuracy")


def constants() -> dict:
    """All constants as they stand, by name."""
    return {name: globals()[name] for name in RULES}


def checkpoint_path() -> Path:
    """Where an unfinished run with just these constants keeps its state; where files lie is not part of a run."""
    names = {name: value for name, value in constants().items() if name not in ("DATA_DIR", "RESULTS_DIR")}
    digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()
    return beside_script(RESULTS_DIR) / f"checkpoint-{digest[:12]}.pt"


def records(level: int, arms: tuple[str, ...], masks: Masks, evaluations: list[tuple]) -> list[dict]:
    """A row per evaluation of each network of a level, by arm, trial and step."""
    remaining = weights_remaining(masks)
    return [dict(zip(COLUMNS, (DATASET, MODEL, arm, trial, level, round(remaining[net].item(), 4), step,
                               *(round(measure[net].item(), 6) for measure in measures)), strict=True))
            for net, (arm, trial) in enumerate(itertools.product(arms, range(TRIALS)))
            for step, *measures in evaluations]


def start_arms(state: dict, tickets: Masks, level: int) -> tuple[Weights, Masks]:
    """The stack that a level starts from: every arm's networks, one per trial, on the CPU."""
    given = load_tickets(TICKETS_FROM) if TICKETS_FROM else None
    starts = []
    for arm, trial in itertools.product(ARMS, range(TRIALS)):
        starts.append(ARM_STARTS[arm](
            theta0=pick(state["theta0"], trial), masks=pick(tickets, trial), dense=pick(state["dense"], trial),
            random=generator(arm, trial, level) if arm in PURPOSES else None,
            ticket=given and (pick(given["theta0"], trial), masks_at(pick(given["pruned_at"], trial), level))))
    return stack([weights for weights, _ in starts]), stack([masks for _, masks in starts])


def run_experiment(data: dict[str, tuple[Tensor, Tensor]], device: torch.device) -> dict:
    """Train the dense networks, then prune the rewound ones level by level and start every arm from the new masks.

    The iterative strategy of the paper's section 2. Returns, and saves after each level, the whole state:
    level (the last one finished), rows, theta0, pruned_at, dense and trained (the rewind arm's newest weights).
    """
    network, steps = build_network(MODEL, DROPOUT), EPOCHS * steps_per_epoch()
    checkpoint = checkpoint_path()
    if checkpoint.exists():
        try:
            state = torch.load(checkpoint, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            fail(f"{checkpoint} cannot be read: move it away to start this run afresh.")
        print(f"resuming after level {state['level']} of {LEVELS}", flush=True)
    else:
        theta0 = stack([initial_weights(generator("init", trial)) for trial in range(TRIALS)])
        never = {name: torch.zeros_like(mask, dtype=torch.uint8) for name, mask in full_masks(theta0).items()}
        state = {"level": -1, "rows": [], "theta0": theta0, "pruned_at": never}

    # The unit of progress is one step of one network: level 0 has fewer networks than the others.
    work = [TRIALS * (steps + REWIND_STEP)] + LEVELS * [TRIALS * len(ARMS) * steps]
    before, begun = sum(work[:state["level"] + 1]), time.monotonic()
    print("level   weights remaining" + "".join(f"{arm:>11}" for arm in ARMS) + "   time left", flush=True)
    with tqdm(total=sum(work), initial=before, smoothing=0, disable=None, leave=False, unit="step", unit_scale=True,
              bar_format="{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left") as bar:
        for level in range(state["level"] + 1, LEVELS + 1):
            if level == 0:
                arms, weights, masks = ("dense",), state["theta0"], full_masks(state["theta0"])
            else:
                tickets = prune(state["trained"], masks_at(state["pruned_at"], level), prune_rates(network), PRUNE_SCOPE)
                for name, mask in tickets.items():
                    state["pruned_at"][name][(mask == 0) & (state["pruned_at"][name] == 0)] = level
                arms, (weights, masks) = ARMS, start_arms(state, tickets, level)
            weights, masks = ({name: t.to(device) for name, t in tensors.items()} for tensors in (weights, masks))
            trained, evaluations = train(weights, masks, data, level, steps, bar)
            if level == 0 and REWIND_STEP:                  # the same first steps again: theta0 of the late rewinding
                early, _ = train(weights, masks, data, level, REWIND_STEP, bar)
                state["theta0"] = {name: tensor.cpu() for name, tensor in early.items()}
            first = arms.index("dense" if level == 0 else "rewind") * TRIALS
            state["trained"] = {name: tensor[first:first + TRIALS].clone().cpu() for name, tensor in trained.items()}
            if level == 0:
                state["dense"] = state["trained"]
            state["rows"] += records(level, arms, masks, evaluations)
            state["level"] = level
            buffer = io.BytesIO()
            torch.save(state, buffer)
            write_whole(checkpoint, buffer.getvalue())

            done = sum(work[:level + 1])
            left = (time.monotonic() - begun) * (sum(work) - done) / (done - before)
            final = evaluations[-1][-1].view(len(arms), TRIALS).mean(1).tolist() * (len(ARMS) if level == 0 else 1)
            with tqdm.external_write_mode():
                print(f"{level:5}{weights_remaining(masks)[first]:18.1f} %" + "".join(f"{x:9.2f} %" for x in final)
                      + f"{left / 60:8.1f} min", flush=True)
    return state


# ------------------------------------------------------------------------------------------------------------------
# Results: tables and figures read the records and nothing else
# ------------------------------------------------------------------------------------------------------------------

FIGURES = ("accuracy_plot_iterative.png", "accuracy_plot_reinit.png", "comparison_plot.png",
           "early_stopping_plot.png", "learning_curves.png", "mask_plot.png")
COLOURS = dict(zip(("rewind", "reinit", "shuffle", "oneshot", "transfer"), sns.color_palette("colorblind"), strict=False))
MARKERS = {"rewind": "o", "reinit": "s", "shuffle": "^", "oneshot": "D", "transfer": "v"}
DENSE_COLOUR = "0.35"


def measured(rows: list[dict], arm: str, column: str) -> np.ndarray:
    """A column as an array (levels, trials, evaluations); level 0, the dense networks, is where every arm starts."""
    rows = [row for row in rows if row["arm"] in ("dense", arm)]
    trials, evaluations = len({row["trial"] for row in rows}), len({row["step"] for row in rows})
    return np.array([row[column] for row in rows]).reshape(-1, trials, evaluations)


def final(rows: list[dict], arm: str, column: str) -> np.ndarray:
    """A column after the last step, (levels, trials)."""
    return measured(rows, arm, column)[:, :, -1]


def early_stop(rows: list[dict], arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Step of the lowest validation loss, and whether it came before the last evaluation: both (levels, trials)."""
    at = measured(rows, arm, "val_loss").argmin(2)
    steps = measured(rows, arm, "step")
    return np.take_along_axis(steps, at[..., None], 2)[..., 0], at < steps.shape[2] - 1


def catch_up(rows: list[dict], arm: str) -> tuple[np.ndarray, np.ndarray]:
    """First step with the final validation accuracy of the same trial's dense network, and whether it came at all."""
    accuracy, steps = measured(rows, arm, "val_accuracy"), measured(rows, arm, "step")
    there = accuracy >= accuracy[0, :, -1][None, :, None]
    first = np.take_along_axis(steps, there.argmax(2)[..., None], 2)[..., 0]
    return np.where(there.any(2), first, steps[..., -1]), there.any(2)


def arms_of(rows: list[dict]) -> list[str]:
    """The arms of a run, in their order."""
    return [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != "dense"]


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences and half the width of its 95 % confidence interval, by Student's t (n - 1 degrees)."""
    n = len(differences)
    if n == 1:
        return differences.mean(), math.nan
    angle = np.linspace(-np.pi / 2, np.pi / 2, 400_001)     # t = sqrt(n - 1) tan(angle) has density cos(angle)^(n - 2)
    distribution = np.cumsum(np.cos(angle) ** (n - 2))
    quantile = np.sqrt(n - 1) * np.tan(np.interp(0.975, distribution / distribution[-1], angle))
    return differences.mean(), quantile * differences.std(ddof=1) / np.sqrt(n)


def verdict(rows: list[dict]) -> list[str]:
    """The answer in plain words: sentences."""
    dense = final(rows, "dense", "test_accuracy")[0]
    trials = f"{len(dense)} trial{'s' if len(dense) > 1 else ''}"
    sentences = [f"The dense networks end at {dense.mean():.2f} % test accuracy (mean of {trials}, "
                 f"{dense.min():.2f} to {dense.max():.2f})."]
    if not arms_of(rows):
        return sentences
    remaining = final(rows, "rewind", "weights_remaining").mean(1)
    means = {arm: final(rows, arm, "test_accuracy").mean(1) for arm in arms_of(rows)}
    matching = [level for level in range(1, len(remaining)) if means["rewind"][level] >= means["rewind"][0]]
    if matching:
        level = matching[-1]
        sentences.append(f"The smallest matching ticket keeps {remaining[level]:.1f} % of the weights: rewound, it "
                         f"ends at {means['rewind'][level]:.2f} %, not below the dense networks.")
    else:
        sentences.append("No rewound ticket ends at the dense networks' accuracy.")
    for arm in arms_of(rows)[0:]:
        if arm == "rewind":
            continue
        above = np.flatnonzero(means[arm] >= means[arm][0])[-1]
        if above + 1 < len(remaining):
            sentences.append(f"The {arm} arm is below the dense networks from {remaining[above + 1]:.1f} % of the "
                             "weights on.")
        else:
            sentences.append(f"The {arm} arm is not below the dense networks at the sparsest level.")
        differences = final(rows, "rewind", "test_accuracy") - final(rows, arm, "test_accuracy")
        mean, half = interval(differences[-1])
        if math.isnan(half):
            sentences.append(f"At {remaining[-1]:.1f} % of the weights rewind - {arm} is {mean:+.2f} points; one "
                             "trial gives no interval.")
            continue
        bounds = [interval(difference) for difference in differences[1:]]
        ahead, behind = (sum(sign * centre > width for centre, width in bounds) for sign in (1, -1))
        sentences.append(f"At {remaining[-1]:.1f} % of the weights rewind - {arm} is {mean:+.2f} points (95 % interval "
                         f"{mean - half:+.2f} to {mean + half:+.2f}, paired, {trials}); of {len(bounds)} levels, "
                         f"rewind is ahead with its whole interval at {ahead} and behind at {behind}.")
    return sentences


def summary(rows: list[dict], settings: dict) -> str:
    """summary.md: the verdict, a table with a row per level, the constants and the versions."""
    arms = arms_of(rows)
    last = max(row["step"] for row in rows)

    def spread(values: np.ndarray, digits: int) -> str:
        return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

    def stop(level: int, arm: str) -> str:
        steps, reached = early_stop(rows, arm)
        missed = np.count_nonzero(~reached[level])
        return f"≥ {spread(steps[level], 0)}, {missed} not reached" if missed else spread(steps[level], 0)

    rivals = [arm for arm in arms if arm != "rewind"]
    header = (["level", "weights remaining"] + [f"{arm}: test accuracy, %" for arm in arms]
              + [f"rewind - {arm}, points" for arm in rivals] + [f"{arm}: early-stop step" for arm in arms])
    lines = []
    for level in range(len(measured(rows, "rewind", "step"))):
        columns = arms if level else ["dense"]
        blank = [""] * (len(arms) - 1)
        line = [str(level), f"{final(rows, columns[0], 'weights_remaining')[level].mean():.1f} %"]
        line += [spread(final(rows, arm, "test_accuracy")[level], 2) for arm in columns]
        if level == 0:
            line += blank + [""] * len(rivals) + [stop(0, "dense")] + blank
        else:
            for arm in rivals:
                mean, half = interval((final(rows, "rewind", "test_accuracy") - final(rows, arm, "test_accuracy"))[level])
                line.append(f"{mean:+.2f}" if math.isnan(half) else f"{mean:+.2f} ± {half:.2f}")
            line += [stop(level, arm) for arm in arms]
        lines.append(line)
    if not arms:
        header += ["dense: test accuracy, %", "dense: early-stop step"]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])
    values = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    versions = (f"Python {platform.python_version()}, " +
                ", ".join(f"{library.__name__} {library.__version__}" for library in (torch, torchvision, np, sns)) +
                f"; {torch.get_num_threads()} CPU threads")
    return f"""# {rows[0]["dataset"]}, {rows[0]["model"]}: {" and ".join(arms) or "dense"}

{chr(10).join("- " + sentence for sentence in verdict(rows))}

Level 0 is the dense networks. Accuracies are those after the last step, {last}: mean (lowest to highest) over the trials.
Differences are paired by trial: mean ± half of the 95 % interval. The early-stop step is that of the lowest validation
loss; where it is the last evaluation, an early stop was not reached, and the mean is a lower bound.

{table}

## Constants and versions

```
{values}
```

{versions}
"""


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple:
    """A seaborn-styled figure and its axes, (rows, columns)."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=1.15)
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)


def caption(rows: list[dict]) -> str:
    """What every figure says of its run."""
    return f"{rows[0]['dataset']}, {rows[0]['model']}, {len({row['trial'] for row in rows})} trials"


def scale_weights_remaining(axes: plt.Axes, rows: list[dict]) -> None:
    """Log axis of the weights remaining, from 100 % on the left to the sparsest level."""
    sparsest = min(row["weights_remaining"] for row in rows)
    axes.set(xscale="log", xlim=(108, sparsest / 1.08), xlabel="weights remaining (%)")
    ticks = [tick for tick in (100, 50, 20, 10, 5, 3, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01) if tick >= sparsest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def accuracy_plot(rows: list[dict], arms: list[str], title: str) -> plt.Figure:
    """Final test accuracy versus weights remaining: mean and min-max band over trials, dense networks dashed."""
    figure, ((axes,),) = new_figure(8, 5)
    dense = final(rows, "dense", "test_accuracy")[0]
    axes.axhline(dense.mean(), color=DENSE_COLOUR, linestyle="--", label=f"dense, {dense.mean():.2f} %")
    for arm in arms:
        accuracy, remaining = final(rows, arm, "test_accuracy"), final(rows, arm, "weights_remaining").mean(1)
        sns.lineplot(x=np.repeat(remaining, accuracy.shape[1]), y=accuracy.ravel(), errorbar=("pi", 100), ax=axes,
                     color=COLOURS[arm], marker=MARKERS[arm], label=arm)
    scale_weights_remaining(axes, rows)
    values = np.concatenate([final(rows, arm, "test_accuracy").ravel() for arm in arms_of(rows)])
    margin = 0.05 * np.ptp(values)
    axes.set(ylim=(values.min() - margin, values.max() + margin), ylabel="test accuracy (%)",
             title=f"{title}\n{caption(rows)}: mean, lowest to highest")
    axes.legend(loc="lower left")
    return figure


def early_stopping_plot(rows: list[dict]) -> plt.Figure:
    """When the networks stop improving, and when they are as good as the dense ones end: medians over trials."""
    figure, (panels,) = new_figure(11, 5, columns=2, sharey=True)
    last = max(row["step"] for row in rows)
    titles = "lowest validation loss", "dense network's final validation accuracy reached"
    for axes, moment, title in zip(panels, (early_stop, catch_up), titles, strict=True):
        for arm in arms_of(rows):
            steps, reached = moment(rows, arm)
            median, missed = np.median(steps, 1), reached.mean(1) < 0.5
            remaining = final(rows, arm, "weights_remaining").mean(1)
            axes.plot(remaining, median, color=COLOURS[arm], label=arm)
            for group, face in ((missed, "white"), (~missed, COLOURS[arm])):
                axes.plot(remaining[group], median[group], MARKERS[arm], color=COLOURS[arm], markerfacecolor=face,
                          markeredgewidth=1.5)
        scale_weights_remaining(axes, rows)
        axes.axhline(last, color=DENSE_COLOUR, linestyle=":")
        axes.set(ylim=(0, 1.12 * last), ylabel="training step", title=title)
    panels[0].plot([], [], "o", color=DENSE_COLOUR, markerfacecolor="white", markeredgewidth=1.5,
                   label=f"not reached within {last} steps\nin most trials")
    panels[0].legend(loc="lower left")
    figure.suptitle(f"{caption(rows)}: medians")
    return figure


def levels_near(rows: list[dict], percents: tuple[float, ...]) -> list[int]:
    """The pruned levels whose weights remaining lie nearest to the given percents."""
    remaining = final(rows, "rewind", "weights_remaining").mean(1)[1:]
    return sorted({1 + int(np.abs(np.log(remaining / percent)).argmin()) for percent in percents})


def learning_curves(rows: list[dict]) -> plt.Figure:
    """Test accuracy while training, at a few sparsities: mean and min-max band over trials, dense networks dashed."""
    levels = levels_near(rows, (51.3, 21.1, 7.0, 3.6)) if arms_of(rows) else [0]
    figure, panels = new_figure(10, 3.9 * math.ceil(len(levels) / 2), math.ceil(len(levels) / 2), min(2, len(levels)),
                                sharex=True, sharey=True)
    for level, axes in zip(levels, panels.flat, strict=False):
        curves = {"dense": 0} | ({arm: level for arm in arms_of(rows)} if level else {})
        for arm, at in curves.items():
            accuracy, steps = measured(rows, arm, "test_accuracy")[at], measured(rows, arm, "step")[at]
            sns.lineplot(x=steps.ravel(), y=accuracy.ravel(), errorbar=("pi", 100), ax=axes, label=arm,
                         legend=axes is panels.flat[0], color=COLOURS.get(arm, DENSE_COLOUR),
                         linestyle="--" if arm == "dense" else "-")
        remaining = final(rows, "rewind" if level else "dense", "weights_remaining")[level].mean()
        axes.set(xlabel="training step", ylabel="test accuracy (%)", title=f"{remaining:.1f} % of weights remaining")
    for axes in panels.flat[len(levels):]:
        axes.remove()
    figure.suptitle(f"{caption(rows)}: mean, lowest to highest")
    return figure


def mask_plot(rows: list[dict], pruned_at: Masks) -> plt.Figure:
    """Where the rewind arm's first-layer weights survive: per input pixel for the MLP, in each kernel for the LeNet."""
    if "conv1.weight" not in pruned_at:
        levels = levels_near(rows, (51.3, 21.1, 7.0, 3.6))
        figure, panels = new_figure(9, 4.1 * math.ceil(len(levels) / 2), math.ceil(len(levels) / 2), min(2, len(levels)))
        for level, axes in zip(levels, panels.flat, strict=False):
            surviving = 100 * masks_at(pruned_at, level)["fc1.weight"].mean((0, 2)).view(28, 28)    # trials, units
            sns.heatmap(surviving, ax=axes, square=True, cmap="rocket", vmin=0, xticklabels=False, yticklabels=False,
                        cbar_kws={"label": "weights left (%)"})
            remaining = final(rows, "rewind", "weights_remaining")[level].mean()
            axes.set(title=f"{remaining:.1f} % of weights remaining", xlabel="pixel column", ylabel="pixel row")
        for axes in panels.flat[len(levels):]:
            axes.remove()
        figure.suptitle(f"{caption(rows)}: first-layer weights left per input pixel, mean")
        return figure
    kernels = pruned_at["conv1.weight"][:5, :, 0].int()                             # (trials, 6, 5, 5)
    last = max(row["level"] for row in rows)
    figure, panels = new_figure(10, 0.9 + 1.7 * len(kernels), len(kernels), 6)
    for (trial, kernel), axes in zip(np.ndindex(len(kernels), 6), panels.flat, strict=True):
        levels = kernels[trial, kernel]
        image = axes.imshow(levels.where(levels > 0, last + 1), cmap="viridis", vmin=1, vmax=last + 1)
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        if kernel == 0:
            axes.set_ylabel(f"trial {trial}")
        if trial == 0:
            axes.set_title(f"kernel {kernel + 1}")
    bar = figure.colorbar(image, ax=panels, label="level at which the weight was pruned")
    ticks = sorted({1, (last + 1) // 2, last + 1})
    bar.set_ticks(ticks, labels=[str(tick) if tick <= last else "survived" for tick in ticks])
    figure.suptitle(f"{caption(rows)}: the weights of the first convolution")
    return figure


def draw_figures(rows: list[dict], pruned_at: Masks) -> dict[str, plt.Figure]:
    """Every figure that the run's arms and levels give, by file name."""
    figures = {"learning_curves.png": learning_curves(rows)}
    if arms_of(rows):
        figures["accuracy_plot_iterative.png"] = accuracy_plot(rows, ["rewind"], "Iterative pruning, survivors rewound")
        figures["comparison_plot.png"] = accuracy_plot(rows, arms_of(rows), "Is it the connections, or their initial weights?")
        figures["early_stopping_plot.png"] = early_stopping_plot(rows)
        figures["mask_plot.png"] = mask_plot(rows, pruned_at)
    if "reinit" in arms_of(rows):
        figures["accuracy_plot_reinit.png"] = accuracy_plot(rows, ["reinit"], "The same masks, survivors drawn anew")
    return figures


def write_results(state: dict, folder: Path) -> None:
    """Write the records, the summary, the tickets and the figures; another run's results move to a folder earlier-N."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(state["rows"])
    tickets = {"constants": constants(), "theta0": state["theta0"], "pruned_at": state["pruned_at"]}
    matplotlib.use("Agg")                                   # files only: no window, no display needed
    contents = {"metrics.csv": text.getvalue().encode(), "summary.md": summary(state["rows"], constants()).encode()}
    for name, content in {"tickets.pt": tickets, **draw_figures(state["rows"], state["pruned_at"])}.items():
        buffer = io.BytesIO()
        if name == "tickets.pt":
            torch.save(content, buffer)
        else:
            content.savefig(buffer, format="png", dpi=150)
            plt.close(content)
        contents[name] = buffer.getvalue()

    metrics = folder / "metrics.csv"
    if metrics.exists() and metrics.read_bytes() != contents["metrics.csv"]:
        earlier = next(path for n in itertools.count(1) if not (path := folder / f"earlier-{n}").exists())
        earlier.mkdir()
        for name in ("metrics.csv", "summary.md", "tickets.pt", *FIGURES):
            if (folder / name).exists():
                (folder / name).rename(earlier / name)
        print(f"another run's results are now in {earlier}")
    for name, content in contents.items():
        write_whole(folder / name, content)


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------

def one_of(*names: str) -> tuple:
    return (str,), lambda value: value in names, "one of " + ", ".join(names)


def whole_number(lowest: int, highest: float = math.inf) -> tuple:
    most = f" to {highest}" if highest < math.inf else " or more"
    return (int,), lambda value: lowest <= value <= highest, f"a whole number, {lowest}{most}"


def number(condition: Callable[[float], bool], words: str, *also: type) -> tuple:
    return (float, int, *also), lambda value: value is None or (math.isfinite(value) and condition(value)), f"a number {words}"


RULES = {                                                   # constant: types, condition, what it has to be
    "DATASET": one_of("MNIST", "FashionMNIST", "KMNIST"),
    "MODEL": one_of("mlp", "lenet"),
    "INIT": one_of("kaiming_normal", "xavier_normal"),
    "DROPOUT": number(lambda p: 0 <= p < 1, "from 0 to below 1"),
    "ARMS": ((tuple,), lambda arms: arms and all(arm in ARM_STARTS for arm in arms) and len(set(arms)) == len(arms),
             "a choice, each once, of " + ", ".join(ARM_STARTS)),
    "TRIALS": whole_number(1),
    "LEVELS": whole_number(0, 255),                         # pruned_at holds them in 8 bits
    "PRUNE_RATE": number(lambda rate: 0 < rate < 1, "between 0 and 1"),
    "PRUNE_SCOPE": one_of("layer", "global"),
    "REWIND_STEP": whole_number(0),
    "TICKETS_FROM": ((str, type(None)), lambda path: True, "None, or the path of a tickets.pt"),
    "SEED": whole_number(0),
    "EPOCHS": whole_number(1),
    "BATCH_SIZE": whole_number(1, 60_000 - VALIDATION_SIZE),
    "LEARNING_RATE": number(lambda rate: rate > 0, "above 0"),
    "WEIGHT_DECAY": number(lambda decay: decay >= 0, "of at least 0"),
    "CLIP_NORM": number(lambda norm: norm > 0, "above 0, or None", type(None)),
    "EVAL_EVERY": whole_number(1),
    "DATA_DIR": ((str,), lambda path: path, "a folder's path"),
    "RESULTS_DIR": ((str,), lambda path: path, "a folder's path"),
    "DEVICE": ((str,), lambda device: device, "auto, cpu, cuda, cuda:1 and so on, or mps"),
}


def nearest(name: str, known: list[str]) -> str:
    """A suggestion to end an error with, or nothing."""
    alike = {other.lower(): other for other in known}
    match = difflib.get_close_matches(str(name).lower(), alike, n=1)
    return f"; did you mean {alike[match[0]]}?" if match else "."


def read_arguments(arguments: list[str]) -> dict:
    """Constants set for this run. Values are Python literals, a bare word is a string, ARMS may be rewind,shuffle."""
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            fail(f"{argument!r} is not of the form NAME=VALUE, such as TRIALS=1.")
        if name not in RULES:
            fail(f"there is no constant {name}" + nearest(name, list(RULES)))
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            value = text
        if name == "ARMS" and isinstance(value, str | list):
            value = tuple(value.split(",") if isinstance(value, str) else value)
        elif value is not None and not isinstance(value, str) and str in RULES[name][0]:
            value = text                                    # a folder may be called 2026
        values[name] = value
    return values


def check_constants() -> None:
    """Stop with one sentence where a constant is out of range, or where constants make no sense together."""
    for name, (types, condition, words) in RULES.items():
        value = globals()[name]
        if type(value) not in types or not condition(value):
            known = words.removeprefix("one of ").split(", ") if words.startswith("one of ") else []
            fail(f"{name} must be {words}, not {value!r}" + nearest(value, known))
    steps = EPOCHS * steps_per_epoch()
    if LEVELS and "rewind" not in ARMS:
        fail("ARMS must contain rewind: its networks are the ones that are pruned.")
    if ("transfer" in ARMS) != (TICKETS_FROM is not None):
        fail("the arm transfer and TICKETS_FROM go together: set both or neither.")
    if REWIND_STEP >= steps:
        fail(f"REWIND_STEP must be below the {steps} steps of a training, not {REWIND_STEP}.")
    if TICKETS_FROM is not None:
        given = load_tickets(TICKETS_FROM)["constants"]
        if given["MODEL"] != MODEL or given["TRIALS"] < TRIALS or given["LEVELS"] < LEVELS:
            fail(f"{TICKETS_FROM} holds {given['TRIALS']} trials and {given['LEVELS']} levels of {given['MODEL']}: "
                 "MODEL must be the same, TRIALS and LEVELS no more.")
    left = {f"{name}.weight": layer.weight.numel() for name, layer in weighted_layers(build_network(MODEL, 0)).items()}
    if PRUNE_SCOPE == "global":
        left = {"all layers": sum(left.values())}
    for level, name in itertools.product(range(1, LEVELS + 1), left):
        gone = round(prune_rates(build_network(MODEL, 0)).get(name, PRUNE_RATE) * left[name])
        if not 0 < gone < left[name]:
            fail(f"LEVELS={LEVELS} is too many at PRUNE_RATE={PRUNE_RATE}: at level {level}, {gone} of the "
                 f"{left[name]} weights left in {name} would be pruned.")
        left[name] -= gone


def choose_device() -> torch.device:
    """DEVICE, or the fastest kind that is there."""
    if DEVICE == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        torch.zeros(1, device=DEVICE)
        return torch.device(DEVICE)
    except (RuntimeError, AssertionError) as error:
        fail(f"DEVICE={DEVICE} cannot be used here ({str(error).splitlines()[0]}): DEVICE=auto takes what there is.")


def prepare_results_folder() -> Path:
    """RESULTS_DIR, made where it is missing; found out before the work if it cannot be written to."""
    folder = beside_script(RESULTS_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fail(f"the results folder {folder} cannot be written to ({error.strerror}): choose another RESULTS_DIR.")
    return folder


def main(arguments: list[str]) -> None:
    """Do pruned networks train better from their original initial weights, or does any draw do?"""
    if {"-h", "--help"} & set(arguments):
        print(__doc__ + "\nConstants:\n" + "\n".join(f"  {name} = {value!r}" for name, value in constants().items()))
        return
    globals().update(read_arguments(arguments))
    check_constants()
    folder, device = prepare_results_folder(), choose_device()
    torch.set_flush_denormal(True)      # AdamW's fading moments would slow a CPU down on their way to zero
    data = load_dataset(device)
    try:
        state = run_experiment(data, device)
    except KeyboardInterrupt:
        print("\nstopped: the same command resumes after the last level that was finished.", file=sys.stderr)
        raise SystemExit(130) from None
    write_results(state, folder)
    checkpoint_path().unlink()
    print("\n" + "\n".join(verdict(state["rows"])) + f"\n\nresults: {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
