"""Storing the codes of a data set, by one process and by two; the tokenizer's weights are random."""

import dataclasses
import os
import time

import jax
import numpy as np
import pytest
from many_hosts import Job
from PIL import Image

from dar_jax.config import DataConfig, MeshConfig
from dar_jax.data import codes
from dar_jax.data.sources import open_source
from dar_jax.data.transforms import center_crop, ten_crops
from dar_jax.errors import InputError
from dar_jax.inference.reconstruct import encode
from dar_jax.inference.tokenize import tokenize
from dar_jax.inference.trained import load_tokenizer
from dar_jax.parallel import make_mesh

DIGITS = DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False, split="test")
TEN = dataclasses.replace(DIGITS, crop="ten_crop", ten_crop_scale=1.5)


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load_tokenizer(tiny_run)


def shard_name(number):
    return f"shard-{number:05d}.array_record"


def test_ten_crops_and_resuming(trained, tmp_path):
    source = open_source(TEN)
    info = tokenize(trained, source, TEN, tmp_path, batch_size=100, shard_size=128)
    assert (info.images, info.crops, info.tokens, info.shards) == (297, 10, 16, 3)
    stored = codes.open_codes(tmp_path)
    for index in (0, 130, 296):
        crops = np.stack(ten_crops(center_crop(source[index]["image"], 12), 8))
        np.testing.assert_array_equal(stored[index]["codes"], encode(trained, crops, batch_size=16))
        assert stored[index]["label"] == source[index]["label"]

    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    (tmp_path / shard_name(1)).unlink()
    tokenize(trained, source, TEN, tmp_path, batch_size=100, shard_size=128)
    written = {path.name for path in tmp_path.glob("shard-*") if path.stat().st_mtime_ns != times[path.name]}
    assert written == {shard_name(1)}
    np.testing.assert_array_equal(codes.open_codes(tmp_path)[130]["codes"], stored[130]["codes"])


def test_center_crop_and_its_mirror_image(trained, tmp_path):
    data = dataclasses.replace(DIGITS, flip=True)
    source = open_source(data)
    assert tokenize(trained, source, data, tmp_path, batch_size=297).crops == 2
    image = source[5]["image"]
    expected = encode(trained, np.stack([image, image[:, ::-1]]), batch_size=8)
    np.testing.assert_array_equal(codes.open_codes(tmp_path)[5]["codes"], expected)


def test_unreadable_images_are_left_out_of_their_shard(trained, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "3.png").write_text("this is no picture")
    (tmp_path / "images" / "8.png").unlink()
    os.mkfifo(tmp_path / "images" / "8.png")  # opening it would wait for a writer
    data = DataConfig(path=str(tmp_path / "images"), image_size=8, channels=1, crop="center", flip=False)
    tokenize(trained, open_source(data), data, tmp_path / "codes", batch_size=3, shard_size=4)
    stored = codes.open_codes(tmp_path / "codes")
    expected = encode(trained, np.delete(pixels, [3, 8], axis=0)[..., None])
    np.testing.assert_array_equal(np.stack([stored[i]["codes"][0] for i in range(len(stored))]), expected)


def test_what_another_host_leaves_is_written_too(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # of which only this one is there
    tokenize(trained, open_source(DIGITS), DIGITS, tmp_path, batch_size=297, shard_size=100)
    assert len(codes.open_codes(tmp_path)) == 297


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("crop is random", {"crop": "random"}),
        ("image_size is 16, but the tokenizer's is 8", {"image_size": 16}),
        ("channels is 3", {"channels": 3}),
        ("stored already", {"source": "codes"}),
    ],
)
def test_refused(trained, tmp_path, message, changes):
    with pytest.raises(InputError, match=message):
        tokenize(trained, open_source(DIGITS), dataclasses.replace(DIGITS, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_codes_of_anything_else_are_not_mixed_in(trained, tmp_path):
    """After a lost file only the very same codes are written again, whichever part of their identity has changed."""
    folder, pixels = tmp_path / "images", np.random.default_rng(0).integers(0, 256, (7, 12, 12), dtype=np.uint8)
    folder.mkdir()
    for number, image in enumerate(pixels[:6]):
        Image.fromarray(image).save(folder / f"{number}.png", compress_level=0)
    for name, classes in (("labels", "abcabc"), ("others", "abcbca")):
        (tmp_path / name).write_text("".join(f"{number}.png {label}\n" for number, label in enumerate(classes)))
    data = DataConfig(path=str(folder), labels=str(tmp_path / "labels"), image_size=8, channels=1, crop="ten_crop")

    def run(trained=trained, **changes):
        changed = dataclasses.replace(data, **changes)
        tokenize(trained, open_source(changed), changed, tmp_path / "codes", batch_size=8, shard_size=2)

    run(ten_crop_scale=1.2)
    (tmp_path / "codes" / shard_name(1)).unlink()
    other = dataclasses.replace(trained, params=jax.tree.map(lambda array: 2 * array, trained.params))
    original, refused = (folder / "5.png").read_bytes(), "codes was begun with something else, "
    with pytest.raises(InputError, match=refused + "model.weights.tokenizer: .* there, .* here; delete it"):
        run(other, ten_crop_scale=1.2)
    with pytest.raises(InputError, match=refused + "data.ten_crop_scale: 1.2 there, 1.3 here; delete it"):
        run(ten_crop_scale=1.3)
    with pytest.raises(InputError, match=refused + "source.contents: .*, data.labels: "):
        run(ten_crop_scale=1.2, labels=str(tmp_path / "others"))
    Image.fromarray(pixels[6]).save(folder / "5.png", compress_level=0)
    assert len(original) == (folder / "5.png").stat().st_size
    with pytest.raises(InputError, match=refused + "source.contents: .* there, .* here; delete it"):
        run(ten_crop_scale=1.2)
    (folder / "5.png").write_bytes(original)  # at another time
    run(ten_crop_scale=1.2)
    assert len(codes.open_codes(tmp_path / "codes")) == 6
    (tmp_path / "codes" / "identity.json").unlink()
    with pytest.raises(InputError, match="holds pieces and no identity.json"):
        run(ten_crop_scale=1.2)


CUT_PARAMETERS = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dar_jax.config import TokenizerTraining
from dar_jax.data.codes import fingerprint
from dar_jax.experiment import Experiment
mesh, numbers = jax.make_mesh((2,), ("x",)), np.arange(8, dtype=np.float32)
cut, whole = (
    jax.make_array_from_callback((8,), NamedSharding(mesh, spec), lambda part: numbers[part])
    for spec in (PartitionSpec("x"), PartitionSpec())
)
assert not cut.is_fully_addressable
assert fingerprint({"cut": cut, "whole": whole}) == fingerprint({"cut": numbers, "whole": numbers})
experiment = Experiment(TokenizerTraining())
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".tmp")}


def test_two_processes_that_are_killed_and_resumed_write_what_one_writes(tiny_run, tmp_path):
    """And parameters that are cut over both have the fingerprint of the whole, which their experiment file looks at."""
    one, two, experiment = tmp_path / "one", tmp_path / "two", tmp_path / "experiment.py"
    trained = load_tokenizer(tiny_run, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    tokenize(trained, open_source(TEN), TEN, one, batch_size=1, shard_size=4)

    experiment.write_text(CUT_PARAMETERS)
    command = ["tokenize", tiny_run, "--out", two, "--shard-size", 4, "--batch-size", 1, "--experiment", experiment]
    command += ["--data.split", "test", "--data.crop", "ten_crop", "--data.ten-crop-scale", 1.5]
    place = {"devices": 1, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    with Job(*command, **place) as job:
        while not list(two.glob("shard-*_record")) and job.running():
            time.sleep(0.01)
    before = {path: path.stat().st_mtime_ns for path in two.glob("shard-*_record")}
    assert 0 < len(before) < 75
    with pytest.raises(InputError, match="not complete"):
        codes.open_codes(two)

    with Job(*command, **place) as job:
        assert job.finish() == [0, 0], job.stderr(0) + job.stderr(1)
        assert f"{two}: 10 x 16 codes for each of 297 images, in 75 files" in job.stdout(0) and "tokenized" not in job.stdout(1)
    assert contents(two) == contents(one)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(codes.open_codes(two, verify=True)) == 297
