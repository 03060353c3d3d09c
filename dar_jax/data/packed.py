"""Packed images: what `dar-jax pack` writes. A data set in few large files, with the bytes of its images as they were.

They are a folder of shards, see `data.shards`. Its description is `packed.json` (`PackedInfo`); a record is the label as int32,
the number of bytes of the key as uint32, both little-endian, the key in UTF-8, and then the image as PNG, JPEG or WebP.
"""

import io
import os
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from dar_jax.console import Progress
from dar_jax.data.images import EncodedImages, ImageError, read_encoded, read_image
from dar_jax.data.shards import Records, ShardsInfo, open_shards, write_missing, write_records
from dar_jax.data.transforms import scale_to
from dar_jax.errors import InputError

HEAD = struct.Struct("<iI")
QUALITY = 95  # of the JPEGs that larger images become, without subsampled colours
ORIGINAL = "the original bytes"
THREADS = min(os.cpu_count() or 1, 16)
AHEAD = 1 << 26  # bytes of images that are decoded at a time, and that wait for their turn to be written


@dataclass(frozen=True)
class PackedInfo(ShardsInfo):
    """The contents of a folder of packed images."""

    FILE: ClassVar[str] = "packed.json"
    VERSION: ClassVar[int] = 1
    WHAT: ClassVar[str] = "packed images"
    AGAIN: ClassVar[str] = "pack"

    class_names: tuple[str, ...]
    split: str
    encoding: str  # ORIGINAL, or what was done to larger images
    data: str  # the data set, one line

    @property
    def least_bytes(self) -> int:
        return HEAD.size

    def fits(self, record: bytes) -> bool:
        return len(record) >= HEAD.size and len(record) >= HEAD.size + HEAD.unpack_from(record)[1]


def encoding(min_side: int | None) -> str:
    """What becomes of the images, one line."""
    if min_side is None:
        return ORIGINAL
    return f"{ORIGINAL}, or scaled to a smaller side of {min_side} pixels, as JPEG of quality {QUALITY}, where those are fewer"


def pack(
    source: EncodedImages, out: str | os.PathLike, split: str, shard_size: int = 4096, min_side: int | None = None
) -> PackedInfo:
    """Stores the images of a data set in the folder `out`, resumable and on many hosts, see `write_missing`.

    Every image is decoded once. One that cannot be read is logged and left out.

    Args:
      out: a folder, or one in a bucket; the same one for all processes.
      split: the name of the split that is packed.
      shard_size: images per file.
      min_side: images whose smaller side has more pixels are scaled to it and become JPEGs, where these have fewer bytes than
        the original; None: no image is.

    Raises InputError where `out` holds anything else.
    """
    names = tuple(source.class_names)
    info = PackedInfo(len(source), shard_size, names, split, encoding(min_side), source.description)

    def write(shards: Sequence[int], progress: Progress) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            for shard in shards:
                write_records(out, shard, _records(source, info.elements(shard), min_side, threads, progress))

    write_missing(out, info, write, "packed")
    return info


def open_packed(
    path: str | os.PathLike, split: str, verify: bool = False, channels: int = 3, smaller_side: int = 1
) -> "PackedSource":
    """Opens a finished folder of packed images, or its sub-folder `split`.

    Args:
      verify: compare the SHA-256 of all shards first, for which they are read once.
      channels, smaller_side: as of EncodedImages.

    Raises InputError if the folder is missing, unfinished, damaged, of another version, or of another split.
    """
    records = open_shards(path, PackedInfo, split, verify)
    if records.info.split != split:
        there = records.info.split
        hint = f"give {there} as data.split or data.held_out_split"
        raise InputError(f"{records.folder} holds the split {there}, not {split}; {hint}")
    for start in records.starts:
        records[start]
    return PackedSource(records, channels, smaller_side)


class PackedSource(EncodedImages):
    """Random access to packed images; `key(index)` is the name of an image in the data set that was packed."""

    def __init__(self, records: Records, channels: int, smaller_side: int):
        super().__init__(channels, smaller_side)
        self.records = records
        self.class_names = records.info.class_names
        self.description = (
            f"packed images in {records.folder}: {len(self)} in {len(self.class_names)} classes, {records.info.encoding}, "
            f"from {records.info.data}"
        )

    def __len__(self) -> int:
        return len(self.records)

    def encoded(self, index: int) -> tuple[io.BytesIO, int]:
        label, _, image = self._parts(index)
        if not 0 <= label < len(self.class_names):
            raise self.records.damaged(index, f"it holds the label {label}, labels are 0 .. {len(self.class_names) - 1}")
        return io.BytesIO(image), label

    def key(self, index: int) -> str:
        return self._parts(index)[1].decode(errors="replace")

    def name(self, index: int) -> str:
        return f"{index} of {self.records.folder}"

    def _parts(self, index: int) -> tuple[int, bytes, bytes]:
        record = self.records[index]
        label, length = HEAD.unpack_from(record)
        return label, record[HEAD.size : HEAD.size + length], record[HEAD.size + length :]


def _records(
    source: EncodedImages, elements: range, min_side: int | None, threads: ThreadPoolExecutor, progress: Progress
) -> Iterator[bytes]:
    """The records of these elements in order, without those that cannot be read. They are read here and decoded by threads."""
    pending: deque[tuple[int, bytes, int, Future]] = deque()  # index, label and key, size, and the image
    size = 0

    def next_one() -> Iterator[bytes]:
        index, head, _, image = pending.popleft()
        try:
            yield head + image.result()
        except ImageError as error:
            source.skip(index, error)
        progress.add(1)

    for index in elements:
        try:
            file, label = source.encoded(index)
            image, key = read_encoded(file), source.key(index).encode(errors="replace")
        except Exception as error:  # what the libraries of data sets raise on damaged records is of many kinds
            source.skip(index, error)
            progress.add(1)
            continue
        size += len(image)
        prepared = threads.submit(_prepared, image, source.name(index), min_side)
        pending.append((index, HEAD.pack(label, len(key)) + key, len(image), prepared))
        while len(pending) > 4 * THREADS or (size > AHEAD and pending):
            size -= pending[0][2]
            yield from next_one()
    while pending:
        yield from next_one()


def _prepared(image: bytes, name: str, min_side: int | None) -> bytes:
    """The bytes to store of an image. Raises ImageError where it cannot be decoded."""
    pixels = read_image(io.BytesIO(image), 3, min_side or 1, name)
    if min_side is None or min(pixels.shape[:2]) <= min_side:
        return image
    file = io.BytesIO()
    Image.fromarray(scale_to(pixels, min_side)).save(file, "jpeg", quality=QUALITY, subsampling=0)
    return min(image, file.getvalue(), key=len)
