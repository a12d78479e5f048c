"""The Lottery Ticket Hypothesis on MNIST (Frankle & Carbin 2019, arXiv:1803.03635).

When a trained network is pruned, was it the surviving connections, or their original initial weights, that made
training work? Train dense networks, remove the smallest weights round after round, and start the survivors again:
from their original initial weights ("rewind"), or from fresh random ones on the very same connections ("reinit").

    python lth_pruning.py                                      the defaults: some five minutes on two CPU cores
    python lth_pruning.py TRIALS=2 LEVELS=4 PRUNE_RATE=0.5     any constant below can be set for one run

Out come figures, metrics.csv, summary.md and tickets.pt in results/. A run that is stopped resumes where it was.

Measured with the defaults over 5 trials: dense networks end at 97.36 % test accuracy, rewound tickets at 98.11 % with
21 % of the weights and at 97.51 % with 3.6 %, re-initialised ones at 96.81 % and 94.86 %.
"""

import ast
import contextlib
import copy
import csv
import datetime
import difflib
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    # Large memory pages, on Linux: MLPs by the dozen train 5 to 20 % faster. PyTorch looks once, at its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    STOPPED = "\nlth_pruning: stopped. Finished levels are kept; the same command goes on after them."
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # The imports below take seconds: until they are done, Ctrl-C ends the script where it is, later in good order.
        signal.signal(signal.SIGINT, lambda *_: (print(STOPPED, file=sys.stderr), os._exit(130)))

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torchvision.datasets.utils import check_integrity, download_url
from tqdm import tqdm

try:
    import fcntl
except ImportError:                                         # on Windows
    fcntl = None

# ---- Constants: edit them here, or set them for one run as NAME=VALUE arguments --------------------------------------

# What is trained, and on what
DATASET       = "MNIST"               # or "FashionMNIST", "KMNIST": 28x28 grey images of 10 classes
PIXELS        = "standardised"        # mean 0, deviation 1; or "unit_interval": 0 to 1, or "unit_length" of each image
MODEL         = "mlp"                 # 784-300-100-10 (LeNet-300-100), or "lenet" (LeNet-5, convolutional)
INIT          = "kaiming_normal"      # or "xavier_normal" (Glorot), which the paper uses; biases start at zero
DROPOUT       = 0.2                   # after each hidden fully connected layer; 0 switches it off

# The experiment
ARMS          = ("rewind", "reinit")  # how a pruned network starts; also "shuffle", "oneshot", "transfer"
TRIALS        = 5                     # initialisations, each with its own data order
LEVELS        = 16                    # pruning rounds; 0 trains the dense networks alone
PRUNE_RATE    = 0.2                   # of the surviving weights, per level; half of it in convolutions and the output
PRUNE_SCOPE   = "layer"               # smallest weights layer by layer, or "global": over all layers at one rate
REWIND_STEP   = 0                     # rewind to the weights after this many steps, and train the remaining ones
TICKETS_FROM  = None                  # the tickets.pt of another run, for the arm "transfer"
SEED          = 42                    # one seed, one result

# Training: the same for every network, dense or pruned
EPOCHS        = 3
BATCH_SIZE    = 128
LEARNING_RATE = 1.2e-3                # the paper's, for Adam
WEIGHT_DECAY  = 1e-2                  # AdamW's decoupled decay; 0 makes it Adam
CLIP_NORM     = 1.0                   # largest gradient norm of a network; None: no clipping
EVAL_EVERY    = 200                   # steps between evaluations; there is always one after the last step
TF32          = False                 # on CUDA, round the factors of products to 11 bits: faster, less exact

# Where
DATA_DIR      = "data"                # relative paths start beside this script
RESULTS_DIR   = "results"
DEVICE        = "auto"                # cuda, else mps, else cpu

VALIDATION_SIZE = 5_000               # of the 60,000 training images, as in the paper


ALL_ARMS = ("rewind", "reinit", "shuffle", "oneshot", "transfer")
RULES = {                             # the types and the condition of each constant's value, and both in words
    "DATASET": (str, ("MNIST", "FashionMNIST", "KMNIST").__contains__, "one of MNIST, FashionMNIST, KMNIST"),
    "PIXELS": (str, ("standardised", "unit_interval", "unit_length").__contains__,
               "one of standardised, unit_interval, unit_length"),
    "MODEL": (str, ("mlp", "lenet").__contains__, "one of mlp, lenet"),
    "INIT": (str, ("kaiming_normal", "xavier_normal").__contains__, "one of kaiming_normal, xavier_normal"),
    "DROPOUT": (int | float, lambda share: 0 <= share < 1, "a number from 0 to below 1"),
    "ARMS": (tuple, lambda arms: arms and all(arm in ALL_ARMS for arm in arms) and len(set(arms)) == len(arms),
             "a choice, each once, of " + ", ".join(ALL_ARMS)),
    "TRIALS": (int, lambda count: 1 <= count <= 1_000, "a whole number, 1 to 1000"),
    "LEVELS": (int, lambda count: 0 <= count <= 255, "a whole number, 0 to 255"),       # tickets.pt has 8 bits for them
    "PRUNE_RATE": (int | float, lambda rate: 0 < rate < 1, "a number between 0 and 1"),
    "PRUNE_SCOPE": (str, ("layer", "global").__contains__, "one of layer, global"),
    "REWIND_STEP": (int, lambda step: step >= 0, "a whole number, 0 or more"),
    "TICKETS_FROM": (str | None, lambda path: path is None or (path and "\0" not in path),
                     "the path of a tickets.pt, or None"),
    "SEED": (int, lambda seed: seed >= 0, "a whole number, 0 or more"),
    "EPOCHS": (int, lambda count: count >= 1, "a whole number, 1 or more"),
    "BATCH_SIZE": (int, lambda size: 1 <= size <= 60_000 - VALIDATION_SIZE,
                   f"a whole number, 1 to {60_000 - VALIDATION_SIZE}"),
    "LEARNING_RATE": (int | float, lambda rate: 0 < rate < math.inf, "a number above 0"),
    "WEIGHT_DECAY": (int | float, lambda decay: 0 <= decay < math.inf, "a number of at least 0"),
    "CLIP_NORM": (int | float | None, lambda norm: norm is None or 0 < norm < math.inf, "a number above 0, or None"),
    "EVAL_EVERY": (int, lambda steps: steps >= 1, "a whole number, 1 or more"),
    "TF32": (bool, lambda _: True, "True or False"),
    "DATA_DIR": (str, lambda path: path and "\0" not in path, "a folder's path"),
    "RESULTS_DIR": (str, lambda path: path and "\0" not in path, "a folder's path"),
    "DEVICE": (str, re.compile(r"auto|cpu|mps|cuda(:\d+)?").fullmatch, "auto, cpu, cuda, cuda:1 and so on, or mps"),
}


def constants() -> dict:
    """All constants as they stand, by name."""
    return {name: globals()[name] for name in RULES}


Weights = dict[str, Tensor]           # "fc1.weight" -> tensor; a stack's tensors have a leading nets dimension
Masks = dict[str, Tensor]             # prunable weights only; 1 where a weight remains, 0 where it was pruned


class UserError(ValueError):
    """One sentence on what the user can set right; as a program, the script prints it and ends with exit code 2."""


def beside_script(path: str) -> Path:
    """The path itself if absolute, else taken from the folder of this script."""
    return Path(__file__).resolve().parent / os.path.expanduser(path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: nobody ever sees half a file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())                         # on the disk before its name: power may fail, too
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def packed(tensors: dict) -> bytes:
    """What torch.save writes. It does so in memory: on a full disk it would hide the OSError behind its own error."""
    content = io.BytesIO()
    torch.save(tensors, content)
    return content.getvalue()


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process may have left of writing this file."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink(missing_ok=True)


def read_saved(path: Path) -> dict:
    """What torch.save wrote to a file, on the CPU. Raises OSError, or where the file is damaged any of many errors.

    The sums inside are compared first: torch.load would take flipped bits for weights.
    """
    content = io.BytesIO(path.read_bytes())
    if zipfile.ZipFile(content).testzip() is not None:
        raise zipfile.BadZipFile("wrong sum")
    content.seek(0)
    return torch.load(content, map_location="cpu", weights_only=True)


def unused(path: Path) -> Path:
    """The path itself, or where it exists the first that does not with -2, -3 and so on behind it."""
    numbered = (path.with_name(path.name + (f"-{n}" if n > 1 else "")) for n in itertools.count(1))
    return next(path for path in numbered if not path.exists())


PURPOSES = ("init", "reinit", "shuffle", "split", "order", "dropout")


def generator(purpose: str, trial: int = 0, level: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """Random numbers for one purpose, whatever else is drawn: trial k is the same among 5 trials and among 50."""
    seeds = np.random.SeedSequence([SEED, trial, level, PURPOSES.index(purpose)])
    return torch.Generator(device).manual_seed(int(seeds.generate_state(1, np.uint64)[0]))


def process() -> tuple[int, int]:
    """This process's rank, and how many processes share the run: as torchrun says, else one alone."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_trials() -> range:
    """The trials of this process. Its stacks hold only theirs, in this order; there may be none."""
    rank, processes = process()
    return range(TRIALS)[rank::processes]


# ---- Data ------------------------------------------------------------------------------------------------------------

SHAPES = {"train-images-idx3-ubyte.gz": (60_000, 28, 28), "train-labels-idx1-ubyte.gz": (60_000,),
          "t10k-images-idx3-ubyte.gz": (10_000, 28, 28), "t10k-labels-idx1-ubyte.gz": (10_000,)}


def read_idx(archive: Path, md5: str, mirrors: list[str]) -> Tensor:
    """The bytes in an IDX file: from its archive, or unpacked where there is no archive, or downloaded.

    The archive has a sum to be checked by, and so comes first; one that fails is downloaded again. Files are never
    unpacked, so that the folder may be read-only.
    """
    file, reason = archive.with_suffix(""), ""
    if archive.exists() or not file.exists():
        file, sound = archive, check_integrity(archive, md5)
        for mirror in () if sound else mirrors:
            try:
                download_url(mirror + archive.name, str(archive.parent), md5=md5)       # compares the sum, too
                sound = True
                break
            except (OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[-1]
        if not sound:
            raise UserError(f"{archive} is {'damaged' if archive.exists() else 'missing'} and could not be downloaded "
                            f"({reason}): put the archive with the md5 sum {md5} there, or in its place the "
                            "unpacked file, or set DATA_DIR.")
    content, shape = file.read_bytes(), SHAPES[archive.name]
    content = gzip.decompress(content) if file == archive else content
    header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()            # of unsigned bytes, and the dimensions
    body = content[len(header):]
    if not content.startswith(header) or len(body) != math.prod(shape) or ("labels" in file.name and max(body) > 9):
        raise UserError(f"{file} is damaged, or not what its name says: {len(content)} bytes instead of "
                        f"{len(header) + math.prod(shape)}, or others than it should hold. Put the right one there.")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape)


def load_dataset(device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
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
    return {name: torch.stack([network[name] for network in networks]) for name in (networks[0] if networks else ())}


def pick(tensors: Weights, n: int) -> Weights:
    """The tensors of a stack's n-th network, without the nets dimension."""
    return {name: tensor[n] for name, tensor in tensors.items()}


def as_rows(tensors: list[Tensor]) -> Tensor:
    """A stack's tensors side by side: all that belongs to a network in one row, (nets, numbers)."""
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)


def as_views(rows: Tensor, shapes: Weights) -> Weights:
    """The rows' parts under the names and in the shapes of a stack's tensors; they share the rows' memory."""
    parts = rows.split([tensor[0].numel() for tensor in shapes.values()], 1)
    return {name: part.view(tensor.shape) for part, (name, tensor) in zip(parts, shapes.items(), strict=True)}


def as_plain_network(network: nn.Sequential, weights: Weights) -> nn.Sequential:
    """A copy of a plain network, on the CPU, that holds a single network's weights. Raises RuntimeError if they differ.
    """
    plain = {name: tensor.flatten() if name.endswith(".bias") else tensor.T if tensor.ndim == 2 else tensor
             for name, tensor in weights.items()}
    network = copy.deepcopy(network)
    network.load_state_dict({name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                             for name, tensor in plain.items()}, assign=True)
    return network


def dropout_factors(network: nn.Sequential, images: int, device: torch.device) -> list[Tensor]:
    """Room for the factors (images, units) of each dropout layer.

    They serve the whole stack: drawn for each network they would cost as much time as a matrix product, and a trial's
    result would depend on how many others run beside it.
    """
    dropped = [layer.out_features for name, layer in weighted_layers(network).items()
               if isinstance(layer, nn.Linear) and name != "output"]
    return [torch.empty(images, units, device=device) for units in dropped]


def draw_dropout(factors: list[Tensor], random: torch.Generator) -> None:
    """Draw the factors anew, in place: 0 for units that are dropped, else such that the mean stays."""
    for factor in factors:
        factor.bernoulli_(1 - DROPOUT, generator=random).div_(1 - DROPOUT)


def forward(network: nn.Sequential, weights: Weights, x: Tensor, dropout: Iterable[Tensor] = ()) -> Tensor:
    """Logits (nets, batch, 10) of a stack's networks, each on its own images x (nets, batch, 1, 28, 28).

    With factors (batch, units), one for each dropout layer, units are dropped; without any, as when evaluating, none.
    """
    dropout = iter(dropout)
    for name, layer in network.named_children():
        if isinstance(layer, nn.Linear):
            operands = weights[f"{name}.bias"], x, weights[f"{name}.weight"]
            if len(x) == 1:                         # a lone product would be rounded otherwise: give it a twin
                operands = [tensor.expand(2, *tensor.shape[1:]) for tensor in operands]
            x = torch.baddbmm(*operands)[:len(x)]
        elif isinstance(layer, nn.Conv2d):          # net after net, until they are flattened: the fastest on a CPU
            kernels = zip(x, weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
            x = [F.conv2d(images, weight, bias, padding=layer.padding) for images, weight, bias in kernels]
        elif isinstance(layer, nn.Flatten):
            x = torch.stack([images.flatten(1) for images in x]) if isinstance(x, list) else x.flatten(2)
        elif isinstance(layer, nn.Dropout):
            factor = next(dropout, None)
            x = x if factor is None else x * factor
        elif isinstance(layer, nn.MaxPool2d) and not torch.is_grad_enabled():
            # Evaluating a LeNet takes half the time so; backwards it would be slower.
            rows = [torch.maximum(images[:, :, ::2], images[:, :, 1::2]) for images in x]
            x = [torch.maximum(images[..., ::2], images[..., 1::2]) for images in rows]
        else:                                       # ReLU and pooling hold no weights
            x = [layer(images) for images in x] if isinstance(x, list) else layer(x)
    return x


# ---- Tickets: a ticket is a mask together with the initial weights that it was found from ----------------------------

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
    rates = {}
    for name, layer in weighted_layers(network).items():
        gentle = PRUNE_SCOPE == "layer" and (name == "output" or isinstance(layer, nn.Conv2d))
        rates[f"{name}.weight"] = PRUNE_RATE / 2 if gentle else PRUNE_RATE
    return rates


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
        rows = as_rows([masks[name] for name in group])                             # (nets, weights of the group)
        survivors = int(rows[0].sum())                                              # the same in every network
        left = remove_smallest(as_rows([weights[name] for name in group]), rows, round(rates[group[0]] * survivors))
        pruned |= as_views(left, {name: masks[name] for name in group})
    return pruned


# The arms. Each gets one network's theta0 and ticket masks, and returns the weights and masks to train from.

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


ARM_STARTS = dict(zip(("dense", *ALL_ARMS), (rewind, rewind, reinit, shuffle, oneshot, transfer), strict=True))


def masks_at(pruned_at: Masks, level: int) -> Masks:
    """The masks of a level, from the level at which each weight was pruned (0: never)."""
    return {name: ((levels == 0) | (levels > level)).float() for name, levels in pruned_at.items()}


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


# ---- Training --------------------------------------------------------------------------------------------------------

def steps_per_epoch() -> int:
    """Whole batches in an epoch: each epoch's order leaves out another remainder of the training images."""
    return (60_000 - VALIDATION_SIZE) // BATCH_SIZE


def batches(images: int, level: int, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of image numbers (trials, batch): an order of its own for every trial, level and epoch."""
    orders = [generator("order", trial, level) for trial in own_trials()]
    while True:
        epoch = torch.stack([torch.randperm(images, generator=order) for order in orders])
        epoch = epoch.to(device, non_blocking=device.type == "cuda")                        # the GPU works on meanwhile
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
    nets = len(weights["output.bias"])
    loss, correct = torch.zeros(2, nets, device=images.device)
    # 250 images stay in a CPU's cache: the LeNet is evaluated 1.5 times as fast. Losses are summed by the 1,000 all the
    # same, since smaller sums would be rounded otherwise.
    part = 250 if images.device.type == "cpu" else 1_000
    for x, y in zip(images.split(1_000), labels.split(1_000), strict=True):
        logits = torch.cat([forward(network, weights, some.expand(nets, *some.shape)) for some in x.split(part)], 1)
        y = y.expand(nets, -1)
        loss += losses(logits, y) * y.shape[1]
        correct += (logits.argmax(2) == y).sum(1)
    return loss / len(images), 100 * correct / len(images)


@functools.cache
def graphs_work(device: torch.device) -> bool:
    """Whether CUDA graphs can be captured on the device: not on a CPU, and not with CUDA_LAUNCH_BLOCKING=1."""
    if device.type != "cuda":
        return False
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
            torch.zeros(1, device=device)
        return True
    except RuntimeError as error:
        print(f"CUDA graphs do not work here ({str(error).splitlines()[0]}): steps are launched one by one", flush=True)
        return False


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """A function that repeats all that the step does on the GPU by one launch.

    The step must have run before, on the same stream, must read and write the same tensors each time, and draw no
    random numbers. It does not run while it is captured.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay


def train(weights: Weights, masks: Masks, data: dict[str, tuple[Tensor, Tensor]], arms: tuple[str, ...], level: int,
          steps: int, bar: tqdm, begin: int = 0) -> tuple[Weights, list[tuple]]:
    """Train a stack of networks, arm after arm of one per trial; the trials of all arms see the same batches.

    With `begin`, the weights are those after so many steps, and only the remaining ones are taken.

    Pruned weights stay exactly zero: they start so, their gradient is masked before it is clipped, and in a fresh
    AdamW zero gradients leave zero moments, which decoupled decay leaves alone.
    Returns the trained weights, and for each evaluation (step, train_loss, val_loss, val_accuracy, test_accuracy),
    all but the step (nets,) on the CPU; train_loss is the mean over the batches since the evaluation before.
    Raises UserError at the first evaluation after a loss that is not finite.
    """
    network, (images, labels), device = build_network(MODEL, DROPOUT), data["train"], data["train"][0].device
    nets, trials = len(weights["output.bias"]), own_trials()
    parameters = as_rows(list(weights.values()))                    # a copy: theta0 stays as it is
    weights = {name: view.requires_grad_() for name, view in as_views(parameters, weights).items()}
    # AdamW gets one tensor per network: its kernels round otherwise at a tensor's end than within, and so a network's
    # last bits would depend on how many others are in the stack.
    gradient_rows, networks = torch.zeros_like(parameters), parameters.unbind()
    for network_parameters, gradient in zip(networks, gradient_rows, strict=True):
        network_parameters.grad = gradient
    gradients = as_views(gradient_rows, weights)
    optimizer = torch.optim.AdamW(networks, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True,
                                  capturable=device.type == "cuda")
    factors = dropout_factors(network, BATCH_SIZE, device) if DROPOUT else []
    dropout, order = generator("dropout", level=level, device=device), batches(len(images), level, device)
    batch = torch.empty(nets, BATCH_SIZE, dtype=torch.int64, device=device)
    train_loss, since, evaluations = torch.zeros(nets, device=device), 0, []

    def train_step() -> None:
        x = images.index_select(0, batch.flatten()).unflatten(0, batch.shape)               # faster than images[batch]
        loss = losses(forward(network, weights, x, factors), labels[batch])                 # (nets,)
        # The gradient of the sum: every network gets just its own, unscaled.
        for name, gradient in zip(weights, torch.autograd.grad(loss.sum(), list(weights.values())), strict=True):
            torch.mul(gradient, masks.get(name, 1), out=gradients[name])
        if CLIP_NORM is not None:
            clip_per_network(gradient_rows, CLIP_NORM)
        optimizer.step()
        train_loss.add_(loss.detach())

    run = train_step
    for step in range(begin + 1, steps + 1):
        batch.copy_(next(order).repeat(nets // len(trials), 1))
        draw_dropout(factors, dropout)
        if step == begin + 4 and graphs_work(device):               # three steps warm the libraries up
            run = capture(train_step)
        run()
        since += 1
        if step % EVAL_EVERY == 0 or step == steps:
            val_loss, val_accuracy = evaluate(network, weights, *data["validation"])
            _, test_accuracy = evaluate(network, weights, *data["test"])
            measures = train_loss / since, val_loss, val_accuracy, test_accuracy
            evaluations.append((step, *(measure.cpu() for measure in measures)))
            finite = (train_loss + val_loss).isfinite().tolist()
            if not all(finite):
                arm, trial = divmod(finite.index(False), len(trials))
                raise UserError(f"training diverged: the loss of {arms[arm]}, trial {trials[trial]}, at level {level} "
                                f"was not finite by step {step}. Finished levels are kept; try a LEARNING_RATE below "
                                f"{LEARNING_RATE}.")
            train_loss.zero_()
            since = 0
        bar.update(nets)
    return {name: tensor.detach() for name, tensor in weights.items()}, evaluations


# ---- Experiment ------------------------------------------------------------------------------------------------------

COLUMNS = ("dataset", "model", "arm", "trial", "level", "weights_remaining", "step",
           "train_loss", "val_loss", "val_accuracy", "test_accuracy")


def experiment() -> dict:
    """The constants that the numbers depend on: where the files lie, and what computes, is no part of an experiment."""
    return {name: value for name, value in constants().items() if name not in ("DATA_DIR", "RESULTS_DIR", "DEVICE")}


def checkpoint_path() -> Path:
    """Where an unfinished run keeps its state: each experiment, and each process of a run, has a file of its own."""
    settings = experiment()
    if TICKETS_FROM is not None:                            # what counts is the tickets, not where they lie
        settings["TICKETS_FROM"] = hashlib.sha256(beside_script(TICKETS_FROM).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    rank, processes = process()
    share = f"-{rank + 1}-of-{processes}" if processes > 1 else ""
    return beside_script(RESULTS_DIR) / f"checkpoint-{digest[:12]}{share}.pt"


def records(level: int, arms: tuple[str, ...], masks: Masks, evaluations: list[tuple]) -> list[dict]:
    """A row per evaluation of each network of a level, by arm, trial and step."""
    left = weights_remaining(masks)
    return [dict(zip(COLUMNS, (DATASET, MODEL, arm, trial, level, float(f"{left[net]:.6g}"), step,
                               *(float(f"{measure[net]:.6g}") for measure in measures)), strict=True))
            for net, (arm, trial) in enumerate(itertools.product(arms, own_trials()))
            for step, *measures in evaluations]


def load_state(checkpoint: Path) -> dict:
    """The state of an unfinished run from its checkpoint, or of a new run; a damaged checkpoint is set aside.

    It holds the run's name, the level that was finished last, rows, theta0, pruned_at, the trained dense networks and
    the rewind networks as they were trained last.
    """
    theta0 = stack([initial_weights(generator("init", trial)) for trial in own_trials()])
    never = {name: torch.zeros_like(mask, dtype=torch.uint8) for name, mask in full_masks(theta0).items()}
    new = {"run": checkpoint.name, "level": -1, "rows": [], "theta0": theta0, "pruned_at": never,
           "dense": {}, "trained": {}}
    if not checkpoint.exists():
        return new
    try:
        state = read_saved(checkpoint)
        if state.keys() != new.keys() or state["run"] != checkpoint.name:
            raise ValueError("not the state of this run")
    except OSError:
        raise
    except Exception:                                       # a damaged file can fail in any way
        aside = unused(checkpoint.with_suffix(".damaged"))
        checkpoint.rename(aside)
        print(f"{checkpoint} was damaged and is now called {aside.name}: this run starts afresh", flush=True)
        return new
    print(f"resuming after level {state['level']} of {LEVELS}, kept in {checkpoint}", flush=True)
    return state


def prune_tickets(state: dict, level: int) -> Masks:
    """The level at which each weight was pruned, with this level's: the rewind networks as trained the level before."""
    before = masks_at(state["pruned_at"], level - 1)
    left = prune(state["trained"], before, prune_rates(build_network(MODEL, DROPOUT)), PRUNE_SCOPE)
    return {name: levels.masked_fill(before[name] > left[name], level) for name, levels in state["pruned_at"].items()}


def start_arms(state: dict, arms: tuple[str, ...], tickets: Masks, given: dict | None,
               level: int) -> tuple[Weights, Masks]:
    """The stack that a level starts from: every arm's networks, one per trial. `given`: tickets found elsewhere."""
    starts = [ARM_STARTS[arm](
        theta0=pick(state["theta0"], n), masks=pick(tickets, n), dense=pick(state["dense"], n),
        random=generator(arm, trial, level) if arm in PURPOSES else None,
        ticket=given and (pick(given["theta0"], trial), masks_at(pick(given["pruned_at"], trial), level)))
        for arm, (n, trial) in itertools.product(arms, enumerate(own_trials()))]
    return stack([weights for weights, _ in starts]), stack([masks for _, masks in starts])


def run_experiment(state: dict, data: dict[str, tuple[Tensor, Tensor]], given: dict | None, device: torch.device,
                   checkpoint: Path) -> None:
    """Train the dense networks, then prune the rewound ones level by level and start every arm from the new masks.

    The iterative strategy of the paper's section 2. The state is brought up to date, and saved, after each level.
    """
    steps, trials, (rank, processes) = EPOCHS * steps_per_epoch(), len(own_trials()), process()
    # The unit of progress is one step of one network: level 0 has fewer networks than the others.
    work = [trials * (steps + REWIND_STEP)] + LEVELS * [trials * len(ARMS) * (steps - REWIND_STEP)]
    before, begun = sum(work[:state["level"] + 1]), time.monotonic()
    if processes > 1:
        print(f"{processes} processes share {TRIALS} trials" + ", so that some have none" * (processes > TRIALS)
              + f"; shown is the progress of the first one, with {[*own_trials()]}")
    columns = ARMS if LEVELS else ("dense",)
    print("level   weights remaining" + "".join(f"{arm:>11}" for arm in columns) + "   time left", flush=True)
    with tqdm(total=sum(work), initial=before, smoothing=0, disable=rank > 0 or None, leave=False,
              bar_format="{percentage:3.0f}% |{bar}| {elapsed} elapsed, {remaining} left") as bar:
        for level in range(state["level"] + 1, LEVELS + 1):
            arms = ARMS if level else ("dense",)
            pruned_at = prune_tickets(state, level) if level else state["pruned_at"]
            weights, masks = start_arms(state, arms, masks_at(pruned_at, level), given, level)
            weights, masks = ({name: t.to(device) for name, t in tensors.items()} for tensors in (weights, masks))
            begin = REWIND_STEP if level else 0
            trained, evaluations = train(weights, masks, data, arms, level, steps, bar, begin)
            first = trials * arms.index("rewind" if level else "dense")
            trained = {name: tensor[first:first + trials].clone().cpu() for name, tensor in trained.items()}
            new = {"level": level, "rows": state["rows"] + records(level, arms, masks, evaluations),
                   "pruned_at": pruned_at, "trained": trained}
            if level == 0:
                new["dense"] = trained
                if REWIND_STEP:                             # the same first steps again: the weights to rewind to
                    early, _ = train(weights, masks, data, arms, level, REWIND_STEP, bar)
                    new["theta0"] = {name: tensor.cpu() for name, tensor in early.items()}
            write_whole(checkpoint, packed(state | new))
            state.update(new)                               # at once: whatever ends the run finds whole levels

            left = (time.monotonic() - begun) * sum(work[level + 1:]) / (sum(work[:level + 1]) - before)
            accuracy = evaluations[-1][-1].view(len(arms), trials).mean(1).tolist() * (len(columns) // len(arms))
            with tqdm.external_write_mode():
                print(f"{level:5}{weights_remaining(masks)[first]:18.1f} %" + "".join(f"{x:9.2f} %" for x in accuracy)
                      + f"{left / 60:8.1f} min", flush=True)


def gather(state: dict) -> dict:
    """On the first process, what all processes recorded and found, as one process alone would have it.

    Between processes nothing passes but this, at the end: a process that is killed and started again delays no other.
    """
    rank, processes = process()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # while it waits for the others, Python hears no signal
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))       # the slowest is waited for
    states = [None] * processes if rank == 0 else None
    torch.distributed.gather_object({key: state[key] for key in ("rows", "theta0", "pruned_at")}, states)
    if rank > 0:
        return state
    rows = sorted(itertools.chain(*(part["rows"] for part in states)), key=lambda row: (
        row["level"], row["level"] and ARMS.index(row["arm"]), row["trial"], row["step"]))
    tensors = {key: stack([pick(states[trial % processes][key], trial // processes) for trial in range(TRIALS)])
               for key in ("theta0", "pruned_at")}
    return state | {"rows": rows} | tensors


# ---- Results: tables and figures read the records and nothing else ---------------------------------------------------

OUTPUTS = ("accuracy_plot_iterative.png", "accuracy_plot_reinit.png", "comparison_plot.png", "early_stopping_plot.png",
           "learning_curves.png", "mask_plot.png", "transfer_plot.png", "tickets.pt", "metrics.csv", "summary.md")
COLOURS = {"dense": "0.35"} | dict(zip(ALL_ARMS, sns.color_palette("colorblind"), strict=False))
MARKERS = dict(zip(("dense", *ALL_ARMS), "Pos^Dv", strict=True))


def arms_of(rows: list[dict]) -> list[str]:
    """The arms of a run, in their order."""
    return list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != "dense"))


def measured(rows: list[dict], arm: str, column: str) -> np.ndarray:
    """A column as an array (levels, trials, evaluations); level 0, the dense networks, is where every arm starts.

    Of the dense networks' evaluations, only those are taken that the arm has, too: after REWIND_STEP.
    """
    rows = [row for row in rows if row["arm"] in ("dense", arm)]
    steps = {row["step"] for row in rows if row["level"] == rows[-1]["level"]}
    values = [row[column] for row in rows if row["step"] in steps]
    return np.array(values).reshape(-1, len({row["trial"] for row in rows}), len(steps))


def final(rows: list[dict], arm: str, column: str = "test_accuracy") -> np.ndarray:
    """A column after the last step, (levels, trials)."""
    return measured(rows, arm, column)[:, :, -1]


def remaining(rows: list[dict], arm: str = "rewind") -> np.ndarray:
    """Percent of weights remaining, (levels,); the same in every arm but transfer, whose masks come from elsewhere."""
    return final(rows, arm, "weights_remaining").mean(1)


def early_stop(rows: list[dict], arm: str) -> np.ndarray:
    """Step of the lowest validation loss, (levels, trials); infinite where it is the last step: none was reached."""
    steps = np.append(measured(rows, arm, "step")[0, 0, :-1], np.inf)
    return steps[measured(rows, arm, "val_loss").argmin(2)]


def at_early_stop(rows: list[dict], arm: str) -> np.ndarray:
    """Test accuracy at the lowest validation loss, (levels, trials)."""
    lowest = measured(rows, arm, "val_loss").argmin(2)[..., None]
    return np.take_along_axis(measured(rows, arm, "test_accuracy"), lowest, 2)[..., 0]


def catch_up(rows: list[dict], arm: str) -> np.ndarray:
    """First step with the validation accuracy that the trial's dense network ends at, (levels, trials), or infinite."""
    accuracy = measured(rows, arm, "val_accuracy")
    there = accuracy >= accuracy[:1, :, -1:]
    return np.where(there.any(2), measured(rows, arm, "step")[0, 0][there.argmax(2)], np.inf)


def paired_interval(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over trials of paired differences (levels, trials), and half its 95 % interval by Student's t: (levels,).

    One trial has no interval: nan.
    """
    n = differences.shape[1]
    if n == 1:
        return differences[:, 0], np.full(len(differences), np.nan)
    angle = np.linspace(-np.pi / 2, np.pi / 2, 400_001)     # t = sqrt(n - 1) tan(angle) has density cos(angle)^(n - 2)
    below = np.cumsum(np.cos(angle) ** (n - 2))
    quantile = np.sqrt(n - 1) * np.tan(np.interp(0.975, below / below[-1], angle))
    return differences.mean(1), quantile * differences.std(1, ddof=1) / np.sqrt(n)


def matching_levels(accuracy: np.ndarray) -> np.ndarray:
    """The sparsest level at which accuracies (levels, ...) are not below level 0, the dense networks: (...)."""
    return len(accuracy) - 1 - (accuracy >= accuracy[0])[::-1].argmax(0)


def verdict(rows: list[dict]) -> list[str]:
    """The answer in plain words: sentences."""
    dense, left = final(rows, "dense"), remaining(rows)
    trials = f"{dense.size} trial" + "s" * (dense.size > 1)
    sentences = [f"The dense networks end at {dense.mean():.2f} % test accuracy (mean of {trials}, {dense.min():.2f} "
                 f"to {dense.max():.2f})."]
    for arm in arms_of(rows):
        accuracy = final(rows, arm).mean(1)
        level = matching_levels(accuracy)
        if arm == "rewind":
            sentences.append(f"The smallest matching ticket keeps {left[level]:.1f} % of the weights: rewound, it ends "
                             f"at {accuracy[level]:.2f} %, not below the dense networks." if level else
                             "No rewound ticket is matching: at every level they end below the dense networks.")
            continue
        fall = f"from {left[level + 1]:.1f} % of the weights on" if level + 1 < len(left) else "at no level to stay"
        sentences.append(f"The {arm} networks end below the dense ones {fall}.")
        ahead, half = paired_interval(final(rows, "rewind") - final(rows, arm))
        bounds = f"95 % interval {ahead[-1] - half[-1]:+.2f} to {ahead[-1] + half[-1]:+.2f}, paired, {trials}"
        sentences.append(f"At {left[-1]:.1f} % of the weights, rewind - {arm} is {ahead[-1]:+.2f} points "
                         f"({bounds if dense.size > 1 else 'one trial gives no interval'}).")
    return sentences


def claims(rows: list[dict]) -> list[list[str]]:
    """The paper's claims, decided from the records: cells of claim, weights remaining, n, difference and decision.

    A moment that did not come within the run is taken as the run's end where that makes the difference smaller than it
    is, and where it would make it larger (the ticket itself was too slow, the control never fell), nothing is decided.
    """
    left, last = remaining(rows), max(row["step"] for row in rows)
    ticket, dense = final(rows, "rewind"), final(rows, "dense")
    lead = ticket - dense

    def sooner(moment: Callable[[list[dict], str], np.ndarray], arm: str) -> np.ndarray:
        return np.minimum(last, moment(rows, arm)) - moment(rows, "rewind")

    def outlasts(arm: str) -> np.ndarray:
        fell = matching_levels(final(rows, arm))
        fell = np.where(fell == len(left) - 1, np.inf, fell)
        return np.tile(matching_levels(ticket) - fell, (len(left), 1))

    below = np.flatnonzero(sum(paired_interval(lead)) < 0)  # from the first clearly lower level on, that one counts
    matching = lead[np.minimum(range(len(left)), below[0] if below.size else len(left))]
    table = [                                               # differences (levels, trials)
        ("The ticket reaches its early stop before the dense network", 21.1, "rewind", "steps",
         sooner(early_stop, "dense")),
        ("The ticket ends more accurate than the dense network", 13.5, "rewind", "points", lead),
        ("Down to here the ticket is matching (shown: here, or the first level clearly below)", 3.6, "rewind", "points",
         matching),
        ("Re-initialised networks fall below the dense ones before the ticket does", left[-1], "reinit", "levels",
         outlasts("reinit")),
        ("Re-initialised networks come to the dense one's final validation accuracy after the ticket", 21.1, "reinit",
         "steps", sooner(catch_up, "reinit")),
        ("Networks pruned in one shot fall below the dense ones before the ticket does", left[-1], "oneshot", "levels",
         outlasts("oneshot")),
        ("Shuffled masks end less accurate than the ticket", 21.1, "shuffle", "points",
         ticket - final(rows, "shuffle"))]
    lines = []
    for claim, percent, arm, unit, differences in table:
        level = int(np.abs(np.log(left / percent)).argmin())
        cells, why = ["", "", ""], "fewer than three trials" * (dense.size < 3)
        if arm not in arms_of(rows):
            why = f"no {arm} networks"
        elif abs(np.log(left[level] / percent)) > np.log(1.25):
            why = f"no level near {percent:.1f} %"
        else:
            cells = [f"{left[level]:.1f} %", f"{dense.size}", "not reached"]
            if np.isfinite(differences[level]).all():
                mean, half = (statistic.item() for statistic in paired_interval(differences[[level]]))
                digits = 2 if unit == "points" else 1
                cells[2] = f"{mean:+.{digits}f} ± {half:.{digits}f} {unit}".replace(" ± nan", "")
                borne_out = mean >= 0 if differences is matching else mean > half
            else:
                why = why or "not reached within the run"
        lines.append([claim, *cells, f"not tested: {why}" if why else "borne out" if borne_out else "not borne out"])
    return lines


def summary(rows: list[dict], settings: dict, device: str) -> str:
    """summary.md: the verdict, a table with a row per level, the constants and versions, and the paper's claims."""
    arms, finished, last = arms_of(rows) or ["dense"], rows[-1]["level"], rows[-1]["step"]
    ends, stops, stopped = ({arm: values(rows, arm) for arm in arms} for values in (final, early_stop, at_early_stop))
    leads = {arm: paired_interval(ends["rewind"] - ends[arm]) for arm in arms_of(rows) if arm != "rewind"}

    def markdown(lines: list[list[str]]) -> str:
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [lines[0], ["---"] * len(lines[0]), *lines[1:]])

    def spread(values: np.ndarray, digits: int) -> str:
        return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"

    def stop(arm: str, level: int) -> str:
        steps, accuracy = stops[arm][level], stopped[arm][level]
        missed = int(np.isinf(steps).sum())
        step = f"{accuracy.mean():.2f} at {'≥ ' * (missed > 0)}{spread(np.minimum(steps, last), 0)}"
        return "not reached" if missed == steps.size else step + f", {missed} not reached" * (missed > 0)

    def lead(arm: str, level: int) -> str:
        mean, half = (statistic[level] for statistic in leads[arm])
        return f"{mean:+.2f} ± {half:.2f}".replace(" ± nan", "") if level else ""

    table = [["level", "weights remaining", *(f"{arm}: test accuracy, %" for arm in arms),
              *(f"rewind - {arm}, points" for arm in leads), *(f"{arm}: at early stop, % and step" for arm in arms)]]
    for level, left in enumerate(remaining(rows)):
        table.append([f"{level}" if level else "0 (dense)", f"{left:.1f} %",
                      *(spread(ends[arm][level], 2) for arm in arms), *(lead(arm, level) for arm in leads),
                      *(stop(arm, level) for arm in arms)])
    unfinished = f"\n**Unfinished: these are levels 0 to {finished} of {settings['LEVELS']}.**\n"
    sentences = "\n".join(f"- {sentence}" for sentence in verdict(rows))
    values = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    versions = ", ".join(f"{library.__name__} {library.__version__}"
                         for library in (torch, torchvision, np, matplotlib, sns))
    return f"""# {rows[0]["dataset"]}, {rows[0]["model"]}: {", ".join(arms)}
{unfinished * (finished < settings["LEVELS"])}
{sentences}

Accuracies are those after the last step, {last}: mean (lowest to highest) over the trials. Differences are paired by
trial: mean ± half of the 95 % interval. The early stop is the evaluation with the lowest validation loss, its accuracy
the mean there; where it is the last evaluation, an early stop was not reached, and the step is a lower bound.

{markdown(table)}

## Constants and versions

```
{values}
```

Python {platform.python_version()}, {versions}; on {device}, {torch.get_num_threads()} CPU threads.

## The paper's claims

Differences are in favour of the claim where positive: mean over n trials ± half of the 95 % interval by Student's t,
paired by trial. Borne out means that the whole interval lies above zero. Matching is borne out if the mean is not below
zero here, and at no level before does the whole interval lie below it.

{markdown([["claim", "weights remaining", "n", "difference", "in this run"], *claims(rows)])}
"""


def new_figure(rows: list[dict], statistic: str, columns: int, size: tuple[float, float], **options) -> tuple:
    """A seaborn-styled figure that names its run and statistic, and a row of axes."""
    sns.set_theme(style="whitegrid", context="notebook", font_scale=1.2)
    figure, (axes,) = plt.subplots(1, columns, figsize=size, squeeze=False, layout="constrained", **options)
    trials = len({row["trial"] for row in rows})
    figure.suptitle(f"{rows[0]['dataset']}, {rows[0]['model']}, {trials} trial{'s' * (trials > 1)}: {statistic}")
    return figure, axes


def scale_weights_remaining(axes: plt.Axes, rows: list[dict]) -> None:
    """Log axis of the weights remaining, from 100 % on the left to the sparsest level."""
    sparsest = min(row["weights_remaining"] for row in rows)
    ticks = [tick for tick in (100, 50, 20, 10, 5, 3, 2, 1, 0.5, 0.2, 0.1) if round(sparsest, 1) <= tick]
    axes.set(xscale="log", xlim=(108, sparsest / 1.08), xlabel="weights remaining (%)")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def chosen_levels(rows: list[dict]) -> list[int]:
    """A few levels to look at closely: those nearest to 51, 21, 7 and 3.6 % of weights remaining, as in the paper."""
    left = remaining(rows)[1:]
    return sorted({1 + int(np.abs(np.log(left / percent)).argmin()) for percent in (51.3, 21.1, 7.0, 3.6)})


def draw_accuracy(axes: plt.Axes, rows: list[dict], labels: dict[str, str]) -> None:
    """Final test accuracy versus weights remaining of the arms that have a label, the dense networks dashed.

    The scale is the same whichever arms are drawn.
    """
    dense, everything = final(rows, "dense")[0], np.concatenate([final(rows, arm) for arm in arms_of(rows)])
    axes.axhline(dense.mean(), color=COLOURS["dense"], linestyle="--", label=f"dense ({dense.mean():.2f} %)")
    for arm, label in labels.items():
        sns.lineplot(x=np.repeat(remaining(rows, arm), len(dense)), y=final(rows, arm).ravel(), errorbar=("pi", 100),
                     ax=axes, color=COLOURS[arm], marker=MARKERS[arm], label=label)
    scale_weights_remaining(axes, rows)
    margin = 0.05 * np.ptp(everything) + 0.01
    axes.set(ylim=(everything.min() - margin, everything.max() + margin), ylabel="test accuracy (%)")
    axes.legend(loc="best")


def accuracy_plot(rows: list[dict], arms: list[str], title: str) -> plt.Figure:
    """Accuracy versus weights remaining of some arms."""
    figure, (axes,) = new_figure(rows, "mean, lowest to highest", 1, (8, 5.2))
    draw_accuracy(axes, rows, {arm: arm for arm in arms})
    axes.set(title=title)
    return figure


def transfer_plot(rows: list[dict], found_on: str) -> plt.Figure:
    """Do tickets found on another dataset train as well as those found here? Accuracies, and paired differences."""
    figure, (left, right) = new_figure(rows, f"do tickets found on {found_on} train well?", 2, (13, 5.2))
    labels = {"rewind": f"ticket found on {rows[0]['dataset']}", "transfer": f"ticket found on {found_on}",
              "reinit": f"{rows[0]['dataset']}'s mask, new weights"}
    labels = {arm: label for arm, label in labels.items() if arm in arms_of(rows)}
    draw_accuracy(left, rows, labels)
    left.set(title="mean, lowest to highest")
    right.axhline(0, color=COLOURS["dense"], linestyle="--")
    for arm in [arm for arm in labels if arm != "transfer"]:
        mean, half = paired_interval(final(rows, "transfer") - final(rows, arm))
        right.plot(remaining(rows), mean, color=COLOURS[arm], marker=MARKERS[arm], label=f"minus {labels[arm]}")
        right.fill_between(remaining(rows), mean - half, mean + half, color=COLOURS[arm], alpha=0.2, linewidth=0)
    scale_weights_remaining(right, rows)
    right.set(ylabel=f"ticket found on {found_on} (points)", title="paired difference, mean and 95 % interval")
    right.legend(loc="best")
    return figure


def early_stopping_plot(rows: list[dict]) -> plt.Figure:
    """When the networks stop improving, and when they are as good as the dense ones end: medians over trials."""
    figure, panels = new_figure(rows, "median step; hollow: not reached by most", 2, (12, 5.6), sharey=True)
    last = max(row["step"] for row in rows)
    titles = "lowest validation loss", "dense network's final validation accuracy"
    for axes, moment, title in zip(panels, (early_stop, catch_up), titles, strict=True):
        axes.axhline(last, color=COLOURS["dense"], linestyle=":", label=f"end of training ({last} steps)")
        for place, arm in enumerate(arms_of(rows), start=1):
            median = np.median(moment(rows, arm), axis=1)
            missed = np.isinf(median)
            style = {"color": COLOURS[arm], "marker": MARKERS[arm], "markersize": 10 / place**0.5}
            axes.plot(remaining(rows, arm), np.where(missed, np.nan, median), **style, label=arm)
            axes.plot(remaining(rows, arm)[missed], np.full(missed.sum(), last * (1 + 0.06 * place)), **style,
                      linestyle="", markerfacecolor="white", markeredgewidth=1.5)
        scale_weights_remaining(axes, rows)
        axes.set_yticks([tick for tick in plt.MaxNLocator(7).tick_values(0, last) if tick <= last])
        axes.set(ylim=(0, last * (1.06 + 0.06 * len(arms_of(rows)))), ylabel="training step", title=title)
    # Below the panels: within them, no place is free in every run.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(arms_of(rows)))
    return figure


def learning_curves(rows: list[dict]) -> plt.Figure:
    """Test accuracy while training, at a few sparsities, the dense networks dashed."""
    levels = chosen_levels(rows) if arms_of(rows) else [0]
    figure, panels = new_figure(rows, "mean, lowest to highest", len(levels), (2 + 3.5 * len(levels), 4.6), sharey=True)
    for level, axes in zip(levels, panels, strict=True):
        for arm, at in {"dense": 0, **dict.fromkeys(arms_of(rows), level)}.items():
            steps, accuracy = (measured(rows, arm, column)[at].ravel() for column in ("step", "test_accuracy"))
            sns.lineplot(x=steps, y=accuracy, errorbar=("pi", 100), ax=axes, color=COLOURS[arm], label=arm,
                         marker=MARKERS[arm], markevery=1 + len(set(steps)) // 15, linestyle="-" if at else "--",
                         legend=axes is panels[0])
        axes.set(xlabel="training step", ylabel="test accuracy (%)", title=f"{remaining(rows)[level]:.1f} % remaining")
    # The first twentieth of the training may lie below the axis: the rest would be squeezed into a line.
    shown = [row["test_accuracy"] for row in rows
             if row["level"] in (0, *levels) and row["step"] > rows[-1]["step"] / 20]
    panels[0].set_ylim(min(shown) - 0.5, max(shown) + 0.5)
    return figure


def pixel_plot(rows: list[dict], pruned_at: Tensor) -> plt.Figure:
    """Share of each input pixel's first-layer weights that survive, mean over trials; pruned_at (trials, 784, 300)."""
    levels = chosen_levels(rows)
    figure, panels = new_figure(rows, "mean share of first-layer weights left", len(levels), (3.6 * len(levels), 5.4))
    for level, axes in zip(levels, panels, strict=True):
        share = 100 * masks_at({"fc1.weight": pruned_at}, level)["fc1.weight"].mean((0, 2)).view(28, 28).numpy()
        image = axes.imshow(share, cmap="rocket", vmin=0)
        figure.colorbar(image, ax=axes, location="bottom", label="weights left (%)")
        axes.set(title=f"{remaining(rows)[level]:.1f} % remaining", xlabel="pixel column", ylabel="pixel row",
                 xticks=[], yticks=[])
    return figure


def kernel_plot(rows: list[dict], pruned_at: Tensor) -> plt.Figure:
    """When each weight of the first convolution was pruned: a row per trial; pruned_at (trials, kernels, 1, 5, 5)."""
    figure, (axes,) = new_figure(rows, "the first convolution's kernels", 1, (10, 1.4 + 1.33 * min(5, len(pruned_at))))
    last = max(row["level"] for row in rows)
    grid = torch.full((min(5, len(pruned_at)), pruned_at.shape[1], 6, 6), torch.nan)     # a gap after each 5x5 kernel
    grid[..., :5, :5] = pruned_at[:5, :, 0].float()
    grid = grid.masked_fill((grid == 0) | (grid > last), last + 1).transpose(1, 2).flatten(0, 1).flatten(1)
    image = axes.imshow(grid[:-1, :-1].numpy(), cmap="viridis", vmin=1, vmax=last + 1)
    ticks = sorted({1, (last + 1) // 2, last})
    bar = figure.colorbar(image, ax=axes, label="level at which the weight was pruned")
    bar.set_ticks([*ticks, last + 1], labels=[*ticks, "survived"])
    axes.grid(False)
    axes.set(xlabel="kernel", ylabel="trial")
    axes.set_xticks([6 * n + 2 for n in range(pruned_at.shape[1])], range(1, pruned_at.shape[1] + 1))
    axes.set_yticks([6 * n + 2 for n in range(len(grid) // 6)], range(len(grid) // 6))
    return figure


def draw_figures(rows: list[dict], pruned_at: Masks, found_on: str | None) -> dict[str, plt.Figure]:
    """Every figure that the run's arms and levels give, by file name. `found_on`: the transferred tickets' dataset."""
    figures = {"learning_curves.png": learning_curves(rows)}
    if arms_of(rows):
        figures["accuracy_plot_iterative.png"] = accuracy_plot(rows, ["rewind"], "Pruned, survivors rewound")
        figures["comparison_plot.png"] = accuracy_plot(rows, arms_of(rows), "The connections, or their first weights?")
        figures["early_stopping_plot.png"] = early_stopping_plot(rows)
        plot, layer = (kernel_plot, "conv1.weight") if "conv1.weight" in pruned_at else (pixel_plot, "fc1.weight")
        figures["mask_plot.png"] = plot(rows, pruned_at[layer])
    if "reinit" in arms_of(rows):
        figures["accuracy_plot_reinit.png"] = accuracy_plot(rows, ["reinit"], "The same masks, survivors drawn anew")
    if "transfer" in arms_of(rows):
        figures["transfer_plot.png"] = transfer_plot(rows, found_on)
    return figures


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait while another process writes results to the folder; a lock that even a killed process gives back."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):                  # a network folder may know no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def make_room(folder: Path, metrics: bytes) -> None:
    """Move the results of another run, with other constants or other numbers, to previous/<time>/ in the folder."""
    there = [folder / name for name in OUTPUTS if (folder / name).exists()]
    numbers, words = (path.read_bytes() if path.exists() else b"" for path in (folder / name for name in OUTPUTS[-2:]))
    ours = all(f"\n{name} = {value!r}\n".encode() in words for name, value in experiment().items())
    if there and not (ours and metrics.startswith(numbers)):        # of this run there may be fewer levels
        previous = unused(folder / "previous" / time.strftime("%Y-%m-%dT%H-%M-%S"))
        previous.mkdir(parents=True)
        for path in there:                                          # summary.md last: it tells whose the results are
            path.rename(previous / path.name)
        print(f"the results of an earlier run are now in {previous}", flush=True)


def write_results(state: dict, given: dict | None, folder: Path, device: torch.device) -> None:
    """Write summary, records and figures of the finished levels, and after the last one the tickets."""
    rows, pruned_at, text = state["rows"], state["pruned_at"], io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    metrics = text.getvalue().encode()
    with one_at_a_time(folder):
        make_room(folder, metrics)
        write_whole(folder / "summary.md", summary(rows, constants(), machine).encode())
        write_whole(folder / "metrics.csv", metrics)
        matplotlib.use("Agg")                               # files only: no window, no display needed
        for name, figure in draw_figures(rows, pruned_at, given and given["constants"]["DATASET"]).items():
            figure.savefig(image := io.BytesIO(), dpi=150)
            plt.close(figure)
            write_whole(folder / name, image.getvalue())
        if state["level"] == LEVELS:
            tickets = {"constants": constants(), "theta0": state["theta0"], "pruned_at": pruned_at}
            write_whole(folder / "tickets.pt", packed(tickets))
        for name in OUTPUTS:
            remove_unfinished(folder / name)


# ---- Main ------------------------------------------------------------------------------------------------------------

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
        if not (name and equals):
            raise UserError(f"{argument!r} is not of the form NAME=VALUE, such as TRIALS=1.")
        if name not in RULES:
            raise UserError(f"there is no constant {name}" + nearest(name, list(RULES)))
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            value = text
        if name == "ARMS" and isinstance(value, str | list):
            value = tuple(value.split(",") if isinstance(value, str) else value)
        elif value is not None and not isinstance(value, str) and isinstance("", RULES[name][0]):
            value = text                                    # a folder may be called 2026
        values[name] = value
    return values


def check_constants() -> None:
    """Stop with one sentence where a constant is out of range, or where constants make no sense together."""
    for name, (types, condition, words) in RULES.items():
        value = globals()[name]
        if isinstance(value, bool) != (types is bool) or not isinstance(value, types) or not condition(value):
            known = words.removeprefix("one of ").split(", ") if words.startswith("one of ") else []
            raise UserError(f"{name} must be {words}, not {value!r}" + nearest(value, known))
    steps = EPOCHS * steps_per_epoch()
    if "rewind" not in ARMS:
        raise UserError("ARMS must contain rewind: its networks are the ones that are pruned.")
    if ("transfer" in ARMS) != (TICKETS_FROM is not None):
        raise UserError("the arm transfer and TICKETS_FROM go together: set both or neither.")
    if steps <= REWIND_STEP:
        raise UserError(f"REWIND_STEP must be below the {steps} steps of a training, not {REWIND_STEP}.")
    network = build_network(MODEL, DROPOUT)
    rates = prune_rates(network)
    left = {f"{name}.weight": layer.weight.numel() for name, layer in weighted_layers(network).items()}
    if PRUNE_SCOPE == "global":
        left = {"all layers": sum(left.values())}
    for level, name in itertools.product(range(1, LEVELS + 1), left):
        gone = round(rates.get(name, PRUNE_RATE) * left[name])
        if not 0 < gone < left[name]:
            raise UserError(f"LEVELS={LEVELS} is too many at PRUNE_RATE={PRUNE_RATE}: at level {level}, {gone} of the "
                            f"{left[name]} weights left in {name} would be pruned.")
        left[name] -= gone


def check_tickets() -> dict | None:
    """The tickets from TICKETS_FROM, if any; they must fit the constants, and stay clear of this run's own."""
    if TICKETS_FROM is None:
        return None
    if beside_script(TICKETS_FROM).resolve().parent == beside_script(RESULTS_DIR).resolve():
        raise UserError("TICKETS_FROM lies in RESULTS_DIR, where this run's own go: choose another RESULTS_DIR.")
    given = load_tickets(TICKETS_FROM)
    held = given["constants"]
    if held["MODEL"] != MODEL or held["TRIALS"] < TRIALS or held["LEVELS"] < LEVELS:
        raise UserError(f"TICKETS_FROM={TICKETS_FROM} holds {held['TRIALS']} trials and {held['LEVELS']} levels of "
                        f"{held['MODEL']}: MODEL must be the same, TRIALS and LEVELS no more.")
    return given


def prepare_device() -> torch.device:
    """DEVICE, or the fastest kind that is there, set up: on CUDA with a stream on which graphs can be captured."""
    torch.set_flush_denormal(True)      # AdamW's fading moments would slow a CPU down on their way to zero
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = TF32
    device = DEVICE
    if DEVICE in ("auto", "cuda") and torch.cuda.is_available():        # a GPU for each of a machine's processes
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    elif DEVICE == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"DEVICE={DEVICE} cannot be used here ({str(error).splitlines()[0]}): "
                        "DEVICE=auto takes what there is.") from None
    if device.type == "cuda":
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


@contextlib.contextmanager
def faults_in_one_sentence(device: torch.device) -> Iterator[None]:
    """What the machine lacks is said as plainly as what the user got wrong. Anything else keeps its traceback."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error}. Finished levels are kept: once that is mended, the same command goes on.") from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|alloc", str(error), re.I):
            raise
        raise UserError(f"there is not enough memory on {device}: lower TRIALS, BATCH_SIZE or the number of ARMS. "
                        "Finished levels are kept.") from None


def main(arguments: list[str]) -> None:
    """Do pruned networks train better from their original initial weights, or does any draw do?"""
    if {"-h", "--help"} & set(arguments):
        print(__doc__ + "\nConstants:\n" + "\n".join(f"  {name} = {value!r}" for name, value in constants().items()))
        return
    globals().update(read_arguments(arguments))
    check_constants()
    given, folder, device, checkpoint = check_tickets(), prepare_results_folder(), prepare_device(), checkpoint_path()
    rank, processes = process()
    with faults_in_one_sentence(device):
        state = load_state(checkpoint)
        if rank > 0:
            sys.stdout = io.StringIO()                      # the first process speaks for all
        try:
            if own_trials():
                run_experiment(state, load_dataset(device), given, device, checkpoint)
        finally:                        # whatever ends the run: of the finished levels there are results
            if processes == 1 and state["rows"]:
                write_results(state, given, folder, device)
        if processes > 1:
            state = gather(state)
            if rank == 0:
                write_results(state, given, folder, device)
            torch.distributed.barrier()                     # until the results are there, each keeps its checkpoint
        checkpoint.unlink(missing_ok=True)
        remove_unfinished(checkpoint)
    if rank == 0:
        print("\n" + "\n".join(verdict(state["rows"])) + f"\n\nresults: {folder}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # a cluster's Ctrl-C: it wants its machine back
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"lth_pruning: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.stdout.flush()
        os._exit(130)                   # nothing is left to do, and PyTorch would take another second to unload
