"""Tables and sentences, on records made for the purpose so that the right answer is known."""

import math
import statistics

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
LEFT = (100.0, 50.0, 20.0, 10.0)
STEPS = (100, 200, 300)


def make_rows(final_accuracy: dict[str, list[list[float]]], trials: int = 3, remaining=LEFT) -> list[dict]:
    """Records whose last test accuracies are given by arm as [level][trial]; before, they climb by a point a step."""
    rows = []
    for level, left in enumerate(remaining):
        for arm, values in final_accuracy.items():
            if (arm == "dense") != (level == 0):
                continue
            for trial in range(trials):
                last = values[level if level == 0 else level - 1][trial]
                rows += [{"dataset": "MNIST", "model": "mlp", "arm": arm, "trial": trial, "level": level,
                          "weights_remaining": left, "step": step, "train_loss": 1 / step, "val_loss": 1 / step,
                          "val_accuracy": last - 2 + n, "test_accuracy": last - 2 + n}
                         for n, step in enumerate(STEPS)]
    return rows


@pytest.fixture
def rows():
    """Rewind is matching down to 20 % and then below; reinit is below from 20 % on, and equal to dense at 50 %."""
    return make_rows({"dense": [[97.0, 97.2, 97.4]],
                      "rewind": [[97.5, 97.5, 97.8], [97.1, 97.2, 97.3], [96.0, 96.1, 96.5]],
                      "reinit": [[97.0, 97.2, 97.4], [96.0, 96.2, 96.4], [95.1, 95.0, 95.5]]})


# Two-sided 95 % quantiles of Student's t, from the tables in statistics books.
@pytest.mark.parametrize(("trials", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_interval_is_students(lth, trials, quantile):
    differences = np.random.default_rng(trials).normal(1, 2, (4, trials))
    mean, half = lth.paired_interval(differences)
    for level in range(4):
        assert mean[level] == pytest.approx(statistics.mean(differences[level]))
        expected = quantile * statistics.stdev(differences[level]) / math.sqrt(trials)
        assert half[level] == pytest.approx(expected, rel=2e-4)


def test_one_trial_has_no_interval(lth):
    mean, half = lth.paired_interval(np.array([[0.5], [1.0]]))
    assert mean.tolist() == [0.5, 1.0]
    assert np.isnan(half).all()


def test_verdict_names_the_right_levels(lth, rows):
    text = "\n".join(lth.verdict(rows))
    assert "dense networks end at 97.20 % test accuracy (mean of 3 trials, 97.00 to 97.40)" in text
    assert "smallest matching ticket keeps 20.0 % of the weights: rewound, it ends at 97.20 %" in text
    assert "reinit networks end below the dense ones from 20.0 % of the weights on" in text
    # Differences at the last level are 0.9, 1.1 and 1.0: 1 +- 4.303 * 0.1 / sqrt(3).
    assert "At 10.0 % of the weights, rewind - reinit is +1.00 points (95 % interval +0.75 to +1.25, paired" in text


def test_verdict_says_so_when_no_ticket_matches_and_reinit_wins(lth):
    rows = make_rows({"dense": [[97.0] * 3], "rewind": [[90.0, 90.1, 90.2]] * 3, "reinit": [[98.0, 98.1, 98.2]] * 3})
    text = "\n".join(lth.verdict(rows))
    assert "No rewound ticket is matching" in text
    assert "reinit networks end below the dense ones at no level to stay" in text
    assert "rewind - reinit is -8.00 points" in text


def test_dense_networks_alone_have_a_summary(lth):
    rows = [row for row in make_rows({"dense": [[97.0, 97.2, 97.4]]}) if row["level"] == 0]
    text = lth.summary(rows, {"LEVELS": 0}, "cpu")
    assert "mean of 3 trials" in text
    assert "| 0 (dense) | 100.0 % | 97.20 (97.00 to 97.40) | not reached |" in text
    before, claims = text.split("## The paper's claims")
    assert "ticket" not in before
    assert claims.count("not tested: no rewind networks") == 3


def test_summary_has_a_row_per_level(lth, rows):
    lines = lth.summary(rows, {"LEVELS": 3, "SEED": 1}, "cpu").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    table = table[:next(n for n, cells in enumerate(table) if cells[0] == "claim")]
    assert len(table) == 2 + len(LEFT)
    assert len({len(row) for row in table}) == 1
    assert table[4] == ["2", "20.0 %", "97.20 (97.10 to 97.30)", "96.20 (96.00 to 96.40)", "+1.00 ± 0.25",
                        "not reached", "not reached"]
    assert "SEED = 1" in lines


def test_early_stop_is_judged_by_validation_loss_and_marked_where_not_reached(lth, rows):
    """The lowest test loss is nowhere looked at; a minimum at the last evaluation is no early stop."""
    for row in rows:
        if row["arm"] == "rewind" and row["level"] == 2 and row["trial"] == 1 and row["step"] == 200:
            row["val_loss"] = 0.0
    stops = lth.early_stop(rows, "rewind")
    assert stops.shape == (4, 3)
    assert stops[2].tolist() == [math.inf, 200, math.inf]
    assert np.isinf(np.delete(stops, 2, axis=0)).all()
    # At that step the test accuracy was a point below its last: 97.1, 97.2 - 1 and 97.3.
    assert lth.at_early_stop(rows, "rewind")[2].tolist() == pytest.approx([97.1, 96.2, 97.3])
    assert "96.87 at ≥ 267 (200 to 300), 2 not reached" in lth.summary(rows, {"LEVELS": 3}, "cpu")


@pytest.fixture
def claimed():
    """At the paper's own sparsities. Rewind leads dense by 0.4 at 21 %, by 0.3, 0.2 and 0.4 at 13.5 %, by 0.1, -0.1 and
    0.1 at 3.6 %; reinit and shuffle are below from 21 % on, but for one trial of reinit, which matches until 13.5 %."""
    dense = [97.0, 97.2, 97.4]
    return make_rows({"dense": [dense], "rewind": [[97.4, 97.6, 97.8], [97.3, 97.4, 97.8], [97.1, 97.1, 97.5]],
                      "reinit": [[96.0, 96.2, 96.4], [97.0, 96.2, 96.4], [95.0, 95.0, 95.0]],
                      "shuffle": [[96.2, 96.6, 97.0]] * 3}, remaining=(100.0, 21.1, 13.5, 3.6))


def claim(lth, rows, word: str) -> list[str]:
    """The cells of the one claim with this word in it, without its sentence."""
    (cells,) = [cells for cells in lth.claims(rows) if word in cells[0]]
    return cells[1:]


def test_claims_are_decided_by_paired_intervals(lth, claimed):
    """Half an interval is 4.303 times the standard deviation by the root of 3."""
    assert claim(lth, claimed, "more accurate") == ["13.5 %", "3", "+0.30 ± 0.25 points", "borne out"]
    assert claim(lth, claimed, "matching") == ["3.6 %", "3", "+0.03 ± 0.29 points", "borne out"]
    assert claim(lth, claimed, "Shuffled") == ["21.1 %", "3", "+1.00 ± 0.50 points", "borne out"]
    # The ticket lasts 3, 2 and 3 levels, reinit 2, 0 and 0: 1, 2 and 3 more.
    assert claim(lth, claimed, "Re-initialised networks fall") == ["3.6 %", "3", "+2.0 ± 2.5 levels", "not borne out"]
    assert claim(lth, claimed, "one shot") == ["", "", "", "not tested: no oneshot networks"]
    for row in claimed:                                         # one shot instead of shuffled: it matches at no level
        row["arm"] = row["arm"].replace("shuffle", "oneshot")
    assert claim(lth, claimed, "one shot") == ["3.6 %", "3", "+2.7 ± 1.4 levels", "borne out"]


def test_a_ticket_that_is_clearly_below_on_the_way_is_not_matching(lth, claimed):
    """By -0.20 ± 0.50 points it may be; by -0.50 ± 0.25 it is; and so it is where at the end the mean is below."""
    def end_at(level, *accuracies):
        for row in claimed:
            if (row["arm"], row["level"], row["step"]) == ("rewind", level, 300):
                row["test_accuracy"] = accuracies[int(row["trial"])]

    end_at(2, 97.0, 97.0, 97.0)
    assert claim(lth, claimed, "matching") == ["3.6 %", "3", "+0.03 ± 0.29 points", "borne out"]
    end_at(2, 96.4, 96.7, 97.0)
    assert claim(lth, claimed, "matching") == ["3.6 %", "3", "-0.50 ± 0.25 points", "not borne out"]
    end_at(3, 96.0, 96.2, 96.4)                                 # and where it stays below, the first fall is shown
    assert claim(lth, claimed, "matching") == ["3.6 %", "3", "-0.50 ± 0.25 points", "not borne out"]
    end_at(2, 97.3, 97.4, 97.8)
    end_at(3, 97.1, 97.0, 97.3)
    assert claim(lth, claimed, "matching") == ["3.6 %", "3", "-0.07 ± 0.38 points", "not borne out"]


def test_moments_beyond_the_end_make_no_claim_look_better(lth, claimed):
    """Dense networks that stop at the end at the earliest count as stopping there; tickets that do decide nothing."""
    assert claim(lth, claimed, "early stop") == ["21.1 %", "3", "not reached", "not tested: not reached within the run"]
    stops = {0: 100, 1: 100, 2: 200}
    for row in claimed:
        if row["arm"] == "rewind" and row["level"] == 1 and row["step"] == stops[row["trial"]]:
            row["val_loss"] = 0.0
    # 200, 200 and 100 steps before step 300.
    assert claim(lth, claimed, "early stop") == ["21.1 %", "3", "+166.7 ± 143.4 steps", "borne out"]
    # The ticket is as good as dense at step 300; reinit, never, counts as then: no difference that could be sure.
    assert claim(lth, claimed, "validation") == ["21.1 %", "3", "+0.0 ± 0.0 steps", "not borne out"]
    for row in claimed:
        if (row["arm"], row["level"], row["step"]) == ("rewind", 1, 100):
            row["val_accuracy"] = 98.0
    assert claim(lth, claimed, "validation") == ["21.1 %", "3", "+200.0 ± 0.0 steps", "borne out"]
    for row in claimed:                                         # where reinit never falls, it may fall later or never
        if row["arm"] == "reinit":
            row["test_accuracy"] = 99.0
    assert claim(lth, claimed, "Re-initialised networks fall")[2:] == ["not reached",
                                                                       "not tested: not reached within the run"]


def test_fewer_than_three_trials_bear_nothing_out(lth, claimed):
    decisions = [cells[-1] for cells in lth.claims([row for row in claimed if row["trial"] < 2])]
    assert len(decisions) == 7 and all(decision.startswith("not tested") for decision in decisions)
    assert decisions.count("not tested: fewer than three trials") == 6


def test_claims_are_tested_near_their_sparsity_only(lth, rows):
    """Levels at 20 and 10 %: near 21.1 %, not near 13.5 or 3.6 %."""
    assert [cells[1] for cells in lth.claims(rows)] == ["20.0 %", "", "", "10.0 %", "20.0 %", "", ""]
    assert claim(lth, rows, "matching")[-1] == "not tested: no level near 3.6 %"


def test_an_unfinished_run_says_so(lth, rows):
    assert "Unfinished: these are levels 0 to 3 of 4." in lth.summary(rows, {"LEVELS": 4}, "cpu")
    assert "nfinished" not in lth.summary(rows, {"LEVELS": 3}, "cpu")


def test_catching_up_is_with_the_same_trials_dense_network(lth, rows):
    """Dense networks end at 97.0, 97.2 and 97.4; at 50 % rewound ones pass through 96.5, 97.5 - 1 and so on."""
    caught = lth.catch_up(rows, "rewind")
    assert caught[0].tolist() == [300, 300, 300]
    assert caught[1].tolist() == [300, 300, 300]
    assert np.isinf(caught[3]).all()
    for row in rows:
        if (row["arm"], row["level"], row["trial"], row["step"]) == ("rewind", 1, 2, 100):
            row["val_accuracy"] = 97.4
    assert lth.catch_up(rows, "rewind")[1].tolist() == [300, 300, 100]


def test_levels_to_look_at_are_those_of_the_paper(lth, rows):
    assert lth.chosen_levels(rows) == [1, 2, 3]


def test_figures_show_the_records(lth, rows):
    """Points and bands of the comparison figure, and the medians of the early-stopping figure, are the records' own."""
    axes = lth.accuracy_plot(rows, ["rewind", "reinit"], "title").axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["dense (97.20 %)"].get_ydata() == pytest.approx([97.2, 97.2])
    means = {"rewind": [97.2, 97.6, 97.2, 96.2], "reinit": [97.2, 97.2, 96.2, 95.2]}
    for arm, expected in means.items():
        drawn = sorted(zip(lines[arm].get_xdata(), lines[arm].get_ydata(), strict=True), reverse=True)
        assert [x for x, _ in drawn] == list(LEFT)
        assert [y for _, y in drawn] == pytest.approx(expected)
    bands = [band.get_paths()[0].get_extents() for band in axes.collections]
    assert [(band.y0, band.y1) for band in bands] == [pytest.approx((96.0, 97.8)), pytest.approx((95.0, 97.4))]
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] > axes.get_xlim()[1]

    stops, catches = lth.early_stopping_plot(rows).axes
    for axes, arm, expected in ((stops, "rewind", [math.nan] * 4), (catches, "rewind", [300, 300, 300, math.nan]),
                                (catches, "reinit", [300, 300, math.nan, math.nan])):
        line = next(line for line in axes.get_lines() if line.get_label() == arm)
        assert line.get_ydata().tolist() == pytest.approx(expected, nan_ok=True)
    hollow = [line for line in catches.get_lines() if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata().tolist() for line in hollow] == [[10.0], [20.0, 10.0]]
    assert all((line.get_ydata() > 300).all() for line in hollow)


def test_mask_figure_shows_the_share_left_at_each_pixel(lth, rows):
    pruned_at = torch.zeros(3, 784, 300, dtype=torch.uint8)
    pruned_at[:, 5, :150] = 1
    pruned_at[:2, 6, :] = 2
    figure = lth.pixel_plot(rows, pruned_at)
    for axes, expected in zip(figure.axes[:3], ([50, 100], [50, 100 / 3], [50, 100 / 3]), strict=True):
        shares = axes.images[0].get_array()
        assert shares[0, 5:7].tolist() == pytest.approx(expected)
        assert shares.sum() == pytest.approx(78_400 - 200 + sum(expected), rel=1e-6)


def test_transfer_figure_shows_accuracies_and_paired_differences(lth):
    rows = make_rows({"dense": [[97.0] * 3], "rewind": [[97.5, 97.7, 97.9]] * 3, "reinit": [[96.0, 96.1, 96.2]] * 3,
                      "transfer": [[97.0, 97.4, 97.8]] * 3})
    accuracy, difference = lth.transfer_plot(rows, "KMNIST").axes
    drawn = {line.get_label(): line.get_ydata() for line in accuracy.get_lines()}
    assert drawn["ticket found on KMNIST"] == pytest.approx([97.4, 97.4, 97.4, 97.0])  # seaborn sorts by the abscissa
    labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert labels == ["dense (97.00 %)", "ticket found on MNIST", "ticket found on KMNIST", "MNIST's mask, new weights"]
    drawn = {line.get_label(): line.get_ydata() for line in difference.get_lines()}
    assert drawn["minus ticket found on MNIST"] == pytest.approx([0, -0.3, -0.3, -0.3])
    assert drawn["minus MNIST's mask, new weights"] == pytest.approx([0, 1.3, 1.3, 1.3])
    half = 4.303 * statistics.stdev([-0.5, -0.3, -0.1]) / math.sqrt(3)
    band = difference.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((-0.3 - half, max(0, -0.3 + half)), abs=1e-3)
