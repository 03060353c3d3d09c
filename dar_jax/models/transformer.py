"""The autoregressive transformer (paper section 3.3): Llama style, one class token followed by the image's codes.

Shapes: B batch, T tokens per image, D width, N heads, M key/value heads, R = N / M, K head size, V vocabulary, C classes,
L layers.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import TransformerConfig
from dar_jax.models.attention import Cache, Rope, apply_rope, attend, attend_cached, causal_mask, rope_1d
from dar_jax.models.blocks import run_cached, stack
from dar_jax.models.layers import DType, dropout, matrix_init
from dar_jax.parallel.sharding import constrain

Params = Any  # a tree of arrays


class CausalAttention(nn.Module):
    """Causal self attention without biases. One product gives queries, keys and values, grouped by key/value head."""

    config: TransformerConfig
    dtype: DType

    @nn.compact
    def __call__(
        self, x: Array, rope: Rope, mask: Array, cache: Cache | None, position: Array | None
    ) -> tuple[Array, Cache | None]:
        config, (batch, length, width) = self.config, x.shape
        kv_heads = config.kv_heads or config.heads
        group, size = config.heads // kv_heads, width // config.heads
        project = functools.partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype, kernel_init=matrix_init(config.init_std))
        qkv = project((kv_heads, group + 2, size), name="qkv")(constrain(x, "stream"))  # [B, T, M, R + 2, K]
        q = apply_rope(qkv[..., :group, :].reshape(batch, length, config.heads, size), rope)  # [B, T, N, K]
        k, v = apply_rope(qkv[..., group, :], rope), qkv[..., group + 1, :]  # [B, T, M, K]
        if cache is not None:
            cache = cache.write(position, k, v)
        out = constrain(attend(q, k, v, mask) if cache is None else attend_cached(q, cache, mask), "heads")
        return constrain(project(width, axis=(-2, -1), name="out")(out), "stream"), cache


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)), gate and up in one product."""

    config: TransformerConfig
    dtype: DType

    @nn.compact
    def __call__(self, x: Array) -> Array:
        project = functools.partial(
            nn.DenseGeneral, use_bias=False, dtype=self.dtype, kernel_init=matrix_init(self.config.init_std)
        )
        gate_up = project((2, self.config.mlp_width), name="gate_up")(constrain(x, "stream"))  # [B, T, 2, H]
        hidden = constrain(nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], "hidden")
        return constrain(project(x.shape[-1], name="down")(hidden), "stream")


class TransformerBlock(nn.Module):
    """One layer. With a dropout key the outputs of attention and MLP are dropped out, differently in every layer."""

    config: TransformerConfig
    dtype: DType

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Cache | None],
        layer: Array,
        rope: Rope,
        mask: Array,
        position: Array | None,
        dropout_key: Array | None,
    ) -> tuple[tuple[Array, Cache | None], None]:
        x, cache = carry  # [B, T, D]
        config = self.config
        norm = functools.partial(nn.RMSNorm, epsilon=config.norm_eps, dtype=jnp.float32)
        keys = (None, None) if dropout_key is None else jax.random.split(jax.random.fold_in(dropout_key, layer))
        attention = CausalAttention(config, self.dtype, name="attention")
        out, cache = attention(norm(name="attention_norm")(x), rope, mask, cache, position)
        x = x + dropout(out, config.attention_dropout, keys[0])
        out = SwiGLU(config, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        x = x + dropout(out, config.mlp_dropout, keys[1])
        return (constrain(x, "stream"), cache), None


class Llama(nn.Module):
    """Predicts code i of an image from its condition (here: its class) and codes 0 .. i-1.

    `init(key, condition, tokens)` makes the parameters; `__call__` is the complete sequence at once (training), `extend` any
    number of slots with a cache (sampling). The slots of the input are the n of the condition, then the codes; the last slot of
    the condition predicts code 0. A fork may pass another `block` with the signature of `TransformerBlock`, or subclass for
    another condition: `prefix` and `null` take any tree of arrays with the batch first.
    """

    config: TransformerConfig
    dtype: DType = jnp.float32
    remat: str = "none"
    block: type[nn.Module] = TransformerBlock

    def setup(self):
        config = self.config
        table = functools.partial(self.param, init_fn=nn.initializers.normal(config.init_std or 0.02))
        self.class_table = table("class_table", shape=(config.num_classes + 1, config.width))
        self.token_table = table("token_table", shape=(config.vocab_size, config.width))
        self.blocks = stack(self.block, config.layers, self.remat, shared=4)(config, self.dtype)
        self.norm = nn.RMSNorm(epsilon=config.norm_eps, dtype=jnp.float32)
        self.output = self.param("output", nn.initializers.zeros, (config.width, config.vocab_size))

    def prefix(self, condition: Any) -> Array:
        """The condition as inputs [B, n, D]; here labels [B] int32, of which num_classes is the null class, and n = 1."""
        return constrain(self.class_table.astype(self.dtype), "table")[condition][:, None]

    @nn.nowrap
    def null(self, condition: Any) -> Any:
        """The condition of the same form that says nothing, for guidance and for dropping conditions; reads no parameters."""
        return jnp.full_like(condition, self.config.num_classes)

    def embed(self, tokens: Array) -> Array:
        """Codes [B, n] int32 as inputs [B, n, D]."""
        return constrain(self.token_table.astype(self.dtype), "table")[tokens]

    def __call__(self, condition: Any, tokens: Array, dropout_key: Array | None = None) -> Array:
        """Logits of every token of a batch of complete images.

        Args:
          condition: a tree of arrays with the batch first, here labels [B] int32.
          tokens: [B, T] int32. The last one is no input; the logits of token i depend on tokens before it only.
          dropout_key: a key for dropout in training, None for none.

        Returns: [B, T, V] float32.
        """
        x = jnp.concatenate([self.prefix(condition), self.embed(tokens[:, :-1])], axis=1)  # [B, n + T - 1, D]
        length = x.shape[1]
        return self.run(x, causal_mask(length, length), jnp.arange(length), dropout_key)[:, length - tokens.shape[1] :]

    def run(self, x: Array, mask: Array, positions: Array, dropout_key: Array | None = None) -> Array:
        """The blocks and the head on inputs [B, n, D] with any mask [1 or B, n, n], at rotary positions [n]: [B, n, V]."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = constrain(dropout(x, self.config.token_dropout, keys[0]), "stream")
        shared = (self._rope(positions), mask, None, keys[1])
        (x, _), _ = self.blocks((x, None), jnp.arange(self.config.layers), *shared)
        return self._logits(x)

    def extend(
        self,
        layers: Sequence[Params],
        x: Array,
        caches: Sequence[Cache],
        position: Array,
        mask: Array | None = None,
        rotary: Array | None = None,
    ) -> tuple[Array, tuple[Cache, ...]]:
        """Logits after each of n slots, given the caches of the slots before them.

        Args:
          layers: the parameters of the blocks, `blocks.unstack` of those of the stack, which are not read.
          x: [B, n, D], inputs of `prefix` and `embed`.
          caches: of each layer (`empty_caches`), filled up to the slot before; what they hold further on is not seen.
          position: the slot of the first input, an int32 scalar or [B], one for each row.
          mask: [1 or B, n, S] bool, which of the caches' S slots each input sees; None: those up to its own.
          rotary: [n] or [B, n], rotary positions of the inputs; None: their slots.

        Returns: [B, n, V] float32 and the caches, filled with these slots.
        """
        count = x.shape[1]
        rotary = jnp.asarray(position)[..., None] + jnp.arange(count) if rotary is None else rotary
        mask = causal_mask(count, caches[0].keys.shape[2], position) if mask is None else mask
        shared = (self._rope(rotary), mask, position, None)
        block = self.block(self.config, self.dtype, parent=None)
        x, caches = run_cached(block, layers, caches, constrain(x, "stream"), *shared)
        return self._logits(x), caches

    @nn.nowrap
    def empty_caches(self, batch: int, length: int) -> tuple[Cache, ...]:
        """The caches of all layers for `extend` over `batch` sequences, with room for `length` slots."""
        config = self.config
        return (
            Cache.zeros(batch, config.kv_heads or config.heads, length, config.width // config.heads, self.dtype),
        ) * config.layers

    def _rope(self, positions: Array) -> Rope:
        return rope_1d(positions, self.config.width // self.config.heads, self.config.rope_theta)

    def _logits(self, x: Array) -> Array:
        x, head = self.norm(x).astype(self.dtype), self.output.astype(self.dtype)
        return constrain(jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32), "logits")


@functools.partial(jax.jit, static_argnames="model")
def score(model: Llama, params: Params, condition: Any, codes: Array) -> tuple[Array, Array]:
    """The bits that each of the codes [B, T] int32 takes given the condition and those before it, float32 [B, T], and which of
    them were the most probable ones, bool [B, T]."""
    log_probabilities = jax.nn.log_softmax(model.apply({"params": params}, condition, codes))  # [B, T, V]
    bits = -jnp.take_along_axis(log_probabilities, codes[..., None], axis=-1)[..., 0] / math.log(2)
    return bits, log_probabilities.argmax(-1) == codes
