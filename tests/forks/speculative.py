"""Lossless speculation without a second network (seeded Jacobi decoding): the very tokens of token by token, in fewer passes.

W guesses are checked in one pass. Each token is drawn with its own noise from the logits that its predecessors give, so the
draws are right up to and including the first that differs from its guess; they are the next guesses. Parts: method.predict.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dar_jax.experiment import Experiment
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.predict import Prediction, Predictor, begin_prediction, draw_each, grown
from dar_jax.sampling.settings import Method

WINDOW = 8


class State(NamedTuple):
    base: Prediction  # the caches have room for the window beyond the last token
    guesses: Any  # [B, T + W] int32
    final: Any  # [B] int32, how many first tokens will not change any more
    passes: Any  # [B] int32

    @property
    def tokens(self):
        return self.guesses[:, :-WINDOW]


def begin(networks, params, settings, *start):
    base = begin_prediction(networks, params, settings, *start)
    base = dataclasses.replace(base, caches=grown(base.caches, base.before + base.tokens.shape[1] + WINDOW))
    count = jnp.full(len(base.tokens), base.done, jnp.int32)
    return State(base, jnp.pad(base.tokens, ((0, 0), (0, WINDOW))), count, jnp.zeros_like(count))


@functools.partial(jax.jit, static_argnums=(0, 4))
def predict(networks, params, settings, state, group):
    bound = networks.transformer.bind({"params": params.transformer.rest})
    base, end = state.base, (group + 1) * networks.tokenizer.config.tokens_per_group
    rows = len(base.last_slot) // len(base.tokens)  # 2 with guidance

    def one_pass(state):
        caches, guesses, final, passes = state
        places = final[:, None] + jnp.arange(WINDOW)
        guessed = jnp.take_along_axis(guesses, places, axis=1)
        previous = jnp.take_along_axis(guesses, jnp.maximum(places - 1, 0), axis=1)
        x = bound.embed(jnp.repeat(previous, rows, axis=0))
        x = jnp.where(jnp.repeat(places, rows, axis=0)[..., None] == 0, base.last_slot, x)
        logits, caches = bound.extend(params.transformer.layers, x, caches, base.before + jnp.repeat(final, rows))
        drawn = draw_each(networks, settings, logits, base.keys, places, guesses[:, :-WINDOW])
        drawn = jnp.where(places < base.num_given[:, None], guessed, drawn)
        right = jnp.cumprod(drawn == guessed, axis=1).sum(axis=1)
        accepted = jnp.minimum(jnp.minimum(right + 1, WINDOW), guesses.shape[1] - WINDOW - final)
        guesses = jax.vmap(lambda row, place, new: row.at[place].set(new))(guesses, places, drawn)
        return caches, guesses, final + accepted, passes + (accepted > 0)

    start = base.caches, *state[1:]
    caches, *rest = jax.lax.while_loop(lambda state: jnp.any(state[2] < end), one_pass, start)
    return State(dataclasses.replace(base, caches=caches), *rest)


config = dataclasses.replace(TRANSFORMER, name="speculative", data=DIGITS)
experiment = Experiment(config, method=Method(predict=Predictor(begin, predict)))
