"""Text for consoles: names from elsewhere may hold characters that a console obeys, or cannot show."""

import io
import logging
import sys
import unicodedata

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
