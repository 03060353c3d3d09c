"""The denoising variants against closed forms: a Gaussian, whose velocity, image estimate and ODE solution are known."""

import dataclasses
import functools
import runpy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fork_runs import VARIANTS, module_of, path_of

from dar_jax.config import LATE_STEPS, MeshConfig, SamplingConfig, TokenizerConfig
from dar_jax.errors import InputError
from dar_jax.experiment import load_experiment
from dar_jax.inference.reconstruct import images_of, quantize
from dar_jax.inference.trained import load_sampler
from dar_jax.models import flow
from dar_jax.parallel import make_mesh
from dar_jax.sampling import sampler, solvers
from dar_jax.sampling.denoise import begin_decoding, condition_values, denoise, schedule
from dar_jax.sampling.settings import make_settings
from dar_jax.sampling.solvers import Velocity

MEAN, STD = 0.3, np.array([0.2, 0.5, 1.0])  # of the data, per dimension


def gaussian(x, t):
    """The velocity that leads from the standard normal to N(MEAN, STD^2)."""
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


@functools.partial(jax.jit, static_argnums=(0, 3))
def solve(solver, times, x, velocity=gaussian, keys=None):
    """x [B, D] carried through shifted times, with the samples' keys [B]: where it ends, and the preview of the last step."""

    def step(state, index):
        x, _, carry = state
        each = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        return solver.step(Velocity(velocity), x, carry, times[index], times[index + 1], each), None

    (x, preview, _), _ = jax.lax.scan(step, (x, x, solver.init(x)), jnp.arange(len(times) - 1))
    return x, preview


def even(steps):
    return np.linspace(0, 1, steps + 1, dtype=np.float32)


def graded(steps):
    """Times whose neighbouring steps have ratios of 2 and 1/2."""
    lengths = np.resize([1, 2], steps)
    return np.append(0, np.cumsum(lengths) / lengths.sum()).astype(np.float32)


@pytest.fixture(scope="module")
def trained(tiny_run):
    """The random transformer of `tiny_run` on one device."""
    return load_sampler(tiny_run, mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.fixture(scope="module")
def report():
    return runpy.run_path(str(VARIANTS / "decoder_report.py"))


def order_of(solver):
    """log2 of the ratio of the errors at 64 and 128 steps."""
    noise = np.array([[1.0, -0.5, 2.0]])

    def error(steps):
        with jax.enable_x64(True):
            preview = np.asarray(solve(solver, graded(steps).astype(np.float64), noise)[1])
        return np.abs(preview - (MEAN + STD * noise)).max()

    return np.log2(error(64) / error(128))


@pytest.mark.parametrize(("solver", "order"), [("variable_adams2", 2), ("plain", 2), ("adams2", 1), ("euler", 1)])
def test_order_for_unequal_steps(solver, order):
    """Weights of equal steps cost Adams-Bashforth an order where the steps are not."""
    chosen = load_experiment(path_of("solvers:plain")).method.solver if solver == "plain" else getattr(solvers, solver)
    assert order_of(chosen) == pytest.approx(order, abs=0.25)


def test_equal_steps_have_the_weights_of_the_release():
    noise = jax.random.normal(jax.random.key(0), (20, 3))
    results = [solve(solver, even(8), noise) for solver in (solvers.adams2, solvers.variable_adams2)]
    np.testing.assert_allclose(*results, atol=1e-5)


def test_evodiff_is_no_worse_than_euler():
    noise = jax.random.normal(jax.random.key(0), (20, 3))
    errors = [
        np.abs(solve(solver, even(8), noise)[1] - (MEAN + STD * noise)).mean()
        for solver in (load_experiment(path_of("solvers")).method.solver, solvers.euler)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", ["solvers", "solvers:plain", "solvers:adams", "stochastic", "stochastic:ancestral_half"])
def test_solvers_keep_samples_apart(name):
    solver, keys = load_experiment(path_of(name)).method.solver, jax.random.split(jax.random.key(1), 7)
    noise = jax.random.normal(jax.random.key(0), (7, 3))
    field = lambda x, t: jnp.tanh(x) - t * x  # noqa: E731
    together = solve(solver, graded(6), noise, field, keys)
    alone = [solve(solver, graded(6), noise[i : i + 1], field, keys[i : i + 1]) for i in range(7)]
    for part in range(2):
        np.testing.assert_allclose(together[part], np.concatenate([each[part] for each in alone]), atol=1e-6)


@pytest.mark.parametrize("name", ["euler_maruyama", "ancestral"])
def test_stochastic_samplers(name):
    """With nothing of their own noise they are Euler's; with all of it the Gaussian comes out."""
    make, noise = getattr(module_of("stochastic"), name), jax.random.normal(jax.random.key(0), (20_000, 3))
    keys = jax.random.split(jax.random.key(1), len(noise))
    with jax.disable_jit():  # two programs may round differently
        np.testing.assert_array_equal(
            *(solve(each, graded(6), noise[:5], keys=keys[:5])[1] for each in (make(0.0), solvers.euler))
        )
    drawn, _ = solve(make(1.0), even(200), noise, keys=keys)
    np.testing.assert_allclose(drawn.mean(0), MEAN, atol=0.03)
    np.testing.assert_allclose(drawn.std(0), STD, rtol=0.03)
    assert np.abs(drawn - (MEAN + STD * noise)).mean() > 0.1  # not the ODE's samples


CONFIG = TokenizerConfig()  # 8 groups


def test_allocations():
    steps = module_of("steps")
    times = functools.partial(steps.allocated_times, num_steps=None)
    np.testing.assert_array_equal(times((1,) * 8, config=CONFIG), flow.uniform_times(8, CONFIG))
    for name, counts in (("late3", "10000101"), ("late5", "10010111"), ("late6", "10010112"), ("late8", "10101122")):
        np.testing.assert_array_equal(times(tuple(map(int, counts)), config=CONFIG), np.float32(LATE_STEPS[name]))
    for counts in ((3, 2, 2, 1, 1, 1, 1, 1), (2, 0, 5, 0, 0, 0, 1, 4)):
        starts = flow.schedule(times(counts, config=CONFIG), CONFIG).starts
        np.testing.assert_array_equal(np.bincount(starts // 32, minlength=8), counts)
    for wrong in ((1,) * 7, (0, *[1] * 7), (*[1] * 7, 0)):
        with pytest.raises(ValueError, match="allocation to 8 groups"):
            times(wrong, config=CONFIG)
    found = list(steps.allocations(4, 4))
    assert len(set(found)) == 10 and all(sum(each) == 4 and each[0] and each[-1] and min(each) >= 0 for each in found)
    rows = [(2, 19.0, 0.7, "a"), (3, 18.0, 0.6, "b"), (3, 18.0, 0.7, "c"), (4, 19.0, 0.7, "d")]
    assert steps.front(rows) == rows[:2]


def test_descent_finds_the_nearest_optimum():
    wanted = (1, 0, 1, 0, 0, 1, 0, 2)
    rows = []

    def measure(counts):
        rows.append(counts)
        return 5, 0.0, sum(abs(a - b) for a, b in zip(counts, wanted)), counts

    module_of("steps").descent(measure, (1, 0, 0, 0, 0, 0, 0, 4))
    assert wanted in rows


def test_late_steps(trained):
    networks, params, labels, seeds = trained.networks, trained.sampler_params, jnp.arange(3), jnp.arange(3)
    settings = make_settings(SamplingConfig((1, 1), steps="late3"), trained.config)
    assert settings.times == (0, 5 / 8, 7 / 8) and settings.solver is solvers.variable_adams2
    assert [len(sampler.steps_of_group(networks, settings, group)) for group in range(4)] == [1, 0, 0, 2]
    streamed = list(sampler.stream(networks, params, settings, labels, seeds))
    np.testing.assert_array_equal(streamed[0].images, streamed[2].images)  # nothing new to see before the last group
    values = sampler.lookup_codes(networks, trained.params, streamed[-1].tokens)
    decoded = sampler.decode(networks, params, settings, values, seeds)
    np.testing.assert_allclose(decoded.images, streamed[-1].images, atol=2e-5)
    default = make_settings(SamplingConfig((1, 1)), trained.config)
    assert default.solver is solvers.adams2 and default.times == (0, 0.25, 0.5, 0.75)


@pytest.mark.parametrize(
    ("sampling", "config", "message"),
    [
        ({"steps": "late3", "num_denoising_steps": 3}, CONFIG, "leave num_denoising_steps away"),
        ({"steps": "late3"}, TokenizerConfig(num_groups=16), "16 groups, which would never be decoded"),
        ({"steps": "late3", "start_step": 3}, CONFIG, "start_step is 3, it should be 0 .. 2"),
        ({"steps": "early"}, CONFIG, "steps should be one of uniform, late3"),
    ],
)
def test_steps_that_do_not_fit(sampling, config, message):
    with pytest.raises(InputError, match=message):
        make_settings(SamplingConfig(**sampling), config)


def test_times_of_an_experiment_go_with_no_other_steps():
    method = load_experiment(path_of("steps")).method
    config = TokenizerConfig(num_groups=4)
    assert len(make_settings(SamplingConfig(), config, method).times) == 3
    for wrong in ({"steps": "late3"}, {"num_denoising_steps": 4}):
        with pytest.raises(InputError, match="the experiment"):
            make_settings(SamplingConfig(**wrong), config, method)
    with pytest.raises(InputError, match="allocation to 8 groups"):
        make_settings(SamplingConfig(), CONFIG, method)


def test_a_skipped_group_is_read_through_its_codes(trained):
    """The condition tokens of a group without steps change nothing, its codes do."""
    networks, params, times = trained.networks, trained.sampler_params.decoder, (0, 0.25, 0.75)
    values = quantize(networks, trained.params, images_of(trained, 4)[0]).values

    def decoded(values, edit=lambda tokens: tokens):
        decoding = begin_decoding(networks, solvers.variable_adams2, jnp.arange(4))
        decoding = condition_values(networks.tokenizer, params, values, decoding, jnp.int32(0))
        decoding = dataclasses.replace(decoding, condition=edit(decoding.condition))
        for step in schedule(networks.tokenizer, times).steps:
            decoding = denoise(networks, params, solvers.variable_adams2, decoding, step)
        return decoding.preview

    base, second = decoded(values), slice(8, 12)
    np.testing.assert_array_equal(base, decoded(values, lambda tokens: tokens.at[:, second].set(0)))
    assert np.abs(base - decoded(values.at[:, second].set(-values[:, second]))).max() > 1e-3


def test_noise(trained, tmp_path):
    noise = module_of("noise")
    keys, shape = jax.vmap(jax.random.key)(jnp.arange(3)), (8, 8, 1)
    base = trained.networks.method.noise(keys, shape)
    np.testing.assert_array_equal(noise.scaled_noise(1.0, keys, shape), base)
    np.testing.assert_array_equal(noise.scaled_noise(0.0, keys, shape), 0 * base)
    with pytest.raises(InputError, match="there is no"):
        noise.shared_noise(tmp_path / "no.npy", keys, shape)
    np.save(tmp_path / "noise.npy", base[0])
    np.testing.assert_array_equal(noise.shared_noise(tmp_path / "noise.npy", keys, shape)[2], base[0])
    with pytest.raises(InputError, match="but these images are"):
        noise.shared_noise(tmp_path / "noise.npy", keys, (16, 16, 1))


def test_inversion_leads_back_to_the_image(trained):
    networks, params = trained.networks, trained.sampler_params
    images, _ = images_of(trained, 4)
    settings = make_settings(SamplingConfig(num_denoising_steps=32, solver="euler"), trained.config)
    values = quantize(networks, trained.params, images).values
    data = 0.6 * (images / 127.5 - 1)
    start = module_of("noise").inverted(networks, params.decoder, values, data.astype(np.float32), settings.times)
    decoded = sampler.decode(networks, params, settings, values, jnp.arange(4), noise=start).images
    assert 10 * np.log10(4 / np.square(decoded - data / 0.6).mean()) > 40


def test_report_on_a_gaussian(report):
    """Its velocity is a gradient, the image estimate has the rank of the covariance; a rotation on top changes no marginal, but
    is no gradient."""
    key = jax.random.key(0)
    deviation = np.array([1.0, 1.0, 1.0, 0, 0])
    rotation = np.zeros((5, 5))
    rotation[0, 1], rotation[1, 0] = 1, -1

    def field(x, t, turn=0.0):
        variance = t**2 * deviation**2 + (1 - t) ** 2
        return (t * deviation**2 - (1 - t)) / variance * x + turn * x @ rotation

    x = jax.random.normal(key, (4000, 5))
    assert report["asymmetry"](lambda x: field(x, 0.4), x[:8], key) < 1e-5
    assert report["asymmetry"](lambda x: field(x, 0.4, 1.0), x[:8], key) > 0.1
    image = lambda x: x + 0.6 * field(x, 0.4)  # noqa: E731
    assert report["effective_rank"](image, x[:8], key) == pytest.approx(3, abs=1e-2)
    turning = functools.partial(field, turn=1.0)
    drawn = [solve(solvers.variable_adams2, even(64), x, each)[0] for each in (field, turning)]
    assert np.abs(drawn[0] - drawn[1]).mean() > 0.1
    np.testing.assert_allclose(*(np.cov(each, rowvar=False) for each in drawn), atol=0.06)


def test_scripts(report, trained, tmp_path, capsys, monkeypatch):
    steps, noise = module_of("steps"), module_of("noise")
    for module in (steps, noise):
        monkeypatch.setattr(module, "load_tokenizer", lambda run: trained)
    monkeypatch.setitem(report["main"].__globals__, "load", lambda run: SimpleNamespace(trained=trained))
    steps.main("run", evaluations=(2, 3), images=4, noises=1)
    assert "5 allocations tried" in capsys.readouterr().out
    noise.main("run", candidates=2, images=4, out=tmp_path / "noise.npy")
    assert np.load(tmp_path / "noise.npy").shape == (8, 8, 1) and "best of 2" in capsys.readouterr().out
    report["main"]("run", tmp_path, images=4)
    assert {"report.json", "groups.png", "times.png"} <= {path.name for path in tmp_path.iterdir()}
