"""Initial values, layer norm, MLP and dropout."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.parallel.sharding import constrain

DType = jnp.dtype | type

# The scale PyTorch gives linears and convolutions by default, which the release keeps outside its blocks.
default_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def matrix_init(std: float | None) -> Callable:
    """Initial value of a block's matrices: N(0, std^2), or N(0, 1 / fan in) where std is None."""
    return nn.initializers.lecun_normal() if std is None else nn.initializers.normal(std)


def layer_norm(affine: bool, name: str | None = None) -> nn.LayerNorm:
    """Layer norm in float32, eps 1e-6."""
    return nn.LayerNorm(1e-6, use_bias=affine, use_scale=affine, use_fast_variance=False, dtype=jnp.float32, name=name)


class Mlp(nn.Module):
    """Linear to four times the width, SiLU, linear back."""

    init_std: float | None
    dtype: DType

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=matrix_init(self.init_std))
        x = constrain(x, "stream")
        hidden = constrain(nn.silu(dense(4 * x.shape[-1], name="in")(x)), "hidden")
        return constrain(dense(x.shape[-1], name="out")(hidden), "stream")


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes elements with probability `rate` and scales the others up; the identity where key is None."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
