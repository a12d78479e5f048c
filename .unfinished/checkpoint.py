"""A long run's checkpoint, small enough to be committed while the run is unfinished.

    python .unfinished/checkpoint.py pack results/paper        writes .unfinished/paper.pt.xz
    python .unfinished/checkpoint.py unpack results/paper      makes results/paper/checkpoint.pt of it again

Afterwards the run's own command resumes after its last finished level, with the version of PyTorch that the second
command prints. Left out are the initial weights, which are drawn again by the run's seed, and the trained dense
networks, if none of the run's arms needs them. Pruned networks compress well.
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
    """Return the sha256 sum of all trials' weights."""
    digest = hashlib.sha256()
    for trial in sorted(weights):
        for tensor in weights[trial].values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def pack(checkpoint: Path, packed: Path) -> None:
    """Write the packed file. Only for runs that rewind to step 0."""
    saved = lth.load_verified(checkpoint)
    assert saved["identity"]["REWIND_STEP"] == 0
    state = saved["state"]
    state["theta_k"] = {-1: sum_of(state["theta_k"])}
    if "oneshot" not in saved["identity"]["ARMS"]:
        state["dense"] = {}
    content = io.BytesIO()
    torch.save(saved, content)
    packed.write_bytes(lzma.compress(content.getvalue(), preset=9))


def unpack(packed: Path, checkpoint: Path) -> None:
    """Write the checkpoint, unless there is one."""
    assert not checkpoint.exists(), f"{checkpoint} exists"
    saved = torch.load(io.BytesIO(lzma.decompress(packed.read_bytes())), weights_only=True)
    for name in lth.constants().keys() & saved["identity"].keys():
        setattr(lth, name, saved["identity"][name])
    state = saved["state"]
    theta0 = {trial: lth.initial_weights(lth.generator("init", trial)) for trial in state["pruned_at"]}
    assert state["theta_k"] == {-1: sum_of(theta0)}, "other initial weights than those of the run"
    state["theta_k"] = theta0
    state["dense"] = state["dense"] or theta0               # without oneshot, no arm looks at them
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lth.write_atomically(checkpoint, saved)
    print(f"{checkpoint}: level {state['level']}, torch {saved['identity']['torch']}")


if __name__ == "__main__":
    command, folder = sys.argv[1:]
    packed_file = HERE / f"{Path(folder).name}.pt.xz"
    checkpoint_file = HERE.parent / folder / "checkpoint.pt"
    if command == "pack":
        pack(checkpoint_file, packed_file)
    else:
        unpack(packed_file, checkpoint_file)
