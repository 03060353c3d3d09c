"""Images -> latents of T ordered tokens (paper section 3.1).

Shapes: B batch, H W pixels, C channels, P patches, T tokens, D width.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import TokenizerConfig
from dar_jax.models.attention import pad_rope, rope_2d
from dar_jax.models.blocks import Block, stack
from dar_jax.models.layers import DType, default_init, layer_norm
from dar_jax.parallel.sharding import constrain


class Encoder(nn.Module):
    """A transformer over [patches; T learned queries]. Patches see patches; a query sees patches and earlier queries."""

    config: TokenizerConfig
    dtype: DType
    remat: str

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] float32 in [-1, 1] -> latents [B, T, code_dim] float32. H and W are multiples of the patch size."""
        config, dtype = self.config, self.dtype
        size = (config.encoder_patch_size,) * 2
        patches = nn.Conv(config.encoder_width, size, size, "VALID", dtype=dtype, kernel_init=default_init, name="patchify")(
            images
        )
        batch, height, width, _ = patches.shape
        patches = layer_norm(False)(patches.reshape(batch, height * width, -1)).astype(dtype)  # [B, P, D]
        queries = jnp.broadcast_to(self._queries().astype(dtype), (batch, config.num_tokens, config.encoder_width))
        x = constrain(jnp.concatenate([patches, queries], axis=1), "stream")  # [B, P + T, D]

        index = jnp.arange(x.shape[1])
        mask = (index < height * width) | (index <= index[:, None])  # [P + T, P + T]
        rope = pad_rope(rope_2d(height, width, config.head_size, config.rope_theta), config.num_tokens)
        blocks = stack(Block, config.encoder_layers, self.remat, shared=3)
        blocks = blocks(config.head_size, config.init_std, config.gate_init, dtype, name="blocks")
        (x, _), _ = blocks((x, None), jnp.arange(config.encoder_layers), rope, mask[None], None)

        x = layer_norm(False)(x[:, -config.num_tokens :])
        x = nn.Dense(config.code_dim, use_bias=False, dtype=dtype, kernel_init=default_init, name="to_code")(x)
        return x.astype(jnp.float32)

    def _queries(self) -> Array:  # [T, D]
        config = self.config
        if config.query_low_rank:
            init, rank = nn.initializers.truncated_normal(1.0), config.query_rank
        else:
            init, rank = nn.initializers.normal(0.02), config.encoder_width
        queries = self.param("query_table", init, (config.max_tokens, rank))[: config.num_tokens]
        if config.query_low_rank:
            linear = nn.Dense(config.encoder_width, dtype=self.dtype, kernel_init=default_init, name="query_linear")
            queries = linear(queries)
        return queries
