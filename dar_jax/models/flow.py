"""Flow matching and its solver as plain functions (paper section 3.2). Nothing here knows a network.

Time t runs from 0 (noise) to 1 (image). The networks see the shifted time t' = t / (t + s (1 - t)). T tokens, G groups,
S denoising steps.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.config import TokenizerConfig


def shift_time(t: Array, shift: float) -> Array:
    """t' = t / (t + shift (1 - t)): for shift > 1 more of the steps happen near the noise."""
    return t / (t + shift * (1 - t))


def interpolate(noise: Array, data: Array, t: Array) -> Array:
    """The point at (shifted) time t on the line from noise to data; t [B] or a scalar, the others [B, H, W, C]."""
    t = jnp.reshape(t, (-1, 1, 1, 1))
    return t * data + (1 - t) * noise


def group_start(t: Array, config: TokenizerConfig) -> Array:
    """First of the `config.tokens_per_step` tokens that condition (unshifted) time t: int32, t's shape.

    Group g = floor(t G + 1/2) starts at token g T / G; the last start is T - tokens_per_step.
    """
    group = jnp.floor(t * config.num_groups + 0.5).astype(jnp.int32)
    return jnp.minimum(group * config.tokens_per_group, config.num_tokens - config.tokens_per_step)


def schedule(num_steps: int, shift: float) -> np.ndarray:
    """The shifted times t'_0 = 0 .. t'_S = 1 of the solver: float32 [S + 1]."""
    return shift_time(np.arange(num_steps + 1, dtype=np.float32) / np.float32(num_steps), np.float32(shift))


def step_starts(num_steps: int, config: TokenizerConfig) -> np.ndarray:
    """First condition token of each denoising step: int32 [S], in exact integer arithmetic."""
    groups = (2 * np.arange(num_steps) * config.num_groups + num_steps) // (2 * num_steps)
    return np.minimum(groups * config.tokens_per_group, config.num_tokens - config.tokens_per_step).astype(np.int32)


def steps_ready(num_steps: int, config: TokenizerConfig) -> np.ndarray:
    """How many denoising steps can have been taken once k groups of tokens exist, k = 0 .. G: int32 [G + 1]."""
    last_tokens = step_starts(num_steps, config) + config.tokens_per_step
    groups = np.arange(config.num_groups + 1)[:, None]
    return np.sum(last_tokens <= groups * config.tokens_per_group, axis=1).astype(np.int32)


def predict_image(x: Array, velocity: Array, t: Array, data_std: float) -> Array:
    """The clean image that x at shifted time t [B] and this velocity point to, in [-1, 1] units."""
    return (x + jnp.reshape(1 - t, (-1, 1, 1, 1)) * velocity) / data_std
