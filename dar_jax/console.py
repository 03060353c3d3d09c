"""Text for consoles: names from elsewhere may hold characters that a console obeys, or cannot show."""

import io
import logging
import sys
import time
import unicodedata
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


def escape_unknown_characters() -> None:
    """From now on, what the encoding of stdout or stderr lacks is printed escaped, such as `\\xe9` in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


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
