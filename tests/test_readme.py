"""The numbers of README.md and results/README.md are those of the committed records, and the README's commands work.

A line <!-- results/folder --> before a table names the run that its cells are recomputed from, by pandas and scipy from
networks.csv; with two folders, arms of both are compared over the trials that they share. The numbers in sentences must
be among those of the runs that such lines of their section name. Other people's numbers are in tables without.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import combinations, product

import pandas as pd
import pytest
import torch
from conftest import COLUMNS, KEYS, QUICK, SCRIPT, cell, differences, in_words, names, of_arm, run_here, table_rows

import lth_pruning

ROOT = SCRIPT.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md"]
README = PAGES[0].read_text()
SECTIONS = [text for page in PAGES for text in re.split(r"^(?=## )", page.read_text(), flags=re.M)]
TABLES = [table for page in PAGES
          for table in re.findall(r"^<!-- (results/.*) -->\n((?:\|.*\n)+)", page.read_text(), re.M)]
RECIPES = re.findall(r"^# .*?: (.*)\npython lth_pruning.py (.*) RESULTS_DIR=results/runs/(\w+)$", README, re.M)


def read_networks(folders: str) -> pd.DataFrame:
    """Read networks.csv of one folder, or of several with the trials that all have; for "a - b" their differences."""
    if " - " in folders:
        first, second = [read_networks(folder)[[*COLUMNS.values()]] for folder in folders.split(" - ")]
        return (first - second).dropna(how="all")
    tables = [pd.read_csv(ROOT / folder / "networks.csv") for folder in folders.split()]
    trials = set.intersection(*(set(table["trial"]) for table in tables))
    networks = pd.concat(tables).drop_duplicates(KEYS)
    return networks[networks["trial"].isin(trials)].set_index(KEYS).sort_index()


def level_of(networks: pd.DataFrame, words: str) -> int:
    """Return the level with so many percent of the weights."""
    densities = networks.loc[["dense", "rewind"]].groupby("level")["weights_remaining"].first().round(1)
    (level,) = densities.index[densities == float(re.search(r"[\d.]+", words)[0])]
    return level


def claim_cell(name: str, claim: str) -> str:
    """Return how the table of claims shows what a run's summary says: marked by the answer. Empty if untested."""
    summary = (ROOT / "results" / name / "summary.md").read_text()
    for number, answer in re.findall(rf"^\| {claim} \|.*\| (.*) \| (.*) \|$", summary, re.M):
        number = re.sub(r"sooner in (\d+ of \d+).*", r"\1", number)
        marks = {"supported": "**", "contradicted": "~~", "behind, size open": "*"}.get(answer, "")
        return f"{marks}{number}{marks}"
    return ""


def constants_of(name: str) -> dict:
    """Return the constants of a committed run."""
    return json.loads((ROOT / "results" / name / "run.json").read_text())["constants"]


def is_command_of(arguments: str, name: str) -> bool:
    """Return whether arguments give the constants of a run, but for paths."""
    given = lth_pruning.read_arguments(arguments.split())
    expected = json.loads(json.dumps(lth_pruning.constants() | given))
    return all(constants_of(name)[constant] == value for constant, value in expected.items()
               if constant not in ("RESULTS_DIR", "TICKETS_FROM", "DEVICE", "STACK_SIZE"))


def expected_row(folder: str, head: list[str], row: list[str]) -> list[str]:
    """Return what a row of a table should be. Empty cells stay empty."""
    name = row[0].strip("`")
    if head[0] == "question":                               # a row of the summary, see test_results.py
        return row if f"| {' | '.join(row)} |" in (ROOT / folder / "summary.md").read_text() else []
    if head[0] == "claim":
        return [*row[:3], *[claim_cell(run.strip("`"), name) for run in head[3:-1]], row[-1]]
    if "arguments" in head:
        constants = constants_of(name)
        steps = constants["EPOCHS"] * (55_000 // constants["BATCH_SIZE"])
        arguments = row[1] if is_command_of(row[1].strip("`"), name) else "of another run"
        return [row[0], arguments, f"{steps:,}", str(constants["TRIALS"])]
    first = head.index("weights remaining")
    networks = read_networks(f"results/{name}" if head[0] == "run" else folder)
    level = level_of(networks, row[first])
    cells = list(zip(head, row, strict=True))[first + 1:]
    return [*row[:first + 1], *[there and cell(networks, what, level) for what, there in cells]]


def test_every_committed_run_is_in_the_table_of_runs_and_by_one_version_of_the_code():
    (rows,) = [table_rows(text)[1:] for _, text in TABLES if text.startswith("| run | arguments")]
    runs = {path.parent.name: json.loads(path.read_text()) for path in ROOT.glob("results/*/run.json")}
    assert {row[0].strip("`") for row in rows} == set(runs)
    assert len({run["code_version"] for run in runs.values()}) == 1


@pytest.mark.parametrize(("folder", "text"), TABLES)
def test_tables_are_recomputed_from_their_records(folder, text):
    head, *rows = table_rows(text)
    assert rows
    for row in rows:
        assert row == expected_row(folder, head, row)


@pytest.mark.parametrize("text", SECTIONS, ids=[text[:30] for text in SECTIONS])
def test_the_numbers_of_sentences_are_the_records(text):
    """Differences with their intervals, and accuracies with two decimals and a percent sign."""
    sentences = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    sentences = re.sub(r" +", " ", sentences)
    found = set()
    accuracies = set()
    for folder in re.findall(r"^<!-- (results/.*) -->$", text, re.M):
        networks = read_networks(folder)
        means = networks.groupby(["arm", "level"])[[*COLUMNS.values()]].mean()
        accuracies |= {f"{mean:.2f}" for mean in means.round(6).to_numpy().flatten()}
        for _, values in networks.groupby(["arm", "level"])["test_accuracy"]:
            found.add(in_words(values.round(4))[1:])
        for level, column in product(range(1, networks.index.get_level_values("level").max() + 1), COLUMNS.values()):
            for x, y in combinations(["dense", *means.xs(level, level="level").index], 2):
                values = differences(networks, x, y, level, column)
                found |= {in_words(values), in_words(-values), in_words(values)[1:]}
    assert set(re.findall(r"[+-]?\d+\.\d\d ± \d+\.\d\d", sentences)) <= found
    assert set(re.findall(r"\b(\d\d\.\d\d) %", sentences)) <= accuracies


@pytest.mark.parametrize(("said", "arguments", "name"), RECIPES)
def test_recipes_are_the_commands_of_the_runs_and_say_what_came_out(lth, said, arguments, name):
    run = lth.read_run(ROOT / "results" / name)
    matches = lth.compare(run, "rewind", "dense")["matches"]
    sparsest = matches.index[matches == "supported"].max()
    assert said == f"tickets match with as little as {run.percent[sparsest]}"
    assert is_command_of(arguments, name)


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
    start = pd.read_csv(tmp_path / "metrics.csv").query("level == 1 and step == 0").set_index("arm")
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
    assert {"networks.csv", "comparison_plot.png", "previous"} <= names(folder / "results")
    assert call("git", "status", "--porcelain") == ""
    call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_readme.py", "-k",
         "tables or recipes or loaded")


def test_the_scripts_own_list_of_packages_is_that_of_requirements_txt():
    (listed,) = re.findall(r"^# dependencies = \[(.*?)\]$", SCRIPT.read_text(), re.M | re.S)
    assert re.findall(r'"([^"]+)"', listed) == (ROOT / "requirements.txt").read_text().split()
