"""Files that are written completely or not at all."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from dar_jax.errors import InputError

# Errors of reading that say nothing about what a file holds: of this system, and of buckets.
CIRCUMSTANCES = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|"
    + "|".join(map(os.strerror, (errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE)))
)
ON_HUB = "hf://"  # what names on the Hugging Face Hub begin with, see `weights.hub`


def is_remote(path: str | os.PathLike) -> bool:
    """True for a path in a bucket, `gs://...`; False for one on a disk of this machine."""
    return "://" in os.fspath(path)


def user_cache() -> Path | None:
    """The folder of caches: `dar_jax` in XDG_CACHE_HOME or ~/.cache; None for a user without a home folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "dar_jax" if os.path.isabs(folder) else None


def size_of(path: epath.Path) -> int:
    """Bytes of a file. epath's `stat` also looks up the owner's name, which some users do not have."""
    return path.stat().length if is_remote(path) else os.stat(path).st_size


@contextlib.contextmanager
def replacing(path: str | os.PathLike, unique: bool = False) -> Iterator[Path]:
    """Yields a temporary name to write to; the file takes the place of `path` if nothing is raised.

    Folders above are created where needed. To a bucket (`gs://...`), whose objects are complete or not there, it is copied.
    A killed process leaves NAME.dar_jax.tmp behind, which the next one that writes NAME takes over. It is locked while it is
    written; where another process holds it, or the disk has no locks, the name is a random one, which a kill leaves behind.

    Args:
      unique: take a random name in any case, NAME.*.tmp, and leave it to the caller to delete leftovers: for files that several
        hosts may write at once, since not every shared disk locks for all of them.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "temporary"
            yield temporary
            epath.Path(temporary).copy(path, overwrite=True)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, descriptor = path.with_name(f"{path.name}.dar_jax.tmp"), None
    if unique or (descriptor := _lock(temporary)) is None:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # afterwards the name may be another process's
        temporary.unlink(missing_ok=True)
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Creates or takes over a file that no living process holds, and empties it: a descriptor that holds it until it is closed.

    None where another process holds it, it is not an ordinary file, or it cannot be locked; then none is created.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # else its writer has just renamed or deleted it
            os.ftruncate(descriptor, 0)
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # no locks here, so that nobody can hold it
        path.unlink(missing_ok=True)
    os.close(descriptor)
    return None


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Writes JSON-able values, indented."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def check_writable(path: str | os.PathLike) -> None:
    """Raises InputError where files could not be written to the folder `path`. Creates nothing, so it can be asked early.

    A bucket (gs://...) says so only when something is written. InputError for the Hub (hf://...), which is only read.
    """
    if os.fspath(path).startswith(ON_HUB):
        raise InputError(f"cannot write to {path}: from the Hub, files are only read; give a folder, then: hf upload")
    if is_remote(path):
        return
    path = Path(path).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write to {path}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {path}: no permission to write in {existing}")


def check_file_writable(path: str | os.PathLike) -> None:
    """The same for a file."""
    if is_remote(path):
        return check_writable(path)
    if os.path.isdir(path):
        raise InputError(f"cannot write to the file {path}, it is a folder")
    check_writable(Path(path).absolute().parent)


def hash_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, on a disk or in a bucket, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: str | os.PathLike, reason: object, advice: str, what: str = "is damaged") -> InputError:
    """The error for a file that cannot be read for this reason: that it `is damaged`, with advice, unless the reason is one of
    CIRCUMSTANCES, which says nothing about what it holds."""
    if CIRCUMSTANCES.search(str(reason)):
        return InputError(f"{path} cannot be read: {reason}")
    return InputError(f"{path} {what}: {reason}; {advice}")
