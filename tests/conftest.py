"""What several tests need: the script as a module with constants of the test's own, and the script as a process."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import lth_pruning

SCRIPT = Path(lth_pruning.__file__)

# A shell's background jobs ignore Ctrl-C, and hand that on: the scripts that the tests start are to hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEFAULTS = lth_pruning.constants()
FIGURES = {"accuracy_plot_iterative.png", "accuracy_plot_reinit.png", "comparison_plot.png",
           "early_stopping_plot.png", "learning_curves.png", "mask_plot.png", "supermask_plot.png"}

# A real experiment on all of MNIST in some twenty seconds: 6.5 % of the weights are left after three levels.
REDUCED = ("TRIALS=2", "LEVELS=3", "PRUNE_RATE=0.6", "EPOCHS=1", "EVAL_EVERY=100")
# Only the machinery matters: 55 steps per network.
TINY = ("TRIALS=2", "LEVELS=2", "PRUNE_RATE=0.6", "EPOCHS=1", "BATCH_SIZE=1000", "EVAL_EVERY=55")


def command(folder: Path, *arguments: str) -> list[str]:
    """The command line of a run that writes to a folder, on the CPU: only there are results the same to the bit."""
    return [sys.executable, str(SCRIPT), f"RESULTS_DIR={folder}", "DEVICE=cpu", *arguments]


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the script as a user does, to its end."""
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, timeout=240)


def run_here(lth, folder: Path, *arguments: str) -> None:
    """Run the script's main in this process: it saves the seconds that a new one takes for its imports.

    Afterwards the constants are again what they were before.
    """
    lth.main([f"RESULTS_DIR={folder}", "DEVICE=cpu", *arguments])


def expected_figures(folder: Path) -> set[str]:
    """The figures that a run gives, by the arms in its metrics.csv.

    The figure of moments is among them where, at some level, more than half of an arm's networks have their lowest
    validation loss neither in the last 5 % of the steps nor at the last two evaluations, or come to the validation
    accuracy that their trial's dense network ends at.
    """
    records = pd.read_csv(folder / "metrics.csv").dropna(subset="train_loss")           # after some training
    arms = {*records["arm"]} - {"dense"}
    figures = {"learning_curves.png"}
    if arms:
        figures |= {"accuracy_plot_iterative.png", "comparison_plot.png", "mask_plot.png", "supermask_plot.png"}
    figures |= {figure for arm, figure in (("reinit", "accuracy_plot_reinit.png"), ("transfer", "transfer_plot.png"))
                if arm in arms}
    steps = sorted({*records["step"]})
    too_late = {*steps[-2:], *(step for step in steps if step >= 0.95 * steps[-1])}
    for (arm, _), networks in records.groupby(["arm", "level"]):
        stopped, caught_up = [], []
        for trial, rows in networks.groupby("trial"):
            dense = records[(records["arm"] == "dense") & (records["trial"] == trial)].sort_values("step").iloc[-1]
            stopped.append(rows.loc[rows["val_loss"].idxmin(), "step"] not in too_late)
            caught_up.append((rows["val_accuracy"] >= dense["val_accuracy"]).any())
        if arm != "dense" and max(sum(stopped), sum(caught_up)) > len(stopped) / 2:
            figures.add("early_stopping_plot.png")
    return figures


def flip(content: bytes, place: int) -> bytes:
    """The content with one bit of one byte turned over."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


def read_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.csv, numbers as numbers; before the first step there is no training loss: None."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value if name in ("dataset", "model", "arm") else float(value) if value else None
                 for name, value in row.items()} for row in csv.DictReader(file)]


def accuracies(rows: list[dict], arm: str, level: int) -> list[float]:
    """Test accuracies after the last step, by trial."""
    last = max(row["step"] for row in rows)
    rows = [row for row in rows if (row["arm"], row["level"], row["step"]) == (arm, level, last)]
    return [row["test_accuracy"] for row in sorted(rows, key=lambda row: row["trial"])]


def at_early_stop(rows: list[dict], arm: str, level: int) -> list[float]:
    """Test accuracies at the evaluation with the lowest validation loss, the first of equal ones, by trial.

    The evaluation before the first step is none of them.
    """
    by_trial = {}
    for row in sorted(rows, key=lambda row: (row["trial"], row["step"])):
        if (row["arm"], row["level"]) == (arm, level) and row["train_loss"] is not None:
            by_trial.setdefault(row["trial"], []).append(row)
    return [min(found, key=lambda row: row["val_loss"])["test_accuracy"] for found in by_trial.values()]


@pytest.fixture
def lth(monkeypatch):
    """The script as a module, and `use` to give constants (or functions) other values for this test alone; all are
    restored after it."""
    lth_pruning.use = lambda **values: [monkeypatch.setattr(lth_pruning, name, value) for name, value in values.items()]
    lth_pruning.use(**DEFAULTS | {"DEVICE": "cpu"})
    return lth_pruning


@pytest.fixture(scope="session")
def mnist():
    """All of MNIST as the experiment sees it."""
    return lth_pruning.load_dataset(torch.device("cpu"))


@pytest.fixture
def small(lth, mnist, monkeypatch):
    """For runs in this process of which only the machinery matters: 11,000 training images, 1,000 each to evaluate."""
    lth.use(VALIDATION_SIZE=49_000)
    sizes = {"train": 11_000, "validation": 1_000, "test": 1_000}
    parts = {name: (mnist[name][0][:size], mnist[name][1][:size]) for name, size in sizes.items()}
    monkeypatch.setattr(lth, "load_dataset", lambda _: parts)
    return parts


@pytest.fixture
def no_figures(lth, monkeypatch):
    """For runs of which only the numbers matter: drawing takes longer than their training."""
    monkeypatch.setattr(lth, "draw_figures", lambda *_: {})


@pytest.fixture
def some_mnist(mnist):
    """2,000 training images, 500 each to validate and to test, in double precision: rounding stays out of the way."""
    sizes = {"train": 2_000, "validation": 500, "test": 500}
    return {name: (mnist[name][0][:size].double(), mnist[name][1][:size]) for name, size in sizes.items()}


@pytest.fixture(scope="session")
def reduced_run(tmp_path_factory):
    """One run of the reduced experiment for all tests that look at its output: (folder, finished process)."""
    folder = tmp_path_factory.mktemp("reduced")
    return folder, run_script(folder, *REDUCED)
