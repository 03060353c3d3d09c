"""Files that are written whole or not at all, also by several processes at once, and what killed ones leave behind."""

import subprocess
import sys
from unittest.mock import Mock

import pytest

from dar_jax.files import replacing

KILLED = """
import os, signal, sys
from dar_jax.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("much more than the next one writes")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_is_taken_over(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.dar_jax.tmp"]
    with replacing(tmp_path / "out") as temporary, temporary.open("r+") as file:  # nothing of it is in the new file
        file.write("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "whole"}


def test_two_writers_do_not_disturb_each_other(tmp_path):
    with replacing(tmp_path / "out") as first, pytest.raises(ValueError):
        with replacing(tmp_path / "out") as second:
            first.write_text("first")
            second.write_text("second")
        assert (tmp_path / "out").read_text() == "second"
        with replacing(tmp_path / "out", unique=True) as third:
            assert len({first, second, third}) == 3
            raise ValueError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "first"}


def test_what_else_has_the_temporary_name_stays(tmp_path):
    (tmp_path / "other").write_text("precious")
    (tmp_path / "out.dar_jax.tmp").symlink_to(tmp_path / "other")
    with replacing(tmp_path / "out") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "other").read_text() == "precious" and (tmp_path / "out").read_text() == "whole"


def test_a_disk_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError("no locks available")))
    with replacing(tmp_path / "out") as temporary:
        temporary.write_text("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"out": "whole"}
