"""Lossless speculation without a second network (seeded Jacobi decoding): the very tokens of token by token, in fewer passes.

Each of W guesses is drawn again, with its own noise, in one pass. Draws are right up to the first that differs from its guess.
Parts: method.predict.
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
    tokens: Any  # [B, T + W] int32, first final ones, then guesses
    final: Any  # [B] int32, how many are final


def begin(*arguments):
    base = begin_prediction(*arguments)
    base = dataclasses.replace(base, caches=grown(base.caches, base.before + base.tokens.shape[1] + WINDOW))
    final = jnp.full(len(base.tokens), base.done, jnp.int32)
    return State(base, jnp.pad(base.tokens, ((0, 0), (0, WINDOW))), final)


@functools.partial(jax.jit, static_argnums=(0, 4))
def predict(networks, params, settings, state, group):
    bound = networks.transformer.bind({"params": params.transformer.rest})
    base, end = state.base, (group + 1) * networks.tokenizer.config.tokens_per_group
    rows = len(base.last_slot) // len(base.tokens)  # 2 with guidance

    def one_pass(state):
        caches, tokens, final = state
        places = final[:, None] + jnp.arange(WINDOW)
        guessed = jnp.take_along_axis(tokens, places, axis=1)
        previous = jnp.take_along_axis(tokens, jnp.maximum(places - 1, 0), axis=1)
        x, first = bound.embed(jnp.repeat(previous, rows, axis=0)), jnp.repeat(places, rows, axis=0)[..., None] == 0
        x = jnp.where(first, base.last_slot, x)
        logits, caches = bound.extend(params.transformer.layers, x, caches, base.before + jnp.repeat(final, rows))
        drawn = draw_each(networks, settings, logits, base.keys, places, tokens)
        drawn = jnp.where(places < base.num_given[:, None], guessed, drawn)
        right = 1 + jnp.cumprod(drawn == guessed, axis=1)[:, :-1].sum(axis=1)  # the first that differs is right too
        tokens = jax.vmap(lambda row, place, new: row.at[place].set(new))(tokens, places, drawn)
        return caches, tokens, jnp.minimum(final + right, tokens.shape[1] - WINDOW)

    caches, *rest = jax.lax.while_loop(lambda state: jnp.any(state[2] < end), one_pass, (base.caches, *state[1:]))
    return State(dataclasses.replace(base, caches=caches), *rest)


config = dataclasses.replace(TRANSFORMER, name="speculative", data=DIGITS)
experiment = Experiment(config, method=Method(predict=Predictor(begin, predict)))
