"""The numbers of README.md and results/README.md are those of the committed records.

A line <!-- results/folder --> before a table names the run that its cells are recomputed from; with two folders, arms
of both are compared over the trials that they share. The numbers in sentences must be among those of the runs that such
lines of their section name. Other people's numbers stand in tables without. The script measures and decides here: what
it finds has oracles in test_results.py.
"""

import functools
import itertools
import re

import pandas as pd
import pytest
import torch
from conftest import QUICK, SCRIPT, read_metrics, run_here

import lth_pruning

PAGES = [SCRIPT.parent / "README.md", SCRIPT.parent / "results" / "README.md"]
SECTIONS = [(page, text) for page in PAGES for text in re.split(r"^(?=## )", page.read_text(), flags=re.M)]
TABLES = [(page, *found) for page in PAGES
          for found in re.findall(r"^<!-- (results.*) -->\n((?:\|.*\n)+)", page.read_text(), re.M)]
RECIPES = re.findall(r"^# .*: (.*)\npython .* RESULTS_DIR=results/(\w+)$", SECTIONS[2][1], re.M)


@functools.cache
def run(folders: str) -> lth_pruning.Results:
    """A run, or the trials that two runs share; in these, the networks of both are the same."""
    runs = [lth_pruning.measure(read_metrics(SCRIPT.parent / folder)) for folder in folders.split()]
    for other in runs[1:]:
        both = runs[0].index.intersection(other.index)
        assert len(both) and runs[0].loc[both].equals(other.loc[both]), folders
    trials = set.intersection(*(set(networks.index.unique("trial")) for networks in runs))
    networks = pd.concat(runs)
    networks = networks[~networks.index.duplicated() & networks.index.isin(trials, level="trial")]
    return lth_pruning.Results(None, networks.sort_index(), {}, "", None, None)


def lead(networks: pd.DataFrame, *compared: str | int) -> str:
    """One arm's lead over another at a level, in words."""
    return lth_pruning.points(lth_pruning.leads(networks, *compared))


def level_of(networks: pd.DataFrame, words: str) -> int:
    """The level with so many percent of the weights."""
    percent = float(re.search(r"[\d.]+", words)[0])
    (level,) = [level for level in lth_pruning.levels_of(networks)
                if round(lth_pruning.remaining(networks, level), 1) == percent]
    return level


def cell(networks: pd.DataFrame, head: str, level: int) -> str:
    """What a column's head asks for at a level."""
    words = head.removesuffix(", points").removesuffix(", %")
    if words.endswith(", step"):
        return lth_pruning.median_step(lth_pruning.values(networks, "stop_step", words.removesuffix(", step"), level))
    endings = {" untrained": "start_accuracy", " at the end": "final_accuracy", "": "stop_accuracy"}
    ending = next(ending for ending in endings if words.endswith(ending))
    arms = words.removesuffix(ending).split(" - ")
    if len(arms) > 1:
        return lead(networks, *arms, level, endings[ending]) if level > 0 else ""
    return lth_pruning.mean_accuracy(networks, endings[ending], *arms, level)


def answer(networks: pd.DataFrame, arm: str, level: int) -> str:
    """What a run says to an arm's question: the lead that it asks for, and the answer."""
    (question,) = lth_pruning.questions(["rewind", arm], lth_pruning.remaining(networks, level))
    return ", ".join(lth_pruning.compare(networks, question))


def table_rows(text: str) -> list[list[str]]:
    """The cells of a table, its head's first."""
    head, _, *rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]
    return [head, *rows]


def test_there_are_tables_and_recipes():
    assert {page for page, *_ in TABLES} == set(PAGES)
    folders = {path.parent.name for path in SCRIPT.parent.glob("results/*/metrics.csv")}
    assert {folder for _, folder in RECIPES} == folders


@pytest.mark.parametrize(("folder", "text"), [table[1:] for table in TABLES])
def test_tables_are_recomputed_from_their_records(folder, text):
    """Empty cells of the dense networks stay empty."""
    head, *rows = table_rows(text)
    networks = run(folder).networks
    found = []
    if head[0] == "claim":
        found = table_rows(lth_pruning.claims(run(folder)).split("\n\n")[0])[1:]
    elif head[0] == "question":
        levels = [level_of(networks, percent) for percent in head[2:]]
        for row in rows:
            found.append([*row[:2], *[answer(networks, row[1].strip("`"), level) for level in levels]])
    else:
        for row in rows:
            level = level_of(networks, row[0])
            found.append([row[0], *[cell(networks, what, level) if level > 0 or there else ""
                                    for what, there in zip(head[1:], row[1:], strict=True)]])
    assert rows and rows == found


@pytest.mark.parametrize(("page", "text"), SECTIONS, ids=[text[:30] for _, text in SECTIONS])
def test_the_numbers_of_sentences_are_the_records(page, text):
    """Means and intervals of points, and accuracies with two decimals and a percent sign."""
    folders = re.findall(r"^<!-- (results.*) -->$", text, re.M)
    sentences = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    sentences = re.sub(r" +", " ", sentences)
    leads, accuracies = set(), set()
    for networks in [run(folder).networks for folder in folders]:
        means = networks.groupby(["arm", "level"])[["stop_accuracy", "start_accuracy", "final_accuracy"]].mean()
        accuracies |= {f"{mean / 1e4:.2f}" for mean in means.to_numpy().flatten()}
        for level in lth_pruning.levels_of(networks):
            there = [arm for arm in lth_pruning.ARM_TABLE if (arm, level) in means.index]
            leads |= {lead(networks, *pair, level) for pair in itertools.permutations(["dense", *there], 2)}
    leads |= {words.lstrip("+-") for words in leads}              # "0.34 ± 0.12 points behind"
    assert set(re.findall(r"[+-]?\d+\.\d\d ± \d+\.\d\d", sentences)) <= leads, page
    assert set(re.findall(r"\b(\d\d\.\d\d) %", sentences)) <= accuracies, page


@pytest.mark.parametrize(("said", "folder"), RECIPES)
def test_what_came_out_of_each_recipe(said, folder):
    """Whether another task's tickets carry over, or down to where tickets match, and what is ahead at 21.1 %."""
    results = run(f"results/{folder}")
    networks = results.networks                                 # level 7: 21.1 %, and of LeNet-5 22.4 %
    if len(networks.index.unique("trial")) < 3:
        outcome = "two trials decide nothing"
    elif "transfer" in lth_pruning.arms_of(networks):
        assert answer(networks, "transfer", 7).endswith(", no")
        outcome = "little carries over"
    else:
        down_to, _ = lth_pruning.matches_in_words(results, "rewind")
        outcome = f"tickets match {down_to.removesuffix(' of the weights')}"
        for arm in lth_pruning.arms_of(networks):
            if lth_pruning.decide(lth_pruning.leads(networks, arm, "rewind", 7)) == "yes":
                outcome += f"; at 21.1 % only {arm} is ahead of them"
    assert said == outcome


def test_the_readmes_ticket_can_be_loaded_after_cloning(lth, mnist):
    """It keeps as many weights as said, and untrained it already classifies as the records have it."""
    (call,) = re.findall(r"^ticket = lth_pruning\.(.*?) +#.*?(\d+\.\d) %", PAGES[0].read_text(), re.M)
    ticket = eval(f"lth.{call[0]}", {"lth": lth}).eval()
    masks = torch.cat([layer.weight_mask.flatten() for layer in lth.weighted_layers(ticket).values()])
    assert f"{100 * masks.mean():.1f}" == call[1]
    images, labels = mnist["test"]
    with torch.no_grad():
        accuracy = 100 * (ticket(images).argmax(1) == labels).double().mean().item()
    records = read_metrics(PAGES[1].parent).query("arm == 'rewind' and trial == 0 and level == 12 and step == 0")
    assert accuracy == pytest.approx(records["test_accuracy"].item(), abs=0.02)


def test_the_readmes_own_arm_runs(lth, few, tmp_path, monkeypatch):
    """Its networks start with half the ticket's weights, and so before the first step come to the ticket's answers, but
    for the biases, which are zero; and it has its place in the figures."""
    (code,) = re.findall(r"^```python\n(def halved.*?)^```", PAGES[0].read_text(), re.M | re.S)
    monkeypatch.setattr(lth, "ARM_TABLE", dict(lth.ARM_TABLE))
    exec(code, dict(vars(lth)))
    run_here(lth, tmp_path, *QUICK, "LEVELS=1", "ARMS=rewind,halved")
    start = read_metrics(tmp_path).query("level == 1 and step == 0").set_index("arm")
    assert start.loc["halved", "test_accuracy"] == start.loc["rewind", "test_accuracy"]
    assert start.loc["halved", "val_loss"] != start.loc["rewind", "val_loss"]
    assert (tmp_path / "comparison_plot.png").exists()


def test_the_scripts_own_list_of_packages_is_that_of_requirements_txt():
    (listed,) = re.findall(r"^# dependencies = \[(.*?)\]$", SCRIPT.read_text(), re.M | re.S)
    assert re.findall(r'"([^"]+)"', listed) == (SCRIPT.parent / "requirements.txt").read_text().split()
