"""Solvers of dx/dt' = velocity, from noise to data (paper section 3.4): pairs of functions, as optimizers are in optax.

Shapes: B batch; x is [B, ...] float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from dar_jax.models import flow


@dataclass(frozen=True)
class Velocity:
    """velocity(x, t') with the condition tokens of the step at hand; `data(x, velocity, t')` is the data that it points to,
    which are `scale` times images in [-1, 1]."""

    function: Callable[[Array, Array], Array]
    data: Callable[[Array, Array, Array], Array] = flow.jump
    scale: float = 1.0

    def __call__(self, x: Array, t: Array) -> Array:
        return self.function(x, t)


class Solver(NamedTuple):
    """How x is carried from one time to the next.

    init: x -> what the solver remembers, a tree of arrays with the batch first.
    step: (velocity, x, carry, t', t'_next, keys [B]) -> (x, preview, carry). The preview is the data that the step points to,
      see `Velocity.data`; that of the last step is the image. The keys are the samples' own for this step.
    """

    init: Callable[[Array], Any]
    step: Callable[[Velocity, Array, Any, Array, Array, Array], tuple[Array, Array, Any]]


def _euler_step(velocity: Velocity, x: Array, carry: None, t: Array, t_next: Array, keys: Array) -> tuple[Array, Array, None]:
    v = velocity(x, t)
    return x + (t_next - t) * v, velocity.data(x, v, t), None


def _adams2_init(x: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(x), jnp.zeros(len(x), bool)


def _adams2_step(velocity: Velocity, x: Array, carry: tuple[Array, Array], t: Array, t_next: Array, keys: Array):
    previous, begun = carry
    v = velocity(x, t)
    combined = jnp.where(begun.reshape(-1, *[1] * (x.ndim - 1)), 1.5 * v - 0.5 * previous, v)
    return x + (t_next - t) * combined, velocity.data(x, combined, t), (v, jnp.ones_like(begun))


def _variable_init(x: Array) -> tuple[Array, Array]:
    return jnp.zeros_like(x), jnp.full(len(x), jnp.inf)


def _variable_step(velocity: Velocity, x: Array, carry: tuple[Array, Array], t: Array, t_next: Array, keys: Array):
    previous, length = carry  # of the step before; a first step has an infinite one before it, so that it is Euler's
    v = velocity(x, t)
    combined = v + flow.over_batch((t_next - t) / (2 * length), x) * (v - previous)
    return x + (t_next - t) * combined, velocity.data(x, combined, t), (v, jnp.full_like(length, t_next - t))


euler = Solver(lambda x: None, _euler_step)
# Two-step Adams-Bashforth; the first step is Euler's.
adams2 = Solver(_adams2_init, _adams2_step)  # with the weights of equal steps, whatever they are, as in the release
variable_adams2 = Solver(_variable_init, _variable_step)  # with those of the steps' lengths: of second order for any times


def by_name(name: str, equal: bool = True) -> Solver:
    """The solver that the setting `solver` names; Adams-Bashforth with the weights of `equal` steps or of their lengths."""
    return {"euler": euler, "adams2": adams2 if equal else variable_adams2}[name]


def substeps(solver: Solver, count: int) -> Solver:
    """The same solver with every step made in `count` equal parts, all with the condition tokens of the step."""

    def step(velocity: Velocity, x: Array, carry: Any, t: Array, t_next: Array, keys: Array) -> tuple[Array, Array, Any]:
        for part in range(count):
            start, end = (t + (t_next - t) * (part + offset) / count for offset in (0, 1))
            x, preview, carry = solver.step(velocity, x, carry, start, end, keys)
        return x, preview, carry

    return Solver(solver.init, step)
