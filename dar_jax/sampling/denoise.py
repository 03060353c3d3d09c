"""Condition tokens, and one denoising step (paper section 3.4).

Shapes: B batch, T tokens, E code dimension, D width, R pixels along a side while denoising, C channels.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.models import flow
from dar_jax.models.attention import Cache
from dar_jax.models.pixels import resize_bicubic
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.parallel.sharding import constrain
from dar_jax.sampling.prepare import Unstacked
from dar_jax.sampling.solvers import Solver, Velocity

if TYPE_CHECKING:
    from dar_jax.sampling.settings import Networks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """The state of denoising."""

    caches: tuple[Cache, ...]
    condition: Array  # [B, T, D] float32 condition tokens, zero where not yet known
    x: Array  # [B, R, R, C] float32, between noise and scaled data
    carry: Any  # the solver's state
    preview: Array  # [B, R, R, C] float32 in [-1, 1], the jump estimate of the last step; after the last group, the image
    keys: Array  # [B] PRNG keys
    observed: Any  # what `Method.steer` is given, a tree with the batch first, or None


@functools.lru_cache
def schedule(model: Tokenizer, times: tuple[float, ...]) -> flow.Schedule:
    """The denoising steps at these times before the shift."""
    return flow.schedule(np.asarray(times), model.config, model.path)


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin_decoding(
    networks: "Networks",
    solver: Solver,
    seeds: Array,
    image: Array | None = None,
    observed: Any = None,
    noise: Array | None = None,
    t: np.float32 = np.float32(0),  # noqa: B008
) -> Decoding:
    """Before the first denoising step, which leads from the shifted time t; other arguments as of `sampler.begin`. noise
    [B, R, R, C], in place of the method's."""
    model, batch = networks.tokenizer, len(seeds)
    keys = jax.vmap(jax.random.key)(seeds)
    x = networks.method.noise(keys, model.noise_shape) if noise is None else noise
    preview = jnp.zeros_like(x)
    if image is not None:
        x, preview = model.path.at(x, model.config.velocity.data_std * image, t), image
    x = constrain(x, "images")
    caches = model.empty_caches(batch)
    return Decoding(
        caches=jax.tree.map(lambda leaf: constrain(leaf, "cache"), caches),
        condition=constrain(jnp.zeros((batch, model.config.num_tokens, model.config.decoder_width), jnp.float32), "stream"),
        x=x,
        carry=solver.init(x),
        preview=constrain(preview, "images"),
        keys=keys,
        observed=observed,
    )


@functools.partial(jax.jit, static_argnums=0)
def condition(model: Tokenizer, params: Unstacked, tokens: Array, decoding: Decoding, first: Array) -> Decoding:
    """Adds the condition tokens of the group whose first token is `first`."""
    codes = jax.lax.dynamic_slice_in_dim(tokens, first, model.config.tokens_per_group, axis=1)
    return condition_values(model, params, model.apply({"params": params.rest}, codes, method="lookup"), decoding, first)


@functools.partial(jax.jit, static_argnums=0)
def condition_values(model: Tokenizer, params: Unstacked, values: Array, decoding: Decoding, first: Array) -> Decoding:
    """Adds the condition tokens of values [B, n, E], the first of which is token `first`."""
    apply = functools.partial(model.apply, {"params": params.rest}, method="condition_step")
    new, caches = apply(params.layers, values, decoding.caches, first)
    tokens = jax.lax.dynamic_update_slice_in_dim(decoding.condition, new, first, axis=1)
    return dataclasses.replace(decoding, caches=caches, condition=constrain(tokens, "stream"))


@functools.partial(jax.jit, static_argnums=(0, 2))
def denoise(networks: "Networks", params: Unstacked, solver: Solver, decoding: Decoding, step: flow.Step) -> Decoding:
    """One denoising step; one compilation serves all of them, however many there are and whenever."""
    model, method = networks.tokenizer, networks.method
    tokens = jax.lax.dynamic_slice_in_dim(decoding.condition, step.start, model.config.tokens_per_step, axis=1)

    def network(x: Array, t: Array) -> Array:
        return model.apply({"params": params.rest}, x, jnp.reshape(t, -1), tokens, method="velocity")[0]

    velocity = Velocity(network, model.path.data, model.config.velocity.data_std)

    def steered(x: Array, t: Array) -> Array:
        return velocity(x, t) if method.steer is None else method.steer(velocity, x, t, decoding.observed)

    keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 2), step.index))(decoding.keys)
    field = dataclasses.replace(velocity, function=steered)
    stepped = solver.step(field, decoding.x, decoding.carry, step.t, step.t_next, keys)
    x, preview, carry = jax.tree.map(lambda leaf: constrain(leaf, "images"), stepped)
    return dataclasses.replace(decoding, x=x, carry=carry, preview=preview / model.config.velocity.data_std)


@functools.partial(jax.jit, static_argnums=0)
def finish(model: Tokenizer, images: Array) -> Array:
    """[B, R, R, C] -> [B, H, W, C]: resized down where the tokenizer's config asks for it."""
    size = model.config.output_resolution
    if size is None or images.shape[1] <= size:
        return images
    return resize_bicubic(images, size, size)
