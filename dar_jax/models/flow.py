"""Flow matching as plain functions (paper section 3.2): the path from noise to data, its times, and which tokens go with them.

Time t runs from 0 (noise) to 1 (data). The networks see the shifted time t' = t / (t + s (1 - t)). B batch, T tokens, G groups,
S denoising steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.config import TokenizerConfig


def shift_time(t: Array, shift: float) -> Array:
    """t' = t / (t + shift (1 - t)): for shift > 1 more of the steps happen near the noise."""
    return t / (t + shift * (1 - t))


def interpolate(noise: Array, data: Array, t: Array) -> Array:
    """The point at (shifted) time t on the line from noise to data; t [B] or a scalar, the others [B, ...]."""
    t = over_batch(t, data)
    return t * data + (1 - t) * noise


def straight_velocity(noise: Array, data: Array, t: Array) -> Array:
    """The derivative of `interpolate` by t, the same at all times."""
    return data - noise


def jump(x: Array, velocity: Array, t: Array) -> Array:
    """The data that x [B, ...] at shifted time t, [B] or a scalar, and this velocity point to."""
    return x + over_batch(1 - t, x) * velocity


def over_batch(t: Array, like: Array) -> Array:
    """t, [B] or a scalar, with the axes that make it broadcast over `like` [B, ...]."""
    return jnp.reshape(t, (-1,) + (1,) * (like.ndim - 1))


@dataclass(frozen=True)
class Path:
    """The path from noise to data and how training draws times on it; a field of `Tokenizer`, for training and sampling alike.

    shift: (t, config.velocity.time_shift) -> t', rising from 0 to 1; NumPy arrays and JAX's.
    at, velocity: (noise, data, t') -> the point at t' and the velocity to learn there.
    data: (x, velocity, t') -> the data they point to.
    draw: (key, shape) -> times before the shift, in [0, 1].
    weight: t' [B] -> the weight [B] of an image's flow loss, with mean 1 over what is drawn; None: 1.
    """

    shift: Callable[[Array, float], Array] = shift_time
    at: Callable[[Array, Array, Array], Array] = interpolate
    velocity: Callable[[Array, Array, Array], Array] = straight_velocity
    data: Callable[[Array, Array, Array], Array] = jump
    draw: Callable[[Array, tuple[int, ...]], Array] = jax.random.uniform
    weight: Callable[[Array], Array] | None = None


def group_start(t: Array, config: TokenizerConfig) -> Array:
    """First of the `config.tokens_per_step` tokens that condition (unshifted) time t: int32, t's shape.

    Group g = floor(t G + 1/2) starts at token g T / G; the last start is T - tokens_per_step.
    """
    group = jnp.floor(t * config.num_groups + 0.5).astype(jnp.int32)
    return jnp.minimum(group * config.tokens_per_group, config.num_tokens - config.tokens_per_step)


def uniform_times(num_steps: int, config: TokenizerConfig) -> np.ndarray:
    """t_i = i / S, the paper's: float32 [S]."""
    return np.arange(num_steps, dtype=np.float32) / np.float32(num_steps)


class Step(NamedTuple):
    """One denoising step: its number, its first condition token, and the shifted times that it leads from and to."""

    index: np.int32
    start: np.int32
    t: np.float32
    t_next: np.float32


class Schedule(NamedTuple):
    """The denoising steps.

    times: float32 [S + 1], shifted, 0 .. 1. starts: int32 [S], the first condition token of each step. ready: int32 [G + 1],
    how many steps can have been taken once so many groups of tokens exist.
    """

    times: np.ndarray
    starts: np.ndarray
    ready: np.ndarray

    @property
    def steps(self) -> list[Step]:
        return [Step(np.int32(i), *values) for i, values in enumerate(zip(self.starts, self.times, self.times[1:]))]


def schedule(times: np.ndarray, config: TokenizerConfig, path: Path = Path()) -> Schedule:  # noqa: B008 (frozen)
    """The steps at unshifted `times` [S], rising from 0, each with the tokens of group floor(t G + 1/2).

    A group may have several steps or none. Raises ValueError where the times do not rise from 0 to less than 1.
    """
    t = np.asarray(times, np.float32)
    if t.ndim != 1 or not len(t) or t[0] != 0 or np.any(np.diff(t) <= 0) or not t[-1] < 1:
        raise ValueError(f"times of denoising steps rise from 0 to less than 1, these are {t.tolist()}")
    shifted = np.append(np.asarray(path.shift(t, np.float32(config.velocity.time_shift)), np.float32), np.float32(1))
    exact = t.astype(np.float64) * config.num_groups + 0.5
    groups = np.floor(exact + 1e-5).astype(np.int64)  # t is rounded, (2i + 1) / 2G is not
    starts = np.minimum(groups * config.tokens_per_group, config.num_tokens - config.tokens_per_step).astype(np.int32)
    tokens = np.arange(config.num_groups + 1)[:, None] * config.tokens_per_group
    return Schedule(shifted, starts, np.sum(starts + config.tokens_per_step <= tokens, axis=1).astype(np.int32))
