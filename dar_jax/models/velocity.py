"""The velocity network v(x_t, t', condition tokens of the step) in pixel space (paper section 3.2).

Shapes: B batch, H W pixels, C channels, h w pixel tokens along the sides, P = h w, Q condition tokens, D width.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import TokenizerConfig, VelocityConfig
from dar_jax.models.attention import Attention, Rope, rope_2d
from dar_jax.models.blocks import stack
from dar_jax.models.layers import DType, Mlp, default_init, layer_norm, matrix_init
from dar_jax.parallel.sharding import constrain


def time_features(t: Array, width: int, max_period: float = 10000.0) -> Array:
    """Cosines, then sines, of 1000 t at `width / 2` frequencies: [B] -> [B, width] float32."""
    half = width // 2
    angles = 1000 * t[:, None] * jnp.exp(-jnp.log(max_period) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TwoLayers(nn.Module):
    """Linear, SiLU, linear, all of one width: the time and condition embeddings."""

    init_std: float | None
    dtype: DType

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, x.shape[-1], dtype=self.dtype, kernel_init=matrix_init(self.init_std))
        return dense(name="out")(nn.silu(dense(name="in")(x)))


def zero_dense(features: int | tuple[int, int], dtype: DType, name: str) -> nn.DenseGeneral:
    """A linear that starts at zero. Features of two axes keep what is split apart later on an axis of its own."""
    return nn.DenseGeneral(features, dtype=dtype, kernel_init=nn.initializers.zeros, name=name)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    return x * (1 + scale) + shift


class VelocityBlock(nn.Module):
    """Self attention and MLP whose shifts, scales and gates come, per pixel token, from time and the condition tokens."""

    config: VelocityConfig
    init_std: float | None
    dtype: DType

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array | None],
        layer: Array,
        time: Array,
        condition: Array,
        rope: Rope,
    ) -> tuple[tuple[Array, Array | None], None]:
        x, tap = carry  # [B, P, D]
        config, dtype, width = self.config, self.dtype, x.shape[-1]
        if tap is not None:
            tap = jnp.where(layer == config.repa_layer, x, tap)
        norm = layer_norm(False)
        embed = functools.partial(TwoLayers, self.init_std, dtype)
        attention = functools.partial(Attention, config.head_size, self.init_std, dtype)

        if not config.share_time_encoding:
            time = embed(name="time_embedding")(time)  # [B, D], or [1, D] for all
        condition = norm(embed(name="condition_embedding")(condition))  # [B, Q, D]
        mixed, _ = attention(name="cross_attention")(norm(x), condition, rope)
        modulation = zero_dense((6, width), dtype, "modulation")(nn.silu(time[:, None] + mixed))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(modulation, -2, 0)  # [B, P, D] each

        out, _ = attention(name="attention")(modulate(norm(x).astype(dtype), shift1, scale1), None, rope)
        x = x + gate1 * out
        x = x + gate2 * Mlp(self.init_std, dtype, name="mlp")(modulate(norm(x).astype(dtype), shift2, scale2))
        return (constrain(x, "stream"), tap), None


class VelocityNetwork(nn.Module):
    """Space-to-depth, a stack of `VelocityBlock`s, depth-to-space; an optional head for REPA."""

    config: TokenizerConfig
    dtype: DType
    remat: str

    @nn.compact
    def __call__(self, x: Array, t: Array, condition: Array, return_repa: bool = False) -> tuple[Array, Array | None]:
        """The velocity at x, and the REPA features where they are asked for.

        Args:
          x: [B, H, W, C] float32, scaled pixels.
          t: [B] float32, shifted time; or [1], the time of all.
          condition: [B, Q, decoder width], the condition tokens of this step.
          return_repa: compute the REPA head too, on the input of block `repa_layer`.

        Returns: [B, H, W, C] float32, and [B, (grid)^2, repa_width] float32 or None.
        Raises: ValueError where REPA is asked of a network without it.
        """
        config, dtype = self.config.velocity, self.dtype
        if return_repa and not config.has_repa:
            raise ValueError(f"velocity.repa_layer {config.repa_layer} is no block of a network of {config.layers} layers")
        dense = functools.partial(nn.Dense, dtype=dtype, kernel_init=default_init)
        embed = functools.partial(TwoLayers, self.config.init_std, dtype)

        time = time_features(t, config.width).astype(dtype)
        if config.share_time_encoding:
            time = embed(name="time_embedding")(time)
        condition = layer_norm(False)(dense(config.width, name="condition_in")(condition)).astype(dtype)

        batch, height, width, channels = x.shape
        p, h, w = config.patch_size, height // config.patch_size, width // config.patch_size
        patches = x.reshape(batch, h, p, w, p, channels).transpose(0, 1, 3, 5, 2, 4).reshape(batch, h * w, -1)
        tokens = dense(config.width, name="patch_in")(patches)
        tokens = constrain(tokens, "stream")  # [B, P, D]

        blocks = stack(VelocityBlock, config.layers, self.remat, shared=3)(config, self.config.init_std, dtype, name="blocks")
        rope = rope_2d(h, w, config.head_size, self.config.rope_theta)
        tap = tokens if return_repa else None
        (tokens, tap), _ = blocks((tokens, tap), jnp.arange(config.layers), time, condition, rope)

        tokens = layer_norm(False)(tokens).astype(dtype)
        if config.mlp_head:
            shift, scale = jnp.moveaxis(zero_dense((2, config.width), dtype, "head_modulation")(nn.silu(time)), -2, 0)
            tokens = modulate(tokens, shift[:, None], scale[:, None])
        out = zero_dense(p * p * channels, dtype, "patch_out")(tokens).astype(jnp.float32)
        out = out.reshape(batch, h, w, channels, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(x.shape)

        if config.repa_layer is None:
            return out, None
        head = RepaHead(config, dtype, name="repa")
        if return_repa:
            return out, head(tap, h, w)
        if self.is_initializing():
            head(tokens, h, w)
        return out, None


class RepaHead(nn.Module):
    """Average-pools the tapped tokens to a grid and maps them to the features of a frozen network (REPA)."""

    config: VelocityConfig
    dtype: DType

    @nn.compact
    def __call__(self, tokens: Array, height: int, width: int) -> Array:
        stride = max(1, height // self.config.repa_grid)
        x = nn.avg_pool(tokens.reshape(len(tokens), height, width, -1), (stride, stride), (stride, stride))
        x = x.reshape(len(tokens), -1, x.shape[-1])
        sizes = (self.config.repa_hidden, self.config.repa_hidden, self.config.repa_width)
        for index, size in enumerate(sizes):
            x = nn.Dense(size, dtype=self.dtype, kernel_init=default_init, name=f"linear{index}")(x)
            x = nn.silu(x) if index < 2 else x
        return x.astype(jnp.float32)
