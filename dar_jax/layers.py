"""What the networks share: attention with its cache, rotary positions, MLP, norms, dropout, and stacks of blocks.

Shapes: B batch, T query tokens, S key tokens, D width, N heads, K head size, L layers, H W image rows and columns.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from dar_jax.flops import PERMUTATION

Array = jax.Array
DType = jnp.dtype | type

# The scale PyTorch gives linears and convolutions by default, which the release keeps outside its blocks.
default_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def matrix_init(std: float | None) -> Callable:
    """Initial value of a block's matrices: N(0, std^2), or N(0, 1 / fan in) where std is None."""
    return nn.initializers.lecun_normal() if std is None else nn.initializers.normal(std)


# How activations are cut over the mesh's axes (see `parallel`), by name. Without these the compiler may well cut the residual
# stream along its width, as the parameters are, and sum activations where gathering parameters is cheaper. XLA (jax 0.10) has
# also been seen to swap samples between devices where the sides of a product, or their gradients, were left to it on a
# 2 x 2 x 2 mesh.
ACTIVATIONS = {
    "stream": P(("data", "fsdp"), None, None),  # [B, T, D]
    "hidden": P(("data", "fsdp"), None, "tensor"),  # [B, T, H]
    "heads": P(("data", "fsdp"), None, "tensor", None),  # [B, T, N, K]
    "logits": P(("data", "fsdp"), None, "tensor"),  # [B, T, V]
    "table": P(None, None),  # [V, D], gathered before rows are looked up
    "cache": P(("data", "fsdp"), "tensor", None, None),  # [B, N, S, K]
    "images": P(("data", "fsdp"), None, None, None),  # [B, H, W, C]
}


def constrain(x: Array, name: str) -> Array:
    """Fixes the layout of an activation on the mesh that is set, if one is; dimensions that do not divide stay whole."""
    if not jax.sharding.get_abstract_mesh().shape:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(name, x.shape))


def fitting(name: str, shape: Sequence[int]) -> P:
    """The layout `name` of `ACTIVATIONS` for an array, without axes that do not divide their dimension."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)

    def divides(axes: str | tuple[str, ...] | None, size: int) -> bool:
        return size % math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())) == 0

    return P(*(axes if divides(axes, size) else None for axes, size in zip(ACTIVATIONS[name], shape)))


# --- rotary positions --------------------------------------------------------------------------------------------------

Rope = tuple[Array, Array]  # cosines and signed sines, each [T, K] float32, see `apply_rope`


def rope_1d(positions: Array, head_size: int, theta: float) -> Rope:
    """What turns the adjacent pair i of a head by position * theta^(-2i / head_size).

    Args: positions [T]. Returns the cosine, and the sine with the sign it takes, of every element: float32 [T, head_size].
    """
    frequencies = theta ** (-np.arange(0, head_size, 2) / head_size)
    angles = jnp.asarray(positions, jnp.float32)[:, None] * np.repeat(frequencies, 2).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles) * np.tile(np.float32([-1, 1]), head_size // 2)


def rope_2d(height: int, width: int, head_size: int, theta: float) -> Rope:
    """As `rope_1d` for a raster of height x width: the first half of a head turns with the row, the second with the column."""
    rows, columns = np.divmod(np.arange(height * width), width)
    parts = [rope_1d(positions, head_size // 2, theta) for positions in (rows, columns)]
    return tuple(jnp.concatenate(pair, axis=-1) for pair in zip(*parts))


def pad_rope(rope: Rope, count: int) -> Rope:
    """Appends `count` positions that are not turned."""
    cos, sin = rope
    return jnp.pad(cos, ((0, count), (0, 0)), constant_values=1.0), jnp.pad(sin, ((0, count), (0, 0)))


def apply_rope(x: Array, rope: Rope) -> Array:
    """Turns adjacent pairs of x [B, T, N, K] by the angles of `rope`; computed in float32, returned in x's dtype."""
    cos, sin = (part[None, :, None, :] for part in rope)
    return (x.astype(jnp.float32) * cos + _partners(x) * sin).astype(x.dtype)


def _partners(x: Array) -> Array:
    """The other element of each adjacent pair of x [..., K], float32.

    Taking the pairs apart would cost a TPU several changes of layout. Shifts become a part of the operations around them for
    a single token, but of a sequence they are written to memory, which a product with a permutation is not.
    """
    size = x.shape[-1]
    if x.shape[1] == 1:
        wide = x.astype(jnp.float32)
        return jnp.where(np.arange(size) % 2 == 0, jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    swap = jax.nn.one_hot(np.arange(size) ^ 1, size, dtype=x.dtype)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    with jax.named_scope(PERMUTATION):
        return jnp.dot(x, swap, precision=exact, preferred_element_type=jnp.float32)


# --- attention -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, each [B, N, S, K]: every head's lie together, in the order in which they are read."""

    keys: Array
    values: Array

    @classmethod
    def zeros(cls, batch: int, heads: int, length: int, head_size: int, dtype: DType) -> "Cache":
        empty = jnp.zeros((batch, heads, length, head_size), dtype)
        return cls(empty, empty)

    def write(self, position: Array | int, keys: Array, values: Array) -> "Cache":
        """Stores keys and values [B, T, N, K] from `position` on."""

        def put(old: Array, new: Array) -> Array:
            start = (0, 0, position, 0)
            return constrain(jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), start), "cache")

        return Cache(put(self.keys, keys), put(self.values, values))


def causal_mask(length: int, span: int, position: Array | int = 0) -> Array:
    """[1, length, span] bool: query i, which stands at position + i, sees keys up to and including its own place."""
    return (jnp.arange(span) <= position + jnp.arange(length)[:, None])[None]


def attend(queries: Array, keys: Array, values: Array, mask: Array | None = None) -> Array:
    """softmax(q k / sqrt(K)) v with the softmax in float32.

    In bfloat16 and without a mask, long sequences take the kernels of `_attend_fused`.

    Args: queries [B, T, N, K]; keys, values [B, S, M, K] where M divides N (grouped queries); mask broadcasts to
    [B, T, S]. Returns [B, T, N, K].
    """
    if mask is None and queries.dtype == jnp.bfloat16 and queries.shape[1] == keys.shape[1] and keys.shape[1] % FLASH_UNIT == 0:
        return _attend_fused(queries, keys, values)
    return jax.nn.dot_product_attention(queries, keys, values, mask=None if mask is None else mask[:, None])


FLASH_UNIT = 128  # tokens; what the TPU kernel takes at once is a multiple


def _attend_fused(queries: Array, keys: Array, values: Array) -> Array:
    """Attention that never writes its T x S weights to memory, where there is a kernel for it: cuDNN's on NVIDIA GPUs from
    Ampere on, JAX's Pallas kernel on TPU. Elsewhere XLA's. The weights would be most of what the velocity network reads and
    writes."""
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))  # AMD's are names
    if re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8:
        return jax.nn.dot_product_attention(queries, keys, values, implementation="cudnn")
    return jax.lax.platform_dependent(queries, keys, values, tpu=_attend_tpu, default=jax.nn.dot_product_attention)


def _attend_tpu(queries: Array, keys: Array, values: Array) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention

    length = queries.shape[1]
    block = next(size for size in (512, 384, 256, FLASH_UNIT) if length % size == 0)
    sizes = {field.name: block for field in dataclasses.fields(flash_attention.BlockSizes)} | {"block_b": 1}

    def kernel(*heads_last: Array) -> Array:
        heads_first = (x.swapaxes(1, 2) for x in heads_last)
        scale = 1 / math.sqrt(queries.shape[-1])
        block_sizes = flash_attention.BlockSizes(**sizes)
        return flash_attention.flash_attention(*heads_first, sm_scale=scale, block_sizes=block_sizes).swapaxes(1, 2)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.shape:
        return kernel(queries, keys, values)
    spec = fitting("heads", queries.shape)
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(queries, keys, values)


def attend_cached(queries: Array, cache: Cache, mask: Array) -> Array:
    """As `attend`, over all of a cache: queries [B, T, N, K], mask broadcasts to [B, T, S]. Returns [B, T, N, K]."""
    batch, length, _, size = queries.shape
    heads = cache.keys.shape[1]
    q = queries.reshape(batch, length, heads, -1, size)  # [B, T, M, R, K]
    logits = jnp.einsum("btmrk,bmsk->bmrts", q, cache.keys, preferred_element_type=jnp.float32) / math.sqrt(size)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf)).astype(cache.values.dtype)
    return jnp.einsum("bmrts,bmsk->btmrk", weights, cache.values).reshape(queries.shape)


def layer_norm(affine: bool, name: str | None = None) -> nn.LayerNorm:
    """Layer norm in float32, eps 1e-6."""
    return nn.LayerNorm(1e-6, use_bias=affine, use_scale=affine, use_fast_variance=False, dtype=jnp.float32, name=name)


class Attention(nn.Module):
    """Multi-head attention with biases and QK-norm. Queries come from x, keys and values from `context` (default: x).

    `rope` turns the queries, and in self attention the keys too. With a cache, keys and values are those written so far.
    """

    head_size: int
    init_std: float | None
    dtype: DType

    @nn.compact
    def __call__(
        self,
        x: Array,  # [B, T, D]
        context: Array | None = None,  # [B, S, D]
        rope: Rope | None = None,
        mask: Array | None = None,
        cache: Cache | None = None,
        position: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        width = x.shape[-1]
        heads = (width // self.head_size, self.head_size)
        init = matrix_init(self.init_std)
        project = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=init)
        x = constrain(x, "stream")
        source = x if context is None else constrain(context, "stream")
        q = layer_norm(True, "q_norm")(project(heads, name="q")(x)).astype(self.dtype)  # [B, T, N, K]
        k = layer_norm(True, "k_norm")(project(heads, name="k")(source)).astype(self.dtype)  # [B, S, N, K]
        v = project(heads, name="v")(source)  # [B, S, N, K]
        if rope is not None:
            q = apply_rope(q, rope)
            k = apply_rope(k, rope) if context is None else k
        if cache is not None:
            cache = cache.write(position, k, v)
        out = constrain(attend(q, k, v, mask) if cache is None else attend_cached(q, cache, mask), "heads")
        return constrain(project(width, axis=(-2, -1), name="out")(out), "stream"), cache


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


# --- stacks, dropout, resizing ---------------------------------------------------------------------------------------------

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


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes elements with probability `rate` and scales the others up; the identity where key is None."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def resize_bicubic(images: Array, height: int, width: int, scale: tuple[float, float] | None = None) -> Array:
    """Bicubic resizing as PyTorch's `interpolate` does it: a = -0.75, no antialiasing, half-pixel centres, edges repeated.

    Args:
      images: [B, H, W, C] float32.
      scale: enlargement of rows and columns by which pixels are placed (PyTorch's `scale_factor`), where it is not exactly
        height / H and width / W.

    Returns: [B, height, width, C].
    """
    factors = (height / images.shape[1], width / images.shape[2]) if scale is None else scale
    rows, columns = map(_bicubic_matrix, images.shape[1:3], (height, width), factors)
    return jnp.einsum("oh,bhwc,pw->bopc", rows, images, columns, precision=jax.lax.Precision.HIGHEST)


def _bicubic_matrix(size: int, wanted: int, scale: float, a: float = -0.75) -> np.ndarray:
    position = (np.arange(wanted) + 0.5) / scale - 0.5
    first = np.floor(position).astype(int)
    matrix = np.zeros((wanted, size), np.float32)
    for offset in range(-1, 3):
        d = np.abs(position - first - offset)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(matrix, (np.arange(wanted), np.clip(first + offset, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix
