"""One run in several processes gives what it gives in one, byte for byte."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK, check_same_results, command, read_metrics, run_here

ARGUMENTS = (*QUICK, "TRIALS=2")


def torchrun(option: str, folder: Path, *arguments: str, shell: str = "") -> subprocess.CompletedProcess:
    """Run the script in several processes, after a shell command."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *option.split(),
             *command(folder, *arguments)[1:]]
    return subprocess.run(["bash", "-c", f'{shell} exec "$@"', "bash", *words], text=True, capture_output=True,
                          timeout=300)


def test_several_processes_share_the_trials_and_resume_each_others_run(lth, tmp_path):
    """First three for two trials, of which one dies at level 1: files may have only so many bytes. torchrun stops and
    restarts all, to the same end; the sentence of the first one is not buried. Then two, and one alone."""
    failed = torchrun("--nproc-per-node=3 --max-restarts=1", tmp_path / "shared", *ARGUMENTS, shell="ulimit -f 5500;")
    assert failed.returncode != 0 and failed.stdout.startswith("3 processes share 2 trials; the progress shown is that")
    assert "resuming after level 0 of 2" in failed.stdout
    sentences = [line for line in failed.stderr.splitlines() if line.startswith("lth_pruning: ")]
    assert len(sentences) == 2 and all("File too large. The finished levels are kept" in line for line in sentences)
    assert not any(word in failed.stderr for word in ("RuntimeError", "gloo", "onnection", 'lth_pruning.py", line'))
    assert set(read_metrics(tmp_path / "shared")["level"]) == {0}

    resumed = torchrun("--nproc-per-node=2", tmp_path / "shared", *ARGUMENTS)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after level 0 of 2" in resumed.stdout and resumed.stdout.count("\nresults: ") == 1
    lth.use(FIGURES=())
    run_here(lth, tmp_path / "alone", *ARGUMENTS)
    check_same_results(tmp_path / "shared", tmp_path / "alone")
    with pytest.raises(lth.UserError, match="the processes of this run are at different levels"):
        lth.merge(lth.State(), [lth.State(1), lth.State(2)])
