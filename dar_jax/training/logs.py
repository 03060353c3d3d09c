"""What a run tells the world: lines on the console, TensorBoard, and WORKDIR/logs/metrics.jsonl."""

import contextlib
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from dar_jax.console import bar, clock, printable_lines
from dar_jax.errors import InputError
from dar_jax.files import is_remote, replacing
from dar_jax.parallel import hosts

logger = logging.getLogger("dar_jax.training")

FLUSH = 120  # seconds after which TensorBoard may see what is new; in a bucket its file is then written as a whole


class Log:
    """Writes records of one run. Of several processes only the first should be `active`; the others stay silent.

    A resumed run passes the step it starts from: records of later steps, left by the interrupted run, are dropped.

    What cannot be written, on a full disk, is said once and never ends the run: metrics.jsonl is made whole as soon as that is
    possible, TensorBoard's file ends there. `reader_gone` says that the console is a pipe which nobody reads any more.
    """

    def __init__(
        self, workdir: str | os.PathLike, steps: int, start: int = 0, active: bool = True, stream: TextIO | None = None
    ):
        self.steps, self.active = steps, active
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.reader_gone = False
        if not active:
            return
        self._records = _records(workdir)
        folder = self._records.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = [json.dumps(record) + "\n" for record in read_records(workdir) if record["step"] <= start]
        self._whole = False  # whether the file holds all lines and nothing else
        self._warned = False
        self._write_lines()
        self._board: Board | None = None
        with self._unblocked():
            self._board = Board(folder, start + 1)

    def record(self, step: int, values: Mapping[str, float], seconds_left: float | None) -> None:
        """One set of scalars after `step` steps. The console shows the loss, the rate and what is evaluated."""
        if not self.active:
            return
        self._lines.append(json.dumps({"step": step, **values}) + "\n")
        self._write_lines()
        self._on_board(step, [summary.scalar(name, value) for name, value in values.items()])
        parts = [f"step {step}/{self.steps}"]
        parts += [f"{name} {_short(value)}" for name, value in values.items() if name == "loss" or name.startswith("eval_")]
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:,.0f} images/s")
        if seconds_left is not None:
            parts.append(f"{clock(seconds_left)} left")
        line = "  ".join(parts)
        if self.live:
            self._write(f"{bar(step, self.steps)}{line}"[: shutil.get_terminal_size().columns + 3])  # 4 of these are invisible
        else:
            self._write(line + "\n")

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures, uint8 [H, W, 3], by name."""
        if self.active:
            self._on_board(step, [summary.image(name, image, dataformats="HWC") for name, image in images.items()])

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.active:
            self._write(("\r\033[K" if self.live else "") + printable_lines(text) + "\n")

    @contextlib.contextmanager
    def failures(self, step: int, outcome: str) -> Iterator[None]:
        """Around what training can do without: one line where it fails. With many hosts, which may wait, the run ends."""
        try:
            yield
        except Exception as error:
            if hosts.many():
                raise
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            self.say(f"step {step}: {outcome} ({kind}{' '.join(str(error).split())[:300]})")

    def close(self) -> None:
        if self.active:
            if self.live:
                self._write("\n")
            if self._board is not None:
                with self._unblocked():
                    self._board.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            self.reader_gone = True
        except OSError as error:  # the terminal is closed, or a file on a full disk
            self._warn(error)

    def _write_lines(self) -> None:
        """Brings metrics.jsonl up to date; what is in a bucket, or was cut short, is written as a whole."""
        with self._unblocked():
            whole, self._whole = self._whole, False
            if whole and not is_remote(self._records):
                with open(self._records, "a") as file:
                    file.write(self._lines[-1])
            else:
                with replacing(self._records) as temporary:
                    temporary.write_text("".join(self._lines))
            self._whole = True

    def _on_board(self, step: int, summaries: list[summary.Summary]) -> None:
        if self._board is None:
            return
        with self._unblocked():
            board, self._board = self._board, None
            with contextlib.ExitStack() as failed:
                failed.callback(board.close)
                board.add(step, summaries)
                failed.pop_all()
            self._board = board

    @contextlib.contextmanager
    def _unblocked(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a bucket's client has exceptions of its own
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            with contextlib.suppress(OSError):
                logger.warning("the log cannot be written, training goes on without it: %s", error)


class Board:
    """TensorBoard's file, written by the caller's own thread: one that died on a full disk would be waited for."""

    def __init__(self, folder: epath.Path, first_step: int):
        self._file = RecordWriter(os.fspath(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"))
        self._flushed = 0.0
        self._write(Event(file_version="brain.Event:2"), 0)
        self._write(Event(session_log=SessionLog(status=SessionLog.SessionStatus.Value("START"))), first_step)

    def add(self, step: int, summaries: list[summary.Summary]) -> None:
        """What was made after `step` steps."""
        for one in summaries:
            self._write(Event(summary=one), step)
        if time.monotonic() - self._flushed > FLUSH:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left and closes the file."""
        try:
            self._file.flush()
        finally:
            self._file.close()

    def _write(self, event: Event, step: int) -> None:
        event.step, event.wall_time = step, time.time()
        self._file.write(event.SerializeToString())


def read_records(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The records of a run, oldest first: {"step": ..., "loss": ..., ...}. A line that is none is left out."""
    path, records = _records(workdir), []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and record["step"] >= 0:
            records.append(record)
    return records


def _records(workdir: str | os.PathLike) -> epath.Path:
    return epath.Path(workdir) / "logs" / "metrics.jsonl"


def _short(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"
