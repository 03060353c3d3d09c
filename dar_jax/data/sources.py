"""Random access to labelled images: scikit-learn's digits, a folder of images, files of CIFAR-10 and MNIST, TFDS, codes."""

import dataclasses
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dar_jax.config import DataConfig
from dar_jax.console import printable
from dar_jax.data.archives import TarSource
from dar_jax.data.codes import open_codes
from dar_jax.data.idx import IdxSource
from dar_jax.data.images import IMAGE_SUFFIXES, EncodedImages
from dar_jax.data.labels import SPLITS, by_class
from dar_jax.data.packed import open_packed
from dar_jax.errors import InputError, require
from dar_jax.files import is_remote
from dar_jax.weights import hub

log = logging.getLogger("dar_jax.data")

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Source(Protocol):
    """Labelled elements by index. Reading is a pure function of the index and safe in several threads.

    An element of a source of images is {"image": uint8 [H, W, C], "label": int}, in the image's own size; of stored codes it is
    {"codes": int32 [crops, T], "label": int}. A source with unreadable elements returns a neighbour in their place, and has
    a method `read(index)` that returns None for them.
    """

    class_names: tuple[str, ...]
    description: str  # one line

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def read_all(data: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """All images of a small data set, which have one size, as they are: uint8 [N, H, W, C], and their labels int [N]."""
    source = open_source(data)
    elements = [source[index] for index in range(len(source))]
    images = np.stack([element["image"] for element in elements])
    return images.reshape(*images.shape[:3], -1), np.array([element["label"] for element in elements])


def held_out(config: DataConfig) -> DataConfig:
    """The same data set in the split to evaluate on: `held_out_split`, or else the usual one; codes as they are."""
    usual = {"digits": "test", "cifar10": "test", "idx": "test", "tfds": "validation"}
    usual |= dict.fromkeys(("folder", "packed", "tar"), "val")
    split = config.held_out_split or usual.get(config.source, config.split)
    return dataclasses.replace(config, split=split, held_out_split=None)


def open_source(config: DataConfig, own: Callable[[DataConfig], Any] | None = None) -> Source:
    """Opens the data set that `config.source`, `path`, `dataset` and `split` name, or in its place what `own` opens.

    Returns a source with `len(source)`, `source.class_names` and elements `source[index]`:
    {"image": uint8 [H, W, channels], "label": int}, before any crop, or for stored codes
    {"codes": int32 [crops, T], "label": int}.

    The path may be a name on the Hugging Face Hub, hf://..., see `weights.hub`.

    Raises InputError if the path is not given, is missing, holds nothing to read, or is damaged, if there is no such split, or
    if images are to have another number of channels than 1 or 3; and where `own` opens no such source.
    """
    if own is not None:
        return _checked(own(config), config)
    if config.channels not in (1, 3):
        raise InputError(f"data.channels is {config.channels}, it should be 1 (grey) or 3 (RGB)")
    if config.path:
        config = dataclasses.replace(config, path=os.fspath(hub.local(config.path)))
    if config.source == "digits":
        return DigitsSource(config.split, config.channels)
    if config.source == "tfds":
        if not config.dataset:
            raise InputError("data.dataset is not given; the source tfds needs the name of a data set, such as imagenet2012")
        return TfdsSource(config.dataset, config.path, config.split, config.channels, _largest_side(config))
    if not config.path:
        raise InputError(f"data.path is not given; the source {config.source} needs the folder of its files")
    if config.source == "codes":
        return open_codes(config.path, config.split, config.verify)
    if config.source == "packed":
        return open_packed(config.path, config.split, config.verify, config.channels, _largest_side(config))
    if is_remote(config.path):
        raise InputError(
            f"data.path {config.path} is in a bucket, where only codes, packed images and TFDS are read; mount or copy it"
        )
    path = Path(config.path)
    if not path.is_dir():
        raise InputError(f"data.path {path} is not a folder" if path.exists() else f"data.path {path} does not exist")
    if config.source == "folder":
        return FolderSource(path, config.split, config.channels, _largest_side(config), config.labels)
    if config.source == "tar":
        return TarSource(path, config.split, config.channels, _largest_side(config))
    if config.source == "idx":
        return IdxSource(path, config.split, config.channels, config.dataset)
    return Cifar10Source(path, config.split, config.channels)


def describe(source: Source) -> str:
    """One line with the number of images, the first ten class names, and the source's own `description`."""
    names = [printable(name if len(name) <= 30 else name[:27] + "...") for name in source.class_names[:10]]
    more = [f"and {len(source.class_names) - 10:,} more"] if len(source.class_names) > 10 else []
    return f"{len(source):,} images of {len(source.class_names):,} classes: {', '.join(names + more)} ({source.description})"


def _checked(source: Any, config: DataConfig) -> Source:
    """A source of other code. Raises InputError where a part is missing, or its first element is not what a source gives."""
    name = f"the source {type(source).__name__}"
    for part in ("class_names", "description", "__len__", "__getitem__"):
        require(hasattr(source, part), f"{name} has no {part} (docs/forking.md, source)")
    require(len(source) > 0, f"{name} is empty")
    element = source[0]
    fits = isinstance(element, Mapping) and "label" in element and not {"image", "codes"}.isdisjoint(element)
    require(fits, f'{name} gives {type(element).__name__}, its elements should be {{"image": ..., "label": int}}')
    for key, value in element.items():
        kind = np.asarray(value).dtype
        allowed = "iu" if key in ("label", "codes") else "biuf"  # (unsigned) integers, booleans, floats
        require(kind.kind in allowed, f"{name} gives {kind} as {key!r}, it should give numbers, integers for labels and codes")
    if "image" in element and config.crop != "none":
        shape, kind = np.shape(element["image"]), np.asarray(element["image"]).dtype
        require(
            kind == np.uint8 and len(shape) == 3 and shape[2] == config.channels,
            f"{name} gives images {kind} {list(shape)}, they should be uint8 [H, W, {config.channels}]; data that are not "
            "to be cropped need data.crop none",
        )
    return source


def _largest_side(config: DataConfig) -> int:
    """Pixels that the smaller side of an image is scaled to at most before it is cropped."""
    if config.crop == "random":
        return math.ceil(config.image_size / config.crop_fraction[0])
    return math.ceil(config.image_size * config.ten_crop_scale) if config.crop == "ten_crop" else config.image_size


class DigitsSource:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn: 1,500 train, 297 test, stratified by class."""

    class_names = tuple("0123456789")

    def __init__(self, split: str, channels: int):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        if split not in ("train", "test"):
            raise InputError(f"data.split is {split}, the digits have train and test")
        images, labels = load_digits(return_X_y=True)
        train, test = train_test_split(np.arange(1797), train_size=1500, test_size=297, stratify=labels, random_state=0)
        indices = train if split == "train" else test
        pixels = np.rint(images[indices] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
        self._images, self._labels = np.repeat(pixels, channels, axis=3), labels[indices].tolist()
        self.description = f"handwritten digits, {split}: {len(self)} images in 10 classes"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._images[index], "label": self._labels[index]}


class FolderSource(EncodedImages):
    """Images in a folder: each sub-folder with images, at any depth, is a class; without such sub-folders all are one class.

    If the folder has a sub-folder named like `split`, that one is read. Images are the files ending in .png, .jpg, .jpeg or
    .webp. Files and folders whose names begin with a dot are ignored, at any depth. Linked folders are followed, each one once
    in a class.

    Args:
      labels: a file that names the classes of images that lie in no class folders, such as ImageNet's validation images; see
        `read_labels`. The classes are those of the folder `train` beside the split, or else of its images.

    `files` are the paths by index, all of them in `folder`.

    Raises InputError if there are no images or some lie beside class folders, the split is not there, or an image has no known
    class.
    """

    def __init__(self, path: Path, split: str, channels: int, smaller_side: int, labels: str | None = None):
        super().__init__(channels, smaller_side)
        (folders, images), training_classes = _list(path), []
        if split in folders:
            if "train" in folders and labels is not None:
                train = path / "train"
                training_classes = [name for name in _list(train)[0] if any(_image_files(train / name))]
            if images:
                raise InputError(f"{path} holds images and the split {split}; move the images away")
            siblings = [name for name in folders if name not in (split, *SPLITS) and any(_image_files(path / name))]
            path = path / split
            folders, images = _list(path)
            if siblings and not any(any(_image_files(path / name)) for name in folders):
                raise InputError(
                    f"{path} may be a class like {siblings[0]} beside it, or the split {split}; "
                    f"rename it, or give {path} itself as data.path"
                )
        elif present := [name for name in SPLITS if name in folders]:
            raise InputError(f"{path} has {' and '.join(present)} but no {split}; give data.split as one that is there")
        self.folder = path
        files_of = {name: sorted(_image_files(path / name)) for name in folders}
        classes = {name: files for name, files in files_of.items() if files}
        if classes and images:
            raise InputError(
                f"{path} holds images ({len(images)}) and folders with images ({', '.join(list(classes)[:3])}); "
                "give one of the folders, or move the images away"
            )
        if classes and (empty := [name for name in folders if name not in classes]):
            log.warning("%s of the folders in %s hold no images and are no classes, such as %s", len(empty), path, empty[0])
        if not classes:
            files = [os.path.join(path, name) for name in images]
            classes = {path.resolve().name: files} if labels is None else by_class(files, Path(labels), training_classes)
        self.class_names = tuple(classes)
        self.files = [file for files in classes.values() for file in files]
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

    def key(self, index: int) -> str:
        return os.path.relpath(self.files[index], self.folder)


class TfdsSource(EncodedImages):
    """A split of a data set of TensorFlow Datasets that was prepared in its ArrayRecord format, with its own class names.

    TensorFlow is not needed: records come from `tfds.data_source`, and images are decoded as in EncodedImages.

    Args:
      dataset: name, configuration and version as TFDS takes them, such as imagenet2012:5.1.0.
      path: TFDS's data_dir, perhaps in a bucket; None: its own default.
      split: one of the data set's splits, or a part of it such as train[:10000].

    Raises InputError if TFDS is not installed, the data set is not prepared, or has no such split, or no image or label.
    """

    def __init__(self, dataset: str, path: str | None, split: str, channels: int, smaller_side: int):
        super().__init__(channels, smaller_side)
        self._arguments = (dataset, path, split, channels, smaller_side)
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise InputError('the source tfds needs TensorFlow Datasets (without TensorFlow): pip install ".[tfds]"') from error
        where = path or "TFDS's default folder"
        try:
            builder = tfds.builder(dataset, data_dir=path)
            if not builder.info.splits:
                raise FileNotFoundError("it is not there")
            keys, kinds = builder.info.supervised_keys or ("image", "label"), (tfds.features.Image, tfds.features.ClassLabel)
            features = dict(builder.info.features.items())
            if len(keys) != 2 or not all(isinstance(features.get(key), kind) for key, kind in zip(keys, kinds)):
                names = ", ".join(sorted(features))
                raise InputError(f"{builder.info.full_name} of TFDS is no set of images with classes; it holds {names}")
            self._image, self._label = keys
            self._records = builder.as_data_source(split, decoders={self._image: tfds.decode.SkipDecoding()})
        except InputError:
            raise
        except Exception as error:  # TFDS raises many kinds, and explains them at length
            reason = str(error).strip().partition("\n")[0].rstrip(".:").removesuffix(". Possible root causes")
            prepare = f"tfds build {dataset} --file_format=array_record" + (f" --data_dir={path}" if path else "")
            raise InputError(f"cannot read {split} of {dataset} in {where}: {reason} (not prepared yet? {prepare})") from error
        self._split = f"{builder.info.full_name} {split}"
        self.class_names = tuple(features[self._label].names)
        self.description = f"{self._split} of TFDS: {len(self)} images in {len(self.class_names)} classes"

    def __reduce__(self) -> tuple:
        return TfdsSource, self._arguments

    def __len__(self) -> int:
        return len(self._records)

    def encoded(self, index: int) -> tuple[io.BytesIO, int]:
        record = self._records[index]
        label = int(record[self._label])
        if not 0 <= label < len(self.class_names):
            raise ValueError("it has no label" if label < 0 else f"its label is {label}, of {len(self.class_names)} classes")
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
        files = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
        self._files = [_cifar10_records(path / file) for file in files]
        self._starts = np.cumsum([0, *map(len, self._files)])
        names = path / "batches.meta.txt"
        self.class_names = tuple(names.read_text(errors="replace").split()) if names.is_file() else CIFAR10_CLASSES
        if len(self.class_names) != 10:
            raise InputError(f"{names} names {len(self.class_names)} classes, it should be 10")
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


def _list(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Names of the sub-folders and of the images in a folder, in order, without those that begin with a dot.

    Images go by their names: pipes and links into nowhere are among the images that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error

    _, folders, files = next(os.walk(folder, onerror=refuse))
    names, files = (sorted(name for name in each if not name.startswith(".")) for each in (folders, files))
    return names, [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]


def _image_files(folder: Path) -> Iterator[str]:
    """The images in a folder of a class, at any depth."""
    pending, seen = [os.fspath(folder)], {_identity(folder.parent)}
    while pending:
        folder = pending.pop()
        if (identity := _identity(folder)) in seen:
            log.warning("%s is not read: it is a link to a folder that is read already", folder)
            continue
        seen.add(identity)
        folders, images = _list(folder)
        pending += [os.path.join(folder, name) for name in folders]
        yield from (os.path.join(folder, name) for name in images)


def _identity(folder: Path | str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


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
