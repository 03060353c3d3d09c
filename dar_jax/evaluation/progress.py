"""A line that says how far a loop has come."""

import sys
import time
from typing import TextIO

BAR = 20  # characters
SECONDS = 10  # between lines where the stream is no terminal


class Progress:
    """Counts up to `total` on one line of a terminal, or on a line every ten seconds elsewhere, with rate and time left.

    A context manager.
    """

    def __init__(self, what: str, total: int, stream: TextIO | None = None):
        self.what, self.total, self.done, self.skipped = what, total, 0, 0
        self.stream = sys.stdout if stream is None else stream
        self._live = self.stream.isatty()
        self._began = self._shown = time.monotonic()

    def skip(self, count: int) -> None:
        """`count` were done before."""
        self.skipped += count
        self.done += count

    def add(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        if self._live:
            bar = ("#" * (BAR * self.done // self.total)).ljust(BAR, ".")
            self._write(f"\r\033[K[{bar}] {self}")
        elif time.monotonic() - self._shown > SECONDS:
            self._write(f"{self}\n")
            self._shown = time.monotonic()

    def __str__(self) -> str:
        counted = f"{self.what} {self.done}/{self.total}"
        fresh, seconds = self.done - self.skipped, time.monotonic() - self._began
        if not 0 < fresh < self.total - self.skipped or seconds <= 0:
            return counted
        minutes, seconds_left = divmod(round((self.total - self.done) * seconds / fresh), 60)
        return f"{counted}, {fresh / seconds:.3g}/s, {minutes}:{seconds_left:02} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._write(("\r\033[K" if self._live else "") + f"{self}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
