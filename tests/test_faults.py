"""Nothing lost, nothing wrong: whatever ends a run, finished levels are kept, and the numbers after a fault are the
numbers without it."""

import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, TINY, command, expected_figures, flip, read_metrics, run_here

LONGER = (*TINY, "TRIALS=1", "LEVELS=3")
DENSE = {"learning_curves.png", "metrics.csv", "summary.md"}                   # all that level 0 gives
CPU = torch.device("cpu")


def names(folder: Path) -> set[str]:
    """What is in a folder, all checkpoints under one name."""
    return {re.sub(r"checkpoint-[0-9a-f]{12}-[0-9a-f]{12}", "checkpoint", path.name) for path in folder.iterdir()}


def partial(folder: Path) -> set[str]:
    """What the finished levels of a run give, whether it was stopped or ended."""
    return expected_figures(folder) | {"metrics.csv", "summary.md"}


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(command(folder, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | environment)


@pytest.fixture
def uninterrupted(lth, longer_run):
    """The metrics of a run that nothing interrupts."""
    if not longer_run.exists():
        run_here(lth, longer_run, *LONGER)
    return (longer_run / "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def longer_run(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted") / "results"


def test_a_run_killed_at_random_moments_ends_with_the_same_metrics(uninterrupted, lth, tmp_path, capsys):
    """SIGKILL leaves no time to tidy up. It comes while a run works, saves, or draws its figures."""
    finished, kills = [], 0
    while kills < 3:
        process = start(tmp_path, *LONGER)
        line = process.stdout.readline()                                        # "resuming", or the table's title
        finished += re.findall(r"resuming after level (\d) of 3", line)
        try:
            process.wait(random.uniform(0, 3))
            break                                                               # it was through before
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills
    run_here(lth, tmp_path, *LONGER)
    finished += re.findall(r"resuming after level (\d) of 3", capsys.readouterr().out)
    assert finished == sorted(finished)                                         # nothing is done again
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted
    assert names(tmp_path) == partial(tmp_path) | {"tickets.pt"}


def test_a_stopped_run_shows_its_finished_levels_and_resumes(uninterrupted, lth, tmp_path, capsys):
    process = start(tmp_path, *LONGER)
    for _ in range(4):                                                          # the title, the head, levels 0 and 1
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "lth_pruning: stopped. Finished levels are kept; the same command goes on after them."
    assert names(tmp_path) == partial(tmp_path) | {"checkpoint.pt"}
    assert uninterrupted.startswith((tmp_path / "metrics.csv").read_bytes())
    last = int(max(row["level"] for row in read_metrics(tmp_path)))
    assert 1 <= last < 3
    assert f"Unfinished: these are levels 0 to {last} of 3" in (tmp_path / "summary.md").read_text()
    run_here(lth, tmp_path, *LONGER)
    assert f"resuming after level {last} of 3" in capsys.readouterr().out
    assert (tmp_path / "metrics.csv").read_bytes() == uninterrupted
    assert "nfinished" not in (tmp_path / "summary.md").read_text()
    assert names(tmp_path) == partial(tmp_path) | {"tickets.pt"}


def test_ctrl_c_before_anything_has_begun(tmp_path):
    """As soon as the imports are through: the results folder is made before the data is read."""
    process = start(tmp_path / "results", *TINY)
    while not (tmp_path / "results").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "lth_pruning: stopped. Finished levels are kept; the same command goes on after them."
    assert not re.search(r"^ +0 ", output, re.M) and not list((tmp_path / "results").iterdir())


def test_a_checkpoint_of_another_version_is_named_and_left_alone(tmp_path):
    """A copy of the script is killed after level 0, changed, and started again: numbers of two versions are not mixed.
    """
    script, folder = Path(shutil.copy(SCRIPT, tmp_path)), tmp_path / "results"
    (tmp_path / "data").symlink_to(SCRIPT.parent / "data")

    def start_copy():
        return subprocess.Popen([sys.executable, str(script), "DEVICE=cpu", *TINY, "TRIALS=1", "LEVELS=1"],
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start_copy()
    for line in process.stdout:
        if re.match(" +0 ", line):
            break
    process.kill()
    process.communicate()
    (checkpoint,) = folder.iterdir()
    content = checkpoint.read_bytes()
    script.write_text(script.read_text() + "# another version\n")
    process = start_copy()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.startswith(f"{checkpoint.name} is of the same experiment, but of another version of the script ")
    assert "it is not used, and this run starts afresh\n" in output and "resuming" not in output
    assert re.findall(r"^ +(\d) .* %", output, re.M) == ["0", "1"]
    assert checkpoint.read_bytes() == content
    assert names(folder) == partial(folder) | {"tickets.pt", "checkpoint.pt"}


def test_two_runs_that_end_together_in_one_folder_both_keep_their_results(tmp_path):
    """One of them moves the other's aside; none is mixed or lost."""
    runs = [start(tmp_path / "both", *TINY, "TRIALS=1", "LEVELS=0", f"SEED={seed}", OMP_NUM_THREADS="1")
            for seed in (1, 2)]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum("the results of an earlier run are now in" in text for text in said) == 1
    previous = [*(tmp_path / "both" / "previous").iterdir()]
    assert names(tmp_path / "both") == DENSE | {"tickets.pt", "previous"}
    assert [names(folder) for folder in previous] == [DENSE | {"tickets.pt"}]
    found = {seed: folder for folder in (tmp_path / "both", *previous) for seed in (1, 2)
             if f"\nSEED = {seed}\n" in (folder / "summary.md").read_text()}
    assert len(set(found.values())) == 2
    for seed, folder in found.items():
        assert torch.load(folder / "tickets.pt", weights_only=True)["constants"]["SEED"] == seed
    assert (found[1] / "metrics.csv").read_bytes() != (found[2] / "metrics.csv").read_bytes()


@pytest.fixture
def state(lth, tmp_path):
    """Some state and the checkpoint that holds it."""
    lth.use(RESULTS_DIR=str(tmp_path), TRIALS=1)
    checkpoint = lth.checkpoint_path(CPU)
    state = lth.load_state(checkpoint) | {"level": 3, "records": [{"step": 1}]}
    torch.save(state, checkpoint)
    return state, checkpoint


def test_the_checkpoint_is_one_experiments_own(lth, state):
    """Of all constants, only where the files lie and what computes may differ."""
    _, checkpoint = state
    others = {"DATASET": "KMNIST", "PIXELS": "unit_length", "MODEL": "lenet", "INIT": "xavier_normal", "DROPOUT": 0.1,
              "ARMS": ("rewind",), "TRIALS": 2, "LEVELS": 4, "PRUNE_RATE": 0.3, "PRUNE_SCOPE": "global",
              "REWIND_STEP": 1, "TICKETS_FROM": str(SCRIPT), "SEED": 1, "EPOCHS": 2, "BATCH_SIZE": 60,
              "LEARNING_RATE": 1e-3, "WEIGHT_DECAY": 0, "CLIP_NORM": None, "EVAL_EVERY": 100}
    paths = {checkpoint}
    for name, value in others.items():
        before = lth.constants()[name]
        lth.use(**{name: value})
        paths.add(lth.checkpoint_path(CPU))
        lth.use(**{name: before})
    assert len(paths) == 1 + len(others)
    lth.use(DATA_DIR="elsewhere", DEVICE="cuda")
    assert lth.checkpoint_path(CPU) == checkpoint
    assert {*others, "DATA_DIR", "RESULTS_DIR", "DEVICE"} == set(lth.constants())


def test_whole_numbers_given_for_numbers_are_the_same_experiment(lth, state):
    """DROPOUT=0 has the checkpoint of DROPOUT=0.0."""
    for name, number in (("DROPOUT", 0), ("LEARNING_RATE", 1), ("WEIGHT_DECAY", 0), ("CLIP_NORM", 2)):
        paths = set()
        for value in (number, float(number)):
            lth.use(**{name: value})
            assert type(lth.constants()[name]) is float
            paths.add(lth.checkpoint_path(CPU))
        assert len(paths) == 1, name


def test_the_checkpoint_is_one_versions_own(lth, state, monkeypatch):
    """The script's bytes, PyTorch, the kind of device and the number of threads: each makes another file of the same
    experiment."""
    _, checkpoint = state
    paths = {checkpoint, lth.checkpoint_path(torch.device("cuda"))}
    assert lth.checkpoint_path(torch.device("cuda", 1)) in paths
    for module, name, value in ((lth, "script_sum", lambda: "0" * 64), (torch, "__version__", "9.9"),
                                (torch, "get_num_threads", lambda: 77)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            paths.add(lth.checkpoint_path(CPU))
    assert lth.checkpoint_path(CPU) == checkpoint
    assert len(paths) == 5
    assert len({re.match("checkpoint-[0-9a-f]{12}-", path.name)[0] for path in paths}) == 1


def test_the_tickets_count_not_where_they_lie(lth, state, tmp_path):
    for name, content in (("one", b"same"), ("two", b"same"), ("three", b"other")):
        (tmp_path / name).write_bytes(content)
    paths = []
    for name in ("one", "two", "three"):
        lth.use(TICKETS_FROM=str(tmp_path / name))
        paths.append(lth.checkpoint_path(CPU))
    assert paths[0] == paths[1] != paths[2]


def test_a_sound_checkpoint_is_taken(lth, state, capsys):
    state, checkpoint = state
    loaded = lth.load_state(checkpoint)
    assert loaded.keys() == state.keys() and loaded["level"] == 3
    assert all(torch.equal(loaded["theta"][0][name], tensor) for name, tensor in state["theta"][0].items())
    assert "resuming after level 3 of 16" in capsys.readouterr().out


def flip_weight(content: bytes) -> bytes:
    """One bit of a weight: PyTorch itself would not notice."""
    return flip(content, len(content) // 2)


def other_run(content: bytes, folder: Path) -> bytes:
    state = torch.load(folder / "copy", weights_only=True) | {"run": "checkpoint-of-another-run.pt"}
    torch.save(state, folder / "other")
    return (folder / "other").read_bytes()


@pytest.mark.parametrize("damage", [
    lambda content, _: content[:len(content) // 2], lambda content, _: flip_weight(content), lambda content, _: b"",
    lambda content, _: b"half a file", lambda content, _: content[:-1], other_run,
    lambda content, _: pickle.dumps({"level": 3})], ids=["half", "bit", "empty", "text", "byte", "other", "pickle"])
def test_a_damaged_checkpoint_is_set_aside(lth, state, tmp_path, capsys, damage):
    """Twice: the second does not replace the first."""
    _, checkpoint = state
    content = checkpoint.read_bytes()
    (tmp_path / "copy").write_bytes(content)
    damaged, earlier = damage(content, tmp_path), set()
    for count in (1, 2):
        checkpoint.write_bytes(damaged)
        new = lth.load_state(checkpoint)
        assert (new["level"], new["records"]) == (-1, [])
        assert not checkpoint.exists()
        found = set(tmp_path.glob(f"{checkpoint.stem}.damaged*"))
        assert len(found) == count and all(path.read_bytes() == damaged for path in found)
        (aside,), earlier = found - earlier, found
        said = capsys.readouterr().out
        assert str(checkpoint) in said and aside.name in said and "afresh" in said


@pytest.mark.parametrize("step", [0, 11])
def test_a_loss_that_is_not_finite_is_named_and_earlier_levels_stay(lth, small, tmp_path, monkeypatch, step):
    """Trial 0 of reinit at level 1 starts from a weight that is infinite; or from a bias that becomes so in training
    alone, by dropout's factor, and which the next layer's weights leave out before."""
    started = []

    def reinit(theta0, masks, **_):
        started.append(len(started))
        weights, masks = lth.rewind(theta0, masks)
        if started == [0] and step == 0:
            weights["fc2.weight"][0, 0] = torch.inf
        elif started == [0]:
            weights["fc1.bias"][0, 0], weights["fc2.weight"][0] = 3e38, 0
        return weights, masks

    monkeypatch.setitem(lth.REGISTRY, "reinit", lth.REGISTRY["reinit"]._replace(start=reinit))
    with pytest.raises(lth.UserError) as caught:
        run_here(lth, tmp_path, *TINY)
    assert f"the loss of reinit, trial 0, at level 1 was not finite by step {step}." in str(caught.value)
    assert {row["level"] for row in read_metrics(tmp_path)} == {0}
    assert names(tmp_path) == DENSE | {"checkpoint.pt"}


@pytest.fixture
def small_files():
    """Files may have so many bytes that one network's first checkpoint fits, and its second one does not; a function
    that ends this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))

    def end():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    yield end
    end()


def test_a_disk_that_is_full_keeps_what_there_is(lth, small, tmp_path, small_files, capsys):
    """Results show the levels that the checkpoint holds, and the same command goes on after them."""
    with pytest.raises(lth.UserError, match=r"File too large.*\. Finished levels are kept"):
        run_here(lth, tmp_path, *TINY, "TRIALS=1")
    assert names(tmp_path) == partial(tmp_path) | {"checkpoint.pt"}
    assert {row["level"] for row in read_metrics(tmp_path)} == {0}
    small_files()
    before = (tmp_path / "metrics.csv").read_bytes()
    run_here(lth, tmp_path, *TINY, "TRIALS=1")
    assert "resuming after level 0 of 2" in capsys.readouterr().out
    assert (tmp_path / "metrics.csv").read_bytes().startswith(before)
    assert names(tmp_path) == partial(tmp_path) | {"tickets.pt"}


def test_a_results_folder_that_vanishes_ends_with_one_sentence(lth, small, tmp_path, monkeypatch):
    folder, train = tmp_path / "results", lth.train

    def train_and_remove(*arguments):
        shutil.rmtree(folder)
        return train(*arguments)

    monkeypatch.setattr(lth, "train", train_and_remove)
    with pytest.raises(lth.UserError, match="No such file or directory"):
        run_here(lth, folder, *TINY)


def test_too_little_memory_ends_with_one_sentence(tmp_path):
    """The process may have 1.2 GB more than it has after the imports; the batches alone take 1.6."""
    code = f"""if True:
        import re, resource, runpy, sys
        from pathlib import Path
        import torch, torchvision, seaborn, scipy.stats
        torch.optim.AdamW([torch.zeros(1)])
        used = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (used + 1_200_000_000, -1))
        sys.argv = {command(tmp_path, *TINY, "TRIALS=10", "BATCH_SIZE=50000", "EVAL_EVERY=1")[1:]}
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "there is not enough memory: lower TRIALS, BATCH_SIZE or the number of ARMS" in result.stderr


@pytest.mark.parametrize(("error", "memory"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                  "to allocate 6272000000 bytes. Error code 12 (Cannot allocate memory)"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:83] data. DefaultCPUAllocator: not enough memory: you tried to "
                  "allocate 6272000000 bytes."), True),
    (MemoryError(), True), (RuntimeError("std::bad_alloc"), True),
    (RuntimeError("could not allocate handle: alloc table corrupt"), False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_only_lack_of_memory_is_called_that(lth, small, tmp_path, monkeypatch, error, memory):
    """Raised at level 1: level 0 is kept. What is a fault of the script keeps its traceback."""
    train = lth.train

    def fail_later(*arguments):
        if arguments[4] == 1:
            raise error
        return train(*arguments)

    monkeypatch.setattr(lth, "train", fail_later)
    with pytest.raises(lth.UserError if memory else RuntimeError) as caught:
        run_here(lth, tmp_path, *TINY, "TRIALS=1")
    assert ("not enough memory" in str(caught.value)) == memory
    assert {row["level"] for row in read_metrics(tmp_path)} == {0}
    assert "checkpoint.pt" in names(tmp_path)


class Attack:
    """Unpickled without care, it would make a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def tiny_tickets(lth, small, tmp_path):
    run_here(lth, tmp_path / "given", *TINY, "LEVELS=1", "TRIALS=1")
    return tmp_path / "given" / "tickets.pt"


def test_tickets_that_are_damaged_foreign_or_another_models_are_refused(lth, tiny_tickets, tmp_path):
    tickets, content = torch.load(tiny_tickets, weights_only=True), tiny_tickets.read_bytes()
    assert lth.load_ticket(tiny_tickets, 0, 1)
    path = tmp_path / "tickets.pt"

    def refused():
        with pytest.raises(lth.UserError, match=f"no tickets could be read from {path}"):
            lth.load_ticket(path, 0, 1)

    for damaged in (flip_weight(content), content[:1000], content[:-1], b"", pickle.dumps(tickets["constants"])):
        path.write_bytes(damaged)
        refused()
    theta0, pruned_at, settings = tickets["theta0"], tickets["pruned_at"], tickets["constants"]
    changes = [
        {"theta0": {name: tensor for name, tensor in theta0.items() if name != "fc1.bias"}},
        {"theta0": theta0 | {"fc1.weight": theta0["fc1.weight"].mT}},
        {"theta0": {name: tensor[:0] for name, tensor in theta0.items()}},
        {"pruned_at": pruned_at | {"fc1.weight": pruned_at["fc1.weight"].mT}},
        {"pruned_at": {name: levels.float() for name, levels in pruned_at.items()}},
        {"pruned_at": {}}, {"constants": settings | {"MODEL": "lenet"}}, {"constants": {}}, {"theta0": [1, 2]}]
    for change in changes:
        torch.save(tickets | change, path)
        refused()
    torch.save({"state_dict": theta0}, path)
    refused()
    torch.save({**tickets, "more": Attack(tmp_path / "attacked")}, path)
    refused()
    assert not (tmp_path / "attacked").exists()
    path.unlink()
    refused()


def test_tickets_that_do_not_fit_the_constants_are_refused(lth, tiny_tickets, tmp_path):
    for argument, folder, sentence in (
            ("MODEL=lenet", tmp_path, "found with MODEL=mlp: here it must be the same"),
            ("TRIALS=2", tmp_path, "holds 1 trials and 1 levels: TRIALS and LEVELS must be no more"),
            ("LEVELS=2", tmp_path, "holds 1 trials and 1 levels: TRIALS and LEVELS must be no more"),
            ("LEVELS=1", tiny_tickets.parent, "TICKETS_FROM lies in RESULTS_DIR"),
            ("REWIND_STEP=3", tmp_path, "found with REWIND_STEP=0: here it must be the same"),
            ("PRUNE_RATE=0.61", tmp_path, "found with PRUNE_RATE=0.6: here it must be the same"),
            ("PRUNE_SCOPE=global", tmp_path, "found with PRUNE_SCOPE=layer: here it must be the same")):
        before = names(folder)
        with pytest.raises(lth.UserError, match=sentence) as caught:
            run_here(lth, folder, *TINY, "ARMS=rewind,transfer", f"TICKETS_FROM={tiny_tickets}", "TRIALS=1", "LEVELS=1",
                     argument)
        assert "\n" not in str(caught.value)
        assert names(folder) == before


def test_results_are_moved_only_for_other_constants_or_numbers(lth, small, tmp_path, capsys):
    """The same run again replaces its own results; a wrong number in metrics.csv makes them another's."""
    one = (*TINY, "TRIALS=1", "LEVELS=0")
    run_here(lth, tmp_path, *one)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "notes.txt").write_text("the user's own")
    run_here(lth, tmp_path, *one)
    assert names(tmp_path) == {*first, "notes.txt"}
    assert (tmp_path / "metrics.csv").read_bytes() == first["metrics.csv"]
    (tmp_path / "metrics.csv").write_bytes(first["metrics.csv"].replace(b"dense", b"DENSE"))
    run_here(lth, tmp_path, *one)
    run_here(lth, tmp_path, *one, "LEVELS=1")                                   # begins with the same numbers
    previous = sorted((tmp_path / "previous").iterdir())
    assert len(previous) == 2
    assert [b"DENSE" in (folder / "metrics.csv").read_bytes() for folder in previous] == [True, False]
    assert all(names(folder) == set(first) for folder in previous)
    assert (tmp_path / "notes.txt").exists()
    assert capsys.readouterr().out.count("the results of an earlier run are now in") == 2


def test_what_a_killed_process_left_of_a_file_is_removed_by_a_run_that_ends(lth, small, tmp_path):
    run_here(lth, tmp_path, *TINY, "TRIALS=1", "LEVELS=0")
    expected = names(tmp_path)
    lth.use(**lth.read_arguments([*TINY, "TRIALS=1", "LEVELS=0"]))
    leftovers = [f".{name}.unfinished" for name in (lth.checkpoint_path(CPU).name, *expected)]
    for name in leftovers:
        (tmp_path / name).write_bytes(b"half")
    run_here(lth, tmp_path)
    assert names(tmp_path) == expected
