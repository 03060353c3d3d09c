"""The parameters of the frozen feature networks from their published files (see `weights` for where those are)."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.errors import InputError
from dar_jax.features.dinov2 import Dinov2, Dinov2Config
from dar_jax.features.inception import Inception
from dar_jax.features.names import (
    DINOV2_UNUSED,
    INCEPTION_UNUSED,
    LPIPS_UNUSED,
    canonical_inception,
    canonical_lpips,
    dinov2_entries,
    inception_entries,
    lpips_entries,
)
from dar_jax.features.vgg_lpips import SMALLEST, Lpips
from dar_jax.weights import torch_file
from dar_jax.weights.table import from_release

PathLike = str | os.PathLike


def load_lpips(*paths: PathLike) -> dict:
    """Parameters of `Lpips`: of one file that holds all of them, or of torchvision's VGG16 and a file with the five heads.

    Raises: InputError where the files are damaged or something else; OSError where they cannot be read.
    """
    tensors = {}
    for path in paths:
        tensors |= _read(path)
    images = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    abstract = jax.eval_shape(Lpips().init, jax.random.key(0), images, images)["params"]
    return _convert("LPIPS with VGG16", paths, lpips_entries(), canonical_lpips(tensors), abstract, LPIPS_UNUSED)


def load_dinov2(path: PathLike, config: Dinov2Config) -> dict:
    """Parameters of `Dinov2` of these sizes from a file of its release. Raises as `load_lpips`."""
    images = jnp.zeros((1, config.patch_size, config.patch_size, 3))
    abstract = jax.eval_shape(Dinov2(config).init, jax.random.key(0), images)["params"]
    return _convert("DINOv2", (path,), dinov2_entries(config), _read(path), abstract, DINOV2_UNUSED)


def load_inception(path: PathLike) -> dict:
    """Parameters of `Inception`, with its classifier (`"fc" in params`) where the file has one. Raises as `load_lpips`."""
    tensors = canonical_inception(_read(path))
    classifier = "fc.weight" in tensors
    images = jnp.zeros((1, 1, 1, 3))
    abstract = jax.eval_shape(Inception(classifier).init, jax.random.key(0), images)["params"]
    return _convert("FID Inception", (path,), inception_entries(classifier), tensors, abstract, INCEPTION_UNUSED)


def _convert(what: str, paths: tuple[PathLike, ...], entries: list, tensors: dict, abstract: dict, unused: str) -> dict:
    try:
        return from_release(entries, tensors, abstract, unused)
    except InputError as error:
        files = " and ".join(map(str, paths))
        raise InputError(f"{files} cannot be used as {what}: {error}") from error


def _read(path: PathLike, depth: int = 4) -> dict[str, np.ndarray]:
    """The tensors of a file, by the names on the way to them with dots between."""

    def collect(contents: Any, prefix: str, left: int) -> None:
        for name, value in contents.items():
            if isinstance(value, np.ndarray):
                tensors[f"{prefix}{name}"] = value
            elif not isinstance(value, Mapping) or left == 0:
                raise InputError(f"{path} is no file of weights: {prefix}{name} is no tensor")
            else:
                collect(value, f"{prefix}{name}.", left - 1)

    contents, tensors = torch_file.read(path), {}
    if not isinstance(contents, Mapping):
        raise InputError(f"{path} is no file of weights")
    collect(contents, "", depth)
    return tensors
