"""Trackers: what they are sent, the same run after resuming, and that nothing of them ends or slows a run."""

import dataclasses
import importlib.util
import json
import os
import re
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import stand_in

from dar_jax.cli.main import main
from dar_jax.training import track
from dar_jax.training.loop import train
from dar_jax.training.track import Tracker

ROOT = Path(__file__).parent.parent
KINDS = pytest.mark.parametrize("kind", ["wandb", "trackio"])


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A function that returns what the stand-in of a package has been told since the last time."""
    for kind in ("wandb", "trackio"):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{kind}.py").write_text(Path(__file__).with_name("stub_tracker.py").read_text())
    file = tmp_path / "told"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), str(ROOT)]))
    monkeypatch.setenv("STUB_TRACKER_FILE", str(file))

    def told():
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        return lines

    return told


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs/metrics.jsonl").read_text().splitlines()]


@KINDS
def test_a_run_and_the_same_run_resumed(stub, tmp_path, kind):
    experiment = stand_in.experiment
    picture = np.zeros((2, 3, 3), np.uint8)
    short, longer = (_with(experiment, steps=steps, sample_every=4) for steps in (4, 8))
    train(short, tmp_path / "run", pictures=lambda *_: {"samples": picture}, track=kind)
    (_, first), *logged, last = stub()
    assert last == ["finish"] and first["config"]["optimizer.learning_rate"] == 1e-2 and first["resume"] == "allow"
    assert first["name"].startswith("stand-in")
    logged = [{"step": step, **values} if step is not None else values for _, step, values in logged]
    assert [each for each in logged if "samples" not in each] == records(tmp_path / "run")
    assert [each for each in logged if "samples" in each] == [{"step": 4, "samples": [3, 2]}]

    train(longer, tmp_path / "run", resume=True, pictures=lambda *_: {"samples": picture}, track=kind)
    (_, resumed), *logged, _ = stub()
    key = {"wandb": "id", "trackio": "name"}[kind]
    assert resumed[key] == first[key] and len(logged) == 3
    assert json.loads((tmp_path / "run/logs/tracker.json").read_text())[kind] in first[key]


def _with(experiment, **train_settings):
    config = experiment.config
    return experiment.with_config(dataclasses.replace(config, train=dataclasses.replace(config.train, **train_settings)))


@pytest.mark.parametrize(
    "mode", ["init", "log", "finish", "init ends", "log ends", "init blocks", "log blocks", "finish blocks"]
)
def test_a_tracker_that_fails_or_blocks_costs_nothing(stub, tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setenv("STUB_TRACKER", mode)
    monkeypatch.setattr(track, "PATIENCE", 1)
    tracker = Tracker("wandb", tmp_path / "run", "name", {}, begins=True)
    began = time.monotonic()
    for step in range(1000):  # more than the queue and the pipe hold
        tracker.scalars(step, {f"value{number}": 1.0 for number in range(20)})
    tracker.pictures(1000, {"picture": np.zeros((64, 64, 3), np.uint8)})
    assert time.monotonic() - began < 5  # it would wait ten minutes
    tracker.close()
    assert time.monotonic() - began < 10
    assert caplog.text.count("training goes on without all of the tracker wandb: ") == 1
    assert tracker._process.wait(5) != 0
    if mode in ("init", "log", "finish"):
        assert "no key was given" in (tmp_path / "run/logs/wandb.log").read_text()


def test_a_folder_that_cannot_be_written_costs_nothing(stub, tmp_path, caplog):
    (tmp_path / "run").write_text("a file")
    tracker = Tracker("wandb", tmp_path / "run", "name", {}, begins=True)
    tracker.scalars(1, {"loss": 1.0})
    tracker.close()
    assert caplog.text.count("training goes on without all of the tracker wandb: ") == 1


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"wandb": 3}', '{"trackio": "x"}', "\xff"])
def test_a_damaged_id_is_replaced(stub, tmp_path, contents):
    path = tmp_path / "tracker.json"
    path.write_text(contents, encoding="latin-1")
    tracker = object.__new__(Tracker)
    tracker._kind, tracker._warned, tracker._output = "wandb", True, os.devnull
    identity = tracker._run_id(path, begins=False)
    assert re.fullmatch("[0-9a-f]{8}", identity) and tracker._run_id(path, begins=False) == identity
    assert tracker._run_id(path, begins=True) != identity  # a run from the beginning is another one


@KINDS
def test_a_missing_package_is_said_before_anything_is_done(tmp_path, monkeypatch, capsys, kind):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == kind else find(name, *more))
    command = ["train", str(Path(stand_in.__file__)), "--workdir", str(tmp_path / "run"), "--track", kind]
    assert main(command) == 2 and not (tmp_path / "run").exists()
    assert f'--track {kind} needs its package: pip install ".[{kind}]"' in capsys.readouterr().err


def offline(kind: str, folder: Path, begins: bool, steps: range) -> None:
    tracker = Tracker(kind, folder, "digits", {"train.steps": 4, "train.profile": (1, 2)}, begins)
    for step in steps:
        tracker.scalars(step, {"loss": 1 / step})
    tracker.pictures(steps[-1], {"samples": np.zeros((8, 8, 3), np.uint8)})
    tracker.close()


def test_wandb_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("WANDB_MODE", "offline")
    offline("wandb", tmp_path, True, range(1, 3))
    offline("wandb", tmp_path, False, range(2, 5))
    assert not caplog.text, (tmp_path / "logs/wandb.log").read_text()
    identity = json.loads((tmp_path / "logs/tracker.json").read_text())["wandb"]
    runs = sorted((tmp_path / "logs/wandb").glob("offline-run-*"))
    assert [run.name.rpartition("-")[2] for run in runs] == [identity] * 2
    assert all(list(run.glob("files/media/images/samples_*.png")) for run in runs)
    assert "loss 0.25" in (tmp_path / "logs/wandb.log").read_text()


def test_trackio_offline(tmp_path, monkeypatch, caplog):
    pytest.importorskip("trackio")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    offline("trackio", tmp_path, True, range(1, 3))
    offline("trackio", tmp_path, False, range(3, 5))
    assert not caplog.text, (tmp_path / "logs/trackio.log").read_text()
    name = "digits-" + json.loads((tmp_path / "logs/tracker.json").read_text())["trackio"]
    with sqlite3.connect(tmp_path / "trackio/dar_jax.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    losses = [(step, json.loads(metrics)["loss"]) for _, step, metrics in rows if "loss" in json.loads(metrics)]
    assert {run for run, *_ in rows} == {name} and losses == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert sum("samples" in json.loads(metrics) for *_, metrics in rows) == 2
