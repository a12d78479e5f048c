"""The real script in a process, as a user runs it, on the real MNIST."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BAR, QUICK, RESULTS, names, read_metrics, run_here, run_script

NUMBERS = ["weights_remaining", "step", "train_loss", "val_loss", "val_accuracy", "test_accuracy"]


@pytest.fixture(scope="module")
def reduced_run(tmp_path_factory):
    """All of MNIST in half a minute, with 6.5 % of the weights left after three levels: folder and process."""
    folder = tmp_path_factory.mktemp("reduced")
    return folder, run_script(folder, "TRIALS=3", "LEVELS=3", "PRUNE_RATE=0.6", "EPOCHS=1", "EVAL_EVERY=100")


def of(rows, arm: str, level: int):
    """Return the rows of an arm's networks at a level."""
    return rows[(rows["arm"] == arm) & (rows["level"] == level)]


def test_a_run_prints_a_line_per_level_and_leaves_its_files(reduced_run):
    """Means of the test accuracies at the lowest validation loss, and the time left. No warning, and no bar without a
    terminal."""
    folder, result = reduced_run
    assert (result.returncode, result.stderr) == (0, "")
    pictures = {path.name for path in folder.glob("*.png") if path.read_bytes().startswith(b"\x89PNG\r\n")}
    assert pictures > {"comparison_plot.png", "accuracy_plot_iterative.png", "accuracy_plot_reinit.png"}
    assert names(folder) - pictures == RESULTS
    rows = read_metrics(folder)
    stops = rows.loc[rows[rows["step"] > 0].groupby(["arm", "level", "trial"])["val_loss"].idxmin()]
    head, *lines = [line.split() for line in result.stdout.splitlines()[1:6]]
    assert head[:5] == ["level", "weights", "remaining", "rewind", "reinit"]
    assert [line[:2] for line in lines] == [["0", "100.0"], ["1", "40.1"], ["2", "16.1"], ["3", "6.5"]]
    for (level, line), (place, arm) in itertools.product(enumerate(lines), ((3, "rewind"), (5, "reinit"))):
        mean = of(stops, arm if level else "dense", level)["test_accuracy"].mean()
        assert float(line[place]) == pytest.approx(mean, abs=0.006)
    left = [float(line[7]) for line in lines]
    assert left[3] == 0 < left[2] < left[1] < 5
    assert result.stdout.endswith(f"\nresults: {folder}\n")


def test_metrics_have_a_row_per_evaluation(reduced_run):
    """One before the first step, too, where there is no training loss yet."""
    rows = read_metrics(reduced_run[0])
    assert list(rows) == ["dataset", "model", "arm", "trial", "level", *NUMBERS]
    steps = [0, 25, 50, 100, 200, 300, 400, 429]
    assert [*rows[["level", "arm", "trial", "step"]].itertuples(index=False, name=None)] == [
        *itertools.product([0], ["dense"], [0, 1, 2], steps),
        *itertools.product([1, 2, 3], ["rewind", "reinit"], [0, 1, 2], steps)]
    # 60 % of the survivors go at each level, 30 % of the output layer's; biases do not count.
    survivors = np.array([235_200, 30_000, 1_000])
    for level in range(4):
        remaining = set(rows[rows["level"] == level]["weights_remaining"])
        assert remaining == {float(f"{100 * survivors.sum() / 266_200:.6g}")}
        survivors -= np.round(survivors * [0.6, 0.6, 0.3]).astype(int)
    assert (rows["train_loss"].isna() == (rows["step"] == 0)).all()
    assert of(rows, "dense", 0).query("step == 0")["val_loss"].gt(1.5).all()            # of chance: 2.3


def test_accuracies_and_that_the_ticket_wins(reduced_run):
    """One epoch gives some 96 %, and fewer weights do as well only from their original initial values. Masked but
    untrained, these already classify."""
    rows = read_metrics(reduced_run[0])
    last, first = rows[rows["step"] == 429], rows[rows["step"] == 0]
    dense, rewind, reinit = (of(last, *which)["test_accuracy"].to_numpy()
                             for which in (("dense", 0), ("rewind", 3), ("reinit", 3)))
    assert min(dense) > 95 and min(rewind) > 94 and min(rewind - reinit) > 2
    assert max(of(last, "rewind", level)["test_accuracy"].mean() for level in (1, 2)) > dense.mean()
    assert of(first, "rewind", 2)["test_accuracy"].min() > of(first, "reinit", 2)["test_accuracy"].max() + 20


def test_what_was_recorded_can_be_had_again_from_the_tickets(reduced_run, lth, mnist):
    """To the last digit: dense networks from theta0, rewound ones from theta0 and masks, reinit from seeds. The
    next level's masks come from the dense or rewound ones."""
    rows = read_metrics(reduced_run[0])
    lth.use(TRIALS=1, EVAL_EVERY=100, EPOCHS=1)
    path = reduced_run[0] / "tickets.pt"
    for arm, trial, level in (("dense", 0, 0), ("rewind", 1, 2), ("reinit", 1, 2)):
        theta0 = lth.initial_weights(lth.generator("init", trial))
        tickets = [lth.weighted_layers(lth.load_ticket(path, trial, at)) for at in (level, level + 1)]
        masks, following = ({f"{name}.weight": layer.weight_mask for name, layer in layers.items()}
                            for layers in tickets)
        for name, layer in tickets[0].items():
            assert torch.equal(layer.weight_orig, theta0[f"{name}.weight"]) and not layer.bias.any()
            assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
        if arm == "reinit":
            theta0 = lth.initial_weights(lth.generator("arm reinit", trial, level))
        start = lth.stack([lth.masked(theta0, masks)])
        with lth.fixed_numerics(torch.device("cpu")):
            _, trained, evaluations = lth.train(start, lth.stack([masks]), mnist, [(arm, trial)], level, BAR)
        again = [[step, *(float(f"{metric[0]:.6g}") for metric in metrics)] for step, *metrics in evaluations]
        found = of(rows, arm, level)
        np.testing.assert_array_equal(found[found["trial"] == trial][NUMBERS[1:]].to_numpy(), again)
        rates = {"fc1.weight": 0.6, "fc2.weight": 0.6, "output.weight": 0.3}
        pruned = lth.prune(lth.pick(trained, 0), masks, rates, "layer")
        assert all(torch.equal(pruned[name], following[name]) for name in following) == (arm != "reinit")


def test_the_mask_table_counts_the_connections_of_the_tickets(reduced_run, lth, mnist):
    folder, _ = reduced_run
    table = pd.read_csv(folder / "mask.csv").set_index(["level", "pixel"])
    for level in range(4):
        masks = [lth.load_ticket(folder / "tickets.pt", trial, level).fc1.weight_mask for trial in range(3)]
        shares = torch.cat(masks).mean(0)
        np.testing.assert_allclose(table.loc[level, "share_remaining"], shares, atol=6e-5)
        np.testing.assert_allclose(table.loc[level, "mean_intensity"], mnist["train"][0].mean(0).flatten(), atol=6e-5)


def test_a_ticket_brought_back_to_where_it_was_found_is_the_ticket(lth, undrawn, tmp_path):
    """To the last digit, in a run of all arms with late rewinding, each from its step on."""
    options = (*QUICK, "BATCH_SIZE=100", "EVAL_EVERY=4", "REWIND_STEP=4")
    run_here(lth, tmp_path / "first", *options)
    run_here(lth, tmp_path / "second", *options, f"ARMS={','.join(lth.ARM_TABLE)}",
             f"TICKETS_FROM={tmp_path / 'first' / 'tickets.pt'}")
    rows = read_metrics(tmp_path / "second")
    starts = rows[rows["level"] == 2].groupby("arm")["step"].min()
    from_0 = {"reinit", "keep_signs", "magnitude_at_init", "small_dense"}
    assert set(starts.index[starts == 0]) == from_0 and set(starts) == {0, 4}
    expected = of(read_metrics(tmp_path / "first"), "rewind", 2)[NUMBERS].to_numpy()
    np.testing.assert_array_equal(of(rows, "transfer", 2)[NUMBERS].to_numpy(), expected)
