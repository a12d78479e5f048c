"""The Lottery Ticket Hypothesis on MNIST (Frankle & Carbin 2019, arXiv:1803.03635).

When a trained network is pruned, was it the surviving connections, or their original initial weights, that made
training work? Train dense networks, remove the smallest weights round after round, and start the survivors again:
from their original initial weights ("rewind"), or from fresh random ones on the very same connections ("reinit").

    python lth_pruning.py                                      the defaults: six or seven minutes on two CPU cores
    python lth_pruning.py TRIALS=2 LEVELS=4 PRUNE_RATE=0.5     any constant below can be set for one run

Out come figures, metrics.csv, summary.md and tickets.pt in results/. The same command again goes on after the last
finished level; when none is left, it only draws again.

Measured with the defaults over 5 trials, test accuracy at early stop: dense networks 97.35 %, rewound tickets 98.08 %
with 21.1 % of the weights and 97.51 % with 3.6 %, re-initialised ones 96.81 % and 94.72 %. A ticket that has not been
trained at all, original weights merely masked, reaches 92.08 % with 21.1 %.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "matplotlib>=3.8", "seaborn[stats]>=0.13.2",
#                 "tqdm>=4.66"]
# ///

import os
import sys

# Housekeeping, before PyTorch is loaded; the experiment begins below, with its constants. Threads spin while they wait
# for each other: limited so, two runs at once on two cores take 1.6 times as long as one, not four times. Large memory
# pages save some 5 %.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if __name__ == "__main__" and "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)          # a notebook's, which may not be installed: this program draws to files

import ast
import contextlib
import datetime
import difflib
import hashlib
import io
import itertools
import math
import re
import signal
import socket
import tempfile
import textwrap
import threading
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

# ---- Constants: edit them here, or set them for one run as NAME=VALUE arguments --------------------------------------

# What is trained, and on what
DATASET: str = "MNIST"                # or "FashionMNIST": 28x28 grey images of 10 classes
PIXELS: str = "standardised"          # mean 0, deviation 1; or "unit_interval", 0 to 1; or "unit_length", each image by
                                      # its own norm, the scale of the pixels in the paper's code
MODEL: str = "mlp"                    # 784-300-100-10 (LeNet-300-100); or "lenet" (LeNet-5)
INIT: str = "kaiming_normal"          # or "xavier_normal", Glorot's, which the paper uses; biases start at zero
DROPOUT: float = 0.2                  # after each hidden fully connected layer; 0 switches it off

# The experiment
ARMS: tuple = ("rewind", "reinit")    # how a pruned network starts; all of them stand in ARM_TABLE
TRIALS: int = 5                       # initialisations, each with its own data order and dropout
LEVELS: int = 16                      # pruning rounds; 0 trains the dense networks alone
PRUNE_RATE: float = 0.2               # of a layer's surviving weights, per level; half in convolutions and the output
PRUNE_SCOPE: str = "layer"            # smallest weights layer by layer; or "global", over all layers at one rate
REWIND_STEP: int = 0                  # rewind to the weights after this many steps, and train the remaining ones
TICKETS_FROM: str | None = None       # the tickets.pt of another run, for the arm "transfer"
SEED: int = 42                        # one seed, one result

# Training: the same for every network, dense or pruned. (The paper: Adam and Glorot's weights, batches of 60 for 50,000
# steps, neither dropout nor clipping.)
VALIDATION_SIZE: int = 5_000          # held out of the 60,000 training images, as in the paper
EPOCHS: int = 3                       # short: most networks would still improve, so learning faster is part of a lead
BATCH_SIZE: int = 128                 # the paper's 60 takes twice as many steps
LEARNING_RATE: float = 1.2e-3         # the paper's, for Adam
WEIGHT_DECAY: float = 1e-2            # AdamW's decoupled decay; 0 makes it Adam
CLIP_NORM: float | None = 1.0         # largest gradient norm of a network; None: no clipping
EVAL_EVERY: int = 200                 # steps between evaluations; others stand in `evaluation_steps`

# Where
DATA_DIR: str = "data"                # relative paths start beside this script
RESULTS_DIR: str = "results"
DEVICE: str = "auto"                  # cuda where there is one, else cpu; "mps" is taken only when asked for

# How results are judged: no argument, since it is no part of a run
MATCHING_MARGIN = 0.2                 # points below the dense networks that still count as matching: our choice

Weights = dict[str, Tensor]           # one network's: "fc1.weight" -> (out, in), as PyTorch names and shapes them
Masks = dict[str, Tensor]             # one network's prunable weights: 1 where a weight remains, 0 where it was pruned
Levels = dict[str, Tensor]            # the level at which each of them was pruned; 0: at none, it remains
Stack = dict[str, Tensor]             # weights or masks of many networks, with a leading nets dimension: of two arms of
                                      # five trials, "fc1.weight" is (10, 300, 784)
Network = tuple[str, int]             # which one it is: arm and trial
Dataset = dict[str, tuple[Tensor, Tensor]]        # "train", "validation", "test" -> images (n, 1, 28, 28), labels (n,)


class UserError(ValueError):
    """One sentence on what the user can set right; as a program, the script prints it and ends with exit code 2."""


# ---- Experiment ------------------------------------------------------------------------------------------------------

@dataclass
class State:
    """What a run has found so far, by trial; it is saved after every level."""

    level: int = -1                                                     # the last one that is finished
    theta_k: dict[int, Weights] = field(default_factory=dict)           # to rewind to: the weights after REWIND_STEP
    pruned_at: dict[int, Levels] = field(default_factory=dict)          # all masks of all levels
    dense: dict[int, Weights] = field(default_factory=dict)             # the dense networks as trained
    trained: dict[int, Weights] = field(default_factory=dict)           # networks of the last level, to be pruned next
    records: list[dict] = field(default_factory=list)                   # rows of metrics.csv: one for each evaluation


def run_experiment(state: State, data: Dataset, elsewhere: dict[int, tuple[Weights, Levels]],
                   save: Callable[[State], None]) -> None:
    """Train the dense networks, then prune the rewind networks level by level and start every arm from the new masks.

    Iterative pruning as in the paper's section 2 (strategy 1 of its appendix B). The state is brought up to date, and
    `save` called with it, after each level. `elsewhere`: by trial, another run's weights to rewind to and its pruning.
    """
    with progress_bar(state.level) as bar:
        for level in range(state.level + 1, LEVELS + 1):
            if level > 0:
                prune_tickets(state, level)

            found = State(level)
            for networks in stacks(level, data["train"][0].device):
                weights, masks = start_networks(networks, level, state, elsewhere)
                early, trained, evaluations = train(weights, masks, data, networks, level, bar)
                record(found, networks, masks, early, trained, evaluations)

            merge(state, gather(found))
            save(state)
            report_level(state, bar)


def prune_tickets(state: State, level: int) -> None:
    """Enter into the state what this level prunes: the smallest weights that the level before trained."""
    rates = prune_rates(build_network(MODEL, DROPOUT))
    for trial, pruned_at in state.pruned_at.items():
        before = masks_at(pruned_at, level - 1)
        after = prune(state.trained[trial], before, rates, PRUNE_SCOPE)
        for name, levels in pruned_at.items():
            levels[before[name] > after[name]] = level


def stacks(level: int, device: torch.device) -> Iterator[list[Network]]:
    """The networks of a level in the lists that train as one stack each.

    They start at the same step, and the arms of a trial follow each other. A CPU's caches hold about 20 networks, more
    would slow each other down; on a GPU they share the cost of launching each operation.
    """
    most = 20 if device.type == "cpu" else 200
    arms = ARMS if level > 0 else ("dense",)
    trials = own_trials()
    for begin in sorted({first_step(arm) for arm in arms}):
        together = [arm for arm in arms if first_step(arm) == begin]
        size = max(1, most // len(together))
        for first in range(0, len(trials), size):
            yield [(arm, trial) for trial in trials[first:first + size] for arm in together]


def start_networks(networks: list[Network], level: int, state: State,
                   elsewhere: dict[int, tuple[Weights, Levels]]) -> tuple[Stack, Stack]:
    """The weights and masks that these networks start from."""
    starts = []
    for arm, trial in networks:
        if level == 0:
            initial = initial_weights(generator("init", trial))
            starts.append((initial, full_masks(initial)))
            continue

        if first_step(arm) == REWIND_STEP:
            original = state.theta_k[trial]
        else:
            original = initial_weights(generator("init", trial))
        masks = masks_at(state.pruned_at[trial], level)
        ticket = None
        if trial in elsewhere:
            weights, pruned_at = elsewhere[trial]
            ticket = weights, masks_at(pruned_at, level)
        random = generator(f"arm {arm}", trial, level)
        given = Given(original, masks, state.dense[trial], state.trained[trial], ticket, random)
        starts.append(ARM_TABLE[arm].start(given))
    return stack([weights for weights, _ in starts]), stack([masks for _, masks in starts])


def record(found: State, networks: list[Network], masks: Stack, early: Stack, trained: Stack,
           evaluations: list[tuple]) -> None:
    """Enter what the training of a stack gave, network by network."""
    survivors = sum(mask.flatten(1).sum(1) for mask in masks.values())                  # (nets,)
    percent = 100 * survivors / sum(mask[0].numel() for mask in masks.values())
    columns = ("train_loss", "val_loss", "val_accuracy", "test_accuracy")
    for n, (arm, trial) in enumerate(networks):
        network = {"dataset": DATASET, "model": MODEL, "arm": arm, "trial": trial, "level": found.level,
                   "weights_remaining": float(f"{percent[n]:.6g}")}
        for step, *numbers in evaluations:
            row = network | {"step": step}
            for column, of_networks in zip(columns, numbers, strict=True):
                row[column] = float(f"{of_networks[n]:.6g}")        # as many digits as metrics.csv has
            found.records.append(row)
        # Copies: views would take the memory of the whole stack along.
        if arm in ("dense", "rewind"):
            found.trained[trial] = copied(pick(trained, n))
        if arm == "dense":
            found.dense[trial] = found.trained[trial]
            found.theta_k[trial] = copied(pick(early, n))
            found.pruned_at[trial] = {name: torch.zeros_like(mask, dtype=torch.uint8)
                                      for name, mask in pick(masks, n).items()}


def merge(state: State, parts: list[State]) -> None:
    """Bring the state up to date with what was found at a level, by each of several processes."""
    arms = ["dense", *ARMS]
    records = [row for part in parts for row in part.records]
    state.records += sorted(records, key=lambda row: (arms.index(row["arm"]), row["trial"], row["step"]))
    state.level = parts[0].level
    state.trained = {}
    for part in parts:
        state.trained |= part.trained
        state.dense |= part.dense
        state.theta_k |= part.theta_k
        state.pruned_at |= part.pruned_at


def generator(purpose: str, trial: int = 0, level: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers for one purpose, whatever else is drawn: trial k is the same among 5 trials and among 50."""
    seeds = np.random.SeedSequence([SEED, trial, level, *purpose.encode()])
    seed = int(seeds.generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


# ---- Data ------------------------------------------------------------------------------------------------------------

# sha256 of the contents, all bytes: training images, their labels, test images, their labels
CONTENTS = {"MNIST": "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
            "FashionMNIST": "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"}


def load_dataset(device: torch.device) -> Dataset:
    """Images (n, 1, 28, 28), normalised once as PIXELS says, and labels (n,), on the device.

    The 60,000 training images give "train" (55,000) and "validation" (5,000); "test" (10,000) is only ever reported.
    """
    (images, labels), test = read_images()
    order = torch.randperm(len(images), generator=generator("split"))
    held_out = order[:VALIDATION_SIZE]
    rest = order[VALIDATION_SIZE:]
    splits = {"train": (images[rest], labels[rest]), "validation": (images[held_out], labels[held_out]), "test": test}
    deviation, mean = torch.std_mean(splits["train"][0] / 255)

    data = {}
    for name, (pixels, classes) in splits.items():
        if PIXELS == "standardised":
            scaled = (pixels / 255 - mean) / deviation
        elif PIXELS == "unit_interval":
            scaled = pixels / 255
        else:
            scaled = F.normalize(pixels.float(), dim=(1, 2))                            # of unit length
        data[name] = (scaled.unsqueeze(1).to(device), classes.to(device))
    return data


def read_images() -> list[tuple[Tensor, Tensor]]:
    """Images (n, 28, 28), bytes, and labels (n,): 60,000 to train and 10,000 to test.

    Raises UserError where torchvision can neither find, unpack nor download them, or where they are not DATASET's:
    it takes unpacked files as they are, another data set's or damaged ones too.
    """
    folder = beside_script(DATA_DIR)
    raw = folder / DATASET / "raw"
    there = {path.name.removesuffix(".gz") for path in raw.glob("*-ubyte*")}
    if len(there) < 4:
        say(f"downloading {DATASET} into {raw}")
    source = getattr(torchvision.datasets, DATASET)
    try:
        with one_at_a_time(folder):
            parts = [source(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:                              # it fails in many ways; the last line says most
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"{DATASET} could not be read in {raw} ({reason}): put its four archives there and remove "
                        "what lies unpacked, or set DATA_DIR to a folder that can be written to.") from None

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data.numpy().tobytes())
        digest.update(part.targets.byte().numpy().tobytes())
    if digest.hexdigest() != CONTENTS[DATASET]:
        raise UserError(f"what lies unpacked in {raw} is not {DATASET}, or is damaged: remove the files without .gz "
                        "there, so that they are unpacked or downloaded again.")
    return [(part.data, part.targets) for part in parts]


# ---- Networks --------------------------------------------------------------------------------------------------------

def build_network(model: str, dropout: float) -> nn.Sequential:
    """One plain network. Its layers are also the plan by which `forward` runs a whole stack of them.

    Its name is what figures and tables call it. Raises UserError for a model that is not here.
    """
    if model == "mlp":
        network = nn.Sequential(OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300), relu1=nn.ReLU(), drop1=nn.Dropout(dropout),
            fc2=nn.Linear(300, 100), relu2=nn.ReLU(), drop2=nn.Dropout(dropout),
            output=nn.Linear(100, 10)))
        network.name = "LeNet-300-100"
        assert count_weights(network) == 266_200            # as in figure 2 of the paper
    elif model == "lenet":
        network = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(1, 6, 5, padding=2), pool1=nn.MaxPool2d(2), relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 16, 5), pool2=nn.MaxPool2d(2), relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(400, 120), relu3=nn.ReLU(), drop1=nn.Dropout(dropout),
            fc2=nn.Linear(120, 84), relu4=nn.ReLU(), drop2=nn.Dropout(dropout),
            output=nn.Linear(84, 10)))
        network.name = "LeNet-5"
        assert count_weights(network) == 61_470             # LeCun et al. 1998, its feature maps fully connected
    else:
        raise UserError(f"MODEL must be mlp or lenet, not {model!r}.")
    return network


def weighted_layers(network: nn.Sequential) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that have weights, by name, from the input to the output."""
    return {name: layer for name, layer in network.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)}


def count_weights(network: nn.Sequential) -> int:
    """How many weights can be pruned."""
    return sum(layer.weight.numel() for layer in weighted_layers(network).values())


def initial_weights(random: torch.Generator, shapes: dict[str, tuple[int, ...]] | None = None) -> Weights:
    """One network's weights drawn by INIT, biases zero. With a narrower one's shapes these are drawn, the rest zero."""
    draw = {"kaiming_normal": nn.init.kaiming_normal_, "xavier_normal": nn.init.xavier_normal_}[INIT]
    weights = {}
    for name, layer in weighted_layers(build_network(MODEL, DROPOUT)).items():
        weight = torch.zeros(layer.weight.shape)
        shape = weight.shape if shapes is None else shapes[f"{name}.weight"]
        weight[:shape[0], :shape[1]] = draw(torch.empty(shape), generator=random)
        weights[f"{name}.weight"] = weight
        weights[f"{name}.bias"] = torch.zeros(layer.bias.shape)
    return weights


def forward(network: nn.Sequential, weights: Stack, images: Tensor, dropout: Iterable[Tensor] = ()) -> Tensor:
    """Logits (nets, batch, 10) of a stack's networks, from images (sets, batch, 1, 28, 28).

    Each set of images is seen by as many networks, which follow each other: the arms of a trial, or in evaluation all.
    With factors (sets, units, batch), one for each dropout layer, units are dropped; without any, none. Which layers it
    serves is found out by `check_network`.
    """
    layers = list(network.named_children())
    flatten = [isinstance(layer, nn.Flatten) for _, layer in layers].index(True)
    sets = len(images)
    nets_per_set = len(weights["output.bias"]) // sets

    if flatten == 0:
        x = images.flatten(2).repeat_interleave(nets_per_set, 0)                        # (nets, batch, units)
    else:
        parts = []
        for n in range(sets):
            own = pick(weights, slice(n * nets_per_set, (n + 1) * nets_per_set))
            parts.append(convolve(layers[:flatten], own, images[n]))
        x = torch.cat(parts)
    x = x.mT                                                                            # (nets, units, batch)

    dropout = iter(dropout)
    for name, layer in layers[flatten + 1:]:
        if isinstance(layer, nn.Linear):
            x = linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        elif isinstance(layer, nn.Dropout):
            factor = next(dropout, None)
            if factor is not None:
                by_set = x.unflatten(0, (sets, nets_per_set)) * factor.unsqueeze(1)
                x = by_set.flatten(0, 1)
        else:
            x = layer(x)                                                                # ReLU
    return x.mT


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a linear layer of every network makes of its own (nets, in, batch): (nets, out, batch)."""
    bias = bias.unsqueeze(2)
    if len(weight) > 1:
        return torch.baddbmm(bias, weight, x)
    # A lone product is rounded otherwise than one of several: it gets a twin.
    both = torch.baddbmm(bias.expand(2, -1, -1), weight.expand(2, -1, -1), x.expand(2, -1, -1))
    return both[:1]


def convolve(layers: list[tuple[str, nn.Module]], weights: Stack, x: Tensor) -> Tensor:
    """What the layers before nn.Flatten make of images (batch, 1, 28, 28) for some networks: (nets, batch, units).

    All see the same images, so their kernels (nets, out, in, height, width) go into one convolution, with a group per
    network from the second on. In channels-last memory this takes half the time of one after the other.
    """
    # One channel is contiguous in both layouts; oneDNN takes the fast path only if the strides say channels last.
    x = x.contiguous().as_strided(x.shape, (784, 1, 28, 1))
    nets = len(weights["output.bias"])
    groups = 1                                              # so far all networks have the same activations
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d):
            kernels = weights[f"{name}.weight"].flatten(0, 1)
            bias = weights[f"{name}.bias"].flatten()
            x = F.conv2d(x, kernels, bias, layer.stride, layer.padding, layer.dilation, groups)
            groups = nets
        else:
            x = layer(x)                                                                # ReLU and pooling
    x = x.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1)                         # (groups, batch, units)
    return x.expand(nets, -1, -1)


def dropped_units(network: nn.Sequential) -> list[int]:
    """How many units each dropout layer has, from the input to the output."""
    units = 0
    dropped = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            units = layer.out_features
        elif isinstance(layer, nn.Dropout):
            dropped.append(units)
    return dropped


def as_plain_network(network: nn.Sequential, weights: Weights) -> nn.Sequential:
    """The plain network with a single network's weights put in. Raises RuntimeError where they do not fit."""
    network.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    return network


# ---- Tickets: a ticket is a mask together with the initial weights that it was found from ----------------------------

def full_masks(weights: Weights | Stack) -> Masks:
    """Masks with every prunable weight remaining: biases are never pruned, and not counted."""
    return {name: torch.ones_like(tensor) for name, tensor in weights.items() if name.endswith(".weight")}


def masked(weights: Weights | Stack, masks: Masks) -> Weights:
    """The weights, zero where they are pruned; new tensors."""
    return {name: tensor * masks[name] if name in masks else tensor.clone() for name, tensor in weights.items()}


def masks_at(pruned_at: Levels, level: int) -> Masks:
    """The masks of a level."""
    return {name: ((levels == 0) | (levels > level)).float() for name, levels in pruned_at.items()}


def prune_rates(network: nn.Sequential) -> dict[str, float]:
    """The share of its survivors that each layer loses per level (section 2 and figure 2 of the paper): half of it in
    the output layer and in convolutions; a global scope compares all layers at one rate."""
    rates = {}
    for name, layer in weighted_layers(network).items():
        rates[f"{name}.weight"] = PRUNE_RATE
        if PRUNE_SCOPE == "layer" and (name == "output" or isinstance(layer, nn.Conv2d)):
            rates[f"{name}.weight"] = PRUNE_RATE / 2
    return rates


def prune(weights: Weights, masks: Masks, rates: dict[str, float], scope: str) -> Masks:
    """Remove the smallest survivors of one network, `rates` of them, layer by layer or globally.

    Step 3 of the paper's iterative pruning (its appendix B). Counts are exact: round(rate * survivors). Raises
    UserError where a global scope would leave a layer without any weight.
    """
    if scope == "layer":
        return {name: remove_smallest(weights[name], mask, round(rates[name] * int(mask.sum())))
                for name, mask in masks.items()}

    rate = max(rates.values())                              # the same for all layers
    all_weights = torch.cat([weights[name].flatten() for name in masks])
    mask = torch.cat([mask.flatten() for mask in masks.values()])
    mask = remove_smallest(all_weights, mask, round(rate * int(mask.sum())))
    parts = mask.split([mask.numel() for mask in masks.values()])
    pruned = {}
    for name, part in zip(masks, parts, strict=True):
        if not part.any():
            raise UserError(f"with PRUNE_SCOPE=global, pruning would leave no weight of {name}: lower LEVELS or "
                            "PRUNE_RATE, or choose PRUNE_SCOPE=layer.")
        pruned[name] = part.view(masks[name].shape)
    return pruned


def remove_smallest(weights: Tensor, mask: Tensor, count: int) -> Tensor:
    """The mask, of any shape, without the `count` survivors of smallest magnitude; ties go by index."""
    magnitude = weights.abs().masked_fill(mask == 0, torch.inf).flatten()
    smallest = magnitude.argsort(stable=True)[:count]
    return mask.flatten().scatter(0, smallest, 0).view(mask.shape)


# ---- Arms: how a pruned network starts -------------------------------------------------------------------------------

class Given(NamedTuple):
    """What an arm may start from: of one network, at one level."""
    theta0: Weights                       # the original initial weights; for a late arm those of REWIND_STEP
    masks: Masks                          # the ticket's, found from the rewind network of the same trial
    dense: Weights                        # the dense network as trained
    trained: Weights                      # the rewind network as the level before trained it
    elsewhere: tuple[Weights, Masks] | None         # weights and masks of a ticket from TICKETS_FROM
    random: torch.Generator               # for this arm, trial and level alone


def rewind(given: Given) -> tuple[Weights, Masks]:
    """The winning ticket: the survivors' original initial weights."""
    return masked(given.theta0, given.masks), given.masks


def reinit(given: Given) -> tuple[Weights, Masks]:
    """The same connections with a fresh draw of initial weights (section 2, "random reinitialization")."""
    return masked(initial_weights(given.random), given.masks), given.masks


def permute(given: Given) -> tuple[Weights, Masks]:
    """The survivors' original values, permuted among the survivors of each layer."""
    weights = masked(given.theta0, given.masks)
    for name, mask in given.masks.items():
        survivors = mask.flatten().nonzero().flatten()
        order = torch.randperm(len(survivors), generator=given.random)
        values = given.theta0[name].flatten()
        weights[name].view(-1)[survivors] = values[survivors[order]]
    return weights, given.masks


def signs(given: Given) -> tuple[Weights, Masks]:
    """Fresh magnitudes with the signs of the original initial weights (Zhou et al. 2019, arXiv:1905.01067)."""
    fresh = initial_weights(given.random)
    weights = {name: tensor.abs() * given.theta0[name].sign() for name, tensor in fresh.items()}
    return masked(weights, given.masks), given.masks


def finetune(given: Given) -> tuple[Weights, Masks]:
    """The survivors keep the weights that the level before trained: these networks have trained longer."""
    return masked(given.trained, given.masks), given.masks


def shuffle(given: Given) -> tuple[Weights, Masks]:
    """The original initial weights on connections chosen at random, as many in each layer as the ticket has."""
    masks = {}
    for name, mask in given.masks.items():
        order = torch.randperm(mask.numel(), generator=given.random)
        masks[name] = mask.flatten()[order].view(mask.shape)
    return masked(given.theta0, masks), masks


def oneshot(given: Given) -> tuple[Weights, Masks]:
    """The original initial weights on the trained dense network's largest, as many in each layer as the ticket has."""
    masks = largest(given.dense, given.masks)
    return masked(given.theta0, masks), masks


def magnitude(given: Given) -> tuple[Weights, Masks]:
    """The largest initial weights, as many in each layer as the ticket has (Frankle et al. 2021, arXiv:2009.08576)."""
    masks = largest(given.theta0, given.masks)
    return masked(given.theta0, masks), masks


def largest(weights: Weights, masks: Masks) -> Masks:
    """Masks of the weights of largest magnitude, as many in each layer as the given masks keep."""
    return {name: remove_smallest(weights[name], torch.ones_like(mask), int((mask == 0).sum()))
            for name, mask in masks.items()}


def small(given: Given) -> tuple[Weights, Masks]:
    """A narrower dense network with about as many weights: the first units of layers, drawn by INIT for their sizes."""
    survivors = sum(int(mask.sum()) for mask in given.masks.values())
    layers = weighted_layers(build_network(MODEL, DROPOUT))

    def distance(shapes: dict[str, tuple[int, ...]]) -> int:
        return abs(sum(math.prod(shape) for shape in shapes.values()) - survivors)

    shapes = min((narrower(layers, thousandths / 1000) for thousandths in range(1001)), key=distance)
    masks = {name: torch.zeros_like(mask) for name, mask in given.masks.items()}
    for name, (outputs, inputs, *_) in shapes.items():
        masks[name][:outputs, :inputs] = 1
    return initial_weights(given.random, shapes), masks


def narrower(layers: dict[str, nn.Linear | nn.Conv2d], scale: float) -> dict[str, tuple[int, ...]]:
    """The shapes (out, in, ...) of the layers' weights where all hidden layers are scaled down together."""
    shapes = {}
    kept = 1.0                                              # share of the layer before
    for name, layer in layers.items():
        outputs, inputs, *kernel = layer.weight.shape
        fewest = 10                                         # three units before ten classes: an unfair rival
        if kernel:
            fewest = 1
        width = outputs
        if name != "output":
            width = min(outputs, max(fewest, round(scale * outputs)))
        shapes[f"{name}.weight"] = (width, round(inputs * kept), *kernel)
        kept = width / outputs
    return shapes


def transfer(given: Given) -> tuple[Weights, Masks]:
    """Weights and masks of the same trial and level from the file TICKETS_FROM."""
    weights, masks = given.elsewhere
    return masked(weights, masks), masks


class Arm(NamedTuple):
    """One way to start a masked network, the question that it answers, and how it is drawn."""
    start: Callable[[Given], tuple[Weights, Masks]]
    label: str                            # what it is, in figures and tables
    colour: str
    marker: str
    late: bool = True                     # starts at REWIND_STEP, for the remaining steps; else at step 0, for all
    controls: str = "both"                # what it has otherwise than the ticket: "weights" or "mask"
    question: str = ""                    # answered by the ticket's lead over this arm in accuracy
    kind: str = "difference"              # yes if the ticket is more accurate; "enough": if this arm is as accurate as
                                          # the ticket; "no loss": if the ticket is as accurate as this arm


ARM_TABLE = {
    "rewind": Arm(rewind, "rewound to original weights", "#0173b2", "o"),
    "reinit": Arm(reinit, "re-initialised at random", "#de8f05", "s", late=False, controls="weights",
                  question="Do the original weights matter?"),
    "permute": Arm(permute, "original values, permuted", "#56b4e9", "<", controls="weights",
                   question="Does it matter which survivor has which value?"),
    "signs": Arm(signs, "original signs, new magnitudes", "#ca9161", ">", late=False, controls="weights",
                 question="Are the signs enough?", kind="enough"),
    "finetune": Arm(finetune, "trained on, not rewound (longer)", "black", "X", controls="weights",
                    question="Does rewinding lose nothing against training on, for longer?", kind="no loss"),
    "shuffle": Arm(shuffle, "shuffled connections", "#029e73", "^", controls="mask",
                   question="Do the connections matter, beyond their number per layer?"),
    "oneshot": Arm(oneshot, "pruned in one shot", "#d55e00", "D", controls="mask",
                   question="Is pruning round after round needed?"),
    "magnitude": Arm(magnitude, "largest initial weights", "#7a5195", "*", late=False, controls="mask",
                     question="Is training needed to find the mask?"),
    "small": Arm(small, "small dense network", "#808000", "p", late=False, controls="mask",
                 question="Is a ticket better than a small dense network?"),
    "transfer": Arm(transfer, "ticket found elsewhere", "#cc78bc", "v", controls="mask",
                    question="Do tickets carry over?", kind="enough"),
}


def first_step(arm: str) -> int:
    """After how many steps of the dense training an arm starts."""
    if arm == "dense" or not ARM_TABLE[arm].late:
        return 0
    return REWIND_STEP


# ---- Training --------------------------------------------------------------------------------------------------------
#
# Five things to know before changing anything:
#   1. Activations are feature-major: (nets, units, batch).
#   2. The networks of a trial follow each other in a stack, and see the same batch and the same dropout.
#   3. The loss is the sum over the networks, so that each one gets just its own gradient, unscaled.
#   4. Pruned weights start at zero and their gradients are masked before clipping, so they stay exactly zero: a fresh
#      AdamW makes no moments of zero gradients, and its decoupled decay leaves a zero alone.
#   5. Every random number has a generator for its purpose, trial and level.

def train(weights: Stack, masks: Stack, data: Dataset, networks: list[Network], level: int,
          bar: tqdm) -> tuple[Stack, Stack, list[tuple]]:
    """Train a stack of networks, all arms of a trial side by side.

    Networks that start at REWIND_STEP take the remaining steps only, with the level's batches and dropout of these.
    Returns the weights at REWIND_STEP, the trained weights, and for each evaluation, the first one before any step,
    (step, train_loss, val_loss, val_accuracy, test_accuracy), all but the step (nets,) on the CPU; train_loss is the
    mean over the batches since the evaluation before. Raises UserError where a loss is not finite.
    """
    network = build_network(MODEL, DROPOUT)
    images, labels = data["train"]
    device = images.device
    trials = list(dict.fromkeys(trial for _, trial in networks))
    arms = len(networks) // len(trials)

    parameters = as_rows(weights).to(device)                                            # (nets, numbers)
    gradients = torch.zeros_like(parameters)
    gradients_of = as_views(gradients, weights)
    weights = as_views(parameters, weights)                 # what moves the rows moves these
    for weight in weights.values():
        weight.requires_grad_()
    masks = {name: mask.to(device) for name, mask in masks.items()}
    parameters.grad = gradients
    optimizer = torch.optim.AdamW([parameters], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    begin = first_step(networks[0][0])
    end = EPOCHS * steps_per_epoch()
    evaluate_at = evaluation_steps(end)
    order = batches(len(images), trials, level, device)
    dropout = dropout_factors(network, trials, level, device)
    early = copied(weights)
    loss_sum = torch.zeros(len(networks), device=device)
    since = 0                                               # steps since the last evaluation
    evaluations = [(begin, *evaluate_all(network, weights, data, loss_sum / since))]    # 0 / 0: no training loss yet
    check_finite(loss_sum, evaluations[-1], networks, level)

    for step in range(1, end + 1):
        batch = next(order)                                                             # (trials, batch)
        factors = next(dropout)
        if step <= begin:                                   # taken once and for all by the dense network
            continue

        # predict
        x = images.index_select(0, batch.flatten()).unflatten(0, batch.shape)           # faster than images[batch]
        y = labels[batch].repeat_interleave(arms, 0)                                    # (nets, batch)
        loss = losses(forward(network, weights, x, factors), y)                         # (nets,)

        # mask and clip the gradients
        unmasked = torch.autograd.grad(loss.sum(), list(weights.values()))
        for name, gradient in zip(weights, unmasked, strict=True):
            torch.mul(gradient, masks.get(name, 1), out=gradients_of[name])
        if CLIP_NORM is not None:
            clip_per_network(gradients, CLIP_NORM)

        # move the weights
        optimizer.step()
        loss_sum += loss.detach()
        since += 1
        bar.update(len(networks))

        # look at where they are
        if step == REWIND_STEP:
            early = copied(weights)
        if step in evaluate_at:
            evaluations.append((step, *evaluate_all(network, weights, data, loss_sum / since)))
            check_finite(loss_sum, evaluations[-1], networks, level)
            loss_sum.zero_()
            since = 0

    return early, copied(weights), evaluations


def evaluation_steps(end: int) -> set[int]:
    """After which steps of a training to evaluate: accuracy rises fastest at the start, and curves should show it."""
    return {25, 50, 100, end, *range(EVAL_EVERY, end, EVAL_EVERY)}


def steps_per_epoch() -> int:
    """Whole batches in an epoch: each epoch's order leaves out another remainder of the training images."""
    return (60_000 - VALIDATION_SIZE) // BATCH_SIZE


def batches(images: int, trials: list[int], level: int, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of image numbers (trials, batch): an order of its own for every trial, level and epoch."""
    orders = [generator("order", trial, level) for trial in trials]
    while True:
        epoch = torch.stack([torch.randperm(images, generator=order) for order in orders]).to(device)
        whole = images - images % BATCH_SIZE
        yield from epoch[:, :whole].split(BATCH_SIZE, dim=1)


def dropout_factors(network: nn.Sequential, trials: list[int], level: int,
                    device: torch.device) -> Iterator[list[Tensor]]:
    """For each step the factors (trials, units, batch) of every dropout layer: 0, or 1 / (1 - DROPOUT), which keeps the
    mean. Without dropout there are none.

    Each trial and level draws its own, so that trials are independent; the arms of a trial share them. A 16-bit number
    decides about a unit: drawn by 64 random bits, they cost a fraction of what `bernoulli_` does.
    """
    sizes = [units * BATCH_SIZE for units in dropped_units(network)]
    while DROPOUT == 0 or not sizes:
        yield []
    randoms = [generator("dropout", trial, level, device) for trial in trials]
    bits = torch.empty(len(trials), math.ceil(sum(sizes) / 4), dtype=torch.int64, device=device)
    threshold = round(DROPOUT * 2**16) - 2**15
    while True:
        for row, random in zip(bits, randoms, strict=True):
            row.random_(-2**63, None, generator=random)
        kept = bits.view(torch.int16)[:, :sum(sizes)].float().ge_(threshold)            # 1 or 0
        factors = kept.mul_(1 / (1 - DROPOUT))
        yield [part.view(len(trials), -1, BATCH_SIZE) for part in factors.split(sizes, dim=1)]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Each network's mean cross-entropy, (nets,), from logits (nets, batch, 10) and labels (nets, batch)."""
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(1)


def clip_per_network(gradients: Tensor, max_norm: float) -> None:
    """`clip_grad_norm_` for each row of gradients (nets, numbers) alone, in place.

    A norm over the whole stack would let one network's large gradient scale down all the others'.
    """
    norms = gradients.norm(dim=1, keepdim=True)
    gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1))


def evaluate_all(network: nn.Sequential, weights: Stack, data: Dataset, train_loss: Tensor) -> list[Tensor]:
    """train_loss, val_loss, val_accuracy and test_accuracy, (nets,), on the CPU."""
    val_loss, val_accuracy = evaluate(network, weights, *data["validation"])
    _, test_accuracy = evaluate(network, weights, *data["test"])
    return [numbers.cpu() for numbers in (train_loss, val_loss, val_accuracy, test_accuracy)]


@torch.no_grad()
def evaluate(network: nn.Sequential, weights: Stack, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy in percent, both (nets,), of every network on all of the images."""
    nets = len(weights["output.bias"])
    loss = torch.zeros(nets, device=images.device)
    correct = torch.zeros(nets, device=images.device)
    for x, y in zip(images.split(1_000), labels.split(1_000), strict=True):
        logits = forward(network, weights, x.unsqueeze(0))                              # (nets, batch, 10)
        y = y.expand(nets, -1)
        loss += losses(logits, y) * y.shape[1]
        correct += (logits.argmax(2) == y).sum(1)
    return loss / len(images), 100 * correct / len(images)


def check_finite(loss_sum: Tensor, evaluation: tuple, networks: list[Network], level: int) -> None:
    """Raise UserError where a network's loss, in training or on the validation images, is not finite."""
    step, _, val_loss, *_ = evaluation
    sound = (loss_sum.cpu() + val_loss).isfinite()
    for (arm, trial), finite in zip(networks, sound.tolist(), strict=True):
        if not finite:
            raise UserError(f"training diverged: the loss of {arm}, trial {trial}, at level {level} was not finite by "
                            f"step {step}. Finished levels are kept; try a LEARNING_RATE below {LEARNING_RATE}.")


# ---- Tensors of many networks, and the device ------------------------------------------------------------------------

def stack(networks: list[Weights]) -> Stack:
    """Single networks' tensors, stacked along a new leading nets dimension."""
    return {name: torch.stack([network[name] for network in networks]) for name in networks[0]}


def pick(tensors: Stack, n: int | slice) -> Weights | Stack:
    """The tensors of a stack's n-th network, or of a slice of them."""
    return {name: tensor[n] for name, tensor in tensors.items()}


def copied(tensors: Stack) -> Stack:
    """The same numbers on the CPU, in memory of their own."""
    return {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}


def as_rows(tensors: Stack) -> Tensor:
    """All numbers of a network in a row of its own, (nets, numbers), filled up with zeros to a multiple of 16.

    So AdamW works on one tensor. Its kernel takes 16 numbers at a time and rounds a remainder otherwise: without the
    filling, a network's last bits would depend on how many others there are in the stack.
    """
    rows = torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)
    return F.pad(rows, (0, -rows.shape[1] % 16))


def as_views(rows: Tensor, shapes: Stack) -> Stack:
    """Parts of rows (nets, numbers) under the names and in the shapes of a stack's tensors; they share the memory."""
    views = {}
    begin = 0
    for name, tensor in shapes.items():
        end = begin + tensor[0].numel()
        views[name] = rows[:, begin:end].unflatten(1, tensor.shape[1:])
        begin = end
    return views


def prepare_device() -> torch.device:
    """DEVICE, set up; several processes take a machine's GPUs in turn. Raises UserError where it cannot be used."""
    torch.set_flush_denormal(True)      # AdamW's fading moments would slow a CPU down on their way to zero
    name = DEVICE
    if DEVICE == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{process()[0] % torch.cuda.device_count()}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"DEVICE={DEVICE} cannot be used here: DEVICE=auto takes what there is.") from None
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False             # for products, PyTorch has it off by itself
        torch.backends.cudnn.deterministic = True
        torch.cuda.set_device(device)
    return device


# ======================================================================================================================
# Here ends what numbers depend on. The sha256 sum of the text from the section on the experiment to this line is a
# version's name: below it, a figure can be improved without parting committed runs from the code that computed them.
# ======================================================================================================================

# ---- Measures and comparisons ----------------------------------------------------------------------------------------

MAIN = ("rewind", "reinit")           # the arms that the paper's question is about


class Results(NamedTuple):
    """A run, as its summary and figures need it."""
    records: pd.DataFrame                 # a row per evaluation, as in metrics.csv
    networks: pd.DataFrame                # a row per network, by `measure`
    constants: dict
    provenance: str                       # what computed it, and on what
    first_layer: Tensor | None            # (trials, units, pixels): the level at which each weight was pruned; 0: never
    image: Tensor | None                  # (28, 28): the mean training image; there if first_layer is


class Comparison(NamedTuple):
    """That one arm is ahead of another: more accurate, or sooner at some step."""
    claim: str
    ahead: str
    behind: str
    measure: str                      # a column of what `measure` gives
    percent: float                    # of the weights remaining
    margin: float = 0                 # points that the arm ahead may be behind: 0 for more accurate, else as accurate
    published: str = ""               # the paper's own figure


CLAIMS = (
    Comparison("Tickets beat dense networks", "rewind", "dense", "stop_accuracy", 13.5, 0, "more than 0.3 points"),
    Comparison("Tickets match dense networks", "rewind", "dense", "stop_accuracy", 3.6, MATCHING_MARGIN, "they do"),
    Comparison("Tickets end above dense networks", "rewind", "dense", "final_accuracy", 13.5, 0, "up to 0.35 points"),
    Comparison("Dense networks beat re-initialised ones", "dense", "reinit", "stop_accuracy", 21.1, 0, "from here on"),
    Comparison("Tickets beat re-initialised networks", "rewind", "reinit", "stop_accuracy", 21.1, 0, "0.5 points"),
    Comparison("Tickets beat networks pruned in one shot", "rewind", "oneshot", "stop_accuracy", 7.0, 0, "(curves)"),
    Comparison("Tickets beat shuffled connections", "rewind", "shuffle", "stop_accuracy", 21.1, 0, "(curves)"),
    Comparison("Tickets stop before dense networks", "rewind", "dense", "stop_step", 21.1, 0, "38 % earlier"),
    Comparison("Tickets stop before re-initialised networks", "rewind", "reinit", "stop_step", 21.1, 0, "60 % earlier"),
    Comparison("Tickets catch up before re-initialised ones", "rewind", "reinit", "catch_up_step", 21.1, 0,
               "our own claim"))


def questions(arms: list[str], percent: float) -> list[Comparison]:
    """What the other arms are asked at so many percent of the weights: is the ticket ahead of them, as accurate as they
    are, or they as the ticket?"""
    asked = []
    for arm in arms[1:]:
        kind = ARM_TABLE[arm].kind
        margin = 0 if kind == "difference" else MATCHING_MARGIN
        pair = (arm, "rewind") if kind == "enough" else ("rewind", arm)
        asked.append(Comparison(ARM_TABLE[arm].question, *pair, "stop_accuracy", percent, margin))
    if "transfer" in arms and "reinit" in arms:
        asked.append(Comparison("Are they better than a fresh draw?", "transfer", "reinit", "stop_accuracy", percent))
    return asked


def measure(records: pd.DataFrame) -> pd.DataFrame:
    """A row per network, by arm, level and trial, from a row per evaluation.

    Test accuracies before the network's own first step (start), after the last (final), and at the lowest validation
    loss (stop), in whole ten-thousandths of a percent: equal counts of right images are equal numbers. Steps of that
    stop, and of catching up with the validation accuracy that the trial's dense network ends at; infinite if not yet.
    """
    network = ["arm", "level", "trial"]
    records = records.reset_index(drop=True)
    for column in ("val_accuracy", "test_accuracy"):
        records[column] = (1e4 * records[column]).round().astype("int64")

    untrained = records["train_loss"].isna()
    start = records[untrained].set_index(network)
    records = records[~untrained]
    last = records.loc[records.groupby(network)["step"].idxmax()].set_index(network)
    stop = records.loc[records.groupby(network)["val_loss"].idxmin()].set_index(network)

    # A lowest loss so late says only that the training ended there.
    last_steps = records["step"].drop_duplicates().nlargest(2)
    too_late = min(0.95 * last_steps.max(), last_steps.min())
    stop_step = stop["step"].astype(float).where(stop["step"] < too_late, math.inf)

    dense_end = records["trial"].map(last.loc[("dense", 0), "val_accuracy"])
    caught_up = records[records["val_accuracy"] >= dense_end].groupby(network)["step"].min()

    return pd.DataFrame({
        "weights_remaining": last["weights_remaining"], "start_accuracy": start["test_accuracy"],
        "final_accuracy": last["test_accuracy"], "stop_accuracy": stop["test_accuracy"], "stop_step": stop_step,
        "catch_up_step": caught_up.reindex(last.index).astype(float).fillna(math.inf)}).sort_index()


def arms_of(networks: pd.DataFrame) -> list[str]:
    """The arms of a run, rewind first; none where nothing was pruned."""
    return [arm for arm in ARM_TABLE if arm in networks.index.unique("arm")]


def values(networks: pd.DataFrame, column: str, arm: str, level: int) -> np.ndarray:
    """A measure of an arm's networks at a level, (trials,); at level 0 all arms are the dense networks."""
    if arm == "dense" or level == 0:
        return networks.loc[("dense", 0), column].to_numpy()
    return networks.loc[(arm, level), column].to_numpy()


def remaining(networks: pd.DataFrame, level: int, arm: str = "rewind") -> float:
    """Percent of weights remaining in an arm at a level."""
    return values(networks, "weights_remaining", arm, level)[0]


def levels_of(networks: pd.DataFrame) -> list[int]:
    """The levels of a run, 0 (dense) first."""
    return sorted(networks.index.unique("level"))


def levels_near(networks: pd.DataFrame, *percents: float) -> list[int]:
    """The levels nearest to so many percent of weights remaining, each once; level 0 only where there is no other."""
    pruned = np.array([remaining(networks, level) for level in levels_of(networks)[1:]])
    if len(pruned) == 0:
        return [0]
    return sorted({1 + int(np.abs(np.log(pruned / percent)).argmin()) for percent in percents})


def level_near(networks: pd.DataFrame, percent: float) -> int:
    """The level nearest to so many percent of weights remaining."""
    return levels_near(networks, percent)[0]


def leads(networks: pd.DataFrame, ahead: str, behind: str, level: int, column: str = "stop_accuracy") -> np.ndarray:
    """How many points of test accuracy one arm is ahead of another, (trials,); nan for a small dense
    network that has more weights than the ticket."""
    if "small" in (ahead, behind) and remaining(networks, level, "small") > 1.1 * remaining(networks, level):
        return np.full(len(values(networks, column, behind, level)), math.nan)
    return (values(networks, column, ahead, level) - values(networks, column, behind, level)) / 1e4


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences (trials,), and half its 95 % interval by Student's t; with one trial that is nan."""
    error = pd.Series(differences).sem()
    return differences.mean(), stats.t.ppf(0.975, len(differences) - 1) * error


def decide(differences: np.ndarray, margin: float = 0) -> str:
    """Is the true mean of paired differences (trials,) above -margin: "yes", "no" or "undecided"?"""
    if len(differences) < 3 or np.ptp(differences) == 0:
        return "undecided"
    mean, half = interval(differences)
    if mean - half > -margin:
        return "yes"
    return "no" if mean + half < -margin else "undecided"


def decide_steps(first: np.ndarray, second: np.ndarray) -> str:
    """Does the first of two steps, both (trials,), come sooner: "yes", "no" or "undecided"? By a sign test."""
    for answer, wins in (("yes", first < second), ("no", second < first)):
        # Ties, and pairs of which neither was reached, count for neither side, and stay in n.
        if stats.binomtest(int(wins.sum()), len(wins), alternative="greater").pvalue <= 0.05:
            return answer
    return "undecided"


def compare(networks: pd.DataFrame, comparison: Comparison) -> tuple[str, str]:
    """What a run says to a comparison: its own figure in words, and "yes", "no" or "undecided"."""
    level = level_near(networks, comparison.percent)
    pair = (comparison.ahead, comparison.behind)
    if comparison.measure in ("stop_step", "catch_up_step"):
        steps = [values(networks, comparison.measure, arm, level) for arm in pair]
        return steps_in_words(*steps), decide_steps(*steps)
    lead = leads(networks, *pair, level, comparison.measure)
    return points(lead), decide(lead, comparison.margin)


def why_untested(networks: pd.DataFrame, comparison: Comparison) -> str:
    """Why a run cannot test a comparison; nothing where it can."""
    compared = (comparison.ahead, comparison.behind)
    for arm in compared:
        if arm not in ("dense", *arms_of(networks)):
            return f"no {arm} networks"
    level = level_near(networks, comparison.percent)
    if abs(math.log(remaining(networks, level) / comparison.percent)) > math.log(1.25):
        return f"no level near {comparison.percent} %"
    if np.isnan(leads(networks, *compared, level)).any():
        return "has more weights"
    if all(np.isinf(np.median(values(networks, comparison.measure, arm, level))) for arm in compared):
        return "not reached by most networks"
    return ""


def matching(networks: pd.DataFrame, arm: str, level: int) -> str:
    """Whether an arm "matches" the dense networks at a level, is "below" them, or "undecided"."""
    lead = leads(networks, arm, "dense", level)
    if decide(lead, MATCHING_MARGIN) == "yes":
        return "matches"
    return "below" if decide(lead) == "no" else "undecided"


# ---- Summary ---------------------------------------------------------------------------------------------------------

def label(results: Results, arm: str) -> str:
    """What an arm is called in the tables and figures of this run."""
    if arm == "dense":
        return "dense network"
    words = as_rewound(results, ARM_TABLE[arm].label)
    # Where they come from is known from the summary: all that there is when a folder is drawn again.
    found = re.search(r"^Transferred tickets: DATASET = '(\w+)'", results.provenance, re.MULTILINE)
    if arm == "transfer" and found and found[1] != results.constants["DATASET"]:
        words = f"ticket from {found[1].replace('FashionMNIST', 'Fashion-MNIST')}"
    return words


def as_rewound(results: Results, text: str) -> str:
    """A text on original weights, as it is true of a run that rewinds to a later step: there it names that step."""
    step = results.constants["REWIND_STEP"]
    if step > 0:
        text = re.sub("original (initial )?weights", f"weights of step {step}", text)
        text = text.replace("original values", f"values of step {step}")
        text = text.replace("untrained tickets", f"tickets at step {step}")
    return text


def run_in_words(results: Results) -> str:
    """What identifies a run."""
    constants = results.constants
    pixels = {"standardised": "standardised pixels", "unit_interval": "pixels from 0 to 1",
              "unit_length": "images of unit length"}[constants["PIXELS"]]
    words = [constants["DATASET"].replace("FashionMNIST", "Fashion-MNIST"), build_network(constants["MODEL"], 0).name,
             pixels, count(constants["EPOCHS"], "epoch")]
    if constants["REWIND_STEP"] > 0:
        words.append(f"rewound to step {constants['REWIND_STEP']}")
    return ", ".join(words)


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def left(results: Results, level: int) -> str:
    """Weights remaining in the ticket at a level."""
    return f"{remaining(results.networks, level):.1f} %"


def mean_accuracy(networks: pd.DataFrame, column: str, arm: str, level: int) -> str:
    """Mean over the trials, in percent."""
    return f"{values(networks, column, arm, level).mean() / 1e4:.2f}"


def points(differences: np.ndarray) -> str:
    """Mean of differences (trials,), and half its 95 % interval where there is one."""
    if np.isnan(differences).any():
        return "has more weights"
    return "{:+.2f} ± {:.2f}".format(*interval(differences)).removesuffix(" ± nan")


def median_step(steps: np.ndarray) -> str:
    """Median of steps (trials,)."""
    return f"{np.median(steps):.0f}".replace("inf", "not reached")


def steps_in_words(first: np.ndarray, second: np.ndarray) -> str:
    """How much sooner the first of two steps comes, both (trials,)."""
    sooner = (first < second).sum()
    words = f"sooner in {sooner} of {len(first)}; medians {median_step(first)} and {median_step(second)}"
    later = np.median(first) / np.median(second) - 1        # -1 or infinite where a median was not reached
    if -1 < later < math.inf and later != 0:
        words += f", {100 * abs(later):.0f} % {'later' if later > 0 else 'earlier'}"
    return words


def matches_in_words(results: Results, arm: str) -> tuple[str, str]:
    """Down to where an arm matches the dense networks, and from where on it is below them."""
    down_to = "at no level"
    below = ""
    for level in levels_of(results.networks)[1:]:
        answer = matching(results.networks, arm, level)
        if answer == "matches":
            down_to = f"down to {left(results, level)} of the weights"
        if answer != "below":
            below = ""
        elif not below:
            below = left(results, level)
    return down_to, below


def verdict(results: Results) -> list[str]:
    """The answer in plain words: sentences."""
    networks = results.networks
    arms = arms_of(networks)
    dense = values(networks, "stop_accuracy", "dense", 0) / 1e4
    sentences = [f"Dense networks reach {dense.mean():.2f} % test accuracy at early stop (mean of "
                 f"{count(len(dense), 'trial')}, {dense.min():.2f} to {dense.max():.2f})."]
    if not arms:
        return sentences
    if len(dense) < 3:
        sentences.append("Fewer than three trials decide nothing.")
    for arm in MAIN:
        if arm in arms and len(dense) >= 3:
            down_to, below = matches_in_words(results, arm)
            sentence = f"Networks {label(results, arm)} match the dense ones {down_to}"
            if below:
                sentence += f", and are below them from {below} on"
            sentences.append(f"{sentence}.")

    level = level_near(networks, 21.1)
    where = f"With {left(results, level)} of the weights"
    rivals = {"dense": "dense networks", "reinit": "re-initialised ones",
              "transfer": f"those with a {label(results, 'transfer')}"}
    lead_over = [f"{points(leads(networks, 'rewind', arm, level))} over {words}"
                 for arm, words in rivals.items() if arm in ("dense", *arms)]
    sentences.append(f"{where}, the ticket's lead in points is {', '.join(lead_over)}.")
    if len(arms) > 3 and len(dense) >= 3:
        sentences.append(f"{where}, the ticket is ahead of {beaten(networks, level)}.")
    start = mean_accuracy(networks, "start_accuracy", "rewind", level)
    sentences.append(as_rewound(results, f"{where}, untrained tickets, masked only, have {start} % test accuracy."))
    return sentences


def beaten(networks: pd.DataFrame, level: int) -> str:
    """How many arms the ticket is ahead of."""
    others = arms_of(networks)[1:]
    ahead_of = [arm for arm in others if decide(leads(networks, "rewind", arm, level)) == "yes"]
    if ahead_of == others:
        return "all other arms"
    return f"{len(ahead_of)} of {len(others)} other arms"


def markdown(table: pd.DataFrame) -> str:
    """A table of words, without its index; nothing where it has no rows."""
    if table.empty:
        return ""
    lines = [table.columns, ["---"] * len(table.columns), *table.to_numpy()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"


def claims(results: Results) -> str:
    """A table of the claims that this run can test, and why it cannot test the others."""
    networks = results.networks
    rows = []
    untested = []
    for comparison in CLAIMS:
        reason = why_untested(networks, comparison)
        if reason:
            untested.append(f"{comparison.claim} ({reason})")
            continue
        level = level_near(networks, comparison.percent)
        ours, answer = compare(networks, comparison)
        answer = {"yes": "borne out", "no": "contradicted"}.get(answer, answer)
        rows.append([comparison.claim, left(results, level), comparison.published, ours, answer])
    text = markdown(pd.DataFrame(rows, columns=["claim", "weights remaining", "the paper", "here", "answer"]))
    if untested:
        text += f"Not tested here: {'; '.join(untested)}.\n\n"
    return text


def answers(results: Results) -> str:
    """A table of the questions to the other arms, answered at a few levels."""
    networks = results.networks
    arms = arms_of(networks)
    names = {arm: f"{label(results, arm)} (`{arm}`)" for arm in arms}
    table = pd.DataFrame([[asked.claim, names[asked.ahead], names[asked.behind]] for asked in questions(arms, 21.1)],
                         columns=["question", "lead of", "over"])
    for level in levels_near(networks, 21.1, 7.0, 3.6):
        table[f"at {left(results, level)}"] = [
            why_untested(networks, asked) or ": ".join(compare(networks, asked))
            for asked in questions(arms, remaining(networks, level))]
    return markdown(table)


def level_table(results: Results, arms: list[str]) -> str:
    """A row per level of some arms; more is said of the two main ones."""
    networks = results.networks
    levels = levels_of(networks)[1:]
    with_steps = early_stops_reached(networks)
    table = pd.DataFrame({"weights remaining": [left(results, level) for level in levels]})
    for arm in arms:
        table[f"{arm}, %"] = [mean_accuracy(networks, "stop_accuracy", arm, level) for level in levels]
        if arm in MAIN:
            table[f"{arm} - dense"] = [
                f"{points(leads(networks, arm, 'dense', level))}, {matching(networks, arm, level)}" for level in levels]
        if arm != "rewind":
            table[f"rewind - {arm}"] = [points(leads(networks, "rewind", arm, level)) for level in levels]
        if with_steps:
            table[f"{arm}, step"] = [median_step(values(networks, "stop_step", arm, level)) for level in levels]
    if "rewind" in arms:
        table["rewind, masked only, %"] = [
            mean_accuracy(networks, "start_accuracy", "rewind", level) for level in levels]
    return markdown(table)


def early_stops_reached(networks: pd.DataFrame) -> bool:
    """Whether most of the ticket's early stops were reached, at most levels."""
    return np.isfinite(networks.loc["rewind", "stop_step"].groupby("level").median()).mean() > 0.5


HOW_TO_READ = f"""![Test accuracy versus weights remaining](comparison_plot.png)

- *Rewind* is the ticket: the surviving connections with their original initial weights. *Reinit* has the same
  connections with a fresh draw of weights.
- Accuracies are mean test accuracies at *early stop*, the evaluation with the lowest validation loss; "end" is after
  the last step. Steps are medians. If the lowest loss comes in the last 5 % of the training, or at one of the last two
  evaluations, the step of early stop counts as not reached. A network *catches up* at its first evaluation with the
  validation accuracy that its trial's dense network ends at.
- Differences are taken within each trial, in points: their mean ± half of its 95 % interval (Student's t). Intervals
  hold for one test set and one validation split, and each level by itself.
- An arm *matches* the dense networks where the whole interval lies above -{MATCHING_MARGIN} points; else it is *below*
  them where the whole of it lies under 0. "Down to" names the sparsest level that matches, "from ... on" the first of
  those that are all below; single levels between may be anything.
- A claim is *borne out*, a question answered *yes*, where the whole interval lies above 0 (for "match", "enough",
  "carry over" and "lose nothing": above -{MATCHING_MARGIN}); *contradicted*, or *no*, where all of it is below that.
  On steps an exact sign test decides (one-sided, 5 %). All else is *undecided*. It is the direction that is tested, not
  the size. "Beat" means more accurate; the paper's figures are for LeNet-300-100 on MNIST, by its own protocol.
"""


def summary(results: Results) -> str:
    """summary.md: the verdict, the picture, the claims and questions with their answers, a row per level, constants."""
    constants = results.constants
    arms = arms_of(results.networks)
    others = [arm for arm in arms if arm not in MAIN]
    finished = levels_of(results.networks)[-1]
    text = f"# {run_in_words(results)}, {count(constants['TRIALS'], 'trial')}: {', '.join(arms) or 'dense'}\n\n"
    if finished < constants["LEVELS"]:
        text += f"**Unfinished: these are levels 0 to {finished} of {constants['LEVELS']}.**\n\n"
    text += "\n".join(f"- {sentence}" for sentence in verdict(results)) + "\n\n"
    if arms:
        text += as_rewound(results, HOW_TO_READ)
        if constants["REWIND_STEP"] > 0:
            early = ", ".join(arm for arm in ARM_TABLE if not ARM_TABLE[arm].late)
            text += f"- From step 0 start, whatever the others are rewound to: {early}.\n"
        text += "\n## The paper's claims\n\n" + claims(results)
        if others:
            text += "## What the other arms tell\n\n" + as_rewound(results, answers(results))
        text += "## Level by level\n\n" + level_table(results, [arm for arm in arms if arm not in others])
        if others:
            text += f"<details>\n<summary>The other arms</summary>\n\n{level_table(results, others)}</details>\n\n"
    lines = "\n".join(f"{name} = {value!r}" for name, value in constants.items())
    return text + f"## Constants and versions\n\n```\n{lines}\n```\n\n" + results.provenance.rstrip("\n") + "\n"


# ---- Figures ---------------------------------------------------------------------------------------------------------

STYLE = {
    "font.size": 13, "xtick.labelsize": 12, "ytick.labelsize": 12, "figure.titlesize": 16, "figure.titleweight": "bold",
    "axes.titlesize": 13, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "0.5", "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "0.88"}
GREY = "0.35"                         # of the dense networks, and of what belongs to no arm


def draw_figures(results: Results) -> dict[str, Figure]:
    """Every figure that the run gives, by file name."""
    arms = arms_of(results.networks)
    drawn = [learning_curves]
    if arms:
        drawn += [comparison_plot, accuracy_plot_iterative, supermask_plot]
    if "reinit" in arms:
        drawn.append(accuracy_plot_reinit)
    if len(arms) > 2:
        drawn.append(leads_plot)
    if arms and early_stops_reached(results.networks):
        drawn.append(early_stopping_plot)
    if arms and results.first_layer is not None:
        drawn.append(mask_plot)
    return {f"{plot.__name__}.png": plot(results) for plot in drawn}


def new_figure(title: str, grey: str, panels: list[str], size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of a size (inches) and its row of axes: a title, a grey line under it, panels."""
    figure = Figure(figsize=size, layout="constrained")     # apart from pyplot: a notebook's own figures stay
    figure.suptitle(wrap(title, min(75, int(6.8 * size[0]))), x=0.012, ha="left")
    body = figure.subfigures()
    body.suptitle(wrap(grey, int(11 * size[0])), x=0.012, ha="left", color="0.4", size=12, weight="normal")
    row = body.subplots(1, len(panels), squeeze=False)[0]
    for axes, words in zip(row, panels, strict=True):
        axes.set_title(words)
    return figure, row


def shown_of(results: Results, shown: str) -> str:
    """What identifies the run, and what is shown of its trials."""
    return f"{run_in_words(results)}; {shown} of {count(results.constants['TRIALS'], 'trial')}"


def wrap(words: str, letters: int) -> str:
    """Lines of so many letters at most; a number and its % stay together."""
    return textwrap.fill(words.replace(" %", "\u00a0%"), letters, break_on_hyphens=False)


def drawn_as(arm: str) -> dict:
    """How an arm is drawn in every figure; the two main arms are the boldest."""
    if arm == "dense":
        return {"color": GREY, "linestyle": "--"}
    style = {"color": ARM_TABLE[arm].colour, "marker": ARM_TABLE[arm].marker, "markeredgecolor": "white"}
    if arm in MAIN:
        return style | {"linewidth": 2.8, "markersize": 9, "zorder": 3}
    return style | {"linewidth": 1.6, "markersize": 7, "zorder": 2.5}


def name_lines(axes: Axes, names: list[tuple[float, str, str]]) -> None:
    """Write names, (end of the line, words, colour), beside axes with limits and scale; none overlaps another."""
    inches = 0.66 * axes.figure.figure.get_figheight()                # about the axes' own height
    names = [(end, wrap(words, 24), colour) for end, words, colour in sorted(names)]
    ends = np.array([(axes.transScale + axes.transLimits).transform((1, end))[1] for end, _, _ in names])
    sizes = np.array([(0.2 * words.count("\n") + 0.22) / inches for _, words, _ in names])
    places = ends.copy()
    for _ in range(500):
        overlaps = ((sizes[1:] + sizes[:-1]) / 2 - np.diff(places)).clip(min=0)
        places[1:] += overlaps / 3
        places[:-1] -= overlaps / 3
        places = places.clip(sizes / 2 - 0.1, 1 - sizes / 2)
    for (_, words, colour), end, place in zip(names, ends, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(words, (1, end), (1.04, place), "axes fraction", color=colour, size=12, va="center",
                      annotation_clip=False, arrowprops=line)


def scale_weights_remaining(axes: Axes, networks: pd.DataFrame) -> None:
    """Log axis of the weights remaining, from 100 % on the left to the sparsest level."""
    sparsest = networks["weights_remaining"].min()
    ticks = (100, 50, 20, 10, 5, 3, 2, 1, 0.5, 0.2, 0.1)
    if sparsest > 40:
        ticks = (100, 90, 80, 70, 60, 50)
    ticks = [tick for tick in ticks if tick > 0.98 * sparsest]
    axes.set(xscale="log", xlim=(107, sparsest / 1.03), xlabel="weights remaining (%)")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def draw_arm(axes: Axes, results: Results, arm: str, column: str, visible: bool = True) -> tuple[float, str, str]:
    """Draw mean accuracies (and the main arms' ranges) or median steps; out come end, name and colour of the line."""
    networks = results.networks
    levels = levels_of(networks)
    percents = [remaining(networks, level, "rewind" if arm == "dense" else arm) for level in levels]
    there = np.stack([values(networks, column, arm, level) for level in levels])
    if column in ("stop_step", "catch_up_step"):
        middle = np.minimum(np.median(there, 1), 1.1 * results.records["step"].max())
    else:
        there = there / 1e4
        middle = there.mean(1)
        if arm in MAIN:
            axes.fill_between(percents, there.min(1), there.max(1), color=ARM_TABLE[arm].colour, alpha=0.2,
                              linewidth=0, visible=visible)
    axes.plot(percents, middle, visible=visible, **drawn_as(arm))
    return middle[-1], label(results, arm), drawn_as(arm)["color"]


def accuracy_limits(networks: pd.DataFrame, arms: list[str]) -> tuple[float, float]:
    """The accuracies from which to which some arms are shown: at most twice the range of the main ones."""
    main = networks.loc[networks.index.isin(["dense", *MAIN], "arm"), "stop_accuracy"] / 1e4
    means = networks.loc[arms, "stop_accuracy"].groupby(["arm", "level"]).mean() / 1e4
    high = max(main.max(), means.max())
    low = max(min(main.min(), means.min()), high - 2 * max(np.ptp(main), 0.5))
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def accuracy_plot(results: Results, shown: list[str]) -> Figure:
    """Test accuracy at early stop versus weights remaining. All arms have their place, those shown are drawn."""
    networks = results.networks
    arms = arms_of(networks)
    same_mask = [arm for arm in arms if arm in MAIN or ARM_TABLE[arm].controls in ("weights", "both")]
    other_mask = [arm for arm in arms if arm in MAIN or ARM_TABLE[arm].controls in ("mask", "both")]
    panels = {"": arms}
    if len(arms) > 4 and arms not in (same_mask, other_mask):
        panels = {"Same connections, other weights": same_mask, "Other connections": other_mask}
        if shown != arms:                                   # of single arms, the main ones, both panels have the same
            panels = {"": same_mask}
    size = (14, 6.4) if len(panels) > 1 else (10, 5.6)

    grey = shown_of(results, "means, and ranges where shaded,")
    figure, row = new_figure(accuracy_title(results, shown), grey, list(panels), size)
    for axes, there in zip(row, panels.values(), strict=True):
        scale_weights_remaining(axes, networks)
        low, high = accuracy_limits(networks, there)
        axes.set(ylim=(low, high), ylabel="test accuracy at early stop (%)")
        names = []
        for arm in ("dense", *there):
            end, words, colour = draw_arm(axes, results, arm, "stop_accuracy", visible=arm in ("dense", *shown))
            if arm == "dense":
                words = f"{words}, {end:.2f} %"
            elif end < low:
                words = f"{words}, {end:.1f} % ↓"
            if arm not in ("dense", *shown):
                colour = "none"                             # the name keeps its room: the axes stay the same
            names.append((max(end, low), words, colour))
        name_lines(axes, names)
    return figure


def accuracy_title(results: Results, shown: list[str]) -> str:
    """Down to where the main arms among those shown match the dense networks: two lines in every picture."""
    names = [label(results, arm) for arm in MAIN if arm in shown]
    if results.constants["TRIALS"] < 3:
        return f"Networks {' or '.join(names)}: too few trials to tell what matches"
    title = f"Networks {names[0]} match the dense ones {matches_in_words(results, shown[0])[0]}"
    second = "transfer" if "transfer" in shown else "reinit"
    if second not in shown or shown == [second]:
        return title

    down_to, below = matches_in_words(results, second)
    who = "re-initialised ones"
    are = "are"
    if second == "transfer":
        title = title.removesuffix(" of the weights")
        who = f"a {label(results, 'transfer')}"
        are = "is"
    if below:
        return f"{title}; {who} {are} below from {below} on"
    return f"{title}, {who} {down_to}"


def comparison_plot(results: Results) -> Figure:
    """All arms."""
    return accuracy_plot(results, arms_of(results.networks))


def accuracy_plot_iterative(results: Results) -> Figure:
    """The ticket, on the axes of the comparison."""
    return accuracy_plot(results, ["rewind"])


def accuracy_plot_reinit(results: Results) -> Figure:
    """The re-initialised networks, on the axes of the comparison."""
    return accuracy_plot(results, ["reinit"])


def supermask_plot(results: Results) -> Figure:
    """Test accuracy before an arm's first step: what its mask and its weights are good for without training."""
    networks = results.networks
    best = networks["start_accuracy"].groupby(["arm", "level"]).mean().groupby("arm").max() / 1e4
    title = as_rewound(results, "untrained tickets").capitalize() + f" have up to {best['rewind']:.1f} % test accuracy"
    figure, (axes,) = new_figure(title, shown_of(results, "means, and ranges where shaded,"), [""], (10, 5.6))
    scale_weights_remaining(axes, networks)
    axes.set(ylim=(0, 100), ylabel="test accuracy when masked only (%)")
    axes.axhline(10, color=GREY, linestyle=":")
    arms = [arm for arm in arms_of(networks) if arm != "finetune"]              # that one has been trained
    ends = {arm: draw_arm(axes, results, arm, "start_accuracy") for arm in arms}
    guessing = [label(results, arm) for arm in arms if best[arm] < 20]
    chance = "chance (10 %)"
    if guessing:
        chance += f": {'; '.join(guessing)}"
    name_lines(axes, [(10, chance, GREY), *[ends[arm] for arm in arms if best[arm] >= 20]])
    return figure


def leads_plot(results: Results) -> Figure:
    """The ticket's lead over each arm at a few levels, sorted by the first one: means and 95 % intervals."""
    networks = results.networks
    levels = levels_near(networks, 21.1, 7.0, 3.6)
    panels = [f"{left(results, level)} of the weights" for level in levels]
    arms = sorted(arms_of(networks)[1:], key=lambda arm: -values(networks, "stop_accuracy", arm, levels[0]).mean())
    behind = [f'"{label(results, arm)}"' for arm in arms if decide(leads(networks, arm, "rewind", levels[0])) == "yes"]
    title = f"With {panels[0]}, the ticket is ahead of {beaten(networks, levels[0])}"
    if len(behind) in (1, 2):
        title += f", behind {' and '.join(behind)}"
    if results.constants["TRIALS"] < 3:
        title = "The ticket's lead over other arms: too few trials to tell"
    figure, row = new_figure(title, shown_of(results, "differences in test accuracy: means and 95 % intervals"), panels,
                             (14, 2.8 + 0.42 * len(arms)))
    for axes, level in zip(row, levels, strict=True):
        axes.axvline(0, color=GREY, linestyle="--")
        for place, arm in enumerate(arms):
            mean, half = interval(leads(networks, "rewind", arm, level))
            look = drawn_as(arm) | {"markersize": 6, "markeredgecolor": "none", "linewidth": 1.6}
            axes.errorbar(mean, place, xerr=half, capsize=6, **look)               # a narrow interval shows, too
        axes.set(yticks=[], ylim=(-0.6, len(arms) - 0.4), xlabel="lead of the ticket (points)")
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    row[0].set_yticks(range(len(arms)), [label(results, arm) for arm in arms])
    return figure


def leads_over_dense(runs: list[Results]) -> Figure:
    """The ticket's lead over the dense networks in several runs. They are named by what they do not share, or by their
    folders where that would leave one without a name or two with the same."""
    words = [[*run_in_words(run).split(", "), count(run.constants["TRIALS"], "trial")] for run in runs]
    shared = [word for word in words[0] if all(word in others for others in words)]
    names = [", ".join(word for word in own if word not in shared) for own in words]
    if "" in names or len(set(names)) < len(runs):
        names = [run.constants["RESULTS_DIR"] for run in runs]

    near = [leads(run.networks, "rewind", "dense", level_near(run.networks, 13.5)).mean() for run in runs]
    where = left(runs[0], level_near(runs[0].networks, 13.5))
    title = f"Near {where} of the weights, tickets' mean lead is {min(near):+.2f} to {max(near):+.2f} points, by run"
    figure, (axes,) = new_figure(title, f"{', '.join(shared)}; means and 95 % intervals", [""], (10, 5.6))
    scale_weights_remaining(axes, pd.concat([run.networks for run in runs]))
    axes.axhline(0, color=GREY, linestyle="--")

    ends = []
    for n, colour in enumerate(sns.color_palette("crest", len(runs))):
        networks = runs[n].networks
        levels = levels_of(networks)[1:]
        percents = [remaining(networks, level) * 1.02**n for level in levels]           # side by side
        intervals = np.array([interval(leads(networks, "rewind", "dense", level)) for level in levels])
        axes.errorbar(percents, intervals[:, 0], intervals[:, 1], color=colour, marker="os^DvX"[n % 6], capsize=3)
        ends.append((intervals[-1, 0], names[n], colour))
    axes.set(ylim=axes.get_ylim(), ylabel="lead over dense networks (points)")
    name_lines(axes, ends)
    return figure


def learning_curves(results: Results) -> Figure:
    """Test accuracy while training, at a few levels."""
    networks = results.networks
    levels = levels_near(networks, 51.3, 21.1, 7.0, 3.6)
    title_level = level_near(networks, 21.1)
    step, means = early_accuracies(results, title_level)
    title = f"At step {step}, dense networks have {means['dense']:.1f} % test accuracy"
    if "rewind" in means:
        title += f", tickets with {left(results, title_level)} of the weights {means['rewind']:.1f} %"
    if "reinit" in means:
        title += f", re-initialised ones {means['reinit']:.1f} %"
    figure, row = new_figure(title, shown_of(results, "means, and ranges where shaded,"),
                             [f"{left(results, level)} of the weights" for level in levels],
                             (max(10, 2.5 + 3.1 * len(levels)), 5.8))
    for axes, level in zip(row, levels, strict=True):
        names = learning_panel(axes, results, level)
        axes.axvline(step, color="0.8", zorder=0)                       # the title speaks of this step
        axes.tick_params(labelleft=axes is row[0])
    row[0].set(ylabel="test accuracy (%), stretched towards 100")
    name_lines(row[-1], names)
    return figure


def early_accuracies(results: Results, level: int) -> tuple[int, pd.Series]:
    """An early step, 100 where it can be, and the mean test accuracies then: of dense networks, and arms at a level."""
    records = results.records
    rows = records[(records["level"] == level) | (records["arm"] == "dense")]
    means = rows.pivot_table(index="step", columns="arm", values="test_accuracy").dropna()
    late = means.index[means.index >= max(100, results.constants["REWIND_STEP"] + 1)]
    step = late.min() if len(late) > 0 else means.index.max()
    return step, means.loc[step]


def learning_panel(axes: Axes, results: Results, level: int) -> list[tuple[float, str, str]]:
    """The learning curves of a level; the axes are stretched at the first steps and towards 100 %."""
    records = results.records
    names = []
    for arm in ("dense", *arms_of(results.networks)):
        rows = records[(records["arm"] == arm) & (records["level"].isin([level, 0]))]
        sns.lineplot(rows, x="step", y="test_accuracy", ax=axes, markevery=1 + rows["step"].nunique() // 10,
                     errorbar=("pi", 100) if arm in MAIN else None, **drawn_as(arm))
        end = values(results.networks, "final_accuracy", arm, level).mean() / 1e4
        names.append((end, label(results, arm), drawn_as(arm)["color"]))

    steps = np.unique(records["step"])
    ticks = [0, steps[1], *[tick for tick in (100, 1_000, 10_000, 100_000) if steps[1] < tick <= steps[-1]]]
    axes.set_xscale("symlog", linthresh=steps[1], linscale=0.4)
    axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_yscale("function", functions=(
        lambda percent: -np.log(np.maximum(100.5 - percent, 1e-9)), lambda y: 100.5 - np.exp(-y)))
    axes.set_yticks([10, 50, 70, 80, 85, 90, 95, 98, 99])
    axes.minorticks_off()
    axes.set(xlim=(0, 1.05 * steps[-1]), xlabel="training step (log)", ylabel="")
    axes.set_ylim(0, min(99.8, records["test_accuracy"].max() + 0.3))
    return names


def early_stopping_plot(results: Results) -> Figure:
    """Median steps of early stop, and of catching up with the dense networks, versus weights remaining."""
    last = results.records["step"].max()
    level = level_near(results.networks, 21.1)
    stops = []
    for arm, words in {"rewind": "tickets", "reinit": "re-initialised networks", "dense": "dense ones"}.items():
        if arm in results.networks.index.unique("arm"):
            step = median_step(values(results.networks, "stop_step", arm, level))
            stops.append(f"in {words} at step {step}".replace("at step not reached", "not before the end"))
    title = f"With {left(results, level)} of the weights, validation loss is lowest {', '.join(stops)}"
    panels = {"stop_step": "Step of the lowest validation loss",
              "catch_up_step": "First step at the dense network's final validation accuracy"}
    figure, row = new_figure(title, shown_of(results, "medians"), list(panels.values()), (14, 6))
    for axes, column in zip(row, panels, strict=True):
        scale_weights_remaining(axes, results.networks)
        axes.set(ylim=(0, 1.2 * last), ylabel="training step")
        ticks = [tick for tick in axes.get_yticks() if tick <= last]
        axes.set_yticks([*ticks, 1.1 * last], [*[f"{tick:.0f}" for tick in ticks], "not by\nthe end"])
        arms = ("dense", *arms_of(results.networks))
        name_lines(axes, [draw_arm(axes, results, arm, column) for arm in arms])
    return figure


def mask_plot(results: Results) -> Figure:
    """Where weights of the first layer remain: the share left at each pixel over the mean of all pixels."""
    levels = levels_near(results.networks, 51.3, 21.1, 7.0, 3.6)
    panels = [f"{left(results, level)} of the weights" for level in levels]
    shares = [masks_at({"first": results.first_layer}, level)["first"].mean((0, 1)) for level in levels]
    bright = results.image.flatten().topk(len(shares[-1]) // 4).indices
    held = 100 * shares[-1][bright].sum() / shares[-1].sum()
    title = f"With {panels[-1]}, the brightest quarter of the pixels has {held:.0f} % of the first layer's connections"
    panels = ["mean training image", *panels]
    figure, row = new_figure(title, shown_of(results, "means"), panels, (max(10, 2.7 * len(panels) + 1.2), 4.3))
    row[0].imshow(results.image.numpy(), cmap="gray")
    for axes, share in zip(row[1:], shares, strict=True):
        relative = (share / share.mean()).clip(0.5, 2).view(28, 28).numpy()
        picture = axes.imshow(relative, cmap="PuOr_r", norm=LogNorm(0.5, 2))
    for axes in row:
        axes.set_axis_off()
    bar = figure.colorbar(picture, ax=row[-1], label="connections kept")
    bar.set_ticks([0.5, 1, 2], labels=["half\nor less", "average", "twice\nor more"])
    bar.minorticks_off()
    return figure


# ---- Files -----------------------------------------------------------------------------------------------------------

FIGURES = ("accuracy_plot_iterative.png", "accuracy_plot_reinit.png", "comparison_plot.png", "early_stopping_plot.png",
           "leads_plot.png", "learning_curves.png", "mask_plot.png", "supermask_plot.png")
RESULT_FILES = ("metrics.csv", "tickets.pt", "summary.md", *FIGURES)

# The version of what computes, taken when the module is loaded: the file may be edited while it runs. The constants
# are no part of it; they are compared one by one.
SOURCE = Path(__file__).read_text(encoding="utf-8")
VERSION = hashlib.sha256(SOURCE.split("\n# ---- Experiment")[1].split("\n# Here ends")[0].encode()).hexdigest()


def beside_script(path: str | Path) -> Path:
    """The path itself if absolute, else taken from the folder of this script."""
    return Path(__file__).resolve().parent / os.path.expanduser(path)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait while another process reads or unpacks data in the folder; give up on a host that does not answer."""
    with contextlib.ExitStack() as at_end:
        at_end.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(30)                        # seconds; torchvision itself would wait for ever
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError, OSError):     # on Windows, and in network folders that know no locks
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            at_end.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)              # even a killed process gives it back
        yield


def write_whole(path: Path, content: bytes | dict) -> None:
    """Write a file, by torch.save if it is tensors, under a name of its own, then rename it: nobody sees half a file,
    whatever ends this process."""
    if isinstance(content, dict):
        buffer = io.BytesIO()                               # on a full disk, torch.save would hide the OSError
        torch.save(content, buffer)
        content = buffer.getvalue()
    unfinished = path.with_name(f".unfinished-{uuid.uuid4().hex}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())                         # on the disk before its name: power may fail, too
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_saved(path: Path) -> dict:
    """What torch.save wrote to a file, on the CPU. Raises OSError, or where the file is damaged any of many errors."""
    content = io.BytesIO(path.read_bytes())
    if zipfile.ZipFile(content).testzip() is not None:      # torch.load itself takes flipped bits for weights
        raise zipfile.BadZipFile("wrong sum")
    content.seek(0)
    return torch.load(content, map_location="cpu", weights_only=True)


# ---- A results folder holds one run ----------------------------------------------------------------------------------

def prepare_results_folder() -> Path:
    """RESULTS_DIR, made where it is missing; found out before the work if it cannot be written to."""
    folder = beside_script(RESULTS_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"the results folder {folder} cannot be written to ({error.strerror}): "
                        "choose another RESULTS_DIR.") from None
    return folder


def identity(device: torch.device) -> dict:
    """What two runs have in common if one can go on with the other's results: the constants that numbers depend on,
    and what computes them. The number of threads is no part of it: it changes no bit of an MLP."""
    settings = {name: value for name, value in constants().items()
                if name not in ("LEVELS", "DATA_DIR", "RESULTS_DIR", "DEVICE")}
    if TICKETS_FROM is not None:                            # what counts is the tickets, not where they lie
        settings["TICKETS_FROM"] = hashlib.sha256(beside_script(TICKETS_FROM).read_bytes()).hexdigest()
    return settings | {"version of the script": VERSION, "data": CONTENTS[DATASET], "torch": str(torch.__version__),
                       "kind of device": device.type}


def read_checkpoint(folder: Path) -> tuple[dict, State]:
    """Whose the folder's checkpoint is, and its state; nobody's, and a new one, where there is none that is whole."""
    path = folder / "checkpoint.pt"
    try:
        saved = read_saved(path)
        return saved["identity"], State(**saved["state"])
    except Exception as error:                              # a damaged file can fail in any way
        if isinstance(error, OSError) and path.exists():    # such as a disk that is away for the moment
            raise
    return {}, State()


def load_state(folder: Path, own: dict) -> State:
    """The state to go on from: the checkpoint's if it is of this run, else a new one. Says which, and why."""
    path = folder / "checkpoint.pt"
    found, state = read_checkpoint(folder)
    if found == own and state.level < LEVELS:
        say(f"going on after level {state.level} of {LEVELS}, kept in {path}")
    elif found == own:
        say(f"nothing is left to train: summary and figures are drawn again from {path} (without it, the same command "
            "trains afresh)")
    elif found:
        others = sorted(name for name in own | found if own.get(name) != found.get(name))
        say(f"{folder} holds another run (with another {', another '.join(others)}): its files will be moved to "
            "previous/ in it")
    elif path.exists():
        say(f"{path} is damaged: it will be moved to previous/, and this run starts afresh")
    return state if found == own else State()


def save_state(state: State, folder: Path, own: dict) -> None:
    """Write the checkpoint, of several processes the first. Before a run's first one, another run's files make room."""
    if process()[0] > 0:
        return
    path = folder / "checkpoint.pt"
    existed = path.exists()                                 # asked first: another process may save one just now
    found, there = read_checkpoint(folder)
    if found == own and there.level >= state.level:         # the same command, started twice, is ahead
        return
    if found not in ({}, own) and state.level > 0:
        raise UserError(f"another run has begun in {folder} meanwhile: choose another RESULTS_DIR for one of the two.")
    if found != own and state.level == 0:
        same_numbers = existing_metrics(folder).startswith(metrics_of(state.records))
        if existed or not same_numbers:
            move_to_previous(folder, ["checkpoint.pt", *RESULT_FILES])
    write_whole(path, {"identity": own, "state": vars(state)})


def metrics_of(records: list[dict]) -> bytes:
    """Records as the contents of metrics.csv."""
    return pd.DataFrame(records).to_csv(index=False, lineterminator="\n").encode()


def existing_metrics(folder: Path) -> bytes:
    """The metrics.csv that lies in the folder; nothing where there is none."""
    path = folder / "metrics.csv"
    return path.read_bytes() if path.exists() else b""


def move_to_previous(folder: Path, names: Iterable[str]) -> None:
    """Move a run's files to previous/<time>/ in the folder."""
    previous = folder / "previous" / datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S.%f")
    for name in names:
        if (folder / name).exists():
            previous.mkdir(parents=True, exist_ok=True)
            (folder / name).rename(previous / name)
    if previous.exists():
        say(f"the results of an earlier run are now in {previous}")


def write_results(state: State, data: Dataset, own: dict, origin: str, folder: Path) -> Results:
    """Write what a state has up to LEVELS. Records and tickets, which took the work, come before all that is drawn."""
    if not metrics_of(state.records).startswith(existing_metrics(folder)):
        move_to_previous(folder, RESULT_FILES)              # metrics.csv has rows that this run's checkpoint has not
    shown = [row for row in state.records if row["level"] <= LEVELS]
    write_whole(folder / "metrics.csv", metrics_of(shown))

    theta0 = stack([state.theta_k[trial] for trial in range(TRIALS)])
    pruned_at = stack([state.pruned_at[trial] for trial in range(TRIALS)])
    for levels in pruned_at.values():
        levels[levels > LEVELS] = 0
    images = data["train"][0]
    tickets = {"constants": constants() | {"LEVELS": min(state.level, LEVELS)}, "theta0": theta0,
               "pruned_at": pruned_at, "mean_image": images.mean(0).squeeze(0).cpu()}
    write_whole(folder / "tickets.pt", tickets)

    results = read_results(folder, constants(), provenance(own, origin, images.device))
    draw(results, folder)
    return results


def read_results(folder: Path, settings: dict, below: str) -> Results:
    """What lies in a folder, as its summary and figures need it. Raises OSError or ValueError without metrics.csv."""
    records = pd.read_csv(folder / "metrics.csv")
    first_layer = None
    image = None
    with contextlib.suppress(UserError):
        tickets = load_tickets(folder / "tickets.pt")
        weights = next(iter(tickets["pruned_at"].values()))
        # Another run's may lie there, where committed results were checked out again.
        of_this_run = tickets["constants"] == settings | {"LEVELS": records["level"].max()}
        if of_this_run and weights.shape[2:] == (28 * 28,):             # a convolution's belong to no pixel
            first_layer = weights
            image = tickets["mean_image"]
    return Results(records, measure(records), settings, below, first_layer, image)


def provenance(own: dict, origin: str, device: torch.device) -> str:
    """What summary.md says below the constants: what computed the run, and on what."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = ", ".join(f"{library.__name__} {library.__version__}"
                         for library in (torch, torchvision, np, pd, matplotlib, sns))
    lines = [f"Version of the script: {VERSION} (sha256 of its text from the experiment to the banner).",
             f"Contents of {DATASET}: {CONTENTS[DATASET]} (sha256 of all images and labels).",
             f"Python {sys.version.split()[0]}, {versions}; on {machine}, {torch.get_num_threads()} CPU threads."]
    if origin:
        lines.insert(0, f"Transferred tickets: {origin}; sha256 {own['TICKETS_FROM']}.")
    return "\n".join(lines)


def draw(results: Results, folder: Path) -> None:
    """Write summary and figures, whatever style the user has set elsewhere; figures that no longer apply go."""
    write_whole(folder / "summary.md", summary(results).encode())
    with matplotlib.style.context(STYLE, after_reset=True):
        figures = draw_figures(results)
        for name, figure in figures.items():
            write_whole(folder / name, png(figure))
    for name in FIGURES:
        kept = name == "mask_plot.png" and results.first_layer is None
        if name not in figures and not kept:
            (folder / name).unlink(missing_ok=True)


def png(figure: Figure) -> bytes:
    """A figure as the contents of a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def read_folder(folder: str | Path) -> Results:
    """A results folder's run, from metrics.csv, summary.md's constants, and tickets.pt where there is one. Raises
    UserError where they cannot be read."""
    folder = beside_script(folder)
    try:
        text = (folder / "summary.md").read_text(encoding="utf-8")
        block, below = text.split("## Constants and versions\n\n```\n")[1].split("```\n", 1)
        settings = {name: ast.literal_eval(value) for name, value in re.findall(r"^(\w+) = (.*)$", block, re.M)}
        if not settings.keys() >= {"DATASET", "PIXELS", "MODEL", "EPOCHS", "TRIALS", "LEVELS", "REWIND_STEP"}:
            raise ValueError("constants are missing in summary.md")
        return read_results(folder, settings, below.strip())
    except (OSError, ValueError, SyntaxError, LookupError, TypeError) as error:
        raise UserError(f"{folder} holds no results that can be drawn ({error}): it needs metrics.csv and summary.md "
                        "of a run.") from None


def redraw(folder: str | Path) -> None:
    """Draw a results folder's summary and figures again, its mask figure only where there is tickets.pt."""
    draw(read_folder(folder), beside_script(folder))


def compare_runs(folders: list[str | Path], path: str | Path) -> None:
    """Draw the ticket's lead over the dense networks in several results folders into one PNG at the path."""
    runs = [read_folder(folder) for folder in folders]
    if not runs or any(len(levels_of(run.networks)) == 1 for run in runs):
        raise UserError("compare_runs needs one results folder or more, all of runs that have pruned.")
    with matplotlib.style.context(STYLE, after_reset=True):
        write_whole(beside_script(path), png(leads_over_dense(runs)))


# ---- Tickets that are kept -------------------------------------------------------------------------------------------

def load_tickets(path: str | Path) -> dict:
    """What a tickets.pt holds: the run's constants, theta0, the level at which each weight was pruned, and the mean
    training image. Raises UserError unless it is whole, and what this script writes."""
    try:
        tickets = read_saved(beside_script(path))
        held = tickets["constants"]
        theta0 = tickets["theta0"]
        as_plain_network(build_network(held["MODEL"], 0), pick(theta0, held["TRIALS"] - 1))     # names and shapes fit
        expected = {name: (mask.shape, torch.uint8) for name, mask in full_masks(theta0).items()}
        found = {name: (levels.shape, levels.dtype) for name, levels in tickets["pruned_at"].items()}
        if found != expected or tickets["mean_image"].shape != (28, 28) or not held.keys() >= constants().keys():
            raise ValueError
        return tickets
    except Exception as error:                              # a damaged or foreign file can fail in any way
        raise UserError(f"no tickets could be read from {path} ({type(error).__name__}): it must be the tickets.pt of "
                        "a run by this version of the script.") from None


def load_ticket(path: str | Path, trial: int, level: int) -> nn.Sequential:
    """One ticket as an ordinary network with `torch.nn.utils.prune` masks, ready to train: at its initial weights, or
    with REWIND_STEP at those after so many steps. Raises UserError for a file that is no tickets.pt, IndexError for a
    trial or a level that it does not hold."""
    tickets = load_tickets(path)
    held = tickets["constants"]
    if not (0 <= trial < held["TRIALS"] and 0 <= level <= held["LEVELS"]):
        raise IndexError(f"{path} holds trials 0 to {held['TRIALS'] - 1} and levels 0 to {held['LEVELS']}")
    network = as_plain_network(build_network(held["MODEL"], held["DROPOUT"]), pick(tickets["theta0"], trial))
    masks = masks_at(pick(tickets["pruned_at"], trial), level)
    with torch.no_grad():                                   # else the network could not be copied
        for name, layer in weighted_layers(network).items():
            torch_prune.custom_from_mask(layer, "weight", masks[f"{name}.weight"])
    return network


def tickets_from_elsewhere() -> tuple[dict[int, tuple[Weights, Levels]], str]:
    """By trial theta0 and pruned_at from TICKETS_FROM, if any, and how they were found. Raises UserError unless they
    fit the constants, keep as many weights at each level, and lie clear of this run's own."""
    if TICKETS_FROM is None:
        return {}, ""
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
    names = ("DATASET", "PIXELS", "INIT", "SEED", "PRUNE_RATE", "PRUNE_SCOPE", "REWIND_STEP", "EPOCHS", "BATCH_SIZE")
    words = ", ".join(f"{name} = {held[name]!r}" for name in names)
    found = {trial: (pick(tickets["theta0"], trial), pick(tickets["pruned_at"], trial)) for trial in range(TRIALS)}
    return found, words


# ---- Several processes, and what is said on the way ------------------------------------------------------------------

def process() -> tuple[int, int]:
    """This process's rank, and how many processes share the run. Only what torchrun started itself counts as several:
    RANK and WORLD_SIZE may be left over in an environment."""
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def connect() -> None:
    """Let the processes of a run, if they are several, find each other. After a restart by torchrun they do so under
    other names: what a killed process has left in the store would lead to nowhere."""
    if process()[1] == 1:
        return
    store, rank, processes = next(torch.distributed.rendezvous("env://"))
    store = torch.distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    forever = datetime.timedelta(days=30)                   # the slowest is waited for
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=forever)
    say(f"{processes} processes share {TRIALS} trials; shown is the progress of the first one, with "
        f"{len(own_trials())}")


def own_trials() -> list[int]:
    """The trials of this process; there may be none."""
    rank, processes = process()
    return list(range(TRIALS)[rank::processes])


def gather(found: State) -> list[State]:
    """What each process found at a level, on all of them. Where another one has ended, this one ends silently: a
    traceback of the connection would bury what that one says."""
    _, processes = process()
    parts = [found] * processes
    if processes > 1:
        try:
            torch.distributed.all_gather_object(parts, found)
        except RuntimeError:
            raise SystemExit(1) from None
    return parts


def say(text: str, stream: Any = None) -> None:
    """Print for people, of several processes on the first. What a console cannot show is replaced; a console that is
    gone, as after `| head`, gets nothing: neither is a reason to end."""
    if stream is None and process()[0] > 0:
        return
    stream = stream or sys.stdout                           # None where a program has none: print says nothing then
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress_bar(done: int) -> tqdm:
    """Print the head of the table whose lines `report_level` prints. On a terminal, show a bar over all levels after
    the one that was done last; its unit is one step of one network."""
    arms = ARMS if LEVELS > 0 else ("dense",)
    columns = "".join(f"{arm:>11}" for arm in arms)
    say(f"Test accuracy at early stop, means:\nlevel   weights remaining{columns}   time left")
    steps = EPOCHS * steps_per_epoch()
    per_level = len(own_trials()) * sum(steps - first_step(arm) for arm in ARMS)
    work = [len(own_trials()) * steps] + LEVELS * [per_level]
    visible = process()[0] == 0 and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=sum(work), initial=sum(work[:done + 1]), smoothing=0, leave=False,
                file=sys.stderr if visible else io.StringIO(),          # a disabled one keeps no time
                bar_format="{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left")


def report_level(state: State, bar: tqdm) -> None:
    """Print a line about the level that was finished last."""
    networks = measure(pd.DataFrame([row for row in state.records if row["level"] in (0, state.level)]))
    arms = ARMS if LEVELS > 0 else ("dense",)
    cells = [f"{mean_accuracy(networks, 'stop_accuracy', arm, state.level):>9} %" for arm in arms]
    minutes = (bar.total - bar.n) * bar.format_dict["elapsed"] / max(1, bar.n - bar.initial) / 60
    with tqdm.external_write_mode():
        say(f"{state.level:5}{remaining(networks, state.level):18.1f} %{''.join(cells)}{minutes:8.1f} min")


# ---- Checks of the constants -----------------------------------------------------------------------------------------

def is_path(text: str) -> bool:
    """Whether a file or folder can be called so."""
    return text != "" and "\0" not in text


def one_of(*words: str) -> tuple[type, str, Callable[[str], bool]]:
    """The check of a constant that is one of some words."""
    return str, "one of " + ", ".join(words), words.__contains__


# Of each constant: its type, what it must be, and the same as a condition
CHECKS = {
    "DATASET": one_of(*CONTENTS),
    "PIXELS": one_of("standardised", "unit_interval", "unit_length"),
    "MODEL": (str, "a name that build_network knows", bool),
    "INIT": one_of("kaiming_normal", "xavier_normal"),
    "DROPOUT": (float, "a number from 0 to 0.99", lambda share: 0 <= share <= 0.99),
    "ARMS": (tuple, "a choice, each once, of " + ", ".join(ARM_TABLE), lambda arms: (
        all(arm in list(ARM_TABLE) for arm in arms) and len(set(arms)) == len(arms))),
    "TRIALS": (int, "a whole number, 1 to 1000", lambda number: 1 <= number <= 1_000),
    "LEVELS": (int, "a whole number, 0 to 255", lambda number: 0 <= number <= 255),     # tickets.pt has 8 bits for them
    "PRUNE_RATE": (float, "a number between 0 and 1", lambda rate: 0 < rate < 1),
    "PRUNE_SCOPE": one_of("layer", "global"),
    "REWIND_STEP": (int, "a whole number, 0 or more", lambda step: step >= 0),
    "TICKETS_FROM": (str | None, "the path of a tickets.pt, or None", lambda path: path is None or is_path(path)),
    "SEED": (int, "a whole number, 0 to 2**63 - 1", lambda seed: 0 <= seed < 2**63),
    "VALIDATION_SIZE": (int, "a whole number, 1 to 59999", lambda size: 1 <= size < 60_000),
    "EPOCHS": (int, "a whole number, 1 or more", lambda number: number >= 1),
    "BATCH_SIZE": (int, "a whole number, 1 to as many as there are images to train on", lambda size: (
        1 <= size <= 60_000 - VALIDATION_SIZE)),
    "LEARNING_RATE": (float, "a number above 0", lambda rate: 0 < rate < math.inf),
    "WEIGHT_DECAY": (float, "a number of at least 0", lambda decay: 0 <= decay < math.inf),
    "CLIP_NORM": (float | None, "a number above 0, or None", lambda norm: norm is None or 0 < norm < math.inf),
    "EVAL_EVERY": (int, "a whole number, 1 or more", lambda steps: steps >= 1),
    "DATA_DIR": (str, "a folder's path", is_path),
    "RESULTS_DIR": (str, "a folder's path", is_path),
    "DEVICE": (str, "auto, cpu, cuda, cuda:1 and so on, or mps", re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch),
}


def constants() -> dict:
    """All constants as they stand, by name, in Python's own types, such as a checkpoint holds: 0 as the float it means,
    numpy's words as words."""
    found = {}
    for name, (kind, *_) in CHECKS.items():
        value = globals()[name]
        if kind in (float, float | None) and isinstance(value, int | float) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError:                           # refused like any other that is out of range
                value = math.inf
        elif isinstance(value, str):
            value = str(value)
        elif isinstance(value, tuple):
            value = tuple(str(part) if isinstance(part, str) else part for part in value)
        found[name] = value
    return found


def read_arguments(arguments: list[str]) -> dict:
    """Constants set for this run. Values are Python literals, a bare word is a string, ARMS may be rewind,shuffle."""
    found = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not (name and equals):
            raise UserError(f"{argument!r} is not of the form NAME=VALUE, such as TRIALS=1.")
        if name not in CHECKS:
            meant = difflib.get_close_matches(name.upper(), CHECKS, n=1, cutoff=0)[0]
            raise UserError(f"there is no constant {name}; did you mean {meant}?")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            value = text
        if name == "ARMS" and isinstance(value, str):
            value = tuple(value.split(","))
        elif name == "ARMS" and isinstance(value, list):
            value = tuple(value)
        elif CHECKS[name][0] in (str, str | None) and not isinstance(value, CHECKS[name][0]):
            value = text                                    # a folder may be called 2026
        found[name] = value
    return found


def check_constants() -> None:
    """Stop with one sentence where a constant is out of range, or where constants make no sense together."""
    for name, value in constants().items():
        kind, must, holds = CHECKS[name]
        if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
            raise UserError(f"{name} must be {must}, not {value!r}.")
    if "rewind" not in ARMS:
        raise UserError("ARMS must contain rewind: its networks are the ones that are pruned.")
    if ("transfer" in ARMS) != (TICKETS_FROM is not None):
        raise UserError("the arm transfer and TICKETS_FROM go together: set both or neither.")
    steps = EPOCHS * steps_per_epoch()
    if steps <= REWIND_STEP:
        raise UserError(f"REWIND_STEP must be below the {steps} steps of a training, not {REWIND_STEP}.")

    network = build_network(MODEL, DROPOUT)
    rates = prune_rates(network)
    there = {name: network.get_parameter(name).numel() for name in rates}
    if PRUNE_SCOPE == "global":
        rates = {"all layers": PRUNE_RATE}
        there = {"all layers": sum(there.values())}
    for level, name in itertools.product(range(1, LEVELS + 1), rates):
        gone = round(rates[name] * there[name])
        if not 0 < gone < there[name]:
            raise UserError(f"LEVELS={LEVELS} and PRUNE_RATE={PRUNE_RATE} do not go together: at level {level}, {gone} "
                            f"of the {there[name]} weights left in {name} would be pruned.")
        there[name] -= gone


def check_network(device: torch.device) -> None:
    """Raise UserError unless `forward` computes, for two networks at once, just what the plain network does."""
    network = build_network(MODEL, DROPOUT)
    try:
        weights = stack([initial_weights(generator("init", trial)) for trial in (0, 1)])
        weights = {name: tensor.to(device) for name, tensor in weights.items()}
        images = torch.rand(1, 3, 1, 28, 28, generator=generator("check")).to(device)
        kept = [torch.ones(1, units, 3, device=device) for units in dropped_units(network)]
        expected = torch.stack([as_plain_network(network.eval(), pick(weights, n))(images[0]) for n in (0, 1)])
        torch.testing.assert_close(forward(network.train(), weights, images, kept), expected, rtol=1e-3, atol=1e-3)
        for layer in network:
            if getattr(layer, "inplace", False) or getattr(layer, "p", DROPOUT) != DROPOUT:
                raise ValueError
    except Exception:                                       # a layer that is not served can fail in any way
        raise UserError("the network in build_network cannot be trained in a stack: use nn.Conv2d, pooling and "
                        "activations before one nn.Flatten, and after it nn.Linear, activations and, behind a linear "
                        "layer, nn.Dropout(dropout); with biases, no groups, nothing in place, the last one called "
                        "output.") from None


# ---- Main ------------------------------------------------------------------------------------------------------------

RUNNING = threading.Lock()                                  # constants are the module's: one run at a time


def run() -> None:
    """The experiment with the constants as they stand, from its checkpoint to its results."""
    check_constants()
    device = prepare_device()
    check_network(device)
    elsewhere, origin = tickets_from_elsewhere()
    own = identity(device)
    folder = prepare_results_folder()
    connect()
    data = load_dataset(device)
    state = load_state(folder, own)

    results = None
    try:
        if state.level < LEVELS:
            run_experiment(state, data, elsewhere, lambda new: save_state(new, folder, own))
    finally:                                                # whatever ends it: of finished levels there are results
        found, state = read_checkpoint(folder)
        if process()[0] == 0 and found == own:
            results = write_results(state, data, own, origin, folder)
    if process()[0] > 0:
        return
    if results is None:
        raise UserError(f"{folder / 'checkpoint.pt'} is no longer what this run saved, and no results were written: "
                        "start it again in a RESULTS_DIR of its own.")
    say("\n" + "\n".join(verdict(results)) + f"\n\nresults: {folder}")


def main(arguments: list[str]) -> None:
    """Run the experiment with some constants set by NAME=VALUE arguments; afterwards they are what they were before.
    What the machine lacks is said as plainly as what the user got wrong, by UserError. All else keeps its traceback."""
    if {"-h", "--help"} & set(arguments):
        lines = "\n".join(f"  {name} = {value!r}" for name, value in constants().items())
        say(f"{__doc__}\nConstants:\n{lines}")
        return
    if not RUNNING.acquire(blocking=False):
        raise UserError("another run is under way in this Python process: start this one in a process of its own.")
    before = {name: globals()[name] for name in CHECKS}
    try:
        globals().update(read_arguments(arguments))
        globals().update(constants())
        run()
    except OSError as error:
        raise UserError(f"{error}. Finished levels are kept: once that is mended, the same command goes on.") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise UserError("there is not enough memory: lower TRIALS, BATCH_SIZE or the number of ARMS. Finished levels "
                        "are kept.") from None
    finally:
        globals().update(before)
        RUNNING.release()


if __name__ == "__main__":
    # A cluster's SIGTERM, and the SIGHUP of a terminal that is closed (but for nohup), end a run as Ctrl-C does. Not
    # where Python goes on after it, as in a notebook; nor of several processes: while one waits, it hears no signal.
    if process()[1] == 1 and not hasattr(sys, "ps1"):
        for number in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:          # Windows has no SIGHUP
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except UserError as error:
        say(f"lth_pruning: {error}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        say("\nlth_pruning: stopped. Finished levels are kept; the same command goes on after them.", sys.stderr)
        sys.exit(130)
