"""One run at a time in a folder."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from dar_jax.errors import InputError
from dar_jax.files import is_remote
from dar_jax.parallel import hosts

NAME = "run.lock"
RENEW = 60  # seconds between signs of life where the file system has no locks
STALE = 600  # seconds without one after which the owner counts as dead


@contextlib.contextmanager
def only_run(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a folder. A run that is killed leaves no lock behind; in a bucket it is one for `STALE` seconds.

    With several hosts the first takes the lock, and all raise InputError where another run has it.
    """
    refusal = None
    with contextlib.ExitStack() as stack:
        if hosts.first():
            try:
                stack.enter_context(_bucket_lock(workdir) if is_remote(workdir) else _file_lock(Path(workdir)))
            except InputError as error:
                refusal = error
        if not hosts.all_agree(refusal is None):
            raise refusal or InputError(f"{workdir} is in use by another run")
        yield


@contextlib.contextmanager
def _file_lock(folder: Path) -> Iterator[None]:
    """The lock is the operating system's, which ends with the process; the file's content only says whose it is."""
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise _in_use(folder, _read(path)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            with _bucket_lock(epath.Path(folder)):
                yield
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # its owner removed it just now
    try:
        with contextlib.suppress(OSError):  # a full disk
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(_owner()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            for new in new_folders:  # empty where the run was refused
                new.rmdir()


@contextlib.contextmanager
def _bucket_lock(folder: epath.Path) -> Iterator[None]:
    """Where nothing can be locked: an object that is written again and again, as a sign of life."""
    path, owner, ended = folder / NAME, _owner(), threading.Event()
    folder.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        path.write_text(json.dumps(owner | {"seen": time.time()}))

    def renew() -> None:
        while not ended.wait(RENEW):
            with contextlib.suppress(Exception):
                write()

    other = _read(path)
    if time.time() - other.get("seen", 0) < STALE:
        raise _in_use(folder, other)
    write()
    time.sleep(1)  # two that start at once: the later one has it
    if (other := _read(path)).get("token") != owner["token"]:
        raise _in_use(folder, other)
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            path.unlink()


def _owner() -> dict[str, object]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since, "token": secrets.token_hex(8)}


def _read(path: os.PathLike) -> dict:
    """The owner that a lock names; empty where there is none or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(epath.Path(path).read_text())
        if isinstance(owner, dict) and isinstance(owner.get("seen", 0), int | float):
            return owner
    return {}


def _in_use(folder: os.PathLike, owner: dict) -> InputError:
    host, process, since = (owner.get(name, "unknown") for name in ("host", "process", "since"))
    return InputError(f"{folder} is in use by another run (host {host}, process {process}, since {since})")
