"""What several tests need: the script as a module or as a process, and an oracle of what tables of networks say."""

import contextlib
import importlib.util
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from tqdm import tqdm

import lth_pruning

SCRIPT = Path(lth_pruning.__file__)
DEFAULTS = lth_pruning.constants()
BAR = tqdm(disable=True)
KEYS = ["arm", "level", "trial"]
RESULTS = {"checkpoint.pt", "metrics.csv", "networks.csv", "mask.csv", "run.json", "summary.md", "tickets.pt"}
COLUMNS = {" untrained": "untrained_test_accuracy", " after the last step": "final_test_accuracy", "": "test_accuracy"}

# A shell's background jobs ignore Ctrl-C, and their children inherit that: the scripts that tests start shall hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Two steps per network, for tests of the machinery: with the fixture `few`, a run takes a second.
QUICK = ("TRIALS=1", "LEVELS=2", "PRUNE_RATE=0.6", "EPOCHS=1", "BATCH_SIZE=500", "VALIDATION_SIZE=59000")


def pytest_configure(config) -> None:
    """Unpack MNIST before there are several processes, of which one could read what another has half unpacked."""
    if not hasattr(config, "workerinput"):                  # pytest-xdist's
        lth_pruning.read_images()


def command(folder: Path, *arguments: str) -> list[str]:
    """Return the command line of a run that writes to a folder, on the CPU: only there are results bit-identical."""
    return [sys.executable, str(SCRIPT), f"RESULTS_DIR={folder}", "DEVICE=cpu", *arguments]


def run_script(folder: Path, *arguments: str, **given) -> subprocess.CompletedProcess:
    """Run the real script in a process of its own, as a user does; `given` goes to subprocess.run."""
    return subprocess.run(command(folder, *arguments), capture_output=True, text=True, timeout=300, **given)


def run_here(lth, folder: Path, *arguments: str) -> None:
    """Run the script's main in this process, which saves the seconds that a new one takes for its imports."""
    lth.main([f"RESULTS_DIR={folder}", "DEVICE=cpu", *arguments])


def read_metrics(folder: Path) -> pd.DataFrame:
    """Read metrics.csv; before the first step there is no training loss: nan."""
    return pd.read_csv(folder / "metrics.csv")


def flipped(content: bytes) -> bytes:
    """Return the same bytes but for one bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@pytest.fixture
def lth(monkeypatch):
    """The script as a module, with its defaults, and `use` to replace constants or functions for this test alone."""
    lth_pruning.use = lambda **values: [monkeypatch.setattr(lth_pruning, name, value) for name, value in values.items()]
    lth_pruning.use(**DEFAULTS | {"DEVICE": "cpu"})
    return lth_pruning


@pytest.fixture(scope="session")
def mnist():
    """All of MNIST as the experiment sees it."""
    return lth_pruning.load_dataset(torch.device("cpu"))


@pytest.fixture
def few(lth, mnist):
    """Fewer images, for runs in this process of which only the machinery matters."""
    parts = {name: (images[:size], labels[:size]) for (name, (images, labels)), size in
             zip(mnist.items(), (11_000, 1_000, 1_000), strict=True)}
    lth.use(load_dataset=lambda _: parts)
    return parts


@pytest.fixture
def undrawn(few, lth):
    """Like `few`, and without figures, which take longer than such a training."""
    lth.use(FIGURES=())
    return few


def seeded(purpose: str, trial: int = 0, level: int = 0, seed: int = DEFAULTS["SEED"]) -> torch.Generator:
    """Seed the random numbers of a purpose: the script's recipe, written a second time."""
    words = np.random.SeedSequence([seed, trial, level, *purpose.encode()]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


def load_copy(folder: Path, data: dict, *edits: tuple[str, str]):
    """Load an edited copy of the script as a module of its own; it draws nothing."""
    text = SCRIPT.read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = Path(tempfile.mkdtemp(dir=folder)) / "edited.py"
    path.write_text(text)
    specification = importlib.util.spec_from_file_location(path.parent.name, path)
    module = sys.modules[path.parent.name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.load_dataset = lambda _: data
    module.FIGURES = ()
    return module


def names(folder: Path) -> set[str]:
    """Return the names of all that is in a folder."""
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files in a folder by name, without those of its sub-folders."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def check_same_results(one: Path, other: Path) -> None:
    """Assert the same metrics, byte for byte, and the same tickets."""
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    tickets, others = (torch.load(folder / "tickets.pt", weights_only=True) for folder in (one, other))
    for kind in ("theta0", "pruned_at"):
        assert tickets[kind].keys() == others[kind].keys()
        assert all(torch.equal(tensor, others[kind][name]) for name, tensor in tickets[kind].items())


@contextlib.contextmanager
def at_each_level(lth, happens):
    """Call `happens` with the level before each training of a stack."""
    train = lth.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "train", lambda *given: happens(given[4]) or train(*given))
        yield


def ends_at(lth, level: int, error: BaseException):
    """Let the training of a level end with an error before it begins."""
    def end(begun: int) -> None:
        if begun == level:
            raise error

    return at_each_level(lth, end)


# The oracle: tables of networks are indexed by KEYS, and the dense networks are those of level 0.

def of_arm(networks: pd.DataFrame, arm: str, level: int, column: str = "test_accuracy") -> pd.Series:
    """Return a column of one arm at a level, by trial; every arm begins with the dense networks."""
    if arm == "dense" or level == 0:
        arm, level = "dense", 0
    return networks.loc[(arm, level), column]


def differences(networks: pd.DataFrame, x: str, y: str, level: int, column: str = "test_accuracy") -> pd.Series:
    """Return x - y by trial, in points."""
    return (of_arm(networks, x, level, column) - of_arm(networks, y, level, column)).round(4)


def bounds(values: pd.Series) -> tuple[float, float]:
    """Return scipy's 95 % confidence interval; differences that are all equal have none."""
    if values.nunique() == 1:
        return math.nan, math.nan
    return stats.t.interval(0.95, len(values) - 1, values.mean(), values.sem())


def in_words(values: pd.Series) -> str:
    """Return the mean of differences with the half-width of its interval."""
    low, high = bounds(values)
    return f"{round(values.mean(), 2) + 0.0:+.2f} ± {(high - low) / 2:.2f}".removesuffix(" ± nan")


def word(values: pd.Series) -> str:
    """Return what the interval of differences decides."""
    low, high = bounds(values)
    if low > 0:
        return "ahead"
    if low > -0.2:
        return "as good"
    return "behind" if high < 0 else "inconclusive"


def cell(networks: pd.DataFrame, head: str, level: int) -> str:
    """Return what a column's head asks for at a level."""
    if head.endswith(", step"):
        steps = of_arm(networks, head.removesuffix(", step"), level, "stop_step").astype(float).fillna(math.inf)
        return f"{steps.median():,.0f}".replace("inf", "not reached")
    words = head.removesuffix(", %")
    ending = next(ending for ending in COLUMNS if words.endswith(ending))
    arms = words.removesuffix(ending).split(" - ")
    if len(arms) == 2:
        return in_words(differences(networks, *arms, level, COLUMNS[ending]))
    return f"{of_arm(networks, *arms, level, COLUMNS[ending]).mean().round(6):.2f}"


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of a Markdown table, its head first."""
    head, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    return [head, *rows]
