"""The transformer block of encoder and token decoder, and stacks of blocks: scanned, or piece by piece with caches."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import Array

from dar_jax.models.attention import Attention, Cache, Rope
from dar_jax.models.layers import DType, Mlp, layer_norm
from dar_jax.parallel.sharding import constrain


class Block(nn.Module):
    """The transformer block of the encoder and of the token decoder: pre-norm, with a learned gate on each residual."""

    head_size: int
    init_std: float | None
    gate_init: float
    dtype: DType

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        layer: Array,
        rope: Rope | None,
        mask: Array | None,
        position: Array | None,
    ) -> tuple[tuple[Array, Cache | None], None]:
        x, cache = carry  # [B, T, D]
        gates = [self.param(name, nn.initializers.constant(self.gate_init), x.shape[-1:]) for name in ("gate1", "gate2")]
        attention = Attention(self.head_size, self.init_std, self.dtype, name="attention")
        out, cache = attention(layer_norm(True, "norm1")(x), None, rope, mask, cache, position)
        x = x + gates[0].astype(self.dtype) * out
        x = x + gates[1].astype(self.dtype) * Mlp(self.init_std, self.dtype, name="mlp")(layer_norm(True, "norm2")(x))
        return (constrain(x, "stream"), cache), None


_REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def stack(block: type[nn.Module], layers: int, remat: str, shared: int) -> type[nn.Module]:
    """`layers` copies of a block run one after the other by a scan, with parameters stacked along a leading axis.

    The block is called as block(carry, layer, *shared arguments) -> (carry, None); call the stack as
    stack(...)(carry, jnp.arange(layers), *shared arguments).

    Args:
      remat: what the backward pass computes again instead of storing: "none", "dots" (all but matrix products), "full".
      shared: number of arguments after `layer` that all layers get alike.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=_REMAT_POLICIES[remat])
    in_axes = (0,) + (nn.broadcast,) * shared
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, length=layers)


def unstack(params: Any, layers: int) -> tuple[Any, ...]:
    """The parameters of a stack as one tree for each layer, for `run_cached`."""
    return tuple(jax.tree.map(operator.itemgetter(layer), params) for layer in range(layers))


def run_cached(
    block: nn.Module, layers: Sequence[Any], caches: Sequence[Cache], x: Array, *shared: Any
) -> tuple[Array, tuple[Cache, ...]]:
    """A stack for decoding piece by piece: the block as `stack` calls it, layer after layer without a scan.

    A scan would copy each layer's parameters and cache out of the stacks, which costs as much as what is done with them.

    Args: layers, the parameters of each layer; caches, of each layer. Returns the result and the new caches.
    """
    new = []
    for layer, (params, cache) in enumerate(zip(layers, caches)):
        (x, cache), _ = block.apply({"params": params}, (x, cache), layer, *shared)
        new.append(cache)
    return x, tuple(new)
