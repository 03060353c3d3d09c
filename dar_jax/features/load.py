"""The parameters of the frozen feature networks from their published files, which `weights.published` finds."""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import Array

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
from dar_jax.weights.table import Entry, from_release

PathLike = str | os.PathLike
MAX_DEPTH = 5  # of dicts within each other, in a file of weights


def load_lpips(*paths: PathLike) -> dict:
    """Parameters of `Lpips`: of one file that holds all of them, or of torchvision's VGG16 and a file with the five heads.

    Raises: InputError where the files are damaged or something else; OSError where they cannot be read.
    """
    tensors = {}
    for path in paths:
        tensors |= _read(path)
    images = jnp.zeros((1, SMALLEST, SMALLEST, 3))
    network = Lpips(), images, images
    return _convert("LPIPS with VGG16", paths, lpips_entries(), canonical_lpips(tensors), LPIPS_UNUSED, *network)


def load_dinov2(path: PathLike, config: Dinov2Config) -> dict:
    """Parameters of `Dinov2` of these sizes from a file of its release. Raises as `load_lpips`."""
    network = Dinov2(config), jnp.zeros((1, config.patch_size, config.patch_size, 3))
    return _convert("DINOv2", (path,), dinov2_entries(config), _read(path), DINOV2_UNUSED, *network)


def load_inception(path: PathLike) -> dict:
    """Parameters of `Inception`, with its classifier (`"fc" in params`) where the file has one. Raises as `load_lpips`."""
    tensors = canonical_inception(_read(path))
    classifier = "fc.weight" in tensors
    network = Inception(classifier), jnp.zeros((1, 1, 1, 3))
    return _convert("FID Inception", (path,), inception_entries(classifier), tensors, INCEPTION_UNUSED, *network)


def _convert(
    what: str, paths: tuple[PathLike, ...], entries: list[Entry], tensors: dict, unused: str, network: nn.Module, *inputs: Array
) -> dict:
    abstract = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    try:
        return from_release(entries, tensors, abstract, unused)
    except InputError as error:
        files = " and ".join(map(str, paths))
        raise InputError(f"{files} cannot be used as {what}: {error}") from error


def _read(path: PathLike) -> dict[str, np.ndarray]:
    """The tensors of a file, by the names on the way to them with dots between."""
    contents, tensors = torch_file.read(path), {}
    if not isinstance(contents, dict):
        raise InputError(f"{path} is no file of weights")
    for names, value in traverse_util.flatten_dict(contents).items():
        if not isinstance(value, np.ndarray) or len(names) > MAX_DEPTH:
            raise InputError(f"{path} is no file of weights: {'.'.join(map(str, names))[:100]} is no tensor")
        tensors[".".join(map(str, names))] = value
    return tensors
