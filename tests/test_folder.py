"""A results folder holds one run: it is resumed, redrawn, or makes room for another. Nothing is lost or mixed."""

import json
from pathlib import Path

import conftest
import pytest
import torch
from conftest import QUICK, RESULTS, at_each_level, check_same_results, contents, ends_at, names, read_metrics, run_here

CPU = torch.device("cpu")
MOVED = "the results of an earlier run are now in"
COMPUTES = ("    rates = prune_rates(build_network(MODEL, DROPOUT))\n",
            "    network = build_network(MODEL, DROPOUT)\n    rates = prune_rates(network)\n")
MENDED = [("# Five things to know", "# Six things to know"), ("    # Copies: a view would", "    # A view would"),
          ('"""Return the masks of a level."""', '"""Return the masks.\n\n    Of a level.\n    """'),
          ("\n# ---- Main", "\nWORD = 1\n\n# ---- Main"), ("\nLEVELS: int = 16", "\nLEVELS: int = 1")]


def run_until(lth, level: int, folder: Path, *arguments: str) -> None:
    """Run until the training of a level begins, and press Ctrl-C."""
    with ends_at(lth, level, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        run_here(lth, folder, *arguments)


def the_previous(folder: Path) -> dict[str, bytes]:
    """Return what was moved to previous/, at the one time when something was."""
    (previous,) = (folder / "previous").iterdir()
    return contents(previous)


def identity(lth, tickets_from: dict | None = None) -> dict:
    """Return the identity of a run with the present constants."""
    return lth.identify(lth.run_info(CPU, tickets_from), CPU)


@pytest.mark.parametrize("part", ["comparison_plot", "summary", "verdict"])
def test_the_same_command_again_trains_nothing_and_redraws_even_after_an_error_in_drawing(
        lth, few, tmp_path, capsys, part):
    """Records and tickets are written before anything is drawn, and read back. All is the same, byte for byte."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(lth, part, lambda run: 1 / 0)
        patch.setattr(lth, "FIGURES", (lth.comparison_plot,))
        run_here(lth, tmp_path, *QUICK)
    broken = contents(tmp_path)
    assert {"checkpoint.pt", "metrics.csv", "mask.csv", "tickets.pt", "run.json", "networks.csv"} <= broken.keys()
    assert set(read_metrics(tmp_path)["level"]) == {0, 1, 2}
    lth.use(FIGURES=(lth.comparison_plot,), train=None)
    capsys.readouterr()
    run_here(lth, tmp_path, *QUICK)
    said = capsys.readouterr().out
    assert said.startswith("nothing is left to train: the results are redrawn from ") and "level   " not in said
    assert contents(tmp_path) == contents(tmp_path) | broken
    assert names(tmp_path) == {*RESULTS, "comparison_plot.png"}                         # no previous/


def test_levels_raised_are_resumed_and_lowered_show_all_that_is_finished(lth, undrawn, tmp_path, capsys):
    arguments = (*QUICK, "TRIALS=2", "EVAL_EVERY=1")
    run_here(lth, tmp_path / "3", *arguments, "LEVELS=3")
    levels = []
    with at_each_level(lth, levels.append):
        for count in (2, 3, 1):
            run_here(lth, tmp_path / "both", *arguments, f"LEVELS={count}")
    assert levels == [0, 1, 2, 3]
    assert "resuming after level 2 of 3" in capsys.readouterr().out
    check_same_results(tmp_path / "both", tmp_path / "3")
    assert json.loads((tmp_path / "both" / "run.json").read_text())["constants"]["LEVELS"] == 3
    assert "previous" not in names(tmp_path / "both")


def test_the_version_is_that_of_the_code_that_was_loaded_comments_aside(lth, undrawn, tmp_path):
    """With comments, docstrings, constants and figures edited, a run is resumed. The file may be edited meanwhile."""
    mended = conftest.load_copy(tmp_path, undrawn, *MENDED)
    assert identity(mended) == identity(lth) and mended.constants()["LEVELS"] == 1
    edited = conftest.load_copy(tmp_path, undrawn, COMPUTES)
    Path(mended.__file__).write_text(Path(edited.__file__).read_text())
    assert identity(mended)["code version"] == lth.VERSION != edited.VERSION


@pytest.mark.parametrize("other", ["SEED", "code version"])
def test_another_run_moves_the_earlier_one_whole(lth, undrawn, tmp_path, capsys, other):
    """Not before it has a level of its own; files that are no run's stay where they are."""
    folder = tmp_path / "results"
    run_here(lth, folder, *QUICK)
    earlier = contents(folder)
    (folder / "README.md").write_text("the user's own")
    (folder / "quick").mkdir()
    module, seed = lth, "SEED=1"
    if other != "SEED":
        module, seed = conftest.load_copy(tmp_path, undrawn, COMPUTES), "SEED=42"
    run_until(module, 0, folder, *QUICK, seed)
    sentence = f"holds a different run (different {other}): its files will be moved to previous/ in it"
    assert sentence in capsys.readouterr().out
    assert contents(folder) == earlier | {"README.md": b"the user's own"}
    run_until(module, 1, folder, *QUICK, seed)
    said = capsys.readouterr().out
    assert said.count(MOVED) == 1 and said.index(MOVED) < said.index("\n    0 ")
    assert the_previous(folder) == earlier
    assert names(folder) == {*earlier, "README.md", "quick", "previous"}
    assert set(read_metrics(folder)["level"]) == {0}


@pytest.mark.parametrize("damage", ["bit", "structure", "foreign", "missing"])
def test_results_without_a_sound_checkpoint_are_moved_too(lth, undrawn, tmp_path, capsys, damage):
    """PyTorch itself would not notice one flipped bit of a weight. A cloned run has no checkpoint at all."""
    run_here(lth, tmp_path, *QUICK)
    first = contents(tmp_path)
    content = first["checkpoint.pt"]
    damaged = {"bit": conftest.flipped(content), "structure": content[:-200] + bytes(100) + content[-100:],
               "foreign": first["tickets.pt"]}
    (tmp_path / "checkpoint.pt").unlink()
    if damage != "missing":
        (tmp_path / "checkpoint.pt").write_bytes(damaged[damage])
    before = contents(tmp_path)
    capsys.readouterr()
    run_here(lth, tmp_path, *QUICK)
    said = capsys.readouterr().out
    sentence = "checkpoint.pt is damaged: it will be moved to previous/, and this run starts afresh\n"
    assert (sentence in said) == (damage != "missing")
    assert the_previous(tmp_path) == before
    check_same_results(tmp_path, next((tmp_path / "previous").iterdir()))


def test_lack_of_memory_is_no_damage(lth, undrawn, tmp_path, monkeypatch):
    """Nor is whatever else stops torch.load: the levels stay."""
    run_here(lth, tmp_path, *QUICK)
    before = contents(tmp_path)

    def fails(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(lth.UserError, match="not enough memory"):
        run_here(lth, tmp_path, *QUICK, "LEVELS=3")
    assert contents(tmp_path) == before and names(tmp_path) == before.keys()


def test_only_constants_that_change_no_number_may_differ(lth, monkeypatch):
    """Nor may the code, PyTorch, tickets, device, an arm of one's own, or for convolutions the number of threads."""
    same = identity(lth)
    others = {"DATASET": "FashionMNIST", "PIXELS": "unit_length", "MODEL": "lenet", "INIT": "xavier_normal",
              "DROPOUT": 0.1, "ARMS": ("rewind",), "TRIALS": 2, "PRUNE_RATE": 0.3, "PRUNE_SCOPE": "global",
              "REWIND_STEP": 1, "SEED": 1, "EPOCHS": 2, "BATCH_SIZE": 60, "LEARNING_RATE": 1e-3,
              "SCHEDULE": "linear", "WEIGHT_DECAY": 0.0, "CLIP_NORM": None, "EVAL_EVERY": 100, "VALIDATION_SIZE": 1}
    free = {"LEVELS": 3, "DATA_DIR": "elsewhere", "RESULTS_DIR": "there", "DEVICE": "cuda", "STACK_SIZE": 7,
            "TICKETS_FROM": "moved/tickets.pt"}
    assert others.keys() | free.keys() == lth.constants().keys()
    changes = [(lth, name, value) for name, value in (others | free | {"VERSION": "0" * 64}).items()]
    for target, name, value in [*changes, (torch, "__version__", "9.9")]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            assert (identity(lth) == same) == (name in free), name
    assert identity(lth, {"sha256": "one"}) != identity(lth, {"sha256": "two"})
    assert lth.identify(lth.run_info(CPU, None), torch.device("cuda")) != same

    lth.use(ARM_TABLE=dict(lth.ARM_TABLE), ARMS=("rewind", "mine"))
    lth.ARM_TABLE["mine"] = lth.Arm(lambda given: lth.reinit(given), "mine", "red", "o")
    mine = identity(lth)
    lth.ARM_TABLE["mine"] = lth.Arm(lambda given: lth.rewind(given), "mine", "red", "o")
    assert identity(lth) != mine

    lth.use(MODEL="lenet", CLIP_NORM=1)
    lenet = identity(lth)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert identity(lth) != lenet
    assert type(lenet["CLIP_NORM"]) is float                # 1 and 1.0 are the same
