"""Batches of a source's elements: shuffled and augmented without end for training, or every element once, in order.

Everything is a pure function of an index, so a batch depends on (seed, step) alone: not on the step at which a run was resumed,
the number of threads, worker processes or hosts, or any state to be saved.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from dar_jax.config import DataConfig, Seed, checked
from dar_jax.data import transforms
from dar_jax.data.sources import Source
from dar_jax.errors import InputError

THREADS = min(os.cpu_count() or 1, 16)
# Worker processes send arrays through pipes. Shared memory can be left behind when a run ends, and always is when it is killed.
NO_SHARED_MEMORY = grain.experimental.DatasetOptions(min_shm_size=1 << 62)

Batch = dict[str, np.ndarray]


def batches(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Batch]:
    """Batches for training, from step `start_step` on, without end.

    The elements come in a new random order every epoch; a batch may reach over the end of an epoch. The global batch k,
    `batch_size` elements, is a function of (seed, k). Host h gets its h-th part: the parts of all hosts, concatenated, are the
    batch that a single host would get.

    Yields {"image": uint8 [B, S, S, C], "label": int32 [B]}, cropped and flipped as `config` says, or for stored codes
    {"codes": int32 [B, T], "label": int32 [B]} of a random one of the stored crops; B = batch_size / hosts. Further keys of the
    elements stay, batched. Raises InputError if `batch_size` is not a multiple of `hosts`, the seed is not in [0, 2**32), the
    source is empty, or the crop settings make no sense.
    """
    if batch_size < 1 or batch_size % hosts:
        raise InputError(f"the batch size {batch_size} should be a multiple of the number of hosts, {hosts}")
    checked(Seed, seed, "seed")
    _check(source, config)
    with_value = functools.partial(_with, len(source.class_names))

    def augment(element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        if "codes" in element:
            return with_value(element, "codes", element["codes"][rng.integers(len(element["codes"]))])
        return with_value(element, "image", _augment(element["image"], config, rng))

    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(augment)
    dataset = dataset.batch(batch_size // hosts)[start_step * hosts + host :: hosts]
    return _iterate(dataset, config.workers)


def epoch(
    source: Source,
    config: DataConfig,
    *,
    batch_size: int,
    stop: int | None = None,
    crop: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Iterator[Batch]:
    """Elements 0 .. stop - 1 of a source (all by default) once each, in order: for evaluation. Otherwise as `elements`."""
    indices = np.arange(len(source) if stop is None else stop)
    return elements(source, config, indices, batch_size=batch_size, crop=crop)


def elements(
    source: Source,
    config: DataConfig,
    indices: np.ndarray,
    *,
    batch_size: int,
    crop: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Iterator[Batch]:
    """The elements of these indices [N] in this order, in batches of one size.

    crop: image uint8 [H, W, C] -> uint8 of one shape for all images; None: `center_crop` to `config.image_size`, or none where
    `config.crop` is "none". It has to be a plain function or a lambda where `config.workers` > 0.

    Yields {"image": uint8 [B, ...], "label": int32 [B], "valid": bool [B]}, or for stored codes {"codes": int32 [B, T], ...} of
    the first crop. B is always `batch_size`: rows past the end, rows of the index -1, and rows whose file cannot be read are
    zeros and not valid. Raises InputError if the source is empty or the crop settings make no sense.
    """
    if batch_size < 1:
        raise InputError(f"the batch size {batch_size} should be at least 1")
    _check(source, config)
    if crop is None and config.crop != "none":
        crop = functools.partial(transforms.center_crop, size=config.image_size)
    read = getattr(source, "read", source.__getitem__)
    with_value = functools.partial(_with, len(source.class_names))

    def prepare(element: dict[str, Any]) -> dict[str, Any]:
        if "codes" in element:
            return with_value(element, "codes", element["codes"][0])
        return with_value(element, "image", crop(element["image"]) if crop else element["image"])

    blank = {name: np.zeros_like(value) for name, value in prepare(source[0]).items()} | {"valid": np.bool_(False)}
    padded = np.full(-(-len(indices) // batch_size) * batch_size, -1)
    padded[: len(indices)] = indices

    def load(row: int) -> dict[str, Any]:
        element = read(int(padded[row])) if padded[row] >= 0 else None
        return blank if element is None else prepare(element) | {"valid": np.bool_(True)}

    return _iterate(grain.MapDataset.range(len(padded)).map(load).batch(batch_size), config.workers)


def _check(source: Source, config: DataConfig) -> None:
    checked(DataConfig, config, "data")
    least, greatest = config.crop_fraction
    if least > greatest:
        raise InputError(f"data.crop_fraction is {least} {greatest}, it should be rising")
    if not len(source):
        raise InputError("the data set is empty")


def _augment(image: np.ndarray, config: DataConfig, rng: np.random.Generator) -> np.ndarray:
    if config.crop == "random":
        image = transforms.random_crop(image, config.image_size, config.crop_fraction, rng)
    elif config.crop == "ten_crop":
        image = transforms.one_of_ten(image, config.image_size, config.ten_crop_scale, rng)
    elif config.crop == "center":
        image = transforms.center_crop(image, config.image_size)
    return transforms.flip(image) if config.flip and rng.random() < 0.5 else image


def _with(classes: int, element: dict[str, Any], name: str, value: np.ndarray) -> dict[str, Any]:
    """The element with one value replaced. Further values, arrays of one shape for all elements, stay."""
    label = element["label"]
    if not 0 <= label < classes:
        raise InputError(f"an element of the data has the label {label}, but there are {classes} classes")
    return {**element, name: value, "label": np.int32(label)}


def _iterate(dataset: grain.MapDataset, workers: int) -> Iterator[Batch]:
    """The elements of a data set in order, prefetched by threads of this process or by worker processes.

    Raises InputError where a worker process is ended from outside, as it is where memory is short.
    """
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own flags before it starts workers
            flags.FLAGS.mark_as_parsed()
        ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
        ahead = grain.experimental.WithOptionsIterDataset(ahead, NO_SHARED_MEMORY)
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_begin_worker)
    else:
        ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS))
    iterator = iter(ahead)
    try:
        yield from iterator
    except RuntimeError as error:
        if not str(error).startswith("Worker process was terminated"):
            raise
        raise InputError(
            f"a worker process that reads the data ended ({str(error).partition('.')[0]}); where memory is short, set "
            "data.workers to fewer"
        ) from error
    finally:
        iterator.close()


def _begin_worker(worker: int, workers: int) -> None:
    """Ties a worker to the main process: Ctrl-C, which reaches it too, does not end it; the main process's end does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
