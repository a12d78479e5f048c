"""Measures, answers, tables and figures, on records made up so that the right answer is known beforehand."""

import ast
import math
import re
from functools import cache
from itertools import combinations, product

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEFAULTS, contents
from scipy import stats

import lth_pruning

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
LEFT = tuple(round(100 * 0.8**level, 2) for level in range(17))
STEPS = (0, 25, 50, 100, *range(200, 1201, 200), 1290)      # early stops at 1,200 and 1,290 are too late
TABLE = lth_pruning.ARM_TABLE
ALL = tuple(TABLE)
OWN = TABLE["signs"]._replace(label="one's own", colour="#123456", marker="d", controls="both")
UNSURE = [-1, 1, -1, 1, 0]                                  # a lead by trial that decides nothing


def make(arms=ALL[:2], trials=5, left=LEFT, lead=None, stop=None, steps=STEPS, provenance="Python", **constants):
    """A run. Early stops are at `stop[arm]` (levels,) or so, and leads there `lead[arm]` (levels, trials)."""
    constants = DEFAULTS | {"ARMS": arms, "TRIALS": trials, "LEVELS": len(left) - 1} | constants
    random = np.random.default_rng(0)
    rows = []
    for (level, arm), trial in product([(0, "dense"), *product(range(1, len(left)), arms)], range(trials)):
        begin = constants["REWIND_STEP"] if level and TABLE[arm].late else 0
        best = np.broadcast_to((stop or {}).get(arm, 800 if arm in ("dense", "reinit") else 600), len(left))[level - 1]
        best += 200 * (trial == 0 and best < 1000)
        ahead = (lead or {}).get(arm, level and 0.35 - list(TABLE).index(arm) * level / 20)
        top = 97 + trial / 10 + np.broadcast_to(ahead, (len(left), trials))[level - 1, trial] + random.normal(0, 0.02)
        same = (constants["DATASET"], constants["MODEL"], arm, trial, level, left[level])
        rows.append((*same, begin, math.nan, 0.0, 99.9, 10.0 + 2 * level * (arm == "rewind") + begin / 10))
        for step in [step for step in steps if step > begin]:
            found = top + 60 * (math.exp(-best / 60) - math.exp(-step / 60)) + (step - best) / 5000
            loss = 0.1 if best <= step <= best + 200 else 0.2           # the first of the lowest counts
            rows.append((*same, step, 0.1, loss, round(found, 1), round(found, 2)))
    records = pd.DataFrame(rows, columns=["dataset", "model", "arm", "trial", "level", "weights_remaining", "step",
                                          "train_loss", "val_loss", "val_accuracy", "test_accuracy"])
    layer = (torch.arange(784) * torch.arange(1, 31).view(-1, 1) % 17).byte().expand(trials, 30, 784)
    return lth_pruning.Results(records, lth_pruning.measure(records), constants, provenance,
                               layer if constants["MODEL"] == "mlp" else None, torch.rand(28, 28))


def table_rows(text):
    return [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ") and line[2] != "-"]


def early_stops(run):
    return run.records.dropna().sort_values("val_loss", kind="stable").groupby(["arm", "level", "trial"]).first()


def lead_in_words(ahead, behind):
    lead = ahead - behind
    return f"{lead.mean():+.2f} ± {stats.ttest_1samp(lead, 0).confidence_interval().high - lead.mean():.2f}"


@pytest.mark.parametrize("steps", [STEPS, range(0, 2001, 20), range(0, 1201, 400)])
def test_measures_are_those_of_a_plain_loop_over_the_rows(lth, steps):
    """In the last 5 %, and at the last two evaluations, nothing stops early; catching up there is as good."""
    stop = {"dense": 400, "rewind": 800, "reinit": 1200, "signs": 1290, "shuffle": 1900, "oneshot": 1880}
    records = make(tuple(stop)[1:], 5, LEFT[:4], {"reinit": UNSURE}, stop, steps, REWIND_STEP=100).records
    rows = {key: list(group.itertuples()) for key, group in records.groupby(["arm", "level", "trial"])}
    found = lth.measure(records)
    assert len(found) == len(rows) == 5 + 5 * 3 * 5
    for network, (start, *later) in rows.items():
        best = min(later, key=lambda row: row.val_loss)
        too_late = best.step >= 0.95 * steps[-1] or best.step in steps[-2:]
        good = [row.step for row in later if row.val_accuracy >= rows["dense", 0, network[2]][-1].val_accuracy]
        accuracies = [round(1e4 * row.test_accuracy) for row in (start, later[-1], best)]
        assert found.loc[network].tolist() == [
            start.weights_remaining, *accuracies, math.inf if too_late else best.step, min(good, default=math.inf)]


@pytest.mark.parametrize(("middle", "margin", "answer"), [
    (0.2, 0, "yes"), (-0.2, 0, "no"), (0, 0, "undecided"), (-0.1, 0.2, "yes"), (-0.3, 0.2, "no"),
    (-0.2, 0.2, "undecided")])
def test_the_whole_interval_decides(lth, middle, margin, answer):
    """So 0.20 +- 0.03 behind is undecided about "within 0.2"; few trials, or such without spread, decide nothing."""
    for trials in (3, 5, 10):
        differences = middle + 0.024 * stats.zscore(np.random.default_rng(trials).normal(size=trials))
        mean, half = lth.interval(differences)
        assert (mean - half, mean + half) == pytest.approx(stats.ttest_1samp(differences, 0).confidence_interval())
        assert lth.decide(differences, margin) == answer
    for few in (differences[:1], differences[:2], np.full(5, 0.5), np.full(5, -0.5)):
        assert lth.decide(few, margin) == "undecided"


@pytest.mark.parametrize("trials", range(3, 11))
def test_steps_are_decided_by_a_sign_test(lth, trials):
    """Ties, and pairs that neither reached, count for neither side and stay in n: 5 of 6 is not 5 of 5."""
    for sooner, other in product(range(trials // 2 + 1, trials + 1), ((500, 500), (math.inf, math.inf), (900, 500))):
        decided = (sooner, trials) in ((5, 5), (6, 6), (7, 7), (7, 8), (8, 8), (8, 9), (9, 9), (9, 10), (10, 10))
        first, second = np.array(([(500, 900), (500, math.inf)] * 5)[:sooner] + [other] * (trials - sooner), float).T
        answers = (lth.decide_steps(first, second), lth.decide_steps(second, first))
        assert answers == (("yes", "no") if decided else ("undecided", "undecided"))


@pytest.mark.parametrize(("levels", "expected"), [
    ("mubmu", "down to 41.0 % of the weights"), ("bbbbb", "at no level, and are below them from 80.0 % on"),
    ("mbmbb", "down to 51.2 % of the weights, and are below them from 41.0 % on"), ("uuuuu", "at no level")])
def test_matching_is_told_by_the_sparsest_level_and_below_from_where_all_are(lth, levels, expected):
    lead = [{"m": [-0.1] * 5, "b": [-0.5] * 5, "u": UNSURE}[level] for level in (*levels, "u")]
    run = make(ALL[:1], left=LEFT[:6], lead={"rewind": lead})
    assert f"- Networks rewound to original weights match the dense ones {expected}.\n" in lth.summary(run)


@pytest.mark.parametrize(("sign", "stop", "answer"), [(1, (200, 1000), "borne out"), (-1, (1000, 200), "contradicted")])
def test_claims_can_be_borne_out_and_contradicted_each_at_its_density(lth, sign, stop, answer):
    """The last step moves just one; those without arm, level (within a factor of 1.25) or early stops are named."""
    lead = {"rewind": sign, "reinit": -sign, "oneshot": -sign, "shuffle": -sign}
    run = make(tuple(lead), lead=lead, stop=dict(zip(("rewind", "reinit", "dense"), (*stop, 600), strict=True)))
    rows = table_rows(lth.claims(run))[1:]
    assert [row[1] for row in rows] == [f"{LEFT[level]:.1f} %" for level in (9, 15, 9, 7, 7, 12, 7, 7, 7, 7)]
    assert {row[-1] for row in rows} == {answer} and "Not tested" not in lth.claims(run)
    run.records.loc[run.records["step"].eq(1290) & run.records["arm"].eq("rewind"), "test_accuracy"] -= 9 * sign
    changed = table_rows(lth.claims(run._replace(networks=lth.measure(run.records))))[1:]
    assert [row[-1] == new[-1] for row, new in zip(rows, changed, strict=True)] == [n != 2 for n in range(10)]
    text = lth.claims(make(ALL[:1], left=(100, 26.3, 4.6), stop={"dense": 1290, "rewind": 1200}))
    for words in ("Tickets match dense networks (no level near 3.6 %)", "shuffled connections (no shuffle networks)",
                  "Tickets stop before dense networks (not reached by most networks)"):
        assert words in text and table_rows(text) == []
    assert {row[1] for row in table_rows(lth.claims(make(left=(100, 26.3, 4.4))))[1:]} == {"26.3 %", "4.4 %"}


def test_questions_are_answered_by_kind(lth):
    """Difference: is the ticket ahead? Enough: is the arm as accurate? No loss: is the ticket? Small must be small."""
    ours = {"rewind reinit": "yes", "rewind permute": "no", "signs rewind": "yes", "rewind finetune": "no",
            "rewind small": "yes", "transfer rewind": "no", "transfer reinit": "no"}
    run = make(("rewind", "reinit", "permute", "signs", "finetune", "small", "transfer"), lead={
        "rewind": -0.3, "small": -1, "reinit": -0.4, "permute": -0.2, "signs": -0.4, "finetune": 0.1, "transfer": -0.7})
    for level, factor in ((7, 1.09), (12, 1.11)):
        run.records.loc[run.records["arm"].eq("small") & run.records["level"].eq(level), "weights_remaining"] *= factor
    run = run._replace(networks=lth.measure(run.records))
    accuracy = early_stops(run)["test_accuracy"]
    for row, (pair, answer) in zip(table_rows(lth.answers(run))[1:], ours.items(), strict=True):
        ahead, behind = pair.split()
        lead = lead_in_words(accuracy[ahead, 7], accuracy[behind, 7])
        assert row[1:4] == [*[f"{TABLE[arm].label} (`{arm}`)" for arm in (ahead, behind)], f"{lead}: {answer}"]
        assert (row[4] == "has more weights") == (behind == "small")
    assert np.isnan(lth.leads(run.networks, "small", "rewind", 12)).all()
    assert {row[0]: row[-1] for row in table_rows(lth.claims(run))}["Tickets match dense networks"] == "contradicted"
    assert "above -0.2)" in " ".join(lth.summary(run).split())


def test_summary_says_what_the_records_say(lth):
    """Numbers by pandas; constants that can be read back; the provenance word for word; 70 lines at most to be read."""
    run = make(provenance="Made | by `hand`:\nC:\\ 100 % {x}", TICKETS_FROM="it's \"mine\"\n```")
    text, constants, provenance = re.fullmatch(r"(.*)```\n(.*)\n```\n\n(.*)\n", lth.summary(run), re.DOTALL).groups()
    pairs = [line.split(" = ", 1) for line in constants.split("\n")]
    assert {name: ast.literal_eval(value) for name, value in pairs} == run.constants and provenance == run.provenance
    stop, accuracy = early_stops(run)["step"], early_stops(run)["test_accuracy"]
    head, *rows = table_rows(text.split("## Level by level")[1])
    for level, row in zip(range(1, 17), rows, strict=True):
        cells = {"weights remaining": f"{LEFT[level]:.1f} %", "rewind, masked only, %": f"{10 + 2 * level:.2f}",
                 "rewind - reinit": lead_in_words(accuracy["rewind", level], accuracy["reinit", level])}
        for arm in ALL[:2]:
            cells[f"{arm}, %"] = f"{accuracy[arm, level].mean():.2f}"
            cells[f"{arm}, step"] = f"{stop[arm, level].median():.0f}"
            cells[f"{arm} - dense"] = lead_in_words(accuracy[arm, level], accuracy["dense", 0])
        assert {name: cell.split(", ")[0] for name, cell in zip(head, row, strict=True)} == cells
        assert (level == 7) == (f"{cells['rewind - dense']} over dense networks, {cells['rewind - reinit']} " in text)
    seen = re.sub(r"\n  ", " ", lth.summary(run))                  # an item of a list is a line
    assert sum(part.count("\n") + 1 if part[0] in "|-`" else 1 for part in seen.split("\n\n")) <= 70


FIGURES = ["learning_curves.png", "comparison_plot.png", "accuracy_plot_iterative.png", "supermask_plot.png",
           "early_stopping_plot.png", "mask_plot.png", "accuracy_plot_reinit.png", "leads_plot.png"]
RUNS = {                              # what a run is made of, and which figures it lacks
    "default": ({}, FIGURES[7:]), "ten arms": ({"arms": ALL}, []), "one trial": ({"arms": ALL[:3], "trials": 1}, []),
    "dense": ({"left": LEFT[:1]}, FIGURES[1:]), "one level": ({"arms": ALL, "left": LEFT[:2]}, []),
    "own": ({"arms": (*ALL[:6], "own")}, []),
    "one arm": ({"arms": ALL[:1], "stop": {"rewind": [600] + 16 * [1290]}}, FIGURES[4:5] + FIGURES[6:]),
    "no reinit": ({"arms": ("rewind", "small", "shuffle"), "trials": 2, "left": LEFT[:3]}, FIGURES[6:7]),
    "lenet": ({"MODEL": "lenet", "DATASET": "FashionMNIST"}, FIGURES[5:8:2]),
    "late": ({"arms": ALL, "REWIND_STEP": 500, "provenance": "Transferred tickets: DATASET = 'FashionMNIST', x"}, [])}


@cache
def drawn(name):
    """A run, its summary, its figures, and all texts that were drawn, with their boxes."""
    seen = {}

    def note(text, renderer, draw=matplotlib.text.Text.draw):
        draw(text, renderer)
        seen[text] = matplotlib.text.Text.get_window_extent(text, renderer)

    with pytest.MonkeyPatch.context() as patch, matplotlib.style.context(["default", lth_pruning.STYLE]):
        patch.setitem(TABLE, "own", OWN)
        patch.setattr(matplotlib.text.Text, "draw", note)
        run = make(**RUNS[name][0])
        figures = lth_pruning.draw_figures(run)
        for figure in figures.values():
            figure.draw_without_rendering()
        seen = {text: box for text, box in seen.items() if text.get_visible() and text.get_text().strip()}
        return run, lth_pruning.summary(run), figures, seen


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_its_figures_and_whole_texts(name):
    """No cell is nan, infinite or None; titles are bold and left; no text leaves its figure, or overlaps another."""
    _, summary, figures, seen = drawn(name)
    assert figures.keys() == set(FIGURES) - set(RUNS[name][1])
    assert not re.search(r"\b(nan|inf|None)\b|\|  \||weights points", summary.split("## Constants")[0])
    for file, figure in figures.items():
        boxes = {text: box for text, box in seen.items()
                 if text.figure.figure is figure and text.get_color() != "none"}
        (title,) = [text for text in boxes if text.get_text() == figure.get_suptitle()]
        assert (title.get_fontweight(), title.get_ha()) == ("bold", "left") and title.get_text().count("\n") <= 1, file
        for text, box in boxes.items():
            assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max), (file, text.get_text())
        for (one, box), (other, its) in combinations(boxes.items(), 2):
            assert not box.overlaps(its), (file, one.get_text(), other.get_text())
    words = [summary, *(" ".join(text.get_text().split()) for text in seen)]
    if name == "late":                                      # what was trained for 500 steps is nowhere called original
        assert {"ticket from Fashion-MNIST", "values of step 500, permuted"} <= {*words}
        assert [text for text in words if re.search("original (initial )?(weights|values)", text)] == []


@pytest.mark.parametrize("name", ["default", "ten arms", "own"])
def test_figures_show_the_records_and_each_arm_alike_everywhere(name):
    """Lines are means, or medians of steps. One-arm pictures have the comparison's axes, and show that arm alone."""
    run, _, figures, _ = drawn(name)
    stops = early_stops(run).groupby(["arm", "level"])
    untrained = run.records[run.records["train_loss"].isna()].groupby(["arm", "level"])
    means = stops["test_accuracy"].mean()
    shown = {1: [means, means], 3: [untrained["test_accuracy"].mean()], 4: [stops["step"].median()]}
    styles = {(arm.colour, arm.marker): key for key, arm in [*TABLE.items(), ("own", OWN)]}
    for n, tables in shown.items():
        found = []
        for axes, table in zip(figures[FIGURES[n]].axes, tables, strict=False):
            for line in [line for line in axes.get_lines() if line.get_marker() != "None"]:
                found.append(styles[line.get_color(), line.get_marker()])
                assert line.get_ydata() == pytest.approx([table["dense", 0], *table[found[-1]]])
        assert {*found, "finetune"} == {*run.constants["ARMS"], "finetune"} and found.count("own") in (0, len(tables))
    for axes, level in zip(figures[FIGURES[0]].axes, (3, 7, 12, 15), strict=True):
        means = run.records[run.records["level"].isin([0, level])].groupby(["arm", "step"])["test_accuracy"].mean()
        for line in [line for line in axes.get_lines() if line.get_marker() != "None"]:
            assert line.get_ydata() == pytest.approx(means[styles[line.get_color(), line.get_marker()]].tolist())

    comparison, *one_arm = [figures[FIGURES[n]].axes[0] for n in (1, 2, 6)]
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in (comparison, *one_arm)}) == 1
    assert len({axes.get_position().bounds for axes in one_arm + [comparison] * (name == "default")}) == 1
    seen = [{line.get_color() for line in axes.get_lines() if line.get_visible()} for axes in one_arm]
    assert seen == [{lth_pruning.GREY, TABLE[arm].colour} for arm in ALL[:2]]


def test_figures_are_drawn_the_same_in_any_style(lth, tmp_path):
    """The user's own settings stay as they are."""
    run = make(ALL[:1], left=LEFT[:3])
    lth.draw(run, tmp_path)
    plain = contents(tmp_path)
    assert plain.keys() == {"summary.md", *FIGURES[:6]}
    with matplotlib.rc_context({"savefig.format": "pdf", "font.size": 40, "axes.facecolor": "black", "savefig.dpi": 7}):
        before = dict(matplotlib.rcParams)
        lth.draw(run, tmp_path)
        assert contents(tmp_path) == plain and dict(matplotlib.rcParams) == before


def test_leads_over_dense_networks_of_several_runs_in_one_picture(lth):
    """Each run has a line named by what it does not share or its folder, from the first level of pruning on."""
    runs = [make(PIXELS="unit_length"), make(trials=10, left=LEFT[:9], lead={"rewind": -0.3})]
    (axes,) = lth.leads_over_dense(runs).axes
    assert {text.get_text().replace("\n", " ") for text in axes.texts} == {
        "images of unit length, 5 trials", "standardised pixels, 10 trials"}
    lines = [line for line in axes.get_lines() if len(line.get_ydata()) > 5 and line.get_linestyle() == "-"]
    for run, line in zip(runs, lines, strict=True):
        stop = early_stops(run)["test_accuracy"]
        leads = stop["rewind"].groupby("level").mean() - stop["dense", 0].mean()
        np.testing.assert_allclose(line.get_ydata(), leads, atol=1e-9)
    (axes,) = lth.leads_over_dense([make(RESULTS_DIR="here"), make(RESULTS_DIR="there", DROPOUT=0.0)]).axes
    assert [text.get_text() for text in axes.texts] == ["here", "there"]
