"""Solvers of the ODE from noise to image (paper section 3.4)."""

import jax.numpy as jnp
from jax import Array


def solver_step(x: Array, velocity: Array, previous: Array, step_size: Array, first: Array, solver: str) -> Array:
    """One step of the ODE dx/dt' = velocity.

    Args:
      x, velocity, previous: [B, H, W, C] float32; `previous` is the velocity of the step before.
      step_size: t'_{i+1} - t'_i; with 1 - t'_i instead, the result is the jump estimate of the clean image.
      first: whether no step was taken before (bool scalar): then the step is Euler's.
      solver: "adams2" (two-step Adams-Bashforth with constant-step weights) or "euler".
    """
    if solver == "adams2":
        velocity = jnp.where(first, velocity, 1.5 * velocity - 0.5 * previous)
    return x + step_size * velocity
