"""Integrity of a checkpoint's files, which may be copied in part, truncated by a full disk or changed since they were written.

`files.json` lists the size and the CRC-32 of every file. It is written in the background, and compared when a part is read,
with that part's files only: several at once, in threads, at about 1 GB/s per core, which leaves the files in the system's cache
for the reading that follows. With several hosts each compares its share, and ends the job where that is damaged.
"""

import contextlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from etils import epath

from dar_jax.errors import InputError, one_line
from dar_jax.files import CIRCUMSTANCES, size_of
from dar_jax.parallel import hosts

CHECKSUMS = "files.json"
MOST_JSON = 64 * 2**20  # bytes that are read of a JSON file


def write_checksums(checkpoint: epath.Path) -> None:
    """Writes files.json for the files of all parts of a checkpoint."""
    listed: dict[str, Any] = {}
    for part in [path for path in checkpoint.iterdir() if path.is_dir()]:
        sizes = _sizes(part)
        checksums = _checksums(part, sizes)
        listed[part.name] = {name: [size, checksums[name]] for name, size in sizes.items()}
    (checkpoint / CHECKSUMS).write_text(json.dumps(listed))


def require_intact(checkpoint: epath.Path, part: str) -> None:
    """Compares the files of a part with files.json. Raises InputError where one is missing or not what was written."""
    with reading(checkpoint):
        listed = read_json(checkpoint / CHECKSUMS)[part]
        listed = {name: entry if isinstance(entry, list) else [entry] for name, entry in listed.items()}  # format 0: sizes
        if not all(isinstance(entry, list) and entry and type(entry[0]) is int for entry in listed.values()):
            raise ValueError(f"{CHECKSUMS} lists no sizes")
        folder = checkpoint / part
        folder = folder if folder.is_dir() else checkpoint  # the one part of an exported checkpoint has no folder of its own
        sizes = _sizes(folder)
    for name, (size, *_) in listed.items():
        if name not in sizes or sizes[name] != size:
            state = f"has {sizes[name]} bytes" if name in sizes else "is missing"
            raise _damaged(checkpoint, f"{one_line(os.path.join(part, name))} {state}, it was written with {size}")
    share = [name for name, (_, *crc) in listed.items() if crc]
    if hosts.many():
        share = share[jax.process_index() :: jax.process_count()]
    with reading(checkpoint):
        checksums = _checksums(folder, share)
    for name, checksum in checksums.items():
        if listed[name][1:] != [checksum]:
            raise _damaged(checkpoint, f"{os.path.join(part, name)} is not what was written")


def read_json(path: epath.Path) -> Any:
    """Raises ValueError, also for a file of more than `MOST_JSON` bytes."""
    if path.stat().length > MOST_JSON:
        raise ValueError(f"{path.name} is larger than {MOST_JSON} bytes")
    return json.loads(path.read_text())


def checksum_of(values: Any) -> int:
    """CRC-32 of JSON-able data."""
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Raises one InputError for whatever Orbax, TensorStore or JSON raise while reading, without what Orbax logs before.

    Only errors that come from the files' contents count as damage.
    """
    jax.devices()  # an error of theirs says nothing about the checkpoint
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (InputError, jax.errors.JaxRuntimeError):
        raise  # JAX raises the latter where another host is gone
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        of_files = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        if (isinstance(error, OSError) and not isinstance(error, of_files)) or CIRCUMSTANCES.search(str(error)):
            raise InputError(f"{path} cannot be read: {reason}") from error
        raise _damaged(path, reason) from error
    finally:
        logger.setLevel(level)


def _sizes(folder: epath.Path, prefix: str = "") -> dict[str, int]:
    sizes = {}
    for path in folder.iterdir():
        name = prefix + path.name
        sizes |= _sizes(path, f"{name}/") if path.is_dir() else {name: size_of(path)}
    return sizes


def _checksums(folder: epath.Path, names: Iterable[str]) -> dict[str, int]:
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: checksum_of_file(folder / name), names)))


def checksum_of_file(path: epath.Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def _damaged(path: epath.Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged; delete it to go on from an earlier checkpoint ({reason})")
