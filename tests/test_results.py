"""Measures, verdicts, tables and figures, on records made for the purpose so that the right answer is known."""

import math
import statistics

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

LEFT = (100.0, 51.3, 21.1, 13.5, 7.0, 3.6)
STEPS = tuple(range(100, 2001, 100))                        # 20 evaluations: the last 5 % are steps 1,900 and 2,000


def make_records(accuracy: dict, stop: dict | None = None, remaining=LEFT, own=None, steps=STEPS) -> pd.DataFrame:
    """Records of arms whose test accuracy at early stop is given by arm as [trial] (every level) or [level - 1][trial].

    Early stop, the lowest validation loss, is at `stop[arm]`, by trial, else at step 1,000 of 2,000. There the test
    accuracy is as given, before and after 5 points lower. Validation accuracy climbs evenly to 98 at the last step.
    Before the first step, accuracy is 10 + level, and the validation loss 0, lower than ever after.
    """
    rows = []
    for level, left in enumerate(remaining):
        for arm, values in accuracy.items():
            if (arm == "dense") != (level == 0):
                continue
            values = np.array(values, float)
            for trial, value in enumerate(values if values.ndim == 1 else values[max(level - 1, 0)]):
                at = (stop or {}).get(arm, [1000] * 99)[trial]
                same = {"dataset": "MNIST", "model": "mlp", "arm": arm, "trial": trial, "level": level,
                        "weights_remaining": (own or {}).get(arm, {}).get(level, left)}
                rows.append(same | {"step": 0, "train_loss": math.nan, "val_loss": 0.0, "val_accuracy": 99.0,
                                    "test_accuracy": 10.0 + level})
                rows += [same | {"step": step, "train_loss": 0.1, "val_loss": 0.1 if step == at else 0.2,
                                 "val_accuracy": round(98 - (2000 - step) / 1000, 4),
                                 "test_accuracy": value if step == at else value - 5} for step in steps]
    return pd.DataFrame(rows)


@pytest.fixture
def records():
    """Tickets lead by 0.4, 0.3 and 0.5 down to 7.0 % and are 1 below at 3.6 %; reinit is 0.8 to 1.2 below."""
    lead, lag = np.array([0.4, 0.3, 0.5]), np.array([-1.0, -0.8, -1.2])
    dense = np.array([97.0, 97.2, 97.4])
    return make_records({"dense": dense, "rewind": [dense + lead] * 4 + [dense + lag], "reinit": dense + lag})


@pytest.fixture
def networks(lth, records):
    return lth.measure(records)


# ---- Measures --------------------------------------------------------------------------------------------------------

def test_measures_are_those_of_the_records(lth, records):
    """Recomputed by plain loops: the evaluation with the lowest validation loss, without the one before any step."""
    changed = records.copy()
    place = changed.index[(changed["arm"] == "rewind") & (changed["level"] == 2) & (changed["trial"] == 1)
                          & (changed["step"] == 300)]
    changed.loc[place, "val_loss"] = 0.05
    found = lth.measure(changed)
    assert len(found) == 3 * (1 + 5 + 5)
    for (arm, level, trial), row in found.iterrows():
        mine = [row for _, row in changed.iterrows() if (row["arm"], row["level"], row["trial"]) == (arm, level, trial)]
        start, *later = sorted(mine, key=lambda row: row["step"])
        stop = min(later, key=lambda row: row["val_loss"])
        assert row["start_accuracy"] == round(1e4 * start["test_accuracy"])
        assert row["stop_accuracy"] == round(1e4 * stop["test_accuracy"])
        assert row["stop_step"] == stop["step"] == (300 if (arm, level, trial) == ("rewind", 2, 1) else 1000)
        assert row["final_accuracy"] == round(1e4 * later[-1]["test_accuracy"])
        assert row["weights_remaining"] == LEFT[level]
        assert row["catch_up_step"] == 2000 and row["catch_up_step_reached"]


@pytest.mark.parametrize(("step", "reached"), [(1700, True), (1800, True), (1900, False), (2000, False)])
def test_an_early_stop_near_the_end_counts_as_not_reached(lth, step, reached):
    """Within the last 5 % of the training, or at one of its last two evaluations; its accuracy still counts."""
    found = lth.measure(make_records({"dense": [97.0] * 3, "rewind": [97.5] * 3}, {"rewind": [step] * 3}))
    assert found.loc["rewind", "stop_step_reached"].eq(reached).all()
    assert found.loc["rewind", "stop_step"].eq(step).all() and found.loc["rewind", "stop_accuracy"].eq(975_000).all()


@pytest.mark.parametrize(("step", "reached"), [(1890, True), (1900, False), (1940, False), (1990, False)])
def test_of_many_evaluations_those_in_the_last_twentieth_count_as_the_end(lth, step, reached):
    records = make_records({"dense": [97.0] * 3, "rewind": [97.5] * 3}, {"rewind": [step] * 3}, LEFT[:2],
                           steps=range(10, 2001, 10))
    assert lth.measure(records).loc["rewind", "stop_step_reached"].eq(reached).all()


def test_of_few_evaluations_the_last_two_count_as_the_end(lth):
    """Evaluations every 500 of 2,000 steps: 1,500 is no early stop, though it is not in the last 5 %."""
    records = make_records({"dense": [97.0] * 3, "rewind": [97.5] * 3}, {"rewind": [1500] * 3, "dense": [1000] * 3})
    found = lth.measure(records[records["step"] % 500 == 0])
    assert not found.loc["rewind", "stop_step_reached"].any()
    assert found.loc["dense", "stop_step_reached"].all()


def test_catching_up_is_with_the_same_trials_dense_network(lth, records):
    """The first step, after the start, with the validation accuracy at which the trial's dense network ends."""
    arm, step = records["arm"], records["step"]
    records.loc[(arm == "rewind") & (records["trial"] == 2) & (step == 400), "val_accuracy"] = 98.0
    records.loc[(arm == "reinit") & (step == 2000), "val_accuracy"] = 97.98
    found = lth.measure(records)
    assert found.loc[("rewind", 3), "catch_up_step"].tolist() == [2000, 2000, 400]
    assert not found.loc["reinit", "catch_up_step_reached"].any()
    assert found.loc["reinit", "catch_up_step"].eq(2000).all()


def test_levels_are_those_nearest(lth, networks):
    assert lth.levels_near(networks, 21.1) == [2]
    assert lth.levels_near(networks, 20, 22, 3.0, 100) == [1, 2, 5]
    assert lth.levels_near(lth.measure(make_records({"dense": [97.0]}, remaining=LEFT[:1])), 21.1) == [0]


# ---- Decisions -------------------------------------------------------------------------------------------------------

# Two-sided 95 % quantiles of Student's t, from the tables in statistics books.
@pytest.mark.parametrize(("trials", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_interval_is_students(lth, trials, quantile):
    differences = np.random.default_rng(trials).normal(1, 2, trials)
    mean, half = lth.interval(differences)
    assert mean == pytest.approx(statistics.mean(differences))
    assert half == pytest.approx(quantile * statistics.stdev(differences) / math.sqrt(trials), rel=2e-4)


def test_one_trial_has_no_interval(lth):
    mean, half = lth.interval(np.array([0.5]))
    assert mean == 0.5 and math.isnan(half)
    assert lth.points(np.array([0.5])) == "+0.50 points"


@pytest.mark.parametrize(("differences", "margin", "answer"), [
    ([0.3, 0.4, 0.5], 0, "yes"), ([-0.3, -0.4, -0.5], 0, "no"), ([-0.1, 0.4, 0.5], 0, "undecided"),
    ([0.5, 0.5], 0, "not tested"), ([0.5], 0, "not tested"), ([0.4, 0.4, 0.4], 0, "undecided"),
    ([-0.01, 0.0, 0.01], 0.2, "yes"), ([-0.15, -0.14, -0.16], 0.2, "yes"), ([-0.3, -0.31, -0.29], 0.2, "no"),
    ([-0.3, -0.1, 0.1], 0.2, "undecided"), ([0.0, 0.0, 0.0], 0.2, "undecided")])
def test_decisions_by_the_whole_interval(lth, differences, margin, answer):
    """An interval of width 0 decides nothing; clearly below 0 but within the margin is non-inferior."""
    assert lth.decide(np.array(differences), margin) == answer


@pytest.mark.parametrize(("trials", "sooner", "decided"), [
    (5, 5, True), (5, 4, False), (6, 6, True), (6, 5, False), (7, 7, True), (7, 6, False), (8, 7, True), (8, 6, False),
    (9, 8, True), (9, 7, False), (10, 9, True), (10, 8, False), (4, 4, False), (3, 3, False)])
def test_moments_not_reached_are_counted_not_imputed(lth, trials, sooner, decided):
    """The ticket stops at step 500, the control never, but for the trials in which it is the other way round."""
    steps, reached = np.full((2, trials), 500), np.full((2, trials), True)
    reached[1, :sooner] = reached[0, sooner:] = False
    steps[~reached] = 2000
    assert lth.decide_moments(steps, reached) == ("yes" if decided else "undecided")
    assert lth.decide_moments(steps[::-1], reached[::-1]) == ("no" if decided else "undecided")


def test_ties_and_pairs_never_reached_count_for_neither_side_and_stay_in_n(lth):
    """Five sooner of six decide nothing if the sixth is a tie, or reached by neither: 5 of 6, not 5 of 5."""
    for last_steps, last_reached in (([500, 500], [True, True]), ([2000, 2000], [False, False])):
        steps = np.array([[500] * 5 + last_steps[:1], [2000] * 5 + last_steps[1:]])
        reached = np.array([[True] * 5 + last_reached[:1], [False] * 5 + last_reached[1:]])
        assert lth.count_sooner(steps, reached) == (5, 0)
        assert lth.decide_moments(steps, reached) == "undecided"
        assert lth.decide_moments(steps[:, :5], reached[:, :5]) == "yes"


def test_moments_that_all_reached_are_decided_by_students_t(lth):
    reached = np.full((2, 5), True)
    assert lth.decide_moments(np.array([[500, 600, 500, 400, 500], [900, 900, 800, 900, 1000]]), reached) == "yes"
    assert lth.decide_moments(np.array([[500] * 5, [600, 700, 3000, 500, 400]]), reached) == "undecided"
    assert lth.decide_moments(np.array([[500] * 5, [700] * 5]), reached) == "undecided"         # no spread: nothing


def test_moments_in_words(lth):
    reached = np.full((2, 4), True)
    steps = np.array([[400, 500, 600, 500], [1000, 900, 1100, 1000]])
    half = 3.182 * statistics.stdev([600, 400, 500, 500]) / 2
    assert lth.compare_moments(steps, reached, True) == f"500 ± {half:.0f} steps sooner, 50 % earlier"
    assert lth.compare_moments(steps, reached, False).endswith(", 2.00 times")
    reached[1, :3] = False
    assert lth.compare_moments(steps, reached, False) == "sooner in 4 of 4, medians 500 and ≥ 1000, ≥ 2.00 times"
    steps[1, :3] = [1287, 1287, 1287]
    steps[0] = 400
    assert lth.compare_moments(steps, reached, False).endswith("medians 400 and ≥ 1287, ≥ 3.21 times")    # 3.2175
    steps[0], steps[1] = [400, 500, 600, 500], [1000, 900, 1100, 1000]
    reached[0, :3] = False
    assert lth.compare_moments(steps, reached, False) == "sooner in 1 of 4, medians ≥ 500 and ≥ 1000"


def test_equal_counts_of_images_are_ties_whatever_their_order(lth):
    """Tickets that are a permutation of the dense networks are neither ahead nor behind: differences are of whole
    numbers, so that their mean is zero to the last bit."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        dense = generator.integers(9600, 9900, 5) / 100
        accuracy = {"dense": dense, "rewind": generator.permutation(dense)}
        found = lth.measure(make_records(accuracy, remaining=LEFT[:2]))
        assert (1e4 * lth.leads(found, "rewind", "dense")[1]).round().sum() == 0
        assert abs(lth.interval(lth.leads(found, "rewind", "dense")[1])[0]) < 1e-12
    same = lth.measure(make_records({"dense": [97.3] * 5, "rewind": [97.6] * 5}))
    assert lth.matching(same, "rewind") == ["undecided"] * 5                    # 0.3 in each: without any spread


# ---- Headline and verdict --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("answers", "expected"), [
    ("mmmmm", (4, None)), ("mmubb", (1, 3)), ("mbmbb", (2, 3)), ("bbbbb", (None, 0)), ("uuuuu", (None, None)),
    ("ubmub", (2, 4)), ("mbbmu", (3, None)), ("", (None, None))])
def test_headline(lth, answers, expected):
    words = {"m": "matches", "b": "below", "u": "undecided"}
    assert lth.headline([words[answer] for answer in answers]) == expected


def test_verdict_names_the_right_levels(lth, networks):
    text = "\n".join(lth.verdict(networks))
    assert "Dense networks reach 97.20 % test accuracy at early stop (mean of 3 trials, 97.00 to 97.40)." in text
    assert "rewound to original weights match the dense ones down to 7.0 % of the weights and are below" in text
    assert "re-initialised at random match the dense ones at no level and are below them from 51.3 % on" in text
    half = 4.303 * statistics.stdev([1.4, 1.1, 1.7]) / math.sqrt(3)
    assert "At 21.1 % of the weights, rewound tickets minus reinit (re-initialised at random): " \
        f"+1.40 ± {half:.2f} points" in text


def test_verdict_of_few_trials_decides_nothing(lth):
    for trials in (1, 2):
        text = "\n".join(lth.verdict(lth.measure(make_records({"dense": [97.0] * trials, "rewind": [97.5] * trials}))))
        assert "Fewer than three trials decide nothing." in text and "match" not in text


# ---- Claims and questions --------------------------------------------------------------------------------------------

def claim(lth, networks, words: str) -> list[str]:
    """The cells of the one claim that begins so, without its sentence and the paper's figure."""
    (cells,) = [cells for cells in lth.claims(networks) if cells[0].startswith(words)]
    return [*cells[1:3], *cells[4:]]


def test_claims_are_decided_at_early_stop(lth, networks, records):
    """By the accuracies there. After the last step all are 5 points lower, which decides nothing."""
    lead = 4.303 * statistics.stdev([0.4, 0.3, 0.5]) / math.sqrt(3)
    assert claim(lth, networks, "The ticket is more") == ["13.5 %", "3", f"+0.40 ± {lead:.2f} points", "borne out"]
    assert claim(lth, networks, "The ticket is as")[0] == "3.6 %"
    assert claim(lth, networks, "The ticket is as")[-1] == "contradicted"
    for arm, words in (("dense", "Re-initialised networks are less accurate than the dense"),
                       ("rewind", "Re-initialised networks are less accurate than the ticket")):
        assert claim(lth, networks, words)[-1] == "borne out", arm
    records.loc[records["step"] == 2000, "test_accuracy"] = 50.0 + records["trial"] * (records["arm"] == "reinit")
    assert lth.claims(lth.measure(records)) == lth.claims(networks)


def test_every_claim_can_be_contradicted(lth):
    """Where reinit, oneshot and shuffle are what the ticket should be."""
    dense, better, worse = ([97.0, 97.2, 97.4], [97.8, 98.1, 98.3], [96.0, 96.3, 96.1])
    stops = {"dense": [500, 600, 500], "rewind": [900, 1100, 1000], "reinit": [500, 500, 600]}
    accuracy = {"dense": dense, "rewind": worse, "reinit": better, "oneshot": better, "shuffle": better}
    records = make_records(accuracy, stops)
    caught = records["arm"].eq("reinit") & records["step"].ge(500 + 100 * records["trial"])
    records.loc[caught, "val_accuracy"] = 98.5
    claims = lth.claims(lth.measure(records))
    assert len(claims) == 9 and [cells[-1] for cells in claims] == ["contradicted"] * 9
    assert [cells[3] for cells in claims] == ["38 % earlier", "more than 0.3 points", "back to dense", "from here",
                                              "2.51 times", "0.5 points", "(curves)", "(curves)", "(our own claim)"]


def test_claims_about_steps_use_what_was_reached(lth):
    accuracy = {"dense": [97.0] * 5, "rewind": [97.5] * 5, "reinit": [96.0] * 5}
    stops = {"dense": [1000, 1100, 900, 1000, 1000], "rewind": [500, 600, 600, 500, 500], "reinit": [2000] * 5}
    networks = lth.measure(make_records(accuracy, stops))
    half = stats.sem([500, 500, 300, 500, 500]) * stats.t.ppf(0.975, 4)
    assert claim(lth, networks, "The ticket stops") == ["21.1 %", "5", f"460 ± {half:.0f} steps sooner, 46 % earlier",
                                                        "borne out"]
    assert claim(lth, networks, "Re-initialised networks stop") == [
        "21.1 %", "5", "sooner in 5 of 5, medians 500 and ≥ 2000, ≥ 4.00 times", "borne out"]


def test_claims_are_not_tested_where_there_is_nothing_to_test(lth, networks):
    assert claim(lth, networks, "Networks pruned in one shot") == ["", "", "", "not tested: no oneshot networks"]
    two = lth.measure(make_records({"dense": [97.0] * 2, "rewind": [97.5, 97.6], "reinit": [96.0, 96.1]}))
    assert {cells[-1] for cells in lth.claims(two)} == {
        "not tested: fewer than three trials", "not tested: no oneshot networks", "not tested: no shuffle networks"}
    few = lth.measure(make_records({"dense": [97.0] * 3, "rewind": [97.5] * 3}, remaining=(100.0, 50.0)))
    assert claim(lth, few, "The ticket is as")[-1] == "not tested: no level near 3.6 %"
    dense = lth.measure(make_records({"dense": [97.0] * 3}, remaining=(100.0,)))
    assert {cells[-1] for cells in lth.claims(dense)} == {"not tested: no rewind networks"}


def test_matching_has_a_margin_of_a_fifth_of_a_point(lth):
    """0.1 points below the dense networks matches, with an interval above -0.2; and is less accurate all the same."""
    dense, noise = np.array([97.0, 97.2, 97.4]), np.array([0.02, -0.02, 0.0])
    networks = lth.measure(make_records({"dense": dense, "rewind": dense - 0.1 + noise}))
    assert lth.matching(networks, "rewind") == ["matches"] * 5
    assert claim(lth, networks, "The ticket is as")[-1] == "borne out"
    assert claim(lth, networks, "The ticket is more")[-1] == "contradicted"


def test_a_level_far_from_the_claims_density_is_not_taken_for_it(lth):
    networks = lth.measure(make_records({"dense": [97.0] * 3, "rewind": [97.5] * 3}, remaining=(100.0, 26.5, 4.6)))
    assert claim(lth, networks, "The ticket stops")[-1] == "not tested: no level near 21.1 %"
    assert claim(lth, networks, "The ticket is as")[-1] == "not tested: no level near 3.6 %"


def test_questions_are_answered_by_their_kind(lth):
    """Difference: is the ticket ahead? Enough: is the arm as good? No loss (finetune): is the ticket as good?"""
    ticket = np.array([97.0, 97.2, 97.4])
    noise = np.array([0.02, -0.02, 0.0])
    networks = lth.measure(make_records({
        "dense": ticket, "rewind": ticket, "reinit": ticket - 1 + noise, "permute": ticket + noise,
        "signs": ticket + noise, "finetune": ticket + 1 + noise, "transfer": ticket - 1 + noise}))
    answers = {cells[1].split()[0]: cells[2:] for cells in lth.questions(networks, [2, 4])}
    assert {arm: cells[0].rpartition(": ")[2] for arm, cells in answers.items()} == {
        "reinit": "yes", "permute": "undecided", "signs": "yes", "finetune": "no", "transfer": "no"}
    assert answers["reinit"][0].startswith("+1.00 ± ") and answers["finetune"][0].startswith("-1.00 ± ")


def test_a_small_network_that_keeps_more_weights_is_not_compared(lth):
    ticket = np.array([97.0, 97.2, 97.4])
    accuracy = {"dense": ticket, "rewind": ticket, "small": ticket - 1 + np.array([0.1, 0, -0.1])}
    networks = lth.measure(make_records(accuracy, own={"small": {4: 7.6, 5: 4.0}}))
    (cells,) = lth.questions(networks, [4, 5])
    assert cells[2].endswith("yes") and cells[3] == "not compared, it has 4.0 % of the weights"
    assert "(with 4.0 %)" in lth.tables(networks)


# ---- How often the answers are wrong ---------------------------------------------------------------------------------

DRAWS = 2000
TOO_OFTEN = stats.binom.ppf(0.999, DRAWS, 0.05)             # of a rate of 5 %, by chance, one test in a thousand


@pytest.mark.parametrize("trials", [5, 10])
@pytest.mark.parametrize(("margin", "truth", "wrong"), [(0, 0.0, "yes"), (0, 0.0, "no"), (0.2, -0.2, "yes"),
                                                        (0.2, 0.0, "no")])
def test_answers_about_accuracy_are_wrong_at_most_once_in_twenty(lth, trials, margin, truth, wrong):
    """At the least favourable truth: no difference; for matching, just the margin below, or level."""
    differences = np.random.default_rng(trials).normal(truth, 0.25, (DRAWS, trials))
    assert sum(lth.decide(row, margin) == wrong for row in differences) <= TOO_OFTEN


@pytest.mark.parametrize("trials", [5, 10])
@pytest.mark.parametrize("late", [800, 1300, 2500])
def test_answers_about_steps_are_wrong_at_most_once_in_twenty(lth, trials, late):
    """Both moments are drawn alike around `late`, in steps of 100, of which those from 1,900 on are not reached: few,
    some or nearly all."""
    steps = np.random.default_rng(trials).normal(late, 400, (DRAWS, 2, trials)).round(-2).clip(100, 1900)
    answers = [lth.decide_moments(pair, pair < 1900) for pair in steps]
    assert answers.count("yes") <= TOO_OFTEN and answers.count("no") <= TOO_OFTEN
    assert "undecided" in answers


def test_how_often_the_headline_is_off(lth):
    """Sixteen levels, tickets level with the dense networks down to the tenth, then 0.5 points below; trials spread by
    0.15 points, one draw of dense networks for all levels. The README states these rates."""
    generator, off = np.random.default_rng(1), {5: [0, 0], 10: [0, 0]}
    truth = np.array([0.0] * 10 + [-0.5] * 6)
    for trials, counts in off.items():
        for _ in range(500):
            dense = generator.normal(0, 0.1, trials)
            leads = truth[:, None] + generator.normal(0, 0.11, (16, trials)) - dense
            answers = [lth.decide(lead, lth.MATCHING_MARGIN) for lead in leads]
            words = [{"yes": "matches", "no": "below"}.get(answer, answer) for answer in answers]
            matches, below = lth.headline(words)
            counts[0] += matches is not None and matches > 9                    # claims too much
            counts[1] += below is not None and below < 10                       # finds it below too early
    print({trials: [count / 500 for count in counts] for trials, counts in off.items()})
    assert all(count <= 25 for counts in off.values() for count in counts)


# ---- summary.md ------------------------------------------------------------------------------------------------------

def table(text: str, head: str) -> list[list[str]]:
    """The cells of the table under a line that begins so."""
    lines = text[text.index(f"\n{head}"):].splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|"))
    last = next(n for n, line in enumerate(lines) if n > first and not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:last]]


def test_summary_has_a_row_per_level(lth, records, networks):
    text = lth.summary(networks, records, {"LEVELS": 5, "SEED": 1}, "cpu", ["a note"])
    accuracy = table(text, "Test accuracy at early stop, %")
    assert len(accuracy) == 2 + len(LEFT) and len({len(row) for row in accuracy}) == 1
    assert accuracy[0] == ["level", "weights remaining", "rewind", "reinit"]
    assert accuracy[2][2] == accuracy[2][3] == "97.20 (97.00 to 97.40)"
    half = [4.303 * statistics.stdev(differences) / math.sqrt(3) for differences in ([0.4, 0.3, 0.5], [1.0, 0.8, 1.2])]
    assert accuracy[4] == ["2", "21.1 %", f"97.60 (97.40 to 97.90); +0.40 ± {half[0]:.2f} points, matches",
                           f"96.20 (96.00 to 96.40); -1.00 ± {half[1]:.2f} points, below"]
    assert table(text, "Early stop: median step")[4] == ["2", "21.1 %", "1000", "1000"]
    assert table(text, "Test accuracy before the first step")[4] == ["2", "21.1 %", "12.00", "12.00"]
    assert table(text, "Test accuracy after the last step")[4] == ["2", "21.1 %", "92.60", "91.20"]
    assert table(text, "The ticket's lead")[4][3].startswith("+1.40 ± ")
    assert "SEED = 1" in text.splitlines() and "a note" in text.splitlines()
    assert f"sha256 sum {lth.script_sum()}" in text
    assert all(f"- {sentence}" in text.splitlines() for sentence in lth.verdict(networks))
    assert "nfinished" not in text
    assert "Unfinished: these are levels 0 to 5 of 6." in lth.summary(networks, records, {"LEVELS": 6}, "cpu", [])


def test_medians_say_where_they_are_bounds(lth):
    records = make_records({"dense": [97.0] * 3, "rewind": [97.5] * 3}, {"rewind": [800, 2000, 1900]})
    text = lth.summary(lth.measure(records), records, {"LEVELS": 5}, "cpu", [])
    assert table(text, "Early stop: median step")[4][2] == "≥ 1900, 2 not reached"


def test_dense_networks_alone_have_a_summary(lth):
    records = make_records({"dense": [97.0, 97.2, 97.4]}, remaining=LEFT[:1])
    text = lth.summary(lth.measure(records), records, {"LEVELS": 0}, "cpu", [])
    assert table(text, "Test accuracy at early stop, %")[2] == ["0 (dense)", "100.0 %", "97.20 (97.00 to 97.40)"]
    assert "mean of 3 trials" in text and "ticket" not in text.split("\n\n")[1]


# ---- Figures ---------------------------------------------------------------------------------------------------------

def draw(lth, records, **changes):
    """All figures, by name."""
    with matplotlib.rc_context(lth.STYLE):
        return lth.draw_figures(records, lth.measure(records), torch.zeros(3, 784, 300, dtype=torch.uint8))


def test_figures_show_the_records(lth, records):
    """Points and bands of the comparison figure, and the medians of the early-stopping figure, are the records' own."""
    figures = draw(lth, records)
    (axes,) = figures["comparison_plot.png"].axes
    title = figures["comparison_plot.png"].get_suptitle()
    assert title.splitlines()[0] == "Lottery tickets on MNIST, LeNet-300-100, 3 trials"
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["dense network (97.20 %)"].get_ydata() == pytest.approx([97.2, 97.2])
    for label, expected in (("rewound to original weights", [97.2, 97.6, 97.6, 97.6, 97.6, 96.2]),
                            ("re-initialised at random", [97.2] + [96.2] * 5)):
        drawn = sorted(zip(lines[label].get_xdata(), lines[label].get_ydata(), strict=True), reverse=True)
        assert [x for x, _ in drawn] == list(LEFT)
        assert [y for _, y in drawn] == pytest.approx(expected)
    bands = [band.get_paths()[0].get_extents() for band in axes.collections]
    assert [(band.y0, band.y1) for band in bands] == [pytest.approx((96.0, 97.9)), pytest.approx((96.0, 97.4))]
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] > axes.get_xlim()[1]
    (axes,) = figures["supermask_plot.png"].axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert sorted(lines["rewound to original weights"].get_ydata()) == [10, 11, 12, 13, 14, 15]
    assert lines["chance (10 %)"].get_ydata() == pytest.approx([10, 10])


def test_moments_in_the_figure_are_medians_and_missing_where_most_missed(lth):
    accuracy = {"dense": [97.0] * 3, "rewind": [97.5] * 3, "reinit": [96.0] * 3}
    records = make_records(accuracy, {"rewind": [400, 700, 1900], "reinit": [2000, 1900, 800]})
    stops, _ = draw(lth, records)["early_stopping_plot.png"].axes
    drawn = {line.get_label(): {x: y for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
                                if not np.isnan(y)} for line in stops.get_lines()}
    assert drawn["rewound to original weights"] == {100: 1000} | dict.fromkeys(LEFT[1:], 700)
    assert drawn["re-initialised at random"] == {100: 1000}


def test_a_panel_that_nothing_reached_is_left_out(lth, records):
    """Nobody stops early, so only the panel about catching up is left; nobody catches up either: no figure."""
    late = make_records({"dense": [97.0] * 3, "rewind": [97.5] * 3}, {"rewind": [2000] * 3, "dense": [2000] * 3})
    (axes,) = draw(lth, late)["early_stopping_plot.png"].axes
    assert axes.get_title() == lth.MOMENTS["catch_up_step"]
    late.loc[late["arm"] == "rewind", "val_accuracy"] = 50.0
    assert "early_stopping_plot.png" not in draw(lth, late)


def test_many_arms_are_drawn_in_two_panels_each_with_the_ticket(lth):
    arms = [arm for arm in lth.REGISTRY if arm != "dense"]
    records = make_records({"dense": [97.0] * 3} | {arm: [97.0 + n / 10] * 3 for n, arm in enumerate(arms)})
    figures = draw(lth, records)
    weights, mask = figures["comparison_plot.png"].axes
    shown = [{line.get_label() for line in axes.get_lines()} for axes in (weights, mask)]
    labels = {arm: lth.REGISTRY[arm].label for arm in arms}
    assert shown[0] & shown[1] >= {labels["rewind"], labels["reinit"]}
    assert set(labels.values()) <= shown[0] | shown[1]
    assert len({(lth.REGISTRY[arm].colour, lth.REGISTRY[arm].marker) for arm in arms}) == len(arms) == 10
    assert len({lth.REGISTRY[arm].colour for arm in arms}) == len({lth.REGISTRY[arm].marker for arm in arms}) == 10
    untrained = {line.get_label() for axes in figures["supermask_plot.png"].axes for line in axes.get_lines()}
    assert labels["finetune"] not in untrained


def test_an_arm_that_controls_both_is_drawn_in_both_panels(lth, monkeypatch):
    arms = [arm for arm in lth.REGISTRY if arm != "dense"][:6]
    own = lth.REGISTRY["signs"]._replace(label="an arm of one's own", controls="both")
    monkeypatch.setitem(lth.REGISTRY, "own", own)
    records = make_records({"dense": [97.0] * 3} | {arm: [97.0 + n / 10] * 3 for n, arm in enumerate([*arms, "own"])})
    for axes in draw(lth, records)["comparison_plot.png"].axes:
        assert "an arm of one's own" in {line.get_label() for line in axes.get_lines()}


def test_mask_figure_shows_the_share_left_at_each_place(lth, networks):
    """Of a pixel's weights, and of a place of the LeNet's first kernels."""
    for side, outputs in ((28, 300), (5, 6)):
        pruned_at = torch.zeros(3, side * side, outputs, dtype=torch.uint8)
        pruned_at[:, 5, :outputs // 2] = 1
        pruned_at[:2, 6, :] = 2
        figure = lth.mask_plot(networks, pruned_at, "title")
        for axes, expected in zip(figure.axes[:4], ([50, 100], *3 * [[50, 100 / 3]]), strict=True):
            shares = axes.images[0].get_array()
            assert shares.shape == (side, side)
            assert shares.flatten()[5:7].tolist() == pytest.approx(expected)
            assert shares.sum() == pytest.approx(100 * side**2 - 200 + sum(expected), rel=1e-6)


def test_transfer_figure_shows_accuracies_and_paired_differences(lth):
    rewind, transfer = [97.5, 97.7, 97.9], [97.0, 97.4, 97.8]
    records = make_records({"dense": [97.0] * 3, "rewind": rewind, "reinit": [96.0, 96.1, 96.2], "transfer": transfer})
    accuracy, difference = draw(lth, records)["transfer_plot.png"].axes
    drawn = {line.get_label(): line.get_ydata() for line in accuracy.get_lines()}
    assert sorted(drawn["ticket found elsewhere"]) == pytest.approx([97.0] + [97.4] * 5)
    drawn = {line.get_label(): line.get_ydata() for line in difference.get_lines()}
    assert drawn["minus ticket found here"] == pytest.approx([0] + [-0.3] * 5)
    assert drawn["minus mask found here, new weights"] == pytest.approx([0] + [1.3] * 5)
    half = 4.303 * statistics.stdev([-0.5, -0.3, -0.1]) / math.sqrt(3)
    band = difference.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx((-0.3 - half, max(0, -0.3 + half)), abs=1e-3)


def test_titles_are_not_wider_than_their_figures(lth, records):
    """The longest: Fashion-MNIST, a thousand trials; a figure of one panel is the narrowest."""
    with matplotlib.rc_context(lth.STYLE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lth, "trials_in_words", lambda _: "1000 trials")
        for some in (records, records[records["arm"] != "reinit"]):
            figures = lth.draw_figures(some.assign(dataset="FashionMNIST"), lth.measure(some), torch.zeros(3, 784, 300))
            assert len(figures) >= 6
            for name, figure in figures.items():
                figure.draw_without_rendering()
                title = next(text for text in figure.texts if text.get_text() == figure.get_suptitle())
                box = title.get_window_extent()
                assert box.x0 >= 0 and box.x1 <= figure.bbox.width, name


def test_drawing_leaves_a_notebooks_own_plotting_alone(lth, records):
    before = dict(matplotlib.rcParams), matplotlib.get_backend()
    draw(lth, records)
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before
