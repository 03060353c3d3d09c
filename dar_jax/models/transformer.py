"""The autoregressive transformer (paper section 3.3): Llama style, one class token followed by the image's codes.

Shapes: B batch, T tokens per image, D width, N heads, M key/value heads, R = N / M, K head size, V vocabulary, C classes,
L layers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.config import LlamaConfig
from dar_jax.models.attention import Cache, Rope, apply_rope, attend, attend_cached, causal_mask, rope_1d
from dar_jax.models.blocks import run_cached, stack
from dar_jax.models.layers import DType, dropout, matrix_init
from dar_jax.parallel.sharding import constrain

Params = Any  # a tree of arrays


class LlamaAttention(nn.Module):
    """Causal self attention without biases. One product gives queries, keys and values, grouped by key/value head."""

    config: LlamaConfig
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

    config: LlamaConfig
    dtype: DType

    @nn.compact
    def __call__(self, x: Array) -> Array:
        project = functools.partial(
            nn.DenseGeneral, use_bias=False, dtype=self.dtype, kernel_init=matrix_init(self.config.init_std)
        )
        gate_up = project((2, self.config.mlp_width), name="gate_up")(constrain(x, "stream"))  # [B, T, 2, H]
        hidden = constrain(nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :], "hidden")
        return constrain(project(x.shape[-1], name="down")(hidden), "stream")


class LlamaBlock(nn.Module):
    """One layer. With a dropout key the outputs of attention and MLP are dropped out, differently in every layer."""

    config: LlamaConfig
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
        attention = LlamaAttention(config, self.dtype, name="attention")
        out, cache = attention(norm(name="attention_norm")(x), rope, mask, cache, position)
        x = x + dropout(out, config.attention_dropout, keys[0])
        out = SwiGLU(config, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        x = x + dropout(out, config.mlp_dropout, keys[1])
        return (constrain(x, "stream"), cache), None


class Llama(nn.Module):
    """Predicts code i of an image from its class and codes 0 .. i-1.

    `init(key, labels, tokens)` makes the parameters; `__call__` is the whole sequence at once (training), `step` one token
    with a cache (sampling). A fork may hand over another `block` with the signature of `LlamaBlock`.
    """

    config: LlamaConfig
    dtype: DType = jnp.float32
    remat: str = "none"
    block: type[nn.Module] = LlamaBlock

    def setup(self):
        config = self.config
        table = functools.partial(self.param, init_fn=nn.initializers.normal(config.init_std or 0.02))
        self.class_table = table("class_table", shape=(config.num_classes + 1, config.width))
        self.token_table = table("token_table", shape=(config.vocab_size, config.width))
        self.blocks = stack(self.block, config.layers, self.remat, shared=4)(config, self.dtype)
        self.norm = nn.RMSNorm(epsilon=config.norm_eps, dtype=jnp.float32)
        self.output = self.param("output", nn.initializers.zeros, (config.width, config.vocab_size))

    def __call__(self, labels: Array, tokens: Array, dropout_key: Array | None = None) -> Array:
        """Logits of every token of a batch of whole images.

        Args:
          labels: [B] int32; num_classes is the null class.
          tokens: [B, T] int32. The last one is no input; the logits of token i depend on tokens before it only.
          dropout_key: a key for dropout in training, None for none.

        Returns: [B, T, V] float32.
        """
        x = jnp.concatenate([self._class(labels)[:, None], self._token(tokens[:, :-1])], axis=1)
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x = constrain(dropout(x, self.config.token_dropout, keys[0]), "stream")  # [B, T, D]
        length = x.shape[1]
        shared = (self._rope(jnp.arange(length)), causal_mask(length, length), None, keys[1])
        (x, _), _ = self.blocks((x, None), jnp.arange(self.config.layers), *shared)
        return self._logits(x)

    def step(
        self, layers: Sequence[Params], labels: Array, tokens: Array, caches: Sequence[Cache], position: Array
    ) -> tuple[Array, tuple[Cache, ...]]:
        """Logits of the token at `position`, from the one before it and the caches of those before.

        Args:
          layers: the parameters of the blocks, `layers.unstack` of those of the stack, which are not read.
          labels: [B] int32, the input at position 0; num_classes is the null class.
          tokens: [B] int32, the token at position - 1 (anything at position 0).
          caches: of each layer (`empty_caches`), filled up to position - 1.
          position: int32 scalar.

        Returns: [B, V] float32 and the caches, filled up to position.
        """
        x = jnp.where(position == 0, self._class(labels), self._token(tokens))
        shared = (self._rope(position[None]), causal_mask(1, caches[0].keys.shape[2], position), position, None)
        block = self.block(self.config, self.dtype, parent=None)
        x, caches = run_cached(block, layers, caches, constrain(x[:, None], "stream"), *shared)
        return self._logits(x)[:, 0], caches

    def _class(self, labels: Array) -> Array:
        return constrain(self.class_table.astype(self.dtype), "table")[labels]

    def _token(self, tokens: Array) -> Array:
        return constrain(self.token_table.astype(self.dtype), "table")[tokens]

    def _rope(self, positions: Array) -> Rope:
        return rope_1d(positions, self.config.width // self.config.heads, self.config.rope_theta)

    def _logits(self, x: Array) -> Array:
        x, head = self.norm(x).astype(self.dtype), self.output.astype(self.dtype)
        return constrain(jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32), "logits")


def empty_caches(config: LlamaConfig, batch: int, length: int, dtype: DType) -> tuple[Cache, ...]:
    """The caches of all layers for `Llama.step` over `batch` sequences, with room for `length` tokens."""
    kv_heads = config.kv_heads or config.heads
    return (Cache.zeros(batch, kv_heads, length, config.width // config.heads, dtype),) * config.layers
