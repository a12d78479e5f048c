"""One run in several processes gives what it gives in one, byte for byte."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, check_same_results, command, read_metrics, run_here

import lth_pruning

ARGUMENTS = (*QUICK, "TRIALS=2", "LEVELS=1")


def torchrun(option: str, folder: Path, *arguments: str, shell: str = "") -> subprocess.Popen:
    """Start the script in several processes, after a shell command."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *option.split(),
             *command(folder, *arguments)[1:]]
    return subprocess.Popen(["bash", "-c", f'{shell} exec "$@"', "bash", *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def process_of_rank(rank: int, folder: Path) -> int:
    """Return the number of the process that torchrun started with this rank to write to the folder."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):                  # it has ended meanwhile, or is another user's
            environment = (process / "environ").read_bytes().split(b"\0")
            words = (process / "cmdline").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in environment and f"RESULTS_DIR={folder}".encode() in words:
                return int(process.name)
    raise AssertionError("no such process")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth_pruning, "FIGURES", ())
        run_here(lth_pruning, folder, *ARGUMENTS)
    return folder


def test_two_processes_share_the_trials_and_resume_when_one_is_killed(alone, tmp_path):
    """A trial each. Once level 0 is saved, the second one is killed; torchrun stops and restarts both."""
    run = torchrun("--nproc-per-node=2 --max-restarts=1", tmp_path, *ARGUMENTS)
    assert run.stdout.readline().startswith("2 processes share 2 trials; the progress shown is that of the first one")
    while not (tmp_path / "checkpoint.pt").exists():
        assert run.poll() is None
    os.kill(process_of_rank(1, tmp_path), signal.SIGKILL)
    output, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert "resuming after level 0 of 1" in output and output.count("\nresults: ") == 1    # only the first one speaks
    check_same_results(tmp_path, alone)


def test_the_first_processs_sentence_is_not_buried_and_one_process_resumes_the_run_of_three(
        lth, alone, tmp_path, capsys):
    """Three for two trials. Files may have so many bytes that level 0 can be saved, but not level 1."""
    run = torchrun("--nproc-per-node=3", tmp_path, *ARGUMENTS, "LEVELS=2", shell="ulimit -f 5500;")
    output, errors = run.communicate(timeout=200)
    assert run.returncode != 0 and output.startswith("3 processes share 2 trials; ")
    (sentence,) = [line for line in errors.splitlines() if line.startswith("lth_pruning: ")]
    assert "File too large" in sentence and "The finished levels are kept" in sentence
    assert not any(word in errors for word in ("RuntimeError", "gloo", "onnection", 'lth_pruning.py", line'))
    assert set(read_metrics(tmp_path)["level"]) == {0}
    lth.use(FIGURES=())
    run_here(lth, tmp_path, *ARGUMENTS)
    assert "resuming after level 0 of 1" in capsys.readouterr().out
    check_same_results(tmp_path, alone)


def test_ranks_left_over_in_the_environment_are_ignored_and_a_gpu_is_chosen_by_the_local_rank(lth, monkeypatch):
    """Only what torchrun itself started counts as several processes."""
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert lth.rank_and_world_size() == (0, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    asked = []
    lth.use(DEVICE="cuda")
    monkeypatch.setattr(lth.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(lth.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(lth.torch, "zeros", lambda *_, device: asked.append(device) or lth.torch.ones(1))
    lth.choose_device()
    assert asked == ["cuda:1"]
