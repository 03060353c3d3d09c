"""From logits to a token: guidance, temperature, top-k, top-p, draw (paper section 3.4).

Shapes: B batch, V vocabulary, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.layers import Array


def linear_guidance(num_tokens: int, first: float, last: float) -> np.ndarray:
    """The guidance scale of each token, linear from first to last, both included: float32 [T].

    A first scale of exactly 1 is raised to 1.001 where the last exceeds 1, as in the release.
    """
    if first == 1 and last > 1:
        first = 1.001
    return np.linspace(first, last, num_tokens, dtype=np.float32)


def guide(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """u + scale (c - u) where scale exceeds 1, else c alone; logits [B, V], scale a scalar."""
    return jnp.where(scale > 1, unconditional + scale * (conditional - unconditional), conditional)


def filter_logits(logits: Array, top_k: Array | None, top_p: Array | None) -> Array:
    """Sets the logits [B, V] of excluded tokens to -inf.

    Args:
      top_k: keep the k largest (and what equals the k-th); None keeps all.
      top_p: keep a token when the probability of those before it, sorted, is at most p; the first always stays. Applied to
        what top-k left; None keeps all.
    """
    if top_k is None and top_p is None:
        return logits
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    threshold = jnp.full(logits.shape[:-1] + (1,), -jnp.inf)
    if top_k is not None:
        threshold = jnp.take(ordered, jnp.minimum(top_k, logits.shape[-1]) - 1, axis=-1)[..., None]
        ordered = jnp.where(ordered < threshold, -jnp.inf, ordered)
    if top_p is not None:
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before <= top_p).at[..., 0].set(True) & (ordered > -jnp.inf)
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def draw(logits: Array, keys: Array, temperature: Array | None, top_k: Array | None, top_p: Array | None) -> Array:
    """One token per row: int32 [B].

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys, one per sample, so that a draw does not depend on the batch around it.
      temperature: divides the logits; None takes the largest instead of drawing.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = filter_logits(logits / temperature, top_k, top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
