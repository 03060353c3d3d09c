"""A line that says how far a loop has come."""

import sys
import time
from typing import TextIO

BAR = 20  # characters
SECONDS = 10  # between lines where the stream is no terminal


class Progress:
    """Counts up to `total` on one line of a terminal, or on a line every ten seconds elsewhere. A context manager."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None):
        self.what, self.total, self.done = what, total, 0
        self.stream = sys.stdout if stream is None else stream
        self._live = self.stream.isatty()
        self._shown = time.monotonic()

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
        return f"{self.what} {self.done}/{self.total}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._write(("\r\033[K" if self._live else "") + f"{self}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
