"""The numbers of README.md and results/README.md are those of the committed records, and the README's commands work.

A line <!-- results/folder --> before a table names the run that its cells are recomputed from, by pandas and scipy from
networks.csv; with two folders, arms of both are compared over the trials that they share. The numbers in sentences must
be among those of the runs that such lines of their section name. Other people's numbers are in tables without.
"""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import conftest
import pandas as pd
import pytest
import torch
from conftest import QUICK, SCRIPT, read_metrics, run_here
from scipy import stats

import lth_pruning

ROOT = SCRIPT.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]
README = PAGES[0].read_text()
SECTIONS = [(page, text) for page in PAGES for text in re.split(r"^(?=## )", page.read_text(), flags=re.M)]
TABLES = [(page, *table) for page in PAGES
          for table in re.findall(r"^<!-- (results/.*) -->\n((?:\|.*\n)+)", page.read_text(), re.M)]
RECIPES = re.findall(r"^# .*?: (.*)\npython lth_pruning.py (.*) RESULTS_DIR=results/runs/(\w+)$", README, re.M)
COLUMNS = {" untrained": "untrained_test_accuracy", " after the last step": "final_test_accuracy", "": "test_accuracy"}


def read_networks(folders: str) -> pd.DataFrame:
    """Read networks.csv of one folder, or of several ones with the trials that all have."""
    tables = [pd.read_csv(ROOT / folder / "networks.csv") for folder in folders.split()]
    trials = set.intersection(*(set(table["trial"]) for table in tables))
    networks = pd.concat(tables).drop_duplicates(["arm", "trial", "level"])
    return networks[networks["trial"].isin(trials)].set_index(["arm", "level", "trial"]).sort_index()


def of_arm(networks: pd.DataFrame, arm: str, level: int, column: str) -> pd.Series:
    """Return a column of one arm at a level, by trial; dense networks are those of level 0."""
    if arm == "dense" or level == 0:
        arm, level = "dense", 0
    return networks.loc[(arm, level), column]


def difference(networks: pd.DataFrame, x: str, y: str, level: int, column: str = "test_accuracy") -> str:
    """Return the mean of x - y with the half-width of its 95 % confidence interval."""
    values = (of_arm(networks, x, level, column) - of_arm(networks, y, level, column)).round(4)
    half_width = stats.t.ppf(0.975, len(values) - 1) * values.std() / math.sqrt(len(values))
    return f"{round(values.mean(), 2) + 0.0:+.2f} ± {half_width:.2f}"


def cell(networks: pd.DataFrame, head: str, level: int) -> str:
    """Return what a column's head asks for at a level."""
    if head.endswith(", step"):
        steps = of_arm(networks, head.removesuffix(", step"), level, "stop_step").astype(float).fillna(math.inf)
        return f"{steps.median():,.0f}".replace("inf", "not reached")
    words = head.removesuffix(", %")
    ending = next(ending for ending in COLUMNS if words.endswith(ending))
    arms = words.removesuffix(ending).split(" - ")
    if len(arms) == 2:
        return difference(networks, *arms, level, COLUMNS[ending])
    return f"{of_arm(networks, words.removesuffix(ending), level, COLUMNS[ending]).mean().round(6):.2f}"


def level_of(networks: pd.DataFrame, words: str) -> int:
    """Return the level with so many percent of the weights."""
    densities = networks.loc[["dense", "rewind"]].groupby("level")["weights_remaining"].first().round(1)
    (level,) = densities.index[densities == float(re.search(r"[\d.]+", words)[0])]
    return level


def claim_cell(folder: str, text: str) -> str:
    """Return how the table of claims shows what a run says: marked by the answer."""
    run = lth_pruning.read_run(ROOT / "results" / folder)
    (claim,) = [claim for claim in lth_pruning.PAPER_CLAIMS if claim.text == text]
    if lth_pruning.why_untested(run, claim):
        return ""
    number, answer = lth_pruning.judge(run, claim)
    number = re.sub(r"sooner in (\d+ of \d+).*", r"\1", number)
    marks = {"supported": "**", "contradicted": "~~", "behind, size open": "*"}.get(answer, "")
    return f"{marks}{number}{marks}"


def runs_cell(folder: str, head: str, there: str) -> str:
    """Return what the table of runs says of one, by its run.json; "" for arguments that are not the run's."""
    constants = json.loads((ROOT / "results" / folder / "run.json").read_text())["constants"]
    if head == "arguments":
        return there if is_command_of(there.strip("`"), folder) else ""
    steps = constants["EPOCHS"] * (55_000 // constants["BATCH_SIZE"])
    return {"steps": f"{steps:,}", "n": str(constants["TRIALS"])}[head]


def is_command_of(arguments: str, folder: str) -> bool:
    """Return whether arguments give the constants of a run, but for paths."""
    constants = json.loads((ROOT / "results" / folder / "run.json").read_text())["constants"]
    given = lth_pruning.read_arguments(arguments.split())
    expected = json.loads(json.dumps(conftest.DEFAULTS | given))
    return all(constants[name] == value for name, value in expected.items()
               if name not in ("RESULTS_DIR", "TICKETS_FROM", "DEVICE", "STACK_SIZE"))


def recompute(folder: str, text: str) -> list[list[str]]:
    """Return the rows that a table should have. Empty cells stay empty."""
    head, rows = table_rows(text)
    if head[0] == "question":                               # rows of the summary, see test_results.py
        summary = (ROOT / folder / "summary.md").read_text()
        return [row for row in rows if f"| {' | '.join(row)} |" in summary]
    found = []
    for row in rows:
        name = row[0].strip("`")
        if head[0] == "claim":
            cells = [row[1], row[2], *[claim_cell(run, name) for run in head[3:-1]], row[-1]]
        elif head[0] == "run" and "steps" in head:
            cells = [runs_cell(name, what, there) for what, there in zip(head[1:], row[1:], strict=True)]
        else:
            percent, first, networks = row[0], 1, None
            if head[0] == "run":
                percent, first, folder = row[1], 2, f"results/{name}"
            networks = read_networks(folder)
            level = level_of(networks, percent)
            cells = row[1:first] + [cell(networks, what, level) if there else ""
                                    for what, there in zip(head[first:], row[first:], strict=True)]
        found.append([row[0], *cells])
    return found


def table_rows(text: str) -> tuple[list[str], list[list[str]]]:
    """Return the cells of a Markdown table's head and of its rows."""
    head, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    return head, rows


def test_both_pages_have_tables_and_every_committed_run_is_in_the_table_of_runs():
    assert {page for page, *_ in TABLES} == set(PAGES)
    (runs,) = [table_rows(text)[1] for *_, text in TABLES if text.startswith("| run | arguments")]
    assert {row[0].strip("`") for row in runs} == {path.parent.name for path in ROOT.glob("results/*/run.json")}


@pytest.mark.parametrize(("folder", "text"), [table[1:] for table in TABLES])
def test_tables_are_recomputed_from_their_records(folder, text):
    _, rows = table_rows(text)
    assert rows and rows == recompute(folder, text)


@pytest.mark.parametrize(("page", "text"), SECTIONS, ids=[text[:30] for _, text in SECTIONS])
def test_the_numbers_of_sentences_are_the_records(page, text):
    """Differences with their intervals, and accuracies with two decimals and a percent sign."""
    sentences = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    sentences = re.sub(r" +", " ", sentences)
    differences = set()
    accuracies = set()
    for folder in re.findall(r"^<!-- (results/.*) -->$", text, re.M):
        networks = read_networks(folder)
        means = networks.groupby(["arm", "level"])[[*COLUMNS.values()]].mean()
        accuracies |= {f"{mean:.2f}" for mean in means.round(6).to_numpy().flatten()}
        for level in range(1, networks.index.get_level_values("level").max() + 1):
            there = ["dense", *means.xs(level, level="level").index]
            for (x, y), column in itertools.product(itertools.permutations(there, 2), COLUMNS.values()):
                differences.add(difference(networks, x, y, level, column))
    differences |= {words.lstrip("+-") for words in differences}
    assert set(re.findall(r"[+-]?\d+\.\d\d ± \d+\.\d\d", sentences)) <= differences, page
    assert set(re.findall(r"\b(\d\d\.\d\d) %", sentences)) <= accuracies, page


@pytest.mark.parametrize(("said", "arguments", "name"), RECIPES)
def test_recipes_are_the_commands_of_the_runs_and_say_what_came_out(lth, said, arguments, name):
    run = lth.read_run(ROOT / "results" / name)
    assert is_command_of(arguments, name)
    if "transfer" in run.arms:
        level, = lth.levels_near(run, 21.1)
        assert lth.compare(run, "transfer", "rewind").loc[level, "word"] == "behind"
        assert said == "little transfers"
    else:
        matches = lth.compare(run, "rewind", "dense")["matches"]
        sparsest = matches.index[matches == "supported"].max()
        assert said == f"tickets match with as little as {run.percent[sparsest]}"


def test_the_readmes_ticket_can_be_loaded_after_cloning(lth, mnist):
    """It keeps as many weights as said, and untrained it already classifies as the records have it."""
    (call,) = re.findall(r"^ticket = lth_pruning\.(.*?) +#.*?(\d+\.\d) %", README, re.M)
    ticket = eval(f"lth.{call[0]}", {"lth": lth}).eval()
    masks = torch.cat([layer.weight_mask.flatten() for layer in lth.weighted_layers(ticket).values()])
    assert f"{100 * masks.mean():.1f}" == call[1]
    images, labels = mnist["test"]
    with torch.no_grad():
        accuracy = 100 * (ticket(images).argmax(1) == labels).double().mean().item()
    untrained = of_arm(read_networks("results/default"), "rewind", 12, "untrained_test_accuracy")
    assert accuracy == pytest.approx(untrained[0], abs=0.02)


def test_the_readmes_own_arm_runs(lth, few, tmp_path, monkeypatch):
    """Its networks start with half the ticket's weights, and so before the first step come to the ticket's answers, but
    for the biases, which are zero; and it has its place in the figures."""
    (code,) = re.findall(r"^```python\n(def halved.*?)^```", README, re.M | re.S)
    monkeypatch.setattr(lth, "ARM_TABLE", dict(lth.ARM_TABLE))
    exec(code, dict(vars(lth)))
    run_here(lth, tmp_path, *QUICK, "LEVELS=1", "ARMS=rewind,halved")
    start = read_metrics(tmp_path).query("level == 1 and step == 0").set_index("arm")
    assert start.loc["halved", "test_accuracy"] == start.loc["rewind", "test_accuracy"]
    assert start.loc["halved", "val_loss"] != start.loc["rewind", "val_loss"]
    assert (tmp_path / "comparison_plot.png").exists()


def test_a_users_own_run_leaves_the_repository_clean_and_its_tests_green(tmp_path):
    """As a user does it: clone, run with default paths, draw networks.csv by seaborn, redraw, test the README."""
    folder = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", "previous", "__pycache__", ".*_cache", "raw", "checkpoint.pt")
    shutil.copytree(ROOT, folder, ignore=ignored)
    raw = folder / "data" / "MNIST" / "raw"
    raw.mkdir()
    for path in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(path, raw)
    for path in (folder / "results").iterdir():             # what a user's earlier run left here
        if path.is_file() and path.name != "README.md":
            path.unlink()

    def call(*words: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        result = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=200, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    call("git", "init", "-q")
    call("git", "add", "-A")
    call("git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "cloned")
    for more in ((), ("SEED=1",)):                          # the second one moves the first one to previous/
        call(sys.executable, "lth_pruning.py", *QUICK, *more)
    (code,) = re.findall(r"^```python\n(import pandas.*?)^```", README, re.M | re.S)
    code = code.replace("results/default/", "results/") + "assert len(axes.lines) > 1\n"
    call(sys.executable, "-c", "import matplotlib\nmatplotlib.use('agg')\n" + code)
    call(sys.executable, "-c", "import lth_pruning; lth_pruning.redraw('results')")
    assert {"networks.csv", "comparison_plot.png", "previous"} <= {path.name for path in (folder / "results").iterdir()}
    assert call("git", "status", "--porcelain") == ""
    call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_readme.py", "-k",
         "tables or recipes or loaded")


def test_the_scripts_own_list_of_packages_is_that_of_requirements_txt():
    (listed,) = re.findall(r"^# dependencies = \[(.*?)\]$", SCRIPT.read_text(), re.M | re.S)
    assert re.findall(r'"([^"]+)"', listed) == (ROOT / "requirements.txt").read_text().split()
