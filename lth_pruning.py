"""The Lottery Ticket Hypothesis on MNIST (Frankle & Carbin 2019, arXiv:1803.03635).

When a trained network is pruned, was it the surviving connections, or their original initial weights, that made
training work? Train dense networks, remove the smallest weights round after round, and start the survivors again:
from their original initial weights ("rewind"), or from fresh random ones on the very same connections ("reinit").

    python lth_pruning.py                                      the defaults: six or seven minutes on two CPU cores
    python lth_pruning.py TRIALS=2 LEVELS=4 PRUNE_RATE=0.5     any constant below can be set for one run

Out come figures, metrics.csv, summary.md and tickets.pt in results/. A run that is stopped resumes where it was.

Measured with the defaults over 5 trials, test accuracy at early stop: dense networks 97.36 %, rewound tickets 98.09 %
with 21.1 % of the weights and 97.57 % with 3.6 %, re-initialised ones 96.88 % and 94.83 %. A ticket that has not been
trained at all, original weights merely pruned, reaches 93.19 % with 21.1 %.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "matplotlib>=3.8", "seaborn[stats]>=0.13.2",
#                 "tqdm>=4.66"]
# ///

import ast
import contextlib
import datetime
import difflib
import functools
import gzip
import hashlib
import inspect
import io
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

# ---- Constants: edit them here, or set them for one run as NAME=VALUE arguments --------------------------------------

# What is trained, and on what
DATASET: Literal["MNIST", "FashionMNIST", "KMNIST"] = "MNIST"     # 28x28 grey images of 10 classes
PIXELS: Literal["standardised", "unit_interval", "unit_length"] = "standardised"    # mean 0, deviation 1; 0 to 1; or
                                      # each image by its own norm, the scale of the pixels in the paper's code
MODEL: Literal["mlp", "lenet"] = "mlp"                            # 784-300-100-10 (LeNet-300-100), or LeNet-5
INIT: Literal["kaiming_normal", "xavier_normal"] = "kaiming_normal"     # the paper uses Glorot's; biases start at zero
DROPOUT: float = 0.2                  # after each hidden fully connected layer; 0 switches it off

# The experiment
ARMS: tuple = ("rewind", "reinit")    # how a pruned network starts; all arms are in the section on tickets
TRIALS: int = 5                       # initialisations, each with its own data order
LEVELS: int = 16                      # pruning rounds; 0 trains the dense networks alone
PRUNE_RATE: float = 0.2               # of the surviving weights, per level; half of it in convolutions and the output
PRUNE_SCOPE: Literal["layer", "global"] = "layer"     # smallest weights layer by layer, or over all layers at one rate
REWIND_STEP: int = 0                  # rewind to the weights after this many steps, and train the remaining ones
TICKETS_FROM: str | None = None       # the tickets.pt of another run, for the arm "transfer"
SEED: int = 42                        # one seed, one result

# Training: the same for every network, dense or pruned
EPOCHS: int = 3
BATCH_SIZE: int = 128
LEARNING_RATE: float = 1.2e-3         # the paper's, for Adam
WEIGHT_DECAY: float = 1e-2            # AdamW's decoupled decay; 0 makes it Adam
CLIP_NORM: float | None = 1.0         # largest gradient norm of a network; None: no clipping
EVAL_EVERY: int = 200                 # steps between evaluations; there is always one after the last step

# Where
DATA_DIR: str = "data"                # relative paths start beside this script
RESULTS_DIR: str = "results"
DEVICE: str = "auto"                  # cuda where there is one, else cpu; "mps" is taken only when asked for

VALIDATION_SIZE = 5_000               # of the 60,000 training images, as in the paper
MATCHING_MARGIN = 0.2                 # points below the dense networks that still count as matching

Weights = dict[str, Tensor]           # "fc1.weight" -> tensor; a stack's tensors have a leading nets dimension
Masks = dict[str, Tensor]             # prunable weights only; 1 where a weight remains, 0 where it was pruned
Dataset = dict[str, tuple[Tensor, Tensor]]        # "train", "validation", "test" -> images (n, 1, 28, 28), labels (n,)


# ---- Experiment ------------------------------------------------------------------------------------------------------

def run_experiment(state: dict, data: Dataset, elsewhere: dict[int, dict], checkpoint: Path) -> None:
    """Train the dense networks, then prune the rewound ones level by level and start every arm from the new masks.

    Iterative pruning as in the paper's section 2 (strategy 1 of its appendix B). The state, see `load_state`, is
    brought up to date and saved after each level. `elsewhere`: the tickets of another run, by trial.
    """
    with progress_bar(state["level"]) as bar:
        for level in range(state["level"] + 1, LEVELS + 1):
            pruned_at = prune_tickets(state, level)
            new = state | {"level": level, "pruned_at": pruned_at, "trained": {}, "records": [*state["records"]]}
            for networks in stacks(level, data["train"][0].device):
                weights, masks = start_arms(networks, level, pruned_at, state, elsewhere)
                record(new, networks, masks, *train(weights, masks, data, networks, level, bar))
            finish_level(state, new, checkpoint, bar)


def stacks(level: int, device: torch.device) -> Iterator[list[tuple[str, int]]]:
    """The networks of a level, as (arm, trial), in the groups that train together: arm after arm of the same trials.

    Those of a stack start at the same step. Trials do not depend on each other, so some train after the others: larger
    stacks leave a CPU's caches, and each network's step takes longer. What is best on a GPU is unmeasured.
    """
    arms, trials = ARMS if level else ("dense",), own_trials()
    for begin in sorted({first_step(arm) for arm in arms}):
        together = [arm for arm in arms if first_step(arm) == begin]
        size = max(1, STACK_SIZE * (1 if device.type == "cpu" else 10) // len(together))
        for part in (trials[first:first + size] for first in range(0, len(trials), size)):
            yield list(itertools.product(together, part))


def start_arms(networks: list[tuple[str, int]], level: int, pruned_at: dict[int, Masks], state: dict,
               elsewhere: dict[int, dict]) -> tuple[Weights, Masks]:
    """The stack that these networks (arm, trial) start from."""
    starts = [REGISTRY[arm].start(
        theta0=state["theta"][trial] if first_step(arm) == REWIND_STEP else initial_weights(generator("init", trial)),
        masks=masks_at(pruned_at[trial], level), dense=state["dense"].get(trial),
        trained=state["trained"].get(trial), **{"random": generator(arm, trial, level)} if arm in PURPOSES else {},
        ticket=elsewhere and (elsewhere[trial]["theta0"], masks_at(elsewhere[trial]["pruned_at"], level)))
        for arm, trial in networks]
    return stack([weights for weights, _ in starts]), stack([masks for _, masks in starts])


PURPOSES = {"init": 0, "split": 3, "order": 4, "dropout": 5}     # arms that draw random numbers add theirs


def generator(purpose: str, trial: int = 0, level: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers for one purpose, whatever else is drawn: trial k is the same among 5 trials and among 50."""
    seeds = np.random.SeedSequence([SEED, trial, level, PURPOSES[purpose]])
    return torch.Generator(device).manual_seed(int(seeds.generate_state(1, np.uint64)[0]))


# ---- Tickets: a ticket is a mask together with the initial weights that it was found from ----------------------------

def full_masks(weights: Weights) -> Masks:
    """Masks with every prunable weight remaining: biases are never pruned, and not counted."""
    return {name: torch.ones_like(tensor) for name, tensor in weights.items() if name.endswith(".weight")}


def masked(weights: Weights, masks: Masks) -> Weights:
    """The weights, zero where they are pruned; new tensors."""
    return {name: tensor * masks[name] if name in masks else tensor.clone() for name, tensor in weights.items()}


def prune_rates(network: nn.Sequential) -> dict[str, float]:
    """The share of its survivors that each layer loses per level (section 2 and figure 2 of the paper): half of it in
    the output layer and in convolutions; a global scope compares all layers at one rate."""
    rates = {}
    for name, layer in weighted_layers(network).items():
        gentle = PRUNE_SCOPE == "layer" and (name == "output" or isinstance(layer, nn.Conv2d))
        rates[f"{name}.weight"] = PRUNE_RATE / 2 if gentle else PRUNE_RATE
    return rates


def remove_smallest(weights: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask, of any shape, without the `count` survivors of smallest magnitude; ties go by index."""
    magnitude = weights.abs().masked_fill(mask == 0, torch.inf).flatten()
    return mask.flatten().scatter(0, magnitude.argsort(stable=True)[:count], 0).view(mask.shape)


def prune(weights: Weights, masks: Masks, rates: dict[str, float], scope: str) -> Masks:
    """Remove the smallest survivors of one network, `rates` of them, layer by layer or globally.

    Step 3 of the paper's iterative pruning (its appendix B). Counts are exact: round(rate * survivors).
    """
    pruned = {}
    for group in [[name] for name in masks] if scope == "layer" else [list(masks)]:
        mask = torch.cat([masks[name].flatten() for name in group])
        values = torch.cat([weights[name].flatten() for name in group])
        mask = remove_smallest(values, mask, round(rates[group[0]] * int(mask.sum())))
        parts = mask.split([masks[name].numel() for name in group])
        pruned |= {name: part.view(masks[name].shape) for name, part in zip(group, parts, strict=True)}
    return pruned


def prune_tickets(state: dict, level: int) -> dict[int, Masks]:
    """By trial, the level at which each weight was pruned (0: never), this level's by what the last one trained."""
    if level == 0:
        return state["pruned_at"]
    rates, pruned_at = prune_rates(build_network(MODEL, DROPOUT)), {}
    for trial, levels in state["pruned_at"].items():
        before = masks_at(levels, level - 1)
        after = prune(state["trained"][trial], before, rates, PRUNE_SCOPE)
        pruned_at[trial] = {name: levels[name].masked_fill(before[name] > after[name], level) for name in levels}
    return pruned_at


def masks_at(pruned_at: Masks, level: int) -> Masks:
    """The masks of a level, from the level at which each weight was pruned (0: never)."""
    return {name: ((levels == 0) | (levels > level)).float() for name, levels in pruned_at.items()}


class Arm(NamedTuple):
    """One way to start a masked network, the question that it answers, and how it is drawn."""
    start: Callable                   # from one network's theta0, ticket masks and so on to (weights, masks)
    label: str                        # what it is, in figures and tables
    colour: str
    marker: str
    late: bool = True                 # starts at REWIND_STEP; else at step 0, and trains all steps
    controls: Literal["weights", "mask", "both"] = "both"     # what it has otherwise than the ticket
    question: str = ""                # answered by the ticket's lead over this arm in accuracy
    kind: Literal["difference", "enough", "no loss"] = "difference"     # yes if the ticket is more accurate; if this
                                      # arm is as accurate as the ticket; if the ticket is as accurate as this arm


REGISTRY = {"dense": Arm(lambda **given: rewind(**given), "dense network", "0.35", "P", late=False)}    # of all arms


def register(*description, seed: int | None = None, **options) -> Callable[[Callable], Callable]:
    """Decorator that enters a function of its name into the registry. `seed`: its part of the seed, if it draws."""
    def enter(start: Callable) -> Callable:
        REGISTRY[start.__name__] = Arm(start, *description, **options)
        if seed is not None:
            if seed in PURPOSES.values():
                raise ValueError(f"the seed {seed} of {start.__name__} is another's: choose a number of its own")
            PURPOSES[start.__name__] = seed
        return start
    return enter


def first_step(arm: str) -> int:
    """After how many steps of the dense training an arm starts."""
    return REWIND_STEP if REGISTRY[arm].late else 0


@register("rewound to original weights", "#0173b2", "o")
def rewind(theta0: Weights, masks: Masks, **_) -> tuple[Weights, Masks]:
    """The winning ticket: the survivors' original initial weights."""
    return masked(theta0, masks), masks


@register("re-initialised at random", "#de8f05", "s", late=False, controls="weights", seed=1,
          question="Do the original weights matter?")
def reinit(masks: Masks, random: torch.Generator, **_) -> tuple[Weights, Masks]:
    """The same connections with a fresh draw of initial weights (section 2, "random reinitialization")."""
    return masked(initial_weights(random), masks), masks


@register("original values, permuted", "#56b4e9", "<", controls="weights", seed=6,
          question="Does it matter which survivor has which value, beyond their common scale?")
def permute(theta0: Weights, masks: Masks, random: torch.Generator, **_) -> tuple[Weights, Masks]:
    """The survivors' original values, permuted among the survivors of each layer."""
    weights = masked(theta0, masks)
    for name, mask in masks.items():
        survivors = mask.flatten().nonzero().flatten()
        order = torch.randperm(len(survivors), generator=random)
        weights[name].view(-1)[survivors] = theta0[name].flatten()[survivors[order]]
    return weights, masks


@register("original signs, new magnitudes", "#ca9161", ">", late=False, controls="weights", seed=7,
          question="Are the signs enough?", kind="enough")
def signs(theta0: Weights, masks: Masks, random: torch.Generator, **_) -> tuple[Weights, Masks]:
    """Fresh magnitudes with the signs of the original initial weights (Zhou et al. 2019, arXiv:1905.01067)."""
    return masked({name: tensor.abs() * theta0[name].sign() for name, tensor in initial_weights(random).items()},
                  masks), masks


@register("trained on, not rewound (longer)", "black", "X", controls="weights", kind="no loss",
          question="Does rewinding lose nothing against training on? (These networks have trained longer.)")
def finetune(trained: Weights, masks: Masks, **_) -> tuple[Weights, Masks]:
    """The survivors keep the weights that the level before trained: these networks have trained longer."""
    return masked(trained, masks), masks


@register("shuffled connections", "#029e73", "^", controls="mask", seed=2,
          question="Do the connections matter, beyond their number per layer?")
def shuffle(theta0: Weights, masks: Masks, random: torch.Generator, **_) -> tuple[Weights, Masks]:
    """The original initial weights on connections chosen at random, as many in each layer as the ticket has."""
    masks = {name: mask.flatten()[torch.randperm(mask.numel(), generator=random)].reshape(mask.shape)
             for name, mask in masks.items()}
    return masked(theta0, masks), masks


@register("pruned in one shot", "#d55e00", "D", controls="mask", question="Is pruning round after round needed?")
def oneshot(theta0: Weights, masks: Masks, dense: Weights, **_) -> tuple[Weights, Masks]:
    """The original initial weights on the trained dense network's largest, as many in each layer as the ticket has."""
    masks = largest(dense, masks)
    return masked(theta0, masks), masks


@register("largest initial weights", "#7a5195", "*", late=False, controls="mask",
          question="Is training needed to find the mask?")
def magnitude(theta0: Weights, masks: Masks, **_) -> tuple[Weights, Masks]:
    """The largest initial weights, as many in each layer as the ticket has (Frankle et al. 2021, arXiv:2009.08576)."""
    masks = largest(theta0, masks)
    return masked(theta0, masks), masks


@register("small dense network", "#808000", "p", late=False, controls="mask", seed=8,
          question="Is a ticket better than a small dense network?")
def small(masks: Masks, random: torch.Generator, **_) -> tuple[Weights, Masks]:
    """A narrower dense network with about as many weights: the first units of layers, drawn by INIT for their sizes."""
    survivors = sum(int(mask.sum()) for mask in masks.values())
    layers = weighted_layers(build_network(MODEL, DROPOUT))
    shapes = min((narrower(layers, thousandths / 1000) for thousandths in range(1001)),
                 key=lambda shapes: abs(sum(math.prod(shape) for shape in shapes.values()) - survivors))
    blocks = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for name, (outputs, inputs, *kernel) in shapes.items():
        (blocks[name][:outputs, :inputs] if kernel else blocks[name][:inputs, :outputs]).fill_(1)
    return initial_weights(random, shapes), blocks


def narrower(layers: dict[str, nn.Linear | nn.Conv2d], scale: float) -> dict[str, tuple[int, ...]]:
    """The shapes (out, in, ...) of the layers' weights where all hidden layers are scaled down together."""
    shapes, kept = {}, 1.0                                          # share of the layer before
    for name, layer in layers.items():
        outputs, inputs, *kernel = layer.weight.shape
        fewest = 1 if kernel else 10                                # three units before ten classes: a straw man
        width = outputs if name == "output" else min(outputs, max(fewest, round(scale * outputs)))
        shapes[f"{name}.weight"], kept = (width, round(inputs * kept), *kernel), width / outputs
    return shapes


@register("ticket found elsewhere", "#cc78bc", "v", controls="mask", question="Do tickets carry over?", kind="enough")
def transfer(ticket: tuple[Weights, Masks], **_) -> tuple[Weights, Masks]:
    """Masks and initial weights of the same trial and level from the file TICKETS_FROM."""
    return rewind(*ticket)


def largest(weights: Weights, masks: Masks) -> Masks:
    """Masks of the weights of largest magnitude, as many in each layer as the given masks keep."""
    return {name: remove_smallest(weights[name], torch.ones_like(mask), int((mask == 0).sum()))
            for name, mask in masks.items()}


# ---- Training --------------------------------------------------------------------------------------------------------

def train(weights: Weights, masks: Masks, data: Dataset, networks: list[tuple[str, int]], level: int,
          bar: tqdm) -> tuple[Weights, Weights, list[tuple]]:
    """Train a stack of networks (arm, trial), arm after arm of the same trials, which see the same batches.

    Networks that start at REWIND_STEP take the remaining steps only, with the batches of these steps. Pruned weights
    stay exactly zero: they start so, their gradient is masked before it is clipped, and in a fresh AdamW zero gradients
    leave zero moments, which decoupled decay leaves alone.
    Returns the weights at REWIND_STEP, the trained weights, and for each evaluation, the first one before any step,
    (step, train_loss, val_loss, val_accuracy, test_accuracy), all but the step (nets,) on the CPU; train_loss is the
    mean over the batches since the evaluation before. Raises UserError where a loss is not finite.
    """
    network, (images, labels), device = build_network(MODEL, DROPOUT), data["train"], data["train"][0].device
    trials = list(dict.fromkeys(trial for _, trial in networks))
    masks = {name: mask.to(device) for name, mask in masks.items()}
    parameters = torch.cat([tensor.flatten(1) for tensor in weights.values()], 1).to(device)        # (nets, numbers)
    weights = {name: view.requires_grad_() for name, view in as_views(parameters, weights).items()}
    # AdamW gets one tensor per network: its kernels round otherwise at a tensor's end than within, and so a network's
    # last bits would depend on how many others are in the stack.
    rows, gradient_rows = parameters.unbind(), torch.zeros_like(parameters)
    for row, gradient in zip(rows, gradient_rows, strict=True):
        row.grad = gradient
    gradients = as_views(gradient_rows, weights)
    optimizer = torch.optim.AdamW(rows, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True,
                                  capturable=device.type == "cuda")
    order, dropout = batches(len(images), trials, level, device), generator("dropout", level=level, device=device)
    factors = dropout_factors(network, BATCH_SIZE, device)
    batch = torch.empty(len(trials), BATCH_SIZE, dtype=torch.int64, device=device)       # numbers of images
    train_loss, since, evaluations = torch.zeros(len(networks), device=device), 0, []

    def train_step() -> None:
        x = images.index_select(0, batch.flatten()).unflatten(0, batch.shape)           # faster than images[batch]
        y = labels[batch].repeat(len(networks) // len(trials), 1)                       # (nets, batch)
        loss = losses(forward(network, weights, x, factors), y)                         # (nets,)
        # The gradient of the sum: every network gets just its own, unscaled.
        for name, gradient in zip(weights, torch.autograd.grad(loss.sum(), list(weights.values())), strict=True):
            torch.mul(gradient, masks.get(name, 1), out=gradients[name])
        if CLIP_NORM is not None:
            clip_per_network(gradient_rows, CLIP_NORM)
        optimizer.step()
        train_loss.add_(loss.detach())

    def evaluate_all(step: int) -> None:
        val_loss, val_accuracy = evaluate(network, weights, *data["validation"])
        _, test_accuracy = evaluate(network, weights, *data["test"])
        measures = train_loss / since, val_loss, val_accuracy, test_accuracy            # before the first step 0 / 0
        evaluations.append((step, *(measure.cpu() for measure in measures)))
        check_finite(train_loss + val_loss, networks, level, step)

    begin, end, run = first_step(networks[0][0]), EPOCHS * steps_per_epoch(), train_step
    early = {name: tensor.detach().clone() for name, tensor in weights.items()}
    evaluate_all(begin)
    for step in range(1, end + 1):
        batch.copy_(next(order))
        for factor in factors:
            factor.bernoulli_(1 - DROPOUT, generator=dropout).div_(1 - DROPOUT)         # the mean stays
        if step <= begin:                                           # taken before, by the dense network
            continue
        if step == begin + 4:                                       # three steps have warmed the libraries up
            run = captured(train_step, device)
        run()
        since += 1
        if step == REWIND_STEP:
            early = {name: tensor.detach().clone() for name, tensor in weights.items()}
        if step % EVAL_EVERY == 0 or step == end:
            evaluate_all(step)
            train_loss.zero_()
            since = 0
        bar.update(len(networks))
    return early, {name: tensor.detach() for name, tensor in weights.items()}, evaluations


def steps_per_epoch() -> int:
    """Whole batches in an epoch: each epoch's order leaves out another remainder of the training images."""
    return (60_000 - VALIDATION_SIZE) // BATCH_SIZE


def batches(images: int, trials: list[int], level: int, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of image numbers (trials, batch): an order of its own for every trial, level and epoch."""
    orders = [generator("order", trial, level) for trial in trials]
    while True:
        epoch = torch.stack([torch.randperm(images, generator=order) for order in orders])
        epoch = epoch.to(device, non_blocking=device.type == "cuda")                    # the GPU works on meanwhile
        yield from epoch[:, :images - images % BATCH_SIZE].split(BATCH_SIZE, dim=1)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each network's mean cross-entropy, (nets,), from logits (nets, batch, 10) and labels (nets, batch)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def clip_per_network(gradients: Tensor, max_norm: float) -> None:
    """`clip_grad_norm_` for each row of gradients (nets, parameters) alone, in place.

    A norm over the whole stack would let one network's large gradient scale down all the others'.
    """
    norms = gradients.norm(dim=1, keepdim=True)
    gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1))


@torch.no_grad()
def evaluate(network: nn.Sequential, weights: Weights, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy in percent, both (nets,), of every network on all of the images."""
    loss, correct = torch.zeros(2, nets := len(weights["output.bias"]), device=images.device)
    for x, y in zip(images.split(1_000), labels.split(1_000), strict=True):
        logits, y = forward(network, weights, x.unsqueeze(0)), y.expand(nets, -1)
        loss += losses(logits, y) * y.shape[1]
        correct += (logits.argmax(2) == y).sum(1)
    return loss / len(images), 100 * correct / len(images)


# ---- Networks: the stack holds many networks side by side, and one matrix product serves them all --------------------

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


def initial_weights(random: torch.Generator, shapes: dict[str, tuple[int, ...]] | None = None) -> Weights:
    """One network's weights drawn by INIT, biases zero. With a narrower one's shapes these are drawn, the rest is zero.

    Linear weights are (in, out), biases (1, out): PyTorch's (out, in) would cost a third more time, in transposes.
    """
    weights = {}
    for name, layer in weighted_layers(build_network(MODEL, DROPOUT)).items():
        weight = torch.zeros_like(layer.weight, requires_grad=False)
        drawn = torch.empty(shapes[f"{name}.weight"] if shapes else weight.shape)
        weight[:len(drawn), :drawn.shape[1]] = getattr(nn.init, INIT + "_")(drawn, generator=random)
        linear = isinstance(layer, nn.Linear)
        weights[f"{name}.weight"] = weight.T.contiguous() if linear else weight
        weights[f"{name}.bias"] = torch.zeros(1, layer.out_features) if linear else torch.zeros(layer.out_channels)
    return weights


def forward(network: nn.Sequential, weights: Weights, images: Tensor, dropout: Iterable[Tensor] = ()) -> Tensor:
    """Logits (nets, batch, 10) of a stack's networks, from images (sets, batch, 1, 28, 28).

    The networks are a multiple of the sets, arm after arm: network n sees the images of set n % sets. With factors
    (batch, units), one for each dropout layer, units are dropped; without any, as when evaluating, none. Which layers
    it serves is found out by `check_network`.
    """
    layers, dropout = list(network.named_children()), iter(dropout)
    nets, sets = len(weights["output.bias"]), len(images)
    flatten = next(place for place, (_, layer) in enumerate(layers) if isinstance(layer, nn.Flatten))
    x = images.flatten(2).unsqueeze(0)                                                  # (1, sets, batch, 784)
    if flatten > 0:                                                                     # (arms, sets, batch, units)
        x = torch.stack([convolve(layers[:flatten], {name: tensor.unflatten(0, (-1, sets))[:, n]
                                                     for name, tensor in weights.items()}, images[n])
                         for n in range(sets)], dim=1)
    x = x.expand(nets // sets, -1, -1, -1).flatten(0, 1)                                # (nets, batch, units)
    for name, layer in layers[flatten + 1:]:
        if isinstance(layer, nn.Linear):
            operands = weights[f"{name}.bias"], x, weights[f"{name}.weight"]
            if nets > 1:
                x = torch.baddbmm(*operands)
            else:                                   # a lone product would be rounded otherwise: it gets a twin
                x = torch.baddbmm(*(tensor.expand(2, -1, -1) for tensor in operands))[:1]
        elif isinstance(layer, nn.Dropout):
            factor = next(dropout, None)
            x = x if factor is None else x * factor
        else:
            x = layer(x)                                                                # ReLU
    return x


def convolve(layers: list[tuple[str, nn.Module]], weights: Weights, x: Tensor) -> Tensor:
    """What the layers before nn.Flatten make of images (batch, 1, 28, 28), (arms, batch, units).

    All arms see the same images, so their kernels (arms, out, in, height, width) go into one convolution, with a group
    per arm from the second on. In channels-last memory this takes half the time of arm after arm. One channel is in
    both layouts; oneDNN takes the fast path only if the strides say so.
    """
    x, groups = x.as_strided(x.shape, (784, 1, 28, 1), x.storage_offset()), 1
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d):
            kernels, bias = weights[f"{name}.weight"].flatten(0, 1), weights[f"{name}.bias"].flatten()
            x = F.conv2d(x, kernels, bias, layer.stride, layer.padding, layer.dilation, groups)
            groups = len(weights[f"{name}.weight"])
        else:
            x = layer(x)                                                                # ReLU and pooling
    return x.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)


def dropout_factors(network: nn.Sequential, images: int, device: torch.device) -> list[Tensor]:
    """Room for the factors (images, units) of each dropout layer, if any: one draw serves the whole stack.

    Drawn for each network they would cost as much as a product, and a trial depend on how many others there are.
    """
    units, factors = 0, []
    for layer in network:
        units = getattr(layer, "out_features", units)
        if isinstance(layer, nn.Dropout) and DROPOUT:
            factors.append(torch.empty(images, units, device=device))
    return factors


# ---- Measures and claims: from the records of metrics.csv and nothing else -------------------------------------------

# What is claimed of the first arm against the second, where (percent of the weights), and the paper's own figure
CLAIMS = (
    ("The ticket stops earlier than the dense network", "rewind", "dense", "stop_step", 21.1, "38 % earlier"),
    ("The ticket is more accurate than the dense network", "rewind", "dense", "better", 13.5, "more than 0.3 points"),
    ("The ticket is as accurate as the dense network", "rewind", "dense", "matching", 3.6, "back to dense"),
    ("Re-initialised networks are less accurate than the dense ones", "dense", "reinit", "better", 21.1, "from here"),
    ("Re-initialised networks stop later than the ticket", "rewind", "reinit", "stop_step", 21.1, "2.51 times"),
    ("Re-initialised networks are less accurate than the ticket", "rewind", "reinit", "better", 21.1, "0.5 points"),
    ("Networks pruned in one shot are less accurate than the ticket", "rewind", "oneshot", "better", 7.0, "(curves)"),
    ("Shuffled masks are less accurate than the ticket", "rewind", "shuffle", "better", 21.1, "(curves)"),
    ("Re-initialised networks come to the dense network's final validation accuracy later than the ticket",
     "rewind", "reinit", "catch_up_step", 21.1, "(our own claim)"))


def measure(records: pd.DataFrame) -> pd.DataFrame:
    """A row per network, by arm, level and trial, from a row per evaluation.

    weights_remaining, start_accuracy (test accuracy before the first step: a supermask's), and of the later evaluations
    final_accuracy (after the last step), stop_accuracy and stop_step (at early stop, the lowest validation loss), and
    catch_up_step (the first with the validation accuracy that the trial's dense network ends at). An early stop in the
    last 5 % of the training or at one of its last two evaluations counts as not reached. Where stop_step_reached or
    catch_up_step_reached is false, the step is a lower bound. Accuracies are whole ten-thousandths of a percent: equal
    counts of right images are equal numbers.
    """
    network, accuracies = ["arm", "level", "trial"], ["val_accuracy", "test_accuracy"]
    records = records.assign(**(1e4 * records[accuracies]).round().astype("int64")).reset_index(drop=True)
    start = records[records["train_loss"].isna()].set_index(network)
    records = records[records["train_loss"].notna()]
    last = records.loc[records.groupby(network)["step"].idxmax()].set_index(network)
    stop = records.loc[records.groupby(network)["val_loss"].idxmin()].set_index(network)
    end, too_late = records["step"].max(), records["step"].drop_duplicates().nlargest(2).min()
    good = records[records["val_accuracy"] >= records["trial"].map(last.loc[("dense", 0), "val_accuracy"])]
    catch_up = good.groupby(network)["step"].min().reindex(last.index)
    return pd.DataFrame({
        "weights_remaining": last["weights_remaining"], "start_accuracy": start["test_accuracy"],
        "final_accuracy": last["test_accuracy"], "stop_accuracy": stop["test_accuracy"],
        "stop_step": stop["step"], "stop_step_reached": stop["step"] < min(0.95 * end, too_late),
        "catch_up_step": catch_up.fillna(end), "catch_up_step_reached": catch_up.notna()}).sort_index()


def trials_in_words(networks: pd.DataFrame) -> str:
    """How many trials, as a title says it."""
    trials = networks.index.unique("trial").size
    return f"{trials} trial{'s' * (trials > 1)}"


def arms_of(networks: pd.DataFrame) -> list[str]:
    """The arms of a run, rewind first."""
    return [arm for arm in REGISTRY if arm in networks.index.unique("arm") and arm != "dense"]


def by_level(networks: pd.DataFrame, column: str, arm: str) -> np.ndarray:
    """A column of an arm, (levels, trials); level 0, the dense networks, is where every arm starts."""
    return networks.loc[[*{"dense", arm}], column].unstack("trial").sort_index(level="level").to_numpy()


def remaining(networks: pd.DataFrame) -> np.ndarray:
    """Percent of weights remaining at each level, (levels,)."""
    return by_level(networks, "weights_remaining", (arms_of(networks) or ["dense"])[0])[:, 0]


def levels_near(networks: pd.DataFrame, *percents: float) -> list[int]:
    """The levels nearest to so many percent of weights remaining, each once; never level 0 where there are others."""
    pruned = remaining(networks)[1:]
    return sorted({1 + int(np.abs(np.log(pruned / percent)).argmin()) for percent in percents}) if len(pruned) else [0]


def leads(networks: pd.DataFrame, one: str, other: str) -> np.ndarray:
    """How many points one arm is ahead of another in test accuracy at early stop, trial by trial, (levels, trials)."""
    one, other = (by_level(networks, "stop_accuracy", arm)[:1 if arm == "dense" else None] for arm in (one, other))
    return (one - other) / 1e4                              # whole numbers are subtracted: ties stay ties


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences (trials,), and half its 95 % interval by Student's t; with one trial nan."""
    n = len(differences)
    return differences.mean(), stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / n**0.5 if n > 1 else math.nan


def decide(differences: np.ndarray, margin: float = 0) -> str:
    """Is the true mean of paired differences (trials,) above -margin: "yes", "no", "undecided" or "not tested"?

    Yes if the whole 95 % interval is, no if the whole of it lies below 0. Without a spread it decides nothing.
    """
    if len(differences) < 3:
        return "not tested"
    mean, half = interval(differences)
    if np.ptp(differences) == 0:
        return "undecided"
    return "yes" if mean - half > -margin else "no" if mean + half < 0 else "undecided"


def decide_moments(steps: np.ndarray, reached: np.ndarray) -> str:
    """Does the first of two moments come sooner? Of both: steps and whether they were reached, (2, trials).

    Decided by the steps' differences where all were reached. Else nothing is imputed: a one-sided binomial test at 5 %
    on the trials, in which ties, and pairs of which neither was reached, count for neither side and stay in n.
    """
    if reached.all() or reached.shape[1] < 3:
        return decide(steps[1] - steps[0])
    sooner, later = (stats.binomtest(count, reached.shape[1], alternative="greater").pvalue <= 0.05
                     for count in count_sooner(steps, reached))
    return "yes" if sooner else "no" if later else "undecided"


def count_sooner(steps: np.ndarray, reached: np.ndarray) -> tuple[int, int]:
    """In how many trials the first, and in how many the second of two moments, both (2, trials), comes sooner."""
    first, second = np.where(reached, steps, np.inf)
    return int((first < second).sum()), int((second < first).sum())


def matching(networks: pd.DataFrame, arm: str) -> list[str]:
    """Level by level whether an arm "matches" the dense networks, is "below" them, or is "undecided" or "not tested".

    It matches if the whole interval of its lead lies above -MATCHING_MARGIN points: a test of non-inferiority.
    """
    answers = (decide(lead, MATCHING_MARGIN) for lead in leads(networks, arm, "dense")[1:])
    return [{"yes": "matches", "no": "below"}.get(answer, answer) for answer in answers]


def headline(answers: list[str]) -> tuple[int | None, int | None]:
    """The last place that "matches", and where the closing run of "below" begins; None where there is none."""
    others = [place for place, answer in enumerate(answers) if answer != "below"]
    matches, below = [place for place in others if answers[place] == "matches"], max(others, default=-1) + 1
    return (matches[-1] if matches else None), (below if below < len(answers) else None)


def verdict(networks: pd.DataFrame) -> list[str]:
    """The answer in plain words: sentences."""
    dense, percents = by_level(networks, "stop_accuracy", "dense")[0] / 1e4, remaining(networks)
    sentences = [f"Dense networks reach {dense.mean():.2f} % test accuracy at early stop (mean of "
                 f"{trials_in_words(networks)}, {dense.min():.2f} to {dense.max():.2f})."]
    (level,) = levels_near(networks, 21.1)
    for arm in arms_of(networks):
        label = REGISTRY[arm].label
        matches, below = headline(matching(networks, arm))
        if arm in ("rewind", "reinit") and dense.size >= 3:
            sentences.append(f"Networks {label} match the dense ones " + ("at no level" if matches is None else
                             f"down to {percents[1 + matches]:.1f} % of the weights")
                             + f" and are below them from {percents[1 + (below or 0)]:.1f} % on" * (below is not None)
                             + ".")
        if arm != "rewind":
            sentences.append(f"At {percents[level]:.1f} % of the weights, rewound tickets minus {arm} ({label}): "
                             f"{lead_in_words(networks, arm, level)}.")
    return sentences + ["Fewer than three trials decide nothing."] * (dense.size < 3 and len(percents) > 1)


def points(differences: np.ndarray) -> str:
    """Mean and half the 95 % interval of differences (trials,), in words."""
    return "{:+.2f} ± {:.2f} points".format(*interval(differences)).replace("± nan ", "")


def lead_in_words(networks: pd.DataFrame, arm: str, level: int) -> str:
    """The ticket's lead over an arm; none where the arm keeps more than 1.1 times the ticket's weights."""
    ticket, other = (by_level(networks, "weights_remaining", name)[level, 0] for name in ("rewind", arm))
    return (f"not compared, it has {other:.1f} % of the weights" if other > 1.1 * ticket else
            points(leads(networks, "rewind", arm)[level]))


def claims(networks: pd.DataFrame) -> list[list[str]]:
    """The claims, decided: cells of claim, weights remaining, n, the paper's figure, ours, and answer."""
    lines, there = [], {"dense", *arms_of(networks)}
    for claim, one, other, kind, percent, paper in CLAIMS:
        (level,) = levels_near(networks, percent)
        left, missing = remaining(networks)[level], [arm for arm in ("rewind", one, other) if arm not in there]
        if missing or abs(math.log(left / percent)) > math.log(1.25):
            why = f"no {missing[0]} networks" if missing else f"no level near {percent} %"
            lines.append([claim, "", "", paper, "", f"not tested: {why}"])
            continue
        if kind in ("better", "matching"):
            lead = leads(networks, one, other)[level]
            ours, answer = points(lead), decide(lead, MATCHING_MARGIN if kind == "matching" else 0)
        else:
            steps, reached = (np.stack([by_level(networks, column, arm)[level if arm != "dense" else 0]
                                        for arm in (one, other)]) for column in (kind, f"{kind}_reached"))
            ours, answer = compare_moments(steps, reached, other == "dense"), decide_moments(steps, reached)
        words = {"yes": "borne out", "no": "contradicted", "not tested": "not tested: fewer than three trials"}
        trials = len(networks.index.unique("trial"))
        lines.append([claim, f"{left:.1f} %", f"{trials}", paper, ours, words.get(answer, answer)])
    return lines


def compare_moments(steps: np.ndarray, reached: np.ndarray, in_percent: bool) -> str:
    """How much sooner the first of two moments comes, both (2, trials), in words."""
    if reached.all():
        (first, second), bound = steps.mean(1), ""
        text = "{:.0f} ± {:.0f} steps sooner".format(*interval(steps[1] - steps[0])).replace("± nan ", "")
    else:
        (first, second), shown = np.median(steps, 1), [median_step(*both) for both in zip(steps, reached, strict=True)]
        text = f"sooner in {count_sooner(steps, reached)[0]} of {len(steps[0])}, medians {shown[0]} and {shown[1]}"
        if "≥" in shown[0]:                                 # a bound in the denominator gives no ratio
            return text
        bound = "≥ " * ("≥" in shown[1])
    if in_percent and first <= second:
        return f"{text}, {bound}{100 * (1 - first / second):.0f} % earlier"
    return f"{text}, {bound}{math.floor(100 * second / first) / 100 if bound else second / first:.2f} times"


def median_step(steps: np.ndarray, reached: np.ndarray) -> str:
    """The median of steps (trials,), with "≥" where it falls on one that was not reached."""
    return "≥ " * bool(np.isinf(np.median(np.where(reached, steps, np.inf)))) + f"{np.median(steps):.0f}"


def questions(networks: pd.DataFrame, levels: list[int]) -> list[list[str]]:
    """A row per arm: its question, and at some levels the ticket's lead over it, and the answer."""
    lines = []
    for arm in arms_of(networks)[1:]:
        label, question, kind = REGISTRY[arm].label, REGISTRY[arm].question, REGISTRY[arm].kind
        ahead, margin = leads(networks, "rewind", arm), MATCHING_MARGIN if kind != "difference" else 0
        cells = [lead_in_words(networks, arm, level) for level in levels]
        answers = [decide(-ahead[level] if kind == "enough" else ahead[level], margin) for level in levels]
        lines.append([question, f"{arm} ({label})", *(cell if cell.startswith("not") else f"{cell}: {answer}"
                                                      for cell, answer in zip(cells, answers, strict=True))])
    return lines


# ---- Figures ---------------------------------------------------------------------------------------------------------

MODELS = {"mlp": "LeNet-300-100", "lenet": "LeNet-5"}
STYLE = sns.axes_style("whitegrid") | sns.plotting_context("notebook", font_scale=1.2)


def draw_figures(records: pd.DataFrame, networks: pd.DataFrame, first_layer: Tensor) -> dict[str, Figure]:
    """Every figure that the run's arms, levels and moments give, by file name.

    `first_layer`: the level at which each of its weights was pruned, by trial.
    """
    arms, dense = arms_of(networks), networks.loc["dense", "stop_accuracy"].mean() / 1e4
    title = f"Lottery tickets on {records['dataset'][0]}, {MODELS[records['model'][0]]}, {trials_in_words(networks)}"
    stop = "stop_accuracy", "test accuracy at early stop (%)", dense, f"dense network ({dense:.2f} %)"
    start = "start_accuracy", "test accuracy before the first step (%)", 10, "chance (10 %)"
    figures = {"learning_curves.png": learning_curves(records, networks, title)}
    if arms:
        figures["accuracy_plot_iterative.png"] = accuracy_plot(networks, ["rewind"], title, *stop)
        figures["comparison_plot.png"] = accuracy_plot(networks, arms, title, *stop)
        untrained = [arm for arm in arms if arm != "finetune"]
        figures["supermask_plot.png"] = accuracy_plot(networks, untrained, title, *start)
        figures["mask_plot.png"] = mask_plot(networks, first_layer, title)
    if "reinit" in arms:
        figures["accuracy_plot_reinit.png"] = accuracy_plot(networks, ["reinit"], title, *stop)
    if "transfer" in arms:
        figures["transfer_plot.png"] = transfer_plot(networks, title, *stop)
    reached = networks.drop("dense").groupby(["arm", "level"])[[f"{column}_reached" for column in MOMENTS]].mean() > 0.5
    panels = {column: words for column, words in MOMENTS.items() if reached[f"{column}_reached"].any()}
    if panels:
        figures["early_stopping_plot.png"] = early_stopping_plot(records, networks, panels, title)
    return figures


def new_figure(title: str, panels: Iterable[str], size: tuple[float, float], sharey: bool = True) -> tuple:
    """A figure with a title and a row of axes with theirs, each of a size (width, height in inches).

    It is made apart from pyplot: a notebook's own figures stay as they are.
    """
    panels = list(panels)
    figure = Figure(figsize=(1.2 + len(panels) * size[0], size[1]), layout="constrained")
    figure.suptitle(title)
    row = figure.subplots(1, len(panels), squeeze=False, sharey=sharey)[0]
    for axes, words in zip(row, panels, strict=True):
        axes.set_title(words)
    return figure, row


def scale_weights_remaining(axes, networks: pd.DataFrame) -> None:
    """Log axis of the weights remaining, from 100 % on the left to the sparsest level."""
    sparsest = networks["weights_remaining"].min()
    ticks = [tick for tick in (100, 50, 20, 10, 5, 3, 2, 1, 0.5, 0.2, 0.1) if round(sparsest, 1) <= tick]
    axes.set(xscale="log", xlim=(108, sparsest / 1.08), xlabel="weights remaining (%)")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def drawn_as(arm: str) -> dict:
    """How an arm is drawn in every figure; the two main arms are the boldest."""
    description, main = REGISTRY[arm], arm in ("rewind", "reinit")
    return {"color": description.colour, "marker": description.marker, "label": description.label,
            "linewidth": 2.6 if main else 1.6, "markersize": 8, "zorder": 3 if main else 2.5}


def accuracy_panel(axes, networks: pd.DataFrame, arms: list[str], column: str, ylabel: str, line: float, words: str,
                   labels: dict[str, str] | None = None) -> None:
    """An accuracy versus weights remaining of some arms, and a line at one accuracy.

    Curves are means over the trials, the bands of the two main arms go from the lowest to the highest. The scale has
    room for the main arms whether they are drawn or not, so that figures of one of them can be compared.
    """
    axes.axhline(line, color=REGISTRY["dense"].colour, linestyle="--", label=words)
    for arm in arms:
        drawn = pd.concat([networks.loc["dense"], networks.loc[arm]])                   # every arm starts from dense
        sns.lineplot(x=drawn["weights_remaining"], y=drawn[column] / 1e4, ax=axes, legend=False,
                     errorbar=("pi", 100) if arm in ("rewind", "reinit") else None,
                     **drawn_as(arm) | ({"label": labels[arm]} if labels else {}))
    scale_weights_remaining(axes, networks)
    main = networks[networks.index.get_level_values("arm").isin(["dense", "rewind", "reinit"])]
    accuracy = pd.concat([main[column], networks.loc[arms, column].groupby(["arm", "level"]).mean()]) / 1e4
    margin = 0.05 * np.ptp(accuracy) + 0.01
    axes.set(ylim=(accuracy.min() - margin, accuracy.max() + margin), ylabel=ylabel)
    if len(arms) > 4:                                                                   # they would hide curves
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    else:
        axes.legend(loc="best")


def accuracy_plot(networks: pd.DataFrame, arms: list[str], title: str, *what) -> Figure:
    """An accuracy versus weights remaining; beyond four arms, controls of the weights and of the mask apart."""
    main = ("rewind", "reinit")
    parts = {"": arms} if len(arms) <= 4 else {
        f"Controls of the {part}": [arm for arm in arms if arm in main or REGISTRY[arm].controls in (part, "both")]
        for part in ("weights", "mask")}
    words = "lines: means over the trials; bands: lowest to highest"
    figure, row = new_figure(f"{title}\n{words}", parts, (7.4, 6 if len(parts) == 1 else 7.4), sharey=False)
    for axes, shown in zip(row, parts.values(), strict=True):
        accuracy_panel(axes, networks, shown, *what)
    return figure


def transfer_plot(networks: pd.DataFrame, title: str, *what) -> Figure:
    """Do tickets found on another dataset train as well as those found here? Accuracies, and paired differences."""
    figure, (left, right) = new_figure(title, ("mean over trials", "paired difference, mean and 95 % interval"),
                                       (7, 5.6), sharey=False)
    here, there = "ticket found here", REGISTRY["transfer"].label
    labels = {"rewind": here, "transfer": there, "reinit": "mask found here, new weights"}
    labels = {arm: label for arm, label in labels.items() if arm in arms_of(networks)}
    accuracy_panel(left, networks, list(labels), *what, labels)
    right.axhline(0, color=REGISTRY["dense"].colour, linestyle="--")
    for arm in [arm for arm in labels if arm != "transfer"]:
        mean, half = np.transpose([interval(lead) for lead in leads(networks, "transfer", arm)])
        right.plot(remaining(networks), mean, **drawn_as(arm) | {"label": f"minus {labels[arm]}"})
        right.fill_between(remaining(networks), mean - half, mean + half, color=REGISTRY[arm].colour, alpha=0.2)
    scale_weights_remaining(right, networks)
    right.set(ylabel=f"{there}: lead (points)")
    right.legend(loc="best")
    return figure


MOMENTS = {"stop_step": "early stop: lowest validation loss",
           "catch_up_step": "first step at the dense network's final validation accuracy"}


def early_stopping_plot(records: pd.DataFrame, networks: pd.DataFrame, panels: dict[str, str], title: str) -> Figure:
    """When the networks stop improving, and when they are as good as the dense ones end: medians over trials."""
    words = "medians; no mark where most trials did not get there"
    figure, row = new_figure(f"{title}\n{words}", panels.values(), (7.4, 6.6))
    last = records["step"].max()
    for axes, column in zip(row, panels, strict=True):
        axes.axhline(last, color=REGISTRY["dense"].colour, linestyle=":", label=f"end of training ({last} steps)")
        for arm in arms_of(networks):
            drawn = pd.concat([networks.loc["dense"], networks.loc[arm]])
            steps = drawn[column].where(drawn[f"{column}_reached"], np.inf).groupby(drawn["weights_remaining"]).median()
            axes.plot(steps.mask(np.isinf(steps)), **drawn_as(arm))
        scale_weights_remaining(axes, networks)
        axes.set(ylim=(0, 1.06 * last), ylabel="training step")
    # Below the panels: within them, no place is free in every run.
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(panels))
    return figure


def shown_levels(networks: pd.DataFrame) -> dict[int, str]:
    """The levels that have a panel each, and what it is called."""
    return {level: f"{remaining(networks)[level]:.1f} % of the weights"
            for level in levels_near(networks, 51.3, 21.1, 7.0, 3.6)}


def learning_curves(records: pd.DataFrame, networks: pd.DataFrame, title: str) -> Figure:
    """Test accuracy while training, at a few sparsities, the dense networks dashed."""
    arms, levels = arms_of(networks), shown_levels(networks)
    figure, row = new_figure(title, levels.values(), (max(3.8, 7.4 / len(levels)), 5.6))
    for level, axes in zip(levels, row, strict=True):
        for arm, at in {"dense": 0, **dict.fromkeys(arms, level)}.items():
            drawn = records[(records["arm"] == arm) & (records["level"] == at)]
            sns.lineplot(drawn, x="step", y="test_accuracy", ax=axes, legend=False,
                         errorbar=("pi", 100) if arm in ("rewind", "reinit") else None, linestyle="-" if at else "--",
                         markevery=1 + drawn["step"].nunique() // 12, **drawn_as(arm))
        axes.set(xlabel="training step", ylabel="test accuracy (%)")
    # The first twentieth of the training may lie below the axis: the rest would be squeezed into a line.
    shown = records[records["level"].isin([0, *levels]) & (records["step"] > records["step"].max() / 20)]
    shown = shown.groupby(["arm", "level", "step"])["test_accuracy"].mean()
    row[0].set_ylim(shown.quantile(0.03) - 0.5, shown.max() + 0.5)                  # one weak control may leave, too
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=max(2, len(levels)))
    return figure


def mask_plot(networks: pd.DataFrame, pruned_at: Tensor, title: str) -> Figure:
    """Share of the first layer's weights that survive at each place of its input, a pixel or a place of the kernel.

    pruned_at: (trials, pixels, outputs), or of a convolution (trials, outputs, inputs, height, width).
    """
    pruned_at = pruned_at if pruned_at.ndim == 3 else pruned_at.flatten(3).flatten(1, 2).mT
    levels, side = shown_levels(networks), math.isqrt(pruned_at.shape[1])
    words = "first layer, each panel with its own scale"
    figure, row = new_figure(f"{title}\n{words}\n", levels.values(), (3.8, 6.2))
    for level, axes in zip(levels, row, strict=True):
        share = 100 * masks_at({"first": pruned_at}, level)["first"].mean((0, 2)).view(side, side).numpy()
        image = axes.imshow(share, cmap="rocket", vmin=0)
        figure.colorbar(image, ax=axes, location="bottom", label="weights left (%)")
        axes.set(xlabel="column", ylabel="row", xticks=[], yticks=[])
    return figure


# ======================================================================================================================
# Machinery: nothing below changes a number
# ======================================================================================================================

STACK_SIZE = 20                       # networks that train together on a CPU


class UserError(ValueError):
    """One sentence on what the user can set right; as a program, the script prints it and ends with exit code 2."""


# ---- Tensors of many networks ----------------------------------------------------------------------------------------

def stack(networks: list[Weights]) -> Weights:
    """Single networks' tensors, stacked along a new leading nets dimension."""
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def pick(tensors: Weights, n: int) -> Weights:
    """The tensors of a stack's n-th network, without the nets dimension."""
    return {name: tensor[n] for name, tensor in tensors.items()}


def as_views(rows: Tensor, shapes: Weights) -> Weights:
    """Parts of rows (nets, numbers) under the names and in the shapes of a stack's tensors; they share the memory."""
    parts = rows.split([tensor[0].numel() for tensor in shapes.values()], 1)
    return {name: part.view(tensor.shape) for part, (name, tensor) in zip(parts, shapes.items(), strict=True)}


def as_plain_network(network: nn.Sequential, weights: Weights) -> nn.Sequential:
    """A plain network with a single network's weights put in, on the CPU. Raises RuntimeError where they do not fit."""
    plain = {name: tensor.flatten() if name.endswith(".bias") else tensor.T if tensor.ndim == 2 else tensor
             for name, tensor in weights.items()}
    network.load_state_dict({name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                             for name, tensor in plain.items()}, assign=True)
    return network


def check_network(network: nn.Sequential) -> None:
    """Raise UserError unless `forward` computes, for two networks at once, just what the plain network does."""
    try:
        weights = stack([initial_weights(generator("init", trial)) for trial in (0, 1)])
        images = torch.rand(1, 3, 1, 28, 28, generator=generator("order"))
        kept = [factor.fill_(1) for factor in dropout_factors(network, 3, images.device)]
        expected = torch.stack([as_plain_network(network.eval(), pick(weights, n))(images[0]) for n in (0, 1)])
        torch.testing.assert_close(forward(network.train(), weights, images, kept), expected, rtol=1e-3, atol=1e-3)
        sound = not any(getattr(layer, "inplace", False) or getattr(layer, "p", DROPOUT) != DROPOUT
                        for layer in network)
    except Exception:                                       # a layer that is not served can fail in any way
        sound = False
    if not sound:
        raise UserError("the network in build_network cannot be trained in a stack: use nn.Conv2d, nn.ReLU and "
                        "nn.MaxPool2d before one nn.Flatten, and after it nn.Linear, nn.ReLU and, behind a linear "
                        "layer, nn.Dropout(dropout); with biases, no groups, nothing in place, the last one called "
                        "output.")


print_once = functools.cache(print)


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On CUDA a function that repeats all that the step does there by one launch, a CUDA graph; else the step itself.

    The step must have run before, on the same stream, must read and write the same tensors each time, and draw no
    random numbers. It does not run while it is captured: where that fails, the training goes on as it stood.
    """
    if device.type != "cuda":
        return step
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            step()
        return graph.replay
    except RuntimeError as error:
        print_once(f"CUDA graphs do not work here ({str(error).splitlines()[0]}): steps are launched one by one")
        return step


# ---- Records and progress --------------------------------------------------------------------------------------------

def record(new: dict, networks: list[tuple[str, int]], masks: Masks, early: Weights, trained: Weights,
           evaluations: list[tuple]) -> None:
    """Add to the new state what a stack gave: rows of metrics.csv, the networks to prune next, and of the dense ones
    theta, the weights to rewind to."""
    survivors = sum(mask.flatten(1).sum(1) for mask in masks.values())                  # (nets,)
    percent = 100 * survivors / sum(mask[0].numel() for mask in masks.values())
    for n, (arm, trial) in enumerate(networks):
        network = {"dataset": DATASET, "model": MODEL, "arm": arm, "trial": trial, "level": new["level"],
                   "weights_remaining": float(f"{percent[n]:.6g}")}
        new["records"] += [network | {"step": step} | {column: float(f"{measure[n]:.6g}") for column, measure in zip(
            ("train_loss", "val_loss", "val_accuracy", "test_accuracy"), measures, strict=True)}
            for step, *measures in evaluations]
        if arm in ("dense", "rewind"):
            new["trained"][trial] = {name: tensor.clone().cpu() for name, tensor in pick(trained, n).items()}
        if arm == "dense":
            new["dense"][trial] = new["trained"][trial]
            new["theta"][trial] = {name: tensor.clone().cpu() for name, tensor in pick(early, n).items()}


def records_of(state: dict) -> pd.DataFrame:
    """The rows of metrics.csv by level, arm, trial and step: stacks and processes leave them in another order."""
    arms = ["dense", *ARMS]
    return pd.DataFrame(sorted(state["records"], key=lambda row: (row["level"], arms.index(row["arm"]), row["trial"],
                                                                  row["step"])))


def check_finite(loss: Tensor, networks: list[tuple[str, int]], level: int, step: int) -> None:
    """Raise UserError where a network's loss is not finite."""
    for (arm, trial), finite in zip(networks, loss.isfinite().tolist(), strict=True):
        if not finite:
            raise UserError(f"training diverged: the loss of {arm}, trial {trial}, at level {level} was not finite by "
                            f"step {step}. Finished levels are kept; try a LEARNING_RATE below {LEARNING_RATE}.")


def progress_bar(done: int) -> tqdm:
    """A bar over all levels after the one that was done last; its unit is one step of one network. On a terminal only.

    Prints the head of the table whose lines `finish_level` prints.
    """
    steps, trials, (rank, processes) = EPOCHS * steps_per_epoch(), own_trials(), process()
    work = [len(trials) * sum(steps - first_step(arm) for arm in arms) for arms in [("dense",)] + LEVELS * [ARMS]]
    if processes > 1:
        print(f"{processes} processes share {TRIALS} trials" + ", so that some have none" * (processes > TRIALS)
              + f"; shown is the progress of the first one, with {trials}")
    print("Test accuracy at early stop, means:\nlevel   weights remaining"
          + "".join(f"{arm:>11}" for arm in (ARMS if LEVELS else ("dense",))) + "   time left", flush=True)
    visible = rank == 0 and sys.stderr.isatty()
    return tqdm(total=sum(work), initial=sum(work[:done + 1]), smoothing=0, leave=False,
                file=sys.stderr if visible else open(os.devnull, "w"),
                bar_format="{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left")


def finish_level(state: dict, new: dict, checkpoint: Path, bar: tqdm) -> None:
    """Save the new state, make it the state, and print a line."""
    with one_at_a_time(checkpoint.parent):
        write_whole(checkpoint, packed(new))
    state.update(new)                                       # at once: whatever ends the run finds whole levels
    level, networks = new["level"], measure(records_of(new)).xs(new["level"], level="level")
    shown = [networks.loc[arm if level else "dense"] for arm in (ARMS if LEVELS else ("dense",))]
    first = networks.loc["rewind" if level else "dense", "weights_remaining"].iloc[0]
    left = (bar.total - bar.n) * bar.format_dict["elapsed"] / max(1, bar.n - bar.initial)
    with tqdm.external_write_mode():
        print(f"{level:5}{first:18.1f} %" + "".join(f"{arm['stop_accuracy'].mean() / 1e4:9.2f} %" for arm in shown)
              + f"{left / 60:8.1f} min", flush=True)


# ---- Several processes -----------------------------------------------------------------------------------------------

def process() -> tuple[int, int]:
    """This process's rank, and how many processes share the run: as torchrun says, else one alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_trials() -> list[int]:
    """The trials of this process; there may be none."""
    rank, processes = process()
    return list(range(TRIALS)[rank::processes])


def gather(state: dict) -> dict:
    """On the first process, what all processes recorded and found, as one process alone would have it.

    Between processes nothing passes but this, at the end: a process that is killed and started again delays no other.
    """
    rank, processes = process()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # while it waits for the others, Python hears no signal
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))       # the slowest is waited for
    states = [None] * processes if rank == 0 else None
    torch.distributed.gather_object({key: state[key] for key in ("records", "theta", "pruned_at")}, states)
    if rank > 0:
        return state
    merged = {key: {trial: found for part in states for trial, found in part[key].items()}
              for key in ("theta", "pruned_at")}
    return state | merged | {"records": list(itertools.chain(*(part["records"] for part in states)))}


# ---- Data ------------------------------------------------------------------------------------------------------------

SHAPES = {"train-images-idx3-ubyte.gz": (60_000, 28, 28), "train-labels-idx1-ubyte.gz": (60_000,),
          "t10k-images-idx3-ubyte.gz": (10_000, 28, 28), "t10k-labels-idx1-ubyte.gz": (10_000,)}


def load_dataset(device: torch.device) -> Dataset:
    """Images (n, 1, 28, 28), normalised once as PIXELS says, and labels (n,), on the device.

    The 60,000 training images give "train" (55,000) and "validation" (5,000); "test" (10,000) is only ever reported.
    """
    source = getattr(torchvision.datasets, DATASET)         # knows the sums and where to download
    raw, md5 = beside_script(DATA_DIR) / DATASET / "raw", dict(source.resources)
    images, labels, test_images, test_labels = (read_idx(raw / name, md5[name], source.mirrors) for name in SHAPES)
    order = torch.randperm(len(images), generator=generator("split"))
    rest, held_out = order[VALIDATION_SIZE:], order[:VALIDATION_SIZE]
    splits = {"train": (images[rest], labels[rest]), "validation": (images[held_out], labels[held_out]),
              "test": (test_images, test_labels)}
    deviation, mean = torch.std_mean(splits["train"][0] / 255)
    normalise = {"standardised": lambda x: (x / 255 - mean).div_(deviation),
                 "unit_interval": lambda x: x / 255,
                 "unit_length": lambda x: F.normalize(x.float(), dim=(1, 2))}[PIXELS]
    return {name: (normalise(x).unsqueeze(1).to(device), y.long().to(device)) for name, (x, y) in splits.items()}


def read_idx(archive: Path, md5: str, mirrors: list[str]) -> Tensor:
    """The bytes in an IDX file: from its archive, or unpacked where there is no archive, or downloaded.

    The archive has a sum to be checked by, and so comes first; one that fails is downloaded again. Files are never
    unpacked, so that the folder may be read-only.
    """
    file, reasons = archive.with_suffix(""), []
    if archive.exists() or not file.exists():
        file = archive
        for mirror in mirrors if not check_integrity(archive, md5) else ():
            try:
                download_url(mirror + archive.name, str(archive.parent), md5=md5)       # compares the sum, too
                break
            except (OSError, RuntimeError) as error:
                reasons.append(str(error).strip().splitlines()[-1])
        if len(reasons) == len(mirrors):
            raise UserError(f"{archive} is {'damaged' if archive.exists() else 'missing'} and could not be downloaded "
                            f"({reasons[-1]}): put the archive with the md5 sum {md5} there, or in its place the "
                            "unpacked file, or set DATA_DIR.")
    content, shape = file.read_bytes(), SHAPES[archive.name]
    content = gzip.decompress(content) if file == archive else content
    header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()            # of unsigned bytes, and the dimensions
    body = content[len(header):]
    if not content.startswith(header) or len(body) != math.prod(shape) or ("labels" in file.name and max(body) > 9):
        raise UserError(f"{file} is damaged, or not what its name says: {len(content)} bytes instead of "
                        f"{len(header) + math.prod(shape)}, or others than it should hold. Put the right one there.")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


# ---- Files -----------------------------------------------------------------------------------------------------------

def beside_script(path: str) -> Path:
    """The path itself if absolute, else taken from the folder of this script."""
    return Path(__file__).resolve().parent / os.path.expanduser(path)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait while another process writes to the folder; a lock that even a killed process gives back."""
    with contextlib.ExitStack() as at_end:
        with contextlib.suppress(ImportError, OSError):     # on Windows, and in network folders that know no locks
            import fcntl
            at_end.callback(os.close, handle := os.open(folder, os.O_RDONLY))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under another name, then rename it: nobody ever sees half a file. With the folder locked."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())                         # on the disk before its name: power may fail, too
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def packed(tensors: dict) -> bytes:
    """What torch.save writes. It does so in memory: on a full disk it would hide the OSError behind its own error."""
    torch.save(tensors, content := io.BytesIO())
    return content.getvalue()


def read_saved(path: Path) -> dict:
    """What torch.save wrote to a file, on the CPU. Raises OSError, or where the file is damaged any of many errors."""
    content = io.BytesIO(path.read_bytes())
    if zipfile.ZipFile(content).testzip() is not None:      # torch.load itself takes flipped bits for weights
        raise zipfile.BadZipFile("wrong sum")
    content.seek(0)
    return torch.load(content, map_location="cpu", weights_only=True)


# ---- Checkpoints and tickets -----------------------------------------------------------------------------------------

@functools.cache
def script_sum() -> str:
    """The sha256 sum of this script's bytes when the run began; it may be edited meanwhile."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def checkpoint_path(device: torch.device) -> Path:
    """Where an unfinished run keeps its state: each experiment, each version of what computes it, and each process of a
    run has a file of its own."""
    settings, (rank, processes) = experiment(), process()
    if TICKETS_FROM is not None:                            # what counts is the tickets, not where they lie
        settings["TICKETS_FROM"] = hashlib.sha256(beside_script(TICKETS_FROM).read_bytes()).hexdigest()
    version = [script_sum(), torch.__version__, device.type, torch.get_num_threads()]
    first, second = (hashlib.sha256(repr(what).encode()).hexdigest()[:12] for what in (settings, version))
    share = f"-{rank + 1}-of-{processes}" if processes > 1 else ""
    return beside_script(RESULTS_DIR) / f"checkpoint-{first}-{second}{share}.pt"


def load_state(checkpoint: Path) -> dict:
    """The state of an unfinished run from its checkpoint, or of a new run; a damaged checkpoint is set aside.

    It holds the run's name, the level that was finished last, its records, and by trial the weights to rewind to
    (theta), the level at which each weight was pruned, the dense networks as trained, and those to prune next.
    """
    theta0 = {trial: initial_weights(generator("init", trial)) for trial in own_trials()}
    never = {trial: {name: torch.zeros_like(mask, dtype=torch.uint8) for name, mask in full_masks(weights).items()}
             for trial, weights in theta0.items()}
    new = {"run": checkpoint.name, "level": -1, "records": [], "theta": theta0, "pruned_at": never, "dense": {},
           "trained": {}}
    if not checkpoint.exists():
        for other in checkpoint.parent.glob(re.sub(r"^(checkpoint-\w+)-\w+", rf"\1-{'?' * 12}", checkpoint.name)):
            print(f"{other.name} is of the same experiment, but of another version of the script or of PyTorch, kind "
                  "of device or number of threads: it is not used, and this run starts afresh", flush=True)
        return new
    try:
        state = read_saved(checkpoint)
        if state.keys() != new.keys() or state["run"] != checkpoint.name:
            raise ValueError("not the state of this run")
    except OSError:
        raise
    except Exception:                                       # a damaged file can fail in any way
        aside = checkpoint.rename(checkpoint.with_suffix(f".damaged-{now()}"))
        print(f"{checkpoint} was damaged and is now called {aside.name}: this run starts afresh", flush=True)
        return new
    print(f"resuming after level {state['level']} of {LEVELS}, kept in {checkpoint}", flush=True)
    return state


def load_tickets(path: str | Path) -> dict:
    """What a tickets.pt holds: the run's constants, theta0, and for each prunable weight its level of pruning.

    Raises UserError unless it is whole, and what this script writes.
    """
    try:
        tickets = read_saved(beside_script(str(path)))
        settings, theta0, pruned_at = (tickets[name] for name in ("constants", "theta0", "pruned_at"))
        network = build_network(settings["MODEL"], settings["DROPOUT"])
        as_plain_network(network, pick(theta0, settings["TRIALS"] - 1))         # other names or shapes do not fit
        expected = {name: (mask.shape, torch.uint8) for name, mask in full_masks(theta0).items()}
        if {name: (levels.shape, levels.dtype) for name, levels in pruned_at.items()} != expected:
            raise ValueError("theta0 and pruned_at do not belong together")
        return tickets
    except Exception as error:                              # a damaged or foreign file can fail in any way
        raise UserError(f"no tickets could be read from {path} ({type(error).__name__}): "
                        "TICKETS_FROM must be the tickets.pt of a finished run.") from None


def load_ticket(path: str | Path, trial: int, level: int) -> nn.Sequential:
    """One ticket as an ordinary network at its initial weights, with `torch.nn.utils.prune` masks, ready to train.

    Raises UserError for a file that is no tickets.pt, IndexError for a trial or a level that it does not hold.
    """
    tickets = load_tickets(path)
    model, dropout, trials, levels = (tickets["constants"][name] for name in ("MODEL", "DROPOUT", "TRIALS", "LEVELS"))
    if not (0 <= trial < trials and 0 <= level <= levels):
        raise IndexError(f"{path} holds trials 0 to {trials - 1} and levels 0 to {levels}")
    network = as_plain_network(build_network(model, dropout), pick(tickets["theta0"], trial))
    masks = masks_at(pick(tickets["pruned_at"], trial), level)
    for name, layer in weighted_layers(network).items():
        mask = masks[f"{name}.weight"]
        torch_prune.custom_from_mask(layer, "weight", mask.T if isinstance(layer, nn.Linear) else mask)
    return network


def tickets_from_elsewhere() -> tuple[dict[int, dict], list[str]]:
    """By trial theta0 and pruned_at from TICKETS_FROM, if any, and lines that say what they are.

    Raises UserError unless they fit the constants, keep as many weights at each level, and lie clear of this run's own.
    """
    if TICKETS_FROM is None:
        return {}, []
    if beside_script(TICKETS_FROM).resolve().parent == beside_script(RESULTS_DIR).resolve():
        raise UserError("TICKETS_FROM lies in RESULTS_DIR, where this run's own go: choose another RESULTS_DIR.")
    tickets = load_tickets(TICKETS_FROM)
    held = tickets["constants"]
    for name in ("MODEL", "PRUNE_RATE", "PRUNE_SCOPE", "REWIND_STEP"):
        if held[name] != constants()[name]:
            raise UserError(f"the tickets in TICKETS_FROM={TICKETS_FROM} were found with {name}={held[name]}: here it "
                            "must be the same, so that tickets with as many weights are compared.")
    if held["TRIALS"] < TRIALS or held["LEVELS"] < LEVELS:
        raise UserError(f"TICKETS_FROM={TICKETS_FROM} holds {held['TRIALS']} trials and {held['LEVELS']} levels: "
                        "TRIALS and LEVELS must be no more.")
    digest = hashlib.sha256(beside_script(TICKETS_FROM).read_bytes()).hexdigest()
    words = ("DATASET", "PIXELS", "INIT", "SEED", "PRUNE_RATE", "PRUNE_SCOPE", "REWIND_STEP", "EPOCHS", "BATCH_SIZE")
    notes = [f"Transferred tickets: {', '.join(f'{name} = {held[name]!r}' for name in words)}; sha256 {digest}."]
    found = {trial: {key: pick(tickets[key], trial) for key in ("theta0", "pruned_at")} for trial in range(TRIALS)}
    return found, notes


# ---- Results ---------------------------------------------------------------------------------------------------------

OUTPUTS = ("accuracy_plot_iterative.png", "accuracy_plot_reinit.png", "comparison_plot.png", "early_stopping_plot.png",
           "learning_curves.png", "mask_plot.png", "supermask_plot.png", "transfer_plot.png",
           "tickets.pt", "metrics.csv", "summary.md")


def write_results(state: dict, notes: list[str], folder: Path, device: torch.device) -> None:
    """Write summary, records and figures of the finished levels, and after the last one the tickets."""
    records, trials = records_of(state), sorted(state["pruned_at"])
    networks, metrics = measure(records), records.to_csv(index=False, lineterminator="\n").encode()
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = {key: stack([state[kept][trial] for trial in trials])
             for key, kept in (("theta0", "theta"), ("pruned_at", "pruned_at"))}
    with one_at_a_time(folder), matplotlib.rc_context(STYLE):
        make_room(folder, metrics)
        write_whole(folder / "summary.md", summary(networks, records, constants(), machine, notes).encode())
        write_whole(folder / "metrics.csv", metrics)
        for name, figure in draw_figures(records, networks, next(iter(found["pruned_at"].values()))).items():
            figure.savefig(image := io.BytesIO(), dpi=150)
            write_whole(folder / name, image.getvalue())
        if state["level"] == LEVELS:
            write_whole(folder / "tickets.pt", packed({"constants": constants(), **found}))


def make_room(folder: Path, metrics: bytes) -> None:
    """Move the results of another run, with other constants or other numbers, to previous/<time>/ in the folder."""
    there = [folder / name for name in OUTPUTS if (folder / name).exists()]
    numbers, words = (path.read_bytes() if path.exists() else b"" for path in (folder / name for name in OUTPUTS[-2:]))
    ours = all(f"\n{name} = {value!r}\n".encode() in words for name, value in experiment().items())
    if there and not (ours and metrics.startswith(numbers)):        # of this run there may be fewer levels
        previous = folder / "previous" / now()
        previous.mkdir(parents=True)
        for path in there:                                          # summary.md last: it tells whose the results are
            path.rename(previous / path.name)
        print(f"the results of an earlier run are now in {previous}", flush=True)


def now() -> str:
    """The time, as part of a name that nothing else has."""
    return datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S.%f")


def markdown(head: list[str], lines: Iterable[Iterable[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def tables(networks: pd.DataFrame) -> str:
    """Tables with a row per level and a column per arm."""
    arms, percents = arms_of(networks) or ["dense"], remaining(networks)
    columns = {}                                                    # a list of columns, one per arm, by what they show
    for arm in arms:
        stop, start, final, own = (by_level(networks, column, arm) for column in (
            "stop_accuracy", "start_accuracy", "final_accuracy", "weights_remaining"))
        steps, reached = (by_level(networks, column, arm) for column in ("stop_step", "stop_step_reached"))
        against = ["", *(f"; {points(lead)}, {answer}" for lead, answer in zip(
            leads(networks, arm, "dense")[1:], matching(networks, arm), strict=True))]
        for what, cells in {
            "Test accuracy at early stop, %: mean (lowest to highest); lead over the dense networks, answer": [
                f"{row.mean() / 1e4:.2f} ({row.min() / 1e4:.2f} to {row.max() / 1e4:.2f}){words}"
                + f" (with {left:.1f} %)" * bool(left != percent)
                for row, words, left, percent in zip(stop, against, own[:, 0], percents, strict=True)],
            "The ticket's lead over the other arms, at early stop": [
                lead_in_words(networks, arm, level) if level and arm != "rewind" else "" for level in range(len(stop))],
            "Test accuracy before the first step, %: mean": [f"{row.mean() / 1e4:.2f}" for row in start],
            "Early stop: median step, and in how many trials it was not reached": [
                median_step(row, there) + f", {(~there).sum()} not reached" * (not there.all())
                for row, there in zip(steps, reached, strict=True)],
            "Test accuracy after the last step, %: mean": [f"{row.mean() / 1e4:.2f}" for row in final],
        }.items():
            columns.setdefault(what, []).append(cells)
    levels = ["0 (dense)", *map(str, range(1, len(percents)))], [f"{percent:.1f} %" for percent in percents]
    return "\n".join(f"{what}\n\n{markdown(['level', 'weights remaining', *arms], zip(*levels, *cells, strict=True))}\n"
                     for what, cells in columns.items())


def summary(networks: pd.DataFrame, records: pd.DataFrame, settings: dict, machine: str, notes: list[str]) -> str:
    """summary.md: the verdict, questions and claims with their answers, a row per level, constants and versions."""
    arms, finished, near = arms_of(networks) or ["dense"], records["level"].max(), levels_near(networks, 21.1, 7.0, 3.6)
    unfinished = f"\n**Unfinished: these are levels 0 to {finished} of {settings['LEVELS']}.**\n"
    sentences, newline = "\n".join(f"- {sentence}" for sentence in verdict(networks)), "\n"
    asked = markdown(["question", "arm", *(f"at {remaining(networks)[level]:.1f} % of the weights" for level in near)],
                     questions(networks, near))
    versions = ", ".join(f"{library.__name__} {library.__version__}"
                         for library in (torch, torchvision, np, pd, matplotlib, sns))
    return f"""# {records["dataset"][0]}, {MODELS[records["model"][0]]}, {trials_in_words(networks)}: {", ".join(arms)}
{unfinished * bool(finished < settings["LEVELS"])}
{sentences}

*Early stop* is the evaluation with the lowest validation loss. In the last 5 % of the {records["step"].max()} steps, or
at one of the last two evaluations, it counts as not reached, though its accuracy counts; "≥" marks a median that falls
on such a one. Differences are paired by trial: mean ± half of the 95 % interval by Student's t. An arm *matches* the
dense networks where the whole interval of its lead lies above -{MATCHING_MARGIN} points, else it is *below* them where
the whole of it lies under 0, else undecided. "Down to" names the sparsest level that matches, "from … on" the first of
those below without a break; single levels between may be undecided. All intervals hold for this draw of the dense
networks, this sequence of dropout and this validation split; each level is judged by itself, with no correction for
their number.

## Questions: what each arm tells

Shown is the ticket's lead over the arm in test accuracy at early stop. Whether something matters: *yes* if the whole
interval lies above 0, *no* if under 0. Whether an arm is enough (signs, transfer): *yes* if the whole interval of its
lead over the ticket lies above -{MATCHING_MARGIN} points. Whether rewinding loses nothing: *yes* if that of the
ticket's lead does.

{asked}

## The paper's claims

The paper's figures are for LeNet-300-100 on MNIST, trained by its own protocol. By test accuracy and step at early
stop; positive differences favour the claim. *Borne out*: the whole interval is on the claimed side (*as accurate*:
above -{MATCHING_MARGIN} points); *contradicted*: under 0. Where at least one trial did not reach a step, a one-sided
binomial test at 5 % on the trials decides.

{markdown(["claim", "weights remaining", "n", "the paper", "here", "answer"], claims(networks))}

## Level by level

{tables(networks)}
## Constants and versions

```
{newline.join(f"{name} = {value!r}" for name, value in settings.items())}
```

{newline.join([*notes, ""])}Script with the sha256 sum {script_sum()}.
Python {sys.version.split()[0]}, {versions}; on {machine}, {torch.get_num_threads()} CPU threads.
"""


# ---- Constants and the command line ----------------------------------------------------------------------------------

RANGES = {                            # of the constants that are no choice: in words, and as a condition
    "DROPOUT": ("a number from 0 to below 1", lambda share: 0 <= share < 1),
    "ARMS": ("a choice, each once, of " + ", ".join(name for name in REGISTRY if name != "dense"), lambda arms: (
        arms and all(isinstance(arm, str) and arms.count(arm) == 1 for arm in arms)
        and {*arms} <= {*REGISTRY} - {"dense"})),
    "TRIALS": ("a whole number, 1 to 1000", lambda count: 1 <= count <= 1_000),
    "LEVELS": ("a whole number, 0 to 255", lambda count: 0 <= count <= 255),    # tickets.pt has 8 bits for them
    "PRUNE_RATE": ("a number between 0 and 1", lambda rate: 0 < rate < 1),
    "REWIND_STEP": ("a whole number, 0 or more", lambda step: step >= 0),
    "TICKETS_FROM": ("the path of a tickets.pt, or None", lambda path: path and "\0" not in path),
    "SEED": ("a whole number, 0 or more", lambda seed: seed >= 0),
    "EPOCHS": ("a whole number, 1 or more", lambda count: count >= 1),
    "BATCH_SIZE": ("a whole number, 1 to 55000", lambda size: 1 <= size <= 55_000),
    "LEARNING_RATE": ("a number above 0", lambda rate: 0 < rate < math.inf),
    "WEIGHT_DECAY": ("a number of at least 0", lambda decay: 0 <= decay < math.inf),
    "CLIP_NORM": ("a number above 0, or None", lambda norm: 0 < norm < math.inf),
    "EVAL_EVERY": ("a whole number, 1 or more", lambda steps: steps >= 1),
    "DATA_DIR": ("a folder's path", lambda path: path and "\0" not in path),
    "RESULTS_DIR": ("a folder's path", lambda path: path and "\0" not in path),
    "DEVICE": ("auto, cpu, cuda, cuda:1 and so on, or mps", re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch)}


def rules() -> dict:
    """The constants' types, by name: they are annotated where they stand."""
    return {name: rule for name, rule in inspect.get_annotations(sys.modules[__name__]).items() if name.isupper()}


def constants() -> dict:
    """All constants as they stand, by name; 0 and 0.0 are the same."""
    values = {name: globals()[name] for name in rules()}
    return {name: float(value) if type(value) is int and rules()[name] in (float, float | None) else value
            for name, value in values.items()}


def experiment() -> dict:
    """The constants that the numbers depend on: where the files lie, and what computes, is no part of an experiment."""
    return {name: value for name, value in constants().items() if name not in ("DATA_DIR", "RESULTS_DIR", "DEVICE")}


def nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion to end an error with, or nothing."""
    alike = {other.lower(): other for other in known}
    match = difflib.get_close_matches(str(name).lower(), alike, n=1)
    return f"; did you mean {alike[match[0]]}?" if match else "."


def read_arguments(arguments: list[str]) -> dict:
    """Constants set for this run. Values are Python literals, a bare word is a string, ARMS may be rewind,shuffle."""
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (name and equals):
            raise UserError(f"{argument!r} is not of the form NAME=VALUE, such as TRIALS=1.")
        if name not in rules():
            raise UserError(f"there is no constant {name}" + nearest(name, rules()))
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            value = text
        if name == "ARMS" and isinstance(value, str | list):
            value = tuple(value.split(",") if isinstance(value, str) else value)
        elif rules()[name] in (str, str | None) and value is not None:
            value = value if isinstance(value, str) else text           # a folder may be called 2026
        values[name] = value
    return values


def check_constants() -> None:
    """Stop with one sentence where a constant is out of range, or where constants make no sense together."""
    for name, value in constants().items():
        choices = get_args(rules()[name]) if name not in RANGES else ()
        words, condition = RANGES.get(name) or ("one of " + ", ".join(choices), choices.__contains__)
        if (isinstance(value, bool) or not isinstance(value, str if choices else rules()[name])
                or not (value is None or condition(value))):
            raise UserError(f"{name} must be {words}, not {value!r}" + nearest(value, choices))
    steps = EPOCHS * steps_per_epoch()
    if "rewind" not in ARMS:
        raise UserError("ARMS must contain rewind: its networks are the ones that are pruned.")
    if ("transfer" in ARMS) != (TICKETS_FROM is not None):
        raise UserError("the arm transfer and TICKETS_FROM go together: set both or neither.")
    if steps <= REWIND_STEP:
        raise UserError(f"REWIND_STEP must be below the {steps} steps of a training, not {REWIND_STEP}.")
    check_network(network := build_network(MODEL, DROPOUT))
    left = {f"{name}.weight": layer.weight.numel() for name, layer in weighted_layers(network).items()}
    left = left if PRUNE_SCOPE == "layer" else {"all layers": sum(left.values())}
    for level, name in itertools.product(range(1, LEVELS + 1), left):
        gone = round(prune_rates(network).get(name, PRUNE_RATE) * left[name])
        if not 0 < gone < left[name]:
            raise UserError(f"LEVELS={LEVELS} is too many at PRUNE_RATE={PRUNE_RATE}: at level {level}, {gone} of the "
                            f"{left[name]} weights left in {name} would be pruned.")
        left[name] -= gone


# ---- Main ------------------------------------------------------------------------------------------------------------

def prepare_device() -> torch.device:
    """DEVICE, set up: on CUDA without rounding the factors of products, on a stream where graphs can be captured."""
    torch.set_flush_denormal(True)      # AdamW's fading moments would slow a CPU down on their way to zero
    device = DEVICE
    if DEVICE in ("auto", "cuda") and torch.cuda.is_available():        # a GPU for each of a machine's processes
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        device = torch.zeros(1, device="cpu" if device == "auto" else device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"DEVICE={DEVICE} cannot be used here ({str(error).splitlines()[0]}): "
                        "DEVICE=auto takes what there is.") from None
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False             # of products, PyTorch rounds no factors by itself
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())
    return device


def prepare_results_folder() -> Path:
    """RESULTS_DIR, made where it is missing; found out before the work if it cannot be written to."""
    folder = beside_script(RESULTS_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"the results folder {folder} cannot be written to ({error}): "
                        "choose another RESULTS_DIR.") from None
    return folder


def run() -> None:
    """The experiment with the constants as they stand, from its checkpoint to its results."""
    check_constants()
    (elsewhere, notes), folder, device = tickets_from_elsewhere(), prepare_results_folder(), prepare_device()
    checkpoint, (rank, processes) = checkpoint_path(device), process()
    state = load_state(checkpoint)
    # Of several processes, the first one speaks for all.
    with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext():
        try:
            if own_trials():
                run_experiment(state, load_dataset(device), elsewhere, checkpoint)
        finally:                        # whatever ends the run: of the finished levels there are results
            if processes == 1 and state["records"]:
                write_results(state, notes, folder, device)
    if processes > 1:
        state = gather(state)
        if rank == 0:
            write_results(state, notes, folder, device)
        torch.distributed.barrier()                         # until the results are there, each keeps its checkpoint
    checkpoint.unlink(missing_ok=True)
    if rank == 0:
        print("\n" + "\n".join(verdict(measure(records_of(state)))) + f"\n\nresults: {folder}")


def main(arguments: list[str]) -> None:
    """Run the experiment with some constants set by NAME=VALUE arguments; afterwards they are what they were before.

    What the machine lacks is said as plainly as what the user got wrong, by UserError. All else keeps its traceback.
    """
    if {"-h", "--help"} & set(arguments):
        print(__doc__ + "\nConstants:\n" + "\n".join(f"  {name} = {value!r}" for name, value in constants().items()))
        return
    before = {name: globals()[name] for name in rules()}
    memory = r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED|bad_alloc"
    try:
        globals().update(read_arguments(arguments))
        run()
    except OSError as error:
        raise UserError(f"{error}. Finished levels are kept: once that is mended, the same command goes on.") from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(memory, str(error), re.I):
            raise
        raise UserError("there is not enough memory: lower TRIALS, BATCH_SIZE or the number of ARMS. Finished levels "
                        "are kept.") from None
    finally:
        globals().update(before)


if __name__ == "__main__":
    # Large memory pages, on Linux: MLPs by the dozen train 5 to 20 % faster. PyTorch looks once, at its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # a cluster's Ctrl-C: it wants its machine back
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"lth_pruning: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nlth_pruning: stopped. Finished levels are kept; the same command goes on after them.", file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)                   # nothing is left to do, and PyTorch would take another second to unload
