"""One run at a time in a folder, on a disk and where there are no locks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from dar_jax.errors import InputError
from dar_jax.training import lock

HOLD = """
import sys, time
from etils import epath
from dar_jax.training.lock import only_run
with only_run(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    folder = epath.Path(tmp_path / "new" / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        owner = rf"run is in use by another run \(host .+, process {process.pid}, since 2"
        with pytest.raises(InputError, match=owner), lock.only_run(folder):
            pass
        process.send_signal(signal.SIGKILL)
    assert (folder / lock.NAME).exists()  # nobody was there to remove it
    with lock.only_run(folder), pytest.raises(InputError, match=f"process {os.getpid()},"), lock.only_run(folder):
        pass
    assert not list(folder.iterdir())


def test_a_refused_run_leaves_no_folders(tmp_path):
    with contextlib.suppress(InputError), lock.only_run(epath.Path(tmp_path / "new" / "run")):
        raise InputError("no data")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def without_locks(monkeypatch):
    monkeypatch.setattr(lock, "is_remote", lambda path: True)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("age, refused", [(0, True), (lock.STALE + 1, False)])
def test_where_there_are_no_locks_signs_of_life_count(tmp_path, age, refused):
    owner = {"host": "a", "process": 7, "since": "2026-01-02", "token": "b", "seen": time.time() - age}
    (tmp_path / lock.NAME).write_text(json.dumps(owner))
    if refused:
        with pytest.raises(InputError, match=r"host a, process 7, since 2026-01-02"), lock.only_run(epath.Path(tmp_path)):
            pass
    else:
        with lock.only_run(epath.Path(tmp_path)):
            assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
        assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize("text", ["", "[]", '{"seen": "now"}', '{"seen": NaN}'])
def test_a_damaged_owner_is_none(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with lock.only_run(epath.Path(tmp_path)):
        pass
