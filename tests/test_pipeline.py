import dataclasses
import functools
import os
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from dar_jax.config import DataConfig
from dar_jax.data.pipeline import batches, elements, epoch
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError

DIGITS = DataConfig(source="digits", image_size=8, channels=1)


class Numbered:
    """`length` grey images of 4 x 4 pixels; the left half of image i is i, the right half 100 + i."""

    class_names = ("even", "odd")
    description = "numbered images"

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"image": np.array([[[index]] * 2 + [[100 + index]] * 2] * 4, np.uint8), "label": index % 2}


class StoredCodes(Numbered):
    """`length` elements of 3 crops of 2 codes: element i holds the codes 6 i .. 6 i + 5."""

    def __getitem__(self, index):
        return {"codes": 6 * index + np.arange(6, dtype=np.int32).reshape(3, 2), "label": index % 2}


NUMBERED = DataConfig(image_size=4, channels=1, crop="center", flip=False)


def take(count, *arguments, **options):
    return list(islice(batches(*arguments, **options), count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("crop", ["random", "center", "ten_crop"])
def test_shapes_and_types(crop):
    config = dataclasses.replace(DIGITS, crop=crop, channels=3)
    (batch,) = take(1, open_source(config), config, batch_size=6, seed=0)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "image": ((6, 8, 8, 3), np.uint8),
        "label": ((6,), np.int32),
    }


def test_batch_depends_on_seed_and_step_alone():
    source = open_source(DIGITS)
    run = take(30, source, DIGITS, batch_size=100, seed=3)
    assert_equal(run, take(30, source, DIGITS, batch_size=100, seed=3))
    for step in (1, 17):
        assert_equal(run[step:], take(30 - step, source, DIGITS, batch_size=100, seed=3, start_step=step))
    other = take(1, source, DIGITS, batch_size=100, seed=4)
    assert (other[0]["label"] != run[0]["label"]).any()


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_parts_of_the_hosts_are_the_whole_batch(hosts):
    source = open_source(DIGITS)
    whole = take(3, source, DIGITS, batch_size=8, seed=0, start_step=5)
    parts = [take(3, source, DIGITS, batch_size=8, seed=0, start_step=5, host=h, hosts=hosts) for h in range(hosts)]
    joined = [{name: np.concatenate([part[name] for part in step]) for name in step[0]} for step in zip(*parts)]
    assert_equal(whole, joined)


def test_every_epoch_has_every_element_once_in_another_order():
    run = take(6, Numbered(20), NUMBERED, batch_size=10, seed=0)
    orders = np.concatenate([batch["image"][:, 0, 0, 0] for batch in run]).reshape(3, 20)
    assert (np.sort(orders) == np.arange(20)).all()
    assert len({tuple(order) for order in orders}) == 3
    assert all((batch["label"] == batch["image"][:, 0, 0, 0] % 2).all() for batch in run)


def test_fewer_elements_than_a_batch():
    (batch,) = take(1, Numbered(3), NUMBERED, batch_size=9, seed=0)
    assert np.bincount(batch["image"][:, 0, 0, 0]).tolist() == [3, 3, 3]


def test_half_of_the_images_are_mirrored_anew_every_epoch():
    config = dataclasses.replace(NUMBERED, flip=True)
    run = take(40, Numbered(10), config, batch_size=10, seed=0)
    corners = np.concatenate([batch["image"][:, 0, 0, 0] for batch in run]).astype(int)
    mirrored = corners >= 100
    assert 0.4 < mirrored.mean() < 0.6
    per_image = [mirrored[corners % 100 == i].mean() for i in range(10)]
    assert min(per_image) > 0 and max(per_image) < 1


def test_a_random_one_of_the_stored_crops():
    run = take(30, StoredCodes(4), NUMBERED, batch_size=4, seed=0)
    codes = np.concatenate([batch["codes"] for batch in run])
    assert codes.shape == (120, 2) and codes.dtype == np.int32
    assert {tuple(row) for row in codes} == {(2 * i, 2 * i + 1) for i in range(12)}
    assert all((batch["label"] == batch["codes"][:, 0] // 6 % 2).all() for batch in run)


@pytest.fixture
def damaged(tmp_path):
    """Settings of a folder of 7 images of the values 10, 20, ..., 70, the third of which cannot be read."""
    for i in range(7):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("L", (5, 6), 10 * i + 10).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "a" / "4.png").write_text("this is no picture")
    return DataConfig(source="folder", path=str(tmp_path), image_size=4, channels=1)


def test_worker_processes_give_what_threads_give(damaged):
    source = open_source(damaged)
    processes = dataclasses.replace(damaged, workers=2)
    options = {"batch_size": 3, "seed": 0, "start_step": 2}
    assert_equal(take(5, source, damaged, **options), take(5, source, processes, **options))
    assert_equal(list(epoch(source, damaged, batch_size=2)), list(epoch(source, processes, batch_size=2)))


def test_worker_processes_leave_no_shared_memory_behind():
    """Python warns of it when it ends, also where arrays live on in JAX's, which alias them on a CPU."""
    code = """
import contextlib, jax, sys
from dar_jax.config import DataConfig
from dar_jax.data.pipeline import batches
from dar_jax.data.sources import open_source
config = DataConfig(source="digits", image_size=64, channels=1, workers=1)
with contextlib.closing(batches(open_source(config), config, batch_size=64, seed=0)) as reader:
    sys.kept = [jax.device_put(next(reader)) for _ in range(3)]
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert run.returncode == 0 and "leaked" not in run.stderr, run.stderr


def test_an_error_of_a_worker_process_is_one_of_this_process(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_text("this is no picture")
    config = DataConfig(source="folder", path=str(tmp_path), image_size=4, workers=1)
    with pytest.raises(InputError, match="none of the 2 images can be read"):
        take(1, open_source(config), config, batch_size=2, seed=0)


class Ending(Numbered):
    """Element 6 ends the process that reads it."""

    def __getitem__(self, index):
        if index == 6:
            os._exit(9)
        return super().__getitem__(index)


def test_the_end_of_a_worker_process_is_one_line():
    with pytest.raises(InputError, match=r"a worker process .* ended \(.* exit code 9\)"):
        list(epoch(Ending(9), dataclasses.replace(NUMBERED, workers=1), batch_size=2))


def test_epoch_has_every_readable_element_once_in_order(damaged):
    run = list(epoch(open_source(damaged), damaged, batch_size=3))
    assert [batch["valid"].tolist() for batch in run] == [[True, True, False], [True] * 3, [True, False, False]]
    assert all(batch["image"].shape == (3, 4, 4, 1) and batch["label"].dtype == np.int32 for batch in run)
    values = np.concatenate([batch["image"][batch["valid"]] for batch in run])
    labels = np.concatenate([batch["label"][batch["valid"]] for batch in run])
    assert values[:, 0, 0, 0].tolist() == [10, 30, 70, 20, 40, 60]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert not any(batch["image"][~batch["valid"]].any() for batch in run)


def test_chosen_elements_with_a_crop_of_their_own():
    run = list(elements(Numbered(9), NUMBERED, np.array([7, -1, 5]), batch_size=2, crop=lambda image: image[:3, 1:]))
    assert [batch["valid"].tolist() for batch in run] == [[True, False], [True, False]]
    images = np.concatenate([batch["image"] for batch in run])
    assert images.shape == (4, 3, 3, 1) and images[:, 0, 0, 0].tolist() == [7, 0, 5, 0]
    assert [batch["label"].tolist() for batch in run] == [[1, 0], [1, 0]]


def test_epoch_of_stored_codes_takes_the_first_crop():
    run = list(epoch(StoredCodes(3), NUMBERED, batch_size=2))
    assert np.concatenate([batch["codes"][batch["valid"]] for batch in run]).tolist() == [[0, 1], [6, 7], [12, 13]]


@pytest.mark.parametrize(
    "source,config,options",
    [
        (Numbered(5), NUMBERED, {"batch_size": 6, "hosts": 4}),
        (Numbered(5), NUMBERED, {"batch_size": 0}),
        (Numbered(5), NUMBERED, {"batch_size": 2, "seed": -1}),
        (Numbered(0), NUMBERED, {"batch_size": 2}),
        (Numbered(5), dataclasses.replace(NUMBERED, crop_fraction=(1.0, 0.8)), {"batch_size": 2}),
        (Numbered(5), dataclasses.replace(NUMBERED, crop_fraction=(0.8, 1.2)), {"batch_size": 2}),
        (Numbered(5), dataclasses.replace(NUMBERED, ten_crop_scale=0.9), {"batch_size": 2}),
        (Numbered(5), dataclasses.replace(NUMBERED, image_size=0), {"batch_size": 2}),
        (Numbered(5), dataclasses.replace(NUMBERED, workers=-1), {"batch_size": 2}),
    ],
)
def test_settings_that_make_no_sense(source, config, options):
    with pytest.raises(InputError):
        batches(source, config, **{"seed": 0} | options)


@pytest.mark.parametrize("label", [2, -1])
def test_labels_out_of_range_are_refused(label):
    class Mislabelled(Numbered):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"label": label}

    for iterate in (functools.partial(batches, seed=0), epoch):
        with pytest.raises(InputError, match=f"the label {label}, but there are 2 classes"):
            next(iterate(Mislabelled(5), NUMBERED, batch_size=2))
