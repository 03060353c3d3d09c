"""Names from elsewhere on consoles: nothing that a console obeys, whatever it can show."""

import subprocess
import sys
import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from dar_jax.console import ESCAPED, printable, printable_lines


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_nothing_is_left_that_a_console_obeys(text):
    assert not any(unicodedata.category(character) in ESCAPED for character in printable(text))
    assert printable(printable(text)) == printable(text)
    assert printable_lines(text).count("\n") == text.count("\n")


def test_what_is_escaped_and_what_is_not():
    assert printable("sé 漢 \U0001f600") == "sé 漢 \U0001f600"
    assert printable("a\x1b[31m\n\u202eb\udcff") == r"a\x1b[31m\n\u202eb\udcff"
    assert printable_lines("a\nb\r") == "a\nb\\r"


def test_a_console_that_lacks_characters_of_a_name():
    code = "from dar_jax.cli.main import main; raise SystemExit(main(['info', 's\\u00e9\\x1b']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert r"/s\xe9\x1b does not exist" in done.stderr and done.stderr.count("\n") == 1
