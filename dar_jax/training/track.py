"""Trackers of runs, Weights & Biases and Trackio: what the log has, where people look at runs.

The tracker's own package runs in a process of its own, `tracker_process`, which is sent lines of JSON. So what it waits for,
prints or raises never reaches the run; what it does not take in time is dropped.
"""

import base64
import contextlib
import importlib.util
import io
import json
import logging
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any, Literal

import numpy as np
from etils import epath
from PIL import Image

from dar_jax.config import TokenizerTraining, TransformerTraining, flat
from dar_jax.errors import InputError, one_line
from dar_jax.files import is_remote, write_json
from dar_jax.parallel import hosts
from dar_jax.training.tracker_process import PATIENCE

logger = logging.getLogger("dar_jax.training")

Kind = Literal["wandb", "trackio"]

MOST_WAITING = 256  # records that wait for the tracker; further ones are dropped


def require_tracker(kind: Kind) -> None:
    """Raises InputError where the tracker's package is not installed."""
    spec = importlib.util.find_spec(kind)
    if spec is None or spec.origin is None:  # the latter for a folder of that name, such as wandb makes
        raise InputError(f'--track {kind} needs its package: pip install ".[{kind}]"')


def open_tracker(
    kind: Kind | None, workdir: epath.Path, config: TokenizerTraining | TransformerTraining, step: int | None
) -> "Tracker | None":
    """The tracker of a run, on the first host; None on others, and where none was asked for. step: of the checkpoint that the
    run goes on from, if it does."""
    if kind is None or not hosts.first():
        return None
    return Tracker(kind, workdir, config.name, flat(config), begins=step is None)


class Tracker:
    """Sends the records of one run to a tracker. Nothing here raises, and only `close` waits, at most `PATIENCE` seconds.

    The run's id there is kept in WORKDIR/logs/tracker.json, and what the package prints in WORKDIR/logs/KIND.log, except in a
    bucket. Where the tracker fails, a warning says so once.

    Args:
      name: of the run, for people. settings: by name, JSON-able.
      begins: True for a run from the beginning, which gets a new id; else it goes on as the run with the id kept.
    """

    def __init__(self, kind: Kind, workdir: epath.Path, name: str, settings: Mapping[str, Any], begins: bool):
        self._kind, self._warned = kind, False
        folder = workdir / "logs"
        self._output = os.devnull if is_remote(workdir) else os.fspath(folder / f"{kind}.log")
        run = {"id": self._run_id(folder / "tracker.json", begins), "name": name, "settings": dict(settings)}
        run["folder"] = None if is_remote(workdir) else os.fspath(folder)
        self._process: subprocess.Popen | None = None
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._send, args=(run,), daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values by name after `step` steps."""
        self._put({"step": step, "values": dict(values)})

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures, uint8 [H, W, 3], by name."""
        self._put({"step": step, "pictures": dict(images)})

    def close(self) -> None:
        """Lets the tracker finish what it was sent, for at most `PATIENCE` seconds."""
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=PATIENCE)
        self._thread.join(max(0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"it did not finish within {PATIENCE} seconds")
            if self._process is not None:
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _put(self, record: dict[str, Any]) -> None:
        if self._thread.is_alive():
            try:
                self._waiting.put_nowait(record)
            except queue.Full:
                self._warn("it does not keep up, so records are dropped")

    def _run_id(self, path: epath.Path, begins: bool) -> str:
        ids = {}
        try:
            if path.exists():
                with contextlib.suppress(ValueError, RecursionError):  # of a damaged file
                    kept = json.loads(path.read_text())
                    ids = kept if isinstance(kept, dict) else {}
            if begins or not isinstance(ids.get(self._kind), str):
                ids[self._kind] = secrets.token_hex(4)
                write_json(path, ids)
        except Exception as error:  # a bucket's client has exceptions of its own
            self._warn(f"its id cannot be kept: {error}")
        return ids[self._kind] if isinstance(ids.get(self._kind), str) else secrets.token_hex(4)

    def _send(self, run: dict[str, Any]) -> None:
        """In a thread: starts the process, and writes records to it, which may block."""
        try:
            with open(self._output, "ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "dar_jax.training.tracker_process", self._kind],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # out of reach of Ctrl-C
                )
            with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
                _write_line(pipe, run)
                while (record := self._waiting.get()) is not None:
                    _write_line(pipe, record)
            if code := self._process.wait():
                self._warn(f"it ended with exit code {code}")
        except Exception as error:
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            more = "" if self._output == os.devnull else f"; see {self._output}"
            with contextlib.suppress(OSError):
                logger.warning("training goes on without all of the tracker %s: %s%s", self._kind, one_line(reason), more)


def _write_line(pipe: IO[bytes], record: dict[str, Any]) -> None:
    if "pictures" in record:
        record = {**record, "pictures": {name: _png(image) for name, image in record["pictures"].items()}}
    pipe.write(json.dumps(record).encode() + b"\n")
    pipe.flush()


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
