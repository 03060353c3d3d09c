"""The features that REPA aligns the velocity network with: patch tokens of DINOv2 (Oquab et al. 2023, arXiv 2304.07193).

Shapes: B batch, H W pixels, P patches, T tokens (class token and patches), D width, N heads, K head size.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from dar_jax.models.attention import attend
from dar_jax.models.blocks import stack
from dar_jax.models.layers import DType, layer_norm
from dar_jax.models.pixels import resize_bicubic
from dar_jax.parallel.sharding import constrain

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, for pixels in [0, 1]
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Sizes of the vision transformer; the defaults are those of ViT-B/14."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    patch_size: int = 14
    table_side: int = 37  # rows and columns of the position table, for the 518 pixels it was trained at


def preprocess(images: Array, size: int = 224) -> Array:
    """Images as DINOv2 takes them: ImageNet's mean and deviation, then bicubic to size x size (not clipped, not antialiased).

    Args:
      images: [B, H, W, 3] float32 in [-1, 1], of any size.
      size: a multiple of the patch size. The default gives 16 x 16 tokens of 14 pixels, the grid of the REPA head at 256
        pixels, which is what D-AR trains with; for another grid it is 14 times its side.

    Returns: [B, size, size, 3] float32.
    """
    return resize_bicubic(((images + 1) / 2 - jnp.asarray(MEAN)) / jnp.asarray(STD), size, size)


def resize_positions(table: Array, side: int, rows: int, columns: int) -> Array:
    """The position table [side * side, D] for a map of rows x columns patches, as DINOv2 resizes it.

    Its release passes the factors (rows + 0.1) / side and (columns + 0.1) / side to PyTorch's bicubic resizing, and these, not
    the ratio of the sizes, determine where the table is sampled.
    """
    if rows == columns == side:
        return table
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    return resize_bicubic(table.reshape(1, side, side, -1), rows, columns, scale).reshape(rows * columns, -1)


class Dinov2(nn.Module):
    """The vision transformer. Matrix products are in `dtype`, layer norms and the result in float32."""

    config: Dinov2Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Preprocessed images [B, H, W, 3], sides multiples of the patch size -> normalised patch tokens [B, P, D] float32."""
        config, dtype = self.config, self.dtype
        init = nn.initializers.truncated_normal(0.02)
        size = (config.patch_size,) * 2
        patches = nn.Conv(config.width, size, size, "VALID", dtype=dtype, name="patchify")(images)
        batch, rows, columns, _ = patches.shape
        patches = patches.reshape(batch, rows * columns, config.width)
        first = self.param("class_token", init, (1, config.width))
        table = self.param("position_table", init, (1 + config.table_side**2, config.width))
        patches = patches + resize_positions(table[1:], config.table_side, rows, columns).astype(dtype)
        first = jnp.broadcast_to((first + table[:1]).astype(dtype), (batch, 1, config.width))
        x = constrain(jnp.concatenate([first, patches], axis=1), "stream")  # [B, T, D]
        blocks = stack(Block, config.layers, "none", shared=0)(config.heads, dtype, name="blocks")
        x, _ = blocks(x, np.arange(config.layers))
        return layer_norm(True, "norm")(x)[:, 1:]


class Block(nn.Module):
    """Pre-norm attention and MLP (four times the width, exact GELU), with a learned gate on each residual ("layer scale")."""

    heads: int
    dtype: DType

    @nn.compact
    def __call__(self, x: Array, layer: Array) -> tuple[Array, None]:
        width = x.shape[-1]
        gates = [self.param(name, nn.initializers.constant(1e-5), (width,)).astype(self.dtype) for name in ("gate1", "gate2")]
        x = x + gates[0] * Attention(self.heads, self.dtype, name="attention")(layer_norm(True, "norm1")(x))
        x = x + gates[1] * Mlp(self.dtype, name="mlp")(layer_norm(True, "norm2")(x))
        return constrain(x, "stream"), None


class Attention(nn.Module):
    """Multi-head self attention with biases and one matrix for queries, keys and values."""

    heads: int
    dtype: DType

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        qkv = nn.DenseGeneral((self.heads, 3, width // self.heads), dtype=self.dtype, name="qkv")(x)
        out = constrain(attend(*jnp.moveaxis(qkv, 3, 0)), "heads")  # [B, T, N, K]
        return constrain(nn.DenseGeneral(width, axis=(-2, -1), dtype=self.dtype, name="out")(out), "stream")


class Mlp(nn.Module):
    """Linear to four times the width, exact GELU, linear back."""

    dtype: DType

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype)
        hidden = constrain(nn.gelu(dense(4 * x.shape[-1], name="in")(x), approximate=False), "hidden")
        return constrain(dense(x.shape[-1], name="out")(hidden), "stream")
