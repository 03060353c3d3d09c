"""Stored codes: what `dar-jax tokenize` writes and the transformer is trained on.

A folder of codes holds
- `codes.json`: what the codes are (`CodesInfo`) and, once finished, the records, size and SHA-256 of every shard;
- `shard-00000.array_record`, ...: ArrayRecord files of one record per image, the label as int32 and then the codes as uint16
  or uint32 [crops, tokens], little-endian and uncompressed.

Shard i holds elements [i * shard_size, (i + 1) * shard_size) of the data set, less those that could not be read. Each file is
written whole or not at all, so writing goes on at the missing shards after an interruption; several processes may write
different shards of one folder. The folder may be in a bucket (`gs://...`).
"""

import dataclasses
import functools
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from grain.sources import ArrayRecordDataSource

from dar_jax.config import INT32, Codes, Count, Range, Tokens, checked
from dar_jax.errors import InputError
from dar_jax.files import replacing, size_of

VERSION = 2
MAX_JSON = 1 << 24  # bytes of codes.json


@dataclass(frozen=True)
class CodesInfo:
    """What a folder of codes holds. Two tokenizing runs may share a folder only if all of this is equal."""

    images: Count  # of the data set, the unreadable ones included
    shard_size: Count  # images per shard
    crops: Annotated[int, Range(1, 4096)]  # stored per image
    tokens: Tokens  # per crop
    codebook_size: Codes
    class_names: tuple[str, ...]
    tokenizer: str  # fingerprint of the tokenizer's parameters
    data: str  # the data set and how it was cropped, one line

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    @functools.cached_property
    def record(self) -> np.dtype:
        """Layout of one image in a shard."""
        code = "<u2" if self.codebook_size <= 2**16 else "<u4"
        return np.dtype([("label", "<i4"), ("codes", code, (self.crops, self.tokens))])

    def elements(self, shard: int) -> range:
        """Indices of the data set's elements that belong into a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))


@dataclass(frozen=True)
class Shard:
    """What codes.json says of a finished shard."""

    records: Annotated[int, Range(0, INT32)]
    bytes: Annotated[int, Range(0, 2**62)]
    sha256: str


def begin(folder: str | os.PathLike, info: CodesInfo) -> None:
    """Begins or resumes a folder of codes: creates it where needed, and removes what an interruption left behind.

    Raises InputError if the folder already holds codes of another tokenizer, data set or layout, or cannot be written.
    """
    folder = _folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "codes.json").exists():
            if any(folder.glob("shard-*")):
                raise InputError(f"{folder} holds shards without codes.json; choose an empty folder")
            _write_json(folder, info, shards=None)
        _require_same(folder, info)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write codes to {folder}: {error}") from error


def missing_shards(folder: str | os.PathLike, info: CodesInfo) -> list[int]:
    """The shards that are still to be written in a folder that was begun. Raises InputError if it holds other codes or none."""
    folder = _folder(folder)
    _require_same(folder, info)
    return [shard for shard in range(info.shards) if not has_shard(folder, shard)]


def has_shard(folder: str | os.PathLike, shard: int) -> bool:
    """Whether a shard has been written."""
    return _shard(epath.Path(folder), shard).exists()


def write_shard(folder: str | os.PathLike, shard: int, codes: np.ndarray, labels: np.ndarray) -> None:
    """Writes one shard of a folder that was begun, unless another process has done so meanwhile.

    codes: int [n, crops, tokens] in [0, codebook_size); labels: int [n], of the classes; n is at most the shard's elements.
    Raises ValueError if they do not fit the folder, InputError if its codes.json is damaged, OSError if the disk is full.
    """
    folder = _folder(folder)
    info, _ = _read_json(folder)
    codes, labels = np.asarray(codes), np.asarray(labels)
    if not 0 <= shard < info.shards or len(codes) > len(info.elements(shard)):
        raise ValueError(f"{len(codes)} images do not fit into shard {shard} of {info.shards} with {info.shard_size} each")
    if codes.shape != (len(labels), info.crops, info.tokens):
        raise ValueError(f"codes {codes.shape} of {labels.shape} labels should be [n, {info.crops}, {info.tokens}] of [n]")
    if codes.size and not 0 <= codes.min() <= codes.max() < info.codebook_size:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} should be in [0, {info.codebook_size})")
    if labels.size and not 0 <= labels.min() <= labels.max() < len(info.class_names):
        raise ValueError(f"labels from {labels.min()} to {labels.max()} should be in [0, {len(info.class_names)})")
    records = np.empty(len(codes), info.record)
    records["codes"], records["label"] = codes, labels
    path = _shard(folder, shard)
    if path.exists():
        return
    with replacing(path, unique=True) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # one image can be read without others
            for record in records:
                writer.write(record.tobytes())
            writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def finish(folder: str | os.PathLike) -> None:
    """Seals a folder once all its shards are written: `open_codes` takes it from then on.

    Raises InputError if a shard is missing or damaged.
    """
    folder = _folder(folder)
    info, _ = _read_json(folder)
    shards = []
    for shard in range(info.shards):
        path = _shard(folder, shard)
        if not path.exists():
            raise InputError(f"{folder} is not complete: {path.name} is missing; tokenize again")
        shards.append(Shard(_count(path, info), size_of(path), _sha256(path)))
    _write_json(folder, info, shards)


def open_codes(path: str | os.PathLike, split: str | None = None, verify: bool = False) -> "CodesSource":
    """Opens a finished folder of codes and compares the sizes of its shards with what was written.

    Damage that leaves the size alone is found when a record is read, by ArrayRecord's checksum of each, as are labels and codes
    out of range; the first record of each shard is read here.

    Args:
      split: if the folder has a sub-folder of this name, that one is opened.
      verify: compare the SHA-256 of all shards too, for which they are read once.

    Raises InputError if the folder is missing, unfinished, damaged or of another version.
    """
    folder = _folder(path)
    if split and (folder / split).is_dir():
        folder = folder / split
    info, shards = _read_json(folder)
    if shards is None:
        raise InputError(f"{folder} is not complete; tokenize again with the same settings, it goes on where it stopped")
    for number, shard in enumerate(shards):
        file = _shard(folder, number)
        if not file.is_file():
            raise InputError(f"{folder} is damaged: {file.name} is missing; tokenize again")
        if size_of(file) != shard.bytes or (verify and _sha256(file) != shard.sha256):
            raise _damaged(file, "it is not what was written")
    source = CodesSource(folder, info, [shard.records for shard in shards])
    source.check()
    return source


class CodesSource:
    """Random access to stored codes: {"codes": int32 [crops, tokens], "label": int}.

    Files are opened when a record of theirs is read first. Reading raises InputError for a damaged record, one of another size
    than the folder's codes, and a label or a code that is out of range.
    """

    def __init__(self, folder: epath.Path, info: CodesInfo, records: Sequence[int]):
        self._arguments = (folder, info, records)
        self.folder, self.info = folder, info
        self.class_names = info.class_names
        self._starts = [0, *accumulate(records)]
        if not len(self):
            raise InputError(f"{folder} holds no codes: none of its {info.images} images could be read")
        parts = [_Part(str(_shard(folder, shard)), count) for shard, count in enumerate(records)]
        self._records = ArrayRecordDataSource(parts)
        self.description = (
            f"stored codes in {folder}: {len(self)} images in {len(info.class_names)} classes, "
            f"{info.crops} x {info.tokens} codes each, from {info.data}"
        )

    def __reduce__(self) -> tuple:
        return CodesSource, self._arguments

    def __len__(self) -> int:
        return self._starts[-1]

    def check(self) -> None:
        """Reads the first record of each shard. Raises InputError where one is damaged."""
        for start in sorted({start for start in self._starts if start < len(self)}):
            self[start]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)})")
        try:
            return _element(self._records[index], self.info)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(_shard(self.folder, bisect_right(self._starts, index) - 1), str(error)) from error


def _element(record: bytes, info: CodesInfo) -> dict[str, Any]:
    """What CodesSource gives for a record. Raises ValueError where it is of other sizes, or a label or code is out of range."""
    if len(record) != info.record.itemsize:
        raise ValueError("its records are of other codes")
    ((label, codes),) = np.frombuffer(record, info.record)
    if not 0 <= label < len(info.class_names):
        raise ValueError(f"it holds the label {label}, labels are 0 .. {len(info.class_names) - 1}")
    if codes.max() >= info.codebook_size:
        raise ValueError(f"it holds the code {codes.max()}, codes are 0 .. {info.codebook_size - 1}")
    return {"codes": codes.astype(np.int32), "label": int(label)}


@dataclass(frozen=True)
class _Part:
    """A whole file, as ArrayRecord's source takes it without opening the file to count its records."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the names, types, shapes and values of nested arrays, whatever the order of the dictionaries.

    Where arrays are cut over several processes, all of them have to call it; one array at a time is gathered.
    """
    digest = hashlib.sha256()
    for name, value in _leaves(params):
        array = np.ascontiguousarray(_whole(value))
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key in sorted(tree):
        yield from _leaves(tree[key], f"{path}/{key}")


def _whole(array: Any) -> Any:
    if getattr(array, "is_fully_addressable", True) or array.is_fully_replicated:
        return array
    from jax.experimental import multihost_utils  # only here: the worker processes that read codes need no JAX

    return multihost_utils.process_allgather(array, tiled=True)


def _folder(path: str | os.PathLike) -> epath.Path:
    folder = epath.Path(path)
    try:
        folder.exists()
    except ImportError as error:
        raise InputError(f'{folder} cannot be reached ({error}): pip install ".[gcs]"') from error
    return folder


def _require_same(folder: epath.Path, info: CodesInfo) -> None:
    found, _ = _read_json(folder)
    for field in dataclasses.fields(info):
        before, now = getattr(found, field.name), getattr(info, field.name)
        if before != now:
            raise InputError(
                f"{folder} holds codes of another {field.name} ({_short(before)}, not {_short(now)}); choose another folder"
            )


def _shard(folder: epath.Path, shard: int) -> epath.Path:
    return folder / f"shard-{shard:05d}.array_record"


def _count(path: epath.Path, info: CodesInfo) -> int:
    """The number of records in a shard. Raises InputError if it is damaged."""
    try:
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        fits = all(len(record) == info.record.itemsize for record in reader.read([0] if count else []))
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise _damaged(path, str(error)) from error
    if not fits:
        raise _damaged(path, "its records are of other codes")
    return count


def _damaged(path: epath.Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged: {reason}; delete this file and tokenize again, which writes only what is missing")


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(folder: epath.Path, info: CodesInfo, shards: list[Shard] | None) -> None:
    files = shards and [dataclasses.asdict(shard) for shard in shards]
    with replacing(folder / "codes.json") as temporary:
        temporary.write_text(json.dumps({"version": VERSION, **dataclasses.asdict(info), "shards": files}, indent=1) + "\n")


def _read_json(folder: epath.Path) -> tuple[CodesInfo, Sequence[Shard] | None]:
    """What the folder holds, and its shards once it is finished."""
    path = folder / "codes.json"
    if not path.is_file():
        raise InputError(f"{folder} holds no codes: there is no file {path.name}")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON:,} bytes")
        values = json.loads(text)
    except OSError as error:
        raise InputError(f"{folder} holds no codes: {error.strerror or error} ({path.name})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise InputError(f"{path} is not of version {VERSION}, the one this program reads; tokenize into another folder")
    try:
        shards = checked(tuple[Shard, ...] | None, values.get("shards"), "shards")
        info = checked(CodesInfo, {name: value for name, value in values.items() if name not in ("version", "shards")})
        if shards is not None:
            _check_sizes(info, shards)
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return info, shards


def _check_sizes(info: CodesInfo, shards: Sequence[Shard]) -> None:
    """Raises InputError where shards do not have the room for what they are said to hold."""
    if len(shards) != info.shards:
        raise InputError(f"it lists {len(shards)} shards of {info.shards}")
    for number, shard in enumerate(shards):
        most = min(len(info.elements(number)), shard.bytes // info.record.itemsize)
        if shard.records > most:
            raise InputError(f"its numbers contradict each other: {shard.records} records in shard {number} of at most {most}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
