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

from dar_jax.config import TokenizerConfig, TokenizerLossConfig
from dar_jax.models import flow
from dar_jax.models.attention import Cache
from dar_jax.models.encoder import Encoder
from dar_jax.models.layers import DType
from dar_jax.models.quantizer import Normalize, Quantized, Quantizer
from dar_jax.models.token_decoder import TokenDecoder
from dar_jax.models.velocity import VelocityNetwork


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenizerOutput:
    """One training pass: the quantised tokens, the shifted times [B], the velocity and its target [B, H, W, C], the clean image
    it points to [B, H, W, C] in [-1, 1], the REPA features or None, and how many tokens, counted from the first, take part in
    each image's quantiser losses [B] int32."""

    quantized: Quantized
    times: Array
    velocity: Array
    target: Array
    image: Array
    repa: Array | None
    tokens_used: Array


class Tokenizer(nn.Module):
    """Call its methods with `model.apply({"params": params}, ..., method="encode")`; `model.init(key, images)` makes the
    parameters for images [1, H, W, C].

    A fork may hand over another bottleneck (`quantizer`, as `Quantizer`), velocity network (`velocity_network`, as
    `VelocityNetwork`) or path from noise to image (`path`); the sampler asks the same fields.
    """

    config: TokenizerConfig
    dtype: DType = jnp.float32
    remat: str = "none"
    quantizer: type[nn.Module] | None = None  # None: `Quantizer`, or `Normalize` where config.vq_enable is false
    velocity_network: type[nn.Module] = VelocityNetwork
    path: flow.Path = flow.Path()

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype, self.remat)
        default = Quantizer if self.config.vq_enable else Normalize
        self.bottleneck = (self.quantizer or default)(self.config, name="quantizer")
        self.token_decoder = TokenDecoder(self.config, self.dtype, self.remat)
        self.decoder = self.velocity_network(self.config, self.dtype, self.remat, name="velocity")

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one datum as it is encoded: (H, W, C)."""
        return self.config.image_size, self.config.image_size, self.config.channels

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of one datum as it is denoised: (R, R, C)."""
        return self.config.resolution, self.config.resolution, self.config.channels

    def __call__(
        self, images: Array, times: Array | None = None, noise: Array | None = None, return_repa: bool = False
    ) -> TokenizerOutput:
        """The pass of a training step.

        Args:
          images: [B, H, W, C] float32 in [-1, 1].
          times: [B] float32 in [0, 1], before the shift (default 0).
          noise: standard normal, shape of images (default 0).
          return_repa: compute the REPA features too.
        """
        config = self.config
        times = jnp.zeros(len(images)) if times is None else times
        noise = jnp.zeros_like(images) if noise is None else noise
        quantized = self.quantize(self.encode(images))
        starts = flow.group_start(times, config)  # [B]
        indices = starts[:, None] + jnp.arange(config.tokens_per_step)  # [B, Q]
        condition = jnp.take_along_axis(self.condition(quantized.values), indices[..., None], axis=1)  # [B, Q, D]

        path, data = self.path, config.velocity.data_std * images
        t = path.shift(times, config.velocity.time_shift)
        x = path.at(noise, data, t)
        velocity, repa = self.velocity(x, t, condition, return_repa)
        return TokenizerOutput(
            quantized=quantized,
            times=t,
            velocity=velocity,
            target=path.velocity(noise, data, t),
            image=path.data(x, velocity, t) / config.velocity.data_std,
            repa=repa,
            tokens_used=starts + config.tokens_per_step,
        )

    def encode(self, images: Array) -> Array:
        """[B, H, W, C] float32 in [-1, 1] -> latents [B, T, E] float32."""
        return self.encoder(images)

    def quantize(self, latents: Array) -> Quantized:
        """latents [B, T, E] -> values for the decoder, codes and what the losses need."""
        return self.bottleneck(latents)

    def quantizer_losses(self, quantized: Quantized, config: TokenizerLossConfig) -> dict[str, Array]:
        """The bottleneck's own terms of the loss, see `Quantizer.losses`."""
        return self.bottleneck.losses(quantized, config)

    def codes(self, images: Array) -> Array:
        """[B, H, W, C] float32 in [-1, 1] -> codes [B, T] int32."""
        return self.quantize(self.encode(images)).codes

    def lookup(self, codes: Array) -> Array:
        """codes [B, n] int32 -> values [B, n, E] float32."""
        return self.bottleneck.lookup(codes)

    def condition(self, values: Array) -> Array:
        """values [B, T, E] -> condition tokens [B, T, D] float32."""
        return self.token_decoder(values)

    def condition_step(
        self, layers: Sequence[Any], values: Array, caches: Sequence[Cache], position: Array
    ) -> tuple[Array, tuple[Cache, ...]]:
        """The same for n tokens from `position` on: [B, n, E] -> [B, n, D], and the new caches. See `TokenDecoder.step`."""
        return self.token_decoder.step(layers, values, caches, position)

    @nn.nowrap
    def empty_caches(self, batch: int) -> tuple[Cache, ...]:
        """The caches of `condition_step` for the tokens of `batch` images."""
        config = self.config
        heads = config.decoder_width // config.head_size
        return (Cache.zeros(batch, heads, config.num_tokens, config.head_size, self.dtype),) * config.decoder_layers

    def velocity(self, x: Array, t: Array, condition: Array, return_repa: bool = False) -> tuple[Array, Array | None]:
        """x [B, H, W, C], shifted time t [B], condition [B, Q, D] -> velocity [B, H, W, C], and REPA features or None."""
        return self.decoder(x, t, condition, return_repa)
