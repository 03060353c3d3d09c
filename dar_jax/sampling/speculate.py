"""Lossless speculation with common noise: the very tokens of one by one, for every seed, in fewer passes of the transformer.

Jacobi decoding with fixed noise (MC-SJD, arXiv 2510.24211) and drafter-invariant speculation (arXiv 2408.07978). A token is the
argmax of logits plus noise that belongs to its seed and position. The guesses of a window are scored in one pass, each drawn
again with its own noise: draws are right up to and including the first that differs from its guess, because only right tokens
came before it. The other draws are the next guesses. Windows cross the borders of groups; a group waits for the slowest sample
of the batch, while the others go on.

Shapes: B batch, T tokens, W guesses of a window, R further slots behind them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.models.attention import Cache
from dar_jax.sampling.predict import Prediction, Predictor, draw_each, grown, token_by_token
from dar_jax.sampling.prepare import SamplerParams

if TYPE_CHECKING:
    from dar_jax.sampling.settings import Networks, Settings

Drafter = Callable[["Networks", SamplerParams], tuple["Networks", SamplerParams]]


class Speculation(NamedTuple):
    """The state: guesses stand behind the final tokens of each sample."""

    base: Prediction  # its caches have room for a window beyond the last token
    draft: Prediction | None
    tokens: Array  # [B, T + W + R] int32, first final ones, then guesses
    final: Array  # [B] int32, how many are final
    calls: Array  # [B] int32, passes that each sample has needed


@functools.cache
def speculation(
    window: int, room: int = 0, drafter: Drafter | None = None, adapt: Callable[..., tuple[Array, Any]] | None = None
) -> Predictor:
    """A predictor with `window` guesses a pass, which are the last pass's own draws.

    Args:
      drafter: (networks, params) -> the same with another transformer, which draws the guesses one by one before each pass.
      room: slots of each pass behind the guesses, whose draws are guesses too.
      adapt: (bound transformer, inputs [B, W + R, D], first slots [B], slots of the cache) -> inputs and the attention's mask;
        None: every slot reads a token and sees those before it.
    """
    parts = window, room, drafter, adapt
    return Predictor(functools.partial(_begin, *parts), functools.partial(_predict, *parts), ahead=True)


def _begin(
    window: int, room: int, drafter: Drafter | None, adapt: Any, networks: "Networks", params: SamplerParams, *arguments: Any
) -> Speculation:
    room += window

    def begin_with_room(networks: "Networks", params: SamplerParams) -> Prediction:
        start = token_by_token.begin(networks, params, *arguments)
        return dataclasses.replace(start, caches=grown(start.caches, start.before + start.tokens.shape[1] + room))

    base = begin_with_room(networks, params)
    draft = begin_with_room(*drafter(networks, params)) if drafter else None
    final = jnp.full(len(base.tokens), base.done, jnp.int32)
    return Speculation(base, draft, jnp.pad(base.tokens, ((0, 0), (0, room))), final, jnp.zeros_like(final))


def _draw(
    networks: "Networks",
    params: SamplerParams,
    settings: "Settings",
    state: Prediction,
    caches: tuple[Cache, ...],
    tokens: Array,
    places: Array,
    adapt: Any = None,
) -> tuple[Array, tuple[Cache, ...]]:
    """The tokens at consecutive places [B, n] of each sample, drawn in one pass given those before: [B, n], and the caches."""
    bound = networks.transformer.bind({"params": params.transformer.rest})
    rows = len(state.last_slot) // len(tokens)  # 2 while guided
    previous = jnp.repeat(jnp.take_along_axis(tokens, jnp.maximum(places - 1, 0), axis=1), rows, axis=0)
    x = jnp.where(jnp.repeat(places, rows, axis=0)[..., None] == 0, state.last_slot, bound.embed(previous))
    slots = state.before + jnp.repeat(places[:, 0], rows)
    x, mask = adapt(bound, x, slots, caches[0].keys.shape[2]) if adapt else (x, None)
    logits, caches = bound.extend(params.transformer.layers, x, caches, slots, mask)
    drawn = draw_each(networks, settings, logits, state.keys, places, tokens)
    given = places < state.num_given[:, None]
    return jnp.where(given, jnp.take_along_axis(tokens, places, axis=1), drawn), caches


def _put(tokens: Array, places: Array, new: Array) -> Array:
    return jax.vmap(lambda row, place, values: row.at[place].set(values))(tokens, places, new)


def _unguided(state: Prediction) -> Prediction:
    """The state without the rows of the null condition."""
    caches = grown(state.caches, state.caches[0].keys.shape[2], halved=True)
    return dataclasses.replace(state, caches=caches, last_slot=state.last_slot[::2])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 8))
def _predict(
    window: int,
    room: int,
    drafter: Drafter | None,
    adapt: Any,
    networks: "Networks",
    params: SamplerParams,
    settings: "Settings",
    state: Speculation,
    group: int,
) -> Speculation:
    per_group = networks.tokenizer.config.tokens_per_group
    end, total = (group + 1) * per_group, settings.num_groups * per_group
    base, draft = state.base, state.draft
    if group * per_group >= settings.guided and len(base.last_slot) > len(state.tokens):
        base, draft = _unguided(base), draft and _unguided(draft)

    def draft_window(tokens: Array, caches: Any, final: Array) -> tuple[Array, Any]:
        def step(carry: tuple[Array, Any], offset: Array) -> tuple[tuple[Array, Any], None]:
            tokens, caches = carry
            places = final[:, None] + offset
            new, caches = _draw(*drafter(networks, params), settings, draft, caches, tokens, places)
            return (_put(tokens, places, new), caches), None

        return jax.lax.scan(step, (tokens, caches), jnp.arange(window))[0]

    def one_pass(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        caches, draft_caches, tokens, final, calls = carry
        if drafter:
            tokens, draft_caches = draft_window(tokens, draft_caches, final)
        places = final[:, None] + jnp.arange(window + room)
        new, caches = _draw(networks, params, settings, base, caches, tokens, places, adapt)
        same = (new == jnp.take_along_axis(tokens, places, axis=1))[:, : window - 1]
        right = 1 + jnp.cumprod(same, axis=1).sum(axis=1)  # the first that differs is right too
        final_then = jnp.minimum(final + right, tokens.shape[1] - window - room)
        return caches, draft_caches, _put(tokens, places, new), final_then, calls + (final < total)

    start = (base.caches, draft and draft.caches, state.tokens, state.final, state.calls)
    caches, draft_caches, *rest = jax.lax.while_loop(lambda carry: jnp.any(carry[3] < end), one_pass, start)
    draft = draft and dataclasses.replace(draft, caches=draft_caches)
    return Speculation(dataclasses.replace(base, caches=caches), draft, *rest)
