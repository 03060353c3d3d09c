"""A group of tokens, predicted one by one (paper section 3.3).

Shapes: B batch, T tokens, Q tokens per group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.config import TokenizerConfig
from dar_jax.models import transformer
from dar_jax.models.attention import Cache
from dar_jax.models.transformer import Llama
from dar_jax.parallel.sharding import constrain
from dar_jax.sampling.denoise import sample_keys
from dar_jax.sampling.logits import draw, guide
from dar_jax.sampling.prepare import SamplerParams, Unstacked
from dar_jax.sampling.settings import Networks, Settings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """How far the transformer is. Its caches grow with the groups."""

    labels: Array  # [B] int32
    keys: Array  # [B] PRNG keys
    tokens: Array  # [B, T] int32; those not yet predicted are 0 or given
    num_given: Array  # [B] int32, how many first tokens are given instead of predicted
    caches: tuple[Cache, ...]  # guided: rows 2i and 2i + 1 are sample i with its label and with the null class


def predict_group(
    networks: Networks, params: SamplerParams, settings: Settings, prediction: Prediction, group: int
) -> Prediction:
    """Predicts the tokens of the next group."""
    config = networks.tokenizer.config
    first, last = group * config.tokens_per_group, (group + 1) * config.tokens_per_group
    for start, stop in _spans(first, last, settings.guided):
        sizes = stop - start, _window(config, stop), start < settings.guided
        prediction = _predict(networks.llama, *sizes, params.llama, settings, prediction, jnp.int32(start))
    return prediction


WINDOWS = 8  # lengths of the cache, at most, each of which is compiled


def _spans(first: int, last: int, guided: int) -> list[tuple[int, int]]:
    """The tokens of a group, cut where guidance ends."""
    return [(first, guided), (guided, last)] if first < guided < last else [(first, last)]


def _window(config: TokenizerConfig, stop: int) -> int:
    """Length of the cache for tokens before `stop`: that of the groups so far, rounded up where there are many groups."""
    unit = max(config.tokens_per_group, -(-config.num_tokens // WINDOWS))
    return min(-(-stop // unit) * unit, config.num_tokens)


@functools.partial(jax.jit, static_argnums=0)
def begin_prediction(
    model: Llama, settings: Settings, labels: Array, seeds: Array, prefix: Array | None, num_given: Array | None
) -> Prediction:
    """Before the first token; arguments as of `begin`."""
    batch = len(labels)
    tokens = jnp.zeros((batch, model.config.num_tokens), jnp.int32)
    if prefix is None:
        num_given = jnp.zeros(batch, jnp.int32)
    else:
        tokens = tokens.at[:, : prefix.shape[1]].set(prefix)
        num_given = jnp.full(batch, prefix.shape[1], jnp.int32) if num_given is None else num_given
    caches = transformer.empty_caches(model.config, 2 * batch if settings.guided else batch, 0, model.dtype)
    return Prediction(jnp.asarray(labels, jnp.int32), sample_keys(seeds), tokens, num_given, caches)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _predict(
    model: Llama,
    count: int,
    window: int,
    guided: bool,
    params: Unstacked,
    settings: Settings,
    state: Prediction,
    start: Array,
) -> Prediction:
    """Predicts `count` tokens from `start` on with caches of length `window`."""
    batch, labels = len(state.labels), state.labels
    if guided:  # interleaved, so that on several devices both rows of a sample stay where the sample is
        labels = jnp.stack([labels, jnp.full_like(labels, model.config.num_classes)], axis=1).reshape(-1)

    def fit(leaf: Array) -> Array:
        if len(leaf) > len(labels):  # guidance has ended
            leaf = leaf.reshape(batch, 2, *leaf.shape[1:])[:, 0]
        return constrain(jnp.pad(leaf, ((0, 0), (0, 0), (0, window - leaf.shape[2]), (0, 0))), "cache")

    def body(carry: tuple[Array, tuple[Cache, ...]], offset: Array) -> tuple[tuple[Array, tuple[Cache, ...]], None]:
        tokens, caches = carry
        position = start + offset
        previous = jnp.take(tokens, jnp.maximum(position - 1, 0), axis=1)
        inputs = jnp.repeat(previous, 2) if guided else previous
        step = functools.partial(model.apply, {"params": params.rest}, method="step")
        logits, caches = step(params.layers, labels, inputs, caches, position)
        if guided:
            pairs = logits.reshape(batch, 2, -1)
            logits = guide(pairs[:, 0], pairs[:, 1], settings.scales[position])
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), position))(state.keys)
        drawn = draw(logits, keys, settings.temperature, settings.top_k, settings.top_p)
        token = jnp.where(position < state.num_given, jnp.take(tokens, position, axis=1), drawn)
        return (jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1), caches), None

    carry = (state.tokens, jax.tree.map(fit, state.caches))
    (tokens, caches), _ = jax.lax.scan(body, carry, jnp.arange(count))
    return dataclasses.replace(state, tokens=tokens, caches=caches)
