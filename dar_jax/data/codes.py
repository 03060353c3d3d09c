"""Stored codes: what `dar-jax tokenize` writes and the transformer is trained on.

A folder of codes holds
- `codes.json`: what the codes are (`CodesInfo`) and, once finished, the size and SHA-256 of every shard;
- `shard-00000.npy`, ...: one record per image, {"label": int32, "codes": uint16 or uint32 [crops, tokens]}, little-endian.

Shard i holds elements [i * shard_size, (i + 1) * shard_size) of the data set, less those that could not be read. Each file is
written whole or not at all, so writing goes on at the first missing shard after an interruption; several processes may write
different shards of one folder.
"""

import dataclasses
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dar_jax.errors import InputError
from dar_jax.files import replacing, write_json

VERSION = 1


@dataclass(frozen=True)
class CodesInfo:
    """What a folder of codes holds. Two tokenizing runs may share a folder only if all of this is equal."""

    images: int  # of the data set, the unreadable ones included
    shard_size: int  # images per shard
    crops: int  # stored per image
    tokens: int  # per crop
    codebook_size: int
    class_names: tuple[str, ...]
    tokenizer: str  # fingerprint of the tokenizer's parameters
    data: str  # the data set and how it was cropped, one line

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    @property
    def record(self) -> np.dtype:
        """Layout of one image in a shard."""
        code = "<u2" if self.codebook_size <= 2**16 else "<u4"
        return np.dtype([("label", "<i4"), ("codes", code, (self.crops, self.tokens))])

    def elements(self, shard: int) -> range:
        """Indices of the data set's elements that belong into a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))


def missing_shards(folder: str | os.PathLike, info: CodesInfo) -> list[int]:
    """Begins or resumes a folder of codes: creates it where needed and lists the shards that are still to be written.

    Raises InputError if the folder already holds codes of another tokenizer, data set or layout, or cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "codes.json").exists():
            if any(folder.glob("shard-*.npy")):
                raise InputError(f"{folder} holds shards without codes.json; choose an empty folder")
            _write_json(folder, info, shards=None)
    except OSError as error:
        raise InputError(f"cannot write codes to {folder}: {error}") from error
    found, _ = _read_json(folder)
    for field in dataclasses.fields(info):
        before, now = getattr(found, field.name), getattr(info, field.name)
        if before != now:
            raise InputError(
                f"{folder} holds codes of another {field.name} ({_short(before)}, not {_short(now)}); choose another folder"
            )
    return [shard for shard in range(info.shards) if not _shard(folder, shard).exists()]


def write_shard(folder: str | os.PathLike, shard: int, codes: np.ndarray, labels: np.ndarray) -> None:
    """Writes one shard of a folder that `missing_shards` began.

    codes: int [n, crops, tokens] in [0, codebook_size); labels: int [n]; n is at most the number of the shard's elements.
    Raises ValueError if they do not fit the folder, InputError if its codes.json is damaged, OSError if the disk is full.
    """
    info, _ = _read_json(Path(folder))
    codes, labels = np.asarray(codes), np.asarray(labels)
    if not 0 <= shard < info.shards or len(codes) > len(info.elements(shard)):
        raise ValueError(f"{len(codes)} images do not fit into shard {shard} of {info.shards} with {info.shard_size} each")
    if codes.shape != (len(labels), info.crops, info.tokens):
        raise ValueError(f"codes {codes.shape} of {labels.shape} labels should be [n, {info.crops}, {info.tokens}] of [n]")
    if codes.size and not 0 <= codes.min() <= codes.max() < info.codebook_size:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} should be in [0, {info.codebook_size})")
    records = np.empty(len(codes), info.record)
    records["codes"], records["label"] = codes, labels
    with replacing(_shard(Path(folder), shard)) as temporary, open(temporary, "wb") as file:
        np.save(file, records, allow_pickle=False)


def finish(folder: str | os.PathLike) -> None:
    """Seals a folder once all its shards are written: `open_codes` takes it from then on.

    Raises InputError if a shard is missing or damaged.
    """
    folder = Path(folder)
    info, _ = _read_json(folder)
    shards = []
    for shard in range(info.shards):
        path = _shard(folder, shard)
        if not path.exists():
            raise InputError(f"{folder} is not complete: {path.name} is missing; tokenize again")
        _load(path, info)
        shards.append({"bytes": path.stat().st_size, "sha256": _sha256(path)})
    _write_json(folder, info, shards)
    for leftover in folder.glob("*.tmp"):  # of an interruption
        leftover.unlink(missing_ok=True)


def open_codes(path: str | os.PathLike) -> "CodesSource":
    """Opens a finished folder of codes and verifies the size and the SHA-256 of all its shards.

    Raises InputError if the folder is missing, unfinished, damaged or of another version.
    """
    folder = Path(path)
    info, shards = _read_json(folder)
    if shards is None:
        raise InputError(f"{folder} is not complete; tokenize again with the same settings, it goes on where it stopped")
    for shard, entry in enumerate(shards):
        file = _shard(folder, shard)
        if not file.exists():
            raise InputError(f"{folder} is damaged: {file.name} is missing")
        if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            raise InputError(f"{folder} is damaged: {file.name} is not what was written; delete the folder and tokenize again")
    return CodesSource(folder, info)


class CodesSource:
    """Random access to stored codes: {"codes": int32 [crops, tokens], "label": int}. Shards are memory-mapped."""

    def __init__(self, folder: Path, info: CodesInfo):
        self.folder, self.info = folder, info
        self.class_names = info.class_names
        self._shards = [_load(_shard(folder, shard), info) for shard in range(info.shards)]
        self._starts = [0, *accumulate(len(records) for records in self._shards)]
        if not len(self):
            raise InputError(f"{folder} holds no codes: none of its {info.images} images could be read")
        self.description = (
            f"stored codes in {folder}: {len(self)} images in {len(info.class_names)} classes, "
            f"{info.crops} x {info.tokens} codes each, from {info.data}"
        )

    def __reduce__(self) -> tuple:
        return CodesSource, (self.folder, self.info)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = bisect_right(self._starts, index) - 1
        record = self._shards[shard][index - self._starts[shard]]
        return {"codes": record["codes"].astype(np.int32), "label": int(record["label"])}


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the names, types, shapes and values of nested arrays, whatever the order of the dictionaries."""
    digest = hashlib.sha256()
    for name, value in _leaves(params):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key in sorted(tree):
        yield from _leaves(tree[key], f"{path}/{key}")


def _shard(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.npy"


def _load(path: Path, info: CodesInfo) -> np.ndarray:
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged: {error}; delete it and tokenize again") from error
    if records.dtype != info.record or records.ndim != 1:
        raise InputError(f"{path} is not a shard of these codes; delete it and tokenize again")
    return records


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(folder: Path, info: CodesInfo, shards: list[dict[str, Any]] | None) -> None:
    write_json(folder / "codes.json", {"version": VERSION, **dataclasses.asdict(info), "shards": shards})


def _read_json(folder: Path) -> tuple[CodesInfo, list[dict[str, Any]] | None]:
    """What the folder holds, and the bytes and SHA-256 of its shards once it is finished."""
    path = folder / "codes.json"
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{folder} holds no codes: {error.strerror} ({path.name})") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise InputError(f"{path} is not of version {VERSION}, the one this program reads")
    try:
        names = tuple(str(name) for name in values["class_names"])
        numbers = {name: int(values[name]) for name in ("images", "shard_size", "crops", "tokens", "codebook_size")}
        info = CodesInfo(**numbers, class_names=names, tokenizer=str(values["tokenizer"]), data=str(values["data"]))
        shards = values["shards"]
        if min(numbers.values()) < 1 or (shards is not None and len(shards) != info.shards):
            raise ValueError("its numbers contradict each other")
        if shards is not None:
            shards = [{"bytes": int(shard["bytes"]), "sha256": str(shard["sha256"])} for shard in shards]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error
    return info, shards


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
