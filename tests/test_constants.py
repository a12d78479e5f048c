"""Whatever a user can get wrong in the constants ends before the work, in one sentence, with exit code 2."""

import ast
import re
from typing import Literal, get_args, get_origin

import pytest
from conftest import DEFAULTS, SCRIPT, run_script

BAD = [
    ("TRIALS=0", "TRIALS must be a whole number, 1 to 1000, not 0"),
    ("TRIALS=2.5", "TRIALS must be a whole number"),
    ("TRIALS=True", "TRIALS must be a whole number"),
    ("TRIALS=five", "TRIALS must be a whole number"),
    ("LEVELS=-1", "LEVELS must be a whole number, 0 to 255"),
    ("LEVELS=256", "LEVELS must be a whole number, 0 to 255"),
    ("PRUNE_RATE=1", "PRUNE_RATE must be a number between 0 and 1"),
    ("PRUNE_RATE=20", "PRUNE_RATE must be a number between 0 and 1"),
    ("PRUNE_SCOPE=net", "PRUNE_SCOPE must be one of layer, global"),
    ("DROPOUT=1.0", "DROPOUT must be a number from 0 to below 1"),
    ("LEARNING_RATE=0", "LEARNING_RATE must be a number above 0"),
    ("LEARNING_RATE=None", "LEARNING_RATE must be a number above 0"),
    ("WEIGHT_DECAY=-1", "WEIGHT_DECAY must be"),
    ("CLIP_NORM=0", "CLIP_NORM must be a number above 0, or None"),
    ("BATCH_SIZE=60000", "BATCH_SIZE must be a whole number, 1 to 55000"),
    ("EVAL_EVERY=0", "EVAL_EVERY must be"),
    ("SEED=-1", "SEED must be"),
    ("EPOCHS=0", "EPOCHS must be"),
    ("INIT=kaiming", "did you mean kaiming_normal?"),
    ("DATASET=mnist", "did you mean MNIST?"),
    ("DATASET=FashionMnist", "did you mean FashionMNIST?"),
    ("DATASET=CIFAR10", "DATASET must be one of MNIST, FashionMNIST, KMNIST"),
    ("PIXELS=unit_len", "did you mean unit_length?"),
    ("MODEL=LeNet", "did you mean lenet?"),
    ("ARMS=rewind,rewnd", "ARMS must be"),
    ("ARMS=rewind,rewind", "ARMS must be"),
    ("ARMS=()", "ARMS must be"),
    ("ARMS=reinit", "ARMS must contain rewind"),
    ("ARMS=rewind,transfer", "TICKETS_FROM"),
    ("TICKETS_FROM=nothing.pt", "TICKETS_FROM"),
    ("REWIND_STEP=1287", "REWIND_STEP must be below the 1287 steps"),
    ("LEVELS=60", "LEVELS=60 is too many"),
    ("DEVICE=gpu", "DEVICE must be auto, cpu, cuda, cuda:1 and so on, or mps, not 'gpu'"),
    ("RESULTS_DIR=", "RESULTS_DIR must be"),
    ("RESULTS_DIR=/dev/null/results", "the results folder /dev/null/results cannot be written to"),
    ("TRIAL=3", "there is no constant TRIAL; did you mean TRIALS?"),
    ("levels=3", "there is no constant levels; did you mean LEVELS?"),
    ("TRIALS=1001", "TRIALS must be a whole number, 1 to 1000"),
    ("TRIALS=5,", "TRIALS must be a whole number"),
    ("TRIALS=", "TRIALS must be a whole number"),
    ("LEVELS=None", "LEVELS must be a whole number"),
    ("SEED=1.0", "SEED must be a whole number"),
    ("EPOCHS=3e1", "EPOCHS must be a whole number"),
    ("BATCH_SIZE=-128", "BATCH_SIZE must be a whole number"),
    ("LEARNING_RATE=nan", "LEARNING_RATE must be a number above 0"),
    ("LEARNING_RATE=1e999", "LEARNING_RATE must be a number above 0"),
    ("WEIGHT_DECAY=None", "WEIGHT_DECAY must be a number of at least 0"),
    ("CLIP_NORM=False", "CLIP_NORM must be a number above 0, or None"),
    ("DROPOUT=-0.1", "DROPOUT must be a number from 0 to below 1"),
    ("PRUNE_RATE=0", "PRUNE_RATE must be a number between 0 and 1"),
    ("PRUNE_RATE=1e-6", "at PRUNE_RATE=1e-06: at level 1, 0 of the"),
    ("PRUNE_RATE=0.9999", "LEVELS=16 is too many at PRUNE_RATE=0.9999"),
    ("PRUNE_SCOPE=Global", "did you mean global?"),
    ("ARMS=rewind,", "ARMS must be"),
    ("ARMS=[[]]", "ARMS must be"),
    ("ARMS=None", "ARMS must be"),
    ("ARMS=transfer,rewind", "the arm transfer and TICKETS_FROM go together"),
    ("REWIND_STEP=-1", "REWIND_STEP must be a whole number"),
    ("TICKETS_FROM=", "TICKETS_FROM must be the path of a tickets.pt, or None"),
    ("DEVICE=cpu:7", "DEVICE must be auto, cpu"),
    ("DEVICE=cuda:99", "DEVICE=cuda:99 cannot be used here"),
    ("DEVICE=", "DEVICE must be"),
    ("DATA_DIR=", "DATA_DIR must be"),
    ("RESULTS_DIR=a\0b", "RESULTS_DIR must be"),
    (f"RESULTS_DIR={SCRIPT}", f"the results folder {SCRIPT} cannot be written to"),
    ("RESULTS_DIR=/proc/self", "the results folder /proc/self cannot be written to"),
    ("VALIDATION_SIZE=1", "there is no constant VALIDATION_SIZE"),
    ("=5", "'=5' is not of the form NAME=VALUE"),
    ("--trials", "'--trials' is not of the form NAME=VALUE"),
]


@pytest.mark.parametrize(("argument", "sentence"), BAD)
def test_bad_constants_are_refused(lth, tmp_path, argument, sentence):
    with pytest.raises(lth.UserError) as caught:
        lth.main([f"RESULTS_DIR={tmp_path}", argument])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_program_ends_with_one_sentence_and_code_2(tmp_path):
    result = run_script(tmp_path, "TRIALS=0")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("lth_pruning: ")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_constant_edited_in_the_file_is_checked_too(lth):
    lth.use(TRIALS="5")
    with pytest.raises(lth.UserError, match="TRIALS must be a whole number"):
        lth.check_constants()


@pytest.mark.parametrize(("argument", "name", "value"), [
    ("ARMS=rewind,shuffle", "ARMS", ("rewind", "shuffle")), ("ARMS=('rewind',)", "ARMS", ("rewind",)),
    ("ARMS=rewind", "ARMS", ("rewind",)), ("CLIP_NORM=None", "CLIP_NORM", None), ("DROPOUT=0", "DROPOUT", 0),
    ("LEARNING_RATE=1e-3", "LEARNING_RATE", 1e-3), ("RESULTS_DIR=2026", "RESULTS_DIR", "2026"),
    ("RESULTS_DIR='a=b'", "RESULTS_DIR", "a=b"), ("MODEL=lenet", "MODEL", "lenet"), ("TRIALS=1_0", "TRIALS", 10)])
def test_good_arguments_are_read_as_python_would(lth, argument, name, value):
    assert lth.read_arguments([argument]) == {name: value}
    lth.use(**{name: value})
    lth.check_constants()


def test_every_constant_has_a_rule(lth):
    """What is annotated at the top is the constants, each with choices or a range, and nothing else has either."""
    body = ast.parse(SCRIPT.read_text()).body
    annotated = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and node.target.id.isupper()]
    assert len(annotated) > 20
    assert list(lth.constants()) == list(lth.rules()) == annotated
    first = next(number for number, node in enumerate(body) if isinstance(node, ast.FunctionDef | ast.ClassDef))
    assert annotated == [node.target.id for node in body[:first] if isinstance(node, ast.AnnAssign)]
    choices = {name for name, annotation in lth.rules().items() if get_origin(annotation) is Literal}
    assert choices | set(lth.RANGES) == set(annotated) and not choices & set(lth.RANGES)
    assert all(DEFAULTS[name] in get_args(lth.rules()[name]) for name in choices)
    lth.check_constants()


def test_the_scripts_own_list_of_packages_is_the_requirements(lth):
    """Tools that run a script in an environment of its own read the list in its first lines (PEP 723)."""
    (block,) = re.findall(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", SCRIPT.read_text(), re.M)
    content = "".join(line[2:] or "\n" for line in block.splitlines(keepends=True))
    (listed,) = re.findall(r"^dependencies = (\[.*?\])$", content, re.M | re.S)
    assert sorted(ast.literal_eval(listed)) == sorted((SCRIPT.parent / "requirements.txt").read_text().split())
    assert re.search(r'^requires-python = ">=3\.10"$', content, re.M)


def test_main_leaves_the_constants_as_they_were(lth, monkeypatch, tmp_path):
    """Called twice in a notebook, it begins both times with the file's constants; after an error, too."""
    seen = []
    lth.use(**DEFAULTS | {"SEED": 7})                           # edited, as it were
    before = lth.constants()
    with monkeypatch.context() as patch:
        patch.setattr(lth, "run", lambda: seen.append(lth.constants()))
        lth.main(["TRIALS=2", "MODEL=lenet", "DROPOUT=0"])
        lth.main(["LEVELS=3"])
    assert seen == [before | {"TRIALS": 2, "MODEL": "lenet", "DROPOUT": 0.0}, before | {"LEVELS": 3}]
    assert lth.constants() == before
    for arguments, error in ((["LEVELS=2", "TRIALS=0"], "TRIALS"), (["LEVELS=2", "NOTHING=1"], "NOTHING"),
                             (["LEVELS=2", "DEVICE=cuda:99"], "DEVICE")):
        with pytest.raises(lth.UserError, match=error):
            lth.main([f"RESULTS_DIR={tmp_path}", *arguments])
        assert lth.constants() == before


def test_help_shows_the_constants(lth, capsys):
    lth.main(["--help"])
    assert "PRUNE_RATE = 0.2" in capsys.readouterr().out
