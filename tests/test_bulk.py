"""Bulk generation: the ADM layout, the samples of any other way to draw them, and the same file after a kill."""

import dataclasses
import zipfile

import numpy as np
import pytest

from dar_jax.cli import main
from dar_jax.config import SamplingConfig
from dar_jax.errors import InputError
from dar_jax.evaluation import bulk
from dar_jax.evaluation.bulk import class_labels, generate_npz
from dar_jax.evaluation.generate import sample
from dar_jax.evaluation.images import from_npz
from dar_jax.evaluation.loading import load_sampler
from dar_jax.evaluation.progress import Progress

SAMPLING = SamplingConfig(guidance=(1.5, 3.0))


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load_sampler(tiny_run)


def test_the_file_holds_the_samples_of_each_seed(trained, tmp_path):
    path = generate_npz(trained, tmp_path / "out.npz", 21, "balanced", SAMPLING, batch_size=8, seed=5)
    with np.load(path) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype, labels.dtype) == ((21, 8, 8, 1), np.uint8, np.int64)
    np.testing.assert_array_equal(labels, np.arange(21) % 10)
    drawn = np.concatenate([part.images for part in sample(trained, labels, 5 + np.arange(21), SAMPLING, 16)])
    np.testing.assert_array_equal(images, drawn)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.npz"]
    assert from_npz(path).count == 21 and zipfile.ZipFile(path).testzip() is None


def test_uniform_labels_follow_the_seed():
    labels = class_labels("uniform", 1000, 10, 3)
    np.testing.assert_array_equal(labels, class_labels("uniform", 1000, 10, 3))
    assert (labels != class_labels("uniform", 1000, 10, 4)).any() and set(labels) == set(range(10))


def test_an_interrupted_run_goes_on_to_the_same_file(trained, tmp_path, monkeypatch):
    whole = generate_npz(trained, tmp_path / "whole.npz", 29, "uniform", SAMPLING, batch_size=8)
    write, left = bulk._Parts.write, [2]

    def die_after_two(self, rows, images):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, rows, images)

    path = tmp_path / "cut.npz"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(bulk._Parts, "write", die_after_two)
        generate_npz(trained, path, 29, "uniform", SAMPLING, batch_size=8)
    assert not path.exists() and len(list((tmp_path / "cut.npz.parts").glob("*.npy"))) == 2
    with pytest.raises(InputError, match="holds batches of other settings"):
        generate_npz(trained, path, 29, "uniform", dataclasses.replace(SAMPLING, temperature=0.5), batch_size=8)
    rows = []
    with monkeypatch.context() as patched:  # only what is missing is drawn
        patched.setattr(bulk._Parts, "write", lambda self, part, images: rows.append(part) or write(self, part, images))
        generate_npz(trained, path, 29, "uniform", SAMPLING, batch_size=8)
    assert rows == [slice(16, 24), slice(24, 29)]
    assert path.read_bytes()[:4] == b"PK\x03\x04" and not (tmp_path / "cut.npz.parts").exists()
    with np.load(path) as found, np.load(whole) as wanted:
        for name in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(found[name], wanted[name])


def test_the_command(tiny_run, tmp_path, capsys):
    command = ["generate", str(tiny_run), "--out", str(tmp_path / "out.npz"), "--num", "5", "--batch-size", "8"]
    assert main(command) == 0
    assert main(command) == 2 and "exists already" in capsys.readouterr().err
    assert main([*command[:2], "--out", str(tmp_path / "b.npz"), "--num", "5", "--seed", "-1"]) == 2
    assert main([*command[:2], "--out", str(tmp_path / "b.npz"), "--num", "5", "--groups", "9"]) == 2
    assert not (tmp_path / "b.npz").exists() and not (tmp_path / "b.npz.parts").exists()


def test_progress_tells_rate_and_time_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress("drawn", 100)
    progress.skip(40)
    assert str(progress) == "drawn 40/100"
    clock[0] = 8.0
    progress.add(20)
    assert str(progress) == "drawn 60/100, 2.5/s, 0:16 left"
    progress.add(40)
    assert str(progress) == "drawn 100/100"
