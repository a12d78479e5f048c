"""Measures, answers, summary and figures: held against scipy and plain loops, on made-up records and on the gallery."""

import io
import json
import math
import re
from functools import cache
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import contents
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import stats

import lth_pruning as lth

GALLERY = {path.parent.name: path.parent for path in Path(lth.__file__).parent.glob("results/*/run.json")}
PERCENT = tuple(round(100 * 0.8**level, 3) for level in range(17))
STEPS = (0, 25, 50, 100, *range(200, 1201, 200), 1290)      # early stops at 1,200 and 1,290 count as not reached
ARMS = tuple(lth.ARM_TABLE)
KEYS = ["arm", "level", "trial"]
OPEN = (-0.9, 0.9, -0.8, 0.8, 0.1)                          # a lead by trial that decides nothing


def make(arms=ARMS[:2], trials=5, percent=PERCENT, lead=None, stop=None, **constants):
    """Return a run. At early stop, `lead[arm]` is a number, or an array (levels, trials); `stop[arm]` is a step."""
    constants = lth.constants() | {"TRIALS": trials, "LEVELS": len(percent) - 1} | constants
    rng = np.random.default_rng(0)
    rows = []
    for (level, arm), trial in product([(0, "dense"), *product(range(1, len(percent)), arms)], range(trials)):
        start = constants["REWIND_STEP"] if level and lth.ARM_TABLE[arm].late else 0
        best = min(1290, (stop or {}).get(arm, 600) + 200 * (trial == 0))
        ahead = (lead or {}).get(arm, level and 0.4 - 0.05 * ARMS.index(arm) * level)
        ahead = np.broadcast_to(ahead, (max(1, len(percent) - 1), trials))[level - 1, trial]
        top = 97 + trial / 10 + ahead + rng.normal(0, 0.02)
        names = (constants["DATASET"], constants["MODEL"], arm, trial, level, percent[level])
        rows.append((*names, start, math.nan, 2.3, 10, 10 + 5 * level * (arm == "rewind")))
        for step in [step for step in STEPS if step > start]:
            early = 60 * max(0, math.exp(-step / 60) - math.exp(-best / 60))
            accuracy = top - abs(step - best) / 4000 - early
            loss = 0.1 if best <= step <= best + 200 else 0.2                # the first of the lowest counts
            rows.append((*names, step, 0.1, loss, round(accuracy, 1), round(accuracy, 2)))
    columns = [*lth.NETWORK, "step", "train_loss", "val_loss", "val_accuracy", "test_accuracy"]
    records = pd.DataFrame(rows, columns=columns)
    mask = pd.DataFrame(list(product(range(len(percent)), range(784))), columns=["level", "pixel"])
    mask = mask.assign(share_remaining=1 / (1 + mask["pixel"] % 7), mean_intensity=mask["pixel"] % 28)
    info = {"constants": constants, "versions": {"torch": "2"}, "tickets_from": {"constants": {"DATASET": "KMNIST"}}}
    return lth.Run(info, records, lth.measure(records), mask)


def write(run, folder):
    """Write what `redraw` needs of a run."""
    (folder / "run.json").write_text(json.dumps(run.info))
    run.records.to_csv(folder / "metrics.csv", index=False)
    run.mask.to_csv(folder / "mask.csv", index=False)


def differences(networks, x, y, level, column="test_accuracy"):
    """Return x - y by trial, without the script."""
    values = networks.set_index(KEYS)[column].sort_index()
    x, y = (values[arm, 0 if arm == "dense" else level] for arm in (x, y))
    return (x - y).round(4)


def bounds(values):
    """Return scipy's 95 % confidence interval; differences that are all equal have none."""
    if values.nunique() == 1:
        return math.nan, math.nan
    return stats.ttest_1samp(values, 0).confidence_interval(0.95)


def in_words(values):
    low, high = bounds(values)
    return f"{round(values.mean(), 2) + 0.0:+.2f} ± {(high - low) / 2:.2f}".removesuffix(" ± nan")


def word(values):
    low, high = bounds(values)
    if low > 0:
        return "ahead"
    if low > -0.2:
        return "as good"
    return "behind" if high < 0 else "inconclusive"


def tables(text):
    """Return the rows of each table of a page, by its heading."""
    found = {}
    for part in re.split(r"^(?:## |<summary>)", text, flags=re.MULTILINE):
        rows = [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| ") and line[2] != "-"]
        found[re.split("[\n<]", part)[0]] = rows
    return found


@pytest.mark.parametrize("steps", [STEPS, range(0, 2001, 20), range(0, 1201, 400)])
def test_networks_are_measured_as_by_a_plain_loop(steps):
    """Early stop is judged by validation loss; near the end it is not reached, while catching up there counts."""
    rng = np.random.default_rng(1)
    networks = [("dense", 0, 100.0), *product(("rewind", "reinit"), (1, 2), (80.0,))]
    rows = [("MNIST", "mlp", arm, trial, level, left, step, math.nan if step == 0 else 0.1,
             rng.integers(2 * len(steps)) / 9, rng.integers(900, 990) / 10, rng.integers(9000, 9900) / 100)
            for (arm, level, left), trial, step in product(networks, range(8), steps)]
    names = [*lth.NETWORK, "step", "train_loss", "val_loss", "val_accuracy", "test_accuracy"]
    found = lth.measure(pd.DataFrame(rows, columns=names)).set_index(KEYS)
    assert len(found) == 40 and found["stop_step"].isna().any()
    for (arm, level, left), trial in product(networks, range(8)):
        start, *later = [row[6:] for row in rows if row[2:5] == (arm, trial, level)]
        goal = [row[9] for row in rows if row[2:4] == ("dense", trial)][-1]
        best = min(later, key=lambda row: row[2])
        reached = best[0] < 0.95 * steps[-1] and best[0] not in steps[-2:]
        caught_up = [row[0] for row in later if row[3] >= goal]
        expected = [left, best[4], best[0] if reached else pd.NA, start[4], later[-1][4], [*caught_up, pd.NA][0]]
        assert found.loc[(arm, level, trial)].drop(["dataset", "model"]).tolist() == expected


@pytest.mark.parametrize(("low", "high", "beats", "matches"), [
    (0.01, 1, "supported", "supported"), (0, 1, "inconclusive", "supported"), (-0.19, 1, "inconclusive", "supported"),
    (-0.2, 1, "inconclusive", "inconclusive"), (-0.3, 0, "inconclusive", "inconclusive"),
    (-0.3, -0.01, "contradicted", "behind, size open"), (-0.3, -0.2, "contradicted", "behind, size open"),
    (-0.3, -0.21, "contradicted", "contradicted"), (-0.15, -0.05, "contradicted", "supported"),
    (math.nan, math.nan, "inconclusive", "inconclusive")])
def test_the_whole_interval_decides(low, high, beats, matches):
    assert lth.decide(low, high)[:2] == (beats, matches)


def test_comparisons_are_paired_and_have_one_of_four_words():
    spread = np.array([-0.04, 0.04, -0.02, 0.02, 0])
    leads = np.array([0.5 + spread, -0.1 + spread, -0.5 + spread, OPEN, -0.2 + 0 * spread, 0 * spread])
    run = make(percent=PERCENT[:7], lead={"rewind": leads, "reinit": -1 + leads})
    for x, y, column in (("rewind", "dense", "test_accuracy"), ("rewind", "reinit", "final_test_accuracy")):
        table = lth.compare(run, x, y, column)
        for level in table.index:
            values = differences(run.networks, x, y, level, column)
            assert tuple(table.loc[level, ["low", "high"]]) == pytest.approx(tuple(bounds(values)))
            assert (table.loc[level, "text"], table.loc[level, "word"]) == (in_words(values), word(values))
    assert list(lth.compare(run, "rewind", "dense")["word"][:4]) == ["ahead", "as good", "behind", "inconclusive"]
    equal = run.networks.assign(test_accuracy=97 + (run.networks["arm"] == "rewind") / 10)
    two = run.networks[run.networks["trial"] < 2]
    for networks in (equal, two):                           # without a spread, or by two trials, nothing is decided
        table = lth.compare(lth.Run(run.info, run.records, networks), "rewind", "dense")
        assert not table["text"].str.contains("±").any() and set(table["word"]) == {"inconclusive"}


@pytest.mark.parametrize("trials", range(3, 11))
def test_steps_are_decided_by_a_sign_test(trials):
    """Six of six, or nine of ten, decide; ties, and pairs that neither reached, are failures of both sides."""
    run = make(trials=trials, percent=PERCENT[:2])
    for sooner, other in product(range(trials // 2, trials + 1), ((500, 500), (None, None), (900, 500))):
        pairs = [(500, 900), (500, None)] * 5
        pairs = pairs[:sooner] + [other] * (trials - sooner)
        for arm, steps in zip(("rewind", "reinit"), zip(*pairs, strict=True), strict=True):
            run.compared.loc[run.compared["arm"] == arm, "stop_step"] = np.array(steps, float)
        decided = (sooner, trials) in ((6, 6), (7, 7), (8, 8), (8, 9), (9, 9), (9, 10), (10, 10))
        answers = [lth.compare_steps(run, x, y, 1)[1] for x, y in (("rewind", "reinit"), ("reinit", "rewind"))]
        assert answers == (["supported", "contradicted"] if decided else ["inconclusive"] * 2)


@pytest.mark.parametrize(("arm", "levels", "title"), [
    ("rewind", "aaaaaaaaaaaaab", "beat {} with 13.4 % of the weights and match them with as little as 5.5 %"),
    ("rewind", "mmmammmamummbb", "match {} at 11 of 14 levels, the sparsest with 6.9 % of the weights"),
    ("rewind", "mmmmmmammmmmmm", "beat {} with 21.0 % of the weights and match them with as little as 4.4 %"),
    ("rewind", "aaaaaaaaabbbbb", "beat {} with 13.4 % of the weights"),
    ("rewind", "bbbbbbbbbbbbmb", "match {} at 1 of 14 levels, the sparsest with 5.5 % of the weights"),
    ("reinit", "mmmbbmbbbbbbbb", "fall behind {} at 21.0 % of the weights and sparser"),
    ("rewind", "bbbbbbbbbbbbbb", "fall behind {} at 80.0 % of the weights and sparser")])
def test_titles_beat_at_fixed_densities_and_match_at_the_sparsest(arm, levels, title):
    spread = np.array([-0.04, 0.04, -0.02, 0.02, 0])
    leads = {"a": 0.3 + spread, "m": -0.1 + spread, "b": -1 + spread, "u": OPEN}
    run = make(percent=PERCENT[:15], lead={arm: np.array([leads[level] for level in levels])})
    assert lth.against_dense(run, arm) == f"{lth.plural(run, arm)} {title.format('dense networks')}"


@pytest.mark.parametrize(("sign", "answer"), [(1, "supported"), (-1, "contradicted")])
def test_claims_of_the_paper_can_be_supported_and_contradicted(sign, answer):
    """Each at its own density, and one of them after the last step."""
    lead = {"rewind": sign, "reinit": -sign, "oneshot": -sign, "shuffle_mask": -sign}
    stop = {"rewind": 600 - 400 * sign, "reinit": 600 + 400 * sign, "dense": 600}
    run = make(tuple(lead), 6, lead=lead, stop=stop)
    page = lth.claims_section(run)
    rows = tables(page)["The paper's claims"][1:]
    assert {row[-1] for row in rows} == {answer} and "Not tested" not in page
    assert [row[1] for row in rows] == [f"{PERCENT[level]:.1f} %" for level in (9, 15, 9, 7, 7, 12, 7, 7, 7)]
    final = run.networks.assign(final_test_accuracy=97 - sign)
    changed = tables(lth.claims_section(lth.Run(run.info, run.records, final)))["The paper's claims"][1:]
    assert [n for n in range(9) if rows[n] != changed[n]] == [2]


def test_what_a_run_cannot_test_is_listed_with_the_reason():
    page = lth.claims_section(make(("rewind",), percent=(100, 30.0, 4.6)))
    assert "Tickets match dense networks: no level is near 3.6 % of the weights" in page
    assert "Tickets beat shuffled connections: the run has no `shuffle_mask` arm" in page
    assert "at least six trials are needed to decide about steps" in lth.claims_section(make())
    late = lth.claims_section(make(trials=6, stop={"dense": 1200, "rewind": 1290, "reinit": 1290}))
    assert late.count("most networks were still improving when training ended") == 2
    assert lth.claims_section(make(MODEL="lenet")) == lth.claims_section(make(DATASET="FashionMNIST")) == ""


def test_controls_are_asked_their_own_question():
    """Is the ticket better? Is the arm as good? Is the ticket as good? Small dense networks must be small."""
    lead = {"rewind": -0.3, "reinit": -0.4, "shuffle_weights": -0.2, "keep_signs": -0.4, "finetune": 0.1,
            "small_dense": -1, "transfer": -0.7}
    run = make(tuple(lead), lead=lead)
    networks = run.networks
    for level, factor in ((7, 1.09), (12, 1.11)):
        networks.loc[(networks["arm"] == "small_dense") & (networks["level"] == level), "weights_remaining"] *= factor
    rows = tables(lth.controls_section(lth.Run(run.info, run.records, networks)))["Controls"][1:]
    expected = {"rewind - reinit": "yes", "rewind - shuffle_weights": "no", "keep_signs - rewind": "yes",
                "rewind - finetune": "no", "rewind - small_dense": "yes", "transfer - rewind": "no"}
    assert [row[1] for row in rows] == list(expected)
    for _, pair, cell, sparser, _ in rows:
        assert cell == f"{in_words(differences(networks, *pair.split(' - '), 7))}: {expected[pair]}"
        assert (sparser == "has more weights") == ("small_dense" in pair)
    networks.loc[networks["arm"] == "small_dense", "weights_remaining"] *= 2             # at no level small enough
    assert "small_dense" not in lth.summary(lth.Run(run.info, run.records, networks)).split("## Constants")[0]


@pytest.mark.parametrize("name", GALLERY)
def test_committed_pages_say_what_the_committed_records_say(name):
    """networks.csv by pandas from metrics.csv; the cells of summary.md, and the title, by scipy from networks.csv."""
    networks = pd.read_csv(GALLERY[name] / "networks.csv")
    trained = pd.read_csv(GALLERY[name] / "metrics.csv").dropna(subset="train_loss")
    ordered = trained.sort_values(["val_loss", "step"]).groupby(KEYS)
    first = ordered[["step", "test_accuracy"]].first().loc[pd.MultiIndex.from_frame(networks[KEYS])].reset_index()
    steps = sorted(set(trained["step"]))
    late = (first["step"] >= 0.95 * steps[-1]) | first["step"].isin(steps[-2:])
    assert first["test_accuracy"].equals(networks["test_accuracy"])
    assert first["step"].mask(late).equals(networks["stop_step"].astype(float))
    committed = (GALLERY[name] / "summary.md").read_text()
    run = lth.read_run(GALLERY[name])
    assert lth.summary(run).split("## Constants")[0] == committed.split("## Constants")[0]

    means = networks.groupby(["arm", "level"])["test_accuracy"].mean().round(6)
    found = tables(committed)
    for head, *rows in [found["Level by level"], *[found[key] for key in found if key == "Other controls"]]:
        for level, row in enumerate(rows, start=1):
            cells = {column: cell for column, cell in zip(head, row, strict=True) if cell != "has more weights"}
            for column in [column for column in cells if " - " in column]:
                values = differences(networks, *column.split(" - "), level)
                assert cells[column] == f"{in_words(values)}, {word(values)}"
            for arm in [arm for arm in run.arms if f"{arm}, %" in cells]:
                assert cells[f"{arm}, %"] == f"{means[arm, level]:.2f}"

    title = lth.accuracy_title(run, run.arms, "test_accuracy").split(";")[0]
    words = {level: word(differences(networks, "rewind", "dense", level)) for level in set(networks["level"]) - {0}}
    matched = [level for level in words if words[level] in ("ahead", "as good")]
    assert (run.percent[max(matched)] in title) if matched else ("match" not in title or "inconclusive" in title)
    fixed = [level for level in lth.levels_near(run, 13.5, 21.1) if words[level] == "ahead"]
    assert ("beat" in title) == bool(fixed) and (not fixed or f"networks with {run.percent[fixed[-1]]} of" in title)


RUNS = {
    "all arms": {"arms": ARMS, "trials": 6, "REWIND_STEP": 50, "LEVELS": 20}, "one trial": {"trials": 1},
    "two trials": {"arms": ARMS[:4], "trials": 2, "percent": PERCENT[:9]}, "dense": {"percent": PERCENT[:1]},
    "late stop": {"trials": 6, "stop": {"reinit": 1200, "dense": 1000, "rewind": 400}, "MODEL": "lenet"}}
ACCURACY = ("comparison_plot", "accuracy_plot_iterative", "accuracy_plot_reinit")


@cache
def drawn(name):
    """Return a run, made up or of the gallery, and its figures by name, each with the pixels of its texts."""
    run = lth.read_run(GALLERY[name]) if name in GALLERY else make(**RUNS[name])
    texts = {}

    def note(text, renderer, draw=matplotlib.text.Text.draw):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            texts[text] = matplotlib.text.Text.get_window_extent(text, renderer)

    figures = {}
    with pytest.MonkeyPatch.context() as patch, matplotlib.style.context(lth.STYLE, after_reset=True):
        patch.setattr(matplotlib.text.Text, "draw", note)
        for draw in lth.FIGURES:
            figure = draw(run)
            if figure is not None:
                texts = {}
                FigureCanvasAgg(figure).draw()
                figures[draw.__name__] = figure, texts
    return run, figures


def title_and_grey(figure):
    return [text.get_text().replace("\n", " ").replace("\u00a0", " ") for text in figure.texts]


def points_of(axes):
    """Return the pixels of all data points drawn inside some axes: ends of lines, of whiskers, and markers."""
    places = [line.get_transform().transform(line.get_xydata()) for line in axes.lines if len(line.get_xdata()) > 2]
    places += [axes.transData.transform(path.vertices) for bars in axes.collections
               for path in bars.get_paths() if isinstance(bars, LineCollection)]
    return [(x, y) for place in places for x, y in place if axes.bbox.contains(x, y)]


@pytest.mark.parametrize("name", [*RUNS, "default"])
def test_nothing_on_a_figure_is_cut_off_covered_or_pale(name):
    """A bold title on the left says something; no text leaves the picture, or covers data or another text."""
    _, figures = drawn(name)
    for file, (figure, texts) in figures.items():
        title, *_ = figure.texts
        assert title.get_weight() == "bold" and len(title.get_text()) > 20 and title.get_text().count("\n") < 3
        lines = [len(line) for line in title.get_text().split("\n")]
        assert min(lines) > 0.6 * max(lines), (file, title.get_text())
        assert not re.search(r"\b(nan|inf|None)\b", " ".join(title_and_grey(figure)))
        for text, box in texts.items():
            what = file, text.get_text()
            assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max), what
            rgb = np.array(to_rgb(text.get_color()))
            linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
            assert 1.05 / (linear @ (0.2126, 0.7152, 0.0722) + 0.05) >= 4.5, what
            for axes in figure.axes:
                assert not any(box.contains(x, y) for x, y in points_of(axes)), what
        for (one, box), (other, its) in combinations(texts.items(), 2):
            assert not box.overlaps(its), (file, one.get_text(), other.get_text())


@pytest.mark.parametrize("name", ["all arms", "default"])
def test_lines_are_the_means_and_what_decides_is_drawn(name):
    """Above, means; below, leads with their intervals and the strip. Three figures share their axes."""
    run, figures = drawn(name)
    for file in {*ACCURACY, "final_accuracy_plot"} & set(figures):
        column = "final_test_accuracy" if file == "final_accuracy_plot" else "test_accuracy"
        shown = {"accuracy_plot_iterative": ["rewind"], "accuracy_plot_reinit": ["reinit"]}.get(file, run.arms)
        main = [arm for arm in shown if arm in lth.MAIN_ARMS]
        upper, lower = figures[file][0].axes
        means = run.networks.groupby(["arm", "level"])[column].mean()
        for axes, arms, start in ((upper, shown, 0), (lower, main, means["dense", 0])):
            lines = [line.get_ydata()[::-1] for line in axes.lines
                     if len(line.get_ydata()) == len(run.densities) and line.get_linestyle() == "-"]
            expected = [[means["dense", 0] - start, *(means[arm] - start)] for arm in arms]
            assert len(lines) == len(arms) and np.allclose(sorted(map(list, lines)), sorted(expected), atol=1e-4)
        whiskers = [path.vertices[:, 1] for bars in lower.collections if isinstance(bars, LineCollection)
                    for path in bars.get_paths()]
        for level, arm in product(run.densities.index[1:], main):
            interval = tuple(bounds(differences(run.networks, arm, "dense", level, column)))
            assert any(np.allclose(pair, interval, atol=1e-3) for pair in whiskers)
        assert [-lth.MATCHING_MARGIN, 0] in [patch.get_bbox().intervaly.tolist() for patch in lower.patches]
        bands = {round(y, 3) for band in upper.collections for path in band.get_paths() for y in path.vertices[:, 1]}
        trials = run.networks[run.networks["arm"].isin(main)].groupby(["arm", "level"])[column]
        assert {*trials.min().round(3), *trials.max().round(3)} <= bands
    scales = [[(axes.get_xlim(), axes.get_ylim(), axes.get_position().bounds) for axes in figures[file][0].axes]
              for file in ACCURACY]
    assert scales[0] == scales[1] == scales[2]


@pytest.mark.parametrize("sign", [1, -1])
def test_what_leaves_the_axes_is_marked_with_an_arrow_and_its_value(sign):
    run = make(ARMS[:4], percent=PERCENT[:3], lead={"rewind": 0, "reinit": -9.0, "shuffle_weights": 30.0 * sign})
    figure = lth.leads_plot(run)
    outlier = differences(run.networks, "rewind", "shuffle_weights", 2).mean()
    expected = f" {outlier:.1f} →" if outlier > 0 else f" ← {outlier:.1f}"
    assert expected in [text.get_text() for text in figure.axes[0].texts]
    assert not any(abs(x) > 25 for line in figure.axes[0].lines for x in line.get_xdata())
    upper, lower = lth.comparison_plot(run).axes
    lead = differences(run.networks, "reinit", "dense", 2).mean()
    assert f"re-initialised at random, {lead:.1f}\u00a0↓" in [text.get_text() for text in lower.texts]
    if sign < 0:
        assert f"original values, permuted, {97.2 - 30:.1f}\u00a0↓" in [text.get_text() for text in upper.texts]


def test_early_stops_are_medians_and_the_others_are_counted_above():
    run, figures = drawn("late stop")
    figure, _ = figures["early_stopping_plot"]
    strip, lower = figure.axes
    steps = run.networks.astype({"stop_step": float}).fillna({"stop_step": math.inf})
    medians = steps.groupby(["arm", "level"])["stop_step"].median()
    heights = [list(line.get_ydata()) for line in lower.lines]
    assert list(medians["rewind"]) in heights and [medians["dense", 0]] in heights
    networks = run.networks.copy()
    for level, late in ((5, 2), (6, 3)):                    # of six; what is not reached is later than all that is
        rows = networks.index[(networks["arm"] == "rewind") & (networks["level"] == level)]
        networks.loc[rows, "stop_step"] = [pd.NA] * late + [100, 200, 300, 400][:6 - late]
    stops = lth.Run(run.info, run.records, networks).stops.loc["rewind"]
    assert stops.loc[5].tolist() == [2, 350, 100, 400] and math.isnan(stops.loc[6, "median"])
    above = [text.get_text() for text in strip.texts]       # one dense network, and all re-initialised ones
    assert above == ["1", *["6"] * 16, "re-initialised at random", "dense network"]
    assert title_and_grey(figure)[0] == (f"With {run.percent[7]} of the weights, tickets stop sooner (median step 400) "
                                         "than dense networks (1,000) and re-initialised networks (not reached)")


@pytest.mark.parametrize("name", ["one trial", "two trials"])
def test_too_few_trials_have_no_intervals_and_decide_nothing(name):
    run, figures = drawn(name)
    assert run.trials < 3
    for file, (figure, texts) in figures.items():
        words = " ".join([text.get_text() for text in texts])
        assert not re.search(r"95 % confidence|whole interval|\b(beat|match|fall)\b", words), file
        strips = [patch for patch in figure.findobj(Rectangle) if 0.2 in (patch.get_width(), patch.get_height())]
        assert not strips, file
    assert "ranges" not in " ".join(title_and_grey(drawn("one trial")[1]["comparison_plot"][0]))
    said = " ".join(lth.verdict(run))
    assert "At least three trials are needed" in said and not re.search(r"\b(beat|match|behind|ahead)\b", said)


def test_late_and_unfinished_runs_say_so_everywhere():
    """What was trained for 50 steps is nowhere called original."""
    run, figures = drawn("all arms")
    for figure, _ in figures.values():
        assert "rewound to step 50, 6 trials, unfinished: levels 0 to 16 of 20" in title_and_grey(figure)[1]
    words = [text.get_text() for _, texts in figures.values() for text in texts] + [lth.summary(run)]
    assert not [text for text in words if re.search("original (initial )?(weights|values)", text)]
    assert "values of step 50, permuted" in words and "ticket from KMNIST" in words


def test_a_folder_is_redrawn_to_the_byte_and_a_stale_figure_goes(tmp_path):
    """From run.json, metrics.csv and mask.csv alone, whatever style and figures the user has."""
    write(make(percent=PERCENT[:3]), tmp_path)
    given = contents(tmp_path)
    (tmp_path / "leads_plot.png").write_bytes(b"stale")
    lth.redraw(tmp_path)
    first = contents(tmp_path)
    names = {"learning_curves", *ACCURACY, "supermask_plot", "mask_plot", "early_stopping_plot", "final_accuracy_plot"}
    assert first.keys() == {*given, "networks.csv", "summary.md", *[f"{name}.png" for name in names]}
    for name in names:
        assert Image.open(io.BytesIO(first[f"{name}.png"])).size in ((1800, 1012), (1800, 1013))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        lth.redraw(tmp_path)
    assert contents(tmp_path) == first


def test_folders_that_cannot_be_drawn_are_named_with_the_reason(tmp_path):
    run = make(percent=PERCENT[:2])
    unknown = run.records.replace({"arm": {"reinit": "mine"}})
    lacking = run.records.drop(columns="val_loss")
    for records, constants, reason in ((unknown, run.constants, "does not know: mine"), (run.records, {}, "DATASET"),
                                       (lacking, run.constants, "val_loss")):
        write(SimpleNamespace(info=run.info | {"constants": constants}, records=records, mask=run.mask), tmp_path)
        with pytest.raises(lth.UserError, match=reason):
            lth.redraw(tmp_path)
    for name in ("run.json", "metrics.csv"):
        write(run, tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(lth.UserError, match=name):
            lth.redraw(tmp_path)
