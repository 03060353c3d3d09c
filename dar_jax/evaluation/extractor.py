"""Features of images by the FID Inception network, batch by batch over a mesh."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.config import MeshConfig
from dar_jax.features.inception import Inception, InceptionFeatures
from dar_jax.features.load import load_inception
from dar_jax.parallel.batches import full_batch, over_batches
from dar_jax.weights.published import resolve

CPU_BATCH = 8  # whose maps stay in a processor's caches: two cores do 11 images/s, with 64 they do 7


Resize = Literal["tensorflow1", "half_pixel"]


@dataclass(frozen=True)
class Network:
    """What computed features: the file of the weights, its SHA-256, and how images came to 299 pixels."""

    weights: str
    sha256: str
    resize: str


@dataclass(frozen=True)
class Extractor:
    """A feature network ready for use on a mesh: parameters on every device, batches cut over all of them.

    features: (params, uint8 [B, H, W, 3]) -> features, traced once for each size of images.
    batch_size: images at a time, rounded up to fit the devices.
    """

    features: Callable[[Any, jax.Array], InceptionFeatures]
    params: Any
    mesh: Mesh
    batch_size: int
    network: Network

    def __call__(self, chunks: Iterable[np.ndarray]) -> Iterator[InceptionFeatures]:
        """The features of uint8 images [n, H, W, C], n as it comes and C = 1 (taken for grey) or 3.

        Yields NumPy arrays, at most a batch at a time. While the devices work on a batch, the caller handles the one before
        and the next one is read. Where there are several processes, each of them gives the same images and gets all features.
        """
        batches = ((batch,) for batch in _batches(chunks, full_batch(self.batch_size, self.mesh)))
        extract = functools.partial(_features, self.features, self.params)
        for _, features in over_batches(extract, batches, self.batch_size, self.mesh):
            yield features


def open_extractor(
    weights: str | os.PathLike | None = None,
    resize: Resize = "tensorflow1",
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Extractor:
    """The FID Inception network.

    Args:
      weights: a file, or a folder that holds it; None: looked for as `release.weights.resolve` does.
      resize: how images come to 299 pixels. ADM's figures, and all others of TensorFlow 1, take "tensorflow1".
      batch_size: images at a time; on a CPU at most `CPU_BATCH`, which changes nothing but the speed.
      mesh: None: all devices.

    Raises InputError where there are no weights or they are damaged.
    """
    found = resolve("fid_inception", weights)
    (path,), (sha256,) = found.files, found.sha256
    params = load_inception(path)
    model = Inception("fc" in params, resize)
    mesh = mesh or parallel.make_mesh(MeshConfig())
    return Extractor(
        features=lambda params, images: model.apply({"params": params}, images),
        params=parallel.put(params, parallel.replicated(mesh)),
        mesh=mesh,
        batch_size=min(batch_size, CPU_BATCH) if jax.default_backend() == "cpu" else batch_size,
        network=Network(str(path), sha256, resize),
    )


@functools.partial(jax.jit, static_argnames="features")
def _features(features: Callable, params: Any, images: jax.Array) -> InceptionFeatures:
    return features(params, jnp.broadcast_to(images, (*images.shape[:3], 3)))


def _batches(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Parts of any length [n, ...] as batches [size, ...]; the last one may be shorter."""
    held, count = [], 0
    for chunk in chunks:
        while count + len(chunk) >= size:
            first, chunk = np.split(chunk, [size - count])
            yield np.concatenate([*held, first])
            held, count = [], 0
        if len(chunk):
            held.append(chunk)
            count += len(chunk)
    if held:
        yield np.concatenate(held)
