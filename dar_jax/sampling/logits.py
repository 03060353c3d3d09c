"""From logits to a token: guidance, temperature, top-k, top-p, draw (paper section 3.4).

Shapes: B batch, V vocabulary, T tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

if TYPE_CHECKING:
    from dar_jax.sampling.settings import Settings


def linear_guidance(num_tokens: int, first: float, last: float) -> np.ndarray:
    """The guidance scale of each token, linear from first to last, both included: float32 [T].

    A first scale of exactly 1 is raised to 1.001 where the last exceeds 1, as in the release.
    """
    if first == 1 and last > 1:
        first = 1.001
    return np.linspace(first, last, num_tokens, dtype=np.float32)


def guide(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """u + scale (c - u) where scale exceeds 1, else c alone; logits [B, V], scale a scalar or one that broadcasts to them."""
    return jnp.where(scale > 1, unconditional + scale * (conditional - unconditional), conditional)


def filter_logits(logits: Array, top_k: Array | None, top_p: Array | None) -> Array:
    """Sets the logits [B, V] of excluded tokens to -inf.

    Args:
      top_k: keep the k largest (and what equals the k-th), a scalar or [B]; None keeps all.
      top_p: keep a token when the probability of those above it is at most p, a scalar or [B]; the first always stays.
        Applied to what top-k left; None keeps all.
    """
    if top_k is not None:
        logits = _keep(logits, lambda above: jnp.sum(above, axis=-1) >= top_k)
    if top_p is not None:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = _keep(logits, lambda above: jnp.sum(jnp.where(above, probabilities, 0), axis=-1) > top_p)
    return logits


def _keep(logits: Array, enough: Callable[[Array], Array]) -> Array:
    """Keeps the logits from a threshold on, the largest with which those kept are `enough` (all, if they never are).

    The threshold is found bit by bit, which takes 32 sums over the vocabulary; sorting it takes many times as long.

    Args: enough, of a set of logits bool [B, V] -> bool [B]; holds for all sets that hold one for which it does.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    ordered = bits ^ jnp.where(bits >> 31 == 1, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))  # integers in the floats' order

    def body(index: Array, threshold: Array) -> Array:
        raised = threshold | (jnp.uint32(0x80000000) >> index.astype(jnp.uint32))
        return jnp.where(enough(ordered >= raised[:, None]), raised, threshold)

    threshold = jax.lax.fori_loop(0, 32, body, jnp.zeros(len(logits), jnp.uint32))
    return jnp.where(ordered < threshold[:, None], -jnp.inf, logits)


def token_keys(keys: Array, position: Array) -> Array:
    """The keys [B] with which the samples of these keys [B] draw the token at `position`, a scalar or [B]."""
    fold = jax.random.fold_in
    return jax.vmap(lambda key, index: fold(fold(key, 1), index))(keys, jnp.broadcast_to(position, keys.shape))


def draw_token(logits: Array, keys: Array, position: Array, tokens: Array, settings: "Settings") -> Array:
    """One token per row, with the temperature and the filters of the settings: int32 [B].

    Args:
      logits: [B, V] float32, guided already.
      keys: [B] PRNG keys, of `token_keys`, one per sample, so that a draw does not depend on the batch around it.
      position, tokens: which token this is (a scalar or [B]), and those so far, [B, T] int32; not looked at here.
    """
    if settings.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, temper(logits, settings)).astype(jnp.int32)


def temper(logits: Array, settings: "Settings") -> Array:
    """Guided logits [B, V] with the temperature, if there is one, and the filters of the settings."""
    if settings.temperature is not None:
        logits = logits / jnp.expand_dims(settings.temperature, -1)
    return filter_logits(logits, settings.top_k, settings.top_p)
