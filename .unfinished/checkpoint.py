"""A long run's checkpoint, small enough to be committed while the run is unfinished.

    python .unfinished/checkpoint.py pack results/paper      writes .unfinished/paper.pt.xz
    python .unfinished/checkpoint.py unpack results/paper    makes results/paper/checkpoint.pt of it again

Afterwards the run's own command goes on after its last finished level, with the version of PyTorch that the second
command prints. Left out is what can be drawn again from the run's seed, the initial weights, and what the next levels
do not need: the dense networks as trained, unless one of the arms prunes them. Pruned networks compress well.
"""

import hashlib
import io
import lzma
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import lth_pruning as lth  # noqa: E402


def sum_of(weights: dict[int, lth.Weights]) -> str:
    """The sha256 sum of all trials' weights."""
    digest = hashlib.sha256()
    for trial in sorted(weights):
        for tensor in weights[trial].values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def pack(checkpoint: Path, packed: Path) -> None:
    """Write the packed file. Only for runs that rewind to step 0."""
    saved = lth.read_saved(checkpoint)
    assert saved["identity"]["REWIND_STEP"] == 0
    state = saved["state"]
    state["theta_k"] = {-1: sum_of(state["theta_k"])}
    if "oneshot" not in saved["identity"]["ARMS"]:
        state["dense"] = {}
    whole = io.BytesIO()
    torch.save(saved, whole)
    lth.write_whole(packed, lzma.compress(whole.getvalue(), preset=9))


def unpack(packed: Path, checkpoint: Path) -> None:
    """Write the checkpoint, where there is none yet."""
    assert not checkpoint.exists(), f"{checkpoint} is there already"
    saved = torch.load(io.BytesIO(lzma.decompress(packed.read_bytes())), weights_only=True)
    for name in lth.CHECKS.keys() & saved["identity"].keys():
        setattr(lth, name, saved["identity"][name])
    state = saved["state"]
    theta0 = {trial: lth.initial_weights(lth.generator("init", trial)) for trial in state["pruned_at"]}
    assert state["theta_k"] == {-1: sum_of(theta0)}, "other initial weights than the run began with"
    state["theta_k"] = theta0
    state["dense"] = state["dense"] or theta0               # without oneshot, no arm looks at them
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lth.write_whole(checkpoint, saved)
    print(f"{checkpoint}: level {state['level']}, torch {saved['identity']['torch']}")


if __name__ == "__main__":
    command, folder = sys.argv[1:]
    packed_file = HERE / f"{Path(folder).name}.pt.xz"
    checkpoint_file = HERE.parent / folder / "checkpoint.pt"
    if command == "pack":
        pack(checkpoint_file, packed_file)
    else:
        unpack(packed_file, checkpoint_file)
