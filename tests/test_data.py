"""The data: split, normalisation, and archives that are damaged or missing."""

import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import SCRIPT, TINY, run_script

RAW = SCRIPT.parent / "data" / "MNIST" / "raw"


@pytest.fixture
def archives(tmp_path, lth):
    """A data folder of the test's own with MNIST's four archives, not unpacked."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in RAW.glob("*.gz"):
        shutil.copy(archive, raw)
    lth.use(DATA_DIR=str(tmp_path / "data"))
    return raw


def test_split_and_normalisation(lth, mnist):
    sizes = {name: (len(images), len(labels)) for name, (images, labels) in mnist.items()}
    assert sizes == {"train": (55_000, 55_000), "validation": (5_000, 5_000), "test": (10_000, 10_000)}
    images = mnist["train"][0].numpy().astype(np.float64)
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-4
    source = torchvision.datasets.MNIST(SCRIPT.parent / "data", train=False)
    pixels, values = source.data.double().flatten(), mnist["test"][0].double().flatten()
    slope, offset = np.polyfit(values[:50_000], pixels[:50_000], 1)         # one affine map undoes it for all images
    torch.testing.assert_close(values * slope + offset, pixels, atol=1e-3, rtol=0)
    assert torch.equal(mnist["test"][1], source.targets)


def test_training_and_validation_images_part_the_60000(mnist):
    source = torchvision.datasets.MNIST(SCRIPT.parent / "data", train=True)
    together = torch.cat([mnist["train"][1], mnist["validation"][1]])
    assert torch.equal(together.bincount(), source.targets.bincount())
    # Every image's sum of pixels is found again just as often: none is in both parts, none is lost.
    sums = torch.cat([mnist["train"][0], mnist["validation"][0]]).flatten(1).sum(1)
    ranks, original = sums.sort().values, source.data.flatten(1).sum(1).float().sort().values
    assert np.corrcoef(ranks.numpy(), original.numpy())[0, 1] > 0.9999999


@pytest.mark.parametrize("damage", ["half", "bits", "none"])
def test_damaged_files_are_repaired_from_the_archive(lth, archives, mnist, damage):
    if damage != "none":
        lth.load_dataset(torch.device("cpu"))
        unpacked = archives / "train-images-idx3-ubyte"
        content = bytearray(unpacked.read_bytes())
        if damage == "bits":
            content[1_000_000] ^= 255
        unpacked.write_bytes(content[:len(content) // 2] if damage == "half" else content)
    data = lth.load_dataset(torch.device("cpu"))
    assert all(torch.equal(data[name][0], mnist[name][0]) for name in mnist)


def no_network(*_args, **_kwargs):
    raise RuntimeError("no network")


@pytest.mark.parametrize("damage", ["missing", "archive", "half without archive"])
def test_without_archive_and_network_one_sentence_says_what_to_do(lth, archives, monkeypatch, damage):
    monkeypatch.setattr(torchvision.datasets.mnist, "download_and_extract_archive", no_network)
    archive = archives / "t10k-images-idx3-ubyte.gz"
    if damage == "half without archive":
        (archives / "t10k-images-idx3-ubyte").write_bytes(b"\0" * 1000)
    if damage == "archive":
        archive.write_bytes(archive.read_bytes()[:100_000])
    else:
        archive.unlink()
    with pytest.raises(lth.UserError, match=r"t10k-images-idx3-ubyte\.gz") as caught:
        lth.load_dataset(torch.device("cpu"))
    assert str(archives) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unpacked_files_alone_will_do(lth, archives, mnist):
    lth.load_dataset(torch.device("cpu"))
    for archive in archives.glob("*.gz"):
        archive.unlink()
    assert torch.equal(lth.load_dataset(torch.device("cpu"))["train"][0], mnist["train"][0])


def test_another_dataset_is_read_by_its_name(lth, archives, mnist):
    """Fashion-MNIST and KMNIST come in files of the same names and sizes: MNIST's own stand in for them here."""
    lth.load_dataset(torch.device("cpu"))
    for name in ("FashionMNIST", "KMNIST"):
        raw = archives.parents[1] / name / "raw"
        raw.mkdir(parents=True)
        for unpacked in archives.glob("*-ubyte"):
            shutil.copy(unpacked, raw)
        lth.use(DATASET=name)
        assert torch.equal(lth.load_dataset(torch.device("cpu"))["test"][0], mnist["test"][0])


def test_the_script_ends_with_code_2_where_there_is_no_data(tmp_path):
    (tmp_path / "data").write_text("not a folder")
    result = run_script(tmp_path, *TINY, f"DATA_DIR={tmp_path / 'data'}")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "put its archives" in result.stderr
