"""A part of an image drawn anew, or an enlargement of it: by particles that agree with what is known (`sampling.particles`).

Shapes: N images, n of them in a batch, K particles of each, H W pixels, C channels, T tokens, G groups.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.config import SamplingConfig, TokenizerConfig
from dar_jax.console import Progress
from dar_jax.data.images import read_image
from dar_jax.data.transforms import center_crop
from dar_jax.errors import InputError, require
from dar_jax.inference import pictures
from dar_jax.inference.reconstruct import at_image_size, check_size, quantize
from dar_jax.inference.samples import class_number, file_stem
from dar_jax.inference.trained import Trained
from dar_jax.models.pixels import to_float, to_uint8
from dar_jax.parallel.batches import batch_sharding, over_batches, row_slices, split_rows
from dar_jax.parallel.sharding import put
from dar_jax.sampling.denoise import schedule
from dar_jax.sampling.observe import Observed, log_likelihood, project, steered
from dar_jax.sampling.particles import check_groups, chosen_particle, random_classes
from dar_jax.sampling.sampler import decode, lookup_codes
from dar_jax.sampling.settings import Method, make_settings
from dar_jax.training.checkpoint import Info

UNKNOWN = 128  # the grey of what is not known, in pictures


@dataclass(frozen=True)
class Edited:
    """The results of a batch.

    rows: their places among the N images. images uint8 [n, H, W, C]; previews uint8 [G, n, H, W, C], after each group, of the
    particles that were chosen in the end; tokens int32 [n, T]; labels int32 [n], the classes that they were drawn with.
    """

    rows: slice
    images: np.ndarray
    previews: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray


def edit(
    trained: Trained,
    images: np.ndarray,
    known: np.ndarray,
    labels: Sequence[int] | None,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    particles: Sequence[int] = (16,),
    prefix_length: int = 0,
    batch_size: int = 64,
) -> Iterator[Edited]:
    """Draws what is not known of N images. Each result depends on its own image, label and seed only.

    Args:
      images: uint8 [N, H, W, C] of the tokenizer's image size; or smaller ones, [N, h, w, C], to enlarge: their sides divide
        it, and their pixels are the means of squares of the results.
      known: bool [N, h, w], True where a pixel is known. Those at the full size are kept exactly.
      labels: N classes; None: every particle gets one, and how well its previews agree with the image decides.
      seeds: N integers in [0, 2**32), of tokens and noise.
      sampling: settings; from a `start_step` of 1 on, the new part starts from the old one with noise.
      particles: K of each image, one number or one for each group. With 1 the tokens are those of a sample without an image.
      prefix_length: so many first tokens are those of the image, which keeps its layout.
      batch_size: particles at a time, but at least those of one image.

    Raises InputError where the settings or the number of particles do not fit.
    """
    prepared = trained.sampler_params  # the resolution changes none of them
    trained = trained.with_tokenizer(at_image_size(trained.config))
    networks, params, method = trained.networks, trained.params, trained.networks.method
    plain, observing = steered(networks, None), steered(networks, method.steer or project)
    settings = make_settings(sampling, trained.config, method)
    counts = particle_counts(particles, settings.num_groups)
    last_steps = np.maximum(0, schedule(networks.tokenizer, settings.times).ready[1 : settings.num_groups + 1] - 1)

    def draw(images: jax.Array, known: jax.Array, labels: jax.Array, seeds: jax.Array) -> Any:
        observed = Observed(to_float(images), known[..., None].astype(jnp.float32))
        likelihood = partial(log_likelihood, observed=observed)
        start = to_float(images) if settings.start_step else None
        prefix = quantize(networks, params, images).codes[:, :prefix_length] if prefix_length else None
        conditions = networks.condition({"label": labels.reshape(-1)})
        arguments = plain, prepared, settings, conditions, np.asarray(seeds), counts, likelihood
        state = chosen_particle(*arguments, prefix, start)
        values = lookup_codes(networks, params, state.tokens)
        previews = decode(observing, prepared, settings, values, seeds, start, observed, previews=True).previews[last_steps]
        origins = put(state.origins, batch_sharding(trained.mesh))
        return previews.swapaxes(0, 1), state.tokens, jnp.take_along_axis(labels, origins, axis=1)[:, 0]

    seeds = np.asarray(seeds, np.uint32)
    if labels is None:
        classes = np.asarray(random_classes(seeds, counts[0], len(trained.class_names)))
    else:
        classes = np.repeat(np.asarray(labels, np.int32)[:, None], counts[0], axis=1)
    size = trained.full_batch(max(1, batch_size // max(counts)))
    batches = split_rows(row_slices(0, len(images), size), images, known, classes, seeds)
    for rows, (previews, tokens, chosen) in over_batches(draw, batches, size, trained.mesh):
        previews = np.swapaxes(to_uint8(previews), 0, 1)
        if images.shape[1:] == previews.shape[2:]:
            previews = np.where(known[rows][..., None], images[rows], previews)
        yield Edited(rows, previews[-1], previews, tokens[:, : settings.num_groups * trained.config.tokens_per_group], chosen)


def particle_counts(particles: Sequence[int], num_groups: int) -> list[int]:
    """The particles of each group. Raises InputError where they are neither one number nor one for each group."""
    require(
        len(particles) in (1, num_groups),
        f"particles are one number, or one for each of the {num_groups} groups, not {len(particles)}",
    )
    return [*particles] * (num_groups if len(particles) == 1 else 1)


@dataclass(frozen=True)
class EditRequest:
    """The arguments of `dar-jax edit`, checked against the checkpoint; see `make_edit`. image, known as `edit` takes them."""

    image: np.ndarray
    known: np.ndarray
    label: int | None
    seeds: tuple[int, ...]
    sampling: SamplingConfig
    particles: tuple[int, ...]
    prefix_length: int


def make_edit(
    info: Info,
    image: str,
    mask: str | None,
    enlarge: int | None,
    label: str | None,
    seeds: Sequence[int],
    sampling: SamplingConfig,
    particles: Sequence[int],
    prefix_length: int = 0,
    method: Method = Method(),  # noqa: B008 (frozen)
) -> EditRequest:
    """Checks everything that can be wrong with an edit before any weights are read.

    Args:
      info: the transformer's checkpoint, of `inspect_transformer`.
      image, mask: files of one size; white parts of the mask are drawn anew, and so are transparent ones.
      enlarge: in place of a mask: the image, scaled to so many pixels along a side, is enlarged.
      label: name or number of a class; None: the image decides.

    Raises InputError in one line.
    """
    config = at_image_size(info.tokenizer.config.model)
    particle_counts(particles, make_settings(sampling, config, method).num_groups)
    if sampling.speculate:
        raise InputError(f"speculate is {sampling.speculate}, but particles are chosen between groups; give --speculate 0")
    check_groups(method)
    if (mask is None) == (enlarge is None):
        raise InputError("give a mask, whose white part is drawn anew, or --enlarge, and not both")
    if enlarge is not None and (prefix_length or sampling.start_step):
        raise InputError("an enlargement has neither a prefix length nor a start step, which are for images at full size")
    if prefix_length > config.num_tokens:
        raise InputError(f"the prefix length is {prefix_length}, it should be 0 .. {config.num_tokens}")
    if enlarge is not None:
        pixels, known = _open_enlarged(image, enlarge, config)
    else:
        pixels, known = open_masked(image, mask, config, config.image_size)
    number = None if label is None else class_number(label, info.class_names)
    return EditRequest(pixels, known, number, tuple(seeds), sampling, tuple(particles), prefix_length)


def open_masked(
    image: Any, mask: Any, config: TokenizerConfig, size: int, names: tuple[Any, Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, paths or open files, centre-cropped: uint8 [size, size, C], and bool [size, size], True where a
    pixel is known.

    Args: names, of both in errors; None: the paths.

    Raises InputError where either cannot be read, they are not of one size, or the mask leaves all or nothing.
    """
    image_name, mask_name = names or (image, mask)
    pixels, shades = read_image(image, config.channels, size, image_name), read_image(mask, 1, size, mask_name)
    check_size(image_name, pixels.shape[1::-1], config)
    if pixels.shape[:2] != shades.shape[:2]:
        (height, width), (rows, columns) = pixels.shape[:2], shades.shape[:2]
        raise InputError(f"the mask {mask_name} is {columns} x {rows} pixels, the image {image_name} {width} x {height}")
    known = center_crop(shades, size)[..., 0] < UNKNOWN
    if known.all() or not known.any():
        what = "has no white part, nothing would be drawn anew" if known.all() else "is white, nothing of the image would stay"
        raise InputError(f"the mask {mask_name} {what}; black stays and white is drawn anew")
    return center_crop(pixels, size), known


def _open_enlarged(image: str, side: int, config: TokenizerConfig) -> tuple[np.ndarray, np.ndarray]:
    if side >= config.image_size or config.image_size % side:
        raise InputError(f"enlarge is {side}, it should be less than the model's {config.image_size} pixels and divide them")
    return center_crop(read_image(image, config.channels, side), side), np.ones((side, side), bool)


def write_edits(
    trained: Trained, request: EditRequest, out: str | os.PathLike, batch_size: int = 64, previews: bool = False
) -> list[Path]:
    """Draws the edits of a request and writes them into the folder `out`; returns the paths.

    Writes NAME_label3_seed11.png for each seed and `grid.png`, what is known and the results; with `previews` also
    `groups.png`, a row of previews for each seed.
    """
    out, count = Path(out), len(request.seeds)
    image, known = (np.repeat(array[None], count, axis=0) for array in (request.image, request.known))
    labels = None if request.label is None else [request.label] * count
    drawn, written = [], []
    with Progress("edited", count) as progress:
        settings = request.sampling, request.particles, request.prefix_length, batch_size
        for batch in edit(trained, image, known, labels, request.seeds, *settings):
            for label, seed, pixels in zip(batch.labels, request.seeds[batch.rows], batch.images):
                written.append(out / f"{file_stem(trained, label, seed)}.png")
                pictures.save_png(written[-1], pixels)
            progress.add(len(batch.images))
            drawn.append(batch)
    groups = np.concatenate([batch.previews for batch in drawn], axis=1)
    captions = [f"{trained.class_names[i]} #{s}" for i, s in zip(np.concatenate([b.labels for b in drawn]), request.seeds)]
    given = np.where(request.known[..., None], request.image, UNKNOWN).astype(np.uint8)
    given = np.kron(given, np.ones((groups.shape[2] // len(given),) * 2 + (1,), np.uint8))
    written.append(out / "grid.png")
    pictures.save_png(written[-1], pictures.sheet(np.concatenate([given[None], groups[-1]]), ["given", *captions]))
    if previews:
        written.append(out / "groups.png")
        pictures.save_png(written[-1], pictures.group_by_group(groups, captions))
    return written
