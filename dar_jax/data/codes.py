"""Stored codes: what `dar-jax tokenize` writes and the transformer is trained on.

A folder of codes holds
- `codes.json`: a description of the codes (`CodesInfo`) and, once finished, the records, size and SHA-256 of every shard;
- `shard-00000.array_record`, ...: ArrayRecord files of one record per image, the label as int32 and then the codes as uint16
  or uint32 [crops, tokens], little-endian and uncompressed.

Shard i holds elements [i * shard_size, (i + 1) * shard_size) of the data set, except those that could not be read. Each file
is written whole or not at all, so after an interruption only the missing shards are written; several processes may write
different shards of one folder. The folder may be in a bucket (`gs://...`).
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from grain.sources import ArrayRecordDataSource

from dar_jax.config import INT32, Codes, Count, Range, Tokens, checked
from dar_jax.errors import InputError
from dar_jax.files import hash_file, replacing, size_of, write_json

VERSION = 2
MAX_JSON = 1 << 24  # bytes of codes.json
CIRCUMSTANCES = (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE)  # say nothing about what a file holds


@dataclass(frozen=True)
class CodesInfo:
    """The contents of a folder of codes. Two tokenizing runs may share a folder only if all of this is equal."""

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
        """Indices in the data set of a shard's elements."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))


@dataclass(frozen=True)
class Shard:
    """A finished shard, as codes.json describes it."""

    records: Annotated[int, Range(0, INT32)]
    bytes: Annotated[int, Range(0, 2**62)]
    sha256: str


def begin(folder: str | os.PathLike, info: CodesInfo) -> None:
    """Begins or resumes a folder of codes: creates it where needed, and deletes leftovers of interrupted writes.

    Raises InputError if the folder already holds codes of another tokenizer, data set or layout, or cannot be written.
    """
    folder = _open_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "codes.json").exists():
            if any(folder.glob("shard-*")):
                raise InputError(f"{folder} holds shards without codes.json; choose an empty folder")
            _write_info(folder, info, shards=None)
        _require_same(folder, info)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write codes to {folder}: {error}") from error


def missing_shards(folder: str | os.PathLike, info: CodesInfo) -> list[int]:
    """The shards that are still to be written in a folder that was begun. Raises InputError if it holds other codes or none."""
    folder = _open_folder(folder)
    _require_same(folder, info)
    return [shard for shard in range(info.shards) if not has_shard(folder, shard)]


def has_shard(folder: str | os.PathLike, shard: int) -> bool:
    """True once a shard has been written."""
    return _shard_file(epath.Path(folder), shard).exists()


def write_shard(folder: str | os.PathLike, shard: int, codes: np.ndarray, labels: np.ndarray) -> None:
    """Writes one shard of a folder that was begun, unless another process has done so meanwhile.

    codes: int [n, crops, tokens] in [0, codebook_size); labels: int [n], of the classes; n is at most the shard's elements.
    Raises ValueError if they do not fit the folder, InputError if its codes.json is damaged, OSError if the disk is full.
    """
    folder = _open_folder(folder)
    info, _ = _read_info(folder)
    codes, labels = np.asarray(codes), np.asarray(labels)
    if not 0 <= shard < info.shards or len(codes) > len(info.elements(shard)):
        raise ValueError(f"{len(codes)} images do not fit into shard {shard} of {info.shards} with {info.shard_size} each")
    if codes.shape != (len(labels), info.crops, info.tokens):
        raise ValueError(f"codes {codes.shape} of {labels.shape} labels should be [n, {info.crops}, {info.tokens}] of [n]")
    for name, values, end in (("codes", codes, info.codebook_size), ("labels", labels, len(info.class_names))):
        if values.size and not 0 <= values.min() <= values.max() < end:
            raise ValueError(f"{name} from {values.min()} to {values.max()} should be in [0, {end})")
    records = np.empty(len(codes), info.record)
    records["codes"], records["label"] = codes, labels
    path = _shard_file(folder, shard)
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
    folder = _open_folder(folder)
    info, _ = _read_info(folder)
    shards = []
    for shard in range(info.shards):
        path = _shard_file(folder, shard)
        if not path.exists():
            raise InputError(f"{folder} is not complete: {path.name} is missing; tokenize again")
        try:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            if not all(len(record) == info.record.itemsize for record in reader.read([0] if count else [])):
                raise ValueError("its records are of other codes")
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(path, error) from error
        shards.append(Shard(count, size_of(path), hash_file(path)))
    _write_info(folder, info, shards)


def open_codes(path: str | os.PathLike, split: str | None = None, verify: bool = False) -> "CodesSource":
    """Opens a finished folder of codes and compares the sizes of its shards with those in codes.json.

    The first record of each shard is read here. Damage elsewhere that keeps the size is found when a record is read, by
    ArrayRecord's checksum of each, as are labels and codes out of range.

    Args:
      split: if the folder has a sub-folder of this name, that one is opened.
      verify: compare the SHA-256 of all shards too, for which they are read once.

    Raises InputError if the folder is missing, unfinished, damaged or of another version.
    """
    folder = _open_folder(path)
    if split and (folder / split).is_dir():
        folder = folder / split
    info, shards = _read_info(folder)
    if shards is None:
        raise InputError(f"{folder} is not complete; tokenize again with the same settings, it goes on where it stopped")
    for number, shard in enumerate(shards):
        file = _shard_file(folder, number)
        if not file.is_file():
            raise InputError(f"{folder} is damaged: {file.name} is missing; tokenize again")
        if size_of(file) != shard.bytes or (verify and hash_file(file) != shard.sha256):
            raise _damaged(file, "it is not what was written")
    counts = [shard.records for shard in shards]
    source = CodesSource(folder, info, counts)
    for start in sorted({start for start in accumulate(counts, initial=0) if start < len(source)}):
        source[start]
    return source


class CodesSource:
    """Random access to stored codes: {"codes": int32 [crops, tokens], "label": int}.

    A file is opened when its first record is read. Reading raises InputError for a damaged record, one of another size than the
    folder's codes, and a label or a code that is out of range.

    Args:
      folder, info: a finished folder and its description.
      counts: how many records each shard has.
    """

    def __init__(self, folder: epath.Path, info: CodesInfo, counts: Sequence[int]):
        self.folder, self.info = folder, info
        self.class_names = info.class_names
        self._starts = [0, *accumulate(counts)]
        if not len(self):
            raise InputError(f"{folder} holds no codes: none of its {info.images} images could be read")
        # With these attributes ArrayRecord's source need not open every file to count its records.
        self._records = ArrayRecordDataSource([
            SimpleNamespace(filename=str(_shard_file(folder, shard)), skip=0, take=count, examples_in_shard=count)
            for shard, count in enumerate(counts)
        ])  # fmt: skip
        self.description = (
            f"stored codes in {folder}: {len(self)} images in {len(info.class_names)} classes, "
            f"{info.crops} x {info.tokens} codes each, from {info.data}"
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)})")
        info = self.info
        try:
            record = self._records[index]
            if len(record) != info.record.itemsize:
                raise ValueError("its records are of other codes")
            ((label, codes),) = np.frombuffer(record, info.record)
            if not 0 <= label < len(info.class_names):
                raise ValueError(f"it holds the label {label}, labels are 0 .. {len(info.class_names) - 1}")
            if codes.max() >= info.codebook_size:
                raise ValueError(f"it holds the code {codes.max()}, codes are 0 .. {info.codebook_size - 1}")
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(_shard_file(self.folder, bisect_right(self._starts, index) - 1), error) from error
        return {"codes": codes.astype(np.int32), "label": int(label)}


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the names, types, shapes and values of nested arrays, whatever the order of the dictionaries.

    Where arrays are sharded over several processes, all of them have to call it; one array at a time is gathered.
    """
    digest = hashlib.sha256()

    def add(value: Any, name: str = "") -> None:
        if isinstance(value, Mapping):
            for key in sorted(value):
                add(value[key], f"{name}/{key}")
            return
        if not (getattr(value, "is_fully_addressable", True) or value.is_fully_replicated):
            from jax.experimental import multihost_utils  # only here: the worker processes that read codes need no JAX

            value = multihost_utils.process_allgather(value, tiled=True)
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))

    add(params)
    return digest.hexdigest()


def _open_folder(path: str | os.PathLike) -> epath.Path:
    """Raises InputError for a bucket, where the package that reads buckets is missing."""
    folder = epath.Path(path)
    try:
        folder.exists()
    except ImportError as error:
        raise InputError(f'{folder} cannot be reached ({error}): pip install ".[gcs]"') from error
    return folder


def _require_same(folder: epath.Path, info: CodesInfo) -> None:
    stored, _ = _read_info(folder)
    for field in dataclasses.fields(info):
        before, now = (getattr(each, field.name) for each in (stored, info))
        if before != now:
            before, now = (text if len(text) <= 60 else text[:57] + "..." for text in (str(before), str(now)))
            raise InputError(f"{folder} holds codes of another {field.name} ({before}, not {now}); choose another folder")


def _shard_file(folder: epath.Path, shard: int) -> epath.Path:
    return folder / f"shard-{shard:05d}.array_record"


def _damaged(path: epath.Path, reason: object) -> InputError:
    if any(os.strerror(number) in str(reason) for number in CIRCUMSTANCES):
        return InputError(f"{path} cannot be read: {reason}")
    return InputError(f"{path} is damaged: {reason}; delete this file and tokenize again, which writes only what is missing")


def _write_info(folder: epath.Path, info: CodesInfo, shards: list[Shard] | None) -> None:
    values = {"version": VERSION, **dataclasses.asdict(info), "shards": shards and [*map(dataclasses.asdict, shards)]}
    write_json(folder / "codes.json", values)


def _read_info(folder: epath.Path) -> tuple[CodesInfo, Sequence[Shard] | None]:
    """The description in codes.json, and the shards once the folder is finished."""
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
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.pop("version", None) != VERSION:
        raise InputError(f"{path} is not of version {VERSION}, the one this program reads; tokenize into another folder")
    try:
        shards = checked(tuple[Shard, ...] | None, values.pop("shards", None), "shards")
        info = checked(CodesInfo, values)
        if shards is not None and len(shards) != info.shards:
            raise InputError(f"it lists {len(shards)} shards of {info.shards}")
        for number, shard in enumerate(shards or ()):
            most = min(len(info.elements(number)), shard.bytes // info.record.itemsize)
            if shard.records > most:
                raise InputError(
                    f"its numbers contradict each other: {shard.records} records in shard {number} of at most {most}"
                )
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return info, shards
