"""Finished levels are kept whatever ends a run, and the numbers are the same; foreseeable errors are one sentence."""

import argparse
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import conftest
import pytest
import torch
from conftest import QUICK, RESULTS, at_each_level, check_same_results, names, read_metrics, run_here, run_script


def test_a_run_killed_before_while_or_after_it_saves_resumes_to_the_same_results(lth, undrawn, tmp_path):
    """A killed process leaves its folder as it is at that moment. So copy it at fixed points of a run: when a file is
    written halfway, and before it gets its name. Such a copy resumes to the same bytes."""
    folder = tmp_path / "run"
    copies = []

    def photograph(descriptor: int) -> None:
        copies.append(shutil.copytree(folder, tmp_path / f"copy{len(copies)}"))
        for path in folder.iterdir():
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                os.truncate(copies[-1] / path.name, path.stat().st_size // (1 + len(copies) % 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", photograph)
        run_here(lth, folder, *QUICK)
    assert len(copies) == 3 + len(RESULTS) - 1              # three checkpoints, then the results
    for number, kept in ((0, -1), (1, 0), (2, 1), (3, 2), (5, 2)):
        levels = []
        with at_each_level(lth, levels.append):
            run_here(lth, copies[number], *QUICK)
        assert levels == list(range(kept + 1, 3)), number   # nothing is done again
        check_same_results(copies[number], folder)
        assert {name for name in names(copies[number]) if not name.startswith(".")} == RESULTS


@pytest.mark.parametrize(("error", "kind", "sentence"), [
    (KeyboardInterrupt(), KeyboardInterrupt, None),
    (torch.OutOfMemoryError("CUDA out of memory."), None, "A lower STACK_SIZE needs less and keeps the finished"),
    (OSError(28, "No space left on device"), None, "No space left on device. The finished levels are kept")])
def test_what_ends_a_run_leaves_results_and_is_resumed(lth, undrawn, tmp_path, capsys, error, kind, sentence):
    with conftest.ends_at(lth, 1, error), pytest.raises(kind or lth.UserError, match=sentence):
        run_here(lth, tmp_path / "ended", *QUICK)
    assert lth.constants()["LEVELS"] == 16
    assert set(read_metrics(tmp_path / "ended")["level"]) == {0}
    assert names(tmp_path / "ended") == RESULTS
    with pytest.raises(IndexError, match="levels 0 to 0"):
        lth.load_ticket(tmp_path / "ended" / "tickets.pt", 0, 1)
    run_here(lth, tmp_path / "ended", *QUICK, "STACK_SIZE=1")                           # as the sentence advises
    assert "resuming after level 0 of 2" in capsys.readouterr().out
    run_here(lth, tmp_path / "alone", *QUICK)
    check_same_results(tmp_path / "ended", tmp_path / "alone")


def test_a_real_lack_of_memory_is_one_sentence(tmp_path):
    """PyTorch's CPU allocator raises a plain RuntimeError. Its libraries map 4 GB, and a batch takes 6 GB more."""
    limits = (resource.RLIMIT_AS, (7 * 2**30, 7 * 2**30))
    result = run_script(tmp_path, "TRIALS=100", "STACK_SIZE=100", "LEVELS=0", "BATCH_SIZE=20000", "DROPOUT=0",
                        preexec_fn=lambda: resource.setrlimit(*limits))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("lth_pruning: there is not enough memory. A lower STACK_SIZE needs less")
    assert len(result.stderr.strip().splitlines()) == 1


def test_sigterm_ends_a_process_as_ctrl_c_does(tmp_path):
    """With what it has found so far."""
    words = conftest.command(tmp_path, *QUICK, "ARMS=rewind", "PRUNE_RATE=0.02", "LEVELS=100")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("    1 "):
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.strip() == "lth_pruning: stopped. The finished levels are kept; rerun the command to resume."
    assert names(tmp_path) >= RESULTS and {0, 1} <= set(read_metrics(tmp_path)["level"]) < set(range(100))


def test_a_hostile_environment(tmp_path):
    """No standard error, a reader that leaves, an ASCII console, no progress bars, a notebook's backend that is not
    there, a user's own matplotlibrc, ranks left over, warnings as errors: all results, and figures that are PNGs."""
    (tmp_path / "matplotlibrc").write_text("savefig.format: pdf\ntext.usetex: False\n")
    folder = tmp_path / "résultats"
    python, *rest = conftest.command(folder, *QUICK, "ARMS=rewind", "TRIALS=2", "LEVELS=1")
    run = " ".join(f"'{word}'" for word in [python, "-OO", "-W", "error", *rest])
    environment = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://matplotlib_inline.not_installed", "RANK": "1",
                   "WORLD_SIZE": "2", "MATPLOTLIBRC": str(tmp_path), "LC_ALL": "C", "TQDM_DISABLE": "1"}
    result = subprocess.run(["bash", "-c", f"{run} 2>&- | head -3; exit ${{PIPESTATUS[0]}}"], capture_output=True,
                            text=True, timeout=240, env=os.environ | environment)
    assert (result.returncode, result.stderr, len(result.stdout.splitlines())) == (0, "", 3)
    assert names(folder) >= RESULTS and set(read_metrics(folder)["trial"]) == {0, 1}
    pictures = [*folder.glob("*.png")]
    assert len(pictures) > 2 and all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in pictures)


def test_variables_are_set_before_any_library_is_loaded(tmp_path):
    """Libraries read them once. A stand-in for the first one tells. As a program, the script draws to files."""
    (tmp_path / "matplotlib.py").write_text("import json, os, sys\njson.dump(dict(os.environ), sys.stdout)\nsys.exit()")
    expected = {"GOMP_SPINCOUNT": "1000", "THP_MEM_ALLOC_ENABLE": "1"}
    environment = {name: value for name, value in os.environ.items() if name not in expected}
    result = subprocess.run([sys.executable, str(conftest.SCRIPT)], text=True, capture_output=True,
                            env=environment | {"PYTHONPATH": str(tmp_path), "MPLBACKEND": "not_installed"})
    found = json.loads(result.stdout)
    assert found.items() >= expected.items() and "MPLBACKEND" not in found


def test_tickets_that_are_damaged_or_foreign_or_do_not_fit_are_refused(lth, undrawn, tmp_path):
    """In one sentence, before anything is trained or written."""
    path = tmp_path / "given" / "tickets.pt"
    run_here(lth, path.parent, *QUICK, "LEVELS=1")
    for argument, sentence in (
            ("MODEL=lenet", "were found with MODEL=mlp: set the same here"), ("PRUNE_RATE=0.61", "with PRUNE_RATE=0.6"),
            ("TRIALS=2", "holds 1 trial and 1 level"), ("LEVELS=2", "set TRIALS and LEVELS no higher"),
            (f"RESULTS_DIR={path.parent}", "is in RESULTS_DIR"), (f"TICKETS_FROM={tmp_path}", "cannot be read as")):
        with pytest.raises(lth.UserError, match=sentence):
            run_here(lth, tmp_path / "results", *QUICK, "LEVELS=1", "ARMS=rewind,transfer", f"TICKETS_FROM={path}",
                     argument)
    assert names(tmp_path) == {"given"} and names(path.parent) == RESULTS

    content = path.read_bytes()
    tickets = torch.load(path, weights_only=True)
    theta0 = tickets["theta0"]
    files = [conftest.flipped(content), content[:1000], b"", pickle.dumps(tickets["constants"])]
    for changed in ({"theta0": {name: tensor[:0] for name, tensor in theta0.items()}}, {"pruned_at": {}},
                    {"constants": tickets["constants"] | {"MODEL": "lenet"}}, {"more": argparse.Namespace()}):
        torch.save(tickets | changed, path)
        files.append(path.read_bytes())
    for file in files:
        path.write_bytes(file)
        with pytest.raises(lth.UserError, match=f"{path} cannot be read as the tickets.pt of a run") as caught:
            lth.load_ticket(path, 0, 1)
        assert "\n" not in str(caught.value)
