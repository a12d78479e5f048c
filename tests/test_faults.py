"""Finished levels are kept whatever ends a run, and the numbers are the same; what can be set right is one sentence."""

import argparse
import io
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import conftest
import numpy as np
import pytest
import torch
from conftest import QUICK, SCRIPT, at_each_level, check_same_results, names, read_metrics, run_here

STOPPED = "lth_pruning: stopped. Finished levels are kept; the same command goes on after them."
RESULTS = {"checkpoint.pt", "metrics.csv", "summary.md", "tickets.pt"}
# The last lines of the script, which make it a program.
PROGRAM = "if __name__" + SCRIPT.read_text().split("\nif __name__")[-1]
VARIABLES = ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE", "MPLBACKEND")


def test_a_run_killed_before_while_or_after_it_saves_goes_on_to_the_same_results(lth, undrawn, tmp_path):
    """A killed process leaves its folder as it is at that moment. So it is copied at fixed points of a run: before a
    file is written, when half of it is, before it gets its name, and after; such a copy goes on to the same bytes."""
    folder, copies = tmp_path / "run", []

    def photograph(first, *_) -> None:
        copies.append(shutil.copytree(folder, tmp_path / f"copy{len(copies)}"))
        for path in folder.iterdir():
            if isinstance(first, int) and os.path.samestat(path.stat(), os.fstat(first)):
                os.truncate(copies[-1] / path.name, path.stat().st_size // 2)

    with pytest.MonkeyPatch.context() as patch:
        for target, name, function in ((lth, "open", open), (os, "fsync", os.fsync), (os, "replace", os.replace)):
            patch.setattr(target, name, lambda *given, call=function: photograph(*given) or call(*given), raising=False)
        run_here(lth, folder, *QUICK)
    assert len(copies) == 3 * 6                             # of three checkpoints, metrics.csv, tickets.pt, summary.md
    for number, kept in ((2, -1), (3, 0), (4, 0), (5, 0), (6, 1), (9, 2), (13, 2)):
        levels = []
        with at_each_level(lth, levels.append):
            run_here(lth, copies[number], *QUICK)
        assert levels == list(range(kept + 1, 3)), number   # nothing is done again
        check_same_results(copies[number], folder)
        assert {name for name in names(copies[number]) if not name.startswith(".unfinished")} == RESULTS


@pytest.mark.parametrize(("error", "code", "sentence"), [
    (KeyboardInterrupt(), 130, STOPPED), (MemoryError(), 2, "there is not enough memory: lower TRIALS, BATCH_SIZE or"),
    (torch.OutOfMemoryError("CUDA out of memory."), 2, "there is not enough memory: lower TRIALS"),
    (OSError(28, "No space left on device"), 2, "No space left on device. Finished levels are kept")])
def test_what_ends_a_run_is_one_sentence_and_it_goes_on(
        lth, undrawn, tmp_path, monkeypatch, capsys, error, code, sentence):
    """Until then, results show the finished levels."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), f"RESULTS_DIR={tmp_path / 'ended'}", "DEVICE=cpu", *QUICK])
    with conftest.ends_at(lth, 1, error), pytest.raises(SystemExit) as end:
        exec(PROGRAM, vars(lth) | {"__name__": "__main__"})
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == code and sentence in said and lth.constants()["LEVELS"] == 16
    assert set(read_metrics(tmp_path / "ended")["level"]) == {0}
    assert names(tmp_path / "ended") == RESULTS
    with pytest.raises(IndexError, match="levels 0 to 0"):
        lth.load_ticket(tmp_path / "ended" / "tickets.pt", 0, 1)
    run_here(lth, tmp_path / "ended", *QUICK)
    assert "going on after level 0 of 2" in capsys.readouterr().out
    run_here(lth, tmp_path / "alone", *QUICK)
    check_same_results(tmp_path / "ended", tmp_path / "alone")


def test_nohup_is_obeyed_and_sigterm_ends_a_process_as_ctrl_c_does(tmp_path):
    """SIGHUP after level 0 is ignored; SIGTERM after level 1 ends the run, with what it has found."""
    words = conftest.command(tmp_path, *QUICK, "ARMS=rewind", "PRUNE_RATE=0.02", "LEVELS=100")
    process = subprocess.Popen(["nohup", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("    0 "):
            process.send_signal(signal.SIGHUP)
        if line.startswith("    1 "):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors.strip()) == (130, STOPPED)
    assert names(tmp_path) >= RESULTS and {0, 1} <= set(read_metrics(tmp_path)["level"]) < set(range(100))


@pytest.mark.parametrize(("found", "in_notebook", "expected"), [
    (signal.SIG_DFL, False, signal.default_int_handler), (signal.SIG_IGN, False, signal.SIG_IGN),
    (print, False, print), (signal.SIG_DFL, True, signal.SIG_DFL)])
def test_signals_are_heard_unless_a_host_goes_on_or_has_its_own_way(lth, found, in_notebook, expected, monkeypatch):
    if in_notebook:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    within = []
    lth.use(main=lambda _: within.extend(map(signal.getsignal, numbers)))
    before = [signal.signal(number, found) for number in numbers]
    exec(PROGRAM, vars(lth) | {"__name__": "__main__"})
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert set(within) == {expected}


def test_a_results_folder_that_vanishes_or_cannot_make_room_is_one_sentence(lth, undrawn, tmp_path):
    folder = tmp_path / "results"
    with at_each_level(lth, lambda _: shutil.rmtree(folder)), pytest.raises(lth.UserError, match="No such file or"):
        run_here(lth, folder, *QUICK)
    run_here(lth, folder, *QUICK, "LEVELS=0")
    (folder / "previous").write_text("a file in the place of a folder")
    with pytest.raises(lth.UserError, match="previous"):
        run_here(lth, folder, *QUICK, "SEED=1")
    assert names(folder) == {*RESULTS, "previous"}


def test_a_global_scope_that_empties_a_layer_says_so_and_keeps_the_levels_before(lth, undrawn, tmp_path):
    """Of 27 weights left, the large ones of the last layers, none is of the first."""
    with pytest.raises(lth.UserError, match=r"would leave no weight of fc1\.weight: lower LEVELS or PRUNE_RATE"):
        run_here(lth, tmp_path, *QUICK, "PRUNE_SCOPE=global", "PRUNE_RATE=0.99")
    assert names(tmp_path) == RESULTS and set(read_metrics(tmp_path)["level"]) == {0, 1}


def test_a_hostile_environment(tmp_path):
    """No standard error, a reader that leaves, an ASCII console, a notebook's backend that is not there, a user's own
    matplotlibrc, ranks left over: all results, and figures that are PNGs."""
    (tmp_path / "matplotlibrc").write_text("savefig.format: pdf\ntext.usetex: False\n")
    folder = tmp_path / "résultats"
    run = " ".join(f"'{word}'" for word in conftest.command(folder, *QUICK, "ARMS=rewind", "TRIALS=2", "LEVELS=1"))
    environment = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://matplotlib_inline.not_installed", "RANK": "1",
                   "WORLD_SIZE": "2", "MATPLOTLIBRC": str(tmp_path), "LC_ALL": "C"}
    result = subprocess.run(["bash", "-c", f"{run} 2>&- | head -3; exit ${{PIPESTATUS[0]}}"], capture_output=True,
                            text=True, timeout=240, env=os.environ | environment)
    assert (result.returncode, result.stderr, len(result.stdout.splitlines())) == (0, "", 3)
    assert names(folder) >= RESULTS and set(read_metrics(folder)["trial"]) == {0, 1}
    pictures = [*folder.glob("*.png")]
    assert len(pictures) > 2 and all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in pictures)


def test_consoles_that_cannot_show_everything_or_are_gone(lth, monkeypatch):
    """What has no letter there is replaced; no error where nobody reads, the disk is full, or there is none."""
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    lth.say("résultats", narrow)
    assert narrow.buffer.getvalue() == b"r?sultats\n"
    with open("/dev/full", "w") as stream:
        lth.say("nobody reads this", stream)
    monkeypatch.setattr(sys, "stdout", None)
    lth.say("nor this")


@pytest.mark.parametrize(("name", "given", "expected"), [
    ("lth_pruning", {}, ["1000", "1", None]), ("lth_pruning", dict.fromkeys(VARIABLES, "7"), ["7", "7", "7"]),
    ("__main__", {"MPLBACKEND": "module://not_installed"}, ["1000", "1", None])])
def test_variables_that_are_not_set_are_set_before_any_library_is_loaded(name, given, expected):
    """Libraries read them once. MPLBACKEND is left to whoever imports the script; as a program, it draws to files."""
    code = ("import runpy, sys, os\nclass Stop:\n    def find_spec(self, name, *rest):\n"
            "        if name in ('matplotlib', 'numpy', 'pandas', 'torch'):\n"
            f"            os._exit([os.environ.get(name) for name in {VARIABLES}] != {expected})\n"
            f"sys.meta_path.insert(0, Stop())\nrunpy.run_path({str(SCRIPT)!r}, run_name={name!r})")
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES} | given
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_import_does_nothing_else_and_works_under_any_name(lth, undrawn, tmp_path, capfd):
    """No seeding, no output, no folder; sys.modules need not know the module."""
    def world() -> tuple:
        return dict(os.environ), random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = world()
    module = conftest.load_copy(tmp_path, undrawn)
    assert world() == before and capfd.readouterr() == ("", "") and len(names(tmp_path)) == 1
    assert module.__name__ not in sys.modules
    run_here(module, tmp_path / "results", *QUICK, "LEVELS=0")
    assert module.load_ticket(tmp_path / "results" / "tickets.pt", 0, 0)


def test_a_second_run_in_another_thread_is_refused(lth):
    """Constants are the module's: the first one's stay its own, and afterwards are what they were."""
    before, seen = lth.constants(), []

    def run() -> None:
        seen.append(lth.constants())
        if len(seen) == 1:
            with pytest.raises(lth.UserError, match="another run is under way in this Python process"):
                ThreadPoolExecutor().submit(lth.main, ["TRIALS=3"]).result()
            assert lth.constants() == before | {"TRIALS": 2, "DROPOUT": 0.0}

    lth.use(run=run)
    lth.main(["TRIALS=2", "DROPOUT=0"])
    lth.main([])                                            # the next one is not refused
    assert seen[1:] == [before] and lth.constants() == before


def test_tickets_that_are_damaged_or_foreign_or_do_not_fit_are_refused(lth, undrawn, tmp_path):
    """In one sentence, before anything is trained or written."""
    path = tmp_path / "given" / "tickets.pt"
    run_here(lth, path.parent, *QUICK, "LEVELS=1")
    for argument, sentence in (
            ("MODEL=lenet", "with MODEL=mlp: here it must be the same"), ("REWIND_STEP=1", "with REWIND_STEP=0"),
            ("PRUNE_RATE=0.61", "with PRUNE_RATE=0.6"), ("PRUNE_SCOPE=global", "with PRUNE_SCOPE=layer"),
            ("TRIALS=2", "holds 1 trials and 1 levels"), ("LEVELS=2", "TRIALS and LEVELS must be no more"),
            (f"RESULTS_DIR={path.parent}", "lies in RESULTS_DIR"), (f"TICKETS_FROM={tmp_path}", "no tickets could be")):
        with pytest.raises(lth.UserError, match=sentence):
            run_here(lth, tmp_path / "results", *QUICK, "LEVELS=1", "ARMS=rewind,transfer", f"TICKETS_FROM={path}",
                     argument)
    assert names(tmp_path) == {"given"} and names(path.parent) == RESULTS
    content = path.read_bytes()
    tickets = torch.load(path, weights_only=True)
    theta0, pruned_at, settings = (tickets[name] for name in ("theta0", "pruned_at", "constants"))
    files = [conftest.flipped(content), content[:1000], b"", pickle.dumps(settings)]
    for changed in ({"theta0": {name: tensor for name, tensor in theta0.items() if name != "fc1.bias"}},
                    {"theta0": {name: tensor[:0] for name, tensor in theta0.items()}},
                    {"pruned_at": {name: levels.float() for name, levels in pruned_at.items()}}, {"pruned_at": {}},
                    {"constants": {name: value for name, value in settings.items() if name != "PIXELS"}},
                    {"constants": settings | {"MODEL": "lenet"}}, {"more": argparse.Namespace()}):
        torch.save(tickets | changed, path)
        files.append(path.read_bytes())
    for file in files:
        path.write_bytes(file)
        with pytest.raises(lth.UserError, match=f"no tickets could be read from {path}"):
            lth.load_ticket(path, 0, 1)
