"""The numbers of README.md and results/README.md are those of the committed records.

A line <!-- results/folder --> before a table names the run that its cells are recomputed from; with two folders, arms
of both are compared over the trials that they share. The numbers in sentences must be among those of the runs that such
lines of their section name. Other people's numbers stand in tables without.
"""

import functools
import itertools
import re

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SCRIPT, TINY
from scipy import stats

PAGES = [SCRIPT.parent / "README.md", SCRIPT.parent / "results" / "README.md"]
SECTIONS = [(page, text) for page in PAGES for text in re.split(r"^(?=## )", page.read_text(), flags=re.M)]
TABLES = [(page, *found) for page in PAGES
          for found in re.findall(r"^<!-- (results.*) -->\n((?:\|.*\n)+)", page.read_text(), re.M)]
RECIPES = re.findall(r"^# .*: (.*)\npython .* RESULTS_DIR=results/(\w+)$", SECTIONS[2][1], re.M)


@functools.cache
def run(folders: str) -> pd.DataFrame:
    """A row per network of a run, or of the trials that two runs share; in these, the networks of both are the same."""
    runs = [networks_of(folder).set_index("trial", append=True) for folder in folders.split()]
    for other in runs[1:]:
        both = runs[0].index.intersection(other.index)
        assert len(both) and runs[0].loc[both].equals(other.loc[both]), folders
    trials = set.intersection(*({*networks.index.unique("trial")} for networks in runs))
    networks = pd.concat(runs)
    networks = networks[~networks.index.duplicated() & networks.index.isin(trials, level="trial")]
    return networks.sort_index().reset_index("trial")


def networks_of(folder: str) -> pd.DataFrame:
    """A row per network of a run: test accuracy at early stop, at the end and before the first step, and early stop.

    Early stop is the evaluation with the lowest validation loss after the first step; within the last 5 % of the steps,
    or at the last two evaluations, its step was not reached. Accuracies are whole ten-thousandths of a percent, so that
    a mean is rounded here as it is there.
    """
    records = pd.read_csv(SCRIPT.parent / folder / "metrics.csv")
    records["test_accuracy"] = (1e4 * records["test_accuracy"]).round()
    last, before = sorted(records["step"].unique())[-1:-3:-1]
    rows = []
    for (arm, level, trial), found in records.groupby(["arm", "level", "trial"]):
        after = found[found["train_loss"].notna()]
        stop = after.loc[after["val_loss"].idxmin()]
        start = found.loc[found["train_loss"].isna(), "test_accuracy"]
        rows.append({"arm": arm, "level": level, "trial": trial, "left": f"{stop['weights_remaining']:.1f} %",
                     "stop": stop["test_accuracy"], "final": after["test_accuracy"].iloc[-1], "start": start.iloc[0],
                     "step": stop["step"] if stop["step"] < min(0.95 * last, before) else np.inf})
    return pd.DataFrame(rows).set_index(["arm", "level"])


def values(networks: pd.DataFrame, arm: str, level: int, column: str = "stop") -> np.ndarray:
    """By trial; level 0, and the dense networks at any level, are the dense networks."""
    return networks.loc[(arm, level) if level and arm != "dense" else ("dense", 0), column].to_numpy()


def interval(networks: pd.DataFrame, one: str, other: str, level: int) -> tuple[float, float]:
    """One arm's lead over another, paired by trial, in points: mean and half the 95 % interval by Student's t."""
    differences = (values(networks, one, level) - values(networks, other, level)) / 1e4
    return differences.mean(), stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)


def lead(networks: pd.DataFrame, one: str, other: str, level: int) -> str:
    """As the pages write it."""
    mean, half = interval(networks, one, other, level)
    return f"{mean:+.2f} ± {half:.2f}"


def cell(networks: pd.DataFrame, what: str, level: int) -> str:
    """What a column's head asks for at a level."""
    if match := re.fullmatch(r"(\w+) - (\w+)(?:, points)?", what):
        return lead(networks, *match.groups(), level) if level else ""
    if match := re.fullmatch(r"(\w+) untrained, %", what):
        return f"{values(networks, match[1], level, 'start').mean() / 1e4:.2f}"
    if match := re.fullmatch(r"(\w+), step", what):
        return f"{np.median(values(networks, match[1], level, 'step')):.0f}".replace("inf", "not reached")
    return f"{values(networks, what.removesuffix(', %'), level).mean() / 1e4:.2f}"


def answer(networks: pd.DataFrame, arm: str, level: int) -> str:
    """What the ticket's lead says of an arm's question: its whole interval, or of arms that may be enough that of the
    other sign, above or below 0, or for those and finetune -0.2."""
    sign, margin = {"signs": (-1, 0.2), "transfer": (-1, 0.2), "finetune": (1, 0.2)}.get(arm, (1, 0))
    mean, half = interval(networks, "rewind", arm, level)
    if sign * mean - half > -margin:
        return "yes"
    return "no" if sign * mean + half < -margin else "undecided"


def level_of(networks: pd.DataFrame, percent: str) -> int:
    """The level with so many percent of the weights, of the tickets."""
    (level,) = {0} if percent == "100 %" else {*networks.loc["rewind"].query("left == @percent").index}
    return level


def recompute(lth, folder: str, head: list[str], rows: list[list[str]]) -> list[list[str]]:
    """The rows of a table from a run's records; empty cells of the dense networks stay empty."""
    networks = run(folder)
    if head[0] == "claim":                                  # as the script decides them, which has tests of its own
        lines = (SCRIPT.parent / folder / "summary.md").read_text().splitlines()
        begin = lines.index(f"| {' | '.join(head)} |") + 2
        return [[part.strip() for part in line.strip("|").split("|")] for line in
                itertools.takewhile(lambda line: line.startswith("|"), lines[begin:])]
    found = []
    for row in rows:
        if head[0] == "question":
            arm = row[1].strip("`")
            levels = [level_of(networks, percent.removeprefix("at ")) for percent in head[2:]]
            cells = [f"{lead(networks, 'rewind', arm, level)}, {answer(networks, arm, level)}" for level in levels]
            for place, level in enumerate(levels):
                own, tickets = (float(networks.loc[(name, level), "left"].iloc[0][:-2]) for name in (arm, "rewind"))
                if own > 1.1 * tickets:
                    cells[place] = "not compared"
            found.append([*row[:2], *cells])
        else:
            level = level_of(networks, row[0].removesuffix(" (dense)"))
            found.append([row[0], *(cell(networks, what, level) if level or there else "" for what, there in
                                    zip(head[1:], row[1:], strict=True))])
    return found


def test_there_are_tables_and_recipes():
    assert {page for page, *_ in TABLES} == set(PAGES)
    folders = {path.parent.name for path in SCRIPT.parent.glob("results/*/metrics.csv")}
    assert {folder for _, folder in RECIPES} == folders


@pytest.mark.parametrize(("folder", "text"), [table[1:] for table in TABLES])
def test_tables_are_recomputed_from_their_records(lth, folder, text):
    head, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows and rows == recompute(lth, folder, head, rows)


@pytest.mark.parametrize(("page", "text"), SECTIONS, ids=[text[:30] for _, text in SECTIONS])
def test_the_numbers_of_sentences_are_the_records(page, text):
    """Means and intervals of points, and accuracies with two decimals and a percent sign."""
    folders = re.findall(r"^<!-- (results.*) -->$", text, re.M)
    sentences = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    sentences = re.sub(r" +", " ", sentences)
    leads, accuracies = set(), set()
    for networks in map(run, folders):
        arms = networks.index.unique("arm")
        for level in networks.index.unique("level"):
            there = [arm for arm in arms if arm == "dense" or (arm, level) in networks.index]
            leads |= {lead(networks, *pair, level) for pair in itertools.permutations(there, 2)}
            accuracies |= {f"{values(networks, arm, level, column).mean() / 1e4:.2f}" for arm in there
                           for column in ("stop", "start", "final")}
    leads |= {words.lstrip("+-") for words in leads}              # "0.34 ± 0.12 points behind"
    assert set(re.findall(r"[+-]?\d+\.\d\d ± \d+\.\d\d", sentences)) <= leads, page
    assert set(re.findall(r"\b(\d\d\.\d\d) %", sentences)) <= accuracies, page


def outcome(folder: str) -> str:
    """Whether another task's tickets carry over, or down to where tickets match, and what is ahead at 21.1 %."""
    networks = run(f"results/{folder}")                         # level 7: 21.1 %, and of LeNet-5 22.4 %
    if networks["trial"].nunique() < 3:
        return "two trials decide nothing"
    if "transfer" in networks.index.unique("arm"):
        return {"no": "they do not carry over"}[answer(networks, "transfer", 7)]
    matching = [level for level in {*networks.loc["rewind"].index}
                if np.subtract(*interval(networks, "rewind", "dense", level)) > -0.2]
    ahead = [arm for arm in networks.index.unique("arm") if arm not in ("dense", "rewind")
             and np.subtract(*interval(networks, arm, "rewind", 7)) > 0]
    return (f"tickets match down to {networks.loc[('rewind', max(matching)), 'left'].iloc[0]}"
            + "".join(f"; at 21.1 % only {arm} is ahead of them" for arm in ahead))


@pytest.mark.parametrize(("said", "folder"), RECIPES)
def test_what_came_out_of_each_recipe(said, folder):
    assert said == outcome(folder)


def test_the_readmes_ticket_can_be_loaded_after_cloning(lth, mnist):
    """It keeps as many weights as said, and untrained it already classifies as the records have it."""
    (call,) = re.findall(r"^ticket = lth_pruning\.(.*?) +#.*?(\d+\.\d) %", PAGES[0].read_text(), re.M)
    ticket = eval(f"lth.{call[0]}", {"lth": lth}).eval()
    masks = [layer.weight_mask for layer in lth.weighted_layers(ticket).values()]
    kept, total = (sum(int(count) for count in counts) for counts in (map(torch.sum, masks), map(torch.numel, masks)))
    assert f"{100 * kept / total:.1f}" == call[1]
    images, labels = mnist["test"]
    with torch.no_grad():
        accuracy = 100 * (ticket(images).argmax(1) == labels).double().mean().item()
    records = pd.read_csv(PAGES[1].parent / "metrics.csv").query("arm == 'rewind' and trial == 0 and step == 0")
    assert accuracy == pytest.approx(records.loc[records["level"] == 12, "test_accuracy"].item(), abs=0.02)


def test_the_readmes_own_arm_runs(lth, few, tmp_path, monkeypatch):
    """Its networks start with half the ticket's weights, and so before the first step come to the ticket's answers, but
    for the biases, which are zero; and it has its place in the figures."""
    (code,) = re.findall(r"^```python\n(def halved.*?)^```", PAGES[0].read_text(), re.M | re.S)
    monkeypatch.setattr(lth, "ARM_TABLE", dict(lth.ARM_TABLE))
    exec(code, dict(vars(lth)))
    lth.main([f"RESULTS_DIR={tmp_path}", "DEVICE=cpu", *TINY, "TRIALS=1", "LEVELS=1", "VALIDATION_SIZE=49000",
              "ARMS=rewind,halved"])
    start = pd.read_csv(tmp_path / "metrics.csv").query("level == 1 and step == 0").set_index("arm")
    assert start.loc["halved", "test_accuracy"] == start.loc["rewind", "test_accuracy"]
    assert start.loc["halved", "val_loss"] != start.loc["rewind", "val_loss"]
    assert (tmp_path / "comparison_plot.png").exists()


def test_the_scripts_own_list_of_packages_is_that_of_requirements_txt():
    (listed,) = re.findall(r"^# dependencies = \[(.*?)\]$", SCRIPT.read_text(), re.M | re.S)
    assert re.findall(r'"([^"]+)"', listed) == (SCRIPT.parent / "requirements.txt").read_text().split()
