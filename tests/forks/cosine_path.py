"""A curved path from noise to image: x = cos(a) noise + sin(a) data with a = t' pi / 2, which keeps the variance of x at 1.

Times are drawn logit-normally (Esser et al. 2024) and the loss is weighted towards the data. Parts: model (`path`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.experiment import Experiment
from dar_jax.models.flow import Path, over_batch
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.quickstart import TOKENIZER


def angle(t, like):
    return over_batch(t, like) * (jnp.pi / 2)


def at(noise, data, t):
    return jnp.cos(angle(t, data)) * noise + jnp.sin(angle(t, data)) * data


def velocity(noise, data, t):
    return (jnp.pi / 2) * (jnp.cos(angle(t, data)) * data - jnp.sin(angle(t, data)) * noise)


def data(x, velocity, t):
    return jnp.sin(angle(t, x)) * x + jnp.cos(angle(t, x)) * velocity * (2 / jnp.pi)


path = Path(
    shift=lambda t, shift: t / (t + np.sqrt(shift) * (1 - t)),
    at=at,
    velocity=velocity,
    data=data,
    draw=lambda key, shape: jax.nn.sigmoid(jax.random.normal(key, shape)),
    weight=lambda t: 0.5 + t,
)

experiment = Experiment(
    dataclasses.replace(TOKENIZER, name="cosine_path", loss=dataclasses.replace(TOKENIZER.loss, flow_power=0.0)),
    model=lambda config, dtype, remat: Tokenizer(config.model, dtype, remat, path=path),
)
