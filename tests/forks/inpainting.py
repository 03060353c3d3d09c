"""Inpainting: in the observed part of the image the velocity leads to what is observed, elsewhere it is the network's.

`observed` is {"image": [B, H, W, C] in [-1, 1], "mask": 1 where it counts}; the ordinary commands, which give none, take the
upper half of one test digit for all samples. Parts: method.steer.
"""

import dataclasses

import jax.numpy as jnp

from dar_jax.data.sources import DigitsSource
from dar_jax.experiment import Experiment
from dar_jax.models.flow import over_batch
from dar_jax.models.pixels import to_float
from dar_jax.quickstart import DIGITS, TOKENIZER, TRANSFORMER
from dar_jax.sampling.settings import Method


def upper_half(image):
    """The observation of images [B, H, W, C] in [-1, 1]: their upper halves."""
    rows = jnp.arange(image.shape[1]) < image.shape[1] // 2
    return {"image": image, "mask": jnp.broadcast_to(rows[:, None, None], image.shape).astype(jnp.float32)}


DEFAULT = upper_half(to_float(DigitsSource("test", channels=1)[0]["image"])[None])


def steer(velocity, x, t, observed):
    observed = DEFAULT if observed is None else observed
    target = TOKENIZER.model.velocity.data_std * observed["image"]
    towards = (target - x) / over_batch(1 - t, x)  # of the straight path from here to what is observed
    return observed["mask"] * towards + (1 - observed["mask"]) * velocity(x, t)


experiment = Experiment(dataclasses.replace(TRANSFORMER, name="inpainting", data=DIGITS), method=Method(steer=steer))
