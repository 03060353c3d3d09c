"""What is known of images before they are drawn: velocities that end at it, and how well an image agrees with it.

Known are pixels of the images, or averages over their squares (super-resolution).
Shapes: B batch, K images compared with each, R pixels along a side while denoising, r along a side of what is known,
C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from dar_jax.sampling.solvers import Velocity

if TYPE_CHECKING:
    from dar_jax.sampling.settings import Networks

LEAST_TIME = 1e-4  # left until the data, where a solver evaluates the velocity at the data themselves
LEAST_ERROR = 1e-5  # mean square of an image that agrees perfectly, below what rounding to uint8 leaves


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed:
    """values [B, r, r, C] float32 in [-1, 1], of which those count where mask [B, r, r, 1] float32 is 1 and not 0. r divides R:
    a value is the mean of a square of R / r pixels along a side."""

    values: Array
    mask: Array


def project(velocity: Velocity, x: Array, t: Array, observed: Observed | None) -> Array:
    """A `Method.steer`: the velocity towards the data closest to those of the network that agree with what is observed.

    The last step ends exactly at it. The path's data have to be linear in the velocity, as those of a straight line are.
    """
    v = velocity(x, t)
    if observed is None:
        return v
    side = observed.values.shape[1]
    error = observed.mask * (velocity.scale * observed.values - pool(velocity.data(x, v, t), side))
    reach = velocity.data(jnp.zeros_like(x), jnp.ones_like(x), t)  # how far a velocity of 1 moves the data
    return v + spread(error, x.shape[1]) / jnp.maximum(reach, LEAST_TIME)


def pool(images: Array, side: int) -> Array:
    """Means over squares: [B, R, R, C] -> [B, side, side, C]."""
    batch, size, _, channels = images.shape
    return images.reshape(batch, side, size // side, side, size // side, channels).mean(axis=(2, 4))


def spread(values: Array, size: int) -> Array:
    """Each value over its whole square: [B, r, r, C] -> [B, size, size, C], whose means are the values."""
    times = size // values.shape[1]
    return jnp.repeat(jnp.repeat(values, times, axis=1), times, axis=2)


@jax.jit
def log_likelihood(images: Array, observed: Observed) -> Array:
    """How well images [B, K, R, R, C] in [-1, 1] agree with what is observed of each sample: float32 [B, K].

    The errors of the n known numbers are taken as independent and normal, with a variance that is not known: -n/2 log(mean
    square error), up to a constant. So nothing has to be measured before, and early previews, none of which fits well, weigh
    little.
    """
    side, values, mask = observed.values.shape[1], observed.values[:, None], observed.mask[:, None]
    small = pool(images.reshape(-1, *images.shape[2:]), side).reshape(*images.shape[:2], side, side, images.shape[-1])
    count = jnp.maximum(1, mask.sum(axis=(2, 3, 4)) * images.shape[-1])
    square = jnp.square(mask * (small - values)).sum(axis=(2, 3, 4))
    return -count / 2 * jnp.log(square / count + LEAST_ERROR)


def steered(networks: "Networks", steer: Callable[..., Array] | None) -> "Networks":
    """The networks with this `Method.steer`."""
    return dataclasses.replace(networks, method=dataclasses.replace(networks.method, steer=steer))


def repeated(tree: Any, count: int) -> Any:
    """Each sample `count` times, one after the other: a tree of [B, ...] -> [B count, ...]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), tree)
