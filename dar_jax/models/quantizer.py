"""Latents -> codes: the nearest row of a codebook, both on the unit sphere (paper section 3.1).

Shapes: B batch, T tokens, V codebook size, E code dimension.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import TokenizerConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """What the bottleneck makes of latents.

    values [B, T, E] float32 go on to the decoder (their gradient goes straight through to `latents`); latents [B, T, E] are
    the normalised inputs; entries [B, T, E] the chosen rows; codes [B, T] int32 their indices. A continuous tokenizer has
    neither entries nor codes.
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
    """The codebook; with `vq_enable` off there is none, and latents are only normalised."""

    config: TokenizerConfig

    def setup(self):
        if self.config.vq_enable:
            self.codebook = self.param("codebook", _codebook_init, (self.config.codebook_size, self.config.code_dim))

    def __call__(self, latents: Array) -> Quantized:
        latents = normalize(latents)
        if not self.config.vq_enable:
            return Quantized(latents, latents, None, None)
        codes = jnp.argmax(similarity(latents, self.rows()), axis=-1).astype(jnp.int32)
        entries = self.lookup(codes)
        return Quantized(latents + jax.lax.stop_gradient(entries - latents), latents, entries, codes)

    def rows(self) -> Array:
        """The normalised codebook [V, E]."""
        return normalize(self.codebook)

    def lookup(self, codes: Array) -> Array:
        """codes [...] int32 -> normalised rows [..., E]."""
        return self.rows()[codes]
