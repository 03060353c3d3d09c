"""Quantised tokens -> condition tokens (paper section 3.2). Causal, so the tokens of a group need no later ones.

Shapes: B batch, T tokens (here possibly a part of them), D width.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import TokenizerConfig
from dar_jax.models.attention import Cache, causal_mask
from dar_jax.models.blocks import Block, run_cached, stack
from dar_jax.models.layers import DType, default_init, layer_norm
from dar_jax.parallel.sharding import constrain


class TokenDecoder(nn.Module):
    """Causal transformer over all tokens at once, or piece by piece with caches."""

    config: TokenizerConfig
    dtype: DType
    remat: str

    def setup(self):
        config = self.config
        shape = (config.max_tokens, config.decoder_width)
        self.position_table = self.param("position_table", nn.initializers.normal(0.02), shape)
        self.from_code = nn.Dense(config.decoder_width, use_bias=False, dtype=self.dtype, kernel_init=default_init)
        self.block = (config.head_size, config.init_std, config.gate_init, self.dtype)
        self.blocks = stack(Block, config.decoder_layers, self.remat, shared=3)(*self.block)
        self.norm = layer_norm(False)

    def __call__(self, values: Array) -> Array:
        """values [B, T, code_dim] -> condition tokens [B, T, D] float32."""
        length = values.shape[1]
        shared = (None, causal_mask(length, length), None)
        (x, _), _ = self.blocks((self._embed(values, 0), None), jnp.arange(self.config.decoder_layers), *shared)
        return self.norm(x)

    def step(
        self, layers: Sequence[Any], values: Array, caches: Sequence[Cache], position: Array
    ) -> tuple[Array, tuple[Cache, ...]]:
        """The same for the n tokens from `position` on, given the caches of those before.

        Args: layers, `blocks.unstack` of the blocks' parameters; values [B, n, code_dim]; caches of each layer.
        Returns: [B, n, D] float32 and the new caches.
        """
        shared = (None, causal_mask(values.shape[1], caches[0].keys.shape[2], position), position)
        x, caches = run_cached(Block(*self.block, parent=None), layers, caches, self._embed(values, position), *shared)
        return self.norm(x), caches

    def _embed(self, values: Array, position: Array | int) -> Array:
        positions = jax.lax.dynamic_slice_in_dim(self.position_table, position, values.shape[1])
        return constrain(self.from_code(values) + positions.astype(self.dtype), "stream")
