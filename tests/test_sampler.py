"""The sampler: streaming, whole images and plain loops agree; samples do not depend on what is sampled beside them."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import MeshConfig, SamplingConfig, TransformerConfig
from dar_jax.errors import InputError
from dar_jax.models import flow
from dar_jax.models.blocks import unstack
from dar_jax.models.transformer import Llama
from dar_jax.parallel import batch_sharding, make_mesh, shardings
from dar_jax.sampling.denoise import denoise, schedule
from dar_jax.sampling.predict import _predict
from dar_jax.sampling.prepare import prepare, separate
from dar_jax.sampling.sampler import advance, begin, decode, generate, lookup_codes, regroup, snapshot, stream
from dar_jax.sampling.settings import Networks, make_settings, normal_noise, per_sample

LABELS = jnp.array([3, 1, 4, 1, 0, 2, 4])
SEEDS = jnp.array([5, 6, 7, 8, 9, 10, 5])
SAMPLING = SamplingConfig(guidance=(1.5, 4.0), top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def make_networks(tiny_tokenizer):
    """make(**tokenizer sizes) -> (networks, parameters) of both stages, with random weights everywhere."""

    def make(**sizes):
        tokenizer, tokenizer_params = tiny_tokenizer(**sizes)
        sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 32, "mlp_multiple": 8}
        config = TransformerConfig(**sizes, num_tokens=16, vocab_size=64, num_classes=5)
        model = Llama(config)
        params = jax.jit(model.init)(jax.random.key(2), jnp.zeros(1, jnp.int32), jnp.zeros((1, 16), jnp.int32))["params"]
        params |= {"output": jax.random.normal(jax.random.key(3), params["output"].shape)}
        return Networks(tokenizer, model), {"tokenizer": tokenizer_params, "transformer": params}

    return make


@pytest.fixture(scope="module")
def networks(make_networks):
    return make_networks()


def sample(networks, config=SAMPLING, labels=LABELS, seeds=SEEDS, **given):
    modules, params = networks
    return generate(modules, params, make_settings(config, modules.tokenizer.config), labels, seeds, **given)


def noise_of(seeds, model):
    return normal_noise(jax.vmap(jax.random.key)(seeds), model.noise_shape)


def assert_same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.images, b.images, atol=2e-5)


@pytest.mark.parametrize("sizes", [[1] * 16, [4] * 4, [16], [3, 1, 12]], ids=str)
def test_cached_slots_give_the_logits_of_the_complete_sequence(networks, sizes):
    """However many at a time; the rows may stand at different positions, over what rejected tokens left behind."""
    model, params = networks[0].transformer, {"params": networks[1]["transformer"]}
    tokens = jax.random.randint(jax.random.key(0), (3, 16), 0, 64)
    expected = model.apply(params, LABELS[:3], tokens)
    x = jnp.concatenate(
        [model.apply(params, LABELS[:3], method="prefix"), model.apply(params, tokens[:, :-1], method="embed")], 1
    )
    layers = unstack(params["params"]["blocks"], model.config.layers)
    extend = jax.jit(functools.partial(model.apply, params, method="extend"))
    caches, position = model.empty_caches(3, 20), 0
    for size in sizes:
        logits, caches = extend(layers, x[:, position : position + size], caches, jnp.int32(position))
        np.testing.assert_allclose(logits, expected[:, position : position + size], atol=1e-5)
        position += size

    starts = jnp.array([0, 7, 12])  # rows written again from different positions on, from garbage further on
    caches = jax.tree.map(lambda leaf: leaf.at[:, :, 12:].set(1e3), caches)
    windows = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, 4))(x, starts)
    logits, _ = extend(layers, windows, caches, starts)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(logits[row], expected[row, start : start + 4], atol=1e-5)


def test_stream_is_generate(networks):
    modules, params = networks
    whole = sample(networks, previews=True)
    settings = make_settings(SAMPLING, modules.tokenizer.config)
    for index, part in enumerate(stream(modules, params, settings, LABELS, SEEDS)):
        np.testing.assert_array_equal(part.tokens, whole.tokens[:, : 4 * (index + 1)])
        np.testing.assert_allclose(part.images, whole.previews[index], atol=2e-5)
    assert index == 3
    assert_same(part, whole)


def test_images_are_those_of_decoding_the_tokens(networks):
    modules, params = networks
    whole = sample(networks, previews=True)
    settings = make_settings(SAMPLING, modules.tokenizer.config)
    decoded = decode(modules, params, settings, lookup_codes(modules, params, whole.tokens), SEEDS, previews=True)
    np.testing.assert_allclose(decoded.images, whole.images, atol=2e-5)
    np.testing.assert_allclose(decoded.previews, whole.previews, atol=2e-5)


def test_a_sample_does_not_depend_on_its_batch(networks):
    whole = sample(networks)
    assert len(np.unique(whole.tokens, axis=0)) == len(SEEDS)
    for index in (0, 4):
        alone = sample(networks, labels=LABELS[index : index + 1], seeds=SEEDS[index : index + 1])
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[index])
        np.testing.assert_allclose(alone.images[0], whole.images[index], atol=2e-5)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2)])
def test_a_sample_does_not_depend_on_the_devices(networks, axes):
    modules, params = networks
    labels, seeds = jnp.append(LABELS, 2), jnp.append(SEEDS, 11)
    one = sample(networks, labels=labels, seeds=seeds)
    mesh = make_mesh(MeshConfig(*axes))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(params, mesh))
        labels, seeds = jax.device_put((labels, seeds), batch_sharding(mesh))
        many = sample((modules, params), labels=labels, seeds=seeds)
    assert many.images.sharding.num_devices == 8
    assert_same(one, many)


def test_a_decoder_on_devices_of_its_own(networks):
    """The same samples and previews; the transformer's work stays on its mesh, the decoder's on the other."""
    modules, params = networks
    labels, seeds = jnp.append(LABELS, 2), jnp.append(SEEDS, 11)
    one = sample(networks, labels=labels, seeds=seeds, previews=True)
    mesh, other = make_mesh(MeshConfig(2, 1, 2), jax.devices()[:4]), make_mesh(MeshConfig(4, 1, 1), jax.devices()[4:])
    settings = make_settings(SAMPLING, modules.tokenizer.config)
    with jax.set_mesh(mesh):
        prepared = separate(prepare(modules, jax.device_put(params, shardings(params, mesh))), other)
        placed = jax.device_put((labels, seeds), batch_sharding(mesh))
        many = generate(modules, prepared, settings, *placed, previews=True)
        for index, part in enumerate(stream(modules, prepared, settings, *placed)):
            np.testing.assert_allclose(part.images, one.previews[index], atol=2e-5)
    assert_same(one, many)
    np.testing.assert_allclose(many.previews, one.previews, atol=2e-5)
    assert many.tokens.devices() == set(mesh.devices.flat) and many.images.devices() == set(other.devices.flat)


@pytest.mark.parametrize("num_steps", [3, 8])
def test_other_step_counts_stream_exactly(networks, num_steps):
    """The steps taken group by group are the steps of decoding all tokens at once."""
    modules, params = networks
    config = dataclasses.replace(SAMPLING, num_denoising_steps=num_steps)
    whole = sample(networks, config)
    settings = make_settings(config, modules.tokenizer.config)
    decoded = decode(modules, params, settings, lookup_codes(modules, params, whole.tokens), SEEDS)
    np.testing.assert_allclose(decoded.images, whole.images, atol=2e-5)


def test_wider_conditioning_waits_for_its_tokens(make_networks):
    """With more tokens a step than a group has, a step runs once the last of them exists."""
    networks = make_networks(queries_per_step=6)
    config = networks[0].tokenizer.config
    np.testing.assert_array_equal(schedule(networks[0].tokenizer, (0, 0.25, 0.5, 0.75)).ready, [0, 0, 1, 2, 4])
    whole = sample(networks)
    decoded = decode(*networks, make_settings(SAMPLING, config), lookup_codes(*networks, whole.tokens), SEEDS)
    np.testing.assert_allclose(decoded.images, whole.images, atol=2e-5)


def test_prefix_stop_and_greedy(networks):
    whole = sample(networks)
    other = SEEDS + 100
    for length in (0, 5, 16):
        prefix = whole.tokens[:, :length]
        continued = sample(networks, seeds=SEEDS, prefix=prefix)
        np.testing.assert_array_equal(continued.tokens, whole.tokens)  # its own prefix changes nothing
        continued = sample(networks, seeds=other, prefix=prefix)
        np.testing.assert_array_equal(continued.tokens[:, :length], prefix)
        assert length == 16 or np.any(continued.tokens != whole.tokens)
    num_given = np.array([3, 4, 2, 3, 16, 4, 5])
    mixed = sample(networks, seeds=other, prefix=whole.tokens, num_given=num_given)
    for row, count in enumerate(num_given):
        np.testing.assert_array_equal(mixed.tokens[row, :count], whole.tokens[row, :count])

    stopped = sample(networks, dataclasses.replace(SAMPLING, num_groups=2))
    np.testing.assert_array_equal(stopped.tokens, whole.tokens[:, :8])
    np.testing.assert_allclose(stopped.images, sample(networks, previews=True).previews[1], atol=2e-5)

    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    np.testing.assert_array_equal(sample(networks, greedy).tokens, sample(networks, greedy, seeds=other).tokens)
    only_best = dataclasses.replace(SAMPLING, top_k=1)
    np.testing.assert_array_equal(sample(networks, greedy).tokens, sample(networks, only_best, seeds=other).tokens)


def test_guidance_interval(networks):
    """Past the interval the tokens are those of an unguided run that starts with the guided prefix."""
    greedy = dataclasses.replace(SAMPLING, temperature=0.0, guidance=(4.0, 4.0))
    part = sample(networks, dataclasses.replace(greedy, cfg_interval=6))
    np.testing.assert_array_equal(part.tokens[:, :8], sample(networks, greedy).tokens[:, :8])
    unguided = dataclasses.replace(greedy, guidance=(1.0, 1.0))
    np.testing.assert_array_equal(part.tokens, sample(networks, unguided, prefix=part.tokens[:, :8]).tokens)


def test_start_from_an_image(networks):
    """From step j on the ODE starts between noise and the image; the closer to the end, the more of the image stays."""
    modules, _ = networks
    image = jnp.tanh(jax.random.normal(jax.random.key(9), (7, 8, 8, 1)))
    distances = []
    for start in range(4):
        started = sample(networks, dataclasses.replace(SAMPLING, start_step=start), image=image)
        distances.append(float(jnp.abs(started.images - image).mean()))
    assert distances == sorted(distances, reverse=True)
    from_start = sample(networks, dataclasses.replace(SAMPLING, start_step=0), image=image)
    assert_same(from_start, sample(networks))  # at t' = 0 nothing of the image is left

    # One Euler step from the image at the last time, by hand.
    last = dataclasses.replace(SAMPLING, start_step=3)
    started = sample(networks, last, image=image)
    config, (_, params) = modules.tokenizer.config, networks
    times = schedule(modules.tokenizer, (0, 0.25, 0.5, 0.75)).times
    x = flow.interpolate(noise_of(SEEDS, modules.tokenizer), config.velocity.data_std * image, times[3])
    apply = functools.partial(modules.tokenizer.apply, {"params": params["tokenizer"]})
    condition = apply(lookup_codes(*networks, started.tokens), method="condition")
    velocity, _ = apply(x, jnp.full(7, times[3]), condition[:, 12:], method="velocity")
    by_hand = (x + (1 - times[3]) * velocity) / config.velocity.data_std
    np.testing.assert_allclose(started.images, by_hand, atol=2e-5)


def test_higher_resolution(make_networks):
    networks = make_networks(sampling_resolution=12)
    assert sample(networks).images.shape == (7, 12, 12, 1)
    networks = make_networks(sampling_resolution=12, output_resolution=8)
    assert sample(networks).images.shape == (7, 8, 8, 1)
    whole = sample(networks, previews=True)
    np.testing.assert_allclose(whole.previews[-1], whole.images, atol=1e-6)


def test_one_compilation_serves_all_scales(networks):
    sample(networks)
    compiled = [piece._cache_size() for piece in (_predict, denoise)]
    sample(networks, dataclasses.replace(SAMPLING, guidance=(2.0, 9.0), temperature=0.7, top_k=10, top_p=0.5), seeds=SEEDS + 1)
    assert [piece._cache_size() for piece in (_predict, denoise)] == compiled


def test_noise_has_seeds_of_its_own(networks):
    """The tokens follow from `seeds`, the noise that they drive from `noise_seeds`."""
    modules, params = networks
    whole, other = sample(networks), sample(networks, seeds=SEEDS + 100, noise_seeds=SEEDS)
    np.testing.assert_array_equal(sample(networks, noise_seeds=SEEDS + 100).tokens, whole.tokens)
    assert np.any(other.tokens != whole.tokens)
    settings = make_settings(SAMPLING, modules.tokenizer.config)
    decoded = decode(modules, params, settings, lookup_codes(modules, params, other.tokens), SEEDS)
    np.testing.assert_allclose(other.images, decoded.images, atol=2e-5)


def test_states_are_put_together_and_taken_apart(networks):
    """Three begun at different times, one with a given prefix, go on together, then apart: the samples of each alone."""
    modules, params = networks
    params, settings = prepare(modules, params), make_settings(SAMPLING, modules.tokenizer.config)
    whole = sample(networks)
    run = functools.partial(advance, modules, params, settings)
    start = functools.partial(begin, modules, params, settings)
    first = run(start(LABELS[:2], SEEDS[:2]))
    second = run(start(LABELS[2:6], SEEDS[2:6], whole.tokens[2:6, :5]))  # the first group of which takes no prediction
    third = run(start(LABELS[6:], SEEDS[6:]))
    with pytest.raises(ValueError, match="differ"):
        regroup([first, run(third)], [0])
    with pytest.raises(ValueError, match="differ"):  # what is in the caches already
        regroup([first, second], [0])
    together = regroup([run(first), run(second), run(third)], [6, 5, 3, 0, 0])
    apart = run(regroup([run(together)], [1, 3]))
    for state, rows in ((run(run(together)), [6, 5, 3, 0, 0]), (apart, [5, 0])):
        samples = snapshot(modules, params, state)
        np.testing.assert_array_equal(samples.tokens, whole.tokens[np.array(rows)])
        np.testing.assert_allclose(samples.images, whole.images[np.array(rows)], atol=2e-5)


def test_every_sample_has_its_own_settings(networks):
    """In one batch: each has the tokens and the image of the same settings alone."""
    modules, params = networks
    differing = [{}, {"guidance": (1.0, 6.0)}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.3, "guidance": (3.0, 2.0)}]
    configs = [dataclasses.replace(SAMPLING, **fields) for fields in differing]
    settings = [make_settings(config, modules.tokenizer.config) for config in configs]
    together = generate(modules, params, per_sample(settings), LABELS[:5], SEEDS[:5])
    for row, config in enumerate(configs):
        alone = sample(networks, config, LABELS[row : row + 1], SEEDS[row : row + 1])
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.images[row], alone.images[0], atol=2e-5)
    with pytest.raises(ValueError):
        per_sample([settings[0], make_settings(SamplingConfig(temperature=0.0), modules.tokenizer.config)])


def test_unguided_rows_end_with_guidance(networks):
    """Within a group, and with the samples of carrying them on to the last token."""
    modules, params = networks
    settings = make_settings(dataclasses.replace(SAMPLING, cfg_interval=4), modules.tokenizer.config)
    assert settings.guided == 6
    cut, whole = (generate(modules, params, dataclasses.replace(settings, guided=guided), LABELS, SEEDS) for guided in (6, 16))
    assert_same(cut, whole)
    assert make_settings(dataclasses.replace(SAMPLING, guidance=(1.0, 1.0)), modules.tokenizer.config).guided == 0


def test_tokens_do_not_depend_on_the_groups(networks, make_networks):
    """One token a group, with caches that grow every second one, draws what four groups of four do."""
    np.testing.assert_array_equal(sample(make_networks(num_groups=16)).tokens, sample(networks).tokens)


def test_one_program_is_the_pieces(networks):
    modules, params = networks
    settings = make_settings(SAMPLING, modules.tokenizer.config)
    assert_same(jax.jit(generate, static_argnums=0)(modules, params, settings, LABELS, SEEDS), sample(networks))


def test_prepared_parameters(networks):
    """Matrices are converted, what is computed in float32 is not; the samples are those of preparing in the call."""
    modules, params = networks
    half = Networks(modules.tokenizer.clone(dtype=jnp.bfloat16), modules.transformer.clone(dtype=jnp.bfloat16))
    prepared = prepare(half, params)
    layer = prepared.transformer.layers[1]
    assert layer["mlp"]["down"]["kernel"].dtype == prepared.transformer.rest["output"].dtype == jnp.bfloat16
    assert layer["mlp_norm"]["scale"].dtype == prepared.decoder.rest["quantizer"]["codebook"].dtype == jnp.float32
    assert_same(sample((half, prepared)), sample((half, params)))


def test_condition_tokens_and_velocities_see_no_later_codes(networks):
    modules, params = networks
    config = modules.tokenizer.config
    values = jax.random.normal(jax.random.key(4), (1, 16, 8))
    settings = make_settings(SAMPLING, config)

    def condition(values):
        return modules.tokenizer.apply({"params": params["tokenizer"]}, values, method="condition")

    def previews(values):
        return decode(modules, params, settings, values, SEEDS[:1], previews=True).previews

    of_condition = np.abs(jax.jacrev(lambda v: condition(v)[0, :, 0])(values)[:, 0]).sum(-1)  # [T, T]
    np.testing.assert_array_equal(np.triu(of_condition, 1), 0)
    assert np.all(of_condition[np.tril_indices(16)] > 0)
    of_steps = np.abs(jax.jacfwd(lambda v: previews(v)[:, 0])(values)[..., 0, :, :]).sum((1, 2, 3, 5))  # [S, T]
    for step in range(4):
        np.testing.assert_array_equal(of_steps[step, 4 * (step + 1) :], 0)
        assert np.all(of_steps[step, : 4 * (step + 1)] > 0)


def test_logits_see_no_later_tokens(networks):
    """By gradients: with respect to the token table, through sequences whose tokens all differ."""
    model, params = networks[0].transformer, networks[1]["transformer"]
    tokens = jnp.arange(16)[None]

    def logits(table):
        return model.apply({"params": params | {"token_table": table}}, LABELS[:1], tokens)[0].sum(-1)

    jacobian = np.abs(jax.jacrev(logits)(params["token_table"])).sum(-1)[:, :16]  # [T, T]
    np.testing.assert_array_equal(np.triu(jacobian), 0)  # token i is the input of i + 1
    assert np.all(jacobian[np.tril_indices(16, -1)] > 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_groups": 5},
        {"start_step": 4},
        {"temperature": 1e-40},
        {"top_p": 2.0},
        {"top_k": 2**31},
        {"guidance": (1.0, np.nan)},
        {"num_denoising_steps": 0},
        {"num_groups": 0},
    ],
)
def test_wrong_settings(networks, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make_settings(dataclasses.replace(SAMPLING, **wrong), networks[0].tokenizer.config)


def test_bfloat16_runs_close_to_float32(networks):
    modules, params = networks
    half = Networks(modules.tokenizer.clone(dtype=jnp.bfloat16), modules.transformer.clone(dtype=jnp.bfloat16))
    tokens = sample(networks).tokens
    images = sample((half, params), prefix=tokens).images
    chex.assert_type(images, jnp.float32)
    assert float(jnp.abs(images - sample(networks).images).mean()) < 0.1
