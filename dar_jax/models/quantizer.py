"""Latents -> codes: the nearest row of a codebook, both on the unit sphere (paper section 3.1).

Shapes: B batch, T tokens, V codebook size, E code dimension.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import TokenizerConfig, TokenizerLossConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """The output of the bottleneck.

    values [B, T, E] float32 go on to the decoder (their gradient goes straight through to `latents`); latents [B, T, E] are
    the inputs as they are compared; entries [B, T, E] what was chosen; codes [B, T] int32 its index. A continuous tokenizer
    has neither entries nor codes.
    """

    values: Array
    latents: Array
    entries: Array | None
    codes: Array | None


def normalize(x: Array) -> Array:
    """x / |x| along the last axis, with gradient 0 at 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def similarity(latents: Array, rows: Array) -> Array:
    """Cosines [..., V] of normalised latents [..., E] and rows [V, E], in full float32 on every device."""
    return jnp.einsum("...e,ve->...v", latents, rows, precision=jax.lax.Precision.HIGHEST)


def _codebook_init(key: Array, shape: tuple[int, int]) -> Array:
    return normalize(jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0]))


class Quantizer(nn.Module):
    """The codebook. A fork may hand another bottleneck to `Tokenizer(quantizer=...)`, with these methods and its own losses."""

    config: TokenizerConfig

    def setup(self):
        self.codebook = self.param("codebook", _codebook_init, (self.config.codebook_size, self.config.code_dim))

    def __call__(self, latents: Array) -> Quantized:
        """latents [B, T, E] -> codes and values."""
        latents = normalize(latents)
        codes = jnp.argmax(similarity(latents, self.rows()), axis=-1).astype(jnp.int32)
        entries = self.lookup(codes)
        return Quantized(latents + jax.lax.stop_gradient(entries - latents), latents, entries, codes)

    def lookup(self, codes: Array) -> Array:
        """codes [...] int32 -> values [..., E] float32, here normalised rows of the codebook."""
        return self.rows()[codes]

    def losses(self, quantized: Quantized, config: TokenizerLossConfig) -> dict[str, Array]:
        """The weighted terms of the loss that are this bottleneck's own: each [B, T], a number for every token, or a scalar."""
        stop = jax.lax.stop_gradient

        def distance(a: Array, b: Array) -> Array:
            return jnp.square(a - b).mean(-1)  # [B, T]

        terms = {
            "codebook": config.codebook * distance(quantized.entries, stop(quantized.latents)),
            "commitment": config.commitment * distance(stop(quantized.entries), quantized.latents),
        }
        if config.entropy != 0:
            affinity = 2 * similarity(quantized.latents, self.rows()).reshape(-1, self.config.codebook_size)
            terms["entropy"] = config.entropy * entropy_loss(affinity, config.entropy_temperature)
        return terms

    def rows(self) -> Array:
        """The normalised codebook [V, E]."""
        return normalize(self.codebook)


class Normalize(nn.Module):
    """The bottleneck of a continuous tokenizer (`vq_enable` false): latents are only normalised."""

    config: TokenizerConfig

    def __call__(self, latents: Array) -> Quantized:
        latents = normalize(latents)
        return Quantized(latents, latents, None, None)

    def losses(self, quantized: Quantized, config: TokenizerLossConfig) -> dict[str, Array]:
        return {}


def entropy_loss(affinity: Array, temperature: float) -> Array:
    """Mean entropy of each token's soft code minus the entropy of their mean: low when tokens are sure and codes all used.

    Args: affinity [tokens, V], minus the squared distances up to a constant.
    """
    log_probabilities = jax.nn.log_softmax(affinity / temperature, axis=-1)
    probabilities = jnp.exp(log_probabilities)
    mean = probabilities.mean(axis=0)
    each = -jnp.sum(probabilities * log_probabilities, axis=-1).mean()
    return each + jnp.sum(mean * jnp.log(mean + 1e-5))
