"""Times, groups and steps of the solver."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import TokenizerConfig
from dar_jax.models import flow
from dar_jax.sampling.solvers import Velocity, by_name

PAPER = TokenizerConfig()


def schedule(steps, config=PAPER):
    return flow.schedule(flow.uniform_times(steps, config), config)


def test_schedule_of_the_paper():
    times = schedule(8).times
    np.testing.assert_allclose(times, [0, 1 / 15, 1 / 7, 3 / 13, 1 / 3, 5 / 11, 3 / 5, 7 / 9, 1], rtol=1e-6)
    straight = dataclasses.replace(PAPER, velocity=dataclasses.replace(PAPER.velocity, time_shift=1.0))
    np.testing.assert_allclose(schedule(4, straight).times, [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize(
    ("steps", "starts", "ready"),
    [
        (8, [0, 32, 64, 96, 128, 160, 192, 224], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (4, [0, 64, 128, 192], [0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (12, [0, 32, 32, 64, 96, 96, 128, 160, 160, 192, 224, 224], [0, 1, 3, 4, 6, 7, 9, 10, 12]),
    ],
)
def test_tokens_of_each_step(steps, starts, ready):
    np.testing.assert_array_equal(schedule(steps).starts, starts)
    np.testing.assert_array_equal(schedule(steps).ready, ready)
    np.testing.assert_array_equal(flow.group_start(jnp.arange(steps) / steps, PAPER), starts)


@pytest.mark.parametrize("groups", [1, 4, 7, 8])
def test_groups_of_rounded_times(groups):
    """Where t G + 1/2 is an integer, rounding of t does not move a step to the group before."""
    config = TokenizerConfig(num_tokens=2 * groups, num_groups=groups)
    for steps in range(1, 65):
        exact = (2 * np.arange(steps) * groups + steps) // (2 * steps)
        np.testing.assert_array_equal(schedule(steps, config).starts, np.minimum(exact, groups - 1) * 2)


@pytest.mark.parametrize("times", [[], [0.1, 0.5], [0, 0.5, 0.5], [0, 1.0], [0, np.nan]])
def test_times_that_do_not_rise_are_refused(times):
    with pytest.raises(ValueError, match="rise from 0"):
        flow.schedule(np.array(times), PAPER)


def test_groups_of_random_times():
    """The first group is drawn for 1/16 of the times, the last one for 3/16, the others for 1/8 each."""
    times = jax.random.uniform(jax.random.key(0), (200_000,))
    counts = np.bincount(flow.group_start(times, PAPER) // 32, minlength=8) / len(times)
    np.testing.assert_allclose(counts, [1 / 16, *[1 / 8] * 6, 3 / 16], atol=4e-3)


def test_wider_conditioning_ends_at_the_last_token():
    config = TokenizerConfig(queries_per_step=48)
    np.testing.assert_array_equal(schedule(8, config).starts[-2:], [192, 208])


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams2", 2)])
def test_solver_converges_with_its_order(solver, order):
    """dx/dt = -x on [0, 1]: halving the step divides the error by 2 (Euler) or 4 (Adams-Bashforth)."""

    def error(steps: int) -> float:
        with jax.enable_x64(True):
            x = jnp.ones((1, 1), jnp.float64)
            carry = by_name(solver).init(x)
            for i in range(steps):
                x, _, carry = by_name(solver).step(Velocity(lambda x, t: -x), x, carry, i / steps, (i + 1) / steps, None)
            return abs(float(x[0, 0]) - np.exp(-1))

    assert error(64) / error(128) == pytest.approx(2**order, rel=0.05)


def test_jump_from_the_true_velocity_is_the_image():
    noise, image = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
    t = jnp.array([0.1, 0.5, 0.9])
    x = flow.interpolate(noise, 0.6 * image, t)
    np.testing.assert_allclose(flow.jump(x, 0.6 * image - noise, t) / 0.6, image, atol=1e-5)
