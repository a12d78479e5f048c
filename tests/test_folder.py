"""A results folder holds one run: it goes on, is drawn again, or makes room for another. Nothing is lost or mixed."""

import contextlib
import dataclasses
import itertools
import shutil
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import QUICK, SCRIPT, at_each_level, check_same_results, contents, ends_at, names, read_metrics, run_here
from matplotlib.figure import Figure

CPU = torch.device("cpu")
MOVED = "the results of an earlier run are now in"
COMPUTES = ("\n# Here ends", "\n# edited\n# Here ends")     # changes the text of what computes, but no number
DRAWS = ("\n# ---- Main", "\n# edited\n# ---- Main")


def sketch(results) -> dict[str, Figure]:
    """In the place of the figures: two, one of them of masks where there are some."""
    drawn = ["comparison_plot.png"] + ["mask_plot.png"] * (results.first_layer is not None)
    return {name: Figure((1, 1)) for name in drawn}


def run_until(lth, level: int, folder: Path, *arguments: str) -> None:
    """Run until the training of a level begins: there comes Ctrl-C."""
    with ends_at(lth, level, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run_here(lth, folder, *arguments)


def the_previous(folder: Path) -> dict[str, bytes]:
    """What was moved to previous/, at the one time when something was."""
    (previous,) = (folder / "previous").iterdir()
    return contents(previous)


def test_the_same_command_again_trains_nothing_and_draws_again(lth, few, tmp_path, capsys):
    """So a finished run's checkpoint is read back, too. Files are as readable as umask says."""
    lth.use(draw_figures=sketch)
    (tmp_path / "README.md").touch()
    run_here(lth, tmp_path, *QUICK)
    first = contents(tmp_path)
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "README.md").stat().st_mode}
    (tmp_path / "summary.md").unlink()
    (tmp_path / "comparison_plot.png").unlink()
    capsys.readouterr()
    lth.use(train=None)
    run_here(lth, tmp_path, *QUICK)
    said = capsys.readouterr().out
    assert said.startswith("nothing is left to train: summary and figures are drawn again from ")
    assert "(without it, the same command trains afresh)\n" in said and "weights remaining   " not in said
    assert contents(tmp_path) == first and names(tmp_path) == first.keys()              # to the byte; no previous/


def test_levels_raised_go_on_and_lowered_show_the_first(lth, undrawn, tmp_path, capsys):
    """In two goes as in one; fewer levels in between are what a run of so many gives, and nothing is lost."""
    arguments = (*QUICK, "TRIALS=2", "EVAL_EVERY=1")
    run_here(lth, tmp_path / "3", *arguments, "LEVELS=3")
    run_here(lth, tmp_path / "2", *arguments, "LEVELS=2")
    run_here(lth, tmp_path / "both", *arguments, "LEVELS=2")
    levels = []
    with at_each_level(lth, levels.append):
        for count in ("3", "2", "3"):
            run_here(lth, tmp_path / "both", *arguments, f"LEVELS={count}")
            check_same_results(tmp_path / "both", tmp_path / count)
            assert f"LEVELS = {count}\n" in (tmp_path / "both" / "summary.md").read_text()
    assert levels == [3]
    assert "going on after level 2 of 3" in capsys.readouterr().out
    assert "previous" not in names(tmp_path / "both")


@pytest.mark.parametrize("room", ["draw_figures", "summary", "verdict"])
def test_an_error_in_what_draws_costs_no_run(lth, undrawn, tmp_path, room):
    """Records and tickets are there before anything is drawn, and mended, the script draws without training."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(lth, room, lambda results: 1 / 0)
        run_here(lth, tmp_path, *QUICK)
    assert "tickets.pt" in names(tmp_path) and set(read_metrics(tmp_path)["level"]) == {0, 1, 2}
    lth.use(draw_figures=sketch, train=None)
    run_here(lth, tmp_path, *QUICK)
    assert {"summary.md", "comparison_plot.png"} <= names(tmp_path)


def test_the_version_is_that_of_what_computes_and_of_the_text_that_was_loaded(lth, undrawn, tmp_path):
    """With constants and figures edited in the file, a run goes on. The file may be edited while it runs: what it then
    saves is of the text that computed it."""
    figures = conftest.load_copy(tmp_path, undrawn, ("\nLEVELS: int = 16", "\nLEVELS: int = 1"), DRAWS)
    assert figures.constants()["LEVELS"] == 1 and figures.identity(CPU) == lth.identity(CPU)
    edited = conftest.load_copy(tmp_path, undrawn, COMPUTES)
    Path(figures.__file__).write_text(Path(edited.__file__).read_text())
    assert figures.identity(CPU)["version of the script"] == lth.VERSION != edited.VERSION


@pytest.mark.parametrize("other", ["SEED", "version of the script"])
def test_another_run_moves_the_earlier_one_whole(lth, undrawn, tmp_path, capsys, other):
    """Not before it has a level of its own; what is not a run's stays where it is."""
    folder = tmp_path / "results"
    run_here(lth, folder, *QUICK)
    earlier = contents(folder)
    (folder / "README.md").write_text("the user's own")
    (folder / "quick").mkdir()
    module, seed = lth, "SEED=1"
    if other != "SEED":
        module, seed = conftest.load_copy(tmp_path, undrawn, COMPUTES), "SEED=42"
    run_until(module, 0, folder, *QUICK, seed)
    assert f"holds another run (with another {other}): its files will be moved to previous/" in capsys.readouterr().out
    assert contents(folder) == earlier | {"README.md": b"the user's own"}
    run_until(module, 1, folder, *QUICK, seed)
    said = capsys.readouterr().out
    assert said.count(MOVED) == 1 and said.index(MOVED) < said.index("\n    0 ")
    assert the_previous(folder) == earlier
    assert names(folder) == {*earlier, "README.md", "quick", "previous"}
    assert set(read_metrics(folder)["level"]) == {0}


@pytest.mark.parametrize("damage", ["half", "bit", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_moved_and_not_used(lth, undrawn, tmp_path, capsys, damage):
    """And the run starts afresh. One flipped bit of a weight PyTorch itself would not notice."""
    run_here(lth, tmp_path, *QUICK)
    first = contents(tmp_path)
    content = first["checkpoint.pt"]
    damaged = {"half": content[:len(content) // 2], "bit": conftest.flipped(content), "empty": b"",
               "foreign": first["tickets.pt"]}[damage]
    (tmp_path / "checkpoint.pt").write_bytes(damaged)
    run_here(lth, tmp_path, *QUICK)
    said = capsys.readouterr().out
    assert "checkpoint.pt is damaged: it will be moved to previous/, and this run starts afresh\n" in said
    assert the_previous(tmp_path) == first | {"checkpoint.pt": damaged}
    check_same_results(tmp_path, next((tmp_path / "previous").iterdir()))


def test_results_without_a_checkpoint_are_replaced_only_by_their_like(lth, undrawn, tmp_path, capsys):
    """As committed ones are. A run that is stopped moves those of more levels; one digit makes them another run's."""
    run_here(lth, tmp_path, *QUICK)
    first = contents(tmp_path)
    (tmp_path / "checkpoint.pt").unlink()
    (tmp_path / "summary.md").write_text("older words")
    run_here(lth, tmp_path, *QUICK)
    assert contents(tmp_path) == first and "previous" not in names(tmp_path)
    last = first["metrics.csv"].rstrip()
    changed = last[:-1] + (b"1" if last.endswith(b"2") else b"2") + b"\n"
    for metrics, level in ((first["metrics.csv"], 1), (changed, 3)):
        (tmp_path / "metrics.csv").write_bytes(metrics)
        (tmp_path / "checkpoint.pt").unlink()
        committed = contents(tmp_path)
        with ends_at(lth, level, KeyboardInterrupt()), contextlib.suppress(KeyboardInterrupt):
            run_here(lth, tmp_path, *QUICK)
        assert capsys.readouterr().out.count(MOVED) == 1 and the_previous(tmp_path) == committed
        assert first["metrics.csv"].startswith((tmp_path / "metrics.csv").read_bytes())
        shutil.rmtree(tmp_path / "previous")
        run_here(lth, tmp_path, *QUICK)
        assert contents(tmp_path)["metrics.csv"] == first["metrics.csv"]


def test_of_constants_only_those_that_change_no_number_may_differ(lth, tmp_path):
    """Nor may what computes: the text, PyTorch, the kind of device. The number of threads may."""
    own = lth.identity(CPU)
    others = {"DATASET": "FashionMNIST", "PIXELS": "unit_length", "MODEL": "lenet", "INIT": "xavier_normal",
              "DROPOUT": 0.1, "ARMS": ("rewind",), "TRIALS": 2, "PRUNE_RATE": 0.3, "PRUNE_SCOPE": "global",
              "REWIND_STEP": 1, "TICKETS_FROM": str(SCRIPT), "SEED": 1, "EPOCHS": 2, "BATCH_SIZE": 60,
              "LEARNING_RATE": 1e-3, "WEIGHT_DECAY": 0.0, "CLIP_NORM": None, "EVAL_EVERY": 100, "VALIDATION_SIZE": 1}
    free = {"LEVELS": 3, "DATA_DIR": "elsewhere", "RESULTS_DIR": "there", "DEVICE": "cuda"}
    assert others.keys() | free.keys() == lth.constants().keys()
    changes = [*itertools.product([lth], [*(others | free).items(), ("VERSION", "0" * 64)]),
               (torch, ("__version__", "9.9")), (torch, ("get_num_threads", lambda: 77))]
    for target, (name, value) in changes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            assert (lth.identity(CPU) == own) == (name in {*free, "get_num_threads"}), name
    assert lth.identity(torch.device("cuda")) == lth.identity(torch.device("cuda", 1)) != own
    # 0 and 0.0 are the same; of tickets from elsewhere it is the content that counts, not where they lie.
    lth.use(WEIGHT_DECAY=0)
    assert type(lth.identity(CPU)["WEIGHT_DECAY"]) is float
    sums = []
    for name, content in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / name).write_text(content)
        lth.use(TICKETS_FROM=str(tmp_path / name))
        sums.append(lth.identity(CPU)["TICKETS_FROM"])
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize(("seed", "level"), [(42, 0), (42, 2), (1, 1)])
def test_two_runs_at_once_mix_nothing(lth, undrawn, tmp_path, seed, level):
    """One comes and goes while the other trains a level: by the same command, all is as once; else the other stops."""
    other = conftest.load_copy(tmp_path, undrawn)
    run_here(other, tmp_path / "alone", *QUICK, f"SEED={seed}")
    folder = tmp_path / "shared"

    def come_and_go(begun: int) -> None:
        if begun == level:
            run_here(other, folder, *QUICK, f"SEED={seed}")

    stop = pytest.raises(lth.UserError, match=r"another run has begun in .*: choose another RESULTS_DIR")
    with at_each_level(lth, come_and_go), stop if seed == 1 else contextlib.nullcontext():
        run_here(lth, folder, *QUICK)
    check_same_results(folder, tmp_path / "alone")
    assert names(folder) == names(tmp_path / "alone") | ({"previous"} if seed == 1 else set())


def test_a_slower_twin_takes_no_level_away(lth, undrawn, tmp_path):
    """It saves level 1 when the faster one has saved level 2."""
    run_here(lth, tmp_path, *QUICK)
    own, state = lth.read_checkpoint(tmp_path)
    lth.save_state(dataclasses.replace(state, level=1), tmp_path, own)
    assert lth.read_checkpoint(tmp_path)[1].level == 2


def test_redraw_restores_summary_and_figures_from_the_records(lth, few, tmp_path):
    """Without the checkpoint. What computed the run, and on what, stays as it was written then."""
    run_here(lth, tmp_path, *QUICK)
    (tmp_path / "checkpoint.pt").unlink()
    summary = (tmp_path / "summary.md").read_text().replace("CPU threads", "abacuses")
    expected = contents(tmp_path) | {"summary.md": summary.encode()}
    _, constants = summary.split("## Constants and versions")
    (tmp_path / "summary.md").write_text("older words\n\n## Constants and versions" + constants)
    (tmp_path / "comparison_plot.png").unlink()
    (tmp_path / "leads_plot.png").write_bytes(b"of arms that the run has not")
    lth.redraw(tmp_path)
    assert "abacuses" in constants and contents(tmp_path) == expected
    assert lth.constants()["PRUNE_RATE"] == 0.2             # the module's own are left alone
    # Without tickets, or with another run's, nobody knows the masks: their figure stays as it is.
    (tmp_path / "mask_plot.png").write_bytes(b"the old one")
    (tmp_path / "summary.md").write_text(summary.replace("SEED = 42", "SEED = 43"))
    for _ in range(2):
        lth.redraw(str(tmp_path))
        assert (tmp_path / "mask_plot.png").read_bytes() == b"the old one"
        (tmp_path / "tickets.pt").unlink(missing_ok=True)
    # Where there are no records, or no constants, it says so.
    head = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    for name, content in (("metrics.csv", "arm,level\nrewind,1\n"), ("metrics.csv", ""), ("metrics.csv", head + "\n"),
                          ("summary.md", "# Words\n"), ("summary.md", summary.replace("TRIALS = ", "TRAILS = "))):
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(content)
        with pytest.raises(lth.UserError, match=f"{tmp_path} holds no results that can be drawn"):
            lth.redraw(tmp_path)
        (tmp_path / name).write_bytes(before)
    with pytest.raises(lth.UserError, match="compare_runs needs one results folder or more"):
        lth.compare_runs([], tmp_path / "runs.png")


def test_a_run_that_cannot_read_its_checkpoint_again_says_that_there_are_no_results(lth, undrawn, tmp_path):
    lth.use(save_state=lambda *_: None)
    with pytest.raises(lth.UserError, match="is no longer what this run saved"):
        run_here(lth, tmp_path, *QUICK)


def test_numpys_words_are_words(lth, undrawn, tmp_path):
    """The checkpoint could not be read again with them in it."""
    lth.use(ARMS=tuple(np.array(lth.ARMS)), DATASET=np.str_("MNIST"))
    run_here(lth, tmp_path, *QUICK)
    assert lth.read_checkpoint(tmp_path)[1].level > 0
