"""Attention, its cache and kernels, and rotary positions.

Shapes: B batch, T query tokens, S key tokens, D width, N heads, M key/value heads, K head size.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from dar_jax.models.layers import DType, layer_norm, matrix_init
from dar_jax.parallel.sharding import constrain, fitting

PERMUTATION = "permutation"  # name scope of products that only move numbers, which do not count as operations
Rope = tuple[Array, Array]  # cosines and signed sines, each [T, K] or [B, T, K] float32, see `apply_rope`


def rope_1d(positions: Array, head_size: int, theta: float) -> Rope:
    """Rotary angles: pair i of a head is rotated by position * theta^(-2i / head_size).

    Args: positions [T] or [B, T]. Returns the cosine, and the sine with the sign it takes, of every element: float32
    [..., T, head_size].
    """
    frequencies = theta ** (-np.arange(0, head_size, 2) / head_size)
    angles = jnp.asarray(positions, jnp.float32)[..., None] * np.repeat(frequencies, 2).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles) * np.tile(np.float32([-1, 1]), head_size // 2)


def rope_2d(height: int, width: int, head_size: int, theta: float) -> Rope:
    """As `rope_1d` for a raster of height x width: the first half of a head is rotated by the row, the second by the column."""
    rows, columns = np.divmod(np.arange(height * width), width)
    parts = [rope_1d(positions, head_size // 2, theta) for positions in (rows, columns)]
    return tuple(jnp.concatenate(pair, axis=-1) for pair in zip(*parts))


def pad_rope(rope: Rope, count: int) -> Rope:
    """Appends `count` positions with the identity rotation."""
    cos, sin = rope
    return jnp.pad(cos, ((0, count), (0, 0)), constant_values=1.0), jnp.pad(sin, ((0, count), (0, 0)))


def apply_rope(x: Array, rope: Rope) -> Array:
    """Rotates adjacent pairs of x [B, T, N, K] by the angles of `rope`; computed in float32, returned in x's dtype."""
    cos, sin = (jnp.expand_dims(part, -2) for part in rope)  # [T, 1, K] or [B, T, 1, K]
    return (x.astype(jnp.float32) * cos + _partners(x) * sin).astype(x.dtype)


def _partners(x: Array) -> Array:
    """The other element of each adjacent pair of x [..., K], float32.

    Splitting the pairs would cost a TPU several changes of layout. Shifts of a single token are fused with the operations
    around them, but those of a sequence are written to memory, which a product with a permutation is not.
    """
    size = x.shape[-1]
    if x.shape[1] == 1:
        wide = x.astype(jnp.float32)
        return jnp.where(np.arange(size) % 2 == 0, jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    swap = jax.nn.one_hot(np.arange(size) ^ 1, size, dtype=x.dtype)
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    with jax.named_scope(PERMUTATION):
        return jnp.dot(x, swap, precision=exact, preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of one layer, each [B, N, S, K]: contiguous for each head, in the order in which they are read."""

    keys: Array
    values: Array

    @classmethod
    def zeros(cls, batch: int, heads: int, length: int, head_size: int, dtype: DType) -> "Cache":
        empty = jnp.zeros((batch, heads, length, head_size), dtype)
        return cls(empty, empty)

    def write(self, position: Array | int, keys: Array, values: Array) -> "Cache":
        """Stores keys and values [B, T, N, K] from `position` on, a scalar, or [B] for rows with positions of their own."""

        def put(old: Array, new: Array) -> Array:
            new = new.swapaxes(1, 2).astype(old.dtype)
            if jnp.ndim(position) == 0:
                return constrain(jax.lax.dynamic_update_slice(old, new, (0, 0, position, 0)), "cache")
            each = jax.vmap(lambda row, values, start: jax.lax.dynamic_update_slice(row, values, (0, start, 0)))
            return constrain(each(old, new, position), "cache")

        return Cache(put(self.keys, keys), put(self.values, values))


def causal_mask(length: int, span: int, position: Array | int = 0) -> Array:
    """[1 or B, length, span] bool: query i, at position + i, sees keys up to and including its own; position scalar or [B]."""
    queries = jnp.reshape(position, (-1, 1, 1)) + jnp.arange(length)[:, None]
    return jnp.arange(span) <= queries


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


class Attention(nn.Module):
    """Multi-head attention with biases and QK-norm. Queries come from x, keys and values from `context` (default: x).

    `rope` rotates the queries, and in self attention the keys too. With a cache, keys and values are those written so far.
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
