"""The data: split, normalisation, and archives and files that are damaged, missing or not what they should be."""

import gzip
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import SCRIPT, TINY, flip, run_here

ARCHIVES = SCRIPT.parent / "data" / "MNIST" / "raw"


@pytest.fixture
def raw(tmp_path, lth):
    """A data folder of the test's own with MNIST's four archives."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in ARCHIVES.glob("*.gz"):
        shutil.copy(archive, raw)
    lth.use(DATA_DIR=str(tmp_path / "data"))
    return raw


@pytest.fixture
def no_network(lth, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(lth, "download_url", fail)


def unpack(raw):
    """Leave the files of the archives, without the archives."""
    for archive in raw.glob("*.gz"):
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        archive.unlink()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """MNIST as torchvision reads it: (training part, test part)."""
    root = tmp_path_factory.mktemp("torchvision")
    shutil.copytree(ARCHIVES, root / "MNIST" / "raw")
    return [torchvision.datasets.MNIST(root, train=train, download=True) for train in (True, False)]


def test_split_and_normalisation(mnist, source):
    sizes = {name: (len(images), len(labels)) for name, (images, labels) in mnist.items()}
    assert sizes == {"train": (55_000, 55_000), "validation": (5_000, 5_000), "test": (10_000, 10_000)}
    images = mnist["train"][0].numpy().astype(np.float64)
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-4
    pixels, values = source[1].data.double().flatten(), mnist["test"][0].double().flatten()
    slope, offset = np.polyfit(values[:50_000], pixels[:50_000], 1)         # one affine map undoes it for all images
    torch.testing.assert_close(values * slope + offset, pixels, atol=1e-3, rtol=0)
    assert torch.equal(mnist["test"][1], source[1].targets)


def test_pixels_as_they_are_and_each_image_by_its_own_norm(lth, source):
    pixels = source[1].data.numpy().astype(np.float64)
    norms = np.linalg.norm(pixels.reshape(-1, 784), axis=1)
    for scale, expected in ("unit_interval", pixels / 255), ("unit_length", pixels / norms[:, None, None]):
        lth.use(PIXELS=scale)
        images = lth.load_dataset(torch.device("cpu"))["test"][0].numpy()
        np.testing.assert_allclose(images[:, 0], expected, rtol=1e-5, atol=1e-8)


def test_training_and_validation_images_part_the_60000(mnist, source):
    together = torch.cat([mnist["train"][1], mnist["validation"][1]])
    assert torch.equal(together.bincount(), source[0].targets.bincount())
    # Every image's sum of pixels is found again just as often: none is in both parts, none is lost.
    sums = torch.cat([mnist["train"][0], mnist["validation"][0]]).flatten(1).sum(1)
    ranks, original = sums.sort().values, source[0].data.flatten(1).sum(1).float().sort().values
    assert np.corrcoef(ranks.numpy(), original.numpy())[0, 1] > 0.9999999


def test_archives_count_whatever_lies_beside_them_and_the_folder_is_left_alone(lth, raw, no_network, mnist):
    """A damaged unpacked file beside its sound archive does no harm; a read-only folder would do."""
    (raw / "train-labels-idx1-ubyte").write_bytes(b"half a file")
    before = {path: path.read_bytes() for path in raw.iterdir()}
    data = lth.load_dataset(torch.device("cpu"))
    assert all(torch.equal(data[name][part], mnist[name][part]) for name in mnist for part in (0, 1))
    assert {path: path.read_bytes() for path in raw.iterdir()} == before


def test_unpacked_files_alone_will_do(lth, raw, no_network, mnist):
    unpack(raw)
    assert torch.equal(lth.load_dataset(torch.device("cpu"))["train"][0], mnist["train"][0])


@pytest.mark.parametrize(("damage", "word"), [
    (lambda content: content[:100_000], "damaged"), (lambda content: flip(content, 500_000), "damaged"),
    (lambda content: b"", "damaged"), (None, "missing")], ids=["half", "bits", "empty", "missing"])
def test_an_archive_that_fails_its_sum_is_refused(lth, raw, no_network, damage, word):
    """And is not replaced by an unpacked file, whose sum nobody knows."""
    archive = raw / "t10k-images-idx3-ubyte.gz"
    content = archive.read_bytes()
    if damage is None:
        archive.unlink()
    else:
        archive.with_suffix("").write_bytes(gzip.decompress(content))
        archive.write_bytes(damage(content))
    with pytest.raises(lth.UserError) as caught:
        lth.load_dataset(torch.device("cpu"))
    assert str(caught.value).startswith(f"{archive} is {word} and could not be downloaded (no network)")
    assert "9fb629c4189551a2d022fa330f9573f3" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("there", [True, False])
def test_a_damaged_or_missing_archive_is_downloaded(lth, raw, monkeypatch, mnist, there):
    """By torchvision, from the first mirror that has it."""
    archive, asked = raw / "train-images-idx3-ubyte.gz", []
    sound = archive.read_bytes()
    archive.write_bytes(sound[:1000]) if there else archive.unlink()

    def download(url, root, md5):
        asked.append(url)
        if len(asked) == 2:
            (raw / url.rpartition("/")[2]).write_bytes(sound)
        elif not lth.check_integrity(raw / url.rpartition("/")[2], md5):
            raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(lth, "download_url", download)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://one/", "http://two/"])
    assert torch.equal(lth.load_dataset(torch.device("cpu"))["train"][0], mnist["train"][0])
    assert asked[:2] == ["http://one/train-images-idx3-ubyte.gz", "http://two/train-images-idx3-ubyte.gz"]


@pytest.mark.parametrize(("name", "damage"), [
    ("train-images-idx3-ubyte", lambda content: content[:1_000_000]),
    ("train-images-idx3-ubyte", lambda content: content + b"\0"),
    ("train-labels-idx1-ubyte", lambda content: content[:-1]),
    ("train-labels-idx1-ubyte", lambda content: content[:4] + (59_999).to_bytes(4, "big") + content[8:-1]),
    ("train-labels-idx1-ubyte", lambda content: content[:-1] + b"\x0a"),
    ("t10k-labels-idx1-ubyte", lambda content: b""),
    ("t10k-images-idx3-ubyte", lambda content: flip(content, 3))],
    ids=["half", "longer", "label short", "labels 59999", "label 10", "empty", "header"])
def test_an_unpacked_file_of_another_length_or_content_is_refused(lth, raw, no_network, name, damage):
    unpack(raw)
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    with pytest.raises(lth.UserError) as caught:
        lth.load_dataset(torch.device("cpu"))
    assert str(caught.value).startswith(f"{raw / name} is damaged")
    assert "\n" not in str(caught.value)


def test_another_dataset_is_read_by_its_name(lth, raw, no_network, mnist):
    """Fashion-MNIST and KMNIST come in files of the same names and sizes: MNIST's own stand in for them here."""
    unpack(raw)
    for name in ("FashionMNIST", "KMNIST"):
        shutil.copytree(raw, raw.parents[1] / name / "raw")
        lth.use(DATASET=name)
        assert torch.equal(lth.load_dataset(torch.device("cpu"))["test"][0], mnist["test"][0])


def test_data_that_cannot_be_read_ends_the_run_before_it_begins(lth, raw, no_network, tmp_path):
    """An archive that is a folder stands in for one without permission, which the tests' user may have anyway."""
    (raw / "train-images-idx3-ubyte.gz").unlink()
    (raw / "train-images-idx3-ubyte.gz").mkdir()
    with pytest.raises(lth.UserError, match=r"train-images-idx3-ubyte\.gz is damaged and could not be downloaded"):
        run_here(lth, tmp_path / "results", *TINY, f"DATA_DIR={raw.parents[1]}")
    assert not list((tmp_path / "results").iterdir())
