"""A guest in its host process: numbers do not depend on what that has set, nor is it changed. And devices, unmixed."""

import copy
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from conftest import BAR, QUICK, SCRIPT, at_each_level, check_same_results, names, run_here, seeded
from torch._subclasses.fake_tensor import FakeTensorMode

RUN = (*QUICK, "BATCH_SIZE=100", "VALIDATION_SIZE=1000", "MODEL=mlp")
IMPORT = """
import json, os, random, signal, socket, sys
import numpy, torch
import matplotlib, pandas, scipy.optimize, scipy.stats, seaborn, torchvision, tqdm     # what it needs is not its doing

def state():
    return repr([torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
                 torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
                 torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.initial_seed(),
                 signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), socket.getdefaulttimeout(),
                 matplotlib.get_backend(), sorted(matplotlib.rcParams.items(), key=str), sys.stdout.errors])

before, variables = state(), dict(os.environ)
import lth_pruning
lth_pruning.build_network("mlp", 0.2), lth_pruning.build_network("lenet", 0.2)
lth_pruning.initial_weights(lth_pruning.generator("init"))
assert state() == before
print(json.dumps({name: text for name, text in os.environ.items() if variables.get(name) != text}))
"""


@pytest.fixture
def small(lth, monkeypatch):
    """The script with fewer images, before they are scaled, and without figures: what remains is what numbers need."""
    parts = [(images[:size], labels[:size]) for (images, labels), size in
             zip(lth.read_images(), (3_000, 500), strict=True)]
    lth.use(FIGURES=(), read_images=lambda: copy.deepcopy(parts), steps_per_epoch=lambda: 10)
    return lth


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for all tests here."""
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture
def undisturbed(small, shared):
    """The results of a run whose host has set nothing."""
    if not (shared / "metrics.csv").exists():
        run_here(small, shared, *RUN)
    return shared


def global_state() -> list:
    """Return what a host may have set, and its random generators."""
    return [torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
            torch.get_float32_matmul_precision(), sys.float_info.min / 2 == 0, torch.get_num_threads(),
            torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(), random.getstate(),
            np.random.get_state()[1].tolist(), os.getcwd(), signal.getsignal(signal.SIGTERM),
            socket.getdefaulttimeout(), matplotlib.get_backend(), torch.initial_seed()]


@pytest.fixture(params=["double", "medium", "no gradients", "inference", "autocast", "meta", "denormals",
                        "denormals flushed", "deterministic", "warnings are errors"])
def host(request, undisturbed):
    """A host that has set one of these; afterwards, this process is what it was."""
    kind = request.param
    dtype, precision, flushed = torch.get_default_dtype(), torch.get_float32_matmul_precision(), sys.float_info.min / 2
    with warnings.catch_warnings():
        if kind == "warnings are errors":
            warnings.simplefilter("error")
        inner = {"inference": torch.inference_mode, "no gradients": torch.no_grad,
                 "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "meta": lambda: torch.device("meta")}
        torch.set_default_dtype(torch.float64 if kind == "double" else dtype)
        torch.set_float32_matmul_precision(kind if kind == "medium" else precision)
        if kind.startswith("denormals"):
            torch.set_flush_denormal(kind == "denormals flushed")
        torch.use_deterministic_algorithms(kind == "deterministic")
        if kind in inner:
            with inner[kind]():
                yield kind
        else:
            yield kind
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(flushed == 0)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("host")
def test_numbers_do_not_depend_on_the_host_and_it_finds_what_it_has_set(small, undisturbed, tmp_path):
    """To the bit, with dense and with sparse levels. Also after a run that ends with an error."""
    before = global_state()
    seen = []
    with at_each_level(small, lambda level: seen.append(
            (level, torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
             torch.is_autocast_enabled("cpu"), torch.get_default_device().type, sys.float_info.min / 2))):
        run_here(small, tmp_path / "guest", *RUN)
    assert global_state() == before
    assert seen == [(level, torch.float32, "highest", True, False, "cpu", 0.0) for level in range(3)]
    check_same_results(tmp_path / "guest", undisturbed)
    small.use(train=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_here(small, tmp_path / "failing", *RUN)
    assert global_state() == before


def test_importing_the_script_has_no_side_effects(tmp_path):
    """No seeding, no folder, no print, no setting but two environment variables, and these only if they are not set."""
    shutil.copy(SCRIPT, tmp_path)
    variables = {"GOMP_SPINCOUNT": "1000", "THP_MEM_ALLOC_ENABLE": "1"}
    environment = {name: text for name, text in os.environ.items() if name not in variables}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    for already, changed in (({}, variables), ({"GOMP_SPINCOUNT": "7"}, {"THP_MEM_ALLOC_ENABLE": "1"})):
        process = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=environment | already,
                                 capture_output=True, text=True, timeout=120)
        assert (process.returncode, process.stderr) == (0, "")
        assert json.loads(process.stdout) == changed
    assert names(tmp_path) == {SCRIPT.name}


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize("rewind_step", [0, 3])
@pytest.mark.parametrize("density", [1, 0.1])
def test_devices_are_not_mixed(lth, monkeypatch, model, rewind_step, density):
    """On tensors without memory that say they are on a GPU: PyTorch raises if one on the CPU is among them.

    On a GPU nothing is sparse. What training returns is on the CPU.
    """
    draw = lth.generator
    lth.use(MODEL=model, REWIND_STEP=rewind_step, BATCH_SIZE=8, EVAL_EVERY=4, EPOCHS=1, steps_per_epoch=lambda: 6,
            SCHEDULE="linear", generator=lambda purpose, trial=0, level=0, _device="cpu": draw(purpose, trial, level),
            check_finite=lambda *_: None, SparseProduct=None)
    monkeypatch.setattr(torch.autograd, "grad", lambda _, weights: [torch.zeros_like(weight) for weight in weights])
    networks = [(arm, trial) for trial in (0, 1) for arm in ("rewind", "shuffle_mask")]
    weights = lth.stack([lth.initial_weights(seeded("start", n)) for n in range(4)])
    masks = {name: (torch.rand(tensor[:1].shape, generator=seeded(name)) < density).float().repeat(
        4, *[1] * (tensor.dim() - 1)) for name, tensor in weights.items() if name.endswith(".weight")}
    with FakeTensorMode(allow_non_fake_inputs=True):
        data = {part: (torch.zeros(size, 1, 28, 28, device="cuda"), torch.zeros(size, dtype=torch.long, device="cuda"))
                for part, size in (("train", 40), ("validation", 1_200), ("test", 30))}
        rewind_weights, trained, evaluations = lth.train(weights, masks, data, networks, 1, BAR)
    assert [step for step, *_ in evaluations] == [rewind_step, 4, 6]
    measured = [metric for _, *metrics in evaluations for metric in metrics]
    assert {tensor.device.type for tensor in (*rewind_weights.values(), *trained.values(), *measured)} == {"cpu"}
    assert {name: tensor.shape for name, tensor in trained.items()} == {
        name: tensor.shape for name, tensor in weights.items()}
