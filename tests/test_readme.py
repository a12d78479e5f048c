"""The numbers of README.md are those of the committed records."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import SCRIPT
from scipy import stats

README = (SCRIPT.parent / "README.md").read_text()


def interval(differences) -> str:
    """Mean and half the 95 % interval by Student's t, as the README writes them."""
    return f"{np.mean(differences):+.2f} ± {stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1):.2f}"


@pytest.fixture(scope="module")
def records():
    return pd.read_csv(SCRIPT.parent / "results" / "metrics.csv")


def at_early_stop(records: pd.DataFrame, arm: str, level: int) -> np.ndarray:
    """Test accuracy at the lowest validation loss after the first step, by trial."""
    found = records[(records["arm"] == arm) & (records["level"] == level) & (records["step"] > 0)]
    return found.loc[found.groupby("trial")["val_loss"].idxmin(), "test_accuracy"].to_numpy()


def test_the_table_is_recomputed_from_the_default_runs_records(records):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines()
            if re.match(r"\| \d[\d.]* % ", line)]
    assert len(rows) == 7
    dense = at_early_stop(records, "dense", 0)
    for percent, rewind, reinit, ahead, lead, untrained in rows:
        left = records["weights_remaining"]
        (level,) = records.loc[left.map("{:.1f}".format) == f"{float(percent.split()[0]):.1f}", "level"].unique()
        ticket = at_early_stop(records, "rewind" if level else "dense", level)
        start = records[(records["arm"] == ("rewind" if level else "dense")) & (records["level"] == level)
                        & (records["step"] == 0)]
        assert (rewind, untrained) == (f"{ticket.mean():.2f}", f"{start['test_accuracy'].mean():.2f}")
        if level:
            control = at_early_stop(records, "reinit", level)
            expected = f"{control.mean():.2f}", interval(ticket - dense), interval(ticket - control)
            assert (reinit, ahead, lead) == expected


def test_the_controls_leads_are_recomputed_from_their_records():
    controls = pd.read_csv(SCRIPT.parent / "results" / "controls" / "metrics.csv")
    (level,) = controls.loc[controls["weights_remaining"].map("{:.1f}".format) == "7.0", "level"].unique()
    ticket = at_early_stop(controls, "rewind", level)
    begin, end = README.index("What the [controls]"), README.index("of all controls](")
    sentence = " ".join(README[begin:end].split())
    for arm in {*controls["arm"]} - {"dense", "rewind"}:
        assert interval(ticket - at_early_stop(controls, arm, level)) in sentence, arm
