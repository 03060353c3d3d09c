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

CPU_BATCH = 8  # its activations stay in a processor's caches: two cores do 11 images/s, with 64 they do 7

Resize = Literal["tensorflow1", "half_pixel"]


@dataclass(frozen=True)
class Network:
    """The network that computed features: the file of its weights, its SHA-256, and how images were resized to 299 x 299."""

    weights: str
    sha256: str
    resize: str


@dataclass(frozen=True)
class Extractor:
    """A feature network on a mesh: parameters on every device, batches sharded over all of them.

    features: (params, uint8 [B, H, W, 3]) -> features, traced once for each size of images.
    batch_size: images at a time, rounded up to fit the devices.
    """

    features: Callable[[Any, jax.Array], InceptionFeatures]
    params: Any
    mesh: Mesh
    batch_size: int
    network: Network

    def __call__(self, chunks: Iterable[np.ndarray]) -> Iterator[InceptionFeatures]:
        """The features of uint8 images [n, H, W, C], any n, C = 1 (grey) or 3.

        Yields NumPy arrays, at most a batch at a time, see `over_batches`.
        """
        size = full_batch(self.batch_size, self.mesh)
        batches = ((None, (batch,)) for batch in _batches(chunks, size))
        extract = functools.partial(_features, self.features, self.params)
        for _, features in over_batches(extract, batches, size, self.mesh):
            yield features


def open_extractor(
    weights: str | os.PathLike | None = None,
    resize: Resize = "tensorflow1",
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> Extractor:
    """The FID Inception network.

    Args:
      weights: a file, or a folder that holds it; None: the file that `published.resolve` finds.
      resize: how images are resized to 299 x 299. ADM's figures, and all others of TensorFlow 1, take "tensorflow1".
      batch_size: images at a time; on a CPU at most `CPU_BATCH`, which changes nothing but the speed.
      mesh: None: all devices.

    Raises InputError where there are no weights or they are damaged.
    """
    resolved = resolve("fid_inception", weights)
    (path,), (sha256,) = resolved.files, resolved.sha256
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
    """Chunks [n, ...] of any length as batches [size, ...]; the last one may be shorter."""
    batch = None
    for chunk in chunks:
        batch = chunk if batch is None else np.concatenate([batch, chunk])
        while len(batch) >= size:
            yield batch[:size]
            batch = batch[size:]
    if batch is not None and len(batch):
        yield batch
