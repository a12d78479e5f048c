"""One run in several processes gives what it gives in one."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY, run_here

ARGUMENTS = (*TINY, "LEVELS=1")


def process_of_rank(rank: int, folder: Path) -> int:
    """The number of the process that torchrun started with this rank to write to the folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = ((process / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
        except OSError:                                                         # it has ended meanwhile
            continue
        if f"RANK={rank}".encode() in environment and f"RESULTS_DIR={folder}".encode() in command:
            return int(process.name)
    raise AssertionError("no such process")


def check_same_results(one: Path, other: Path) -> None:
    """The same metrics to the byte, and the same tickets."""
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    tickets, others = (torch.load(folder / "tickets.pt", weights_only=True) for folder in (one, other))
    for key in ("theta0", "pruned_at"):
        assert all(torch.equal(tickets[key][name], tensor) for name, tensor in others[key].items())


@pytest.fixture
def one_thread():
    """As torchrun gives to each of its processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_processes_share_the_trials_and_a_killed_one_goes_on(lth, tmp_path, one_thread):
    """Two, of a trial each. Once level 0 is done, the second is killed; torchrun stops and restarts both."""
    run_here(lth, tmp_path / "alone", *ARGUMENTS)
    folder = tmp_path / "shared"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
               str(SCRIPT), f"RESULTS_DIR={folder}", "DEVICE=cpu", *ARGUMENTS]
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output = torchrun.stdout.readline()
    assert output.startswith("2 processes share 2 trials; shown is the progress of the first one, with [0]")
    while not list(folder.glob("checkpoint-*-2-of-2.pt")):
        assert torchrun.poll() is None
    os.kill(process_of_rank(1, folder), signal.SIGKILL)
    output, errors = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, errors
    assert "lth_pruning: stopped. Finished levels are kept" in errors           # the first one, by SIGTERM
    assert re.search(r"resuming after level 0 of 1, kept in .*-2-of-2\.pt", output)
    assert output.count("results: ") == 1
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "alone").iterdir()}
    check_same_results(folder, tmp_path / "alone")


def test_more_processes_than_trials_are_said_not_crashed(lth, small, no_figures, tmp_path, monkeypatch, capsys):
    """Three processes for two trials, one after the other in this process; what they would send is passed by hand."""
    run_here(lth, tmp_path / "alone", *ARGUMENTS)
    sent = []

    def gather_object(state, states):
        sent.append(state)
        if states is not None:
            states[:] = sent[::-1]

    for name, stand_in in (("init_process_group", lambda *_, **__: None), ("barrier", lambda: None),
                           ("gather_object", gather_object)):
        monkeypatch.setattr(torch.distributed, name, stand_in)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for rank in (2, 1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        run_here(lth, tmp_path / "shared", *ARGUMENTS)
    # Of a trial dense, rewind and reinit, before the first step and after the last one.
    assert [len(state["records"]) for state in sent] == [0, 6, 6]
    assert "3 processes share 2 trials, so that some have none; shown is the progress" in capsys.readouterr().out
    check_same_results(tmp_path / "shared", tmp_path / "alone")
