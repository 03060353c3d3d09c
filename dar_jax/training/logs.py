"""The log of a run: lines on the console, TensorBoard, WORKDIR/logs/metrics.jsonl, and a tracker if there is one."""

import contextlib
import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from dar_jax.console import bar, clock, printable_lines
from dar_jax.errors import InputError, one_line
from dar_jax.files import is_remote, replacing
from dar_jax.parallel import hosts
from dar_jax.training.track import Tracker

logger = logging.getLogger("dar_jax.training")

FLUSH = 120  # seconds between updates of TensorBoard's file, which in a bucket is written anew each time


class Log:
    """Writes records of one run. With several processes only the first should be `active`; the others stay silent.

    A resumed run passes the step it starts from: records of later steps, left by the interrupted run, are dropped.

    Where the log cannot be written, on a full disk, a warning says so once and the run goes on: metrics.jsonl is completed as
    soon as that is possible, TensorBoard's file ends there. `reader_gone`: the console is a pipe which nobody reads any more.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        steps: int,
        start: int = 0,
        active: bool = True,
        stream: TextIO | None = None,
        tracker: Tracker | None = None,
    ):
        self.steps, self.active, self._tracker = steps, active, tracker
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        self.reader_gone = False
        if not active:
            return
        self._records = _records(workdir)
        folder = self._records.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = [json.dumps(record) + "\n" for record in read_records(workdir) if record["step"] <= start]
        self._complete = self._warned = False  # complete: the file holds all lines and nothing else
        self._write_lines()
        self._board: EventsWriter | None = None  # in this thread: one of its own that died on a full disk would be waited for
        self._flushed = 0.0
        with self._unblocked():
            self._board = EventsWriter(os.fspath(folder / "events"), f".{secrets.token_hex(4)}")
            started = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._board.write_event(Event(wall_time=time.time(), step=start + 1, session_log=started))

    def record(self, step: int, values: Mapping[str, float], seconds_left: float | None) -> None:
        """One set of scalars after `step` steps. The console shows the loss, the rate and evaluations."""
        if not self.active:
            return
        self._lines.append(json.dumps({"step": step, **values}) + "\n")
        self._write_lines()
        self._on_board(step, [summary.scalar(name, value) for name, value in values.items()])
        if self._tracker is not None:
            self._tracker.scalars(step, values)
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
        if not self.active:
            return
        self._on_board(step, [summary.image(name, image, dataformats="HWC") for name, image in images.items()])
        if self._tracker is not None:
            self._tracker.pictures(step, images)

    def say(self, text: str) -> None:
        """A line, or lines, on the console only."""
        if self.active:
            self._write(("\r\033[K" if self.live else "") + printable_lines(text) + "\n")

    @contextlib.contextmanager
    def failures(self, step: int, outcome: str) -> Iterator[None]:
        """For work that training can do without: one line where it fails. With many hosts, which may wait, the run ends."""
        try:
            yield
        except Exception as error:
            if hosts.many():
                raise
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            self.say(f"step {step}: {outcome} ({kind}{one_line(error, 300)})")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            if self.live:
                self._write("\n")
            if self._board is not None:
                with self._unblocked():
                    self._board.close()
            if self._tracker is not None:
                self._tracker.close()

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            self.reader_gone = True
        except OSError as error:  # the terminal is closed, or a file on a full disk
            self._warn(error)

    def _write_lines(self) -> None:
        """Brings metrics.jsonl up to date; in a bucket, or where the last write failed, all of it is written anew."""
        with self._unblocked():
            complete, self._complete = self._complete, False
            if complete and not is_remote(self._records):
                with open(self._records, "a") as file:
                    file.write(self._lines[-1])
            else:
                with replacing(self._records) as temporary:
                    temporary.write_text("".join(self._lines))
            self._complete = True

    def _on_board(self, step: int, summaries: Sequence[summary.Summary]) -> None:
        board, self._board = self._board, None
        if board is not None:
            with self._unblocked():
                for each in summaries:
                    board.write_event(Event(wall_time=time.time(), step=step, summary=each))
                if time.monotonic() - self._flushed > FLUSH:
                    board.flush()
                    self._flushed = time.monotonic()
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


def read_records(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The records of a run, oldest first: {"step": ..., "loss": ..., ...}. Lines that are no records are skipped."""
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
