"""Condition tokens, and one denoising step (paper section 3.4).

Shapes: B batch, T tokens, E code dimension, D width, R pixels along a side while denoising, C channels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.config import TokenizerConfig
from dar_jax.models import flow, token_decoder
from dar_jax.models.attention import Cache
from dar_jax.models.pixels import resize_bicubic
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.velocity import embed_times
from dar_jax.parallel.sharding import constrain
from dar_jax.sampling.prepare import Unstacked
from dar_jax.sampling.settings import Settings
from dar_jax.sampling.solvers import solver_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """How far the decoder is."""

    caches: tuple[Cache, ...]
    condition: Array  # [B, T, D] float32 condition tokens, zero where not yet known
    time_table: Array | None  # [S, L, 1, D], of `embed_times`
    x: Array  # [B, R, R, C] float32, the ODE's state
    velocity: Array  # [B, R, R, C] float32, of the last step
    preview: Array  # [B, R, R, C] float32 in [-1, 1], the jump estimate of the last step; after the last group, the image


def sample_keys(seeds: Array) -> Array:
    """One key per sample: [B] integers -> [B] PRNG keys."""
    return jax.vmap(jax.random.key)(seeds)


@functools.partial(jax.jit, static_argnums=1)
def initial_noise(seeds: Array, tokenizer: TokenizerConfig) -> Array:
    """Standard normal [B, R, R, C] float32, image i from seed i alone."""
    shape = (tokenizer.resolution, tokenizer.resolution, tokenizer.channels)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(sample_keys(seeds))


@functools.partial(jax.jit, static_argnums=0)
def begin_decoding(
    model: Tokenizer, params: Unstacked, settings: Settings, noise: Array, image: Array | None, values: Array | None = None
) -> Decoding:
    """Before the first denoising step; with the condition tokens of all `values`, if they are given."""
    config, batch = model.config, len(noise)
    times = flow.schedule(settings.num_steps, config.velocity.time_shift)
    if image is None:
        x, preview = noise, jnp.zeros_like(noise)
    else:
        x, preview = flow.interpolate(noise, config.velocity.data_std * image, jnp.float32(times[settings.start_step])), image
    caches = token_decoder.empty_caches(config, batch, model.dtype)
    decoding = Decoding(
        caches=jax.tree.map(lambda leaf: constrain(leaf, "cache"), caches),
        condition=constrain(jnp.zeros((batch, config.num_tokens, config.decoder_width), jnp.float32), "stream"),
        time_table=embed_times(config, model.dtype, params.rest["velocity"], times[:-1]),
        x=constrain(x, "images"),
        velocity=constrain(jnp.zeros_like(x), "images"),
        preview=constrain(preview, "images"),
    )
    return decoding if values is None else _extend(model, params, values, decoding, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0)
def _condition(model: Tokenizer, params: Unstacked, tokens: Array, decoding: Decoding, first: Array) -> Decoding:
    """Adds the condition tokens of the group whose first token is `first`."""
    codes = jax.lax.dynamic_slice_in_dim(tokens, first, model.config.tokens_per_group, axis=1)
    values = model.apply({"params": params.rest}, codes, method="lookup")
    return _extend(model, params, values, decoding, first)


def _extend(model: Tokenizer, params: Unstacked, values: Array, decoding: Decoding, first: Array) -> Decoding:
    """Adds the condition tokens of values [B, n, E], the first of which is token `first`."""
    apply = functools.partial(model.apply, {"params": params.rest}, method="condition_step")
    new, caches = apply(params.layers, values, decoding.caches, first)
    condition = jax.lax.dynamic_update_slice_in_dim(decoding.condition, new, first, axis=1)
    return dataclasses.replace(decoding, caches=caches, condition=constrain(condition, "stream"))


@functools.partial(jax.jit, static_argnums=0)
def _denoise(model: Tokenizer, params: Unstacked, settings: Settings, decoding: Decoding, index: Array) -> Decoding:
    """Denoising step `index`."""
    config = model.config
    times = jnp.asarray(flow.schedule(settings.num_steps, config.velocity.time_shift))
    start = jnp.asarray(flow.step_starts(settings.num_steps, config))[index]
    t = times[index]
    tokens = jax.lax.dynamic_slice_in_dim(decoding.condition, start, config.tokens_per_step, axis=1)
    table = None if decoding.time_table is None else decoding.time_table[index]
    apply = functools.partial(model.apply, {"params": params.rest}, method="velocity")
    velocity, _ = apply(decoding.x, t[None], tokens, time_table=table)
    first = index == settings.start_step
    step = functools.partial(solver_step, decoding.x, velocity, decoding.velocity, first=first, solver=settings.solver)
    x, preview = step(step_size=times[index + 1] - t), step(step_size=1 - t) / config.velocity.data_std
    new = {name: constrain(value, "images") for name, value in (("x", x), ("velocity", velocity), ("preview", preview))}
    return dataclasses.replace(decoding, **new)


@functools.partial(jax.jit, static_argnums=0)
def _finish(model: Tokenizer, images: Array) -> Array:
    """[B, R, R, C] -> [B, H, W, C]: resized down where the tokenizer's config asks for it."""
    size = model.config.output_resolution
    if size is None or images.shape[1] <= size:
        return images
    return resize_bicubic(images, size, size)
