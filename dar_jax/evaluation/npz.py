"""Arrays in NPZ files, read piece by piece and without trusting the file: a member of a zip archive cannot be mapped.

Pickled objects are refused, and no more memory is taken than a header's claim and the archive's directory agree on.
"""

import contextlib
import lzma
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dar_jax.errors import InputError

CHUNK = 1 << 24  # bytes at a time
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What zipfile, its decompressors and NumPy's parser of headers raise on files that are damaged or cannot be read.
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, NotImplementedError, RuntimeError)
HEADER_ERRORS = (tokenize.TokenError, ValueError, MemoryError)

PathLike = str | os.PathLike


def names(path: PathLike) -> list[str]:
    """The names of the arrays of a file. Raises InputError where it is missing or no NPZ file."""
    with _archive(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def header(path: PathLike, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape of an array. Raises InputError where it is missing, holds objects, or is not as long as it claims."""
    with _member(path, name) as (_, dtype, shape):
        return dtype, shape


def chunks(path: PathLike, name: str) -> Iterator[np.ndarray]:
    """An array [N, ...] in parts [n, ...] of about 16 MB. Raises as `header`, and where the data are damaged."""
    with _member(path, name) as (stream, dtype, shape):
        row = math.prod(shape[1:]) * dtype.itemsize
        for start in range(0, shape[0], step := max(1, CHUNK // row)):
            count = min(step, shape[0] - start)
            yield _numbers(stream.read(count * row), dtype, (count, *shape[1:]))


def read(path: PathLike, name: str) -> np.ndarray:
    """A whole array. Raises as `chunks`."""
    with _member(path, name) as (stream, dtype, shape):
        return _numbers(stream.read(math.prod(shape) * dtype.itemsize), dtype, shape)


@contextlib.contextmanager
def _archive(path: PathLike) -> Iterator[zipfile.ZipFile]:
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file" if Path(path).exists() else f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (*ARCHIVE_ERRORS, *HEADER_ERRORS) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as NPZ: {reason}") from error


@contextlib.contextmanager
def _member(path: PathLike, name: str) -> Iterator[tuple[BinaryIO, np.dtype, tuple[int, ...]]]:
    """The bytes of an array, from the first number on, with its dtype and shape."""
    with _archive(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise InputError(f"{path} holds no array {name}; it holds {', '.join(archive.namelist()[:10]) or 'nothing'}")
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            if version not in HEADERS:
                raise InputError(f"{name} in {path} is of the npy format {version}; versions 1.0 and 2.0 are read")
            shape, fortran_order, dtype = HEADERS[version](stream)
            if dtype.hasobject or dtype.fields:
                raise InputError(f"{name} in {path} holds Python objects or records ({dtype}), which are not read")
            if fortran_order and len(shape) > 1:
                raise InputError(f"{name} in {path} is stored by columns; save it with numpy.ascontiguousarray")
            size, held = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
            if not shape or min(shape) < 1 or size != held:
                raise InputError(f"{name} in {path} is damaged: it claims {dtype} {shape}, and holds {held} bytes")
            yield stream, dtype, shape


def _numbers(data: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Raises ValueError where there are fewer bytes than the archive's directory says."""
    return np.frombuffer(data, dtype).reshape(shape)
