"""The PatchGAN discriminator (Isola et al. 2017, arXiv 1611.07004), an optional opponent of the tokenizer in training.

Its norms are over groups of channels within one image, as in the authors' release, so that an image's logits depend on that
image alone; unlike there, nothing in it depends on the time of the diffusion.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.models.layers import DType
from dar_jax.parallel.sharding import constrain

KERNEL = 4  # pixels a convolution sees along each side
NORM_GROUPS = 16
MOST_DOUBLINGS = 3  # of the number of channels


class Discriminator(nn.Module):
    """Convolutions of stride 2, which double the channels, and two of stride 1; each logit sees one patch of the image, of 70
    pixels for three halvings."""

    width: int  # channels after the first convolution
    halvings: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, H, W, C] float32 in [-1, 1] -> logits [B, h, w] float32, h = H // 2^halvings - 2: high for real patches."""
        convolution = functools.partial(
            nn.Conv, kernel_size=(KERNEL, KERNEL), padding=1, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02)
        )
        x = constrain(images, "images")
        for layer in range(self.halvings + 1):
            stride = 2 if layer < self.halvings else 1
            channels = self.width * 2 ** min(layer, MOST_DOUBLINGS)
            x = convolution(channels, strides=stride, use_bias=layer == 0, name=f"conv{layer}")(x)
            if layer > 0:
                x = nn.GroupNorm(NORM_GROUPS, epsilon=1e-5, name=f"norm{layer}")(x).astype(self.dtype)
            x = constrain(nn.leaky_relu(x, 0.2), "images")
        return convolution(1, name="logits")(x).squeeze(-1).astype(jnp.float32)
