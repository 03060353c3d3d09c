"""The MNIST family's idx files: MNIST, Fashion-MNIST, KMNIST, EMNIST's letters."""

import gzip
import hashlib
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dar_jax.errors import InputError
from dar_jax.files import damaged

MOST_BYTES = 1 << 30  # of an idx file, unpacked; EMNIST's largest has half of that
DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CLASSES = {
    "mnist": DIGITS,
    "fashion-mnist": FASHION,
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "emnist-letters": tuple("abcdefghijklmnopqrstuvwxyz"),
}
FASHION_LABELS = {  # SHA-256 of its label files, unpacked: MNIST, Fashion-MNIST and KMNIST have the same file names
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LETTERS = "emnist-letters-"


class IdxSource:
    """A split, train or test, of MNIST, Fashion-MNIST, KMNIST or EMNIST's letters: their idx files, as they are or as .gz.

    Args:
      path: the folder with `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the `t10k-` files of the test, or
        with those that EMNIST calls `emnist-letters-train-...` and `emnist-letters-test-...`.
      dataset: one of CLASSES, which names the classes; None: EMNIST's letters and Fashion-MNIST are recognized by the names
        of their files and by their labels, all others have the digits as classes.

    Letters are turned upright, and numbered from 0 on. Raises InputError naming the file that is missing or damaged.
    """

    def __init__(self, path: Path, split: str, channels: int, dataset: str | None = None):
        self._arguments = (path, split, channels, dataset)
        if split not in ("train", "test"):
            raise InputError(f"data.split is {split}, idx files have train and test")
        if dataset is not None and dataset not in CLASSES:
            raise InputError(f"data.dataset is {dataset}, of idx files it should be one of {', '.join(CLASSES)}")
        letters = dataset == "emnist-letters" or (dataset is None and any(path.glob(f"{LETTERS}*")))
        prefix = f"{LETTERS}{split}" if letters else "train" if split == "train" else "t10k"
        images, _ = _read_idx(path, f"{prefix}-images", 3)
        labels, digest = _read_idx(path, f"{prefix}-labels", 1)
        if len(images) != len(labels):
            raise InputError(f"{path} has {len(images):,} images and {len(labels):,} labels of {split}; copy its files again")
        name = dataset or ("emnist-letters" if letters else "fashion-mnist" if digest in FASHION_LABELS else "mnist")
        self.class_names = CLASSES[name]
        labels = labels.astype(int) - letters  # EMNIST counts its letters from 1 on
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            least, greatest, count = labels.min() + letters, labels.max() + letters, len(self.class_names)
            raise InputError(f"{path} holds labels from {least} to {greatest}, {name} has {count} classes")
        self._images, self._labels = images.transpose(0, 2, 1) if letters else images, labels.tolist()
        self._channels = channels
        self.description = f"{name} in {path}, {split}: {len(self)} images in {len(self.class_names)} classes"

    def __reduce__(self) -> tuple:
        return IdxSource, self._arguments

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": np.repeat(self._images[index][..., None], self._channels, axis=2), "label": self._labels[index]}


def _read_idx(path: Path, prefix: str, dimensions: int) -> tuple[np.ndarray, str]:
    """An idx file of bytes: uint8 of so many dimensions, and the SHA-256 of the file unpacked."""
    name = re.compile(rf"{prefix}[-.]idx{dimensions}-ubyte(\.gz)?")  # some copies have the dot
    files = sorted(file for file in path.iterdir() if name.fullmatch(file.name) and file.is_file())
    if not files:
        raise InputError(
            f"{path} holds no {prefix}-idx{dimensions}-ubyte.gz; data.path should hold the idx files of one data set"
        )
    header = 4 * (1 + dimensions)
    try:
        with (gzip.open if files[0].suffix == ".gz" else open)(files[0], "rb") as file:
            head = file.read(header)
            if len(head) < header or head[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(f"it is no idx file of bytes in {dimensions} dimensions")
            shape = np.frombuffer(head[4:], ">u4").astype(int).tolist()
            if min(shape) < 1 or math.prod(shape) > MOST_BYTES:
                raise ValueError(f"it says that it holds {' x '.join(map(str, shape))} bytes, {MOST_BYTES:,} are the most")
            content = file.read(math.prod(shape) + 1)
            if len(content) != math.prod(shape):
                raise ValueError(f"it does not end after the {' x '.join(map(str, shape))} bytes that it should have")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise damaged(files[0], error, "copy it again") from error
    return np.frombuffer(content, np.uint8).reshape(shape), hashlib.sha256(head + content).hexdigest()
