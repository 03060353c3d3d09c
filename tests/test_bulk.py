"""Bulk generation: the ADM layout, the samples of any other way to draw them, and the same file after a kill."""

import dataclasses
import zipfile
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from dar_jax.cli.main import main
from dar_jax.config import MeshConfig, SamplingConfig
from dar_jax.console import Progress
from dar_jax.errors import InputError
from dar_jax.evaluation.images import from_npz
from dar_jax.inference import bulk
from dar_jax.inference.bulk import class_labels, generate_npz
from dar_jax.inference.identity import describe, digest
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import load_sampler
from dar_jax.models.transformer import Llama
from dar_jax.parallel import make_mesh
from dar_jax.sampling.logits import linear_guidance
from dar_jax.sampling.settings import Method

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


def draw(trained, path, sampling=SAMPLING, batch_size=8):
    return generate_npz(trained, path, 29, "uniform", sampling, batch_size=batch_size)


def interrupt(trained, path, after):
    """Leaves so many parts of eight samples."""
    write = bulk._Parts.write

    def die(parts, rows, images):
        if rows.start == 8 * after:
            raise KeyboardInterrupt
        write(parts, rows, images)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(bulk._Parts, "write", die)
        draw(trained, path)
    assert not path.exists() and len(list((path.parent / f"{path.name}.parts").glob("*.npy"))) == after


def test_an_interrupted_run_goes_on_to_the_same_file(trained, tiny_run, tmp_path, monkeypatch):
    """Also with other batches and on other devices; only what is missing is drawn."""
    whole, path = draw(trained, tmp_path / "whole.npz"), tmp_path / "interrupted.npz"
    interrupt(trained, path, 3)
    damaged = tmp_path / "interrupted.npz.parts" / "0000000008-0000000016.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{damaged.name} is damaged .*; delete it and run the command again"):
        draw(trained, path)
    damaged.unlink()
    write, rows = bulk._Parts.write, []
    monkeypatch.setattr(bulk._Parts, "write", lambda self, part, images: rows.append(part) or write(self, part, images))
    draw(load_sampler(tiny_run, mesh=make_mesh(MeshConfig(), jax.devices()[:1])), path, batch_size=5)
    assert rows == [slice(8, 13), slice(13, 16)]
    assert [file.name for file in tmp_path.iterdir() if file != whole] == ["interrupted.npz"]
    with np.load(path) as actual, np.load(whole) as expected:
        for name in ("arr_0", "arr_1"):
            np.testing.assert_array_equal(actual[name], expected[name])


class OtherLlama(Llama):
    """Replaces the transformer, as an experiment's `model` may."""


def other_weights(trained):
    transformer = trained.params["transformer"]
    changed = transformer | {"output": transformer["output"] + 1}
    return dataclasses.replace(trained, params=trained.params | {"transformer": changed})


def other_code(trained):
    model = trained.networks.transformer
    networks = dataclasses.replace(trained.networks, transformer=OtherLlama(model.config, model.dtype, model.remat))
    return dataclasses.replace(trained, networks=networks)


def test_parts_of_anything_else_are_refused(trained, tmp_path):
    path = tmp_path / "out.npz"
    interrupt(trained, path, 1)
    method = Method(guidance=lambda tokens, first, last: linear_guidance(tokens, first, last + 1))
    steeper = dataclasses.replace(trained, networks=dataclasses.replace(trained.networks, method=method))
    larger = trained.with_tokenizer(dataclasses.replace(trained.config, sampling_resolution=16))
    for other, difference in (
        (other_weights(trained), r'model.weights.transformer: "\w+... there, "\w+... here'),
        (
            other_code(trained),
            r'model.networks.transformer.class: "dar_jax.models.transformer.L... there, "test_bulk.OtherLlama \w+...',
        ),
        (larger, "model.networks.tokenizer.config.sampling_resolution: null there, 16 here"),
        (steeper, r"model.networks.method.guidance: .*, guidance_scales: "),
    ):
        with pytest.raises(InputError, match=f"out.npz.parts was begun with something else, {difference}.*; delete it, or"):
            draw(other, path)
    with pytest.raises(InputError, match="sampling.temperature: 1.0 there, 0.5 here, sampling.top_k: 0 there, 5 here;"):
        draw(trained, path, dataclasses.replace(SAMPLING, temperature=0.5, top_k=5))
    (tmp_path / "out.npz.parts" / "identity.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="identity.json is damaged"):
        draw(trained, path)
    (tmp_path / "out.npz.parts" / "identity.json").unlink()
    with pytest.raises(InputError, match="holds pieces and no identity.json"):
        draw(trained, path)


def test_what_a_function_captured_is_of_its_identity():
    def times(count, *, plus=0):
        return lambda x, minus=plus: count * x - minus

    def itself(count):
        return itself(count - 1)

    assert describe(times(2)) == describe(times(2)) and describe(itself) == describe(itself)
    assert len({digest(describe(each)) for each in (times(2), times(3), times(2, plus=1), jax.jit(times(4)))}) == 4


def test_killed_before_the_parts_were_deleted(trained, tmp_path, monkeypatch):
    path = tmp_path / "out.npz"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", Mock(side_effect=KeyboardInterrupt))
        draw(trained, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        draw(other_weights(trained), path)
    assert draw(trained, path) == path
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["out.npz"]


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
