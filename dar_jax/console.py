"""Text for consoles: printable names, tables, numbers, progress."""

import io
import itertools
import logging
import math
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TextIO

# Control characters, invisible ones such as those that reverse the direction of writing, lone surrogates, ends of lines.
ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")


def printable(text: object) -> str:
    """A text on one line that no console obeys: control characters and the like are escaped, such as `\\x1b` and `\\n`."""
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in ESCAPED else character
        for character in str(text)
    )


def printable_lines(text: object) -> str:
    """The same for a text of several lines, which stay lines."""
    return "\n".join(map(printable, str(text).split("\n")))


def show(text: object) -> None:
    """Prints `printable_lines`."""
    print(printable_lines(text))


class PrintableMessages(logging.Formatter):
    """Log records as `printable_lines`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def prepare_streams() -> None:
    """From now on, what the encoding of stdout or stderr lacks is printed escaped, such as `\\xe9` in ASCII, and each line is
    written at once, also into a file or a pipe."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def columns(rows: Iterable[Sequence[str]], align: str = "", separator: str = "  ") -> str:
    """A table: rows of cells as lines, with the columns below each other.

    Args: align, "<" or ">" for each column, "<" for those after the last of these. An empty row is an empty line.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    sides = align.ljust(len(widths), "<")
    lines = (separator.join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def number(value: float, unit: str = "") -> str:
    """With three digits and a prefix, which a unit of capital letters follows at once: 531 TFLOP, 12.5 MB, 369 M images."""
    value = float(f"{value:.2e}")  # 999.7 is 1 k
    power = min(5, int(math.log10(max(value, 1)) // 3))
    space = "" if unit.isupper() else " "
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}{space}{unit}".replace("  ", " ").rstrip()


def clock(seconds: float) -> str:
    """A duration, such as 0:45 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def bar(done: float, total: float) -> str:
    """A bar for the start of a line on a terminal, which replaces the line that is there."""
    return f"\r\033[K[{'#' * int(BAR * done / total):.<{BAR}}] "


BAR = 20  # characters
SECONDS = 10  # between lines where the stream is no terminal


class Progress:
    """Counts up to `total` on one line of a terminal, or on a line every ten seconds elsewhere, with rate and time left.

    A context manager. With a `unit`, such as B for bytes, counts are shown as `number` does.
    """

    def __init__(self, what: str, total: int, stream: TextIO | None = None, unit: str = ""):
        self.what, self.total, self.unit, self.done, self.skipped = what, total, unit, 0, 0
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
            self._write(f"{bar(self.done, self.total)}{self}")
        elif time.monotonic() - self._shown > SECONDS:
            self._write(f"{self}\n")
            self._shown = time.monotonic()

    def __str__(self) -> str:
        done, total = (number(count, self.unit) if self.unit else str(count) for count in (self.done, self.total))
        new, seconds = self.done - self.skipped, time.monotonic() - self._began
        if not 0 < new < self.total - self.skipped or seconds <= 0:
            return f"{self.what} {done}/{total}"
        rate = number(new / seconds, self.unit) if self.unit else f"{new / seconds:.3g}"
        return f"{self.what} {done}/{total}, {rate}/s, {clock((self.total - self.done) * seconds / new)} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._write(("\r\033[K" if self._live else "") + f"{self}\n")

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
