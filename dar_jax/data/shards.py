"""Folders of sealed ArrayRecord shards: the form of stored codes and of packed images.

Such a folder holds
- a description in JSON and, once finished, the records, size and SHA-256 of every shard;
- `shard-00000.array_record`, ...: ArrayRecord files of one record per image, uncompressed.

Shard i holds elements [i * shard_size, (i + 1) * shard_size) of the data set, except those that could not be read. Each file
is written whole or not at all, so after an interruption only the missing shards are written; several processes may write
different shards of one folder. The folder may be in a bucket (`gs://...`).
"""

import dataclasses
import json
import os
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Annotated, ClassVar

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath
from grain.sources import ArrayRecordDataSource

from dar_jax.config import INT32, Count, Range, checked
from dar_jax.console import Progress
from dar_jax.errors import InputError
from dar_jax.files import damaged, hash_file, replacing, size_of, write_json

MAX_JSON = 1 << 24  # bytes of a description


@dataclass(frozen=True)
class ShardsInfo:
    """What all descriptions have. Two runs may write into one folder only if the whole description is equal."""

    FILE: ClassVar[str]  # the name of the description
    VERSION: ClassVar[int]
    WHAT: ClassVar[str]  # the contents, in messages
    AGAIN: ClassVar[str]  # the verb that makes them again, in messages

    images: Count  # of the data set, the unreadable ones included
    shard_size: Count  # images per shard

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    @property
    def least_bytes(self) -> int:
        """The size of the smallest possible record."""
        raise NotImplementedError

    def fits(self, record: bytes) -> bool:
        """True for a record that may be one of such a folder, by its size."""
        raise NotImplementedError

    def elements(self, shard: int) -> range:
        """Indices in the data set of a shard's elements."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the description has it."""

    records: Annotated[int, Range(0, INT32)]
    bytes: Annotated[int, Range(0, 2**62)]
    sha256: str


def begin(folder: str | os.PathLike, info: ShardsInfo) -> None:
    """Begins or resumes a folder: creates it where needed, and deletes leftovers of interrupted writes.

    Raises InputError if the folder already holds anything of another description, or cannot be written.
    """
    folder = _open_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / info.FILE).exists():
            if any(folder.glob("shard-*")):
                raise InputError(f"{folder} holds shards without {info.FILE}; choose an empty folder")
            _write_info(folder, info, shards=None)
        _require_same(folder, info)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {info.WHAT} to {folder}: {error}") from error


def missing_shards(folder: str | os.PathLike, info: ShardsInfo) -> list[int]:
    """The shards that are still to be written in a folder that was begun. Raises InputError if it is of anything else."""
    folder = _open_folder(folder)
    _require_same(folder, info)
    return [shard for shard in range(info.shards) if not has_shard(folder, shard)]


def has_shard(folder: str | os.PathLike, shard: int) -> bool:
    """True once a shard has been written."""
    return _shard_file(epath.Path(folder), shard).exists()


def write_records(folder: str | os.PathLike, shard: int, records: Iterable[bytes]) -> None:
    """Writes one shard of a folder that was begun, as its records come, unless another process has done so meanwhile.

    Raises OSError if the disk is full.
    """
    path = _shard_file(_open_folder(folder), shard)
    if path.exists():
        return
    with replacing(path, unique=True) as temporary:
        try:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # one image can be read without others
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def write_missing(
    folder: str | os.PathLike, info: ShardsInfo, write: Callable[[Sequence[int], Progress], None], done: str
) -> None:
    """Begins or resumes a folder, writes what is missing in it, and seals it.

    With several processes, each writes its own shards. A process that finishes early takes over shards that are still missing.
    Process 0 ends with a finished folder.

    Args:
      write: writes these shards in order, and adds every element of them to the progress.
      done: what is done with an element, such as "tokenized".
    """
    import jax  # only here, as below: the worker processes that read shards need no JAX

    from dar_jax.parallel import hosts

    host, count = jax.process_index(), jax.process_count()
    if host == 0:
        begin(folder, info)
    hosts.wait(f"the folder of {info.WHAT} is there")
    missing = missing_shards(folder, info)
    own = [shard for shard in missing if shard % count == host]
    of_others = [shard for shard in missing if shard % count != host]
    total = sum(len(info.elements(shard)) for shard in range(host, info.shards, count))
    with Progress(f"{done} on {hosts.name()}" if count > 1 else done, total) as progress:
        progress.skip(total - sum(len(info.elements(shard)) for shard in own))
        if own:
            write(own, progress)
    for shard in random.Random(host).sample(of_others, len(of_others)):  # in another order on each host, to share what is left
        if not has_shard(folder, shard):
            with Progress(f"left by another host: shard {shard}", len(info.elements(shard))) as progress:
                write([shard], progress)
    if host == 0:
        finish(folder, type(info))


def finish(folder: str | os.PathLike, kind: type[ShardsInfo]) -> None:
    """Seals a folder once all its shards are written: `open_shards` takes it from then on.

    Raises InputError if a shard is missing or damaged.
    """
    folder = _open_folder(folder)
    info, _ = read_info(folder, kind)
    shards = []
    for shard in range(info.shards):
        path = _shard_file(folder, shard)
        if not path.exists():
            raise InputError(f"{folder} is not complete: {path.name} is missing; {info.AGAIN} again")
        try:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            if not all(info.fits(record) for record in reader.read([0] if count else [])):
                raise ValueError(f"its records are of other {info.WHAT}")
            reader.close()
        except (RuntimeError, ValueError, IndexError) as error:
            raise _damaged(path, info, error) from error
        shards.append(Shard(count, size_of(path), hash_file(path)))
    _write_info(folder, info, shards)


def open_shards(path: str | os.PathLike, kind: type[ShardsInfo], split: str | None = None, verify: bool = False) -> "Records":
    """Opens a finished folder, or its sub-folder `split`, and compares the sizes of its shards with those in its description.

    Args:
      verify: compare their SHA-256 too.

    Raises InputError if it is not there, not finished or damaged, or holds no records.
    """
    folder = _open_folder(path)
    if split and (folder / split).is_dir():
        folder = folder / split
    info, shards = read_info(folder, kind)
    if shards is None:
        raise InputError(f"{folder} is not complete; {info.AGAIN} again with the same settings, it goes on where it stopped")
    for number, shard in enumerate(shards):
        file = _shard_file(folder, number)
        if not file.is_file():
            raise InputError(f"{folder} is damaged: {file.name} is missing; {info.AGAIN} again")
        if size_of(file) != shard.bytes or (verify and hash_file(file) != shard.sha256):
            raise _damaged(file, info, "it is not what was written")
    return Records(folder, info, [shard.records for shard in shards])


class Records:
    """Random access to the records of a finished folder, bytes each. A file is opened when its first record is read.

    `folder` and `info` are the folder and its description, `starts` the indices of the first record of each shard that has one.

    Args:
      counts: how many records each shard has.
    """

    def __init__(self, folder: epath.Path, info: ShardsInfo, counts: Sequence[int]):
        self.folder, self.info = folder, info
        self._starts = [0, *accumulate(counts)]
        if not len(self):
            raise InputError(f"{folder} holds no {info.WHAT}: none of its {info.images} images could be read")
        # With these attributes ArrayRecord's source need not open every file to count its records.
        self._records = ArrayRecordDataSource([
            SimpleNamespace(filename=str(_shard_file(folder, shard)), skip=0, take=count, examples_in_shard=count)
            for shard, count in enumerate(counts)
        ])  # fmt: skip

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def starts(self) -> list[int]:
        return sorted({start for start in self._starts if start < len(self)})

    def __getitem__(self, index: int) -> bytes:
        """Raises IndexError, and InputError for a damaged record."""
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not in [0, {len(self)})")
        try:
            record = self._records[index]
            if not self.info.fits(record):
                raise ValueError(f"its records are of other {self.info.WHAT}")
        except (RuntimeError, ValueError, IndexError) as error:
            raise self.damaged(index, error) from error
        return record

    def damaged(self, index: int, reason: object) -> InputError:
        """The error of a record, which names its shard."""
        return _damaged(_shard_file(self.folder, bisect_right(self._starts, index) - 1), self.info, reason)


def read_info(folder: epath.Path, kind: type[ShardsInfo]) -> tuple[ShardsInfo, Sequence[Shard] | None]:
    """The description of a folder, and its shards once it is finished."""
    path = folder / kind.FILE
    if not path.is_file():
        raise InputError(f"{folder} holds no {kind.WHAT}: there is no file {path.name}")
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
    if not isinstance(values, dict) or values.pop("version", None) != kind.VERSION:
        raise InputError(
            f"{path} is not of version {kind.VERSION}, the one this program reads; {kind.AGAIN} into another folder"
        )
    try:
        shards = checked(tuple[Shard, ...] | None, values.pop("shards", None), "shards")
        info = checked(kind, values)
        if shards is not None and len(shards) != info.shards:
            raise InputError(f"it lists {len(shards)} shards of {info.shards}")
        for number, shard in enumerate(shards or ()):
            most = min(len(info.elements(number)), shard.bytes // info.least_bytes)
            if shard.records > most:
                raise InputError(
                    f"its numbers contradict each other: {shard.records} records in shard {number} of at most {most}"
                )
    except InputError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return info, shards


def _open_folder(path: str | os.PathLike) -> epath.Path:
    """Raises InputError for a bucket, where the package that reads buckets is missing."""
    folder = epath.Path(path)
    try:
        folder.exists()
    except ImportError as error:
        raise InputError(f'{folder} cannot be reached ({error}): pip install ".[gcs]"') from error
    return folder


def _require_same(folder: epath.Path, info: ShardsInfo) -> None:
    stored, _ = read_info(folder, type(info))
    for field in dataclasses.fields(info):
        before, now = (getattr(each, field.name) for each in (stored, info))
        if before != now:
            before, now = (text if len(text) <= 60 else text[:57] + "..." for text in (str(before), str(now)))
            raise InputError(f"{folder} holds {info.WHAT} of another {field.name} ({before}, not {now}); choose another folder")


def _shard_file(folder: epath.Path, shard: int) -> epath.Path:
    return folder / f"shard-{shard:05d}.array_record"


def _damaged(path: epath.Path, info: ShardsInfo, reason: object) -> InputError:
    return damaged(path, reason, f"delete this file and {info.AGAIN} again, which writes only what is missing")


def _write_info(folder: epath.Path, info: ShardsInfo, shards: list[Shard] | None) -> None:
    values = {"version": info.VERSION, **dataclasses.asdict(info), "shards": shards and [*map(dataclasses.asdict, shards)]}
    write_json(folder / info.FILE, values)
