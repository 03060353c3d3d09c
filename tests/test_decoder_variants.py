"""Variants of the decoder against closed forms: gradients through it, its own unrolled steps, patches of two sizes."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import SamplingConfig, TokenizerConfig, VelocityConfig
from dar_jax.experiment import load_experiment
from dar_jax.models import flow
from dar_jax.models.attention import rope_1d
from dar_jax.models.velocity import VelocityNetwork
from dar_jax.sampling.observe import Observed, pool, spread
from dar_jax.sampling.prepare import prepare
from dar_jax.sampling.sampler import decode
from dar_jax.sampling.settings import Networks, make_settings
from dar_jax.sampling.solvers import Velocity
from dar_jax.training.flops import count_flops


def variant(name):
    load_experiment(Path(__file__).parents[1] / "experiments" / "variants" / f"{name}.py")
    return sys.modules[f"experiment_{name}"]


def test_gradient_guidance_draws_from_the_posterior():
    """Independent normal pixels, of which means over 2 x 2 are observed with noise: mean and variance of the posterior."""
    mean, variance, noise, count = 0.3, 0.5, 0.4, 10_000
    observed = Observed(jnp.full((1, 2, 2, 1), -0.5), jnp.ones((1, 2, 2, 1)).at[0, 0, 0].set(0))

    def velocity(x, t):
        q = t**2 * variance + (1 - t) ** 2
        return mean + (t * variance - (1 - t)) / q * (x - t * mean)

    steer = variant("observe").guidance(variance, noise)
    x = jnp.ones((1, 4, 4, 1))
    np.testing.assert_array_equal(steer(Velocity(velocity), x, 0.5, None), velocity(x, 0.5))

    @jax.jit
    def drawn(x):
        times = jnp.linspace(0, 1, 401)
        step = lambda x, pair: (x + (pair[1] - pair[0]) * steer(Velocity(velocity), x, pair[0], observed), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.stack([times[:-1], times[1:]], axis=1))[0]

    means = pool(drawn(jax.random.normal(jax.random.key(0), (count, 4, 4, 1))), 2)
    of_mean = variance / 4
    gain = of_mean / (of_mean + noise**2)
    expected = jnp.full((2, 2), mean + gain * (-0.5 - mean)).at[0, 0].set(mean)
    left = jnp.full((2, 2), of_mean * (1 - gain)).at[0, 0].set(of_mean)
    np.testing.assert_allclose(means.mean(axis=0)[..., 0], expected, atol=0.015)
    np.testing.assert_allclose(means.var(axis=0)[..., 0], left, rtol=0.06)
    assert spread(observed.values, 4).shape == (1, 4, 4, 1)


@pytest.fixture(scope="module")
def two_steps(tiny_tokenizer):
    return tiny_tokenizer(num_denoising_steps=2, queries_per_step=8, encoder_layers=1, decoder_layers=1)


def test_unrolled_steps_are_those_of_the_sampler(two_steps):
    """And their gradient is the slope of the loss."""
    model, params = two_steps
    values, noise = jax.random.normal(jax.random.key(0), (2, 16, 8)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    unrolled = jax.jit(lambda params: variant("few_steps").unrolled(model, params, values, noise))
    networks, settings = Networks(model), make_settings(SamplingConfig(), model.config)
    expected = decode(networks, prepare(networks, {"tokenizer": params}), settings, values, jnp.arange(2), noise=noise).images
    np.testing.assert_allclose(unrolled(params), expected, atol=1e-5)

    direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params)
    error = lambda size: jnp.square(unrolled(jax.tree.map(lambda p, d: p + size * d, params, direction))).mean()  # noqa: E731
    slope = (error(1e-3) - error(-1e-3)) / 2e-3
    np.testing.assert_allclose(jax.jit(jax.grad(error))(0.0), slope, rtol=0.02)


def test_gradients_of_the_last_steps_alone(two_steps):
    """The values are the same; the noise, which only the first step sees, has no gradient."""
    model, params = two_steps
    values, noise = jax.random.normal(jax.random.key(0), (2, 16, 8)), jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    drawn = lambda noise, last: variant("few_steps").unrolled(model, params, values, noise, last)  # noqa: E731
    slope = jax.jit(jax.value_and_grad(lambda noise, last: jnp.square(drawn(noise, last)).sum()), static_argnums=1)
    (value, whole), (same, truncated) = slope(noise, 0), slope(noise, 1)
    assert value == same and np.any(whole)
    np.testing.assert_array_equal(truncated, 0)


def test_energy_distance_is_unbiased():
    """Of equal distributions 0 on average, of two points twice what they are apart."""
    energy_distance = variant("perceptual").energy_distance
    a, b = jax.random.normal(jax.random.key(0), (2, 2000, 12, 3))
    equal = np.asarray(jax.jit(jax.vmap(energy_distance))(a, b))
    assert abs(equal.mean()) < 3 * equal.std() / 2000**0.5
    np.testing.assert_allclose(
        energy_distance(jnp.zeros((4, 2)), jnp.tile(jnp.array([3.0, 4.0]), (5, 1))), 10 - 0.02, rtol=1e-5
    )


def test_unpaired_statistics():
    """Of the same images near 0, and larger for those of another mean or deviation, whatever the unit of a statistic."""
    unpaired = variant("perceptual").unpaired
    a, b = jax.random.normal(jax.random.key(0), (2, 64, 3))
    equal, moved, flat = (unpaired([a, 1e3 * a], [x, 1e3 * x]) for x in (b, b + 1, 0.1 * b))
    assert abs(equal) < 0.1 < min(moved, flat)
    np.testing.assert_allclose(moved, unpaired([a], [b + 1]), rtol=1e-3)


def test_mmd_is_unbiased():
    """Of equal distributions 0 on average; with a linear kernel |difference of the means|^2 / F."""
    mmd = variant("few_steps").mmd
    a, b = jax.random.normal(jax.random.key(0), (2, 2000, 12, 3))
    equal = np.asarray(jax.jit(jax.vmap(mmd))(a, b))
    assert abs(equal.mean()) < 3 * equal.std() / 2000**0.5
    shifted = np.asarray(jax.jit(jax.vmap(lambda a, b: mmd(a, b + jnp.array([1.0, 0, -1]), degree=1)))(a, b))
    assert abs(shifted.mean() - 2 / 3) < 3 * shifted.std() / 2000**0.5


def pyramid(groups=2):
    """The module of the variant and its network."""
    module, velocity = variant("patch_pyramid"), VelocityConfig(width=16, layers=1, head_size=8, patch_size=4, repa_layer=None)
    config = TokenizerConfig(image_size=8, channels=1, num_groups=4, velocity=velocity)
    return module, module.network(groups)(config, jnp.float32, "none")


def test_patches_by_time_and_by_place():
    """One time for all sets the size; of a batch with times of its own, the first half is coarse."""
    _, network = pyramid()
    x, condition = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jax.random.normal(jax.random.key(1), (4, 4, 16))
    params = jax.jit(network.init)(jax.random.key(2), x[:1], jnp.zeros(1), condition[:1])["params"]
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)
    run = jax.jit(lambda params, t: network.apply({"params": params}, x, t, condition)[0])
    for t, coarse in ((0.1, True), (0.7, False)):
        at_stage = jax.jit(lambda *inputs: network.apply({"params": params}, *inputs, method="at_stage"), static_argnums=0)
        alone = at_stage(coarse, x, jnp.full(1, t), condition)
        np.testing.assert_allclose(run(params, jnp.full(1, t)), alone, atol=1e-5)
        rows = slice(0, 2) if coarse else slice(2, 4)
        np.testing.assert_allclose(run(params, jnp.full(4, t))[rows], alone[rows], atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.square(run(params, jnp.full(4, 0.1))[:2]).sum()))(params)
    for name, moved in (("coarse_in", True), ("coarse_out", True), ("patch_in", False), ("patch_out", False)):
        assert (np.abs(slopes[name]["kernel"]).max() > 0) == moved
    assert np.abs(slopes["stage"]).max() > 0


def test_a_coarse_patch_stands_in_the_middle_of_its_fine_ones():
    module, _ = pyramid()
    cos, sin = module.centred_rope(2, 2, 8, 10000.0)
    middle = [rope_1d(jnp.array([0.5, 0.5, 2.5, 2.5]), 4, 10000.0), rope_1d(jnp.array([0.5, 2.5, 0.5, 2.5]), 4, 10000.0)]
    np.testing.assert_allclose(cos, jnp.concatenate([rope[0] for rope in middle], axis=-1), atol=1e-6)
    np.testing.assert_allclose(sin, jnp.concatenate([rope[1] for rope in middle], axis=-1), atol=1e-6)


def test_halves_of_a_batch_have_the_times_of_their_stage():
    module, network = pyramid()
    end = module.boundary(network.config, 2)
    times = module.halves(end, 2.0, 0.0).draw(jax.random.key(0), (4000,))
    assert end == 0.375 and times[:2000].max() < end <= times[2000:].min()
    shifted = flow.shift_time(times, 2.0)
    np.testing.assert_allclose(module.halves(end, 2.0, 0.0).weight(shifted), np.repeat([0.75, 1.25], 2000))
    assert abs(module.halves(end, 2.0, 2.0).weight(shifted).mean() - 1) < 0.02


def test_operations_at_the_size_of_the_paper():
    """Four coarse steps and four fine ones take at most 65 % of those of eight fine ones."""
    config = dataclasses.replace(TokenizerConfig(), velocity=VelocityConfig(repa_layer=None))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 256, 256, 3), (1,), (1, 32, 768))]
    base = VelocityNetwork(config, jnp.float32, "none")
    params = jax.eval_shape(base.init, jax.random.key(0), *shapes)
    fine = count_flops(base.apply, params, *shapes)
    network = variant("patch_pyramid").network(4)(config, jnp.float32, "none")
    params = jax.eval_shape(network.init, jax.random.key(0), *shapes)
    at_stage = lambda coarse: lambda params, *rest: network.apply(params, coarse, *rest, method="at_stage")  # noqa: E731
    coarse, own_fine = (count_flops(at_stage(coarse), params, *shapes) for coarse in (True, False))
    assert own_fine == fine
    assert coarse + fine <= 0.65 * 2 * fine
