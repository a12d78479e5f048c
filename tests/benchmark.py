"""How long one training step of one network takes: as tutorials write it, as a tuned loop, in the stack, and at best.

    python tests/benchmark.py              both models, batches of 60 and 128, on the CPU
    python tests/benchmark.py MODEL=lenet BATCH_SIZE=128 DEVICE=cuda     only these; any other constant can be set too

Everything is measured in turn, several times, in one process: quote the ratios. A measurement, not a test.

loader    a DataLoader that transforms image by image, one network, AdamW, clip_grad_norm_, a loop over masks
plain     one network, the data set as one tensor in memory, fused AdamW
jax       ten MLPs, the same step by vmap, 20 of them in a scan; where jax and optax are installed
stack     lth_pruning.train, ten networks of two arms together
floor     products, convolutions and AdamW of ten networks alone: no masks, clipping, dropout, loss or gathering
"""

import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lth_pruning as lth  # first: it sets what PyTorch looks up when it is loaded

# isort: split

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision import transforms

ROUNDS = 5
NETS = 10
NETWORKS = [(arm, trial) for trial in range(NETS // 2) for arm in ("rewind", "reinit")]


class Clock:
    """Stands in for the progress bar: the time between the end of the first step and that of the last."""

    def __init__(self, device: torch.device, steps: int):
        self.device = device
        self.steps = steps
        self.done = 0
        self.moments = []

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
    for images, labels in itertools.islice(batches, steps):
        optimizer.zero_grad()
        F.cross_entropy(network(images.to(device)), labels.to(device)).backward()
        for name, layer in lth.weighted_layers(network).items():
            layer.weight.grad *= masks[name]
        nn.utils.clip_grad_norm_(network.parameters(), lth.CLIP_NORM or float("inf"))
        optimizer.step()
        clock.update()
    return clock.seconds()


def train_stack(data: dict, device: torch.device, steps: int) -> float:
    """Seconds per step and network of the stack."""
    weights = lth.stack([lth.initial_weights(lth.generator("init", trial)) for _, trial in NETWORKS])
    lth.EPOCHS = 1
    lth.steps_per_epoch = lambda: steps
    lth.evaluation_steps = lambda end: {end}
    clock = Clock(device, steps)
    lth.train(weights, lth.full_masks(weights), data, NETWORKS, 1, clock)
    return clock.seconds() / NETS


def jax_scan(images: Tensor, labels: Tensor) -> Callable[[], float] | None:
    """A function that gives the seconds per step and network of ten MLPs in JAX; None where it is not installed."""
    try:
        import jax
        import jax.numpy as jnp
        import optax
    except ImportError:
        return None
    steps = 20
    trials = NETS // 2
    images = jnp.asarray(images.flatten(1).numpy())
    labels = jnp.asarray(labels.numpy())
    weights = lth.stack([lth.initial_weights(lth.generator("init", trial)) for _, trial in NETWORKS])
    weights = {name: jnp.asarray(tensor.numpy()) for name, tensor in weights.items()}
    masks = {name: jnp.ones_like(array) for name, array in weights.items() if name.endswith(".weight")}
    optimizer = optax.chain(optax.clip_by_global_norm(lth.CLIP_NORM or float("inf")),
                            optax.adamw(lth.LEARNING_RATE, weight_decay=lth.WEIGHT_DECAY))

    def loss(weights, x, y, factors):
        for name, factor in zip(("fc1", "fc2"), factors, strict=True):
            x = jax.nn.relu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]) * factor
        logits = x @ weights["output.weight"].T + weights["output.bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(state, batch):                                 # batch: (trials, images)
        weights, masks, moments, key = state
        key, *keys = jax.random.split(key, 3)
        factors = [jnp.repeat(jax.random.bits(own, (trials, lth.BATCH_SIZE, units), jnp.uint16)
                              >= round(2**16 * lth.DROPOUT), 2, axis=0) / (1 - lth.DROPOUT)
                   for own, units in zip(keys, (300, 100), strict=True)]
        x = jnp.repeat(images[batch], 2, axis=0)
        y = jnp.repeat(labels[batch], 2, axis=0)
        losses, gradients = jax.vmap(jax.value_and_grad(loss))(weights, x, y, factors)
        gradients = {name: gradient * masks.get(name, 1) for name, gradient in gradients.items()}
        updates, moments = jax.vmap(optimizer.update)(gradients, moments, weights)
        return (optax.apply_updates(weights, updates), masks, moments, key), losses

    scan = jax.jit(lambda state, order: jax.lax.scan(step, state, order))
    state = (weights, masks, jax.vmap(optimizer.init)(weights), jax.random.key(0))
    order = jnp.asarray(np.random.default_rng(0).integers(0, len(images), (steps, trials, lth.BATCH_SIZE)))

    def measure() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(scan(state, order))
        return (time.perf_counter() - begun) / steps / NETS

    measure()                                               # compiles
    return measure


def floor(device: torch.device) -> Callable[[], float]:
    """A function that gives the seconds per step and network of products and AdamW alone: per layer its output, its
    weights' and its inputs' gradient, which the first layer does not need; convolutions of two arms in one."""
    calls = []
    x = torch.randn(2, 1, 28, 28)
    for layer in lth.build_network(lth.MODEL, 0):
        shape = x.shape[1:]
        x = layer(x)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        first = not calls
        if isinstance(layer, nn.Linear):
            inputs = torch.randn(NETS, layer.in_features, lth.BATCH_SIZE, device=device)
            outputs = torch.randn(NETS, layer.out_features, lth.BATCH_SIZE, device=device)
            weight = torch.randn(NETS, layer.out_features, layer.in_features, device=device)
            calls += [(torch.bmm, weight, inputs), (torch.bmm, outputs, inputs.mT)]
            calls += [] if first else [(torch.bmm, weight.mT, outputs)]
        else:
            groups = 1 if first else 2
            one, gradient = (torch.randn(lth.BATCH_SIZE, arms * size[0], *size[1:], device=device).to(
                memory_format=torch.channels_last) for arms, size in ((groups, shape), (2, x.shape[1:])))
            one = one.as_strided(one.shape, (784, 1, 28, 1)) if first else one
            weight = torch.cat(2 * [layer.weight.detach().to(device)])
            calls += NETS // 2 * [
                (F.conv2d, one, weight, None, 1, layer.padding, 1, groups),
                (torch.ops.aten.convolution_backward, gradient, one, weight, None, [1, 1], list(layer.padding), [1, 1],
                 False, [0, 0], groups, [not first, True, False])]
    rows = lth.as_rows(lth.stack(NETS * [lth.initial_weights(lth.generator("init"))])).to(device)
    rows.grad = torch.randn_like(rows)
    calls.append((torch.optim.AdamW([rows], fused=True).step,))

    def measure() -> float:
        clock = Clock(device, 20)
        for _ in range(20):
            for call, *arguments in calls:
                call(*arguments)
            clock.update()
        return clock.seconds() / NETS

    return measure


def compare(data: dict[str, tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Measure and print one model with one batch size."""
    # Training alone is timed: a single image stands in for what is evaluated at the end.
    few = {name: (images, labels) if name == "train" else (images[:1], labels[:1])
           for name, (images, labels) in data.items()}
    images, labels = data["train"]
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "MNIST").symlink_to(lth.beside_script(lth.DATA_DIR) / "MNIST")
        convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
        source = torchvision.datasets.MNIST(root, train=True, transform=convert)
    loader = torch.utils.data.DataLoader(source, batch_size=lth.BATCH_SIZE, shuffle=True)
    in_memory = ((images[pick], labels[pick]) for _ in itertools.count()
                 for pick in torch.randperm(len(images), device=device).split(lth.BATCH_SIZE))
    measures = {"loader": lambda: train_alone(loader, device, 30, fused=False),
                "plain": lambda: train_alone(in_memory, device, 100, fused=True),
                "jax": jax_scan(images.cpu(), labels.cpu()) if lth.MODEL == "mlp" and device.type == "cpu" else None,
                "stack": lambda: train_stack(few, device, 30),
                "floor": floor(device)}
    measures = {name: measure for name, measure in measures.items() if measure is not None}
    seconds = {name: [] for name in measures}
    for _ in range(ROUNDS + 1):                             # the first round warms up
        for name, measure in measures.items():
            seconds[name].append(measure())

    print(f"\n{lth.MODEL}, batch {lth.BATCH_SIZE}, {device}\n"
          "          ms per step and network (lowest to highest)      times that of the stack")
    for name, values in seconds.items():
        values = values[1:]
        ratios = [one / stack for one, stack in zip(values, seconds["stack"][1:], strict=True)]
        print(f"{name:10}{1000 * statistics.median(values):8.3f} ({1000 * min(values):.3f} to {1000 * max(values):.3f})"
              f"{statistics.median(ratios):26.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def main() -> None:
    given = {"DEVICE": "cpu"} | lth.read_arguments(sys.argv[1:])
    vars(lth).update(given)
    lth.check_constants()
    device = lth.prepare_device()
    data = lth.load_dataset(device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads; median of {ROUNDS} rounds")
    for lth.MODEL in [given["MODEL"]] if "MODEL" in given else ["mlp", "lenet"]:
        for lth.BATCH_SIZE in [given["BATCH_SIZE"]] if "BATCH_SIZE" in given else [60, 128]:
            compare(data, device)


if __name__ == "__main__":
    main()
