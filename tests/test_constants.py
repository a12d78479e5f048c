"""Whatever a user can get wrong in the constants ends before the work, in one sentence, with exit code 2."""

import re

import pytest
import torch
from conftest import DEFAULTS, SCRIPT

# Of the wrong type, out of range; what makes no sense together, what a machine lacks, what is no constant
BAD = [line.split("  ", 1) for line in """\
TRIALS=True  TRIALS must be a whole number
LEVELS=256  LEVELS must be a whole number, 0 to 255
BATCH_SIZE=55001  BATCH_SIZE must be a whole number, 1 to as many as there are images to train on
VALIDATION_SIZE=all  VALIDATION_SIZE must be a whole number, 1 to 59999, not 'all'.
DATASET=mnist  DATASET must be one of MNIST, FashionMNIST, not 'mnist'.
MODEL=LeNet  MODEL must be mlp or lenet, not 'LeNet'.
ARMS=rewind,rewnd  ARMS must be a choice, each once, of rewind, reinit
ARMS=reinit  ARMS must contain rewind
REWIND_STEP=1287  REWIND_STEP must be below the 1287 steps of a training, not 1287.
LEVELS=60  LEVELS=60 and PRUNE_RATE=0.2 do not go together: at level
PRUNE_RATE=1e-6  at level 1, 0 of the 235200 weights left in fc1.weight would be pruned.
SEED=9223372036854775808  SEED must be a whole number, 0 to 2**63 - 1, not 9223372036854775808.
TICKETS_FROM='a\\0b'  TICKETS_FROM must be the path of a tickets.pt, or None, not 'a\\x00b'.
DEVICE=gpu  DEVICE must be auto, cpu, cuda, cuda:1 and so on, or mps, not 'gpu'.
DEVICE=cuda:99  DEVICE=cuda:99 cannot be used here: DEVICE=auto takes what there is.
RESULTS_DIR=/dev/null/results  the results folder /dev/null/results cannot be written to (Not a directory)
TRIAL=3  there is no constant TRIAL; did you mean TRIALS?
levels=3  there is no constant levels; did you mean LEVELS?
=5  '=5' is not of the form NAME=VALUE, such as TRIALS=1.""".splitlines()]
BAD.append((f"DROPOUT={10**400}", "DROPOUT must be a number from 0 to 0.99, not inf."))
if not torch.backends.mps.is_available():
    BAD.append(("DEVICE=mps", "DEVICE=mps cannot be used here: DEVICE=auto takes what there is."))


@pytest.mark.parametrize(("argument", "sentence"), BAD)
def test_bad_constants_are_refused(lth, tmp_path, argument, sentence):
    before = lth.constants()
    with pytest.raises(lth.UserError) as caught:
        lth.main([f"RESULTS_DIR={tmp_path}", argument])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert lth.constants() == before


@pytest.mark.parametrize(("argument", "value"), [
    ("ARMS=rewind,shuffle", ("rewind", "shuffle")), ("ARMS=['rewind']", ("rewind",)), ("ARMS=rewind", ("rewind",)),
    ("CLIP_NORM=None", None), ("DROPOUT=0", 0), ("LEARNING_RATE=1e-3", 1e-3), ("RESULTS_DIR=2026", "2026"),
    ("RESULTS_DIR='a=b'", "a=b"), ("MODEL=lenet", "lenet"), ("TRIALS=1_0", 10)])
def test_good_arguments_are_read_as_python_would(lth, argument, value):
    name = argument.split("=")[0]
    assert lth.read_arguments([argument]) == {name: value}
    lth.use(**{name: value})
    lth.check_constants()


def test_every_constant_has_a_check_of_its_type(lth):
    """What is annotated above the first class is the constants. Edited there, they are checked as well."""
    head, below = SCRIPT.read_text().split("\nclass UserError")
    annotated = re.findall(r"^([A-Z_]+): (.+?) = ", head, re.M)
    assert {name for name, _ in annotated} == lth.CHECKS.keys() == DEFAULTS.keys() and len(annotated) > 20
    assert not re.findall(r"^[A-Z_]+: ", below, re.M)
    assert all(lth.CHECKS[name][0] == eval(kind) for name, kind in annotated)
    lth.use(TRIALS="5")
    with pytest.raises(lth.UserError, match="TRIALS must be a whole number"):
        lth.check_constants()


def test_help_shows_what_it_does_and_the_constants(lth, capsys):
    lth.main(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("The Lottery Ticket Hypothesis")
    assert all(f"\n  {name} = {value!r}\n" in said for name, value in lth.constants().items())
