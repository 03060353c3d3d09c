"""A watermark in the tokens: a secret half of the codebook, another one after each code, is favoured in every draw.

`z_score` tells it by the codes and the secret alone (about 0 without a watermark). Parts: method.draw.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dar_jax.experiment import Experiment
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.logits import draw_token
from dar_jax.sampling.settings import Method

SECRET, STRENGTH = 2025, 2.0  # STRENGTH is added to the favoured logits


def favoured(previous, size):
    """Which of `size` codes are favoured after these codes [...]: bool [..., size]."""
    if jnp.ndim(previous):
        return jax.vmap(lambda code: favoured(code, size))(previous)
    return jax.random.bernoulli(jax.random.fold_in(jax.random.key(SECRET), previous), 0.5, (size,))


def draw(logits, keys, position, tokens, settings):
    before = jnp.broadcast_to(jnp.maximum(position - 1, 0), keys.shape)  # the first code has itself as a stand-in, a 0
    previous = jnp.take_along_axis(tokens, before[:, None], axis=1)[:, 0]
    return draw_token(logits + STRENGTH * favoured(previous, logits.shape[1]), keys, position, tokens, settings)


def z_score(tokens, size):
    """By how many standard deviations tokens [N, T] of a codebook of this size follow favoured codes too often."""
    hits = jnp.take_along_axis(favoured(tokens[:, :-1], size), tokens[:, 1:, None], axis=2)
    return (hits.sum() - hits.size / 2) / (hits.size / 4) ** 0.5


experiment = Experiment(dataclasses.replace(TRANSFORMER, name="watermark", data=DIGITS), method=Method(draw=draw))
