"""The data: against the archives' own bytes, and with files that are missing, damaged or another dataset's."""

import gzip
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import SCRIPT, flipped, names, seeded

CPU = torch.device("cpu")
ARCHIVES = SCRIPT.parent / "data" / "MNIST" / "raw"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
GZIPPED = tuple(f"{name}.gz" for name in FILES)


@pytest.fixture
def raw(tmp_path, lth, monkeypatch):
    """MNIST's four archives in a DATA_DIR of the test's own, nothing unpacked; nobody is there to download from."""
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("no_proxy", "*")
    shutil.copytree(ARCHIVES, tmp_path / "MNIST" / "raw", ignore=lambda _, names: set(names) - set(GZIPPED))
    lth.use(DATA_DIR=str(tmp_path))
    return tmp_path / "MNIST" / "raw"


def refusal(lth) -> str:
    """Return the one sentence with which the data is refused."""
    with pytest.raises(lth.UserError) as caught:
        lth.load_dataset(CPU)
    (sentence,) = str(caught.value).splitlines()
    return sentence


@pytest.mark.parametrize("scale", ["standardised", "unit_interval", "unit_length"])
def test_every_image_is_in_one_part_with_its_own_label_and_scaled_as_asked(lth, scale):
    """SEED's permutation of the 60,000 tells in which. Mean and standard deviation are the training part's alone."""
    lth.use(SEED=43, VALIDATION_SIZE=3_000, PIXELS=scale)
    data = lth.load_dataset(CPU)
    images, labels, test_images, test_labels = (
        np.frombuffer(gzip.decompress((ARCHIVES / name).read_bytes()), np.uint8) for name in GZIPPED)
    images, test_images = (pixels[16:].reshape(-1, 28, 28) for pixels in (images, test_images))
    labels, test_labels = labels[8:], test_labels[8:]
    order = torch.randperm(60_000, generator=seeded("split", seed=43)).numpy()
    held_out, rest = order[:3_000], order[3_000:]
    mean, std = images[rest].mean() / 255, images[rest].std() / 255
    for name, pixels, classes in (("train", images[rest], labels[rest]), ("test", test_images, test_labels),
                                  ("validation", images[held_out], labels[held_out])):
        expected = pixels[::20] / 255
        if scale == "standardised":
            expected = (expected - mean) / std
        elif scale == "unit_length":
            expected = expected / np.linalg.norm(expected, axis=(1, 2), keepdims=True)
        assert data[name][0].shape == (len(pixels), 1, 28, 28) and data[name][0].dtype == torch.float
        np.testing.assert_allclose(data[name][0][::20, 0].numpy(), expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(data[name][1], classes)


@pytest.mark.parametrize(("name", "damage"), [
    (FILES[0], flipped), (FILES[3], flipped), (FILES[0], lambda content: content[:6_000]), (FILES[1], lambda _: b""),
    (GZIPPED[2], flipped)])
def test_a_damaged_file_is_refused(lth, raw, name, damage):
    """There are either the unpacked files, which torchvision does not verify, or the archives; and no network."""
    if name in FILES:
        lth.read_images()
        for archive in GZIPPED:
            (raw / archive).unlink()
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    expected = f"MNIST could not be read from {raw} ("
    if name in FILES and damage is flipped:
        expected = f"the unpacked files in {raw} are not MNIST, or are damaged: remove "
    assert refusal(lth).startswith(expected)


def test_archives_are_unpacked_without_a_network_and_another_datasets_are_refused(lth, raw, capsys):
    """A download is announced only if there is something to download. Fashion-MNIST's files have MNIST's names."""
    lth.load_dataset(CPU)
    assert names(raw) == {*FILES, *GZIPPED} and capsys.readouterr().out == ""
    fashion = raw.parents[1] / "FashionMNIST" / "raw"
    shutil.copytree(raw, fashion)
    shutil.rmtree(raw)
    assert "urlopen error" in refusal(lth) and capsys.readouterr().out == f"downloading MNIST to {raw}\n"
    lth.use(DATASET="FashionMNIST")
    assert refusal(lth).startswith(f"the unpacked files in {fashion} are not FashionMNIST, or are damaged: remove ")
