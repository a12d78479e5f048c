"""Measures, answers, summary and figures: held against scipy and plain loops, on made-up records and on the gallery."""

import io
import json
import math
import re
from functools import cache
from itertools import combinations, product
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import KEYS, bounds, cell, contents, differences, in_words, table_rows, word
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from PIL import Image

import lth_pruning as lth

GALLERY = {path.parent.name: path.parent for path in Path(lth.__file__).parent.glob("results/*/run.json")}
PERCENT = tuple(round(100 * 0.8**level, 3) for level in range(17))
STEPS = (0, 25, 50, 100, *range(200, 1201, 200), 1290)      # early stops at 1,200 and 1,290 count as not reached
ARMS = tuple(lth.ARM_TABLE)


def make(arms=ARMS[:2], trials=5, percent=PERCENT, lead=None, stop=None, **constants):
    """Return a run, with the arms' leads at early stop, and their steps."""
    constants = lth.constants() | {"TRIALS": trials, "LEVELS": len(percent) - 1} | constants
    rng = np.random.default_rng(0)
    rows = []
    for (level, arm), trial in product([(0, "dense"), *product(range(1, len(percent)), arms)], range(trials)):
        start = constants["REWIND_STEP"] if level and lth.ARM_TABLE[arm].late else 0
        best = min(1290, (stop or {}).get(arm, 600) + 200 * (trial == 0))
        ahead = (lead or {}).get(arm, level and 0.4 - 0.05 * ARMS.index(arm) * level)
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


def indexed(networks):
    """Return a table of networks as the oracle takes it."""
    return networks.set_index(KEYS).sort_index()


def answers(section):
    """Return the rows of a section's table."""
    return table_rows(section.split("\n\n")[1])[1:]


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
    (0.01, 1, "supported", "supported"), (0, 1, "inconclusive", "supported"), (-0.2, 0, "inconclusive", "inconclusive"),
    (-0.3, -0.2, "contradicted", "behind, size open"), (-0.3, -0.21, "contradicted", "contradicted"),
    (-0.15, -0.05, "contradicted", "supported"), (math.nan, math.nan, "inconclusive", "inconclusive")])
def test_the_whole_interval_decides(low, high, beats, matches):
    assert lth.decide(low, high)[:2] == (beats, matches)


def test_without_a_spread_or_by_two_trials_nothing_is_decided():
    run = make(percent=PERCENT[:7])
    equal = run.networks.assign(test_accuracy=97 + (run.networks["arm"] == "rewind") / 10)
    two = run.networks[run.networks["trial"] < 2]
    for networks in (equal, two):
        table = lth.compare(lth.Run(run.info, run.records, networks), "rewind", "dense")
        assert not table["text"].str.contains("±").any() and set(table["word"]) == {"inconclusive"}


@pytest.mark.parametrize("trials", [3, 5, 6, 8, 9, 10])
def test_steps_are_decided_by_a_sign_test(trials):
    """Six of six, or nine of ten, decide; ties, and pairs that neither reached, are failures of both sides."""
    run = make(trials=trials, percent=PERCENT[:2])
    for sooner, other in product(range(trials // 2, trials + 1), ((500, 500), (None, None), (900, 500))):
        pairs = [(500, 900), (500, None)] * 5
        pairs = pairs[:sooner] + [other] * (trials - sooner)
        for arm, steps in zip(("rewind", "reinit"), zip(*pairs, strict=True), strict=True):
            run.compared.loc[run.compared["arm"] == arm, "stop_step"] = np.array(steps, float)
        decided = (sooner, trials) in ((6, 6), (8, 8), (8, 9), (9, 9), (9, 10), (10, 10))
        found = [lth.compare_steps(run, x, y, 1)[1] for x, y in (("rewind", "reinit"), ("reinit", "rewind"))]
        assert found == (["supported", "contradicted"] if decided else ["inconclusive"] * 2)


def test_controls_are_asked_their_own_question():
    """Is the ticket better? Is the arm as good? Is the ticket as good? Small dense networks must be small."""
    lead = {"rewind": -0.3, "reinit": -0.4, "shuffle_weights": -0.2, "keep_signs": -0.4, "finetune": 0.1,
            "small_dense": -1, "transfer": -0.7}
    run = make(tuple(lead), lead=lead)
    networks = run.networks
    for level, factor in ((7, 1.09), (12, 1.11)):
        networks.loc[(networks["arm"] == "small_dense") & (networks["level"] == level), "weights_remaining"] *= factor
    rows = answers(lth.controls_section(lth.Run(run.info, run.records, networks)))
    expected = {"rewind - reinit": "yes", "rewind - shuffle_weights": "no", "keep_signs - rewind": "yes",
                "rewind - finetune": "no", "rewind - small_dense": "yes", "transfer - rewind": "no"}
    assert [row[1] for row in rows] == list(expected)
    for _, pair, fifth, sparser, _ in rows:
        assert fifth == f"{in_words(differences(indexed(networks), *pair.split(' - '), 7))}: {expected[pair]}"
        assert (sparser == "has more weights") == ("small_dense" in pair)
    networks.loc[networks["arm"] == "small_dense", "weights_remaining"] *= 2             # at no level small enough
    assert "at every level: small_dense." in lth.summary(lth.Run(run.info, run.records, networks))


@pytest.mark.parametrize("name", GALLERY)
def test_committed_pages_say_what_the_committed_records_say(name):
    """The tables of summary.md, by scipy from networks.csv, and the title of the figure."""
    run = lth.read_run(GALLERY[name])
    table = pd.read_csv(GALLERY[name] / "networks.csv")
    pd.testing.assert_frame_equal(run.networks, table.astype(run.networks.dtypes))
    networks = indexed(table)
    committed = (GALLERY[name] / "summary.md").read_text()
    assert lth.summary(run).split("## Constants")[0] == committed.split("## Constants")[0]

    levels = {percent: level for level, percent in run.percent.items()}
    claims = {claim.text: claim for claim in lth.PAPER_CLAIMS}
    for head, *rows in map(table_rows, re.findall(r"(?:^\|.*\n)+", committed, re.M)):
        for row in rows:
            if head[0] == "claim" and "stop before" not in row[0]:
                claim = claims[row[0]]
                values = differences(networks, claim.x, claim.y, levels[row[1]], claim.column)
                assert row[3] == in_words(values)
                assert (row[4] == "supported") == (word(values) in ("ahead", "as good")[:1 + ("match" in row[0])])
            if head[0] == "weights remaining":
                for column, found in zip(head[1:], row[1:], strict=True):
                    expected = cell(networks, column.replace(", untrained", " untrained"), levels[row[0]])
                    if " - " in column:
                        expected += f", {word(differences(networks, *column.split(' - '), levels[row[0]]))}"
                    assert found == expected, (row[0], column)

    title = lth.accuracy_title(run, run.arms, "test_accuracy")
    words = {level: word(differences(networks, "rewind", "dense", level)) for level in run.percent.index[1:]}
    matched = [level for level in words if words[level] in ("ahead", "as good")]
    assert not matched or run.percent[max(matched)] in title.split(";")[0]
    beaten = [level for level in lth.levels_near(run, 13.5, 21.1) if words[level] == "ahead"]
    assert ("beat dense" in title) == bool(beaten)
    assert not beaten or f"beat dense networks with {run.percent[beaten[-1]]}" in title
    controls = [word(differences(networks, "rewind", arm, run.fifth)) for arm in run.controls]
    assert "controls" not in title or f"beat {controls.count('ahead')} of {len(controls)} controls" in title


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
        assert ("tickets" in title.get_text().lower()) == ("tickets: rewound networks" in title_and_grey(figure)[1])
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
    networks = indexed(run.networks)
    for file in {*ACCURACY, "final_accuracy_plot"} & set(figures):
        column = "final_test_accuracy" if file == "final_accuracy_plot" else "test_accuracy"
        shown = {"accuracy_plot_iterative": ["rewind"], "accuracy_plot_reinit": ["reinit"]}.get(file, run.arms)
        main = [arm for arm in shown if arm in lth.MAIN_ARMS]
        upper, lower = figures[file][0].axes
        means = networks.groupby(["arm", "level"])[column].mean()
        for axes, arms, start in ((upper, shown, 0), (lower, main, means["dense", 0])):
            lines = [line.get_ydata()[::-1] for line in axes.lines
                     if len(line.get_ydata()) == len(run.densities) and line.get_linestyle() == "-"]
            expected = [[means["dense", 0] - start, *(means[arm] - start)] for arm in arms]
            assert len(lines) == len(arms) and np.allclose(sorted(map(list, lines)), sorted(expected), atol=1e-4)
        whiskers = [path.vertices[:, 1] for bars in lower.collections if isinstance(bars, LineCollection)
                    for path in bars.get_paths()]
        for level, arm in product(run.densities.index[1:], main):
            interval = bounds(differences(networks, arm, "dense", level, column))
            assert any(np.allclose(pair, interval, atol=1e-3) for pair in whiskers)
        assert [-lth.MATCHING_MARGIN, 0] in [patch.get_bbox().intervaly.tolist() for patch in lower.patches]
        bands = {round(y, 3) for band in upper.collections for path in band.get_paths() for y in path.vertices[:, 1]}
        trials = networks.loc[main].groupby(["arm", "level"])[column]
        assert {*trials.min().round(3), *trials.max().round(3)} <= bands
    scales = [[(axes.get_xlim(), axes.get_ylim(), axes.get_position().bounds) for axes in figures[file][0].axes]
              for file in ACCURACY]
    assert scales[0] == scales[1] == scales[2]


def test_early_stops_are_medians_and_the_others_are_counted_above():
    run, figures = drawn("late stop")
    figure, _ = figures["early_stopping_plot"]
    strip, lower = figure.axes
    steps = run.networks.astype({"stop_step": float}).fillna({"stop_step": math.inf})
    medians = steps.groupby(["arm", "level"])["stop_step"].median()
    heights = [list(line.get_ydata()) for line in lower.lines]
    assert list(medians["rewind"]) in heights and [medians["dense", 0]] in heights
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


def test_masks_are_drawn_relative_to_the_average_pixel_even_where_no_connection_is_left():
    run = make(percent=PERCENT[:3])
    run.mask["share_remaining"] *= run.mask["pixel"] % 7 > 0
    shares = run.mask.query("level == 1")["share_remaining"].to_numpy()
    assert shares.min() == 0
    picture = lth.mask_plot(run).axes[1].images[0]
    drawn = picture.norm(picture.get_array()).flatten()
    assert not np.ma.is_masked(drawn)
    assert np.allclose(drawn, (np.log2(np.maximum(shares / shares.mean(), 0.5)) + 1).clip(0, 2) / 2)


def test_a_folder_is_redrawn_to_the_byte_and_a_stale_figure_goes_unless_it_cannot_be_drawn(tmp_path):
    """From run.json, metrics.csv and mask.csv alone, whatever style and figures the user has."""
    run = make(percent=PERCENT[:3])
    (tmp_path / "run.json").write_text(json.dumps(run.info))
    run.records.to_csv(tmp_path / "metrics.csv", index=False)
    run.mask.to_csv(tmp_path / "mask.csv", index=False)
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

    for name, old, reason in (("metrics.csv", b"reinit", "does not know: mine"), ("run.json", b"DATASET", "DATASET"),
                              ("metrics.csv", b"val_loss", "val_loss")):
        (tmp_path / name).write_bytes(given[name].replace(old, b"mine"))
        with pytest.raises(lth.UserError, match=reason):
            lth.redraw(tmp_path)
        (tmp_path / name).write_bytes(given[name])
    (tmp_path / "run.json").unlink()
    with pytest.raises(lth.UserError, match=r"run\.json"):
        lth.redraw(tmp_path)
