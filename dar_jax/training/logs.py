"""What a run tells the world: lines on the console, TensorBoard, and WORKDIR/logs/metrics.jsonl."""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter

from dar_jax.console import printable_lines
from dar_jax.files import is_remote, replacing

BAR = 20  # characters of the progress bar


class Log:
    """Writes records of one run. Of several processes only the first should be `active`; the others stay silent.

    A resumed run passes the step it starts from: records of later steps, left by the interrupted run, are dropped.
    """

    def __init__(
        self, workdir: str | os.PathLike, steps: int, start: int = 0, active: bool = True, stream: TextIO | None = None
    ):
        self.steps, self.active = steps, active
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty()
        if not active:
            return
        self._records = _records(workdir)
        folder = self._records.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = [json.dumps(record) + "\n" for record in read_records(workdir) if record["step"] <= start]
        self._write_lines()
        self._board = SummaryWriter(os.fspath(folder), purge_step=start + 1)

    def record(self, step: int, values: Mapping[str, float], seconds_left: float | None) -> None:
        """One set of scalars after `step` steps."""
        if not self.active:
            return
        self._lines.append(json.dumps({"step": step, **values}) + "\n")
        if is_remote(self._records):
            self._write_lines()  # nothing can be appended to an object in a bucket
        else:
            with open(self._records, "a") as file:
                file.write(self._lines[-1])
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        parts = [] if seconds_left is None else [f"{_clock(seconds_left)} left"]
        parts += [f"{name} {_short(value)}" for name, value in values.items()]
        line = f"step {step}/{self.steps}  " + "  ".join(parts)
        if self.live:
            bar = ("#" * (BAR * step // self.steps)).ljust(BAR, ".")
            self._write(f"\r\033[K[{bar}] {line}"[: shutil.get_terminal_size().columns + 3])  # 4 of these are invisible
        else:
            self._write(line + "\n")

    def pictures(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures, uint8 [H, W, 3], by name."""
        if self.active:
            for name, image in images.items():
                self._board.add_image(name, image, step, dataformats="HWC")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.active:
            self._write(("\r\033[K" if self.live else "") + printable_lines(text) + "\n")

    def close(self) -> None:
        if self.active:
            if self.live:
                self._write("\n")
            self._board.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def _write_lines(self) -> None:
        with replacing(self._records) as temporary:
            temporary.write_text("".join(self._lines))


def read_records(workdir: str | os.PathLike) -> list[dict[str, float]]:
    """The records of a run, oldest first: {"step": ..., "loss": ..., ...}. A last line cut short by a crash is left out."""
    path, records = _records(workdir), []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _records(workdir: str | os.PathLike) -> epath.Path:
    return epath.Path(workdir) / "logs" / "metrics.jsonl"


def _short(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
