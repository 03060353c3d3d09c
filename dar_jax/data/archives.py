"""Readers of images that are not files of their own: webdataset's tars, zip archives, Parquet.

Nothing is ever extracted to a disk, and memory is bounded whatever an archive says of itself: an image, header or label that is
too large is not read.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import threading
import time
import zipfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dar_jax.data.images import IMAGE_SUFFIXES, EncodedImages, check_bytes
from dar_jax.data.labels import SPLITS, by_class
from dar_jax.errors import InputError, one_line
from dar_jax.files import damaged, replacing, user_cache

log = logging.getLogger("dar_jax.data")

CLASS_NAMES = "class_names.txt"
MAX_CLASSES = 1 << 20
MAX_HEADER = 1 << 20  # bytes of a header within a tar, such as one of long names
MAX_CLS = 64  # bytes of a .cls member
MAX_JSON = 1 << 20  # bytes of a .json member
MAX_NAMES = 1 << 26  # bytes of the file of class names
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")
WORTH_KEEPING = 1.0  # seconds that listing the members of tars takes, for the list to be kept
BATCH = 16  # rows of Parquet in memory
MAX_ROWS = 1 << 28
NO_LABEL, TWICE, OUTSIDE = -1, -2, -3  # in place of a label
REASONS = {NO_LABEL: "it has no label", TWICE: "its key is there twice", OUTSIDE: "its name leads out of the archive"}


def archive_files(path: Path, split: str, suffix: str) -> list[Path]:
    """The archives of a split: `path` itself, or those in its folder `split`, or else in it or its folder `data`.

    In one of the latter, where names of files have train, val, validation or test as one of their words, those with the word of
    the split. Empty where there are no such archives at all. Raises InputError where there are, but none of the split.
    """
    if path.is_file():
        return [path] if path.suffix == suffix else []
    if (path / split).is_dir():
        return _with_suffix(path / split, suffix)
    files = _with_suffix(path, suffix) or (_with_suffix(path / "data", suffix) if (path / "data").is_dir() else [])
    words = {file: set(re.split(r"[^a-z0-9]+", file.stem.lower())) & {*SPLITS, "validation"} for file in files}
    if not any(words.values()):
        return files
    of_split = [file for file in files if words[file] & ({"val", "validation"} if split in ("val", "validation") else {split})]
    if not of_split:
        present = sorted(set().union(*words.values()))
        raise InputError(f"{path} has {' and '.join(present)} but no {split}; give the split as one that is there")
    return of_split


def _with_suffix(folder: Path, suffix: str) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix == suffix and file.name[0] != "." and file.is_file())


def _class_names(folders: Sequence[Path], labels: np.ndarray) -> tuple[str, ...]:
    """The lines of `class_names.txt` in the first of these folders that has it, else the numbers up to the greatest label."""
    path = next((folder / CLASS_NAMES for folder in folders if (folder / CLASS_NAMES).is_file()), None)
    if path is None:
        return tuple(map(str, range(max(labels.max(initial=0) + 1, 1))))
    try:
        if path.stat().st_size > MAX_NAMES:
            raise ValueError(f"it has more than {MAX_NAMES:,} bytes")
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
        if not 0 < len(names) <= MAX_CLASSES:
            raise ValueError(f"it names {len(names):,} classes")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return names


class LabelledArchives(EncodedImages):
    """Images with numbers as labels; a subclass sets `class_names` and `_labels`, int32 [N], and has `image(index)`, bytes."""

    def __len__(self) -> int:
        return len(self._labels)

    def encoded(self, index: int) -> tuple[io.BytesIO, int]:
        label = int(self._labels[index])
        if label < 0:
            raise ValueError(REASONS[label])
        if label >= len(self.class_names):
            raise ValueError(f"its label is {label}, of {len(self.class_names)} classes")
        return io.BytesIO(self.image(index)), label


class TarSource(LabelledArchives):
    """Random access to webdataset's tars: neighbouring members KEY.jpg (.jpeg, .png, .webp) and KEY.cls or KEY.json.

    The label is the number in KEY.cls or under "label" in KEY.json. Opening lists all members, once: where that
    takes more than a second, the list is kept in the user's cache, for as long as the files stay the same.

    Args:
      path: a tar or a folder of tars, see `archive_files`. The classes have the names of `class_names.txt` beside the tars, one
        on a line, or else numbers.

    Raises InputError if there are no tars or no images in them, or one is damaged, truncated or compressed.
    """

    def __init__(self, path: Path, split: str, channels: int, smaller_side: int):
        super().__init__(channels, smaller_side)
        self.files = archive_files(path, split, ".tar")
        if not self.files:
            raise InputError(f"{path} holds no tars (.tar), neither directly nor in its folder {split}")
        index = _tar_index(self.files)
        self._number, self._offset, self._size, self._labels = (index[name] for name in ("number", "offset", "size", "label"))
        self._keys, self._ends = index["keys"], index["ends"]
        if not len(self):
            raise InputError(f"{self.files[0]} holds no images with a label each: KEY.jpg and KEY.cls, or KEY.json")
        self.class_names = _class_names([self.files[0].parent, path], self._labels)
        self.description = f"tars in {path}, {split}: {len(self)} images in {len(self.class_names)} classes"

    def image(self, index: int) -> bytes:
        size = int(self._size[index])
        check_bytes(size)
        with open(self.files[self._number[index]], "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, int(self._offset[index]))
        if len(content) != size:
            raise ValueError("its tar has changed")
        return content

    def key(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._keys[start : self._ends[index]].tobytes().decode(errors="replace")

    def name(self, index: int) -> str:
        return f"{self.key(index)} of {self.files[self._number[index]]}"


def _tar_index(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Number of the file, offset, size, label and end of the key of each image in these tars, from the cache if it is there."""
    states = [[os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    cache = user_cache()
    path = cache and cache / "tars" / f"{hashlib.sha256(json.dumps(states).encode()).hexdigest()}.npz"
    if path is not None:
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as index:  # else the tars are listed anew
            return dict(index)
    began = time.monotonic()
    rows = [(number, *row) for number, file in enumerate(files) for row in _members(file)]
    keys = [row[1].encode(errors="replace") for row in rows]
    columns = {"number": np.int32, "offset": np.int64, "size": np.int64, "label": np.int32}
    values = zip(*((row[0], *row[2:]) for row in rows)) if rows else [()] * 4
    index = {name: np.array(column, kind) for (name, kind), column in zip(columns.items(), values)}
    index |= {"keys": np.frombuffer(b"".join(keys), np.uint8), "ends": np.array([*accumulate(map(len, keys))], np.int64)}
    if path is not None and time.monotonic() - began >= WORTH_KEEPING:
        with contextlib.suppress(OSError), replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **index)
    return index


class _Headers:
    """The file of a tar, for tarfile, which reads only headers from it: one that claims more than MAX_HEADER is refused."""

    def __init__(self, file: BinaryIO):
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"it has a header of {size:,} bytes")
        return self._file.read(size)


def _members(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Key, offset, size and label of each image in a tar, in order. Raises InputError where it does not end as tars end."""
    try:
        with path.open("rb") as file, tarfile.open(fileobj=_Headers(file), mode="r:") as tar:
            group: dict[str, tuple[int, int]] = {}
            last, seen, offset = None, set(), -1
            while (member := tar.next()) is not None:
                if tar.offset <= offset:
                    raise ValueError("its headers contradict each other")
                offset = tar.offset
                if member.size < 0:
                    raise ValueError(f"it has a member of {member.size} bytes")
                tar.members.clear()  # or tarfile would keep all of them
                if not member.isreg() or member.sparse is not None:
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, dot, end = name.partition(".")
                key, suffix = folder + slash + stem, dot + end.lower()
                if key != last:
                    yield from _sample(file, last, group, seen)
                    last, group = key, {}
                if suffix not in group:
                    group[suffix] = (member.offset_data, member.size)
                elif suffix in IMAGE_SUFFIXES:
                    yield key, member.offset_data, member.size, TWICE
            yield from _sample(file, last, group, seen)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"it is no tar from byte {tar.offset:,} on")
            if tar.offset >= path.stat().st_size:
                log.warning("%s lacks the end mark of tars; is it complete?", path)
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise damaged(path, error, "copy it again, or decompress it", "is damaged, truncated or compressed") from error


def _sample(
    file: BinaryIO, key: str | None, group: dict[str, tuple[int, int]], seen: set[str]
) -> Iterator[tuple[str, int, int, int]]:
    """The row of one sample, whose members have these suffixes, offsets and sizes, if it has an image."""
    suffix = next((suffix for suffix in group if suffix in IMAGE_SUFFIXES), None)
    if suffix is None:
        return
    label = TWICE if key in seen else OUTSIDE if _leads_outside(key) else _label(file, group)
    seen.add(key)
    yield key, *group[suffix], label


def _leads_outside(name: str) -> bool:
    return name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)


def _label(file: BinaryIO, group: dict[str, tuple[int, int]]) -> int:
    """The number in the member .cls or else under "label" in .json; NO_LABEL where there is none."""
    for suffix, most in ((".cls", MAX_CLS), (".json", MAX_JSON)):
        offset, size = group.get(suffix, (0, most + 1))
        if size <= most:
            file.seek(offset)
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(file.read(size))
                value = value.get("label") if isinstance(value, dict) else value
                if type(value) is int and 0 <= value < MAX_CLASSES:
                    return value
    return NO_LABEL


class ZipSource(EncodedImages):
    """The images in a zip archive, by the rules of a folder of images, below the one folder that is named like `split`.

    Kaggle's archive of ImageNet is one: ILSVRC/Data/CLS-LOC/train/nXXXXXXXX/*.JPEG and val/*.JPEG.

    Args:
      labels: a file that names the classes of images that lie in no class folders, see `read_labels`.

    Raises InputError if it is no zip archive, holds no images or none of the split, or an image has no known class.
    """

    def __init__(self, path: Path, split: str, channels: int, smaller_side: int, labels: str | None = None):
        super().__init__(channels, smaller_side)
        try:
            self._zip = zipfile.ZipFile(path)
        except Exception as error:  # of many kinds, where it is damaged
            raise InputError(f"{path} cannot be read: {error}; copy it again") from error
        self._path = path
        self._infos = self._images()
        splits: dict[str, dict[str, list[str]]] = {}  # of each name of a split the folders that have it, and their images
        for name in self._infos:
            folders = name.split("/")[:-1]
            place = next((place for place, folder in enumerate(folders) if folder in SPLITS), None)
            if place is not None:
                root = "/".join(folders[: place + 1])
                splits.setdefault(folders[place], {}).setdefault(root, []).append(name)
        if splits and split not in splits:
            raise InputError(f"{path} has {' and '.join(sorted(splits))} but no {split}; give the split as one that is there")
        roots = splits.get(split) or {os.path.commonpath([os.path.dirname(name) for name in self._infos]): list(self._infos)}
        if len(roots) > 1:
            raise InputError(f"{path} has several folders {split}: {' and '.join(sorted(roots)[:2])}; unpack the one to read")
        ((root, names),) = roots.items()
        classes, flat = _by_folder(root, names)
        if classes and flat:
            shown = ", ".join(list(classes)[:3])
            raise InputError(f"{path} holds images ({len(flat)}) and folders with images ({shown}) in {root}; unpack it")
        if not classes and labels is not None:
            training, _ = _by_folder(*next(iter(splits.get("train", {"": []}).items())))
            classes = by_class(flat, Path(labels), list(training))
        elif not classes:
            classes = {os.path.basename(root) or path.stem: flat}
        self.class_names = tuple(classes)
        self._root = root
        self._names = [name for files in classes.values() for name in files]
        self._labels = [label for label, files in enumerate(classes.values()) for _ in files]
        self.description = f"images in {path}, {root or split}: {len(self)} in {len(classes)} classes"

    def _images(self) -> dict[str, zipfile.ZipInfo]:
        """The images in the archive, by name in order."""
        infos: dict[str, zipfile.ZipInfo] = {}
        refused: dict[str, list[str]] = {}
        for info in self._zip.infolist():
            name = info.filename
            if not name.lower().endswith(IMAGE_SUFFIXES) or "__MACOSX" in name:
                continue
            if _leads_outside(name):
                refused.setdefault("have names that lead out of it", []).append(name)
            elif name in infos:
                refused.setdefault("are there twice", []).append(name)
            elif not any(part.startswith(".") for part in name.split("/")):
                infos[name] = info
        for reason, names in refused.items():
            log.warning("skipped: %d images of %s %s, such as %s", len(names), self._path, reason, names[0])
        if not infos:
            raise InputError(f"{self._path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
        return dict(sorted(infos.items()))

    def __len__(self) -> int:
        return len(self._names)

    def encoded(self, index: int) -> tuple[io.BytesIO, int]:
        info = self._infos[self._names[index]]
        check_bytes(info.file_size)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others decompress more than is asked for
            raise ValueError("it is compressed in an unusual way")
        with self._zip.open(info) as file:
            return io.BytesIO(file.read(info.file_size)), self._labels[index]  # at the end its checksum is compared

    def key(self, index: int) -> str:
        return self._names[index].removeprefix(self._root).lstrip("/")

    def name(self, index: int) -> str:
        return f"{self._names[index]} of {self._path}"


def _by_folder(root: str, names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Names by the first folder below `root`, in order, and those that lie in none."""
    classes: dict[str, list[str]] = {}
    flat = []
    for name in names:
        folder, slash, _ = name.removeprefix(root).removeprefix("/").partition("/")
        (classes.setdefault(folder, []) if slash else flat).append(name)
    return dict(sorted(classes.items())), flat


class ParquetSource(LabelledArchives):
    """The rows of Parquet files as the Hub has them: an image's bytes, or a struct of bytes and path, and a number as label.

    Class names are those that the Hub's data sets have in their files, or as of TarSource. For reading in order: going back, or
    leaving rows out, begins a row group anew.

    Raises InputError if pyarrow is not installed, there are no files, or one is damaged or lacks a column.
    """

    def __init__(self, path: Path, split: str, channels: int, smaller_side: int):
        super().__init__(channels, smaller_side)
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise InputError('Parquet files need pyarrow: pip install ".[pack]"') from error
        self._parquet = parquet
        self.files = archive_files(path, split, ".parquet")
        if not self.files:
            raise InputError(f"{path} holds no Parquet files (.parquet), neither directly nor in its folder {split}")
        self._groups, self._columns, labels, rows, names = [], [], [], [], ()
        for number, file in enumerate(self.files):
            with self._open(file) as opened:
                image, label = _columns(file, opened.schema_arrow)
                self._columns.append(image)
                names = names or _hub_names(opened.schema_arrow.metadata, label)
                self._groups += [(number, group) for group in range(opened.num_row_groups)]
                rows += [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
                if sum(rows) > min(MAX_ROWS, sum(each.stat().st_size for each in self.files)):  # no image is less than a byte
                    raise InputError(f"{file} says that there are {sum(rows):,} rows, which is too many for its size")
                column = opened.read([label], use_threads=False).column(0).cast("int64", safe=False)
                labels.append(column.fill_null(NO_LABEL).to_numpy())
        self._starts = [0, *accumulate(rows)]
        if not self._starts[-1] or self._starts[-1] != sum(map(len, labels)):
            raise InputError(f"{self.files[0]} and what lies beside it hold no rows, or fewer than they say")
        every = np.concatenate(labels)
        self._labels = np.where((every >= 0) & (every < MAX_CLASSES), every, NO_LABEL).astype(np.int32)
        self.class_names = names or _class_names([self.files[0].parent, path], self._labels)
        self.description = f"Parquet files in {path}, {split}: {len(self)} images in {len(self.class_names)} classes"
        self._lock, self._lost = threading.Lock(), range(0)
        self._rows, self._next, self._end, self._last = iter(()), 0, 0, (-1, None)

    @contextlib.contextmanager
    def _open(self, file: Path) -> Iterator[Any]:
        """Opens a file so that only a buffer and a page of a column are in memory. pyarrow's errors become an InputError."""
        try:
            with self._parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as opened:
                yield opened
        except (OSError, ValueError, MemoryError, NotImplementedError, KeyError) as error:  # of which pyarrow's errors are
            raise damaged(file, one_line(error), "copy it again", "is damaged, or no Parquet file") from error

    def image(self, index: int) -> bytes:
        with self._lock:
            if index in self._lost:
                raise ValueError("its row group is damaged")
            if index != self._next or index >= self._end:
                group = bisect_right(self._starts, index) - 1
                start, self._end = self._starts[group : group + 2]
                self._rows = self._rows_of(*self._groups[group], index - start)
            self._next, self._lost = -1, range(index, self._end)
            image, path = next(self._rows, (None, None))
            self._next, self._lost, self._last = index + 1, range(0), (index, path)
        if not isinstance(image, bytes):
            raise ValueError("it has no bytes")
        check_bytes(len(image))
        return image

    def _rows_of(self, number: int, group: int, skip: int) -> Iterator[tuple[Any, Any]]:
        """Bytes and path of the rows of a row group."""
        with self._open(self.files[number]) as opened:
            for batch in opened.iter_batches(BATCH, [group], [self._columns[number]], use_threads=False):
                for row in range(skip, len(batch)):
                    value = batch.column(0)[row].as_py()
                    yield (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                skip = max(0, skip - len(batch))

    def key(self, index: int) -> str:
        """The path of the row that was read last, as far as it has one."""
        last, path = self._last
        return path if index == last and isinstance(path, str) else self.name(index)

    def name(self, index: int) -> str:
        group = bisect_right(self._starts, index) - 1
        number, of_file = self._groups[group]
        return f"row {index - self._starts[group - of_file]} of {self.files[number]}"


def _columns(file: Path, schema: Any) -> tuple[str, str]:
    """The names of the columns of images and of labels."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            fields = [kind.field(place) for place in range(kind.num_fields)]
            return any(field.name == "bytes" and holds_bytes(field.type) for field in fields)
        return types.is_binary(kind) or types.is_large_binary(kind)

    kinds = {field.name: field.type for field in schema}
    found = []
    for what, names, fits in (("bytes", IMAGE_COLUMNS, holds_bytes), ("numbers", LABEL_COLUMNS, types.is_integer)):
        column = next((name for name in names if name in kinds and fits(kinds[name])), None)
        if column is None:
            present = one_line(", ".join(f"{name} ({kind})" for name, kind in kinds.items()))
            raise InputError(f"{file} has no column {' or '.join(names)} of {what}; it has {present}")
        found.append(column)
    image, label = found
    return image, label


def _hub_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """The class names that the Hub's library writes into a file; none where there are none."""
    with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        if 0 < len(names) <= MAX_CLASSES and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()
