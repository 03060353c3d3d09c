"""Names from elsewhere on consoles: nothing that a console obeys, whatever it can show."""

import io
import subprocess
import sys
import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from dar_jax import console
from dar_jax.console import ESCAPED, Progress, clock, columns, number, printable, printable_lines


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


def test_columns():
    rows = [("name", "value"), ("a", "1"), (), ("longer", "20.5", "a note")]
    assert columns(rows, "<>").split("\n") == ["name    value", "a           1", "", "longer   20.5  a note"]


def test_numbers_and_durations():
    assert [number(5.31e14, "FLOP"), number(0.25, "B"), number(3.69e8, "images")] == ["531 TFLOP", "0.25 B", "369 M images"]
    assert [number(12), number(1500), number(999.7)] == ["12", "1.5 k", "1 k"]
    assert [clock(44.6), clock(3723)] == ["0:45", "1:02:03"]


def test_progress_of_bytes_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(console, "SECONDS", 0)
    stream = io.StringIO()
    with Progress("file", 2_000_000, stream, "B") as progress:
        progress.add(500_000)
        progress.add(1_500_000)
    first, *others = stream.getvalue().splitlines()
    assert first.startswith("file 500 kB/2 MB, ") and first.endswith("B/s, 0:00 left") and others == ["file 2 MB/2 MB"] * 2
