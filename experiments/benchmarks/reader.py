"""Who reads the images of a benchmark: a classifier of the real ones, and features in which sets of images are compared.

The digits are read by the quickstart's support-vector classifier, and compared in their 64 pixels. For other data a small
convolutional network is trained on the real training images (Fashion-MNIST: about 2 minutes on two CPU cores, once; it is kept
beside the run) and its last hidden layer, of `HIDDEN` numbers, are the features.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from dar_jax.config import DataConfig
from dar_jax.data.sources import held_out, read_all
from dar_jax.evaluation.metrics import frechet_distance, moments, pooled_pixels
from dar_jax.files import replacing
from dar_jax.quickstart import classifier, spread

HIDDEN = 64
EPOCHS, BATCH = 5, 128


@dataclass(frozen=True)
class Reader:
    """classify: uint8 [N, H, W, C] -> classes int [N]; features: -> float [N, D]; the real images, and those held out."""

    classify: Callable[[np.ndarray], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images that are read as their class."""
        return float(np.mean(self.classify(images) == labels))

    def distance(self, images: np.ndarray, others: np.ndarray) -> float:
        """Fréchet distance of the features of two sets of images."""
        return frechet_distance(moments(self.features(images)), moments(self.features(others))).value

    def diversity(self, images: np.ndarray, labels: np.ndarray) -> float:
        """The mean distance of two images of a class, in pixels, over that of two real ones."""
        return spread(images, labels) / spread(self.images, self.labels)


def make_reader(data: DataConfig, keep_in: Path | None = None) -> Reader:
    """The reader of a data set. keep_in: folder where a trained network is kept, and found again."""
    images, labels = read_all(data)
    real, real_labels = read_all(held_out(data))
    sets = (images, labels, real, real_labels)
    if data.source == "digits":
        return Reader(classifier(images, labels), pooled_pixels, *sets)
    model, file = Network(int(labels.max()) + 1), keep_in and keep_in / f"reader_{data.source}_{data.dataset or ''}.npz"
    if file and file.exists():
        params = unflatten_dict(dict(np.load(file)), sep="/")
    else:
        params = train(model, images, labels)
        if file:
            with replacing(file) as partial:
                np.savez(partial.open("wb"), **flatten_dict(params, sep="/"))
    logits, features = (
        functools.partial(in_batches, jax.jit(functools.partial(model.apply, {"params": params}, method=name)))
        for name in ("__call__", "features")
    )
    return Reader(lambda images: logits(images).argmax(-1), features, *sets)


class Network(nn.Module):
    """Two convolutions and a hidden layer."""

    classes: int

    def setup(self):
        self.convolutions = [nn.Conv(width, (3, 3), strides=2) for width in (32, 64)]
        self.hidden, self.out = nn.Dense(HIDDEN), nn.Dense(self.classes)

    def features(self, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        for convolution in self.convolutions:
            x = nn.relu(convolution(x))
        return nn.relu(self.hidden(x.reshape(len(x), -1)))

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.out(self.features(images))


def train(model: Network, images: np.ndarray, labels: np.ndarray) -> dict:
    """Parameters after `EPOCHS` passes over the images, with AdamW and a cosine schedule."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.05)
    params = model.init(jax.random.key(0), images[:1])["params"]
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            params, state = step(params, state, images[rows], labels[rows])
    return params


def in_batches(function: Callable, images: np.ndarray, size: int = 500) -> np.ndarray:
    return np.concatenate([np.asarray(function(images[start : start + size])) for start in range(0, len(images), size)])
