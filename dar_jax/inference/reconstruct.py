"""Images -> codes -> images, and their PSNR.

Shapes: N images, B images at a time, H W pixels, C channels, T tokens, E code dimension.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dar_jax.config import DataConfig, SamplingConfig, TokenizerConfig
from dar_jax.console import Progress
from dar_jax.data.images import ImageError, read_image, size_of_image
from dar_jax.data.pipeline import epoch
from dar_jax.data.sources import FolderSource, Source, held_out, open_source
from dar_jax.data.transforms import center_crop
from dar_jax.errors import InputError
from dar_jax.files import write_json
from dar_jax.inference import pictures
from dar_jax.inference.trained import Trained, seeds_from
from dar_jax.models.pixels import psnr, to_float, to_uint8
from dar_jax.models.quantizer import Quantized
from dar_jax.parallel.batches import over_batches, row_slices, split_rows
from dar_jax.sampling.sampler import decode
from dar_jax.sampling.settings import Networks, Settings, make_settings

SHOWN = 32  # pairs in the grid of a folder


class Reconstructed(NamedTuple):
    """originals and images uint8 [N, H, W, C]; psnr [N] float64 in dB; codes int32 [N, T], None for a continuous tokenizer."""

    originals: np.ndarray
    images: np.ndarray
    psnr: np.ndarray
    codes: np.ndarray | None


def images_of(trained: Trained, count: int, training: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The first held-out images, or those of the training, of the tokenizer's data: at most `count` uint8 [N, H, W, C],
    centre-cropped, and their classes int32 [N]. Raises InputError where the data cannot be opened."""
    of_run = trained.info.tokenizer.config.data
    data = dataclasses.replace(of_run if training else held_out(of_run), crop="none" if of_run.crop == "none" else "center")
    source = open_source(data)
    count = min(count, len(source))
    batch = next(epoch(source, data, batch_size=count, stop=count))
    return batch["image"][batch["valid"]], batch["label"][batch["valid"]]


def reconstruct(
    trained: Trained,
    images: np.ndarray,
    seeds: np.ndarray,
    sampling: SamplingConfig | Settings | None = None,
    batch_size: int = 64,
) -> Reconstructed:
    """Encodes and decodes images.

    Args:
      images: uint8 [N, H, W, C] of the tokenizer's image size, which is also that of the result.
      seeds: [N] integers, of the noise that each image is denoised from.
      sampling: its solver and steps count, or settings of `make_settings`; None: the defaults.
      batch_size: images at a time, rounded up to fit the devices; fewer are padded, so that one compilation serves.
    """
    size = trained.full_batch(batch_size)
    batches = split_rows(row_slices(0, len(images), size), images, np.asarray(seeds, np.uint32))
    parts = zip(*(result for _, result in _reconstruct(trained, batches, sampling, size)))
    return Reconstructed(*(None if part[0] is None else np.concatenate(part) for part in parts))


def reconstruct_source(
    trained: Trained,
    source: Source,
    data: DataConfig,
    what: str,
    seeds: np.ndarray,
    sampling: SamplingConfig | None = None,
    batch_size: int = 64,
) -> Iterator[tuple[np.ndarray, Reconstructed]]:
    """Reconstructs the first images of a data set, one for each seed, batch by batch, and shows the progress as `what`.

    Yields (indices int [n], results) of those that can be read. The other arguments are those of `reconstruct`.
    """
    total = len(seeds)
    size = trained.full_batch(min(batch_size, total))

    def batches() -> Iterator[tuple[np.ndarray, tuple]]:
        for number, batch in enumerate(epoch(source, data, batch_size=size, stop=total)):
            rows = np.flatnonzero(batch["valid"])
            indices = number * size + rows
            if len(rows):
                yield indices, (batch["image"][rows], seeds[indices])

    with Progress(what, total) as progress:
        for indices, result in _reconstruct(trained, batches(), sampling, size):
            progress.add(int(indices[-1]) + 1 - progress.done)
            yield indices, result
        progress.add(total - progress.done)


def _reconstruct(
    trained: Trained, batches: Iterable[tuple[Any, tuple]], sampling: SamplingConfig | Settings | None, size: int
) -> Iterator[tuple[Any, Reconstructed]]:
    """Reconstructs batches (tag, (images, seeds)) of up to `size` rows; yields (tag, result)."""
    prepared = trained.sampler_params  # the resolution changes none of them
    trained = trained.with_tokenizer(at_image_size(trained.config))
    networks, params = trained.networks, trained.params
    settings = sampling
    if not isinstance(settings, Settings):
        settings = make_settings(settings or SamplingConfig(), trained.config, networks.method)

    def run(images: jax.Array, seeds: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        quantized = quantize(networks, params, images)
        return decode(networks, prepared, settings, quantized.values, seeds).images, quantized.codes

    tagged = (((tag, arguments[0]), arguments) for tag, arguments in batches)
    for (tag, originals), (images, codes) in over_batches(run, tagged, size, trained.mesh):
        images = to_uint8(images)
        yield tag, Reconstructed(originals, images, psnr(originals, images), codes)


def encode(trained: Trained, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """uint8 [N, H, W, C] -> codes int32 [N, T], `batch_size` images at a time as in `reconstruct`."""
    size = trained.full_batch(batch_size)
    batches = split_rows(row_slices(0, len(images), size), images)
    run = functools.partial(quantize, trained.networks, trained.params)
    return np.concatenate([quantized.codes for _, quantized in over_batches(run, batches, size, trained.mesh)])


@functools.partial(jax.jit, static_argnames="networks")
def quantize(networks: Networks, params: dict, images: jax.Array) -> Quantized:
    """uint8 [B, H, W, C] -> the quantizer's result: codes [B, T] and the values [B, T, E] that `decode` takes."""
    apply = functools.partial(networks.tokenizer.apply, {"params": params["tokenizer"]})
    return apply(apply(to_float(images), method="encode"), method="quantize")


def codebook_usage(codes: np.ndarray, codebook_size: int) -> float:
    """Share of the codebook that occurs in codes of any shape."""
    return len(np.unique(codes)) / codebook_size


def at_image_size(config: TokenizerConfig) -> TokenizerConfig:
    """The same tokenizer, decoding at the size of the images it encodes."""
    return dataclasses.replace(config, sampling_resolution=None, output_resolution=None)


def open_images(folder: str | os.PathLike, split: str, config: TokenizerConfig) -> FolderSource:
    """The images of a folder, for a tokenizer to encode.

    Raises InputError if there are none, or one is smaller than the tokenizer's patches.
    """
    source = open_source(
        DataConfig(source="folder", path=os.fspath(folder), split=split, image_size=config.image_size, channels=config.channels)
    )
    for file in source.files:
        with contextlib.suppress(ImageError):  # reported when it is read
            check_size(file, size_of_image(file), config)
    return source


def open_image(path: str | os.PathLike, config: TokenizerConfig, size: int) -> np.ndarray:
    """One image, centre-cropped: uint8 [size, size, C].

    Raises InputError if it cannot be read or is smaller than the tokenizer's patches.
    """
    image = read_image(path, config.channels, size)
    check_size(path, image.shape[1::-1], config)
    return center_crop(image, size)


def check_size(path: str | os.PathLike, size: tuple[int, int], config: TokenizerConfig) -> None:
    """Raises InputError where an image of this size (width, height) is smaller than the tokenizer's patches."""
    if min(size) < config.encoder_patch_size:
        raise InputError(
            f"{path} is {size[0]} x {size[1]} pixels, smaller than the tokenizer's patches of {config.encoder_patch_size}"
        )


def reconstruct_folder(
    trained: Trained,
    source: FolderSource,
    out: str | os.PathLike,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Reconstructs every image of `open_images`.

    Writes `images/...png` (under the names they had), `grid.png` (original beside reconstruction, of the first 32) and
    `report.json` into the folder `out`; returns the report.
    """
    started = time.perf_counter()
    out, config, seeds = Path(out), trained.config, seeds_from(seed, len(source))
    scores, codes, pairs = {}, [], []
    data = DataConfig(image_size=config.image_size)
    for indices, result in reconstruct_source(trained, source, data, "reconstructed", seeds, sampling, batch_size):
        for index, image, score in zip(indices, result.images, result.psnr):
            name = Path(source.files[index]).relative_to(source.folder)
            file = name if name.suffix == ".png" else name.with_name(name.name + ".png")
            pictures.save_png(out / "images" / file, image)
            scores[str(name)] = round(float(score), 3)
        if result.codes is not None:
            codes.append(np.unique(result.codes))
        if len(scores) - len(indices) < SHOWN:
            pairs.append((result.originals, result.images))
    if not scores:
        raise InputError(f"none of the {len(source)} images can be read, for instance {source.files[0]}")
    originals, decoded = (np.concatenate(images)[:SHOWN] for images in zip(*pairs))
    pictures.save_png(out / "grid.png", pictures.beside(originals, decoded))
    report = {
        "images": len(scores),
        "unreadable": len(source) - len(scores),
        "psnr": float(np.mean(list(scores.values()))),
        "codebook_usage": codebook_usage(np.concatenate(codes), config.codebook_size) if codes else None,
        "seconds": round(time.perf_counter() - started, 1),
        "psnr_of_each": scores,
    }
    write_json(out / "report.json", report)
    return report
