"""Training-step time per network, relative to this script's dense step with ten networks in a stack. Not a test.

    python tests/benchmark.py              batches of 60 and 128, in about four minutes
    python tests/benchmark.py 2            with two rounds, to see that it works

All ways are timed in turn, round after round, in one process, so that a machine's moods hit them alike: quote the
ratios. Each step gathers a batch, applies dropout, masks and clips gradients, and updates by AdamW.

stack     `train` itself: ten LeNet-300-100 (two arms of five trials), with so many of their weights left
plain     one network at a time, as PyTorch's documentation writes it, masks by torch.nn.utils.prune
jax       the ten networks by vmap, steps by scan, compiled, on all CPUs; if JAX is installed
products  the matrix products of a dense step alone, ten networks at once: what a dense step cannot go below
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lth_pruning as lth  # first: it sets what PyTorch looks up when it is loaded

# isort: split

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as torch_prune

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = None

CPU = torch.device("cpu")
ROUNDS = 15
STEPS = 30                              # of each timing
LEVELS = (0, 7, 12, 15, 16)             # 100, 21.1, 7.0, 3.6 and 2.8 % of the weights
NETWORKS = [(arm, trial) for trial in range(5) for arm in ("rewind", "reinit")]


class Clock:
    """Stands in for the progress bar, and measures from the end of the first step to the end of the last one."""

    def __init__(self) -> None:
        self.ends = []

    def update(self, _networks: int = 1) -> None:
        """Note that a step has ended."""
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the seconds per step."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def tickets() -> dict[int, tuple[dict, dict]]:
    """Return, by level, weights and masks of ten networks, each with masks of its own."""
    rates = lth.prune_rates(lth.build_network("mlp", lth.DROPOUT))
    drawn = [lth.initial_weights(lth.generator(arm, trial)) for arm, trial in NETWORKS]
    masks = [lth.full_masks(weights) for weights in drawn]
    found = {}
    for level in range(LEVELS[-1] + 1):
        if level > 0:
            masks = [lth.prune(weights, mask, rates, "layer") for weights, mask in zip(drawn, masks, strict=True)]
        if level in LEVELS:
            found[level] = lth.stack(list(map(lth.masked, drawn, masks))), lth.stack(masks)
    return found


def time_stack(weights: dict, masks: dict, data: dict) -> Callable[[], float]:
    """Return a function that times the script's own training."""
    def measure() -> float:
        clock = Clock()
        lth.train(weights, masks, data, NETWORKS, 1, clock)
        return clock.seconds() / len(NETWORKS)

    return measure


def time_plain(weights: dict, masks: dict, data: dict) -> Callable[[], float]:
    """Return a function that times one network by itself; its time does not depend on how many weights are left."""
    images, labels = data["train"]
    network = lth.as_plain_network(lth.build_network("mlp", lth.DROPOUT), lth.pick(weights, 0))
    for name, layer in lth.weighted_layers(network).items():
        torch_prune.custom_from_mask(layer, "weight", masks[f"{name}.weight"][0])
    optimizer = torch.optim.AdamW(network.parameters(), lr=lth.LEARNING_RATE, weight_decay=lth.WEIGHT_DECAY, fused=True)

    def measure() -> float:
        clock = Clock()
        for batch in torch.randperm(len(images))[:STEPS * lth.BATCH_SIZE].split(lth.BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), lth.CLIP_NORM)
            optimizer.step()
            clock.update()
        return clock.seconds()

    return measure


def time_products() -> Callable[[], float]:
    """Return a function that times, per layer, the products for its outputs and its weights' gradient, and behind the
    first layer for its inputs' gradient."""
    products = []
    for layer in lth.weighted_layers(lth.build_network("mlp", 0)).values():
        outputs, inputs = layer.weight.shape
        weight, x, gradient = (torch.randn(len(NETWORKS), *shape) for shape in (
            (outputs, inputs), (inputs, lth.BATCH_SIZE), (outputs, lth.BATCH_SIZE)))
        products += [(weight, x), (gradient, x.mT)]
        if inputs != 784:
            products.append((weight.mT, gradient))
    results = [torch.bmm(*factors) for factors in products]

    def measure() -> float:
        clock = Clock()
        for _ in range(STEPS):
            for factors, result in zip(products, results, strict=True):
                torch.bmm(*factors, out=result)
            clock.update()
        return clock.seconds() / len(NETWORKS)

    return measure


def time_jax(weights: dict, masks: dict, data: dict) -> Callable[[], float]:
    """Return a function that times JAX; its time does not depend on how many weights are left."""
    images, labels = (jnp.asarray(tensor.numpy()) for tensor in (data["train"][0].flatten(1), data["train"][1]))
    weights, masks = ({name: jnp.asarray(tensor.numpy()) for name, tensor in part.items()} for part in (weights, masks))
    keep = 1 - lth.DROPOUT

    def loss(weights: dict, x: jax.Array, y: jax.Array, kept: dict) -> jax.Array:
        for name in ("fc1", "fc2"):
            x = jax.nn.relu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]) * kept[name] / keep
        log_shares = jax.nn.log_softmax(x @ weights["output.weight"].T + weights["output.bias"])
        return -jnp.take_along_axis(log_shares, y[:, None], 1).mean()

    def update(count: jax.Array, weights: dict, masks: dict, first: dict, second: dict, *batch) -> tuple:
        gradients = jax.grad(loss)(weights, *batch)
        gradients = {name: gradient * masks.get(name, 1) for name, gradient in gradients.items()}
        norm = jnp.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        scale = jnp.minimum(1, lth.CLIP_NORM / (norm + 1e-6))
        first = {name: 0.9 * first[name] + 0.1 * scale * gradient for name, gradient in gradients.items()}
        second = {name: 0.999 * second[name] + 0.001 * (scale * gradient) ** 2 for name, gradient in gradients.items()}
        new = {}
        for name, weight in weights.items():
            direction = first[name] / (1 - 0.9**count) / (jnp.sqrt(second[name] / (1 - 0.999**count)) + 1e-8)
            new[name] = weight - lth.LEARNING_RATE * (direction + lth.WEIGHT_DECAY * weight)
        return new, first, second

    def step(state: tuple, batch: jax.Array) -> tuple:      # batch: (trials, images)
        count, key, weights, first, second = state
        key, *keys = jax.random.split(key, 3)
        arms = len(NETWORKS) // len(batch)
        kept = {}
        for name, own, units in zip(("fc1", "fc2"), keys, (300, 100), strict=True):
            bits = jax.random.bits(own, (*batch.shape, units), jnp.uint16)
            kept[name] = jnp.repeat(bits >= round(2**16 * lth.DROPOUT), arms, axis=0)
        x, y = jnp.repeat(images[batch], arms, axis=0), jnp.repeat(labels[batch], arms, axis=0)
        all_networks = jax.vmap(update, in_axes=(None, *7 * [0]))
        return (count + 1, key, *all_networks(count, weights, masks, first, second, x, y, kept)), None

    scan = jax.jit(lambda state, order: jax.lax.scan(step, state, order)[0])
    zeros = jax.tree.map(jnp.zeros_like, weights)
    state = (jnp.float32(1), jax.random.key(0), weights, zeros, zeros)
    order = jnp.asarray(np.random.default_rng(0).integers(len(images), size=(STEPS, 5, lth.BATCH_SIZE)))
    trained = jax.block_until_ready(scan(state, order))[2]  # compiles
    for name, mask in masks.items():
        assert jnp.isfinite(trained[name]).all() and not trained[name][mask == 0].any()

    def measure() -> float:
        started = time.perf_counter()
        jax.block_until_ready(scan(state, order))
        return (time.perf_counter() - started) / STEPS / len(NETWORKS)

    return measure


def ways(data: dict) -> dict[str, Callable[[], float]]:
    """Return, by name, what to time at the present BATCH_SIZE."""
    found = {}
    for level, (weights, masks) in tickets().items():
        kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
        found[f"stack, {100 * kept:.1f} % of the weights"] = time_stack(weights, masks, data)
        if level == 15:
            sparse = weights, masks
    found["plain"] = time_plain(*sparse, data)
    if jax is not None:
        found["jax"] = time_jax(*sparse, data)
    return found | {"products": time_products()}


def main(rounds: int) -> None:
    """Time everything and print a table."""
    data = lth.load_dataset(CPU)
    # Nothing but training is timed: one image stands in for those on which networks are evaluated.
    data = {name: (images, labels) if name == "train" else (images[:1], labels[:1])
            for name, (images, labels) in data.items()}
    lth.EPOCHS = 1
    lth.steps_per_epoch = lambda: STEPS
    lth.evaluation_steps = lambda last_step: {last_step}
    print(f"PyTorch {torch.__version__} with {torch.get_num_threads()} threads on {os.cpu_count()} CPUs, "
          f"{'no JAX' if jax is None else f'JAX {jax.__version__}'}; medians of {rounds} rounds")
    for lth.BATCH_SIZE in (60, 128):
        measures = ways(data)
        seconds = {name: [] for name in measures}
        for number in range(rounds + 1):
            for name, measure in measures.items():
                found = measure()
                if number > 0:                              # the first round warms up
                    seconds[name].append(found)
        dense = next(iter(seconds.values()))
        print(f"\n| batches of {lth.BATCH_SIZE} | times the dense step (lowest to highest) | median ms | lowest ms |\n"
              "|---|---|---|---|")
        for name, found in seconds.items():
            ratios = [one / other for one, other in zip(found, dense, strict=True)]
            print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
                  f"{1000 * statistics.median(found):.3f} | {1000 * min(found):.3f} |", flush=True)
            assert math.isfinite(sum(found))


if __name__ == "__main__":
    with lth.fixed_numerics(CPU):
        main(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS)
