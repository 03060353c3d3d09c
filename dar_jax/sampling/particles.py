"""Drawing tokens that agree with what is known: particles of each sample, resampled by their previews after every group.

The transformer proposes, and after each group of tokens the preview says how well a particle does so far. In the limit of many
particles the tokens are drawn from the transformer's distribution given what is known (a particle filter); no gradient and no
training is needed, and any function of previews will do.

Shapes: B samples, K particles of each, which are rows i K .. (i + 1) K - 1 of the sampler's state; T tokens, G groups.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.errors import require
from dar_jax.sampling.observe import repeated
from dar_jax.sampling.prepare import SamplerParams
from dar_jax.sampling.sampler import SamplerState, advance, begin, regroup, snapshot
from dar_jax.sampling.settings import Method, Networks, Settings

PURPOSE = 3  # of the samples' keys, see `Method`
ENOUGH = 0.5  # particles are resampled where their effective number is a smaller share of them

# previews [B, K, R, R, C] in [-1, 1] -> log likelihood [B, K]
Likelihood = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Particles:
    """The state after some groups.

    seeds: uint32 [B]. own_seeds: uint32 [B, K], from which each particle's tokens are drawn. weights: float64 [B, K], which sum
    to 1 for each sample. fit: float64 [B, K], the log likelihood of the previews. origins: int [B, K], the particle of the
    beginning that each descends from.
    """

    state: SamplerState
    seeds: np.ndarray
    own_seeds: np.ndarray
    weights: np.ndarray
    fit: np.ndarray
    origins: np.ndarray

    @property
    def group(self) -> int:
        """How many groups there are."""
        return self.state.group

    @property
    def tokens(self) -> Array:
        """int32 [B K, T], final as far as the groups have come."""
        return self.state.prediction.tokens


def chosen_particle(
    networks: Networks,
    params: SamplerParams,
    settings: Settings,
    condition: Any,
    seeds: np.ndarray,
    counts: Sequence[int],
    likelihood: Likelihood,
    prefix: Array | None = None,
    image: Array | None = None,
) -> Particles:
    """One particle of each sample after all groups, with `counts` of them in each group. Arguments as of `begin_particles`."""
    particles = begin_particles(networks, params, settings, condition, seeds, counts[0], prefix, image)
    for count in [*counts[1:], 1]:
        particles = advance_particles(networks, params, settings, particles, likelihood, count)
    return particles


def begin_particles(
    networks: Networks,
    params: SamplerParams,
    settings: Settings,
    condition: Any,
    seeds: np.ndarray,
    count: int,
    prefix: Array | None = None,
    image: Array | None = None,
    noise_seeds: np.ndarray | None = None,
) -> Particles:
    """The state before the first group.

    Args:
      condition: of every particle, a tree with [B K, ...] first.
      seeds: uint32 [B] on the host. The first particle of a sample is the sample that `sampler.begin` would draw; all particles
        are denoised from the noise of their sample's seed.
      prefix, image, noise_seeds: of every sample, as of `sampler.begin`.
    """
    seeds = np.asarray(seeds, np.uint32)
    own = np.array(_seeds(seeds, 0, count))
    own[:, 0] = seeds
    given = {"prefix": prefix, "image": image, "noise_seeds": seeds if noise_seeds is None else noise_seeds}
    state = begin(networks, params, _one_by_one(settings), condition, own.reshape(-1), **repeated(given, count))
    even = np.full(own.shape, 1 / count)
    return Particles(state, seeds, own, even, np.zeros(own.shape), np.tile(np.arange(count), (len(seeds), 1)))


def advance_particles(
    networks: Networks, params: SamplerParams, settings: Settings, particles: Particles, likelihood: Likelihood, count: int
) -> Particles:
    """One group of tokens for all particles, then their weights, then `count` particles of each sample.

    As many as before stay as they are where their weights are even enough; otherwise they are drawn by their weights, and draw
    their next tokens from seeds of their own. A single one after the last group is drawn from the posterior.
    """
    state = advance(networks, params, _one_by_one(settings), particles.state)
    batch, before = particles.weights.shape
    previews = snapshot(networks, params, state).images
    fit = np.asarray(likelihood(previews.reshape(batch, before, *previews.shape[1:])), np.float64)
    logs = np.log(np.maximum(particles.weights, 1e-300)) + fit - particles.fit
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    drawn = np.full(batch, True) if count != before else 1 / np.square(weights).sum(axis=1) < ENOUGH * before
    particles = dataclasses.replace(particles, state=state, weights=weights, fit=fit)
    return _resampled(particles, drawn, count) if drawn.any() else particles


def check_groups(method: Method) -> None:
    """Raises InputError for a method whose particles cannot be chosen between groups."""
    require(not method.predict.ahead, "the experiment finds tokens beyond a group, but particles are chosen between groups")


def _one_by_one(settings: Settings) -> Settings:
    """Without guesses: tokens of later groups come from the seeds of the particles that are chosen until then."""
    return dataclasses.replace(settings, speculate=0)


def _resampled(particles: Particles, drawn: np.ndarray, count: int) -> Particles:
    """`count` particles of each sample: drawn by their weights where `drawn` bool [B], the same ones elsewhere."""
    group, before = particles.state.group, particles.weights.shape[1]
    starts = np.asarray(_uniform(particles.seeds, group), np.float64)
    kept = [systematic(w, count, u) if d else np.arange(count) for w, u, d in zip(particles.weights, starts, drawn)]
    rows = np.stack(kept)
    take = partial(np.take_along_axis, indices=rows, axis=1)
    own = np.where(drawn[:, None], _seeds(particles.seeds, group, count), take(particles.own_seeds))
    state = regroup([particles.state], (np.arange(len(rows))[:, None] * before + rows).reshape(-1))
    weights = np.where(drawn[:, None], 1 / count, take(particles.weights))
    return Particles(
        reseed(state, own.reshape(-1), np.repeat(drawn, count)),
        particles.seeds,
        own,
        weights,
        take(particles.fit),
        take(particles.origins),
    )


def systematic(weights: np.ndarray, count: int, start: float) -> np.ndarray:
    """`count` indices, each as often as its weight says, up to one: int [count], rising.

    Args: weights [K] that sum to 1; start, a uniform number in [0, 1).
    """
    places = (start + np.arange(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), places, side="right"), len(weights) - 1)


def reseed(state: SamplerState, seeds: np.ndarray, rows: np.ndarray) -> SamplerState:
    """The state [B] in which the tokens to come of these rows, bool [B], are drawn from other seeds: integers [B]. The noise
    stays."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))

    def new(leaf: Array) -> Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        return jax.device_put(jnp.where(jnp.asarray(rows), keys, jax.device_put(leaf, keys.sharding)), leaf.sharding)

    return dataclasses.replace(state, prediction=jax.tree.map(new, state.prediction))


@partial(jax.jit, static_argnums=(1, 2))
def random_classes(seeds: Array, count: int, classes: int) -> Array:
    """A class for each particle of samples with these seeds [B]: int32 [B, count], all classes in an order of the sample's own,
    again and again."""
    shuffled = jax.vmap(lambda seed: jax.random.permutation(jax.random.fold_in(_key(seed, 0), 2), classes))(seeds)
    return jnp.take(shuffled, jnp.arange(count) % classes, axis=1)


@partial(jax.jit, static_argnums=2)
def _seeds(seeds: Array, group: int, count: int) -> Array:
    """Seeds for the particles of samples with these seeds [B] after so many groups: uint32 [B, count]."""
    return jax.vmap(lambda seed: jax.random.bits(jax.random.fold_in(_key(seed, group), 1), (count,), jnp.uint32))(seeds)


@jax.jit
def _uniform(seeds: Array, group: int) -> Array:
    """A uniform number in [0, 1) for each of the samples with these seeds [B], after so many groups: float32 [B]."""
    return jax.vmap(lambda seed: jax.random.uniform(jax.random.fold_in(_key(seed, group), 0)))(seeds)


def _key(seed: Array, group: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), PURPOSE), group)
