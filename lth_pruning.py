"""The Lottery Ticket Hypothesis on MNIST (Frankle & Carbin 2019, arXiv:1803.03635).

When a pruned network trains well, is it because of the surviving connections, or because of their initial weights?
Iterative magnitude pruning: train dense networks, remove the smallest-magnitude weights round after round, and train
the survivors again, from their original initial weights ("rewind") or from fresh random ones on the very same
connections ("reinit").

    python lth_pruning.py                                      the defaults: six minutes on two CPU cores
    python lth_pruning.py TRIALS=2 LEVELS=4 PRUNE_RATE=0.5     any constant below can be set for one run

Writes figures, metrics.csv, networks.csv, summary.md and tickets.pt to results/. Rerun the same command to resume; a
finished run is only redrawn.

Measured with the defaults, 5 trials, test accuracy at the evaluation with the lowest validation loss ("early stop"; no
training is cut short): dense networks 97.35 %; with 21.1 % of the weights, rewind 98.05 %, reinit 96.80 %. Rewound
networks ("tickets") match the dense ones with as little as 2.9 % of the weights.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "matplotlib>=3.8", "seaborn[stats]>=0.13.2",
#                 "tqdm>=4.66"]
# ///

from __future__ import annotations

import os
import sys

# Set before PyTorch is loaded. Idle threads spin while they wait for each other: with a short spin count, two
# concurrent runs on two cores each take 1.6 times as long as one alone, not 4 times. Huge pages save about 5 %.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if __name__ == "__main__" and "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)          # inherited from a notebook, possibly not installed

import ast
import contextlib
import datetime
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import pickle
import re
import signal
import socket
import tempfile
import textwrap
import time
import typing
import warnings
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
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from scipy import stats
from scipy.optimize import isotonic_regression
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

# ---- Constants: edit them here, or set them for one run as NAME=VALUE arguments --------------------------------------

# What is trained, and on what
DATASET: str = "MNIST"                # or "FashionMNIST": 28x28 greyscale images, 10 classes
PIXELS: str = "standardised"          # mean 0, standard deviation 1; or "unit_interval", 0 to 1; or "unit_length", each
                                      # image divided by its L2 norm, as in the paper's code
MODEL: str = "mlp"                    # 784-300-100-10 (LeNet-300-100); or "lenet" (LeNet-5)
INIT: str = "kaiming_normal"          # or "xavier_normal", Glorot's, as in the paper; biases start at zero
DROPOUT: float = 0.2                  # after each hidden fully connected layer; 0 switches it off

# The experiment
ARMS: tuple = ("rewind", "reinit")    # how a pruned network starts: see ARM_TABLE; as an argument, ARMS=rewind,reinit
TRIALS: int = 5                       # initialisations, each with its own data order and dropout
LEVELS: int = 16                      # pruning rounds; 0 trains the dense networks alone
PRUNE_RATE: float = 0.2               # share of a layer's surviving weights pruned per level; half of it in
                                      # convolutions and the output layer
PRUNE_SCOPE: str = "layer"            # compare magnitudes within each layer; or "global", over all layers at one rate
REWIND_STEP: int = 0                  # rewind to the weights after this many steps, then train for the remaining steps
TICKETS_FROM: str | None = None       # the tickets.pt of another run, for the arm "transfer"
SEED: int = 42                        # the same seed gives the same numbers

# Training: the same for every network, dense or pruned. (The paper: Adam, Glorot initialisation, batches of 60 for
# 50,000 steps, neither dropout nor gradient clipping.)
VALIDATION_SIZE: int = 5_000          # held out of the 60,000 training images, as in the paper
EPOCHS: int = 3                       # few: networks may still be improving, so part of a lead may be learning speed
BATCH_SIZE: int = 128                 # the paper's 60 takes twice as many steps
LEARNING_RATE: float = 1.2e-3         # the paper's, for Adam
SCHEDULE: str = "constant"            # or "linear": the learning rate falls to zero by the last step
WEIGHT_DECAY: float = 1e-2            # AdamW's decoupled weight decay; 0 makes it Adam
CLIP_NORM: float | None = 1.0         # largest gradient norm of a network; None: no gradient clipping
EVAL_EVERY: int = 200                 # steps between evaluations, plus the early steps in `evaluation_steps`

# Where it runs
DATA_DIR: str = "data"                # a relative path is relative to this script's folder
RESULTS_DIR: str = "results"
DEVICE: str = "auto"                  # a GPU (cuda) if there is one, else cpu
STACK_SIZE: int | None = None         # networks trained at once: changes speed and memory, not the results; None: 20 on
                                      # a CPU, 200 on a GPU

# The non-inferiority margin, in percentage points: up to this much below dense networks still counts as matching them.
# It is not a NAME=VALUE argument: it affects the analysis alone.
MATCHING_MARGIN = 0.2

Weights = dict[str, Tensor]           # one network's weights and biases: "fc1.weight" -> (out, in), as in PyTorch
Masks = dict[str, Tensor]             # one network's prunable weights: 1 where a weight remains, 0 where it was pruned
Levels = dict[str, Tensor]            # the level at which each weight was pruned; 0: never pruned
Stack = dict[str, Tensor]             # weights or masks of many networks, with a leading nets dimension: for two arms
                                      # of five trials, "fc1.weight" is (10, 300, 784)
Network = tuple[str, int]             # names a network of a level: arm and trial
Dataset = dict[str, tuple[Tensor, Tensor]]        # "train", "validation", "test" -> images (n, 1, 28, 28), labels (n,)


class UserError(ValueError):
    """An error that the user can fix, in one sentence; as a program, the script prints it and exits with code 2."""


# ---- Experiment ------------------------------------------------------------------------------------------------------

@dataclass
class State:
    """Results so far, by trial; saved after every level."""

    level: int = -1                                                     # the last finished level
    theta_k: dict[int, Weights] = field(default_factory=dict)           # to rewind to: the weights after REWIND_STEP
    pruned_at: dict[int, Levels] = field(default_factory=dict)          # when each weight was pruned, for all masks
    dense: dict[int, Weights] = field(default_factory=dict)             # the dense networks as trained
    trained: dict[int, Weights] = field(default_factory=dict)           # networks of the last level, to be pruned next
    records: list[dict] = field(default_factory=list)                   # rows of metrics.csv: one for each evaluation


def run_experiment(state: State, data: Dataset, source_tickets: dict[int, tuple[Weights, Levels]],
                   save: Callable[[State], None]) -> None:
    """Train the dense networks, then prune the rewind networks level by level and start every arm from the new masks.

    Iterative magnitude pruning as in the paper's section 2 (strategy 1 of its appendix B). After each level, update
    `state` and call `save(state)`. `source_tickets`: by trial, the weights and pruning levels of TICKETS_FROM.
    """
    for level in range(state.level + 1, LEVELS + 1):
        started = time.monotonic()
        if level > 0:
            prune_tickets(state, level)

        # Each network of a stack starts from its arm's weights: rewound, or drawn anew. See `start_network`.
        found = State(level)
        with progress_bar(level) as bar:
            for networks, weights, masks in stacks(state, level, source_tickets, data["train"][0].device):
                rewind_weights, trained, evaluations = train(weights, masks, data, networks, level, bar)
                record(found, networks, masks, rewind_weights, trained, evaluations)

        merge(state, gather(found))                         # with torchrun, each process has trained some of the trials
        save(state)
        report_level(state, time.monotonic() - started)


def prune_tickets(state: State, level: int) -> None:
    """Prune the rewind networks that the previous level trained: mark in the state what this level prunes."""
    rates = prune_rates(build_network(MODEL, DROPOUT))
    for trial, pruned_at in state.pruned_at.items():
        before = masks_at(pruned_at, level - 1)
        after = prune(state.trained[trial], before, rates, PRUNE_SCOPE)
        for name, levels in pruned_at.items():
            levels[before[name] > after[name]] = level


def stacks(state: State, level: int, source_tickets: dict[int, tuple[Weights, Levels]],
           device: torch.device) -> Iterator[tuple[list[Network], Stack, Stack]]:
    """Yield the networks of a level, one stack after the other, with the weights and masks that they start from.

    The networks of a stack start at the same step and are sparse in the same layers. The arms of a trial are
    neighbours.
    """
    size = STACK_SIZE
    if size is None:
        size = 20 if device.type == "cpu" else 200          # larger stacks fall out of a CPU's caches
    arms = ARMS if level > 0 else ("dense",)
    trials = trials_of_rank()
    for start_step in sorted({first_step(arm) for arm in arms}):
        together = [arm for arm in arms if first_step(arm) == start_step]
        trials_per_stack = max(1, size // len(together))
        for first in range(0, len(trials), trials_per_stack):
            some_trials = trials[first:first + trials_per_stack]
            networks = [(arm, trial) for trial in some_trials for arm in together]
            starts = [start_network(network, state, level, source_tickets) for network in networks]
            weights = stack([weights for weights, _ in starts])
            masks = stack([masks for _, masks in starts])
            for group in equally_sparse(networks, masks, device):
                yield [networks[n] for n in group], pick(weights, group), pick(masks, group)


def start_network(network: Network, state: State, level: int,
                  source_tickets: dict[int, tuple[Weights, Levels]]) -> tuple[Weights, Masks]:
    """Return the weights and masks that one network starts from."""
    arm, trial = network
    initial = initial_weights(generator("init", trial))
    if level == 0:
        return initial, full_masks(initial)

    original = initial
    if first_step(arm) == REWIND_STEP:
        original = state.theta_k[trial]
    source_ticket = None
    if trial in source_tickets:
        weights, pruned_at = source_tickets[trial]
        source_ticket = weights, masks_at(pruned_at, level)
    masks = masks_at(state.pruned_at[trial], level)
    rng = generator(f"arm {arm}", trial, level)
    return ARM_TABLE[arm].start(Given(original, masks, state.dense[trial], state.trained[trial], source_ticket, rng))


def record(found: State, networks: list[Network], masks: Stack, rewind_weights: Stack, trained: Stack,
           evaluations: list[tuple]) -> None:
    """Add a trained stack's results to `found`."""
    survivors = sum(mask.flatten(1).sum(1) for mask in masks.values())                  # (nets,)
    percent = 100 * survivors / sum(mask[0].numel() for mask in masks.values())
    columns = ("train_loss", "val_loss", "val_accuracy", "test_accuracy")
    for n, (arm, trial) in enumerate(networks):
        network = {"dataset": DATASET, "model": MODEL, "arm": arm, "trial": trial, "level": found.level,
                   "weights_remaining": float(f"{percent[n]:.6g}")}
        for step, *metrics in evaluations:
            row = network | {"step": step}
            for column, metric in zip(columns, metrics, strict=True):
                row[column] = float(f"{metric[n]:.6g}")     # as many digits as metrics.csv has
            found.records.append(row)
        # Copies: a view would keep the whole stack alive.
        if arm in ("dense", "rewind"):
            found.trained[trial] = to_cpu(pick(trained, n))
        if arm == "dense":
            found.dense[trial] = found.trained[trial]
            found.theta_k[trial] = to_cpu(pick(rewind_weights, n))
            found.pruned_at[trial] = {name: torch.zeros_like(mask, dtype=torch.uint8)
                                      for name, mask in pick(masks, n).items()}


def merge(state: State, parts: list[State]) -> None:
    """Update the state with the results of a level, one part per process. Raises UserError if levels differ."""
    if len({part.level for part in parts}) > 1:
        raise UserError("the processes of this run are at different levels: stop all of them and start them again.")
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
    """Return an independent stream of random numbers for a purpose, trial and level.

    Trial k is therefore the same whether 5 or 50 are run.
    """
    seeds = np.random.SeedSequence([SEED, trial, level, *purpose.encode()])
    seed = int(seeds.generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


# ---- Data ------------------------------------------------------------------------------------------------------------

# sha256 of all bytes, in this order: training images, their labels, test images, their labels
CONTENTS = {"MNIST": "06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
            "FashionMNIST": "ca3ab2a37f845e1b8ae23cab1b51749a3011ba3bf1d9016176d75cbaabac376f"}


def load_dataset(device: torch.device) -> Dataset:
    """Return images (n, 1, 28, 28), scaled as PIXELS says, and labels (n,), on the device.

    The 60,000 training images give "train" (55,000) and "validation" (5,000); "test" (10,000) is only ever reported.
    """
    (images, labels), test = read_images()
    order = torch.randperm(len(images), generator=generator("split"))
    held_out = order[:VALIDATION_SIZE]
    rest = order[VALIDATION_SIZE:]
    splits = {"train": (images[rest], labels[rest]), "validation": (images[held_out], labels[held_out]), "test": test}
    std, mean = torch.std_mean(splits["train"][0] / 255)

    data = {}
    for name, (pixels, classes) in splits.items():
        if PIXELS == "standardised":
            scaled = (pixels / 255 - mean) / std
        elif PIXELS == "unit_interval":
            scaled = pixels / 255
        else:
            scaled = F.normalize(pixels.float(), dim=(1, 2))                            # L2 norm 1
        data[name] = (scaled.unsqueeze(1).to(device), classes.to(device))
    return data


def read_images() -> list[tuple[Tensor, Tensor]]:
    """Return byte images (n, 28, 28) and labels (n,): 60,000 for training and 10,000 for testing.

    Raises UserError if torchvision can neither find, unpack nor download them, or if they are not DATASET's:
    torchvision does not verify unpacked files.
    """
    folder = resolve_path(DATA_DIR)
    raw = folder / DATASET / "raw"
    files = {path.name.removesuffix(".gz") for path in raw.glob("*-ubyte*")}
    if len(files) < 4:
        say(f"downloading {DATASET} to {raw}")
    source = getattr(torchvision.datasets, DATASET)
    try:
        parts = [source(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:                              # many exception types; the last line is the informative one
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(f"{DATASET} could not be read from {raw} ({reason}): put its four archives there and remove "
                        "the unpacked files, or set DATA_DIR to a folder that can be written to.") from None

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.data.numpy().tobytes())
        digest.update(part.targets.byte().numpy().tobytes())
    if digest.hexdigest() != CONTENTS[DATASET]:
        raise UserError(f"the unpacked files in {raw} are not {DATASET}, or are damaged: remove the files without .gz, "
                        "so that they are unpacked or downloaded again.")
    return [(part.data, part.targets) for part in parts]


# ---- Networks --------------------------------------------------------------------------------------------------------

def build_network(model: str, dropout: float) -> nn.Sequential:
    """Return one plain network, without allocating its weights; `forward` walks its layers to run many at once.

    Its `name` is what figures and tables call it. Raises UserError for an unknown model.
    """
    with torch.device("meta"):                              # draws no random numbers
        if model == "mlp":
            network = nn.Sequential(OrderedDict(
                flatten=nn.Flatten(),
                fc1=nn.Linear(784, 300), relu1=nn.ReLU(), drop1=nn.Dropout(dropout),
                fc2=nn.Linear(300, 100), relu2=nn.ReLU(), drop2=nn.Dropout(dropout),
                output=nn.Linear(100, 10)))
            network.name = "LeNet-300-100"
            assert count_weights(network) == 266_200        # as in figure 2 of the paper
        elif model == "lenet":
            network = nn.Sequential(OrderedDict(
                conv1=nn.Conv2d(1, 6, 5, padding=2), pool1=nn.MaxPool2d(2), relu1=nn.ReLU(),
                conv2=nn.Conv2d(6, 16, 5), pool2=nn.MaxPool2d(2), relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                fc1=nn.Linear(400, 120), relu3=nn.ReLU(), drop1=nn.Dropout(dropout),
                fc2=nn.Linear(120, 84), relu4=nn.ReLU(), drop2=nn.Dropout(dropout),
                output=nn.Linear(84, 10)))
            network.name = "LeNet-5"
            assert count_weights(network) == 61_470         # LeCun et al. 1998, its feature maps fully connected
        else:
            raise UserError(f"MODEL must be mlp or lenet, not {model!r}.")
    return network


def weighted_layers(network: nn.Sequential) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that have weights, by name, from the input to the output."""
    return {name: layer for name, layer in network.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)}


def count_weights(network: nn.Sequential) -> int:
    """Count the prunable weights."""
    return sum(layer.weight.numel() for layer in weighted_layers(network).values())


def initial_weights(rng: torch.Generator, shapes: dict[str, tuple[int, ...]] | None = None) -> Weights:
    """Draw one network's weights by INIT; biases are zero.

    With `shapes` of a narrower network, draw its weights in the top left corner of each layer's; the rest is zero.
    """
    draw = {"kaiming_normal": nn.init.kaiming_normal_, "xavier_normal": nn.init.xavier_normal_}[INIT]
    weights = {}
    for name, layer in weighted_layers(build_network(MODEL, DROPOUT)).items():
        weight = torch.zeros(layer.weight.shape)
        shape = weight.shape
        if shapes is not None:
            shape = shapes[f"{name}.weight"]
        weight[:shape[0], :shape[1]] = draw(torch.empty(shape), generator=rng)
        weights[f"{name}.weight"] = weight
        weights[f"{name}.bias"] = torch.zeros(layer.bias.shape)
    return weights


def forward(network: nn.Sequential, weights: Stack, images: Tensor, dropout: Iterable[Tensor] = (),
            sparse: dict[str, Survivors] | None = None) -> Tensor:
    """Return the logits (nets, batch, 10) of a stack's networks for images (sets, batch, 1, 28, 28).

    Consecutive groups of networks share one set of images: the arms of a trial, or in evaluation all networks.
    `dropout` has a mask (sets, units, batch) for each dropout layer; without any, no unit is dropped. `sparse` names
    the layers whose weights are the survivors alone. `check_network` finds out which layers are supported.
    """
    layers = list(network.named_children())
    flatten = [isinstance(layer, nn.Flatten) for _, layer in layers].index(True)
    sets = len(images)
    nets_per_set = len(weights["output.bias"]) // sets
    sparse = sparse or {}

    if flatten == 0:
        x = images.flatten(2)                                                           # (sets, batch, units)
    else:
        parts = []
        for n in range(sets):
            of_set = range(n * nets_per_set, (n + 1) * nets_per_set)
            for first in of_set[::20]:                      # more at once would need gigabytes in evaluation
                some = pick(weights, slice(first, min(first + 20, of_set.stop)))
                parts.append(convolve(layers[:flatten], some, images[n]))
        x = torch.cat(parts)                                                            # (nets, batch, units)
    x = x.mT                                                                            # (sets or nets, units, batch)

    dropout = iter(dropout)
    for name, layer in layers[flatten + 1:]:
        if isinstance(layer, nn.Linear):
            x = linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"], sparse.get(f"{name}.weight"))
        elif isinstance(layer, nn.Dropout):
            mask = next(dropout, None)
            if mask is not None:
                by_set = x.unflatten(0, (sets, nets_per_set)) * mask.unsqueeze(1)
                x = by_set.flatten(0, 1)
        else:
            x = layer(x)                                                                # ReLU
    return x.mT


def linear(x: Tensor, weight: Tensor, bias: Tensor, survivors: Survivors | None) -> Tensor:
    """Apply a linear layer to the inputs of every network: (nets, in, batch) -> (nets, out, batch).

    Consecutive groups of networks may share their inputs, (sets, in, batch). Weights are (nets, out, in), or with
    `survivors` (nets, survivors).
    """
    bias = bias.unsqueeze(2)
    if survivors is not None:
        return SparseProduct.apply(weight, x.contiguous(), survivors) + bias
    if len(x) < len(weight):
        x = x.mT.repeat_interleave(len(weight) // len(x), 0).mT
    if len(weight) > 1:
        return torch.baddbmm(bias, weight, x)
    # A batch of one rounds differently: duplicate a lone network, so that it gets the same bits as in a larger stack.
    both = torch.baddbmm(bias.expand(2, -1, -1), weight.expand(2, -1, -1), x.expand(2, -1, -1))
    return both[:1]


def convolve(layers: list[tuple[str, nn.Module]], weights: Stack, x: Tensor) -> Tensor:
    """Apply the layers before nn.Flatten to images (batch, 1, 28, 28) for some networks: (nets, batch, units).

    All networks see the same images, so their kernels (nets, out, in, height, width) go into one convolution, grouped
    by network from the second layer on. In channels-last memory this takes half the time of one network after another.
    """
    # The same data with strides that say channels last: with one channel, PyTorch cannot tell, and oneDNN is slow.
    x = x.contiguous().as_strided(x.shape, (784, 1, 28, 1))
    nets = len(weights["output.bias"])
    groups = 1                                              # so far, all networks have the same activations
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
    """Return the number of units of each dropout layer, from the input to the output."""
    units = 0
    dropped = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            units = layer.out_features
        elif isinstance(layer, nn.Dropout):
            dropped.append(units)
    return dropped


def as_plain_network(network: nn.Sequential, weights: Weights) -> nn.Sequential:
    """Load one network's weights into the plain network and return it. Raises RuntimeError if they do not fit."""
    network.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    return network


# ---- Sparse layers: a step costs what its weights cost ---------------------------------------------------------------
#
# On a CPU, once few weights of a linear layer are left, only these survivors are stored and trained: (nets, survivors)
# instead of (nets, out, in). The layers of all networks together are one matrix. Each network is a block of it, with
# rows of its own (nets * out); networks that share their inputs share columns (sets * in), so that inputs need not be
# repeated for each arm. Everything outside the blocks, and every pruned weight within, is left out (compressed rows,
# CSR). Pruned weights are zero and stay zero, so gradients are needed at the survivors alone.

SPARSE_BELOW = 0.23                   # share of a layer's weights above which dense products are at least as fast


class Survivors(NamedTuple):
    """Positions of the surviving weights of a linear layer, in all networks of a stack, ordered by row and column."""
    mask: Tensor                          # (nets, out, in)
    row_starts: Tensor                    # (nets * out + 1,): how many survivors come before each row
    columns: dict[int, Tensor]            # by number of input sets: each survivor's column, (survivors of all nets,)
    by_column: Tensor                     # the survivors' indices in the order of the transpose: by column and row
    column_starts: Tensor                 # (nets * in + 1,)
    rows: Tensor                          # each survivor's row, ordered by column and row


class SparseProduct(torch.autograd.Function):
    """The product of surviving weights (nets, survivors) and inputs (sets, in, batch): (nets, out, batch)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, survivors: Survivors) -> Tensor:
        """Multiply the matrix of all networks with all inputs."""
        columns = survivors.columns[len(x)]
        nets, outputs, _ = survivors.mask.shape
        inputs = x.flatten(0, 1)                                                        # (sets * in, batch)
        shape = (nets * outputs, len(inputs))
        copied = values.clone(memory_format=torch.contiguous_format).flatten()          # `backward` overwrites it
        matrix = torch.sparse_csr_tensor(survivors.row_starts, columns, copied, shape)
        ctx.save_for_backward(values, x)
        ctx.matrix = matrix
        ctx.survivors = survivors
        return torch.sparse.mm(matrix, inputs, "sum").view(nets, outputs, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients of the survivors and, after the first layer, of the inputs."""
        values, x = ctx.saved_tensors
        gradient = gradient.contiguous().flatten(0, 1)                                  # (nets * out, batch)
        at_survivors = ctx.matrix                           # keep its positions; the gradient overwrites its values
        torch.sparse.sampled_addmm(at_survivors, gradient, x.flatten(0, 1).T, beta=0, out=at_survivors)
        of_inputs = None
        if ctx.needs_input_grad[1]:
            survivors = ctx.survivors
            shape = (len(x.flatten(0, 1)), len(gradient))
            transpose = torch.sparse_csr_tensor(survivors.column_starts, survivors.rows,
                                                values.flatten()[survivors.by_column], shape)
            of_inputs = torch.sparse.mm(transpose, gradient, "sum").view_as(x)
        return at_survivors.values().view_as(values), of_inputs, None


def find_survivors(mask: Tensor, sets: set[int]) -> Survivors:
    """Find the survivors of a layer, mask (nets, out, in), for inputs in this many sets (1: all networks share one)."""
    nets, outputs, inputs = mask.shape
    net, output, column = mask.nonzero(as_tuple=True)
    row = net * outputs + output
    own_column = net * inputs + column
    by_column = own_column.argsort(stable=True)
    row_starts = F.pad(mask.sum(2).flatten().cumsum(0), (1, 0)).long()
    column_starts = F.pad(mask.sum(1).flatten().cumsum(0), (1, 0)).long()
    # Networks that share a set of inputs share its columns.
    columns = {number: net // (nets // number) * inputs + column for number in sets}
    # PyTorch warns, once, that CSR tensors are in beta state: make a first one here, where nobody sees it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(row_starts, own_column, torch.zeros(len(net)), (nets * outputs, nets * inputs))
    return Survivors(mask.bool(), row_starts, columns, by_column, column_starts, row[by_column])


def sparse_counts(masks: Stack, device: torch.device) -> dict[str, Tensor]:
    """Return, for each linear layer, how many survivors each network stores, (nets,); 0 where the layer stays dense.

    Only the network's own count decides, so that its numbers do not depend on its neighbours.
    """
    counts = {}
    for name, mask in masks.items():
        if device.type == "cpu" and mask.dim() == 3:        # (nets, out, in); no convolutions, and nothing on a GPU
            count = mask.flatten(1).sum(1).long()
            counts[name] = count.where(count < SPARSE_BELOW * mask[0].numel(), 0)
    return counts


def equally_sparse(networks: list[Network], masks: Stack, device: torch.device) -> list[list[int]]:
    """Group the networks of a stack, by index, into those that store the same number of survivors per layer.

    In each group all trials have the same number of networks, as `train` requires.
    """
    counts = sparse_counts(masks, device)
    keys = [(trial, *[int(count[n]) for count in counts.values()]) for n, (_, trial) in enumerate(networks)]
    groups = {}                                             # by counts, and by how many arms of the trial have them
    for n, (trial, *stored) in enumerate(keys):
        arms = keys.count((trial, *stored))
        groups.setdefault((arms, *stored), []).append(n)
    return list(groups.values())


def sparse_layers(masks: Stack, sets: set[int], device: torch.device) -> dict[str, Survivors]:
    """Find the survivors of the layers in which all networks store the same number of them."""
    return {name: find_survivors(masks[name], sets) for name, count in sparse_counts(masks, device).items()
            if count.min() == count.max() > 0}


def take_survivors(weights: Stack, sparse: dict[str, Survivors]) -> Stack:
    """Replace the weights (nets, out, in) of sparse layers by their survivors, (nets, survivors)."""
    taken = dict(weights)
    for name, survivors in sparse.items():
        taken[name] = weights[name][survivors.mask].view(len(survivors.mask), -1)
    return taken


def put_back(weights: Stack, sparse: dict[str, Survivors]) -> Stack:
    """Undo `take_survivors`: pruned weights are zero."""
    for name, survivors in sparse.items():
        dense = weights[name].new_zeros(survivors.mask.shape)
        dense[survivors.mask] = weights[name].flatten()
        weights[name] = dense
    return weights


# ---- Tickets: a ticket is a mask plus the initial weights of the network it was found in -----------------------------

def full_masks(weights: Weights | Stack) -> Masks:
    """Return masks that keep every prunable weight: biases are never pruned, and not counted."""
    return {name: torch.ones_like(tensor) for name, tensor in weights.items() if name.endswith(".weight")}


def masked(weights: Weights | Stack, masks: Masks) -> Weights:
    """Apply masks; returns new tensors."""
    return {name: tensor * masks[name] if name in masks else tensor.clone() for name, tensor in weights.items()}


def masks_at(pruned_at: Levels, level: int) -> Masks:
    """Return the masks of a level."""
    return {name: ((levels == 0) | (levels > level)).float() for name, levels in pruned_at.items()}


def prune_rates(network: nn.Sequential) -> dict[str, float]:
    """Return the share of its survivors that each layer loses per level (section 2 and figure 2 of the paper).

    Half of PRUNE_RATE in the output layer and in convolutions; a global scope compares all layers at one rate.
    """
    rates = {}
    for name, layer in weighted_layers(network).items():
        rates[f"{name}.weight"] = PRUNE_RATE
        if PRUNE_SCOPE == "layer" and (name == "output" or isinstance(layer, nn.Conv2d)):
            rates[f"{name}.weight"] = PRUNE_RATE / 2
    return rates


def prune(weights: Weights, masks: Masks, rates: dict[str, float], scope: str) -> Masks:
    """Remove the smallest-magnitude survivors of one network, a share `rates` of each layer, or globally.

    Step 3 of the paper's iterative pruning (its appendix B). Counts are exact: round(rate * survivors). Raises
    UserError if a global scope would leave a layer without any weight.
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
            raise UserError(f"with PRUNE_SCOPE=global, pruning would leave no weight of {name}: lower LEVELS to keep "
                            "this run; a lower PRUNE_RATE, or PRUNE_SCOPE=layer, starts another one.")
        pruned[name] = part.view(masks[name].shape)
    return pruned


def remove_smallest(weights: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return the mask, of any shape, without the `count` survivors of smallest magnitude; ties are broken by index."""
    magnitude = weights.abs().masked_fill(mask == 0, torch.inf).flatten()
    smallest = magnitude.argsort(stable=True)[:count]
    return mask.flatten().scatter(0, smallest, 0).view(mask.shape)


# ---- Arms: how a pruned network starts -------------------------------------------------------------------------------

class Given(NamedTuple):
    """What an arm may start from, for one network at one level."""
    theta0: Weights                       # the original initial weights; for a late arm, the weights after REWIND_STEP
    masks: Masks                          # the ticket's, found from the rewind network of the same trial
    dense: Weights                        # the dense network as trained
    trained: Weights                      # the rewind network as the previous level trained it
    source_ticket: tuple[Weights, Masks] | None     # weights and masks of a ticket from TICKETS_FROM
    rng: torch.Generator                  # for this arm, trial and level alone


def rewind(given: Given) -> tuple[Weights, Masks]:
    """Start from the ticket itself: the survivors with their original initial weights."""
    return masked(given.theta0, given.masks), given.masks


def reinit(given: Given) -> tuple[Weights, Masks]:
    """Keep the connections, but draw their initial weights anew (section 2, "random reinitialization")."""
    return masked(initial_weights(given.rng), given.masks), given.masks


def shuffle_weights(given: Given) -> tuple[Weights, Masks]:
    """Keep the connections, and permute their original values among the survivors of each layer."""
    weights = masked(given.theta0, given.masks)
    for name, mask in given.masks.items():
        survivors = mask.flatten().nonzero().flatten()
        order = torch.randperm(len(survivors), generator=given.rng)
        values = given.theta0[name].flatten()
        weights[name].view(-1)[survivors] = values[survivors[order]]
    return weights, given.masks


def keep_signs(given: Given) -> tuple[Weights, Masks]:
    """Draw fresh magnitudes, but keep the signs of the original weights (Zhou et al. 2019, arXiv:1905.01067)."""
    fresh = initial_weights(given.rng)
    weights = {name: tensor.abs() * given.theta0[name].sign() for name, tensor in fresh.items()}
    return masked(weights, given.masks), given.masks


def finetune(given: Given) -> tuple[Weights, Masks]:
    """Fine-tune: keep the weights that the previous level trained, so that training adds up over the levels."""
    return masked(given.trained, given.masks), given.masks


def shuffle_mask(given: Given) -> tuple[Weights, Masks]:
    """Keep the original weights of connections chosen at random, as many in each layer as the ticket has."""
    masks = {}
    for name, mask in given.masks.items():
        order = torch.randperm(mask.numel(), generator=given.rng)
        masks[name] = mask.flatten()[order].view(mask.shape)
    return masked(given.theta0, masks), masks


def oneshot(given: Given) -> tuple[Weights, Masks]:
    """Keep the original weights where the trained dense network has its largest; as many per layer as the ticket."""
    masks = largest(given.dense, given.masks)
    return masked(given.theta0, masks), masks


def magnitude_at_init(given: Given) -> tuple[Weights, Masks]:
    """Keep the largest initial weights, as many per layer as the ticket has (Frankle et al. 2021, arXiv:2009.08576)."""
    masks = largest(given.theta0, given.masks)
    return masked(given.theta0, masks), masks


def largest(weights: Weights, masks: Masks) -> Masks:
    """Return masks of the weights of largest magnitude, as many in each layer as the given masks keep."""
    return {name: remove_smallest(weights[name], torch.ones_like(mask), int((mask == 0).sum()))
            for name, mask in masks.items()}


def small_dense(given: Given) -> tuple[Weights, Masks]:
    """Make a narrower dense network with about as many weights: the first units of each layer, drawn anew by INIT."""
    survivors = sum(int(mask.sum()) for mask in given.masks.values())
    layers = weighted_layers(build_network(MODEL, DROPOUT))

    def distance(shapes: dict[str, tuple[int, ...]]) -> int:
        return abs(sum(math.prod(shape) for shape in shapes.values()) - survivors)

    shapes = min((narrower(layers, thousandths / 1000) for thousandths in range(1001)), key=distance)
    masks = {name: torch.zeros_like(mask) for name, mask in given.masks.items()}
    for name, (outputs, inputs, *_) in shapes.items():
        masks[name][:outputs, :inputs] = 1
    return initial_weights(given.rng, shapes), masks


def narrower(layers: dict[str, nn.Linear | nn.Conv2d], scale: float) -> dict[str, tuple[int, ...]]:
    """Return the shapes (out, in, ...) of the layers' weights with all hidden layers scaled down together."""
    shapes = {}
    kept = 1.0                                              # share of the previous layer's units
    for name, layer in layers.items():
        outputs, inputs, *kernel = layer.weight.shape
        fewest = 10                                         # a narrower bottleneck would be an unfair baseline
        if kernel:
            fewest = 1
        width = outputs
        if name != "output":
            width = min(outputs, max(fewest, round(scale * outputs)))
        shapes[f"{name}.weight"] = (width, round(inputs * kept), *kernel)
        kept = width / outputs
    return shapes


def transfer(given: Given) -> tuple[Weights, Masks]:
    """Take weights and masks of the same trial and level from the file TICKETS_FROM."""
    weights, masks = given.source_ticket
    return masked(weights, masks), masks


class Arm(NamedTuple):
    """One way to start a masked network, the question that it answers, and how it is drawn."""
    start: Callable[[Given], tuple[Weights, Masks]]
    label: str                            # in figures and tables
    colour: str
    marker: str
    late: bool = True                     # starts at REWIND_STEP, for the remaining steps; else at step 0, for all
    controls: str = "both"                # what differs from the ticket: "weights" or "mask"
    question: str = ""                    # answered by the comparison with the ticket in accuracy
    claim: str = "rewind beats arm"       # what yes means; or "rewind matches arm", "arm matches rewind"


ARM_TABLE = {
    "rewind": Arm(rewind, "rewound to original weights", "#0173b2", "o"),
    "reinit": Arm(reinit, "re-initialised at random", "#de8f05", "s", late=False, controls="weights",
                  question="Do the original weights matter?"),
    "shuffle_weights": Arm(shuffle_weights, "original values, permuted", "#56b4e9", "<", controls="weights",
                           question="Does it matter which survivor has which value?"),
    "keep_signs": Arm(keep_signs, "original signs, new magnitudes", "#ca9161", ">", late=False, controls="weights",
                      question="Do the original signs suffice (within 0.2 points)?", claim="arm matches rewind"),
    "finetune": Arm(finetune, "fine-tuned, not rewound", "black", "X", controls="weights",
                    question="Does rewinding lose less than 0.2 points against fine-tuning, which trains longer?",
                    claim="rewind matches arm"),
    "shuffle_mask": Arm(shuffle_mask, "shuffled connections", "#029e73", "^", controls="mask",
                        question="Do the connections matter, beyond their number per layer?"),
    "oneshot": Arm(oneshot, "one-shot pruning", "#d55e00", "D", controls="mask",
                   question="Is iterative pruning better than one-shot pruning?"),
    "magnitude_at_init": Arm(magnitude_at_init, "largest initial weights", "#7a5195", "*", late=False, controls="mask",
                             question="Is training needed to find the mask?"),
    "small_dense": Arm(small_dense, "small dense network", "#808000", "p", late=False, controls="mask",
                       question="Is a ticket better than a small dense network?"),
    "transfer": Arm(transfer, "ticket found elsewhere", "#cc78bc", "v", controls="mask",
                    question="Does another dataset's ticket do as well (within 0.2 points)?",
                    claim="arm matches rewind"),
}


def first_step(arm: str) -> int:
    """Return the step of the dense training at which an arm starts."""
    if arm == "dense" or not ARM_TABLE[arm].late:
        return 0
    return REWIND_STEP


# ---- Training --------------------------------------------------------------------------------------------------------
#
# Five things to know before changing anything:
#   1. Activations are feature-major: (nets, units, batch).
#   2. The networks of a trial are neighbours in a stack, and see the same batches and dropout masks.
#   3. The loss is the sum over the networks, so that each one gets just its own gradient, unscaled.
#   4. Pruned weights start at zero and their gradients are masked before clipping, so they stay exactly zero: in a
#      fresh AdamW, their moments stay zero, and decay maps 0 to 0. Sparse layers store no such weights.
#   5. Every random number comes from a generator for its purpose, trial and level.

def train(weights: Stack, masks: Stack, data: Dataset, networks: list[Network], level: int,
          bar: tqdm) -> tuple[Stack, Stack, list[tuple]]:
    """Train a stack of networks, all arms of a trial side by side.

    Networks that start at REWIND_STEP take the remaining steps only, with the batches and dropout that those steps
    would have used. Returns the weights at REWIND_STEP, the trained weights, and a tuple per evaluation, beginning
    before any step: (step, train_loss, val_loss, val_accuracy, test_accuracy). The metrics are CPU tensors of shape
    (nets,); train_loss is the mean over the batches since the previous evaluation. Raises UserError if a loss is not
    finite.
    """
    network = build_network(MODEL, DROPOUT)
    images, labels = data["train"]
    device = images.device
    trials = list(dict.fromkeys(trial for _, trial in networks))
    arms = len(networks) // len(trials)

    sparse = sparse_layers(masks, {1, len(trials), len(networks)}, device)
    weights = take_survivors(weights, sparse)
    parameters = flatten_parameters(weights).to(device)                                 # (nets, numbers)
    gradients = torch.zeros_like(parameters)
    gradient_views = parameter_views(gradients, weights)
    weights = parameter_views(parameters, weights)          # views: updating `parameters` updates these
    for weight in weights.values():
        weight.requires_grad_()
    masks = {name: mask.to(device) for name, mask in masks.items() if name not in sparse}
    parameters.grad = gradients
    optimizer = torch.optim.AdamW([parameters], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    start_step = first_step(networks[0][0])
    last_step = EPOCHS * steps_per_epoch()
    evaluate_at = evaluation_steps(last_step)
    order = batches(len(images), trials, level, device)
    dropout = dropout_masks(network, trials, level, device)
    rewind_weights = to_cpu(weights)
    loss_sum = torch.zeros(len(networks), device=device)
    steps_since_evaluation = 0
    metrics = evaluate_all(network, weights, data, loss_sum / steps_since_evaluation, sparse)       # 0 / 0: no loss yet
    evaluations = [(start_step, *metrics)]
    check_finite(loss_sum, evaluations[-1], networks, level)

    for step in range(1, last_step + 1):
        batch = next(order)                                                             # (trials, batch)
        kept_units = next(dropout)
        if step <= start_step:                              # already taken by the dense network
            continue

        # forward
        x = images.index_select(0, batch.flatten()).unflatten(0, batch.shape)           # faster than images[batch]
        y = labels[batch].repeat_interleave(arms, 0)                                    # (nets, batch)
        loss = cross_entropy_per_network(forward(network, weights, x, kept_units, sparse), y)               # (nets,)

        # mask and clip the gradients
        raw_gradients = torch.autograd.grad(loss.sum(), list(weights.values()))
        for name, gradient in zip(weights, raw_gradients, strict=True):
            torch.mul(gradient, masks.get(name, 1), out=gradient_views[name])
        if CLIP_NORM is not None:
            clip_per_network(gradients, CLIP_NORM)

        # optimizer step
        if SCHEDULE == "linear":
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (last_step + 1 - step) / last_step
        optimizer.step()
        loss_sum += loss.detach()
        steps_since_evaluation += 1
        bar.update(len(networks))

        # evaluate
        if step == REWIND_STEP:
            rewind_weights = to_cpu(weights)
        if step in evaluate_at:
            metrics = evaluate_all(network, weights, data, loss_sum / steps_since_evaluation, sparse)
            evaluations.append((step, *metrics))
            check_finite(loss_sum, evaluations[-1], networks, level)
            loss_sum.zero_()
            steps_since_evaluation = 0

    return put_back(rewind_weights, sparse), put_back(to_cpu(weights), sparse), evaluations


def evaluation_steps(last_step: int) -> set[int]:
    """Return the steps after which to evaluate: more of them early on, since accuracy rises fastest at the start."""
    return {25, 50, 100, last_step, *range(EVAL_EVERY, last_step, EVAL_EVERY)}


def steps_per_epoch() -> int:
    """Return the steps of an epoch: the incomplete last batch is dropped; it differs every epoch."""
    return (60_000 - VALIDATION_SIZE) // BATCH_SIZE


def batches(images: int, trials: list[int], level: int, device: torch.device) -> Iterator[Tensor]:
    """Yield index batches (trials, batch) without end, reshuffled per trial, level and epoch."""
    rngs = [generator("order", trial, level) for trial in trials]
    while True:
        order = torch.stack([torch.randperm(images, generator=rng) for rng in rngs]).to(device)
        whole_batches = images - images % BATCH_SIZE
        yield from order[:, :whole_batches].split(BATCH_SIZE, dim=1)


def dropout_masks(network: nn.Sequential, trials: list[int], level: int,
                  device: torch.device) -> Iterator[list[Tensor]]:
    """Yield for each step the masks (trials, units, batch) of all dropout layers; without dropout an empty list.

    Masks are 0 or 1 / (1 - DROPOUT), which keeps the mean. Each trial and level draws its own, so that trials are
    independent; the arms of a trial share them. Each unit compares a 16-bit integer with a threshold: drawn 64 random
    bits at a time, these cost a fraction of `bernoulli_`.
    """
    sizes = [units * BATCH_SIZE for units in dropped_units(network)]
    while DROPOUT == 0 or not sizes:
        yield []
    rngs = [generator("dropout", trial, level, device) for trial in trials]
    bits = torch.empty(len(trials), math.ceil(sum(sizes) / 4), dtype=torch.int64, device=device)
    threshold = round(DROPOUT * 2**16) - 2**15
    while True:
        for row, rng in zip(bits, rngs, strict=True):
            row.random_(-2**63, None, generator=rng)
        kept = bits.view(torch.int16)[:, :sum(sizes)].float().ge_(threshold)            # 1 or 0
        masks = kept.mul_(1 / (1 - DROPOUT))
        yield [part.view(len(trials), -1, BATCH_SIZE) for part in masks.split(sizes, dim=1)]


def cross_entropy_per_network(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each network's mean cross-entropy, (nets,), from logits (nets, batch, 10) and labels (nets, batch)."""
    return F.cross_entropy(logits.mT, labels, reduction="none").mean(1)


def clip_per_network(gradients: Tensor, max_norm: float) -> None:
    """Apply `clip_grad_norm_` to each row of gradients (nets, numbers) separately, in place.

    A norm over the whole stack would let one network's large gradient scale down all the others'.
    """
    norms = gradients.norm(dim=1, keepdim=True)
    gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1))


def evaluate_all(network: nn.Sequential, weights: Stack, data: Dataset, train_loss: Tensor,
                 sparse: dict[str, Survivors]) -> list[Tensor]:
    """Return train_loss, val_loss, val_accuracy and test_accuracy, (nets,), on the CPU."""
    val_loss, val_accuracy = evaluate(network, weights, *data["validation"], sparse)
    _, test_accuracy = evaluate(network, weights, *data["test"], sparse)
    return [metric.cpu() for metric in (train_loss, val_loss, val_accuracy, test_accuracy)]


@torch.no_grad()
def evaluate(network: nn.Sequential, weights: Stack, images: Tensor, labels: Tensor,
             sparse: dict[str, Survivors] | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss and the accuracy in percent, both (nets,), of every network on all of the images."""
    nets = len(weights["output.bias"])
    loss = torch.zeros(nets, device=images.device)
    correct = torch.zeros(nets, device=images.device)
    for x, y in zip(images.split(1_000), labels.split(1_000), strict=True):
        logits = forward(network, weights, x.unsqueeze(0), (), sparse)                  # (nets, batch, 10)
        y = y.expand(nets, -1)
        loss += cross_entropy_per_network(logits, y) * y.shape[1]
        correct += (logits.argmax(2) == y).sum(1)
    return loss / len(images), 100 * correct / len(images)


def check_finite(loss_sum: Tensor, evaluation: tuple, networks: list[Network], level: int) -> None:
    """Raise UserError if a network's loss, in training or on the validation images, is not finite."""
    step, _, val_loss, *_ = evaluation
    all_finite = (loss_sum.cpu() + val_loss).isfinite()
    for (arm, trial), finite in zip(networks, all_finite.tolist(), strict=True):
        if not finite:
            raise UserError(f"training diverged: the loss of {arm}, trial {trial}, at level {level} was not finite by "
                            f"step {step}. Set LEARNING_RATE below {LEARNING_RATE}, which starts another run.")


# ---- Tensors of many networks, and the device ------------------------------------------------------------------------

def stack(tensors: list[Weights]) -> Stack:
    """Stack single networks' tensors along a new leading nets dimension."""
    return {name: torch.stack([single[name] for single in tensors]) for name in tensors[0]}


def pick(tensors: Stack, n: int | slice | list[int]) -> Weights | Stack:
    """Return the tensors of a stack's n-th network, or of several."""
    return {name: tensor[n] for name, tensor in tensors.items()}


def to_cpu(tensors: Stack) -> Stack:
    """Copy tensors to the CPU, into memory of their own."""
    return {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}


def flatten_parameters(tensors: Stack) -> Tensor:
    """Put all numbers of each network in one row, (nets, numbers), zero-padded to a multiple of 16.

    So AdamW works on one tensor. Its kernel takes 16 numbers at a time and rounds a remainder differently: without the
    padding, a network's last bits would depend on how many others there are in the stack.
    """
    rows = torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)
    return F.pad(rows, (0, -rows.shape[1] % 16))


def parameter_views(rows: Tensor, shapes: Stack) -> Stack:
    """View parts of rows (nets, numbers) under the names and in the shapes of a stack's tensors."""
    views = {}
    start = 0
    for name, tensor in shapes.items():
        end = start + tensor[0].numel()
        views[name] = rows[:, start:end].unflatten(1, tensor.shape[1:])
        start = end
    return views


def choose_device() -> torch.device:
    """Return DEVICE; process n of a machine takes GPU n, modulo their number. Raises UserError if it cannot be used."""
    name = DEVICE
    if DEVICE == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise UserError(f"DEVICE={DEVICE} cannot be used here; DEVICE=auto takes a GPU if there is one.") from None


@contextlib.contextmanager
def fixed_numerics(device: torch.device) -> Iterator[None]:
    """Set everything in the process that the numbers depend on, whatever the host program has set; restore it after."""
    with contextlib.ExitStack() as restored:
        restored.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        # Decaying moments of AdamW become denormal, which is slow. PyTorch cannot report this setting.
        restored.callback(torch.set_flush_denormal, sys.float_info.min / 2 == 0)
        torch.set_flush_denormal(True)
        restored.enter_context(torch.inference_mode(False))
        restored.enter_context(torch.enable_grad())
        restored.enter_context(torch.autocast(device.type, enabled=False))
        restored.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        if torch.get_default_device().type != "cpu":
            restored.enter_context(torch.device("cpu"))
        if device.type == "cuda":
            restored.enter_context(torch.cuda.device(device))
        yield


# ======================================================================================================================
# End of the code that determines the numbers. Below: reports, files and arguments. The sha256 sum of the code from the
# experiment to this line, without comments and docstrings, identifies the version: figures and texts can change without
# changing it.
# ======================================================================================================================

# ---- Measures and comparisons ----------------------------------------------------------------------------------------

MAIN_ARMS = ("rewind", "reinit", "transfer")        # titles mention these; figures draw them bold, with their spread
MORE_WEIGHTS = "has more weights"                   # of an arm that is not compared at a level
NETWORK = ["dataset", "model", "arm", "trial", "level", "weights_remaining"]        # columns that identify a network


@dataclass
class Run:
    """A results folder, as its summary and figures need it."""
    info: dict                            # run.json: constants, code version, data, library versions, device
    records: pd.DataFrame                 # metrics.csv: a row per evaluation
    networks: pd.DataFrame                # networks.csv: a row per network
    mask: pd.DataFrame | None = None      # mask.csv: a row per level and pixel; None if convolutions come first

    def __post_init__(self) -> None:
        """Derive what most tables and figures need."""
        self.constants = self.info["constants"]
        self.trials = self.networks["trial"].nunique()
        tickets = self.networks[self.networks["arm"].isin(["dense", "rewind"])]
        self.densities = tickets.groupby("level")["weights_remaining"].first()              # percent, by level
        self.percent = self.densities.map("{:.1f} %".format)
        self.fifth, = levels_near(self, 21.1)               # the level that titles mention

        # A small dense network cannot be as small as the sparsest tickets. With more weights it is not compared.
        excess = self.networks["weights_remaining"] / self.networks["level"].map(self.densities)
        self.compared = self.networks[excess < 1.1].astype({"stop_step": float, "catch_up_step": float})
        self.arms = [arm for arm in ARM_TABLE if arm in set(self.compared["arm"])]
        self.controls = [arm for arm in self.arms if arm != "rewind"]
        self.main = [arm for arm in MAIN_ARMS if arm in self.arms]

        # Early stops, by arm and level. Their median is missing if half of the trials or more have not reached theirs.
        stops = self.compared.groupby(["arm", "level"])["stop_step"]
        self.stops = stops.agg(missing=lambda steps: steps.isna().sum(),
                               median=lambda steps: steps.fillna(math.inf).median(),
                               first="min", last="max").replace(math.inf, math.nan)
        reached = self.stops.query("arm == 'rewind'")["median"].notna()
        self.stops_reached = bool(reached.mean() > 0.5)     # most tickets stopped, at most levels

        # What figures draw: each arm's line begins at the dense networks. One trial has no range, two have no interval.
        dense = self.compared[self.compared["arm"] == "dense"]
        pruned = self.compared[self.compared["level"] > 0]
        self.lines = pd.concat([*[dense.assign(arm=arm) for arm in self.arms], pruned], ignore_index=True)
        self.ranges = "means and ranges of trials" if self.trials > 1 else "single networks"
        self.intervals = "means and 95 % confidence intervals" if self.trials > 2 else "means without intervals"


def measure(records: pd.DataFrame) -> pd.DataFrame:
    """Condense metrics.csv, a row per evaluation, to networks.csv, a row per network.

    A network stops early at its lowest validation loss. Its stop_step is missing if that came in the last 5 % of the
    training or at one of the last two evaluations: it may still have been improving when training ended. It catches
    up at its first evaluation with the validation accuracy that the dense network of its trial ends with.
    """
    untrained = records[records["train_loss"].isna()].set_index(NETWORK)
    records = records[records["train_loss"].notna()].reset_index(drop=True)
    stop = records.loc[records.groupby(NETWORK)["val_loss"].idxmin()].set_index(NETWORK)
    last = records.loc[records.groupby(NETWORK, sort=False)["step"].idxmax()].set_index(NETWORK)

    last_steps = records["step"].drop_duplicates().nlargest(2)
    too_late = min(0.95 * last_steps.max(), last_steps.min())
    dense = last.xs("dense", level="arm").groupby("trial")["val_accuracy"].first()
    caught_up = records[records["val_accuracy"] >= records["trial"].map(dense)]

    networks = pd.DataFrame({
        "test_accuracy": stop["test_accuracy"],
        "stop_step": stop["step"].where(stop["step"] < too_late).astype("Int64"),
        "untrained_test_accuracy": untrained["test_accuracy"],
        "final_test_accuracy": last["test_accuracy"],
        "catch_up_step": caught_up.groupby(NETWORK)["step"].first().astype("Int64"),
    })
    return networks.reindex(last.index).reset_index()


def levels_near(run: Run, *percents: float) -> list[int]:
    """Return the pruned levels nearest to some densities, each once; [0] if nothing was pruned."""
    pruned = np.log(run.densities.drop(0))
    if pruned.empty:
        return [0]
    return sorted({int((pruned - math.log(percent)).abs().idxmin()) for percent in percents})


def by_trial(run: Run, column: str) -> pd.DataFrame:
    """Pivot a column of networks.csv: a row per level and trial, a column per arm, dense networks at every level."""
    wide = run.compared.pivot(index=["level", "trial"], columns="arm", values=column)[["dense", *run.arms]]
    wide["dense"] = wide["dense"].groupby("trial").transform("max")
    return wide


def means(run: Run, column: str) -> pd.DataFrame:
    """Average a column of networks.csv over the trials: a row per level, a column per arm."""
    return by_trial(run, column).groupby("level").mean().round(6)


def confidence_interval(differences: pd.Series) -> tuple[float, float]:
    """Return the 95 % confidence interval of a mean by Student's t; nan for fewer than three values, or equal ones."""
    if len(differences) < 3 or differences.nunique() < 2:
        return math.nan, math.nan
    half_width = stats.t.ppf(0.975, len(differences) - 1) * differences.sem()
    return differences.mean() - half_width, differences.mean() + half_width


def decide(low: pd.Series, high: pd.Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return whether x beats y, whether it matches y, and a word for both, by intervals of x - y in points."""
    above = low > -MATCHING_MARGIN                          # nan is neither above nor below
    below = high < -MATCHING_MARGIN
    beats = np.select([low > 0, high < 0], ["supported", "contradicted"], "inconclusive")
    matches = np.select([above, below, high < 0], ["supported", "contradicted", "behind, size open"], "inconclusive")
    word = np.select([low > 0, above, high < 0], ["ahead", "as good", "behind"], "inconclusive")
    return beats, matches, word


def compare(run: Run, x: str, y: str, column: str = "test_accuracy") -> pd.DataFrame:
    """Compare two arms by differences x - y within trials: a row for each pruned level at which both are compared.

    Its columns are the mean and the 95 % confidence interval in points, their text, and what `decide` says.
    """
    wide = by_trial(run, column).drop(0)
    differences = (wide[x] - wide[y]).round(4).dropna()     # equal counts of correctly classified images compare equal
    levels = differences.groupby("level")
    rows = [[values.mean(), *confidence_interval(values)] for _, values in levels]
    table = pd.DataFrame(rows, list(levels.groups), ["mean", "low", "high"])
    averages = (table["mean"].round(2) + 0.0).map("{:+.2f}".format)         # + 0.0 turns -0.0 into 0.0
    half_widths = ((table["high"] - table["low"]) / 2).map(" ± {:.2f}".format)
    table["text"] = averages + half_widths.replace(" ± nan", "")
    table["beats"], table["matches"], table["word"] = decide(table["low"], table["high"])
    return table


def compare_steps(run: Run, x: str, y: str, level: int) -> tuple[str, str]:
    """Decide by an exact sign test, 2.5 % on each side, whether arm x stops sooner than arm y.

    Returns both medians in words, and the answer. Ties, and pairs of which neither stopped, are failures of both.
    """
    steps = by_trial(run, "stop_step").loc[level].fillna(math.inf)
    medians = [f"{steps[arm].median():,.0f}".replace("inf", "not reached") for arm in (x, y)]
    answer = "inconclusive"
    for word, wins in (("supported", steps[x] < steps[y]), ("contradicted", steps[y] < steps[x])):
        if stats.binomtest(int(wins.sum()), len(wins), alternative="greater").pvalue <= 0.025:
            answer = word
    return f"sooner in {(steps[x] < steps[y]).sum()} of {len(steps)}; medians {' and '.join(medians)}", answer


# ---- Words of figures and summary ------------------------------------------------------------------------------------

def label(run: Run, arm: str) -> str:
    """Return an arm's name in figures; anything else names itself."""
    if arm not in ARM_TABLE:
        return {"dense": "dense network"}.get(arm, arm)
    name = ARM_TABLE[arm].label
    if arm == "transfer" and run.info["tickets_from"]["constants"]["DATASET"] != run.constants["DATASET"]:
        name = f"ticket from {run.info['tickets_from']['constants']['DATASET']}"
    if ARM_TABLE[arm].late:
        name = name_weights(run, name)
    return name.replace("FashionMNIST", "Fashion-MNIST")


def name_weights(run: Run, text: str) -> str:
    """Replace "original" by the step that the run rewinds to, unless that is step 0."""
    step = run.constants["REWIND_STEP"]
    return text if step == 0 else re.sub("original (weights|values)", rf"\1 of step {step}", text)


def plural(run: Run, arm: str) -> str:
    """Return what titles and sentences call the networks of the dense and the main arms."""
    names = {"dense": "dense networks", "rewind": "tickets", "reinit": "re-initialised networks"}
    return names.get(arm) or label(run, arm).replace("ticket", "tickets")


def count(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listing(words: list[str], conjunction: str) -> str:
    """Join words as English does: "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def describe_run(run: Run) -> str:
    """Return the words that identify a run."""
    constants = run.constants
    pixels = {"unit_interval": "pixels from 0 to 1", "unit_length": "unit-norm images"}
    words = [constants["DATASET"].replace("FashionMNIST", "Fashion-MNIST"), build_network(constants["MODEL"], 0).name,
             pixels.get(constants["PIXELS"], "standardised pixels"), count(constants["EPOCHS"], "epoch")]
    if constants["SCHEDULE"] == "linear":
        words.append("learning rate falls to zero")
    if constants["PRUNE_SCOPE"] == "global":
        words.append("global pruning")
    if constants["REWIND_STEP"] > 0:
        words.append(f"rewound to step {constants['REWIND_STEP']}")
    words.append(count(run.trials, "trial"))
    finished = run.densities.index.max()
    if finished < constants["LEVELS"]:
        words.append(f"unfinished: levels 0 to {finished} of {constants['LEVELS']}")
    return ", ".join(words)


def contrast(run: Run, values: pd.Series, form: str) -> str:
    """Contrast the dense networks' value with those of the main arms at a fifth of the weights."""
    dense, *others = [f"{plural(run, arm)} {form.format(values[arm])}".replace("nan", "not reached")
                      for arm in ("dense", *MAIN_ARMS) if arm in values]
    if not others:
        return dense
    return f"{dense}; with {run.percent[run.fifth]} of the weights, {listing(others, 'and')}"


def against_dense(run: Run, arm: str, column: str = "test_accuracy") -> str:
    """Say where tickets beat and match the dense networks, or at which density the networks of an arm fall behind."""
    who = plural(run, arm)
    table = compare(run, arm, "dense", column)
    matches = table.index[table["matches"] == "supported"]
    behind = behind_from(run, table)
    if behind and (arm != "rewind" or matches.empty):
        return f"{who} fall behind dense networks at {behind} of the weights and sparser"
    if matches.empty:
        return f"it is unclear whether {who} match dense networks"

    sparsest = run.percent[matches.max()]
    where = f"with as little as {sparsest}"
    if len(matches) < matches.max():                        # some denser level does not match
        where = f"at {len(matches)} of {len(table)} levels, the sparsest with {sparsest}"
    fixed = levels_near(run, 13.5, 21.1)                    # so that no lucky level is picked
    beaten = [run.percent[level] for level in fixed if table.loc[level, "beats"] == "supported"]
    if not beaten:
        return f"{who} match dense networks {where} of the weights"
    if beaten[-1] == sparsest:
        return f"{who} beat dense networks with {sparsest} of the weights"
    return f"{who} beat dense networks with {beaten[-1]} of the weights and match them {where}"


def behind_from(run: Run, table: pd.DataFrame) -> str:
    """Return the density at which, and at all sparser ones, an arm is behind dense networks; empty if there is none.

    Takes what `compare` says of the arm and the dense networks.
    """
    last_kept_up = max(table.index[table["word"] != "behind"], default=0)
    return run.percent.get(last_kept_up + 1, "")


def controls_beaten(run: Run, column: str = "test_accuracy") -> tuple[list[str], list[str], str]:
    """Return which controls tickets with a fifth of the weights beat, which they do not, and the number in words."""
    answers = {arm: compare(run, "rewind", arm, column)["beats"].get(run.fifth) for arm in run.controls}
    beaten = [arm for arm, answer in answers.items() if answer == "supported"]
    others = [arm for arm, answer in answers.items() if answer not in (None, "supported")]
    return beaten, others, f"beat {len(beaten)} of {count(len(beaten) + len(others), 'control')}"


# ---- Figures ---------------------------------------------------------------------------------------------------------

SIZE = (12, 6.75)                         # inches, 16:9
BOX = {"left": 0.085, "right": 0.705, "bottom": 0.1, "top": 0.765}      # of the axes; names of lines on their right
GREY = "0.35"                             # for anything that belongs to no arm
DENSE = Arm(rewind, "dense network", GREY, "o")             # how figures draw what is not in ARM_TABLE
STYLE = {
    "font.size": 12, "axes.titlesize": 12, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": "0.5", "axes.axisbelow": True, "axes.grid": True,
    "axes.grid.axis": "y", "grid.color": "0.9", "axes.unicode_minus": False}


def look(arm: str) -> Arm:
    """Return how an arm is drawn."""
    return ARM_TABLE.get(arm, DENSE)


def text_colour(arm: str) -> np.ndarray:
    """Return an arm's colour (red, green, blue), darkened until its contrast with white is 4.5 to 1 (WCAG 2)."""
    rgb = np.array(to_rgb(look(arm).colour))
    while 1.05 / (sns.utils.relative_luminance(rgb) + 0.05) < 4.5:
        rgb = 0.98 * rgb
    return rgb


def new_figure(run: Run, title: str, shown: str, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """Return a figure with a title, a grey line that identifies the run, and a grid of axes in the same place."""
    figure = Figure(figsize=SIZE)                           # apart from pyplot: a notebook's own figures stay
    title = title[0].upper() + title[1:].replace(" %", "\u00a0%")
    broken = [textwrap.fill(title, width, break_on_hyphens=False) for width in range(40, 89)]
    title = min(broken, key=lambda text: text.count("\n"))                  # in few lines, none of which is short
    grey = f"{describe_run(run)}\n{shown[0].upper()}{shown[1:]}"
    if "tickets" in title.lower():
        grey += "; tickets: rewound networks"
    figure.text(0.012, 0.975, title, size=16, weight="bold", va="top", linespacing=1.2)
    figure.text(0.012, 0.962 - 0.042 * (1 + title.count("\n")), grey, size=11, color="0.4", va="top", linespacing=1.3)
    axes = figure.subplots(rows, columns, squeeze=False, sharex="col", sharey="row", gridspec_kw=BOX | grid)
    return figure, axes


def scale_density(axes: Axes, run: Run) -> None:
    """Put the weights remaining on a log axis, dense networks on the left, with a tick at the last level."""
    last = run.densities.min()
    ticks = [tick for tick in (100, 50, 20, 10, 5, 3, 2, 1, 0.5, 0.2, 0.1) if tick > 1.2 * last]
    axes.set(xscale="log", xlim=(110, last / 1.1), xlabel="weights remaining (%)")
    axes.set_xticks([*ticks, last], [*[f"{tick:g}" for tick in ticks], f"{last:.1f}"])
    axes.minorticks_off()


def name_lines(axes: Axes, run: Run, ends: dict[str, float]) -> None:
    """Write the names of arms, or other words, on the right of axes at the ends of their lines; push them apart."""
    if not ends:
        return
    names = sorted(ends, key=ends.get)
    words = {}
    for name in names:
        text = label(run, name)
        if ends[name] < axes.get_ylim()[0]:                 # below the axes
            text += f", {ends[name]:.1f}\u00a0↓"
        words[name] = "\n".join(textwrap.fill(line, 35) for line in text.splitlines())
    to_axes = axes.transScale + axes.transLimits
    heights = np.array([to_axes.transform((1, ends[name]))[1] for name in names]).clip(0, 1)
    line = 0.25 / (axes.get_position().height * SIZE[1])                    # height of a line of text, in axes
    sizes = np.array([line * (1 + words[name].count("\n")) for name in names])
    gaps = np.cumsum(sizes) - sizes / 2 - line / 2
    places = gaps + isotonic_regression(heights - gaps).x.clip(0, 1 - gaps[-1])         # least squares, in order
    for name, height, place in zip(names, heights, places, strict=True):
        leader = {"arrowstyle": "-", "color": look(name).colour, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
        axes.annotate(words[name], (1, height), (BOX["right"] + 0.022, place), "axes fraction",
                      ("figure fraction", "axes fraction"), color=text_colour(name), size=12, va="center",
                      annotation_clip=False, arrowprops=leader)


def draw_arms(axes: Axes, table: pd.DataFrame, x: str, y: str, errorbar: Any, **style: Any) -> dict[str, float]:
    """Draw each arm's mean over the trials, main arms bold and with their spread; return where the lines end."""
    arms = table["arm"].unique()
    bottom, _ = axes.get_ylim()
    colours = {"x": x, "y": y, "hue": "arm", "palette": {arm: look(arm).colour for arm in arms}, "legend": False}
    lines = colours | {"style": "arm", "dashes": {arm: (3, 1.5) if arm == "dense" else "" for arm in arms}}
    lines |= {"markers": {arm: look(arm).marker for arm in arms}, "markeredgewidth": 0.6}
    main = table["arm"].isin(["dense", *MAIN_ARMS])
    for rows, spread, width, size in ((table[~main], None, 1.3, 6), (table[main], errorbar, 2.6, 8)):
        if len(rows):
            sns.lineplot(rows, errorbar=spread, ax=axes, **lines | {"linewidth": width, "markersize": size} | style)

    averages = table.groupby(["arm", "level", x], as_index=False)[y].mean()
    below = averages[averages[y] < bottom].assign(**{y: bottom})
    if len(below):                                          # triangles on the lower edge
        sns.scatterplot(below, marker="v", s=50, clip_on=False, zorder=3, ax=axes, **colours)
    # The dense networks, if each arm's line starts there
    starts = averages[(averages["level"] == 0) & (averages["arm"] != "dense")].head(1)
    axes.plot(starts[x], starts[y], "o", color=GREY, markersize=8, markeredgecolor="white", zorder=3)
    return averages.groupby("arm")[y].last().to_dict()


def comparison_plot(run: Run, shown: list[str] | None = None, column: str = "test_accuracy") -> Figure | None:
    """Draw the test accuracy of some arms, or all, and below it the leads over dense networks that decide the title."""
    shown = shown or run.arms
    if not set(shown) & set(run.arms):
        return None
    note = f"above: {run.ranges}; below: {run.intervals}"
    figure, axes = new_figure(run, accuracy_title(run, shown, column), note, 2, height_ratios=(2, 1), hspace=0.1)
    upper, lower = axes[:, 0]
    scale_accuracies(upper, lower, run, column)
    dense = run.lines.loc[run.lines["level"] == 0, column]
    table = run.lines[run.lines["arm"].isin(shown)]
    leads = table[column] - table["trial"].map(by_trial(run, column)["dense"][0])
    table = table.assign(lead=leads.round(4))

    upper.axhspan(dense.min(), dense.max(), color=GREY, alpha=0.12, linewidth=0)
    upper.axhline(dense.mean(), color=GREY, linestyle="--")
    ends = draw_arms(upper, table, "weights_remaining", column, ("pi", 100), markevery=slice(-1))
    name_lines(upper, run, {f"dense network, {dense.mean().round(6):.2f} %": dense.mean()} | ends)

    lower.axhline(0, color=GREY, linestyle="--")
    names = {"dense network": 0}
    if run.trials > 2:                                      # fewer trials have no interval
        lower.axhspan(-MATCHING_MARGIN, 0, color=GREY, alpha=0.2, linewidth=0)
        as_good = f"whole interval above -{MATCHING_MARGIN}: as good"
        names = {"whole interval above 0: better": 0, as_good: -MATCHING_MARGIN}
    ends = draw_arms(lower, table[table["arm"].isin(MAIN_ARMS)], "weights_remaining", "lead", confidence_interval,
                     markevery=slice(-1), markersize=6, err_style="bars", err_kws={"elinewidth": 1.5})
    name_lines(lower, run, names | {arm: end for arm, end in ends.items() if end < -1.05})
    scale_density(lower, run)
    figure.align_ylabels()
    return figure


def accuracy_title(run: Run, shown: list[str], column: str) -> str:
    """Summarise the arms shown in one line."""
    if run.trials < 3:
        values = means(run, column).loc[run.fifth, ["dense", *shown]]
        return f"Test accuracy of {contrast(run, values, '{:.2f} %')} (too few trials to judge)"
    title = against_dense(run, shown[0], column)
    if column == "final_test_accuracy":
        title = f"after the last step, {title}"
    if len(shown) == 1:
        return title
    if "transfer" in shown:
        second = against_dense(run, "transfer", column)
    elif set(shown) <= {"rewind", "reinit"}:
        second = against_dense(run, "reinit", column)
    else:
        second = f"with {run.percent[run.fifth]}, they {controls_beaten(run, column)[2]}"
    return f"{title}; {second.replace(' dense networks', '').replace(' of the weights', '')}"


def scale_accuracies(upper: Axes, lower: Axes, run: Run, column: str) -> None:
    """Scale accuracies and leads for all arms, so that pictures of single arms can be shown one after the other."""
    main = run.lines[run.lines["arm"].isin(MAIN_ARMS)]
    scaled = pd.concat([main[column], means(run, column).stack()])
    high = scaled.max()
    farthest = 4 * max(1, high - main.loc[main["arm"] == "rewind", column].min())
    low = max(min(scaled.min(), high - 0.5), high - farthest)               # what is below it leaves the axes
    when = "after the last step" if column == "final_test_accuracy" else "at early stop"
    upper.set(ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)), ylabel=f"test accuracy {when} (%)")

    leads = pd.concat([compare(run, arm, "dense", column) for arm in run.main])
    top = max(0.5, 1.1 * leads["mean"].max(), min(2.5, 1.1 * np.nan_to_num(leads["high"].max())))
    lower.set(ylim=(-1.05, top), ylabel="lead over dense\nnetworks (points)")
    lower.locator_params(axis="y", nbins=4, steps=[1, 5, 10])


def accuracy_plot_iterative(run: Run) -> Figure | None:
    """Draw the tickets, on the axes of the comparison."""
    return comparison_plot(run, ["rewind"])


def accuracy_plot_reinit(run: Run) -> Figure | None:
    """Draw the re-initialised networks, on the axes of the comparison."""
    return comparison_plot(run, ["reinit"])


def final_accuracy_plot(run: Run) -> Figure | None:
    """Draw the comparison after the last step, as in the paper's figure 4, if networks stopped early before it."""
    if not run.stops_reached:
        return None
    return comparison_plot(run, column="final_test_accuracy")


def supermask_plot(run: Run) -> Figure | None:
    """Draw test accuracy before training: what masks and weights are good for by themselves."""
    if not run.arms:
        return None
    column = "untrained_test_accuracy"
    averages = means(run, column)
    when = "without any training" if run.constants["REWIND_STEP"] == 0 else "where training starts"
    title = f"Test accuracy {when}: {contrast(run, averages.loc[run.fifth], '{:.0f} %')}"
    figure, ((axes,),) = new_figure(run, title, run.ranges)

    axes.set(ylim=(0, 100), ylabel="test accuracy before training (%)")
    axes.axhline(10, color=GREY, linestyle=":")
    table = run.lines[run.lines["arm"] != "finetune"]       # it has been trained
    ends = draw_arms(axes, table, "weights_remaining", column, ("pi", 100))
    guessing = [arm for arm in run.arms if arm in ends and averages[arm].max() < 20]
    names = ",\n".join([label(run, arm) for arm in guessing])
    chance = f"chance, 10 %:\n{names}".removesuffix(":\n")
    name_lines(axes, run, {chance: 10} | {arm: end for arm, end in ends.items() if arm not in guessing})
    scale_density(axes, run)
    return figure


def learning_curves(run: Run) -> Figure:
    """Draw test error while training, both on log axes, at a few levels."""
    levels = levels_near(run, 51.3, 21.1, 7.0, 3.6)
    records = run.records[run.records["train_loss"].notna()]
    records = records.assign(error=100 - records["test_accuracy"])
    shown = run.arms
    note = run.ranges
    if len(run.arms) > 4:                                   # too many for small panels
        shown = run.main
        note += "; other controls are not shown"
    records = records[records["arm"].isin(["dense", *shown])]
    averages = records[records["level"].isin([0, run.fifth])].pivot_table("error", "step", "arm").dropna()
    step = min(averages.index, key=lambda step: abs(step - 100))
    title = f"Test error after {step} steps: {contrast(run, averages.loc[step], '{:.1f} %')}"
    figure, axes = new_figure(run, title, note, 1, len(levels), wspace=0.08)
    steps = [step for step in (100, 1000, 10_000, 100_000) if step <= records["step"].max()]
    if len(steps) < 3:
        steps.insert(0, records["step"].min())
    errors = [error for error in (90, 50, 20, 10, 5, 2, 1) if error > 0.8 * records["error"].min()]

    for panel, level in zip(axes[0], levels, strict=True):
        panel.set(xscale="log", yscale="log", xlabel="training step", ylabel="test error (%)",
                  title=f"{run.percent[level]} of weights")
        ends = draw_arms(panel, records[records["level"].isin([0, level])], "step", "error", ("pi", 100), markers=False)
        panel.axvline(step, color="0.8", zorder=0)          # the title mentions this step
        panel.set_xticks(steps, [f"{step:,}".replace(",000", "k") for step in steps])
        panel.set_yticks(errors, errors)
        panel.minorticks_off()
        panel.label_outer()
    name_lines(axes[0, -1], run, ends)
    return figure


def leads_plot(run: Run) -> Figure | None:
    """Draw the tickets' leads over dense networks and controls at a few levels, sorted by the densest of these."""
    if len(run.controls) < 2:
        return None
    levels = levels_near(run, 21.1, 7.0, 3.6)
    beaten, others, result = controls_beaten(run)
    title = f"With {run.percent[levels[0]]} of the weights, tickets {result}"
    if beaten and len(others) in (1, 2):
        title += f", all but {listing([f'“{label(run, arm)}”' for arm in others], 'and')}"
    note = f"{run.intervals}; grey: tickets at most {MATCHING_MARGIN} points behind"
    if run.trials < 3:
        title = "Leads of tickets: too few trials to judge"
        note = run.intervals
    figure, ((axes,),) = new_figure(run, title, note, left=0.27, right=0.93)

    accuracies = by_trial(run, "test_accuracy").loc[levels]
    leads = accuracies.drop(columns="rewind").rsub(accuracies["rewind"], axis="index").round(4)
    averages = leads.groupby("level").mean().sort_values(levels[0], axis="columns", ascending=False)
    arms = list(averages.columns)
    limit = 2 * max(0.5, averages.abs().max().nlargest(2).iloc[-1])         # one arm must not squeeze all others
    near = leads.where(leads.groupby("level").transform("mean").abs() <= limit)
    table = near.melt(ignore_index=False, value_name="lead").reset_index()
    density = table["level"].map(run.percent) + " of the weights"
    shades = sns.light_palette(ARM_TABLE["rewind"].colour, 4)[-len(levels):]
    sns.pointplot(table, x="lead", y="arm", hue=density, order=arms, dodge=0.25 * (len(levels) - 1), palette=shades,
                  errorbar=confidence_interval, linestyle="none", markersize=7, err_kws={"linewidth": 2}, ax=axes)
    for (level, arm), lead in averages.stack().items():
        place = arms.index(arm) + 0.25 * (levels.index(level) - (len(levels) - 1) / 2)
        if lead > limit:
            axes.text(1, place, f" {lead:.1f} →", size=11, transform=axes.get_yaxis_transform(), va="center")
        if lead < -limit:
            axes.text(0, place, f" ← {lead:.1f}", size=11, transform=axes.get_yaxis_transform(), va="center")

    if run.trials > 2:                                      # fewer trials have no interval
        axes.axvspan(-MATCHING_MARGIN, 0, color=GREY, alpha=0.2, linewidth=0)
    axes.axvline(0, color=GREY, linestyle="--", zorder=0)
    axes.set_yticks(range(len(arms)), [label(run, arm) for arm in arms])
    for text, arm in zip(axes.get_yticklabels(), arms, strict=True):
        text.set_color(text_colour(arm))
    axes.set(xlabel="lead of the tickets in test accuracy (points)", ylabel="")
    axes.grid(axis="x")
    sns.move_legend(axes, "lower right", bbox_to_anchor=(1, 0.98), ncols=3, title=None, frameon=False)
    return figure


def early_stopping_plot(run: Run) -> Figure | None:
    """Draw early-stopping steps, medians and ranges, and in a strip above how many trials have not reached theirs."""
    if not run.stops_reached:
        return None
    table = run.stops
    steps = table.loc[(slice(None), [0, run.fifth]), "median"].droplevel("level")
    title = f"Median early-stopping step: {contrast(run, steps, '{:,.0f}')}"
    beaten = [f"{plural(run, arm)} ({steps[arm]:,.0f})".replace("nan", "not reached")
              for arm in ("dense", *run.main[1:]) if compare_steps(run, "rewind", arm, run.fifth)[1] == "supported"]
    if beaten:
        title = (f"With {run.percent[run.fifth]} of the weights, tickets stop sooner (median step "
                 f"{steps['rewind']:,.0f}) than {listing(beaten, 'and')}")
    late = [arm for arm in ("dense", *run.arms) if table.loc[arm, "missing"].any()]
    note = f"medians and ranges; above: how many of {run.trials} networks have not reached their early stop"
    figure, axes = new_figure(run, title, note, 2, height_ratios=(len(late) + 1, 16), hspace=0.05)

    strip, lower = axes[:, 0]
    strip.set(ylim=(0.4 - max(1, len(late)), 0.6), yticks=[])
    strip.set_ylabel("not\nreached", rotation=0, ha="right", va="center")
    strip.tick_params(axis="x", length=0)
    lower.set(ylim=(0, run.records["step"].max()), ylabel="early-stopping step")
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.axhline(steps["dense"], color=GREY, linestyle="--")
    for n, arm in enumerate(["dense", *run.arms]):
        stops = table.loc[arm]
        x = run.densities[stops.index]
        if arm != "dense":
            x = x * 1.15 ** (0.5 - (n - 0.5) / len(run.arms))               # side by side
        size, width = (8, 2.6) if arm in MAIN_ARMS else (6, 1.3)
        lower.errorbar(x, stops["median"], [stops["median"] - stops["first"], stops["last"] - stops["median"]],
                       color=look(arm).colour, marker=look(arm).marker, markeredgecolor="white", markersize=size,
                       linewidth=width, elinewidth=1.2)
        for level in stops.index[stops["missing"] > 0]:
            strip.text(x[level], -late.index(arm), stops.loc[level, "missing"], color=text_colour(arm), size=11,
                       ha="center", va="center")
    ends = table["median"].groupby("arm").tail(1).droplevel("level")[["dense", *run.arms]]
    name_lines(lower, run, ends.dropna().to_dict())
    name_lines(strip, run, {arm: -row for row, arm in enumerate(late)})
    scale_density(lower, run)
    return figure


def mask_plot(run: Run) -> Figure | None:
    """Draw where the first layer's connections remain: their share at each pixel over the mean of all pixels."""
    if run.mask is None or not run.arms:
        return None
    levels = levels_near(run, 51.3, 21.1, 7.0, 3.6)
    shares = run.mask.pivot(index="pixel", columns="level", values="share_remaining")
    image = run.mask.groupby("pixel")["mean_intensity"].first()
    bright = image.nlargest(len(image) // 4).index
    sparsest = shares[levels[-1]]
    share = f"{100 * sparsest[bright].sum() / sparsest.sum():.0f} %"
    title = (f"With {run.percent[levels[-1]]} of the weights, {share} of the first layer's remaining connections are "
             "at the brightest quarter of the pixels (25 % by chance)")
    note = "connections kept at a pixel, relative to the average pixel; means over trials"
    figure, axes = new_figure(run, title, note, 2, 3, left=0.02, right=0.98, bottom=0.03, top=0.765, hspace=0.17,
                              wspace=0.02)

    picture, *panels = axes.flat
    picture.imshow(image.to_numpy().reshape(28, 28), cmap="gray")
    picture.set_title("mean training image")
    for panel, level in zip(panels, levels, strict=False):
        relative = shares[level].to_numpy().reshape(28, 28) / shares[level].mean()
        drawn = panel.imshow(relative, cmap="PuOr_r", norm=LogNorm(0.5, 2, clip=True))      # 0 has no logarithm
        panel.set_title(f"{run.percent[level]} of the weights")
    for panel in axes.flat:
        panel.set_axis_off()
    bar = figure.colorbar(drawn, ax=panels[-1], location="top", extend="both", fraction=0.5)
    bar.set_ticks([0.5, 1, 2], labels=["half", "average", "twice"])
    bar.minorticks_off()
    bar.set_label("connections kept at a pixel", labelpad=10)
    return figure


FIGURES = (learning_curves, comparison_plot, accuracy_plot_iterative, accuracy_plot_reinit, final_accuracy_plot,
           supermask_plot, leads_plot, early_stopping_plot, mask_plot)


# ---- Summary ---------------------------------------------------------------------------------------------------------

class Claim(NamedTuple):
    """A claim that arm x beats or matches arm y, or stops before it."""
    text: str
    x: str
    relation: str                         # "beats", "matches" or "stops before"
    y: str
    percent: float                        # of the weights remaining
    published: str = ""                   # what the paper reports
    column: str = "test_accuracy"         # of networks.csv


PAPER_CLAIMS = (
    Claim("Tickets beat dense networks", "rewind", "beats", "dense", 13.5, "more than 0.3 points"),
    Claim("Tickets match dense networks", "rewind", "matches", "dense", 3.6, "yes"),
    Claim("Tickets beat dense networks after the last step", "rewind", "beats", "dense", 13.5, "up to 0.35 points",
          "final_test_accuracy"),
    Claim("Dense networks beat re-initialised networks", "dense", "beats", "reinit", 21.1, "at this level and sparser"),
    Claim("Tickets beat re-initialised networks", "rewind", "beats", "reinit", 21.1, "0.5 points"),
    Claim("Tickets beat one-shot pruning", "rewind", "beats", "oneshot", 7.0, "shown as curves"),
    Claim("Tickets beat shuffled connections", "rewind", "beats", "shuffle_mask", 21.1, "shown as curves"),
    Claim("Tickets stop before dense networks", "rewind", "stops before", "dense", 21.1, "38 % earlier"),
    Claim("Tickets stop before re-initialised networks", "rewind", "stops before", "reinit", 21.1, "60 % earlier"))


def verdict(run: Run) -> list[str]:
    """State the results in plain sentences."""
    dense = by_trial(run, "test_accuracy").loc[0, "dense"]
    sentences = [f"Dense networks reach {dense.mean().round(6):.2f} % test accuracy at early stop (mean of "
                 f"{count(run.trials, 'trial')}; range {dense.min():.2f} to {dense.max():.2f})."]
    if run.trials < 3:
        sentences.append("At least three trials are needed for any conclusion.")
    if not run.arms:
        return sentences

    if run.trials >= 3:
        found = [against_dense(run, arm) for arm in run.main]
        sentences += [f"{text[0].upper()}{text[1:]}." for text in found]
        behind = behind_from(run, compare(run, "rewind", "dense"))
        if behind and "fall behind" not in found[0]:
            sentences.append(f"Tickets fall behind dense networks at {behind} and sparser.")
    leads = []
    for arm in ("dense", *run.main[1:]):
        lead = compare(run, "rewind", arm).loc[run.fifth]
        verb = {"ahead": "beat", "behind": "trail"}.get(lead["word"])
        words = f"{verb} {plural(run, arm)} by {lead['text'].lstrip('+-')} points"
        if verb is None:
            words = f"differ from {plural(run, arm)} by {lead['text']} points ({lead['word']})"
        leads.append(words)
    given = f"With {run.percent[run.fifth]} of the weights, tickets"
    sentences.append(f"{given} {'; they '.join(leads)}.")
    if run.trials >= 3 and run.main != run.arms:
        beaten, others, _ = controls_beaten(run)
        sentence = f"{given} beat {listing(beaten, 'and') or 'no control'}"
        if beaten and others:
            sentence += f", but not {listing(others, 'or')}"
        sentences.append(f"{sentence}.")
    too_large = sorted(set(run.networks["arm"]) - {"dense", *run.arms})
    if too_large:
        sentences.append(f"Not compared, with more weights at every level: {listing(too_large, 'and')}.")
    untrained = contrast(run, means(run, "untrained_test_accuracy").loc[run.fifth], "{:.2f} %")
    return [*sentences, f"Test accuracy before training: {untrained}."]


def why_untested(run: Run, claim: Claim) -> str:
    """Return the reason why a run cannot test a claim; empty if it can."""
    for arm in (claim.x, claim.y):
        if arm not in ("dense", *run.arms):
            return f"the run has no `{arm}` arm"
    level, = levels_near(run, claim.percent)
    if abs(math.log(run.densities[level] / claim.percent)) > math.log(1.25):
        return f"no level is near {claim.percent} % of the weights"
    if claim.relation == "stops before":
        if run.trials < 6:
            return "at least six trials are needed to compare steps"
        if by_trial(run, "stop_step").loc[level, [claim.x, claim.y]].isna().mean().min() > 0.5:
            return "most networks were still improving when training ended"
    return ""


def judge(run: Run, claim: Claim) -> tuple[str, str]:
    """Return what a run measured about a claim, and the answer."""
    level, = levels_near(run, claim.percent)
    if claim.relation == "stops before":
        return compare_steps(run, claim.x, claim.y, level)
    table = compare(run, claim.x, claim.y, claim.column)
    if level not in table.index:
        return MORE_WEIGHTS, ""
    return table.loc[level, "text"], table.loc[level, claim.relation]


def claims_section(run: Run) -> str:
    """Return the table of the paper's claims, and the reasons why some were not tested; nothing for other networks."""
    if (run.constants["DATASET"], run.constants["MODEL"]) != ("MNIST", "mlp"):
        return ""
    rows = []
    reasons = ""
    for claim in PAPER_CLAIMS:
        level, = levels_near(run, claim.percent)
        reason = why_untested(run, claim)
        if reason:
            reasons += f"- {claim.text}: {reason}.\n"
        else:
            rows.append([claim.text, run.percent[level], claim.published, *judge(run, claim)])
    text = "## The paper's claims\n\n" + markdown(["claim", "weights remaining", "the paper", "here", "answer"], rows)
    if reasons:
        text += f"Not tested in this run:\n\n{reasons}\n"
    return text


def controls_section(run: Run) -> str:
    """Return a table that answers each control's question at a few levels."""
    rows = []
    levels = levels_near(run, 21.1, 7.0, 3.6)
    for arm in run.controls:
        x, relation, y = [arm if word == "arm" else word for word in ARM_TABLE[arm].claim.split()]
        row = [name_weights(run, ARM_TABLE[arm].question), f"{x} - {y}"]
        for level in levels:
            number, answer = judge(run, Claim("", x, relation, y, run.densities[level]))
            answer = {"supported": "yes", "contradicted": "no"}.get(answer, answer)
            row.append(f"{number}: {answer}".removesuffix(": "))
        rows.append(row)
    return "## Controls\n\n" + markdown(["question", "difference", *[f"at {run.percent[n]}" for n in levels]], rows)


def level_table(run: Run, arms: list[str]) -> str:
    """Return a table of some arms with a row per level; the main arms are compared with dense networks, too."""
    table = pd.DataFrame({"weights remaining": run.percent.drop(0)})
    for arm in arms:
        table[f"{arm}, %"] = means(run, "test_accuracy")[arm].dropna().map("{:.2f}".format)
        pairs = [(arm, "dense")] if arm in MAIN_ARMS else []
        if arm != "rewind":
            pairs.append(("rewind", arm))
        for x, y in pairs:
            compared = compare(run, x, y)
            table[f"{x} - {y}"] = compared["text"] + ", " + compared["word"]
        if run.stops_reached:
            table[f"{arm}, step"] = run.stops.loc[arm, "median"].map("{:,.0f}".format)
    if "rewind" in arms:
        table["rewind, untrained, %"] = means(run, "untrained_test_accuracy")["rewind"].map("{:.2f}".format)
    return markdown(table.columns, table.fillna(MORE_WEIGHTS).replace("nan", "not reached").to_numpy())


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of strings as Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n"


HOW_TO_READ = f"""## How to read this page

- *Rewind* is the ticket: the surviving connections with their original weights. *Reinit* has the same connections with
  fresh random weights. Reinit, like every arm but rewind, is a control.
- Accuracies are mean test accuracies at *early stop*, the evaluation with the lowest validation loss; early-stopping
  steps are medians. *Not reached*: it came in the last 5 % of training or at one of the last two evaluations, so the
  network may still have been improving.
- x - y is a difference in test accuracy in percentage points (*points*), paired by trial: mean ± half-width of the
  95 % confidence interval (Student's t). The whole interval decides, not the mean. It holds for one test set and one
  validation split, and for each level by itself. At least three trials are needed for any conclusion. Verdicts
  use unrounded numbers; those on the paper's claims are about direction, not effect size.

| question | supported, yes | contradicted, no |
| --- | --- | --- |
| Does x beat y? | interval above 0 | interval below 0 |
| Does x match y? | interval above -{MATCHING_MARGIN} | interval below -{MATCHING_MARGIN} |
| Does x stop before y? | exact sign test, 2.5 % on each side | likewise |

- The {MATCHING_MARGIN} points are a non-inferiority margin of our choice. "Does x match y?" is answered *behind, size
  open* if the interval is below 0 and contains -{MATCHING_MARGIN}. Anything else is *inconclusive*.
- In tables by level, x is *ahead* (interval above 0), *as good* (above -{MATCHING_MARGIN}), *behind* (below 0 and not
  as good) or *inconclusive*.
- The sign test counts ties, and pairs in which neither network stopped early, against both.

"""


def summary(run: Run) -> str:
    """Return summary.md: verdict, picture, claims, controls, a row per level, how to read it, constants, versions."""
    text = f"# {describe_run(run)}: {', '.join(run.arms) or 'dense'}\n\n"
    text += "\n".join(f"- {sentence}" for sentence in verdict(run)) + "\n\n"
    if run.arms:
        text += "![Test accuracy versus weights remaining](comparison_plot.png)\n\n"
        text += claims_section(run)
        if run.controls:
            text += controls_section(run)
        text += f"## Level by level\n\n{level_table(run, run.main)}"
        others = [arm for arm in run.arms if arm not in MAIN_ARMS]
        if others:
            text += f"<details>\n<summary>Other controls</summary>\n\n{level_table(run, others)}</details>\n\n"
        text += name_weights(run, HOW_TO_READ)
    values = pd.json_normalize(run.info).to_dict("records")[0]
    names = sorted(values, key=lambda name: (not name.startswith("constants."), not name.startswith("versions.")))
    lines = [f"{re.sub('^(constants|versions)[.]', '', name)} = {values[name]!r}" for name in names]
    text += "## Constants and versions\n\n```\n" + "\n".join(lines) + "\n```\n\n"
    return text + "`code_version`: sha256 of the code that determines the numbers, comments aside.\n"


# ---- A results folder holds one run ----------------------------------------------------------------------------------

RESULT_FILES = ("metrics.csv", "networks.csv", "mask.csv", "tickets.pt", "run.json", "summary.md",
                *[f"{draw.__name__}.png" for draw in FIGURES], "checkpoint.pt")

# The code from the experiment to the banner, without docstrings, comments and blank lines. It is read now: the file may
# be edited while it runs.
CODE = Path(__file__).read_text(encoding="utf-8").split("\n# ---- Experiment")[1].split("\n# ====")[0]
CODE = re.sub(r'"""[\s\S]*?"""', "", CODE)
CODE = re.sub(r"(^|\s+)#( .*)?$", "", CODE, flags=re.MULTILINE)             # a colour, "#0173b2", is not a comment
CODE = "\n".join([line for line in CODE.splitlines() if line.strip()])
VERSION = hashlib.sha256(CODE.encode()).hexdigest()


def resolve_path(path: str | Path) -> Path:
    """Return an absolute path; relative paths are relative to this script's folder."""
    return Path(__file__).resolve().parent / os.path.expanduser(path)


def write_atomically(path: Path, content: str | pd.DataFrame | Figure | dict) -> None:
    """Write text, a table as CSV, a figure as PNG or tensors to a temporary file, then rename it, in case of a kill."""
    buffer = io.BytesIO()                                   # if the disk is full, torch.save would hide the OSError
    if isinstance(content, str):
        buffer.write(content.encode())
    elif isinstance(content, pd.DataFrame):
        content.to_csv(buffer, index=False, lineterminator="\n")
    elif isinstance(content, Figure):
        content.savefig(buffer, format="png", dpi=150)
    else:
        torch.save(content, buffer)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            os.fsync(file.fileno())                         # flush before renaming, against power loss
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_verified(path: Path) -> dict:
    """Load what torch.save wrote. Raises BadZipFile for damaged files; torch.load does not verify checksums."""
    content = io.BytesIO(path.read_bytes())
    try:
        if zipfile.ZipFile(content).testzip():
            raise zipfile.BadZipFile
    except Exception as error:                              # a damaged zip archive can fail in many ways
        if out_of_memory(error):
            raise
        raise zipfile.BadZipFile("it is damaged, or another kind of file") from None
    content.seek(0)
    return torch.load(content, map_location="cpu", weights_only=True)


def require(holds: Any, sentence: str) -> None:
    """Raise UserError with a sentence unless something holds."""
    if not holds:
        raise UserError(f"{sentence}.")


@contextlib.contextmanager
def explain_errors(sentence: str) -> Iterator[None]:
    """Turn errors into a UserError: a sentence and, in parentheses, the reason. Out-of-memory errors pass through."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{sentence} ({reason}).") from None


def read_run(folder: Path) -> Run:
    """Read a results folder. Raises UserError if it holds no run that can be drawn."""
    with explain_errors(f"{folder} holds no run to draw: run.json and metrics.csv are needed"):
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        records = pd.read_csv(folder / "metrics.csv")
        mask = None
        if (folder / "mask.csv").exists():
            mask = pd.read_csv(folder / "mask.csv")[["level", "pixel", "share_remaining", "mean_intensity"]]
            if not set(records["level"]) <= set(mask["level"]):
                raise ValueError("mask.csv lacks some of the run's levels")
        unknown = set(records["arm"]) - {"dense", *ARM_TABLE}
        if unknown:
            raise ValueError(f"arms that ARM_TABLE does not know: {', '.join(sorted(map(str, unknown)))}")
        run = Run(info, records, measure(records), mask)
        describe_run(run)                                   # needs some constants
    return run


def redraw(folder: str | Path) -> Run:
    """Write a results folder's networks.csv, summary.md and figures anew, from metrics.csv, run.json and mask.csv."""
    folder = resolve_path(folder)
    run = read_run(folder)
    write_atomically(folder / "networks.csv", run.networks)
    write_atomically(folder / "summary.md", summary(run))
    with matplotlib.style.context(STYLE, after_reset=True):                 # whatever style the user has set elsewhere
        for draw in FIGURES:
            path = folder / f"{draw.__name__}.png"
            figure = draw(run)
            if figure is None:
                path.unlink(missing_ok=True)                # a stale one
            else:
                write_atomically(path, figure)
    return run


def run_info(device: torch.device, tickets_from: dict | None) -> dict:
    """Return the contents of run.json: everything that identifies a run."""
    versions = {library.__name__: str(library.__version__) for library in (torch, torchvision, np, pd, matplotlib, sns)}
    return {
        "constants": constants(),
        "code_version": VERSION,
        "data_sha256": CONTENTS[DATASET],
        "versions": {"python": sys.version.split()[0]} | versions,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "tickets_from": tickets_from,
    }


def identify(info: dict, device: torch.device) -> dict:
    """Return what two runs must have in common so that one can resume the other."""
    free = ("LEVELS", "STACK_SIZE", "TICKETS_FROM", "DATA_DIR", "RESULTS_DIR", "DEVICE")
    identity = {name: value for name, value in info["constants"].items() if name not in free}
    identity |= {"code version": VERSION, "data": info["data_sha256"],
                 "torch": info["versions"]["torch"], "kind of device": device.type}
    if info["tickets_from"]:
        identity["TICKETS_FROM"] = info["tickets_from"]["sha256"]
    for arm in ARMS:                                        # a user's own may be defined below the banner, or elsewhere
        start = ARM_TABLE[arm].start
        if f"def {start.__name__}(given: Given)" not in CODE:
            with contextlib.suppress(OSError):              # typed in an interpreter, it has no source
                identity[f"arm {arm}"] = hashlib.sha256(inspect.getsource(start).encode()).hexdigest()
    if any(isinstance(layer, nn.Conv2d) for layer in build_network(MODEL, DROPOUT)):
        identity["number of threads"] = info["threads"]     # on which the last bits of convolutions depend
    return identity


def read_checkpoint(folder: Path) -> tuple[dict, State]:
    """Return (identity, state), or ({}, State()) if the checkpoint is missing or damaged."""
    try:
        saved = load_verified(folder / "checkpoint.pt")
        return saved["identity"], State(**saved["state"])
    except (FileNotFoundError, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, LookupError, TypeError):
        return {}, State()


def load_state(folder: Path, identity: dict) -> State:
    """Return the state to resume from: the checkpoint's if it is this run's, else a new one. Say which, and why."""
    path = folder / "checkpoint.pt"
    saved, state = read_checkpoint(folder)
    if saved == identity:
        if state.level < LEVELS:
            say(f"resuming after level {state.level} of {LEVELS}, from {path}")
        else:
            say(f"nothing is left to train: the results are redrawn from {path} (to train again, remove it)")
        return state
    if saved:
        differ = ", ".join(sorted(name for name in identity | saved if identity.get(name) != saved.get(name)))
        say(f"{folder} holds a different run (different {differ}): its files will be moved to previous/ in it")
    elif path.exists():
        say(f"{path} is damaged: it will be moved to previous/, and this run starts afresh")
    return State()


def save_state(state: State, folder: Path, identity: dict) -> None:
    """Write the checkpoint; first move whatever else of a run is in the folder to previous/<time>/."""
    if rank_and_world_size()[0] > 0:
        return
    files = [folder / name for name in RESULT_FILES if (folder / name).exists()]
    if files and read_checkpoint(folder)[0] != identity:
        previous = folder / "previous" / datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S.%f")
        previous.mkdir(parents=True)
        for path in files:
            path.rename(previous / path.name)
        say(f"the results of an earlier run are now in {previous}")
    write_atomically(folder / "checkpoint.pt", {"identity": identity, "state": vars(state)})


def write_results(state: State, data: Dataset, info: dict, folder: Path) -> Run:
    """Write records and tickets first, since they are the work, then draw everything from them."""
    write_atomically(folder / "metrics.csv", pd.DataFrame(state.records))
    tickets = {"constants": info["constants"] | {"LEVELS": state.level},
               "theta0": stack([state.theta_k[trial] for trial in range(TRIALS)]),
               "pruned_at": stack([state.pruned_at[trial] for trial in range(TRIALS)])}
    write_atomically(folder / "tickets.pt", tickets)
    info["constants"]["LEVELS"] = max(LEVELS, state.level)
    write_atomically(folder / "run.json", json.dumps(info, indent=1))
    name, pruned_at = next(iter(tickets["pruned_at"].items()))
    if pruned_at.shape[2:] == (28 * 28,):                   # (trials, units, pixels): no convolution's
        image = data["train"][0].mean(0).flatten().cpu().numpy()
        tables = {}
        for level in range(state.level + 1):
            share = masks_at(tickets["pruned_at"], level)[name].mean((0, 1)).numpy()
            tables[level] = pd.DataFrame({"share_remaining": share, "mean_intensity": image})
        mask = pd.concat(tables, names=["level", "pixel"]).round(4).reset_index()
        write_atomically(folder / "mask.csv", mask)
    return redraw(folder)


# ---- Saved tickets ---------------------------------------------------------------------------------------------------

def load_tickets(path: str | Path) -> dict:
    """Read a tickets.pt: its run's constants, theta0 and pruned_at. Raises UserError for other or damaged files."""
    with explain_errors(f"{path} cannot be read as the tickets.pt of a run"):
        tickets = load_verified(resolve_path(path))
        saved = tickets["constants"]
        missing = {"DATASET", "DROPOUT", "LEVELS", "PRUNE_RATE", "PRUNE_SCOPE", "REWIND_STEP"} - set(saved)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        last = pick(tickets["theta0"], saved["TRIALS"] - 1)
        as_plain_network(build_network(saved["MODEL"], 0), last)            # names and shapes fit
        for name, weights in full_masks(tickets["theta0"]).items():
            if tickets["pruned_at"][name].shape != weights.shape:
                raise ValueError(f"the shape of {name} differs")
    return tickets


def load_ticket(path: str | Path, trial: int, level: int) -> nn.Sequential:
    """Return one ticket as an ordinary network with `torch.nn.utils.prune` masks, ready to train.

    Its weights are the initial ones, or with REWIND_STEP those after so many steps. Raises UserError for a file that
    is not a tickets.pt, IndexError for a trial or a level that it does not hold.
    """
    tickets = load_tickets(path)
    saved = tickets["constants"]
    if not (0 <= trial < saved["TRIALS"] and 0 <= level <= saved["LEVELS"]):
        raise IndexError(f"{path} holds trials 0 to {saved['TRIALS'] - 1} and levels 0 to {saved['LEVELS']}")
    network = as_plain_network(build_network(saved["MODEL"], saved["DROPOUT"]), pick(tickets["theta0"], trial))
    masks = masks_at(pick(tickets["pruned_at"], trial), level)
    with torch.no_grad():                                   # else the network could not be copied
        for name, layer in weighted_layers(network).items():
            torch_prune.custom_from_mask(layer, "weight", masks[f"{name}.weight"])
    return network


def load_source_tickets() -> tuple[dict[int, tuple[Weights, Levels]], dict | None]:
    """Return theta0 and pruned_at from TICKETS_FROM by trial, if any, and what is known of their run.

    Raises UserError unless they fit the constants and keep as many weights at each level.
    """
    if TICKETS_FROM is None:
        return {}, None
    path = resolve_path(TICKETS_FROM)
    require(path.resolve().parent != resolve_path(RESULTS_DIR).resolve(),
            "TICKETS_FROM is in RESULTS_DIR, which this run writes to: choose another RESULTS_DIR")
    tickets = load_tickets(path)
    saved = tickets["constants"]
    for name in ("MODEL", "PRUNE_RATE", "PRUNE_SCOPE", "REWIND_STEP"):
        require(saved[name] == constants()[name], f"the tickets in {path} were found with {name}={saved[name]}: set "
                "the same here, so that tickets with equal numbers of weights are compared")
    require(saved["TRIALS"] >= TRIALS and saved["LEVELS"] >= LEVELS, f"{path} holds {count(saved['TRIALS'], 'trial')} "
            f"and {count(saved['LEVELS'], 'level')}: set TRIALS and LEVELS no higher")
    by_trial = {trial: (pick(tickets["theta0"], trial), pick(tickets["pruned_at"], trial)) for trial in range(TRIALS)}
    return by_trial, {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "constants": saved}


# ---- Several processes, and the console ------------------------------------------------------------------------------

def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; only what torchrun itself started counts as several."""
    if not (torch.distributed.is_available() and torch.distributed.is_torchelastic_launched() and "RANK" in os.environ):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def init_distributed() -> None:
    """Initialise torch.distributed if there are several processes."""
    if rank_and_world_size()[1] == 1 or torch.distributed.is_initialized():
        return
    store, rank, processes = next(torch.distributed.rendezvous("env://"))
    # After a restart by torchrun, use a new prefix: what a killed process left in the store would make all others wait.
    store = torch.distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    forever = datetime.timedelta(days=30)                   # the slowest process is waited for
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes, timeout=forever)
    say(f"{processes} processes share {count(TRIALS, 'trial')}; the progress shown is that of the first, "
        f"which has {len(trials_of_rank())}")


def trials_of_rank() -> list[int]:
    """Return the trials of this process; there may be none."""
    rank, processes = rank_and_world_size()
    return list(range(TRIALS)[rank::processes])


def gather(part: Any) -> list:
    """Return each process's part, by rank, on every process."""
    parts = [part] * rank_and_world_size()[1]
    if len(parts) > 1:
        try:
            torch.distributed.all_gather_object(parts, part)
        except RuntimeError:                                # another process has ended: only its own message matters
            raise SystemExit(1) from None
    return parts


def say(text: str) -> None:
    """Print on rank 0; a closed console is no reason to end."""
    if rank_and_world_size()[0] == 0:
        try:
            print(text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def network_steps(level: int) -> int:
    """Return the training steps of a level on this process, summed over networks."""
    steps = EPOCHS * steps_per_epoch()
    arms = ARMS if level > 0 else ("dense",)
    return len(trials_of_rank()) * sum(steps - first_step(arm) for arm in arms)


def progress_bar(level: int) -> tqdm:
    """Return a bar over the steps of all networks of a level, shown on a terminal only."""
    visible = rank_and_world_size()[0] == 0 and sys.stderr is not None and sys.stderr.isatty()
    return tqdm(total=network_steps(level), desc=f"level {level} of {LEVELS}", leave=False, disable=not visible,
                bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left")


def report_level(state: State, seconds: float) -> None:
    """Print a line about the last finished level, and the time left: later levels take no longer per network."""
    if rank_and_world_size()[0] > 0:
        return                                              # it may have no trial at all
    records = [row for row in state.records if row["level"] in (0, state.level)]
    networks = measure(pd.DataFrame(records)).query("level == @state.level")
    means = networks.groupby("arm")["test_accuracy"].mean().round(6)
    cells = [f"{means.get(arm, means.iloc[0]):>{max(9, len(arm))}.2f} %" for arm in ARMS]
    percent = networks["weights_remaining"].iloc[0]
    minutes = seconds / 60 / network_steps(state.level) * (LEVELS - state.level) * network_steps(1)
    say(f"{state.level:5}{percent:18.1f} %{''.join(cells)}{minutes:8.1f} min")


# ---- Constants and arguments -----------------------------------------------------------------------------------------

TYPES = typing.get_type_hints(sys.modules[__name__])        # of the constants, by name


def constants() -> dict:
    """Return all constants by name; a whole number becomes a float if the constant is one."""
    values = {name: globals()[name] for name in TYPES}
    for name, value in values.items():
        if TYPES[name] in (float, float | None) and type(value) is int:
            with contextlib.suppress(OverflowError):        # out of range, as `check_constants` will say
                values[name] = float(value)
    return values


def read_arguments(arguments: list[str]) -> dict:
    """Return the constants that NAME=VALUE arguments set: Python literals, or bare words as strings."""
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        require(name and equals, f"{argument!r} is not of the form NAME=VALUE, such as TRIALS=1")
        if name not in TYPES:
            meant, = difflib.get_close_matches(name.upper(), TYPES, n=1, cutoff=0)
            raise UserError(f"there is no constant {name}; did you mean {meant}?")
        value = text                                        # a bare word, unless it is a literal
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            value = ast.literal_eval(text)
        if TYPES[name] is tuple and isinstance(value, str):                             # ARMS=rewind,oneshot
            value = tuple(word.strip() for word in value.split(","))
        elif TYPES[name] in (str, str | None) and not isinstance(value, TYPES[name]):
            value = text                                    # a folder may be called 2026
        values[name] = value
    return values


def check_constants() -> None:
    """Raise UserError if a constant is of a wrong type or out of range, or if constants are incompatible."""
    for name, value in constants().items():
        kind = TYPES[name]
        right = isinstance(value, kind) and not isinstance(value, bool)
        require(right, f"{name} must be of type {getattr(kind, '__name__', kind)}, not {value!r}")
    choices = {"DATASET": tuple(CONTENTS), "PIXELS": ("standardised", "unit_interval", "unit_length"),
               "INIT": ("kaiming_normal", "xavier_normal"), "PRUNE_SCOPE": ("layer", "global"),
               "SCHEDULE": ("constant", "linear")}
    for name, words in choices.items():
        value = globals()[name]
        require(value in words, f"{name} must be one of {', '.join(words)}, not {value}")
    limits = {"LEVELS": (0, 255), "TRIALS": (1, 1_000),     # tickets.pt has 8 bits for levels
              "EPOCHS": (1, 10**9), "EVAL_EVERY": (1, 10**9), "STACK_SIZE": (1, 10**9),
              "VALIDATION_SIZE": (1, 59_999), "BATCH_SIZE": (1, 60_000 - VALIDATION_SIZE),
              "DROPOUT": (0, 0.99), "SEED": (0, 2**63 - 1)}
    for name, (low, high) in limits.items():
        value = globals()[name]
        require(value is None or low <= value <= high, f"{name} must be {low} to {high}, not {value}")

    require(DATA_DIR and RESULTS_DIR, "DATA_DIR and RESULTS_DIR must be the paths of folders")
    require(re.fullmatch(r"auto|cpu|cuda(:\d+)?", DEVICE), f"DEVICE must be auto, cpu, cuda, or cuda:1, not {DEVICE}")
    known = all(isinstance(arm, str) and arm in ARM_TABLE for arm in ARMS)
    require(known, f"ARMS may contain only {', '.join(ARM_TABLE)}, not {', '.join(map(str, ARMS))}")
    require(len(set(ARMS)) == len(ARMS), "ARMS must name each arm once")
    require("rewind" in ARMS, "ARMS must contain rewind: its networks are the ones that are pruned")
    require(("transfer" in ARMS) == (TICKETS_FROM is not None), "the arm transfer and TICKETS_FROM need each other: "
            "set both or neither")
    require(0 < PRUNE_RATE < 1, f"PRUNE_RATE must be between 0 and 1, not {PRUNE_RATE}")
    require(0 < LEARNING_RATE < math.inf, f"LEARNING_RATE must be above 0, not {LEARNING_RATE}")
    require(0 <= WEIGHT_DECAY < math.inf, f"WEIGHT_DECAY must be at least 0, not {WEIGHT_DECAY}")
    require(CLIP_NORM is None or 0 < CLIP_NORM < math.inf, f"CLIP_NORM must be above 0, or None, not {CLIP_NORM}")
    steps = EPOCHS * steps_per_epoch()
    require(0 <= REWIND_STEP < steps, f"REWIND_STEP must be below the {steps} steps of training, not {REWIND_STEP}")


def check_network(device: torch.device) -> None:
    """Raise UserError unless `forward` computes what the plain network does, and each level prunes some weights."""
    network = build_network(MODEL, DROPOUT)                 # raises UserError for an unknown MODEL
    with explain_errors("the network in build_network cannot be trained in a stack: use nn.Conv2d, pooling and "
                        "activations before one nn.Flatten, and after it nn.Linear, activations and, after a linear "
                        "layer, nn.Dropout(dropout); with biases, no groups, nothing in place, ten classes, the last "
                        "layer called output, and a name"):
        weights = stack([initial_weights(generator("init", trial)) for trial in (0, 1)])
        weights = {name: tensor.to(device) for name, tensor in weights.items()}
        images = torch.rand(1, 3, 1, 28, 28, generator=generator("check")).to(device)
        kept = [torch.ones(1, units, 3, device=device) for units in dropped_units(network)]
        expected = torch.stack([as_plain_network(network.eval(), pick(weights, n))(images[0]) for n in (0, 1)])
        torch.testing.assert_close(forward(network.train(), weights, images, kept), expected, rtol=1e-3, atol=1e-3)
        names = [name for name, _ in network.named_children()]
        shares = {getattr(layer, "p", DROPOUT) for layer in network}
        in_place = any(getattr(layer, "inplace", False) for layer in network)
        if expected.shape[2] != 10 or names[-1] != "output" or not network.name or shares != {DROPOUT} or in_place:
            raise ValueError("it differs in one of these")

    rates = prune_rates(network)
    remaining = {name: network.get_parameter(name).numel() for name in rates}
    if PRUNE_SCOPE == "global":
        rates = {"all layers": PRUNE_RATE}
        remaining = {"all layers": sum(remaining.values())}
    for level, name in itertools.product(range(1, LEVELS + 1), rates):
        pruned = round(rates[name] * remaining[name])
        require(0 < pruned < remaining[name], f"LEVELS={LEVELS} and PRUNE_RATE={PRUNE_RATE} are incompatible: level "
                f"{level} would prune {pruned} of the {remaining[name]} weights left in {name}")
        remaining[name] -= pruned


def check_arms() -> None:
    """Raise UserError unless each arm returns what can be trained, and does not modify its input."""
    theta0 = initial_weights(generator("init"))
    masks = full_masks(theta0)
    masks = prune(theta0, masks, dict.fromkeys(masks, 0.5), "layer")
    zeros = ({name: 0 * tensor for name, tensor in theta0.items()}, {name: 0 * mask for name, mask in masks.items()})
    for arm in ARMS:
        own = masked(theta0, {})                            # copies
        own_masks = masked(masks, {})
        given = Given(own, own_masks, own, own, (own, own_masks), generator(f"arm {arm}", 0, 1))
        with explain_errors(f"the arm {arm} in ARM_TABLE cannot be used"):
            weights, kept = ARM_TABLE[arm].start(given)
            not_finite = {name: tensor - tensor for name, tensor in weights.items()}        # zero if it is finite
            not_binary = {name: mask * (1 - mask) for name, mask in kept.items()}           # zero for 0 and 1
            torch.testing.assert_close((not_finite, not_binary), zeros, rtol=0, atol=0, msg="weights must be finite, "
                                       "masks 0 or 1, and both have the names, shapes and types that it is given")
            torch.testing.assert_close(masked(weights, kept), weights, rtol=0, atol=0,
                                       msg="pruned weights must be zero; see `masked`")
            torch.testing.assert_close((own, own_masks), (theta0, masks), rtol=0, atol=0,
                                       msg="it changes what it is given")
            if not all(mask.any() for mask in kept.values()):
                raise ValueError("a layer keeps no weight")
            if ARM_TABLE[arm].claim not in ("rewind beats arm", "rewind matches arm", "arm matches rewind"):
                raise ValueError(f"its claim {ARM_TABLE[arm].claim!r} is unknown")
            Figure().subplots().plot(0, 0, color=ARM_TABLE[arm].colour, marker=ARM_TABLE[arm].marker)


# ---- Main ------------------------------------------------------------------------------------------------------------

def run_or_resume(device: torch.device) -> None:
    """Run the experiment with the present constants, from its checkpoint to its results."""
    check_network(device)
    check_arms()
    source_tickets, tickets_from = load_source_tickets()
    info = run_info(device, tickets_from)
    identity = identify(info, device)
    folder = resolve_path(RESULTS_DIR)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()              # if it is not writable, fail now
    init_distributed()
    rank, _ = rank_and_world_size()
    state = State()
    if rank == 0:
        data = load_dataset(device)
        state = load_state(folder, identity)
    state = gather(state)[0]                                # the first process's: by now it has unpacked the data, too
    if rank > 0:
        data = load_dataset(device)

    try:
        if state.level < LEVELS:
            columns = "".join([f"{arm:>{max(11, len(arm) + 2)}}" for arm in ARMS])
            say(f"Mean test accuracy at early stop:\nlevel   weights remaining{columns}   time left, at most")
            run_experiment(state, data, source_tickets, lambda new: save_state(new, folder, identity))
    finally:                                                # whatever ends it, report the checkpoint's levels
        saved, state = read_checkpoint(folder)
        if rank == 0 and saved == identity:
            run = write_results(state, data, info, folder)
    if rank == 0 and saved != identity:
        raise UserError(f"another run has begun in {folder}: choose another RESULTS_DIR. The levels of this run "
                        "are in previous/ in that folder.")
    if rank == 0:
        say("\n" + "\n".join(verdict(run)) + f"\n\nresults: {folder}")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out; PyTorch's CPU allocator raises a plain RuntimeError."""
    lacking = isinstance(error, RuntimeError) and re.search("(not enough|allocate) memory", str(error))
    return bool(lacking) or isinstance(error, MemoryError | torch.OutOfMemoryError)


def main(arguments: list[str]) -> None:
    """Run the experiment with some constants set by NAME=VALUE arguments; they are restored afterwards.

    Raises UserError for what the user can fix, in the arguments or on the machine. All else keeps its traceback.
    """
    if {"-h", "--help"} & set(arguments):
        lines = "\n".join(f"  {name} = {value!r}" for name, value in constants().items())
        say(f"{__doc__}\nConstants:\n{lines}")
        return
    before = {name: globals()[name] for name in TYPES}
    try:
        globals().update(read_arguments(arguments))
        globals().update(constants())
        check_constants()
        device = choose_device()
        with explain_errors('this process has set torch.backends...fp32_precision: set it back to "none" first'):
            torch.get_float32_matmul_precision()
        with fixed_numerics(device):
            run_or_resume(device)
    except OSError as error:
        raise UserError(f"{error}. The finished levels are kept: fix this and rerun the command to resume.") from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError("there is not enough memory. A lower STACK_SIZE needs less and keeps the finished levels; "
                        "fewer TRIALS or ARMS, or a lower BATCH_SIZE, start another run.") from None
    finally:
        globals().update(before)


if __name__ == "__main__":
    if "IPython" not in sys.modules:                        # a notebook has its own streams and signals
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.reconfigure(errors="replace")            # a console may not be able to show every character
        socket.setdefaulttimeout(30)                        # seconds; torchvision itself would wait for ever
        if rank_and_world_size()[1] == 1:                   # a process that waits for others hears no signal
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"lth_pruning: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nlth_pruning: stopped. The finished levels are kept; rerun the command to resume.", file=sys.stderr)
        sys.exit(130)
