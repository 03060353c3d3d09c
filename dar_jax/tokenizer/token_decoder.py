"""Quantised tokens -> condition tokens (paper section 3.2). Causal, so the tokens of a group need no later ones.

Shapes: B batch, T tokens (here possibly a part of them), D width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dar_jax.config import TokenizerConfig
from dar_jax.layers import Array, Block, Cache, DType, causal_mask, constrain, default_init, layer_norm, stack


class TokenDecoder(nn.Module):
    """Causal transformer over the tokens, whole (no cache) or piece by piece (with one)."""

    config: TokenizerConfig
    dtype: DType
    remat: str

    @nn.compact
    def __call__(self, values: Array, cache: Cache | None = None, position: Array | int = 0) -> tuple[Array, Cache | None]:
        """values [B, n, code_dim] of the tokens from `position` on -> condition tokens [B, n, D] float32, and the cache."""
        config, length = self.config, values.shape[1]
        table = self.param("position_table", nn.initializers.normal(0.02), (config.max_tokens, config.decoder_width))
        x = nn.Dense(config.decoder_width, use_bias=False, dtype=self.dtype, kernel_init=default_init, name="from_code")(values)
        x = constrain(x + jax.lax.dynamic_slice_in_dim(table, position, length).astype(self.dtype), "stream")
        mask = causal_mask(length, length if cache is None else config.num_tokens, position)
        blocks = stack(Block, config.decoder_layers, self.remat, shared=3)
        blocks = blocks(config.head_size, config.init_std, config.gate_init, self.dtype, name="blocks")
        (x, cache), _ = blocks((x, cache), jnp.arange(config.decoder_layers), None, mask, position)
        return layer_norm(False)(x), cache


def empty_cache(config: TokenizerConfig, batch: int, dtype: DType) -> Cache:
    """A cache for decoding the tokens of `batch` images piece by piece."""
    heads = config.decoder_width // config.head_size
    return Cache.zeros(config.decoder_layers, batch, config.num_tokens, heads, config.head_size, dtype)
