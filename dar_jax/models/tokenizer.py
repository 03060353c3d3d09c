"""The tokenizer: encoder, quantizer, token decoder and velocity network put together (paper sections 3.1 and 3.2).

Shapes: B batch, H W pixels, C channels, T tokens, Q tokens per step, E code dimension, D width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import TokenizerConfig
from dar_jax.models import flow
from dar_jax.models.attention import Cache
from dar_jax.models.encoder import Encoder
from dar_jax.models.layers import DType
from dar_jax.models.quantizer import Quantized, Quantizer
from dar_jax.models.token_decoder import TokenDecoder
from dar_jax.models.velocity import VelocityNetwork


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenizerOutput:
    """One training pass: the quantised tokens, the velocity and its target [B, H, W, C], the clean image it points to
    [B, H, W, C] in [-1, 1], the REPA features or None, the rows of the codebook [V, E] or None, and how many tokens,
    counted from the first, take part in each image's quantiser losses [B] int32."""

    quantized: Quantized
    velocity: Array
    target: Array
    image: Array
    repa: Array | None
    codebook: Array | None
    tokens_used: Array


class Tokenizer(nn.Module):
    """Call its methods with `model.apply({"params": params}, ..., method="encode")`; `model.init(key, images)` makes the
    parameters for images [1, H, W, C]."""

    config: TokenizerConfig
    dtype: DType = jnp.float32
    remat: str = "none"

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype, self.remat)
        self.quantizer = Quantizer(self.config)
        self.token_decoder = TokenDecoder(self.config, self.dtype, self.remat)
        self.velocity_network = VelocityNetwork(self.config, self.dtype, self.remat, name="velocity")

    def __call__(
        self, images: Array, times: Array | None = None, noise: Array | None = None, return_repa: bool = False
    ) -> TokenizerOutput:
        """The pass of a training step.

        Args:
          images: [B, H, W, C] float32 in [-1, 1].
          times: [B] float32 in [0, 1], before the shift (default 0).
          noise: standard normal, shape of images (default 0).
          return_repa: whether the REPA features are wanted.
        """
        config = self.config
        times = jnp.zeros(len(images)) if times is None else times
        noise = jnp.zeros_like(images) if noise is None else noise
        quantized = self.quantize(self.encode(images))
        starts = flow.group_start(times, config)  # [B]
        places = starts[:, None] + jnp.arange(config.tokens_per_step)  # [B, Q]
        condition = jnp.take_along_axis(self.condition(quantized.values), places[..., None], axis=1)  # [B, Q, D]

        data_std = config.velocity.data_std
        t = flow.shift_time(times, config.velocity.time_shift)
        x = flow.interpolate(noise, data_std * images, t)
        velocity, repa = self.velocity(x, t, condition, return_repa)
        return TokenizerOutput(
            quantized=quantized,
            velocity=velocity,
            target=data_std * images - noise,
            image=flow.predict_image(x, velocity, t, data_std),
            repa=repa,
            codebook=self.quantizer.rows() if config.vq_enable else None,
            tokens_used=starts + config.tokens_per_step,
        )

    def encode(self, images: Array) -> Array:
        """[B, H, W, C] float32 in [-1, 1] -> latents [B, T, E] float32."""
        return self.encoder(images)

    def quantize(self, latents: Array) -> Quantized:
        """latents [B, T, E] -> values for the decoder, codes and what the losses need."""
        return self.quantizer(latents)

    def codes(self, images: Array) -> Array:
        """[B, H, W, C] float32 in [-1, 1] -> codes [B, T] int32."""
        return self.quantize(self.encode(images)).codes

    def lookup(self, codes: Array) -> Array:
        """codes [B, n] int32 -> values [B, n, E] float32."""
        return self.quantizer.lookup(codes)

    def condition(self, values: Array) -> Array:
        """values [B, T, E] -> condition tokens [B, T, D] float32."""
        return self.token_decoder(values)

    def condition_step(
        self, layers: Sequence[Any], values: Array, caches: Sequence[Cache], position: Array
    ) -> tuple[Array, tuple[Cache, ...]]:
        """The same for n tokens from `position` on: [B, n, E] -> [B, n, D], and the new caches. See `TokenDecoder.step`."""
        return self.token_decoder.step(layers, values, caches, position)

    def velocity(
        self, x: Array, t: Array, condition: Array, return_repa: bool = False, time_table: Array | None = None
    ) -> tuple[Array, Array | None]:
        """x [B, H, W, C], shifted time t [B], condition [B, Q, D] -> velocity [B, H, W, C], and REPA features or None."""
        return self.velocity_network(x, t, condition, return_repa, time_table)
