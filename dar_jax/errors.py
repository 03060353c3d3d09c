"""The one exception that a user sees as a single line."""


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that says what and how to mend it; the command exits with 2."""


def one_line(value: object, most: int = 200) -> str:
    """A value as one line of at most so many characters, for a message."""
    return " ".join(str(value).split())[:most]


def require(condition: bool, message: str) -> None:
    """Raises InputError with this message where the condition does not hold."""
    if not condition:
        raise InputError(message)
