"""Random access to labelled images: the embedded digits, a folder of images, CIFAR-10's files, TFDS, stored codes."""

import dataclasses
import io
import logging
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image, ImageOps

from dar_jax.config import DataConfig
from dar_jax.data.codes import open_codes
from dar_jax.errors import InputError
from dar_jax.files import is_remote

log = logging.getLogger("dar_jax.data")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SPLITS = ("train", "val", "test")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_report_lock = threading.Lock()


class Source(Protocol):
    """What the pipeline reads from. Reading is a pure function of the index and safe in several threads.

    A source of images gives {"image": uint8 [H, W, C], "label": int}, in the image's own size; one of stored codes gives
    {"codes": int32 [crops, T], "label": int}. A source some of whose elements may turn out unreadable gives a neighbour in
    their place, and has a method `read(index)` besides, which gives None for them.
    """

    class_names: tuple[str, ...]
    description: str  # one line

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def held_out(config: DataConfig) -> DataConfig:
    """The same data set in the split to evaluate on: `held_out_split`, or else the usual one; codes as they are."""
    usual = {"digits": "test", "cifar10": "test", "folder": "val", "tfds": "validation"}.get(config.source, config.split)
    return dataclasses.replace(config, split=config.held_out_split or usual)


def open_source(config: DataConfig) -> Source:
    """Opens what `config.source`, `path`, `dataset` and `split` name; images come with `config.channels` channels.

    Raises InputError if the path is not given, is missing, holds nothing to read, or is damaged.
    """
    if config.channels not in (1, 3):
        raise InputError(f"data.channels is {config.channels}, it should be 1 (grey) or 3 (RGB)")
    if config.source == "digits":
        return DigitsSource(config.split, config.channels)
    if config.source == "tfds":
        if not config.dataset:
            raise InputError("data.dataset is not given; the source tfds needs the name of a data set, such as imagenet2012")
        return TfdsSource(config.dataset, config.path, config.split, config.channels, config.image_size)
    if not config.path:
        raise InputError(f"data.path is not given; the source {config.source} needs the folder of its files")
    if config.source == "codes":
        return open_codes(config.path, config.split, config.verify)
    if is_remote(config.path):
        raise InputError(f"data.path {config.path} is in a bucket, where only codes and TFDS are read; mount or copy it")
    path = Path(config.path)
    if not path.is_dir():
        raise InputError(f"data.path {path} is not a folder" if path.exists() else f"data.path {path} does not exist")
    if config.source == "folder":
        return FolderSource(path, config.split, config.channels, config.image_size, config.labels)
    return Cifar10Source(path, config.split, config.channels)


class DigitsSource:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn brings along: 1,500 train, 297 test, by class alike."""

    class_names = tuple("0123456789")

    def __init__(self, split: str, channels: int):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise InputError(f"data.split is {split}, the digits have train and test")
        images, labels = load_digits(return_X_y=True)
        train, test = train_test_split(np.arange(1797), train_size=1500, test_size=297, stratify=labels, random_state=0)
        chosen = train if split == "train" else test
        pixels = np.rint(images[chosen] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        self._images, self._labels = np.repeat(pixels, channels, axis=3), labels[chosen].tolist()
        self.description = f"handwritten digits, {split}: {len(self)} images in 10 classes"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self._labels[index]}


class EncodedImages:
    """Images that lie encoded as PNG, JPEG or WebP and are decoded when asked for; what all sources of such have in common.

    Transparent images are laid on white, images are turned as their EXIF tag says, and 16-bit grey is rounded to 8 bits. One
    that cannot be read is logged once by name and counted in `unreadable` (by each process for itself), and its neighbour
    takes its place. So is one with more pixels than Pillow considers safe, or with more once scaled up to `image_size`.

    A subclass has `__len__`, `encoded(index)`, the image (a path or an open file) and its label, and `name(index)`.
    """

    def __init__(self, channels: int, image_size: int):
        self._channels, self._image_size = channels, image_size
        self._unreadable: set[int] = set()

    @property
    def unreadable(self) -> int:
        """How many images this process found unreadable so far."""
        return len(self._unreadable)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            if (element := self.read((index + step) % len(self))) is not None:
                return element
        raise InputError(f"none of the {len(self)} images can be read, for instance {self.name(index)}")

    def read(self, index: int) -> dict[str, Any] | None:
        """The element of exactly this index, or None if it cannot be read."""
        if index in self._unreadable:
            return None
        try:
            file, label = self.encoded(index)
            image = read_image(file, self._channels, self._image_size)
        except Exception as error:  # what decoders raise on damaged files is of many kinds
            with _report_lock:
                if index not in self._unreadable:
                    self._unreadable.add(index)
                    log.warning("skipped %s, which cannot be read: %s", self.name(index), error)
            return None
        return {"image": image, "label": label}


class FolderSource(EncodedImages):
    """Images in a folder: each sub-folder, whatever lies deeper included, is a class; without images in them, all is one class.

    If the folder has a sub-folder named like `split`, that one is read. Files ending in .png, .jpg, .jpeg or .webp count;
    names that begin with a dot do not. See EncodedImages for how they are read.

    labels: a file that names the classes of a split without class folders, such as ImageNet's validation images. A line is an
    image's name, with or without its ending, and its class, with a comma or spaces between; what follows on the line does not
    count, nor do lines of other images. The classes are those of the folder `train` beside the split, or else of its images.

    `files` are the paths by index, all of them in `folder`.

    Raises InputError if there are no images, the split is not there, or an image has no class among those that there are.
    """

    def __init__(self, path: Path, split: str, channels: int, image_size: int, labels: str | None = None):
        super().__init__(channels, image_size)
        folders, of_training = _subfolders(path), []
        if split in folders:
            if "train" in folders:
                of_training = _subfolders(path / "train")
            path = path / split
            folders = _subfolders(path)
        elif present := [name for name in SPLITS if name in folders]:
            raise InputError(f"{path} has {' and '.join(present)} but no {split}; give data.split as one that is there")
        self.folder = path
        classes = {name: _image_files(path / name) for name in folders}
        beside = [entry.path for entry in os.scandir(path) if _is_image(entry.name)]
        if any(classes.values()):
            if beside:
                log.warning("%d images in %s lie beside the class folders and are not read", len(beside), path)
        elif labels is None:
            classes = {path.resolve().name: beside}
        else:
            classes = _by_class(sorted(beside), Path(labels), of_training)
        self.class_names = tuple(classes)
        self.files = [file for files in classes.values() for file in sorted(files)]
        self._labels = [label for label, files in enumerate(classes.values()) for _ in files]
        if not self.files:
            raise InputError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}), neither directly nor in sub-folders")
        self.description = f"images in {path}: {len(self)} in {len(classes)} classes"

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, index: int) -> tuple[str, int]:
        return self.files[index], self._labels[index]

    def name(self, index: int) -> str:
        return self.files[index]


class TfdsSource(EncodedImages):
    """A split of a data set of TensorFlow Datasets that was prepared in its ArrayRecord format, with its own class names.

    TensorFlow is not needed: records come from what `tfds.data_source` gives, images are decoded as EncodedImages says.

    Args:
      dataset: name, configuration and version as TFDS takes them, such as imagenet2012:5.1.0.
      path: TFDS's data_dir, perhaps in a bucket; None: its own default.
      split: one of the data set's splits, or a part of it such as train[:10000].

    Raises InputError if TFDS is not installed, the data set is not prepared, or has no such split, or no image or label.
    """

    def __init__(self, dataset: str, path: str | None, split: str, channels: int, image_size: int):
        super().__init__(channels, image_size)
        self._arguments = (dataset, path, split, channels, image_size)
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise InputError('the source tfds needs TensorFlow Datasets (without TensorFlow): pip install ".[tfds]"') from error
        where = path or "TFDS's default folder"
        try:
            builder = tfds.builder(dataset, data_dir=path)
            if not builder.info.splits:
                raise FileNotFoundError("it is not there")
            self._image, self._label = _image_and_label(tfds, builder.info)
            self._records = builder.as_data_source(split, decoders={self._image: tfds.decode.SkipDecoding()})
        except InputError:
            raise
        except Exception as error:  # TFDS raises many kinds, and explains them at length
            reason = str(error).strip().partition("\n")[0].rstrip(".:").removesuffix(". Possible root causes")
            prepare = f"tfds build {dataset} --file_format=array_record" + (f" --data_dir={path}" if path else "")
            raise InputError(f"cannot read {split} of {dataset} in {where}: {reason} (not prepared yet? {prepare})") from error
        self._split = f"{builder.info.full_name} {split}"
        self.class_names = tuple(builder.info.features[self._label].names)
        self.description = f"{self._split} of TFDS: {len(self)} images in {len(self.class_names)} classes"

    def __reduce__(self) -> tuple:
        return TfdsSource, self._arguments

    def __len__(self) -> int:
        return len(self._records)

    def encoded(self, index: int) -> tuple[io.BytesIO, int]:
        record = self._records[index]
        label = int(record[self._label])
        if label < 0:
            raise ValueError("it has no label")
        return io.BytesIO(record[self._image]), label

    def name(self, index: int) -> str:
        return f"record {index} of {self._split}"


class Cifar10Source:
    """The binary version of CIFAR-10, memory-mapped: data_batch_1.bin .. data_batch_5.bin (train) or test_batch.bin (test).

    The files lie in the folder itself or in its sub-folder cifar-10-batches-bin; class names are taken from
    batches.meta.txt if it is there. Raises InputError naming the file that is missing or damaged.
    """

    def __init__(self, path: Path, split: str, channels: int):
        self._arguments = (path, split, channels)
        self._channels = channels
        if split not in ("train", "test"):
            raise InputError(f"data.split is {split}, CIFAR-10 has train and test")
        if (path / "cifar-10-batches-bin").is_dir():
            path = path / "cifar-10-batches-bin"
        names = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
        self._files = [_cifar10_records(path / name) for name in names]
        self._starts = np.cumsum([0, *map(len, self._files)])
        self.class_names = _cifar10_names(path / "batches.meta.txt")
        self.description = f"CIFAR-10 in {path}, {split}: {len(self)} images in 10 classes"

    def __reduce__(self) -> tuple:
        return Cifar10Source, self._arguments

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = self._files[number][index - self._starts[number]]
        image = np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))
        if self._channels == 1:
            image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
        return {"image": image, "label": int(record[0])}


def read_image(file: str | os.PathLike | BinaryIO, channels: int, image_size: int) -> np.ndarray:
    """Decodes a PNG, JPEG or WebP file, whatever its mode, to uint8 [H, W, channels]; see EncodedImages for how.

    Raises what Pillow raises on a damaged file, and Image.DecompressionBombError on one with more pixels than Pillow
    considers safe, or that would have more once its smaller side is scaled up to `image_size`.
    """
    mode = "RGB" if channels == 3 else "L"
    with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
        scaled_pixels = image.width * image.height * max(1, image_size / min(image.size)) ** 2
        if Image.MAX_IMAGE_PIXELS and scaled_pixels > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are too many or too narrow")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if channels == 3 else pixels[..., None]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _subfolders(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read the folder {path}: {error.strerror}") from error


def _image_files(folder: Path) -> list[str]:
    return [os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if _is_image(name)]


def _by_class(files: list[str], labels: Path, class_names: list[str]) -> dict[str, list[str]]:
    """Image files by class, as the file `labels` has it."""
    try:
        lines = [line.replace(",", " ").split() for line in labels.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.labels {labels} cannot be read: {error}") from error
    named = {words[0]: words[1] for words in lines if len(words) > 1}
    found = [named.get(os.path.basename(file)) or named.get(Path(file).stem) for file in files]
    if None in found:
        file = files[found.index(None)]
        raise InputError(f"data.labels {labels} names no class for {found.count(None)} of {len(files)} images, such as {file}")
    classes: dict[str, list[str]] = {name: [] for name in class_names or sorted(set(found))}
    if unknown := sorted(set(found) - set(classes)):
        raise InputError(f"data.labels {labels} names the class {unknown[0]}, of which there is no folder of training images")
    for file, name in zip(files, found):
        classes[name].append(file)
    return classes


def _image_and_label(tfds: Any, info: Any) -> tuple[str, str]:
    """Names of the features of a TFDS data set that are its image and its class."""
    keys, kinds = info.supervised_keys or ("image", "label"), (tfds.features.Image, tfds.features.ClassLabel)
    features = dict(info.features.items())
    if len(keys) != 2 or not all(isinstance(features.get(key), kind) for key, kind in zip(keys, kinds)):
        raise InputError(f"{info.full_name} of TFDS is no set of images with classes; it holds {', '.join(sorted(features))}")
    return keys


def _cifar10_records(path: Path) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"{path} is missing; data.path should hold the files of the binary version of CIFAR-10")
    size = path.stat().st_size
    if size == 0 or size % 3073:
        raise InputError(f"{path} has {size} bytes, which is no multiple of 3073; copy it again")
    records = np.memmap(path, np.uint8, mode="r").reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise InputError(f"{path} holds labels above 9; it is not a CIFAR-10 file")
    return records


def _cifar10_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return CIFAR10_CLASSES
    names = tuple(path.read_text(errors="replace").split())
    if len(names) != 10:
        raise InputError(f"{path} names {len(names)} classes, it should be 10")
    return names
