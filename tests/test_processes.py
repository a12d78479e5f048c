"""One run in several processes gives what it gives in one, to the byte."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, check_same_results, command, draw_nothing, read_metrics, run_here

import lth_pruning

ARGUMENTS = (*QUICK, "TRIALS=2", "LEVELS=1")


def torchrun(option: str, folder: Path, *arguments: str, shell: str = "") -> subprocess.Popen:
    """Start the script in several processes, after a shell command."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *option.split(),
             *command(folder, *arguments)[1:]]
    return subprocess.Popen(["bash", "-c", f'{shell} exec "$@"', "bash", *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def process_of_rank(rank: int, folder: Path) -> int:
    """The number of the process that torchrun started with this rank to write to the folder."""
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
        patch.setattr(lth_pruning, "draw_figures", draw_nothing)
        run_here(lth_pruning, folder, *ARGUMENTS)
    return folder


def test_two_processes_share_the_trials_and_go_on_when_one_is_killed(alone, tmp_path):
    """A trial each. Once level 0 is saved, the second one is killed; torchrun stops and restarts both."""
    run = torchrun("--nproc-per-node=2 --max-restarts=1", tmp_path, *ARGUMENTS)
    assert run.stdout.readline() == "2 processes share 2 trials; shown is the progress of the first one, with 1\n"
    while not (tmp_path / "checkpoint.pt").exists():
        assert run.poll() is None
    os.kill(process_of_rank(1, tmp_path), signal.SIGKILL)
    output, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert "going on after level 0 of 1" in output and output.count("\nresults: ") == 1    # only the first one speaks
    check_same_results(tmp_path, alone)


def test_three_whose_first_one_fails_have_its_sentence_not_buried_and_one_goes_on(lth, alone, tmp_path, capsys):
    """Three for two trials. Files may have so many bytes that level 0 can be saved, but not level 1; then there is more
    room, and one process goes on from what three have found."""
    run = torchrun("--nproc-per-node=3", tmp_path, *ARGUMENTS, "LEVELS=2", shell="ulimit -f 5500;")
    output, errors = run.communicate(timeout=200)
    assert run.returncode != 0 and output.startswith("3 processes share 2 trials; shown is the progress of the first")
    (sentence,) = [line for line in errors.splitlines() if line.startswith("lth_pruning: ")]
    assert "File too large" in sentence and "Finished levels are kept" in sentence
    assert not any(word in errors for word in ("RuntimeError", "gloo", "onnection", 'lth_pruning.py", line'))
    assert set(read_metrics(tmp_path)["level"]) == {0}
    lth.use(draw_figures=draw_nothing)
    run_here(lth, tmp_path, *ARGUMENTS)
    assert "going on after level 0 of 1" in capsys.readouterr().out
    check_same_results(tmp_path, alone)
