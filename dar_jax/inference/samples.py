"""Samples from a trained transformer: any number of (label, seed) pairs, batch by batch, with or without previews.

Shapes: N samples, n of them in a batch, T tokens, Q tokens per group, H W pixels of an image, R pixels along a side while
denoising, C channels.
"""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dar_jax.config import SamplingConfig, TokenizerConfig, validate_tokenizer
from dar_jax.console import Progress
from dar_jax.errors import InputError, require
from dar_jax.inference import npz, pictures
from dar_jax.inference.reconstruct import encode, open_image
from dar_jax.inference.trained import Trained
from dar_jax.models.pixels import to_float, to_uint8, with_float_image
from dar_jax.parallel.batches import over_batches, row_slices, split_rows
from dar_jax.sampling.predict import token_by_token
from dar_jax.sampling.sampler import generate, predictor, stream
from dar_jax.sampling.settings import Condition, Method, Settings, label_of, make_settings
from dar_jax.training.checkpoint import Info

log = logging.getLogger("dar_jax.inference")

NAME_LENGTH = 50  # characters of the run's name in names of files, which may have 255 bytes


@dataclass(frozen=True)
class SampleBatch:
    """The samples of one batch as they stand after `groups` groups.

    rows: their places among the N samples; tokens int32 [n, groups Q]; images uint8 [n, H, W, C], the previews of the
    unfinished ones; calls int32 [n], the passes of the transformer that each took.
    """

    rows: slice
    groups: int
    tokens: np.ndarray
    images: np.ndarray
    calls: np.ndarray


def sample(
    trained: Trained,
    labels: Sequence[int],
    seeds: Sequence[int],
    sampling: SamplingConfig | Settings,
    batch_size: int = 64,
    prefix: np.ndarray | None = None,
    image: np.ndarray | None = None,
    previews: bool = False,
    batches: Sequence[slice] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
) -> Iterator[SampleBatch]:
    """Draws N samples. Each depends on its own label and seed only, not on the batch it is drawn in.

    Args:
      labels, seeds: N integers each; seeds in [0, 2**32).
      sampling: settings, or those of `make_settings`.
      batch_size: samples at a time, rounded up to fit the devices; the last batch is padded, so that one compilation serves.
      prefix: int32 [k] or [N, k], the first k tokens of all or of each (layout control).
      image: uint8 [R, R, C] to start all of them from at `sampling.start_step`.
      previews: yield every batch after each of its groups, as soon as that one ends, and not only in the end.
      batches: which samples to draw together, up to `batch_size` each; None: all in their order.
      given: what an experiment's `condition` reads beside "label", arrays [n, ...] by name; sample i gets row i modulo n. An
        "image" may be uint8, and is float32 in [-1, 1] for the condition.
    """
    settings = sampling
    if isinstance(sampling, SamplingConfig):
        settings = make_settings(sampling, trained.config, trained.networks.method)
        with_image = (image is None) == (sampling.start_step == 0)
        require(with_image, f"start_step is {sampling.start_step}: an image to start from needs a step from 1 on")
    networks, params, total = trained.networks, trained.sampler_params, len(labels)
    size = trained.full_batch(batch_size)
    if prefix is not None:
        prefix = np.broadcast_to(np.asarray(prefix, np.int32), (total, np.shape(prefix)[-1]))
    if image is not None:
        image = np.broadcast_to(to_float(image), (total, *image.shape))

    def draw(
        labels: jax.Array, seeds: jax.Array, prefix: jax.Array | None, image: jax.Array | None, given: dict[str, jax.Array]
    ) -> Any:
        condition = networks.condition(with_float_image({**given, "label": labels}))
        arguments = {"prefix": prefix, "image": image}
        if previews:
            steps = stream(networks, params, settings, condition, seeds, **arguments)
            return ((step.tokens, step.images, step.calls) for step in steps)
        samples = generate(networks, params, settings, condition, seeds, **arguments)
        return samples.tokens, samples.images, samples.calls

    slices = row_slices(0, total, size) if batches is None else batches
    arrays = split_rows(slices, np.asarray(labels, np.int32), np.asarray(seeds, np.uint32), prefix, image)
    arrays = ((rows, (*parts, rows_in_turn(given or {}, rows))) for rows, parts in arrays)
    passes = np.zeros(total, np.int32)
    for rows, (tokens, images, calls) in over_batches(draw, arrays, size, trained.mesh):
        passes[rows] = calls
        yield SampleBatch(rows, tokens.shape[1] // trained.config.tokens_per_group, tokens, to_uint8(images), calls)
    if predictor(networks, settings) is not token_by_token and passes.any():
        passes = passes[passes > 0]
        log.info("%.1f passes of the transformer a sample, at most %d", passes.mean(), passes.max())


def rows_in_turn(arrays: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    """Rows of arrays [n, ...], of which row i modulo n is the i-th."""
    return {name: array[np.arange(rows.start, rows.stop) % len(array)] for name, array in arrays.items()}


def read_given(path: str | None) -> dict[str, np.ndarray]:
    """The arrays [n, ...] of an NPZ file by name, as `given` of `sample`; none without a file.

    Raises InputError where it cannot be read, or holds anything but numbers.
    """
    arrays = {} if path is None else npz.read(path, *npz.names(path))
    for name, array in arrays.items():
        require(array.dtype.kind in "biuf", f"{name} in {path} is {array.dtype}, a condition reads numbers")
    return arrays


def check_given(given: Mapping[str, np.ndarray], condition: Condition) -> None:
    """Raises InputError where the condition reads the label alone, or what is given are no rows of something else."""
    if given and condition is label_of:
        raise InputError(f"{', '.join(given)} is for an experiment whose condition reads more than the label")
    require("label" not in given, "an array of what is given is named label; the labels are given by themselves")
    for name, array in given.items():
        require(np.ndim(array) > 0 and len(array) > 0, f"{name}, which is given to the condition, has no rows")


@dataclass(frozen=True)
class Request:
    """The arguments of `dar-jax sample`, checked against the checkpoint; see `make_request`."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    sampling: SamplingConfig
    tokenizer: TokenizerConfig
    prefix: np.ndarray | None  # tokens int32 [k], or
    reference: np.ndarray | None  # an image uint8 [H, W, C], of whose tokens
    prefix_length: int  # so many are taken
    image: np.ndarray | None  # uint8 [R, R, C] to start from
    given: dict[str, np.ndarray]  # for the experiment's `condition`


def make_request(
    info: Info,
    labels: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    prefix_image: str | None = None,
    prefix_tokens: Sequence[int] | None = None,
    prefix_length: int | None = None,
    start_image: str | None = None,
    resolution: int | None = None,
    output_resolution: int | None = None,
    method: Method = Method(),  # noqa: B008 (frozen)
    condition_image: str | None = None,
    condition_file: str | None = None,
    condition: Condition = label_of,
) -> Request:
    """Checks everything that can be wrong with a request before any weights are read.

    Args:
      info: the transformer's checkpoint, of `inspect_transformer`.
      labels: names or numbers of classes. One label goes with many seeds, one seed with many labels, equally many pair up.
      prefix_image, prefix_tokens: source of the first `prefix_length` tokens (default: all of `prefix_tokens`).
      start_image: to start from at `sampling.start_step`.
      method, condition: the experiment's parts, which the settings have to fit.
      condition_image: what `condition` gets as "image"; condition_file: NPZ file of what else it gets, see `read_given`.
      resolution, output_resolution: pixels are denoised at the one and resized to the other (default: the tokenizer's).

    Raises InputError in one line where labels, seeds, settings, tokens or images do not fit.
    """
    model = info.config.model
    tokenizer = _at_resolution(info.tokenizer.config.model, resolution, output_resolution)
    make_settings(sampling, tokenizer, method)
    numbers, seeds = pair([class_number(label, info.class_names) for label in labels], seeds)
    if (start_image is None) != (sampling.start_step == 0):
        raise InputError(
            f"start_step is {sampling.start_step}: an image to start from needs a step from 1 on, and the other way round"
        )
    if prefix_image is not None and prefix_tokens is not None:
        raise InputError("a prefix comes from an image or from tokens, not from both")
    given = read_given(condition_file)
    if condition_image is not None:
        given["image"] = open_image(condition_image, tokenizer, tokenizer.image_size)[None]
    check_given(given, condition)
    available = len(prefix_tokens) if prefix_tokens is not None else model.num_tokens
    if prefix_length is None:
        if prefix_image is not None:
            raise InputError("a prefix image needs a prefix length: how many of its first tokens are kept")
        prefix_length = 0 if prefix_tokens is None else available
    elif prefix_image is None and prefix_tokens is None:
        raise InputError("a prefix length needs a prefix image or prefix tokens")
    if not 0 <= prefix_length <= min(available, model.num_tokens):
        raise InputError(f"the prefix length is {prefix_length}, it should be 0 .. {min(available, model.num_tokens)}")
    if wrong := [token for token in prefix_tokens or () if not 0 <= token < model.vocab_size]:
        raise InputError(f"the prefix token {wrong[0]} is out of range, tokens are 0 .. {model.vocab_size - 1}")
    return Request(
        labels=numbers,
        seeds=seeds,
        sampling=sampling,
        tokenizer=tokenizer,
        prefix=None if prefix_tokens is None else np.asarray(prefix_tokens[:prefix_length], np.int32),
        reference=None if prefix_image is None else open_image(prefix_image, tokenizer, tokenizer.image_size),
        prefix_length=prefix_length,
        image=None if start_image is None else open_image(start_image, tokenizer, tokenizer.resolution),
        given=given,
    )


def class_number(label: str, class_names: Sequence[str]) -> int:
    """The number of a class, from its name or its number; a name goes first where both are possible.

    Raises InputError, with a similar name where there is one.
    """
    if label in class_names:
        return class_names.index(label)
    last = len(class_names) - 1
    if not re.fullmatch(r"[+-]?\d{1,18}", label):
        similar = difflib.get_close_matches(label, class_names, 1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise InputError(f"there is no class {label!r}, classes are names or 0 .. {last}{hint}")
    if not 0 <= int(label) <= last:
        raise InputError(f"the label {label} is out of range, classes are 0 .. {last}")
    return int(label)


def pair(labels: Sequence[int], seeds: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One label with many seeds, one seed with many labels, or equally many of both: labels and seeds of equal length.

    Raises InputError where they do not pair up or a seed is not in [0, 2**32).
    """
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**32]:
        raise InputError(f"the seed {wrong[0]} is out of range, seeds are 0 .. 2**32 - 1")
    if len(labels) == 1 or len(seeds) == 1:
        return tuple(labels) * len(seeds), tuple(seeds) * len(labels)
    if len(labels) != len(seeds):
        raise InputError(f"{len(labels)} labels and {len(seeds)} seeds do not pair up; give one of either, or equally many")
    return tuple(labels), tuple(seeds)


def write_samples(
    trained: Trained,
    request: Request,
    out: str | os.PathLike,
    batch_size: int = 32,
    previews: bool = False,
    animate: bool = False,
) -> list[Path]:
    """Draws the samples of a request and writes them into the folder `out`; returns the paths.

    Writes NAME_label3_seed11.png for each sample and `grid.png`; with `previews` also NAME_label3_seed11_group1.png and so on
    as each group ends, and `groups.png`, a row for each sample; with `animate` also `denoising.webp`.
    """
    trained, out = trained.with_tokenizer(request.tokenizer), Path(out)
    names, total = trained.class_names, len(request.labels)
    stems = [file_stem(trained, label, seed) for label, seed in zip(request.labels, request.seeds)]
    captions = [f"{names[label]} #{seed}" for label, seed in zip(request.labels, request.seeds)]
    num_groups = request.sampling.num_groups or trained.config.num_groups
    prefix = request.prefix
    if request.reference is not None:
        prefix = encode(trained, request.reference[None], batch_size=1)[0, : request.prefix_length]

    blank = np.zeros((total, *2 * (trained.config.output_side,), 1), np.uint8)
    if animate and max(pictures.sheet(blank, captions).shape) > pictures.MOST_WEBP:
        raise InputError(
            f"{total} samples are too many for one animation, which has at most {pictures.MOST_WEBP:,} pixels a side"
        )
    written, groups = [], [[] for _ in range(num_groups)]
    batches = sample(
        trained,
        request.labels,
        request.seeds,
        request.sampling,
        batch_size=min(batch_size, total),
        prefix=prefix if request.prefix_length else None,
        image=request.image,
        previews=previews or animate,
        given=request.given,
    )

    def write(name: str, image: np.ndarray) -> None:
        pictures.save_png(out / name, image)
        written.append(out / name)

    with Progress("sampled", total) as progress:
        for batch in batches:
            groups[batch.groups - 1].append(batch.images)
            for stem, image in zip(stems[batch.rows], batch.images):
                if previews:
                    write(f"{stem}_group{batch.groups}.png", image)
                if batch.groups == num_groups:
                    write(f"{stem}.png", image)
            if batch.groups == num_groups:
                progress.add(len(batch.images))
    images = [np.concatenate(group) for group in groups if group]
    write("grid.png", pictures.sheet(images[-1], captions))
    if previews:
        write("groups.png", pictures.group_by_group(np.stack(images), captions))
    if animate:
        pictures.save_animation(out / "denoising.webp", [pictures.sheet(frame, captions) for frame in images])
        written.append(out / "denoising.webp")
    return written


def file_stem(trained: Trained, label: int, seed: int) -> str:
    """The name of a sample's file, without its suffix."""
    run = re.sub(r"[^\w.-]+", "_", trained.info.config.name)[:NAME_LENGTH]
    return f"{run}_label{label}_seed{seed}"


def _at_resolution(config: TokenizerConfig, resolution: int | None, output: int | None) -> TokenizerConfig:
    if resolution is not None:
        if resolution < config.image_size:
            raise InputError(f"the resolution {resolution} is below the tokenizer's image size {config.image_size}")
        config = dataclasses.replace(config, sampling_resolution=resolution)
    if output is not None:
        if not 0 < output <= config.resolution:
            raise InputError(f"the output resolution {output} should be 1 .. {config.resolution}, images are only resized down")
        config = dataclasses.replace(config, output_resolution=output)
    validate_tokenizer(config)
    return config
