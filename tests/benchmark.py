"""How long one step of one network takes in the stack, and in the two ways in which it is usually written.

    python tests/benchmark.py              on the CPU's default number of threads
    python tests/benchmark.py DEVICE=cuda  any constant of lth_pruning.py can be set

All are measured in turn, several times, in one process: quote the ratios. A measurement, not a test.

loader  a DataLoader that transforms image by image, one network, clip_grad_norm_, a mask loop (the usual script)
plain   one network after another, nn.Module and AdamW, but the data set as one tensor in memory
stack   lth_pruning.train, all networks of a level together
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lth_pruning as lth

STEPS, ROUNDS, ARMS = 60, 5, 2


def train_alone(batches, device: torch.device) -> float:
    """Seconds per step of one masked network on an iterable of batches."""
    network = lth.build_network(lth.MODEL, lth.DROPOUT).to(device)
    masks = {name: torch.ones_like(layer.weight) for name, layer in lth.weighted_layers(network).items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=lth.LEARNING_RATE, weight_decay=lth.WEIGHT_DECAY)
    start = time.perf_counter()
    for step, (images, labels) in enumerate(batches, start=1):
        optimizer.zero_grad()
        F.cross_entropy(network(images.to(device)), labels.to(device)).backward()
        for name, layer in lth.weighted_layers(network).items():
            layer.weight.grad *= masks[name]
        nn.utils.clip_grad_norm_(network.parameters(), lth.CLIP_NORM or float("inf"))
        optimizer.step()
        if step == STEPS:
            break
    synchronize(device)
    return (time.perf_counter() - start) / STEPS


def train_stack(data: dict, device: torch.device) -> float:
    """Seconds per step and network of ARMS arms of TRIALS networks each."""
    nets = ARMS * lth.TRIALS
    weights = lth.stack([lth.initial_weights(lth.generator("init", n)) for n in range(nets)])
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    masks = lth.full_masks(weights)
    start = time.perf_counter()
    lth.train(weights, masks, data, ("rewind", "reinit"), level=1, steps=STEPS, bar=tqdm(disable=True))
    synchronize(device)
    return (time.perf_counter() - start) / STEPS / nets


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's work to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    vars(lth).update(lth.read_arguments(sys.argv[1:]))
    lth.check_constants()
    device = lth.choose_device()
    torch.set_flush_denormal(True)
    data = lth.load_dataset(device)
    # Training alone is timed: a single image stands in for what is evaluated after the last step.
    few = {name: (images, labels) if name == "train" else (images[:1], labels[:1])
           for name, (images, labels) in data.items()}
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    source = torchvision.datasets.MNIST(lth.beside_script(lth.DATA_DIR), train=True, transform=convert)
    loader = torch.utils.data.DataLoader(source, batch_size=lth.BATCH_SIZE, shuffle=True)
    images, labels = data["train"]
    measure = {
        "loader": lambda: train_alone(loader, device),
        "plain": lambda: train_alone(((images[pick], labels[pick]) for pick in
                                      torch.randperm(len(images), device=device).split(lth.BATCH_SIZE)), device),
        "stack": lambda: train_stack(few, device)}
    seconds = {name: [] for name in measure}
    for _ in range(ROUNDS + 1):                                     # the first round warms up
        for name, run in measure.items():
            seconds[name].append(run())
    print(f"{lth.MODEL}, batch {lth.BATCH_SIZE}, {ARMS * lth.TRIALS} networks in the stack, {device}, "
          f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}; median of {ROUNDS} rounds")
    print("         ms per step and network     times the stack's")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values[1:], seconds["stack"][1:], strict=True)]
        print(f"{name:8}{1000 * statistics.median(values[1:]):14.2f}{statistics.median(ratios):24.1f} "
              f"({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
