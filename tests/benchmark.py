"""How long one training step of one network takes: as tutorials write it, as a tuned loop, in the stack, and at best.

    python tests/benchmark.py              both models, batches of 60 and 128, on the CPU and on CUDA if it is there
    python tests/benchmark.py MODEL=lenet BATCH_SIZE=128 DEVICE=cpu      only these; any other constant can be set too

Everything is measured in turn, several times, in one process: quote the ratios. A measurement, not a test.

loader    a DataLoader that transforms image by image, one network, AdamW, clip_grad_norm_, a loop over masks
plain     one network, the data set as one tensor in memory, fused AdamW
stack n   lth_pruning.train, n networks together: of two arms, where n is even
sparse    the stack of ten networks with 3.6 % of their weights, as after 15 levels
products  the matrix products and convolutions of one step of ten networks, forward and backward
floor     the same and AdamW: what a step in PyTorch has to take
"""

import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")          # as the script itself does

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lth_pruning as lth

ROUNDS, STACKS = 5, (1, 5, 10, 20, 40, 80)


class Clock:
    """Stands in for the progress bar: the time between the end of the first step and that of the last."""

    def __init__(self, device: torch.device, steps: int):
        self.device, self.steps, self.done, self.moments = device, steps, 0, []

    def update(self, _=None) -> None:
        self.done += 1
        if self.done in (1, self.steps):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())

    def seconds(self) -> float:
        """Per step."""
        begun, ended = self.moments
        return (ended - begun) / (self.steps - 1)


def train_alone(batches: Iterable, device: torch.device, steps: int, fused: bool) -> float:
    """Seconds per step of one masked network on batches of images and labels."""
    network = lth.build_network(lth.MODEL, lth.DROPOUT).to(device)
    masks = {name: torch.ones_like(layer.weight) for name, layer in lth.weighted_layers(network).items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=lth.LEARNING_RATE, weight_decay=lth.WEIGHT_DECAY,
                                  fused=fused)
    clock = Clock(device, steps)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(images.to(device)), labels.to(device)).backward()
        for name, layer in lth.weighted_layers(network).items():
            layer.weight.grad *= masks[name]
        nn.utils.clip_grad_norm_(network.parameters(), lth.CLIP_NORM or float("inf"))
        optimizer.step()
        clock.update()
        if clock.done == steps:
            return clock.seconds()
    raise ValueError(f"an epoch has fewer than {steps} batches")


def train_stack(nets: int, data: dict, device: torch.device, steps: int, share: float = 1) -> float:
    """Seconds per step and network of a stack that has this share of its weights left."""
    arms = ("rewind", "reinit") if nets % 2 == 0 else ("rewind",)
    networks, clock = [(arm, trial) for arm in arms for trial in range(nets // len(arms))], Clock(device, steps)
    single = lth.initial_weights(lth.generator("init"))
    masks = lth.full_masks(single)
    masks = lth.stack(nets * [lth.prune(single, masks, dict.fromkeys(masks, 1 - share), "layer")])
    lth.EPOCHS, lth.EVAL_EVERY, lth.steps_per_epoch = 1, steps, lambda: steps
    lth.train(lth.masked(lth.stack(nets * [single]), masks), masks, data, networks, 1, clock)
    return clock.seconds() / nets


def products(nets: int, device: torch.device, adamw: bool) -> Callable[[], None]:
    """A function that does nothing but the products of one step: per layer its output, its weights' and its inputs'
    gradient, which the first layer does not need; convolutions of two arms in one, as in the stack. And AdamW."""
    calls, x = [], torch.randn(2, 1, 28, 28)
    for layer in lth.build_network(lth.MODEL, 0):
        shape, x = x.shape[1:], layer(x)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        first = not calls
        if isinstance(layer, nn.Linear):
            inputs, outputs = (torch.randn(nets, lth.BATCH_SIZE, *size, device=device) for size in (shape, x.shape[1:]))
            weight = torch.randn(nets, layer.in_features, layer.out_features, device=device)
            calls += [(torch.bmm, inputs, weight), (torch.bmm, inputs.mT, outputs)]
            calls += [] if first else [(torch.bmm, outputs, weight.mT)]
        else:
            groups, padding = 1 if first else 2, list(layer.padding)
            one, gradient = (torch.randn(lth.BATCH_SIZE, arms * size[0], *size[1:], device=device).to(
                memory_format=torch.channels_last) for arms, size in ((groups, shape), (2, x.shape[1:])))
            one = one.as_strided(one.shape, (784, 1, 28, 1)) if first else one
            weight = torch.cat(2 * [layer.weight.detach().to(device)])
            calls += nets // 2 * [
                (F.conv2d, one, weight, None, 1, padding, 1, groups),
                (torch.ops.aten.convolution_backward, gradient, one, weight, None, [1, 1], padding, [1, 1], False,
                 [0, 0], groups, [not first, True, False])]
    rows = torch.randn(nets, sum(tensor.numel() for tensor in lth.initial_weights(lth.generator("init")).values()),
                       device=device)
    parameters = [row.requires_grad_() for row in rows.unbind()]
    for row, gradient in zip(parameters, torch.randn_like(rows), strict=True):
        row.grad = gradient
    optimizer = torch.optim.AdamW(parameters, fused=True)
    calls += [(optimizer.step,)] if adamw else []

    def run() -> None:
        for call, *arguments in calls:
            call(*arguments)
    return run


def time_products(run: Callable[[], None], nets: int, device: torch.device, steps: int) -> float:
    """Seconds per step and network."""
    clock = Clock(device, steps)
    for _ in range(steps):
        run()
        clock.update()
    return clock.seconds() / nets


def mnist_as_in_tutorials() -> torchvision.datasets.MNIST:
    """MNIST's training images, which torchvision transforms one by one."""
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    with tempfile.TemporaryDirectory() as root:                     # torchvision unpacks the archives there
        shutil.copytree(lth.beside_script(lth.DATA_DIR) / "MNIST" / "raw", f"{root}/MNIST/raw")
        return torchvision.datasets.MNIST(root, train=True, transform=convert, download=True)


def compare(data: dict[str, tuple[Tensor, Tensor]], source: torchvision.datasets.MNIST, device: torch.device) -> None:
    """Measure and print one model with one batch size on one device."""
    # Training alone is timed: a single image stands in for what is evaluated after the last step.
    few = {name: (images, labels) if name == "train" else (images[:1], labels[:1])
           for name, (images, labels) in data.items()}
    images, labels = data["train"]
    bare, floor = products(10, device, adamw=False), products(10, device, adamw=True)
    loader = torch.utils.data.DataLoader(source, batch_size=lth.BATCH_SIZE, shuffle=True)
    in_memory = ((images[pick], labels[pick]) for _ in iter(int, 1)
                 for pick in torch.randperm(len(images), device=device).split(lth.BATCH_SIZE))
    measure = {
        "loader": lambda: train_alone(loader, device, 30, fused=False),
        "plain": lambda: train_alone(in_memory, device, 100, fused=True),
        **{f"stack {n}": lambda n=n: train_stack(n, few, device, max(20, 200 // n)) for n in STACKS},
        "sparse": lambda: train_stack(10, few, device, 20, share=0.036),
        "products": lambda: time_products(bare, 10, device, 20),
        "floor": lambda: time_products(floor, 10, device, 20)}
    seconds = {name: [] for name in measure}
    for _ in range(ROUNDS + 1):                                     # the first round warms up
        for name, run in measure.items():
            seconds[name].append(run())
    print(f"\n{lth.MODEL}, batch {lth.BATCH_SIZE}, {device}\n"
          "          ms per step and network (lowest to highest)      times that of stack 10")
    for name, values in seconds.items():
        values, stack = values[1:], seconds["stack 10"][1:]
        ratios = [a / b for a, b in zip(values, stack, strict=True)]
        print(f"{name:10}{1000 * statistics.median(values):8.3f} ({1000 * min(values):.3f} to {1000 * max(values):.3f})"
              f"{statistics.median(ratios):26.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main() -> None:
    given = lth.read_arguments(sys.argv[1:])
    vars(lth).update(given)
    lth.check_constants()
    devices = [lth.DEVICE] if "DEVICE" in given or not torch.cuda.is_available() else ["cpu", "cuda"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
          + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "") + f"; median of {ROUNDS} rounds")
    source = mnist_as_in_tutorials()
    for lth.DEVICE in devices:
        device = lth.prepare_device()
        data = lth.load_dataset(device)
        for model, batch in itertools.product([given["MODEL"]] if "MODEL" in given else ["mlp", "lenet"],
                                              [given["BATCH_SIZE"]] if "BATCH_SIZE" in given else [60, 128]):
            lth.MODEL, lth.BATCH_SIZE = model, batch
            compare(data, source, device)


if __name__ == "__main__":
    main()
