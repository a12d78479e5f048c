"""Whatever a user can get wrong in the constants ends before the work, in one sentence, with exit code 2."""

import re
import subprocess
import sys

import pytest
from conftest import DEFAULTS, SCRIPT

# Of the wrong type, out of range; what makes no sense together, what a machine lacks, what is no constant
BAD = [line.split("  ", 1) for line in """\
TRIALS=True  TRIALS must be of type int, not True.
LEVELS=256  LEVELS must be 0 to 255, not 256.
BATCH_SIZE=55001  BATCH_SIZE must be 1 to 55000, not 55001.
VALIDATION_SIZE=all  VALIDATION_SIZE must be of type int, not 'all'.
DATASET=mnist  DATASET must be one of MNIST, FashionMNIST, not mnist.
SCHEDULE=cosine  SCHEDULE must be one of constant, linear, not cosine.
STACK_SIZE=0  STACK_SIZE must be 1 to 1000000, not 0.
MODEL=LeNet  MODEL must be mlp or lenet, not 'LeNet'.
ARMS=rewind,rewnd  ARMS may contain only rewind, reinit
ARMS=['rewind']  ARMS must be of type tuple, not ['rewind'].
ARMS=reinit  ARMS must contain rewind
ARMS=rewind,transfer  the arm transfer needs TICKETS_FROM
REWIND_STEP=1287  REWIND_STEP must be below the 1287 steps of a training, not 1287.
LEVELS=60  LEVELS=60 and PRUNE_RATE=0.2 are incompatible: level 43 would prune 0 of the 2 weights left in fc2.weight.
PRUNE_RATE=1e-6  level 1 would prune 0 of the 235200 weights left in fc1.weight.
SEED=9223372036854775808  SEED must be 0 to 9223372036854775807, not 9223372036854775808.
DEVICE=mps  DEVICE must be auto, cpu, cuda, or cuda:1, not mps.
DEVICE=cuda:99  DEVICE=cuda:99 cannot be used here; DEVICE=auto takes a GPU if there is one.
RESULTS_DIR=/dev/null/results  Not a directory: '/dev/null/results'.
TRIAL=3  there is no constant TRIAL; did you mean TRIALS?
levels=3  there is no constant levels; did you mean LEVELS?
=5  '=5' is not of the form NAME=VALUE, such as TRIALS=1.""".splitlines()]


@pytest.mark.parametrize(("argument", "sentence"), BAD)
def test_bad_constants_are_refused(lth, tmp_path, argument, sentence):
    before = lth.constants()
    with pytest.raises(lth.UserError) as caught:
        lth.main([f"RESULTS_DIR={tmp_path}", argument])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert lth.constants() == before


def test_as_a_program_it_prints_the_sentence_and_exits_with_code_2(tmp_path):
    words = [sys.executable, str(SCRIPT), f"RESULTS_DIR={tmp_path}", "TRIALS=0"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "lth_pruning: TRIALS must be 1 to 1000, not 0.\n"


@pytest.mark.parametrize(("argument", "value"), [
    ("ARMS=rewind, keep_signs", ("rewind", "keep_signs")), ("ARMS=('rewind',)", ("rewind",)),
    ("ARMS=rewind", ("rewind",)), ("CLIP_NORM=None", None), ("DROPOUT=0", 0), ("LEARNING_RATE=1e-3", 1e-3),
    ("RESULTS_DIR=2026", "2026"), ("RESULTS_DIR='a=b'", "a=b"), ("MODEL=lenet", "lenet"), ("TRIALS=1_0", 10)])
def test_good_arguments_are_read_as_python_would(lth, argument, value):
    name = argument.split("=")[0]
    assert lth.read_arguments([argument]) == {name: value}
    lth.use(**{name: value})
    lth.check_constants()


def test_what_is_annotated_above_the_first_class_is_a_constant_and_is_checked_when_edited_in_the_file(lth):
    head, below = SCRIPT.read_text().split("\nclass UserError")
    annotated = re.findall(r"^([A-Z_]+): .+? = ", head, re.M)
    assert set(annotated) == DEFAULTS.keys() and len(annotated) > 20
    assert not re.findall(r"^[A-Z_]+: ", below, re.M)
    lth.use(TRIALS="5")
    with pytest.raises(lth.UserError, match="TRIALS must be of type int"):
        lth.check_constants()


def test_help_shows_what_it_does_and_the_constants(lth, capsys):
    lth.main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("The Lottery Ticket Hypothesis")
    assert all(f"\n  {name} = {value!r}\n" in said for name, value in lth.constants().items())
