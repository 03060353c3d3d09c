"""The one exception that a user sees as a single line."""


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that says what and how to mend it; the command exits with 2."""
