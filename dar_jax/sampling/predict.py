"""The tokens of a group, predicted one by one (paper section 3.3), and the interface of whatever predicts them otherwise.

Shapes: B batch, T tokens, Q tokens per group, n slots of the condition, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.config import TokenizerConfig
from dar_jax.errors import require
from dar_jax.models.attention import Cache
from dar_jax.parallel.sharding import constrain
from dar_jax.sampling.logits import guide, temper, token_keys
from dar_jax.sampling.prepare import SamplerParams

if TYPE_CHECKING:
    from dar_jax.sampling.settings import Networks, Settings

WINDOWS = 8  # lengths of the cache, at most, each of which is compiled


class Predictor(NamedTuple):
    """How the transformer finds tokens.

    begin: (networks, params, settings, condition, seeds [B], prefix [B, k] or None, num_given [B] or None) -> a state, any tree
      of arrays with the batch first that has `tokens` [B, T] int32 and `calls` [B] int32, the passes that each sample took.
    group: (networks, params, settings, state, group) -> the state, in which the tokens of this group are final.
    ahead: tokens of later groups may be final too, so that particles cannot be chosen between groups.
    """

    begin: Callable[..., Any]
    group: Callable[..., Any]
    ahead: bool = False


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["condition", "keys", "tokens", "num_given", "last_slot", "caches", "calls"],
    meta_fields=["before", "done"],
)
@dataclasses.dataclass(frozen=True)
class Prediction:
    """The state of `token_by_token`. Its caches grow with the groups; guided: rows 2i and 2i + 1 are sample i with its own and
    with the null condition."""

    condition: Any  # a tree of [B, ...], labels for instance
    keys: Array  # [B] PRNG keys
    tokens: Array  # [B, T] int32; those not yet predicted are 0 or given
    num_given: Array  # [B] int32, how many first tokens are given instead of predicted
    last_slot: Array  # [B or 2B, 1, D], the condition's last slot, which predicts token 0
    caches: tuple[Cache, ...]
    calls: Array  # [B] int32, passes of the transformer so far
    before: int  # slots of the condition before its last one
    done: int  # the first tokens, whole groups given for all samples, whose slots are in the caches already


def begin_prediction(
    networks: "Networks",
    params: SamplerParams,
    settings: "Settings",
    condition: Any,
    seeds: Array,
    prefix: Array | None = None,
    num_given: np.ndarray | None = None,
) -> Prediction:
    """Before the first group with a token that is not given; arguments as of `sampler.begin`. The groups that are given for all
    samples take one pass together."""
    done = 0
    if prefix is not None:
        done = prefix.shape[1] if num_given is None else int(np.min(num_given))
        done -= done % networks.tokenizer.config.tokens_per_group  # few numbers, each of which is a program
    return _begin(networks, done, params, settings, condition, seeds, prefix, num_given)


def predict_group(
    networks: "Networks", params: SamplerParams, settings: "Settings", prediction: Prediction, group: int
) -> Prediction:
    """Predicts the tokens of a group, one by one."""
    config = networks.tokenizer.config
    first, last = group * config.tokens_per_group, (group + 1) * config.tokens_per_group
    if first < prediction.done:
        return prediction
    prediction = dataclasses.replace(prediction, done=0)  # from here on it is like one that was given nothing
    for start, stop in _spans(first, last, settings.guided):
        sizes = stop - start, _window(config, stop), start < settings.guided
        prediction = _predict(networks, *sizes, params, settings, prediction, jnp.int32(start))
    return prediction


token_by_token = Predictor(begin_prediction, predict_group)


def draw_each(networks: "Networks", settings: "Settings", logits: Array, keys: Array, positions: Array, tokens: Array) -> Array:
    """Draws the tokens at n positions of each sample, each as `token_by_token` would: int32 [B, n].

    Args:
      logits: [B, n, V], or [2B, n, V] in the rows of `with_null`, which are guided here.
      keys: [B] the samples' own keys. positions: [n] or [B, n]. tokens: [B, T], those so far.
    """
    batch, count = len(keys), logits.shape[1]
    positions = jnp.broadcast_to(positions, (batch, count))
    logits = guide_each(settings, logits, batch, positions)
    each = token_keys(jnp.repeat(keys, count), positions.reshape(-1))
    rows = logits.reshape(batch * count, -1), each, positions.reshape(-1), jnp.repeat(tokens, count, axis=0)
    drawn = networks.method.draw(*rows, _repeated(settings, count))
    fits = drawn.shape == each.shape and jnp.issubdtype(drawn.dtype, jnp.integer)
    require(fits, f"method.draw gives {drawn.dtype} {list(drawn.shape)}, it should give int32 [{len(each)}]")
    return drawn.astype(jnp.int32).reshape(batch, count)


def guide_each(settings: "Settings", logits: Array, batch: int, positions: Array) -> Array:
    """The guided logits [B, n, V] of [2B, n, V] in the rows of `with_null`; [B, n, V] are returned as they are.

    positions: [n] or [B, n].
    """
    if len(logits) == batch:
        return logits
    pairs = logits.reshape(batch, 2, *logits.shape[1:])
    positions = jnp.broadcast_to(positions, (batch, logits.shape[1]))
    scales = jnp.broadcast_to(settings.scales, (batch, settings.scales.shape[-1]))
    return guide(pairs[:, 0], pairs[:, 1], jnp.take_along_axis(scales, positions, axis=1)[..., None])


def log_probabilities(settings: "Settings", logits: Array) -> Array:
    """The logarithms of the probabilities with which `draw_each` draws given guided logits: [B, n, V]. Where it takes the most
    probable token (no temperature) they are those of temperature 1."""
    rows = logits.reshape(-1, logits.shape[-1])
    return jax.nn.log_softmax(temper(rows, _repeated(settings, logits.shape[1]))).reshape(logits.shape)


def _repeated(settings: "Settings", count: int) -> "Settings":
    """Settings of each sample for `count` rows of each; those of all samples as they are."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), settings) if settings.scales.ndim == 2 else settings


def with_null(model: Any, condition: Any) -> Any:
    """Each sample's condition and the null one, interleaved, so that on several devices both rows of a sample stay together."""
    pairs = jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1), condition, model.null(condition))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), pairs)


def grown(caches: tuple[Cache, ...], length: int, halved: bool = False) -> tuple[Cache, ...]:
    """The caches with room for `length` slots; `halved`: without the rows of the null condition."""

    def fit(leaf: Array) -> Array:
        leaf = leaf[::2] if halved else leaf
        return constrain(jnp.pad(leaf, ((0, 0), (0, 0), (0, length - leaf.shape[2]), (0, 0))), "cache")

    return jax.tree.map(fit, caches)


def _spans(first: int, last: int, guided: int) -> list[tuple[int, int]]:
    """The tokens of a group, in two parts where guidance ends within it."""
    spans = [(first, guided), (guided, last)] if first < guided < last else [(first, last)]
    return [(start, stop) for start, stop in spans if start < stop]


def _window(config: TokenizerConfig, stop: int) -> int:
    """How many tokens' slots the cache holds for tokens before `stop`: those of the groups so far, rounded up where there are
    many groups."""
    unit = max(config.tokens_per_group, -(-config.num_tokens // WINDOWS))
    return min(-(-stop // unit) * unit, config.num_tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(
    networks: "Networks",
    done: int,
    params: SamplerParams,
    settings: "Settings",
    condition: Any,
    seeds: Array,
    prefix: Array | None,
    num_given: Array | None,
) -> Prediction:
    model, batch = networks.transformer, len(seeds)
    tokens, count = jnp.zeros((batch, model.config.num_tokens), jnp.int32), jnp.zeros(batch, jnp.int32)
    if prefix is not None:
        tokens = tokens.at[:, : prefix.shape[1]].set(prefix)
        count = jnp.full(batch, prefix.shape[1], jnp.int32) if num_given is None else jnp.asarray(num_given, jnp.int32)
    keys = jax.vmap(jax.random.key)(seeds)
    weights = {"params": params.transformer.rest}
    slots = model.apply(weights, with_null(model, condition) if settings.guided else condition, method="prefix")
    before, last = slots.shape[1] - 1, slots[:, -1:]  # slots are [B or 2B, n, D]
    if done:
        previous = jnp.repeat(tokens[:, : done - 1], len(slots) // batch, axis=0)
        x = jnp.concatenate([slots, model.apply(weights, previous, method="embed")], axis=1)
    else:
        x = slots[:, :-1]
    caches = model.empty_caches(len(x), x.shape[1])
    if x.shape[1]:
        _, caches = model.apply(weights, params.transformer.layers, x, caches, jnp.int32(0), method="extend")
    calls = jnp.full(batch, x.shape[1] > 0, jnp.int32)
    return Prediction(condition, keys, tokens, count, last, caches, calls, before, done)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _predict(
    networks: "Networks",
    count: int,
    window: int,
    guided: bool,
    params: SamplerParams,
    settings: "Settings",
    state: Prediction,
    start: Array,
) -> Prediction:
    """Predicts `count` tokens from `start` on with caches for `window` tokens."""
    model, batch = networks.transformer, len(state.tokens)
    weights = {"params": params.transformer.rest}
    halved = not guided and len(state.last_slot) > batch  # guidance has ended
    first = state.last_slot[::2] if halved else state.last_slot

    def body(carry: tuple[Array, tuple[Cache, ...]], offset: Array) -> tuple[tuple[Array, tuple[Cache, ...]], None]:
        tokens, caches = carry
        position = start + offset
        previous = jnp.take(tokens, jnp.maximum(position - 1, 0), axis=1)[:, None]
        embedded = model.apply(weights, jnp.repeat(previous, 2, axis=0) if guided else previous, method="embed")
        x = jnp.where(position == 0, first, embedded)
        logits, caches = model.apply(weights, params.transformer.layers, x, caches, state.before + position, method="extend")
        token = draw_each(networks, settings, logits, state.keys, position[None], tokens)[:, 0]
        token = jnp.where(position < state.num_given, jnp.take(tokens, position, axis=1), token)
        return (jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1), caches), None

    carry = (state.tokens, grown(state.caches, state.before + window, halved))
    (tokens, caches), _ = jax.lax.scan(body, carry, jnp.arange(count))
    return dataclasses.replace(state, tokens=tokens, caches=caches, last_slot=first, calls=state.calls + count)
