"""The log of a run: what is read back, what the console shows, and that nothing of it ever ends or blocks a run."""

import errno
import io
import json

import numpy as np
import pytest

from dar_jax.training import logs
from dar_jax.training.logs import Log, read_records

BAD = [
    "not JSON",
    "[1]",
    "7",
    "null",
    '{"loss": 1}',
    '{"step": "3"}',
    '{"step": null}',
    '{"step": 1.5}',
    '{"step": tru',
    "[" * 99999,
]


def test_a_bad_line_is_left_out_and_gone_after_resuming(tmp_path):
    path = tmp_path / "logs" / "metrics.jsonl"
    path.parent.mkdir()
    good = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    path.write_bytes("\n".join([json.dumps(good[0]), *BAD, json.dumps(good[1])]).encode() + b"\n\xff\xfe\n")
    assert read_records(tmp_path) == good
    with Log(tmp_path, 4, start=2, stream=io.StringIO()) as log:
        log.record(3, {"loss": 0.5}, None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_the_console_shows_progress_and_the_files_everything(tmp_path):
    out, rates = io.StringIO(), {"images_per_second": 1124.4, "tokens_per_second": 9.0}
    with Log(tmp_path, 2500, stream=out) as log:
        log.record(100, {"loss": 0.41234, "grad_norm": 3.0, **rates}, 45.2)
        log.record(100, {"eval_psnr": 20.5}, None)
    assert out.getvalue().splitlines() == [
        "step 100/2500  loss 0.4123  1,124 images/s  0:45 left",
        "step 100/2500  eval_psnr 20.5",
    ]
    assert read_records(tmp_path)[0]["grad_norm"] == 3
    (events,) = (tmp_path / "logs").glob("events.*")
    assert all(name in events.read_bytes() for name in (b"grad_norm", b"tokens_per_second", b"eval_psnr"))


def test_a_full_disk_is_said_once_and_made_up_for(tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Log(tmp_path, 200, stream=io.StringIO()) as log:
        with monkeypatch.context() as filled:
            filled.setattr(logs, "open", full, raising=False)
            filled.setattr(logs, "replacing", full)
            filled.setattr(logs.EventsWriter, "write_event", full)
            for step in range(1, 101):  # more than any queue holds
                log.record(step, {"loss": 1.0}, None)
                log.pictures(step, {"picture": np.zeros((2, 2, 3), np.uint8)})
        log.record(101, {"loss": 1.0}, None)
    assert [record["step"] for record in read_records(tmp_path)] == list(range(1, 102))
    assert caplog.text.count("No space left on device") == 1


@pytest.mark.parametrize("error, gone", [(BrokenPipeError(), True), (OSError(errno.ENOSPC, "full"), False)])
def test_a_console_that_cannot_be_written(tmp_path, error, gone):
    class Stream(io.StringIO):
        def write(self, text):
            raise error

    with Log(tmp_path, 2, stream=Stream()) as log:
        log.record(1, {"loss": 1.0}, None)
        assert log.reader_gone == gone
