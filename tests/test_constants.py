"""Whatever a user can get wrong in the constants ends before the work, in one sentence, with exit code 2."""

import pytest

# Of the wrong type, out of range; what makes no sense together, what a machine lacks, what is no constant
BAD = [line.split("  ", 1) for line in """\
TRIALS=True  TRIALS must be of type int, not True.
TRIALS=0  TRIALS must be 1 to 1000, not 0.
BATCH_SIZE=55001  BATCH_SIZE must be 1 to 55000, not 55001.
DATASET=mnist  DATASET must be one of MNIST, FashionMNIST, not mnist.
MODEL=LeNet  MODEL must be mlp or lenet, not 'LeNet'.
ARMS=rewind,rewnd  ARMS may contain only rewind, reinit
ARMS=reinit  ARMS must contain rewind
ARMS=rewind,transfer  the arm transfer and TICKETS_FROM need each other
REWIND_STEP=1287  REWIND_STEP must be below the 1287 steps of training, not 1287.
LEVELS=60  LEVELS=60 and PRUNE_RATE=0.2 are incompatible: level 43 would prune 0 of the 2 weights left in fc2.weight.
DEVICE=mps  DEVICE must be auto, cpu, cuda, or cuda:1, not mps.
DEVICE=cuda:99  DEVICE=cuda:99 cannot be used here; DEVICE=auto takes a GPU if there is one.
RESULTS_DIR=/dev/null/results  Not a directory: '/dev/null/results'.
TRIAL=3  there is no constant TRIAL; did you mean TRIALS?
=5  '=5' is not of the form NAME=VALUE, such as TRIALS=1.""".splitlines()]


@pytest.mark.parametrize(("argument", "sentence"), BAD)
def test_bad_constants_are_refused(lth, tmp_path, argument, sentence):
    before = lth.constants()
    with pytest.raises(lth.UserError) as caught:
        lth.main([f"RESULTS_DIR={tmp_path}", argument])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert lth.constants() == before


def test_good_arguments_are_read_as_python_would(lth):
    arguments = ["ARMS=rewind, reinit", "CLIP_NORM=None", "DROPOUT=0", "LEARNING_RATE=1e-3", "RESULTS_DIR=2026"]
    found = lth.read_arguments(arguments)
    assert found == {"ARMS": ("rewind", "reinit"), "CLIP_NORM": None, "DROPOUT": 0, "LEARNING_RATE": 1e-3,
                     "RESULTS_DIR": "2026"}
    lth.use(**found)
    lth.check_constants()
