"""Images that are not files of their own: idx files."""

import gzip
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from dar_jax.config import DataConfig
from dar_jax.data import archives
from dar_jax.data.archives import FASHION
from dar_jax.data.pipeline import batches
from dar_jax.data.sources import held_out, open_source
from dar_jax.errors import InputError

FASHION_FILES = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))  # Debian's dataset-fashion-mnist
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)


def idx(array, *shape):
    """An idx file of bytes, whose header says another shape where one is given."""
    shape = shape or array.shape
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder, labels=(3, 1, 4, 1, 5, 9), prefix="", names=("train", "t10k"), pack=gzip.compress, end=".gz"):
    folder.mkdir(exist_ok=True)
    for name, pixels in zip(names, (PIXELS, PIXELS[::-1])):
        (folder / f"{prefix}{name}-images-idx3-ubyte{end}").write_bytes(pack(idx(pixels)))
        (folder / f"{prefix}{name}-labels-idx1-ubyte{end}").write_bytes(pack(idx(np.array(labels))))
    return DataConfig(source="idx", path=str(folder), image_size=28, channels=1, crop="none", flip=False)


@pytest.mark.parametrize(("pack", "end"), [(gzip.compress, ".gz"), (bytes, "")])
def test_idx(tmp_path, pack, end):
    config = write_idx(tmp_path / "idx", pack=pack, end=end)
    source = pickle.loads(pickle.dumps(open_source(config)))
    assert (len(source), source.class_names) == (6, tuple("0123456789"))
    assert source.description == f"mnist in {tmp_path}/idx, train: 6 images in 10 classes"
    for index, label in enumerate((3, 1, 4, 1, 5, 9)):
        np.testing.assert_array_equal(source[index]["image"], PIXELS[index][..., None])
        assert source[index]["label"] == label
    np.testing.assert_array_equal(open_source(held_out(config))[0]["image"], PIXELS[5][..., None])
    colour = open_source(DataConfig(source="idx", path=config.path))[2]["image"]
    assert colour.shape == (28, 28, 3) and (colour == PIXELS[2][..., None]).all()
    assert next(batches(source, config, batch_size=6, seed=0))["image"].shape == (6, 28, 28, 1)


def test_names_with_a_dot(tmp_path):
    config = write_idx(tmp_path / "idx")
    for file in (tmp_path / "idx").iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    assert len(open_source(config)) == 6


def test_letters_stand_upright_and_count_from_0(tmp_path):
    config = write_idx(tmp_path / "idx", (1, 2, 26, 1, 1, 1), "emnist-letters-", ("train", "test"))
    source = open_source(config)
    assert [source[index]["label"] for index in range(3)] == [0, 1, 25]
    assert source.class_names[0] + source.class_names[25] == "az"
    np.testing.assert_array_equal(source[4]["image"], PIXELS[4].T[..., None])
    assert len(open_source(held_out(config))) == 6


def test_which_of_the_family(tmp_path, monkeypatch):
    config = write_idx(tmp_path / "idx")
    assert open_source(DataConfig(source="idx", path=config.path, dataset="kmnist")).class_names[1] == "ki"
    labels = gzip.decompress((tmp_path / "idx" / "train-labels-idx1-ubyte.gz").read_bytes())
    monkeypatch.setattr(archives, "FASHION_LABELS", {hashlib.sha256(labels).hexdigest()})
    assert open_source(config).class_names == FASHION
    with pytest.raises(InputError, match="data.dataset is cifar10, .*mnist, fashion-mnist, kmnist, emnist-letters"):
        open_source(DataConfig(source="idx", path=config.path, dataset="cifar10"))
    with pytest.raises(InputError, match="data.split is val, idx files have train and test"):
        open_source(DataConfig(source="idx", path=config.path, split="val"))


@pytest.mark.skipif(not FASHION_FILES.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_the_real_fashion_mnist(split, count):
    source = open_source(DataConfig(source="idx", path=str(FASHION_FILES), split=split, channels=1))
    assert (len(source), source.class_names) == (count, FASHION)
    labels = [source[index]["label"] for index in range(count)]
    assert set(np.bincount(labels)) == {count // 10}
    assert labels[:4] == {"train": [9, 0, 0, 3], "test": [9, 2, 1, 1]}[split]


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (IMAGES, None, "idx holds no train-images-idx3-ubyte.gz"),
        (IMAGES, b"no gzip", f"{IMAGES} is damaged: Not a gzipped file"),
        (IMAGES, gzip.compress(idx(PIXELS), mtime=0)[:-100], f"{IMAGES} is damaged: Compressed file ended"),
        (IMAGES, gzip.compress(b"\0\0\x08", mtime=0), f"{IMAGES} is damaged: it is no idx file of bytes in 3 dimensions"),
        (IMAGES, gzip.compress(idx(PIXELS[0]), mtime=0), f"{IMAGES} is damaged: it is no idx file of bytes in 3 dimensions"),
        (
            IMAGES,
            gzip.compress(idx(PIXELS, 7, 28, 28), mtime=0),
            f"{IMAGES} is damaged: it does not end after the 7 x 28 x 28 bytes",
        ),
        (
            IMAGES,
            gzip.compress(idx(PIXELS, 5, 28, 28), mtime=0),
            f"{IMAGES} is damaged: it does not end after the 5 x 28 x 28 bytes",
        ),
        (
            IMAGES,
            gzip.compress(idx(PIXELS, 2**32 - 1, 2**32 - 1, 2**32 - 1), mtime=0),
            f"{IMAGES} is damaged: it says that it holds 4294",
        ),
        (IMAGES, gzip.compress(idx(PIXELS, 0, 28, 28), mtime=0), f"{IMAGES} is damaged: it says that it holds 0 x 28"),
        (LABELS, gzip.compress(idx(np.arange(5)), mtime=0), "idx has 6 images and 5 labels of train; copy its files again"),
        (LABELS, gzip.compress(idx(np.arange(5, 11)), mtime=0), "idx holds labels from 5 to 10, mnist has 10 classes"),
    ],
)
def test_damaged_idx(tmp_path, file, content, message):
    config = write_idx(tmp_path / "idx")
    (tmp_path / "idx" / file).unlink()
    if content is not None:
        (tmp_path / "idx" / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        open_source(config)
    assert "\n" not in str(raised.value)
