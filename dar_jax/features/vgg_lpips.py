"""LPIPS: the perceptual distance of two images by the features of VGG16 (Zhang et al. 2018, arXiv 1801.03924).

Everything is float32, and products are taken at the highest precision unless another is asked for, so that TPUs and GPUs give
the same numbers as a CPU.
Shapes: B batch, H W pixels, C channels of a feature map.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.errors import InputError

# (convolutions, channels) of the stages; each but the first begins by halving the map, and the last activation is compared.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
SMALLEST = 2 ** (len(STAGES) - 1)  # pixels that leave one pixel in the last stage
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class Vgg16(nn.Module):
    """The convolutions of VGG16 (Simonyan and Zisserman 2015) up to relu5_3."""

    precision: jax.lax.Precision

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        """Normalised images [B, H, W, 3] -> relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, each [B, H / 2^i, W / 2^i, C]."""
        features = []
        for stage, (count, channels) in enumerate(STAGES, 1):
            x = x if stage == 1 else nn.max_pool(x, (2, 2), (2, 2))
            for index in range(1, count + 1):
                convolve = jax.lax.conv_general_dilated if min(x.shape[1:3]) >= 3 else of_small_map
                convolution = nn.Conv(
                    channels, (3, 3), precision=self.precision, conv_general_dilated=convolve, name=f"conv{stage}_{index}"
                )
                x = nn.relu(convolution(x))
            features.append(x)
        return features


def of_small_map(x: Array, kernel: Array, *_: Any, precision: Any, **__: Any) -> Array:
    """A padded 3 x 3 convolution as one product; on a CPU 70 times as fast as XLA's of a map that is smaller than the kernel.

    x [B, H, W, C], kernel [3, 3, C, D] -> [B, H, W, D]; the other arguments are those of flax's `nn.Conv`.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.matmul(jnp.concatenate(neighbours, axis=-1), kernel.reshape(-1, kernel.shape[-1]), precision=precision)


class Lpips(nn.Module):
    """The learned perceptual distance with VGG16 features."""

    precision: jax.lax.Precision = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, images: Array, references: Array) -> Array:
        """Images and references [B, H, W, 3] float32 in [-1, 1] -> distances [B] float32.

        The two are encoded one after the other: where only one of them needs gradients, as in training, no activations of the
        other are kept for the backward pass. In one batch, those of both would be.

        Raises InputError for images of less than 16 pixels, which leave nothing to compare in the last stage.
        """
        if min(images.shape[1:3]) < SMALLEST:
            raise InputError(
                f"LPIPS needs images of at least {SMALLEST} pixels, these have {images.shape[1]}x{images.shape[2]}"
            )
        vgg = Vgg16(self.precision, name="vgg")
        features = [vgg((x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)) for x in (images, references)]
        distance = jnp.zeros(len(images))
        for stage, (a, b) in enumerate(zip(*features), 1):
            weights = self.param(f"head{stage}", nn.initializers.constant(1 / a.shape[-1]), (a.shape[-1],))
            distance += jnp.mean(jnp.sum(weights * jnp.square(unit(a) - unit(b)), axis=-1), axis=(1, 2))
        return distance


def unit(x: Array, eps: float = 1e-10) -> Array:
    """x / (|x| + eps) over the last axis [..., C], with a gradient of zero, not NaN, where all of x is zero."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    positive = squared > 0
    return jnp.where(positive, x / (jnp.sqrt(jnp.where(positive, squared, 1.0)) + eps), 0.0)
