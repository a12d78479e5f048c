"""A guest in its host process: numbers do not depend on what that has set, nor is it changed. And devices, unmixed."""

import contextlib
import inspect
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from conftest import BAR, QUICK, SCRIPT, at_each_level, check_same_results, names, run_here, seeded
from torch._subclasses.fake_tensor import FakeTensorMode

RUN = (*QUICK, "BATCH_SIZE=100", "VALIDATION_SIZE=1000")
HOSTS = {"double": lambda: torch.set_default_dtype(torch.float64), "no gradients": torch.no_grad,
         "medium": lambda: torch.set_float32_matmul_precision("medium"), "inference": torch.inference_mode,
         "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "meta": lambda: torch.device("meta"),
         "denormals": lambda: torch.set_flush_denormal(False), "flushed": lambda: torch.set_flush_denormal(True),
         "deterministic": lambda: torch.use_deterministic_algorithms(True)}


def state() -> list[str]:
    """Describe what numbers may depend on in this process, and what else a host may find changed."""
    return [repr([torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
                  torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads(),
                  torch.get_float32_matmul_precision(), sys.float_info.min / 2]),
            repr([torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled(),
                  torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate(), os.getcwd(),
                  np.random.get_state()[1].tolist(), signal.getsignal(signal.SIGINT), socket.getdefaulttimeout(),
                  matplotlib.get_backend(), sorted(matplotlib.rcParams.items(), key=str), sys.stdout.errors])]


@pytest.fixture
def small(lth):
    """The script with fewer images, before they are scaled, and without figures."""
    parts = [(images[:2_000], labels[:2_000]) for images, labels in lth.read_images()]
    lth.use(FIGURES=(), steps_per_epoch=lambda: 10,
            read_images=lambda: [(images.clone(), labels.clone()) for images, labels in parts])
    return lth


@pytest.mark.parametrize("host", HOSTS)
def test_numbers_do_not_depend_on_the_host_and_it_finds_what_it_has_set(small, tmp_path, host):
    """To the bit, with dense and with sparse levels; the host's settings are back after an error, too."""
    run_here(small, tmp_path / "undisturbed", *RUN)
    with small.fixed_numerics(torch.device("cpu")):
        expected = state()[0]
    seen = []
    try:
        entered = HOSTS[host]()
        with entered if hasattr(entered, "__enter__") else contextlib.nullcontext():
            before = state()
            with at_each_level(small, lambda _: seen.append(state()[0])):
                run_here(small, tmp_path / "guest", *RUN)
            assert state() == before
            small.use(train=lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run_here(small, tmp_path / "failing", *RUN)
            assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)
    assert seen == 3 * [expected]
    check_same_results(tmp_path / "guest", tmp_path / "undisturbed")


def test_importing_the_script_has_no_side_effects(tmp_path):
    """No seeding, no folder, no print, no setting but environment variables, and these only if they are not set."""
    shutil.copy(SCRIPT, tmp_path)
    code = f"""
import json, os, random, signal, socket, sys
import matplotlib, numpy as np, pandas, scipy.optimize, scipy.stats, seaborn, torch, torchvision, tqdm
{inspect.getsource(state)}
before, variables = state(), dict(os.environ)
import lth_pruning as lth
lth.initial_weights(lth.generator("init")), lth.build_network("lenet", 0.2)
assert state() == before
print(json.dumps(dict(os.environ.items() ^ variables.items())))"""
    environment = os.environ | {"GOMP_SPINCOUNT": "7", "MPLBACKEND": "agg"}
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    process = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, env=environment, capture_output=True,
                             text=True, timeout=120)
    assert (process.returncode, process.stderr) == (0, "")
    assert json.loads(process.stdout) == {"THP_MEM_ALLOC_ENABLE": "1"}
    assert names(tmp_path) == {SCRIPT.name}


@pytest.mark.parametrize("model", ["mlp", "lenet"])
@pytest.mark.parametrize(("rewind_step", "density"), [(0, 1), (3, 0.1)])
def test_devices_are_not_mixed(lth, monkeypatch, model, rewind_step, density):
    """On tensors that pretend to be on a GPU, PyTorch raises if one is on the CPU. Nothing is sparse there."""
    draw = lth.generator
    lth.use(MODEL=model, REWIND_STEP=rewind_step, BATCH_SIZE=8, EVAL_EVERY=4, EPOCHS=1, steps_per_epoch=lambda: 6,
            generator=lambda purpose, trial=0, level=0, _device="cpu": draw(purpose, trial, level),
            check_finite=lambda *_: None, SparseProduct=None)
    monkeypatch.setattr(torch.autograd, "grad", lambda _, weights: [torch.zeros_like(weight) for weight in weights])
    networks = [(arm, trial) for trial in (0, 1) for arm in ("rewind", "shuffle_mask")]
    weights = lth.stack([lth.initial_weights(seeded("start", n)) for n in range(4)])
    masks = lth.full_masks(weights)
    for mask in masks.values():
        mask[:] = torch.rand(mask[0].shape, generator=seeded("mask")) < density
    with FakeTensorMode(allow_non_fake_inputs=True):
        data = {part: (torch.zeros(size, 1, 28, 28, device="cuda"), torch.zeros(size, dtype=torch.long, device="cuda"))
                for part, size in (("train", 40), ("validation", 1_200), ("test", 30))}
        rewind_weights, trained, evaluations = lth.train(weights, masks, data, networks, 1, BAR)
    assert [step for step, *_ in evaluations] == [rewind_step, 4, 6]
    measured = [metric for _, *metrics in evaluations for metric in metrics]
    assert {tensor.device.type for tensor in (*rewind_weights.values(), *trained.values(), *measured)} == {"cpu"}
    assert all(trained[name].shape == weight.shape for name, weight in weights.items())


def test_processes_take_the_gpus_of_a_machine_in_turn(lth, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    lth.use(DEVICE="cuda")
    with FakeTensorMode():
        assert lth.choose_device() == torch.device("cuda:1")
