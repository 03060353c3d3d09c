"""Arrays in NPZ files, read in pieces and without trusting the file: a member of a zip archive cannot be memory-mapped.

Pickled objects are refused, and sizes are believed only where the array's header, the archive's directory and the bytes that
are there agree; memory is allocated as numbers come.
"""

import contextlib
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from dar_jax.errors import InputError

CHUNK, PIECE = 1 << 24, 1 << 20  # bytes of an array, and of an archive's member, at a time
# An array that is read completely may have SMALL bytes, or else RATIO times its compressed size: 4 MB of zeros can say 4 GB.
SMALL, RATIO = 1 << 26, 20
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those of NumPy; zipfile limits no other decompressor's memory
# What zipfile, its decompressor and NumPy's parser of headers raise on files that are damaged or cannot be read.
ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, NotImplementedError, RuntimeError, OverflowError)
ERRORS += (tokenize.TokenError, ValueError, MemoryError)


def names(path: str | os.PathLike) -> list[str]:
    """The names of the arrays of a file. Raises InputError where it is missing or no NPZ file."""
    with _opened(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def header(path: str | os.PathLike, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of an array. Raises InputError where it is missing, holds objects, or is not as long as it claims."""
    with _opened(path) as archive, _member(archive, name) as member:
        return member.dtype, member.shape


def chunks(path: str | os.PathLike, name: str) -> Iterator[np.ndarray]:
    """An array [N, ...] in parts [n, ...] of about 16 MB. Raises as `header`, and where the data are damaged."""
    with _opened(path) as archive, _member(archive, name) as member:
        rows, *row = member.shape
        step = max(1, CHUNK // (math.prod(row) * member.dtype.itemsize))
        for start in range(0, rows, step):
            yield _numbers(member, (min(step, rows - start), *row))


def read(path: str | os.PathLike, *names: str) -> dict[str, np.ndarray]:
    """Complete arrays by name. Raises as `chunks`, and where so few bytes stand for so many that they are no measurements."""
    arrays = {}
    with _opened(path) as archive:
        for name in names:
            with _member(archive, name) as member:
                size = math.prod(member.shape) * member.dtype.itemsize
                if size > max(SMALL, RATIO * member.compressed):
                    raise InputError(f"{member.where} claims {size:,} bytes, but has only {member.compressed:,} in the file")
                arrays[name] = _numbers(member, member.shape)
    return arrays


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Turns all errors of reading into InputErrors."""
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a file" if os.path.exists(path) else f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as NPZ: {reason}") from error


@dataclass(frozen=True)
class _Member:
    """An array in an archive: its bytes from the first number on, their number in the archive, and its name for messages."""

    stream: BinaryIO
    dtype: np.dtype
    shape: tuple[int, ...]
    compressed: int
    where: str


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[_Member]:
    if f"{name}.npy" not in archive.namelist():
        held = ", ".join(archive.namelist()[:10]) or "nothing"
        raise InputError(f"{archive.filename} holds no array {name}; it holds {held}")
    info, where = archive.getinfo(f"{name}.npy"), f"{name} in {archive.filename}"
    if info.compress_type not in METHODS:
        raise InputError(f"{where} is not compressed as NumPy does it; save it with numpy.savez_compressed")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):  # later ones are for records, and NumPy believes their headers to be of any length
            raise InputError(f"{where} is of the npy format {version}; version (1, 0) is read")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject or dtype.kind == "V" or not dtype.itemsize:
            raise InputError(f"{where} holds Python objects or records ({dtype}), which are not read")
        if fortran_order and len(shape) > 1:
            raise InputError(f"{where} is stored by columns; save it with numpy.ascontiguousarray")
        size, held = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
        if not shape or min(shape) < 1 or size != held:
            raise InputError(f"{where} is damaged: it claims {dtype} {shape}, and holds {held} bytes")
        there = os.fstat(archive.fp.fileno()).st_size
        yield _Member(stream, dtype, shape, min(info.compress_size, there), where)


def _numbers(member: _Member, shape: tuple[int, ...]) -> np.ndarray:
    """The next numbers of an array. Raises EOFError where there are fewer than the archive's directory says."""
    array = np.empty(shape, member.dtype)
    data = memoryview(array.reshape(-1).view(np.uint8))
    while data:
        count = member.stream.readinto(data[:PIECE])
        if not count:
            raise EOFError(f"{member.where} ends too early")
        data = data[count:]
    return array
