"""Stored codes: what `dar-jax tokenize` writes and the transformer is trained on.

They are a folder of shards, see `data.shards`. Its description is `codes.json` (`CodesInfo`); a record is the label as int32
and then the codes as uint16 or uint32 [crops, tokens], little-endian.
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from dar_jax.config import Codes, Range, Tokens
from dar_jax.data.shards import Records, ShardsInfo, open_shards, write_records
from dar_jax.errors import InputError


@dataclass(frozen=True)
class CodesInfo(ShardsInfo):
    """The contents of a folder of codes."""

    FILE: ClassVar[str] = "codes.json"
    VERSION: ClassVar[int] = 2
    WHAT: ClassVar[str] = "codes"
    AGAIN: ClassVar[str] = "tokenize"

    crops: Annotated[int, Range(1, 4096)]  # stored per image
    tokens: Tokens  # per crop
    codebook_size: Codes
    class_names: tuple[str, ...]
    tokenizer: str  # fingerprint of the tokenizer's parameters
    data: str  # the data set and how it was cropped, one line

    @functools.cached_property
    def record(self) -> np.dtype:
        """Layout of one image in a shard."""
        code = "<u2" if self.codebook_size <= 2**16 else "<u4"
        return np.dtype([("label", "<i4"), ("codes", code, (self.crops, self.tokens))])

    @property
    def least_bytes(self) -> int:
        return self.record.itemsize

    def fits(self, record: bytes) -> bool:
        return len(record) == self.record.itemsize


def write_shard(folder: str | os.PathLike, info: CodesInfo, shard: int, codes: np.ndarray, labels: np.ndarray) -> None:
    """Writes one shard of a folder that was begun, unless another process has done so meanwhile.

    codes: int [n, crops, tokens] in [0, codebook_size); labels: int [n], of the classes; n is at most the shard's elements.
    Raises ValueError if they do not fit the description, OSError if the disk is full.
    """
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
    write_records(folder, shard, (record.tobytes() for record in records))


def open_codes(path: str | os.PathLike, split: str | None = None, verify: bool = False) -> "CodesSource":
    """Opens a finished folder of codes and compares the sizes of its shards with those in codes.json.

    The first record of each shard is read here. Damage elsewhere that keeps the size is found when a record is read, by
    ArrayRecord's checksum of each, as are labels and codes out of range.

    Args:
      split: if the folder has a sub-folder of this name, that one is opened.
      verify: compare the SHA-256 of all shards too, for which they are read once.

    Raises InputError if the folder is missing, unfinished, damaged or of another version.
    """
    source = CodesSource(open_shards(path, CodesInfo, split, verify))
    for start in source.records.starts:
        source[start]
    return source


class CodesSource:
    """Random access to stored codes: {"codes": int32 [crops, tokens], "label": int}.

    Reading raises InputError for a damaged record, one of another size than the folder's codes, and a label or a code that is
    out of range.
    """

    def __init__(self, records: Records):
        self.records, self.info, self.folder = records, records.info, records.folder
        self.class_names = self.info.class_names
        self.description = (
            f"stored codes in {self.folder}: {len(self)} images in {len(self.class_names)} classes, "
            f"{self.info.crops} x {self.info.tokens} codes each, from {self.info.data}"
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ((label, codes),) = np.frombuffer(self.records[index], self.info.record)
        if not 0 <= label < len(self.class_names):
            raise self.records.damaged(index, f"it holds the label {label}, labels are 0 .. {len(self.class_names) - 1}")
        if codes.max() >= self.info.codebook_size:
            raise self.records.damaged(index, f"it holds the code {codes.max()}, codes are 0 .. {self.info.codebook_size - 1}")
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


def check_made_by(source: Any, tokenizer: Any, name: str | os.PathLike) -> None:
    """Raises InputError where a source has stored codes of another tokenizer than the one with these parameters, of `name`."""
    if isinstance(source, CodesSource) and source.info.tokenizer != fingerprint(tokenizer):
        raise InputError(f"the codes in {source.folder} were made by another tokenizer than that of {name}")
