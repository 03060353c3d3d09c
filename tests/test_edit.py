"""Editing: what is known stays, particles find the posterior, and a result depends on its own image, label and seed alone."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dar_jax.cli.main import main
from dar_jax.config import MeshConfig, SamplingConfig
from dar_jax.inference.edit import edit
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import load_sampler
from dar_jax.models import flow
from dar_jax.parallel import make_mesh
from dar_jax.quickstart import digits
from dar_jax.sampling import particles as particles_module
from dar_jax.sampling.observe import Observed, log_likelihood, pool, project
from dar_jax.sampling.particles import Particles, advance_particles, begin_particles, systematic
from dar_jax.sampling.predict import Predictor
from dar_jax.sampling.prepare import prepare
from dar_jax.sampling.sampler import decode, generate, lookup_codes
from dar_jax.sampling.settings import Method, Networks, make_settings
from dar_jax.sampling.solvers import Velocity, adams2, euler

SAMPLING = SamplingConfig(guidance=(1.5, 3.0))
LABELS, SEEDS = np.array([3, 1, 4]), np.array([5, 6, 7], np.uint32)


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load_sampler(tiny_run, mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]))


@pytest.fixture(scope="module")
def images():
    return digits("test")[0][:3]


@pytest.fixture(scope="module")
def left():
    return np.broadcast_to(np.arange(8) < 4, (3, 8, 8))


def edited(trained, *arguments, **options):
    parts = list(edit(trained, *arguments, **options))
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "tokens", "labels")}


def solve(solver, velocity, x, steps=4):
    carry, times = solver.init(x), np.float32(flow.shift_time(np.linspace(0, 1, steps + 1), 2.0))
    for t, t_next in zip(times, times[1:]):
        x, preview, carry = solver.step(velocity, x, carry, t, t_next, None)
    return preview


def steered(observed, function=lambda x, t: jnp.sin(5 * x) - t, **options):
    network = Velocity(function, scale=0.6, **options)
    return dataclasses.replace(network, function=lambda x, t: project(network, x, t, observed))


@pytest.mark.parametrize("solver", [euler, adams2])
def test_projection_ends_at_what_is_known(solver):
    """At pixels under a mask, at all of them, at means over squares; with none it changes no bit."""
    x, image = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 2))
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 8, 8, 1)).astype(jnp.float32)
    known = solve(solver, steered(Observed(image, mask)), x) / 0.6
    np.testing.assert_allclose(known * mask, image * mask, atol=1e-5)
    assert np.abs(known - image).max() > 0.1
    np.testing.assert_allclose(solve(solver, steered(Observed(image, jnp.ones_like(mask))), x) / 0.6, image, atol=1e-5)
    small, half = pool(image, 4), mask[:, ::2, ::2]
    means = pool(solve(solver, steered(Observed(small, half)), x) / 0.6, 4)
    np.testing.assert_allclose(means * half, small * half, atol=1e-5)
    free = solve(solver, steered(Observed(image, jnp.zeros_like(mask))), x)
    np.testing.assert_array_equal(free, solve(solver, steered(None), x))


def test_projection_on_another_path():
    """x = cos(a t) noise + sin(a t) data: the velocity that the path itself takes for these data."""

    def at(noise, data, t):
        return jnp.cos(np.pi / 2 * t) * noise + jnp.sin(np.pi / 2 * t) * data

    def data_of(x, v, t):
        return jnp.sin(np.pi / 2 * t) * x + jnp.cos(np.pi / 2 * t) * v / (np.pi / 2)

    noise, data = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 1))
    t = jnp.float32(0.4)
    field = steered(Observed(data / 0.6, jnp.ones((2, 4, 4, 1))), data=data_of)
    expected = jax.jvp(lambda t: at(noise, data, t), (t,), (jnp.ones(()),))[1]
    np.testing.assert_allclose(field(at(noise, data, t), t), expected, atol=1e-5)


def test_likelihood_counts_what_is_known():
    image = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    mask = jnp.zeros((2, 4, 4, 1)).at[0, :2].set(1).at[1, 0, 0].set(1)
    tried = image[:, None] + jnp.array([0.0, 0.1, 0.2]).reshape(1, 3, 1, 1, 1)
    tried = tried.at[:, :, 3].set(9.0)  # not looked at
    fit = log_likelihood(tried, Observed(image, mask))
    np.testing.assert_allclose(fit[:, 1] - fit[:, 2], np.array([8, 1]) / 2 * np.log((0.04 + 1e-5) / (0.01 + 1e-5)), rtol=1e-3)
    assert (np.diff(fit, axis=1) < 0).all()


def test_systematic_resampling():
    weights = np.array([0.1, 0.0, 0.6, 0.3])
    np.testing.assert_array_equal(systematic(np.full(4, 0.25), 4, 0.999), np.arange(4))
    counts = np.mean([np.bincount(systematic(weights, 8, (i + 0.5) / 50), minlength=4) for i in range(50)], axis=0)
    np.testing.assert_allclose(counts / 8, weights, atol=0.01)
    for start in (0.0, 0.5, 1 - 1e-9):
        drawn = np.bincount(systematic(weights, 8, start), minlength=4)
        assert (np.abs(drawn - 8 * weights) < 1).all() and drawn.sum() == 8


class Tabulated(NamedTuple):
    tokens: jax.Array
    keys: jax.Array
    calls: jax.Array


def test_particles_find_the_posterior(tiny_tokenizer):
    """Two groups of one token with four codes, a tabulated transformer: by enumeration, total variation below 0.03."""
    tokenizer, weights = tiny_tokenizer(num_tokens=2, num_groups=2, num_denoising_steps=2, codebook_size=4, decoder_layers=1)
    first = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    second = jax.nn.log_softmax(jax.random.normal(jax.random.key(5), (4, 4)))

    def group(networks, params, settings, state, group):
        logits = jnp.broadcast_to(first, (len(state.keys), 4)) if group == 0 else second[state.tokens[:, 0]]
        keys = jax.vmap(lambda key: jax.random.fold_in(key, group))(state.keys)
        token = jax.vmap(jax.random.categorical)(keys, logits)
        return state._replace(tokens=state.tokens.at[:, group].set(token))

    def begin(networks, params, settings, condition, seeds, *_):
        zeros = jnp.zeros(len(seeds), jnp.int32)
        return Tabulated(jnp.zeros((len(seeds), 2), jnp.int32), jax.vmap(jax.random.key)(seeds), zeros)

    method = Method(predict=Predictor(begin, group), noise=lambda keys, shape: jnp.zeros((len(keys), *shape)))
    networks = Networks(tokenizer, method=method)
    params = prepare(networks, {"tokenizer": weights})
    settings = make_settings(SamplingConfig((1, 1)), tokenizer.config, method)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(4), jnp.arange(4), indexing="ij"), axis=-1).reshape(16, 2)
    table = decode(networks, params, settings, lookup_codes(networks, {"tokenizer": weights}, pairs), jnp.arange(16)).images
    observed = Observed(table[6:7] + 0.1, (jnp.arange(64) % 32 == 9).reshape(1, 8, 8, 1).astype(jnp.float32))
    likelihood = functools.partial(log_likelihood, observed=observed)
    posterior = jax.nn.softmax(first[pairs[:, 0]] + second[pairs[:, 0], pairs[:, 1]] + likelihood(table[None])[0])
    assert 0.15 < posterior.max() < 0.9  # neither flat nor a single point

    count = 4096
    state = begin_particles(networks, params, settings, jnp.zeros(count, jnp.int32), np.array([3]), count)
    for _ in range(2):
        state = advance_particles(networks, params, settings, state, likelihood, count)
    codes = np.asarray(state.tokens) @ [4, 1]
    drawn = np.bincount(codes, weights=state.weights[0], minlength=16)
    assert np.abs(drawn - posterior).sum() / 2 < 0.03
    assert len(np.unique(state.origins)) < count  # they were resampled on the way


def run_particles(trained, likelihood, count, guidance=(1.5, 3.0)):
    """The states of particles after each group."""
    networks, params = trained.networks, trained.sampler_params
    settings = make_settings(SamplingConfig(guidance), trained.config)
    state = begin_particles(networks, params, settings, jnp.repeat(jnp.asarray(LABELS), count), SEEDS, count)
    for _ in range(4):
        state = advance_particles(networks, params, settings, state, likelihood, count)
        yield state


def test_one_particle_is_plain_sampling(trained, images, left):
    (plain,) = sample(trained, LABELS, SEEDS, SAMPLING)
    result = edited(trained, images, left, LABELS, SEEDS, SAMPLING, (1,))
    np.testing.assert_array_equal(result["tokens"], plain.tokens)


def test_without_evidence_nothing_is_resampled(trained):
    *_, state = run_particles(trained, lambda previews: jnp.full(previews.shape[:2], -7.0), 3)
    np.testing.assert_allclose(state.weights, 1 / 3)
    np.testing.assert_array_equal(state.origins, np.tile(np.arange(3), (3, 1)))
    (plain,) = sample(trained, np.repeat(LABELS, 3), state.own_seeds.reshape(-1), SAMPLING)
    np.testing.assert_array_equal(state.tokens, plain.tokens)


def test_resampled_particles_go_on_as_if_their_tokens_were_given(trained, monkeypatch):
    """So the rows of a guided cache, two for each particle, follow; and each copy draws anew."""
    monkeypatch.setattr(particles_module, "ENOUGH", 2.0)
    favour = lambda previews: jnp.broadcast_to(jnp.array([0.0, 9.0, 0.0]), previews.shape[:2])  # noqa: E731
    states: list[Particles] = list(run_particles(trained, lambda previews: favour(previews) * previews.size, 3))
    settings = make_settings(SAMPLING, trained.config)
    assert (states[0].origins == 1).all()
    for before, after in zip(states, states[1:]):
        done = 4 * before.state.group
        arguments = trained.networks, trained.sampler_params, settings, jnp.repeat(jnp.asarray(LABELS), 3)
        given = before.tokens[:, :done]
        expected = generate(*arguments, jnp.asarray(before.own_seeds.reshape(-1)), prefix=given).tokens[:, : done + 4]
        rows = np.arange(9) // 3 * 3 + 1  # of which all are copies
        np.testing.assert_array_equal(after.tokens[:, : done + 4], expected[rows])
        assert len(np.unique(expected, axis=0)) == 9


def test_who_stays_keeps_its_keys(trained):
    """Where one sample's particles are drawn anew and another's are not, whatever keys a predictor has."""
    before = next(iter(run_particles(trained, lambda previews: jnp.zeros(previews.shape[:2]), 3)))
    prediction = before.state.prediction
    others = dataclasses.replace(prediction, keys=jax.vmap(jax.random.fold_in, (0, None))(prediction.keys, 7))
    before = dataclasses.replace(before, state=dataclasses.replace(before.state, prediction=others))
    after = particles_module._resampled(before, np.array([True, False, False]), 3)
    same = (jax.random.key_data(after.state.prediction.keys) == jax.random.key_data(others.keys)).all(axis=1)
    np.testing.assert_array_equal(same, np.repeat([False, True, True], 3))


def test_an_edit_depends_on_itself_alone(trained, images, left):
    """And what is known stays; with a label, and with the image deciding."""
    for labels in (LABELS, None):
        together = edited(trained, images, left, labels, SEEDS, SAMPLING, (4, 2, 2, 3))
        np.testing.assert_array_equal(together["images"][left], images[left])
        assert (together["images"] != images).any(axis=(1, 2, 3)).all()
        for row in (0, 2):
            own = slice(row, row + 1)
            label = None if labels is None else labels[own]
            alone = edited(trained, images[own], left[own], label, SEEDS[own], SAMPLING, (4, 2, 2, 3))
            np.testing.assert_array_equal(alone["tokens"][0], together["tokens"][row])
            assert np.abs(alone["images"][0].astype(int) - together["images"][row]).max() <= 1


def test_more_particles_agree_better(trained, images, left):
    """The previews before anything is pasted, of random weights, are nearer to the known half."""
    errors = []
    for count in (1, 16):
        result = edited(trained, images, left, LABELS, SEEDS, SAMPLING, (count,))
        with jax.set_mesh(trained.mesh):
            settings = make_settings(SAMPLING, trained.config)
            values = lookup_codes(trained.networks, trained.params, jnp.asarray(result["tokens"]))
            plain = decode(trained.networks, trained.sampler_params, settings, values, jnp.asarray(SEEDS)).images
        errors.append(np.abs(plain - (images / 127.5 - 1))[left].mean())
    assert errors[1] < errors[0] - 0.02


@pytest.fixture(scope="module")
def files(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("files")
    shades = np.tile(np.repeat([0, 255], 4), (8, 1)).astype(np.uint8)
    transparent = np.stack([np.zeros_like(shades)] * 3 + [255 - shades], axis=-1)
    pictures = {
        "image": images[0, ..., 0],
        "mask": shades,
        "holes": transparent,
        "black": 0 * shades,
        "white": 0 * shades + 255,
    }
    for name, pixels in (pictures | {"narrow": shades[:, :7]}).items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def command(run, files, out, *arguments, mask="mask"):
    masked = [] if mask is None else ["--mask", files / f"{mask}.png"]
    paths = ["edit", run, "--image", files / "image.png", "--out", out, *masked]
    return main([str(argument) for argument in [*paths, "--particles", "2", *arguments]])


def test_command(tiny_run, files, tmp_path, images, left):
    assert command(tiny_run, files, tmp_path, "--label", "3", "--seeds", "1,2", "--previews") == 0
    drawn = [np.asarray(Image.open(tmp_path / f"tiny_label3_seed{seed}.png"))[..., None] for seed in (1, 2)]
    for image in drawn:
        np.testing.assert_array_equal(image[left[0]], images[0][left[0]])
    assert (drawn[0] != drawn[1]).any() and (tmp_path / "grid.png").exists() and (tmp_path / "groups.png").exists()
    assert command(tiny_run, files, tmp_path / "holes", "--label", "3", "--seeds", "1,2", mask="holes") == 0
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "holes" / "tiny_label3_seed1.png"))[..., None], drawn[0])


def test_command_with_other_beginnings(tiny_run, files, tmp_path):
    """No label; an enlargement; the image's own first tokens; its old content with noise."""
    assert command(tiny_run, files, tmp_path / "1", "--prefix-length", "4", "--start-step", "2") == 0
    assert len(list((tmp_path / "1").glob("tiny_label?_seed0.png"))) == 1
    assert command(tiny_run, files, tmp_path / "2", "--enlarge", "4", "--groups", "2", mask=None) == 0
    (path,) = (tmp_path / "2").glob("tiny_label?_seed0.png")
    assert Image.open(path).size == (8, 8)


@pytest.mark.parametrize(
    ("mask", "arguments", "word"),
    [
        ("black", [], "black.png has no white part"),
        ("white", [], "white.png is white"),
        ("narrow", [], "narrow.png is 7 x 8 pixels, the image"),
        ("none", [], "there is no image"),
        (None, [], "give a mask"),
        ("mask", ["--enlarge", "4"], "give a mask"),
        (None, ["--enlarge", "3"], "enlarge is 3"),
        (None, ["--enlarge", "4", "--prefix-length", "4"], "neither a prefix length"),
        ("mask", ["--prefix-length", "17"], "prefix length is 17"),
        ("mask", ["--particles", "2,2"], "one for each of the 4 groups"),
        ("mask", ["--particles", "0"], "particles"),
        ("mask", ["--label", "eleven"], "there is no class 'eleven'"),
        ("mask", ["--start-step", "4"], "start_step is 4"),
    ],
)
def test_what_is_refused(tiny_run, files, tmp_path, capsys, mask, arguments, word):
    assert command(tiny_run, files, tmp_path / "out", *arguments, mask=mask) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
