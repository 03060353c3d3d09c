"""Variants that are conditioned, marked or chosen: maps, watermarks, beginnings, codes of signs."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from fork_runs import (
    OWN,
    SHORT,
    TINY_TOKENIZER,
    TINY_TRANSFORMER,
    TRANSFORMERS,
    module_of,
    path_of,
    run,
    tokens_of,
    trains_and_reconstructs,
    trains_and_samples,
)
from PIL import Image

from dar_jax.cli.main import main
from dar_jax.config import SamplingConfig
from dar_jax.experiment import load_experiment
from dar_jax.inference.trained import load_sampler, load_tokenizer
from dar_jax.models.transformer import score
from dar_jax.sampling import sampler
from dar_jax.sampling.settings import make_settings
from dar_jax.training import checkpoint


@pytest.mark.parametrize("name", TRANSFORMERS["condition"])
def test_transformer_trains_and_samples(name, trained, tmp_path):
    trains_and_samples(name, trained(name), tmp_path)


def control(tiny_run, one_device, name="control", seed=5):
    """A fork whose parameters are those of `tiny_run` and, of what is new, random ones: (networks, parameters, base)."""
    base, experiment = load_sampler(tiny_run, mesh=one_device), load_experiment(path_of(name))
    sizes = dataclasses.replace(experiment.config, model=base.networks.transformer.config)
    experiment = experiment.with_config(sizes)
    model = experiment.build_model()
    new = {**experiment.init_params(model), **base.params["transformer"]}
    start = new["control_in"]["kernel"]
    new["control_in"] = {"kernel": start + (0 if seed is None else jax.random.normal(jax.random.key(seed), start.shape))}
    networks = dataclasses.replace(base.networks, transformer=model, method=experiment.method, condition=experiment.condition)
    return networks, {**base.params, "transformer": new}, base


def control_batch(count=3):
    images = jax.random.uniform(jax.random.key(7), (count, 8, 8, 1), minval=-1)
    return {"label": jnp.arange(count), "image": images}, jax.random.randint(jax.random.key(8), (count, 16), 0, 64)


def logits_of(networks, params, condition, codes):
    return networks.transformer.apply({"params": params["transformer"]}, condition, codes)


def test_control_begins_as_the_base(tiny_run, one_device):
    networks, params, base = control(tiny_run, one_device, seed=None)
    batch, codes = control_batch()
    logits = logits_of(networks, params, networks.condition(batch), codes)
    np.testing.assert_array_equal(logits, logits_of(base.networks, base.params, batch["label"], codes))


@pytest.mark.parametrize(("name", "guidance"), [("control", (1, 1)), ("control:strong", (2, 3))])
def test_without_a_map_control_samples_as_the_base(name, guidance, tiny_run, one_device):
    networks, params, base = control(tiny_run, one_device, name)
    settings, seeds = make_settings(SamplingConfig(guidance), base.config), jnp.arange(6)
    for given in ({}, {"prefix": jnp.arange(30).reshape(6, 5)}):
        expected = sampler.generate(base.networks, base.params, settings, seeds % 10, seeds, **given).tokens
        condition = networks.condition({"label": seeds % 10})
        np.testing.assert_array_equal(sampler.generate(networks, params, settings, condition, seeds, **given).tokens, expected)


def test_every_token_sees_the_map_and_none_sees_later_tokens(tiny_run, one_device):
    networks, params, _ = control(tiny_run, one_device)
    batch, codes = control_batch()
    logits = logits_of(networks, params, networks.condition(batch), codes)
    other = logits_of(networks, params, networks.condition({**batch, "image": -batch["image"]}), codes)
    assert (np.abs(logits - other).max(-1) > 1e-4).all()
    changed = logits_of(networks, params, networks.condition(batch), codes.at[:, 9].set((codes[:, 9] + 1) % 64))
    np.testing.assert_array_equal((np.abs(logits - changed) > 0).any(axis=(0, 2)), np.arange(16) > 9)


def test_label_and_map_are_guided_apart(tiny_run, one_device):
    """The most probable tokens are those of three passes over complete images, put together."""
    networks, params, base = control(tiny_run, one_device, "control:strong")
    batch, _ = control_batch()
    condition = networks.condition(batch)
    settings = make_settings(SamplingConfig((3, 3), temperature=0.0), base.config)
    tokens = sampler.generate(networks, params, settings, condition, jnp.arange(3)).tokens
    nothing = networks.transformer.null(condition)
    each = [condition, {**condition, "label": nothing["label"]}, nothing]
    both, by_map, none = (logits_of(networks, params, rows, tokens) for rows in each)
    np.testing.assert_array_equal((none + 2 * (by_map - none) + 3 * (both - by_map)).argmax(-1), tokens)
    np.testing.assert_array_equal(
        none, logits_of(base.networks, base.params, jnp.full(3, 10), tokens)
    )  # nothing is the base's nothing


def test_maps():
    maps = module_of("control").MAPS
    image = jnp.where(jnp.arange(8) < 4, -1.0, 1.0)[None, None, :, None] * jnp.ones((1, 8, 8, 1))
    np.testing.assert_allclose(maps["pooled"](image, 2)[0, :, :, 0], np.tile([-1, -1, 1, 1], (4, 1)))
    np.testing.assert_array_equal(maps["edges"](image, 2)[0, :, :, 0], np.tile([0, 0, 0, 1, 1, 0, 0, 0], (8, 1)))
    small = jax.random.uniform(jax.random.key(0), (2, 4, 4, 1))
    np.testing.assert_allclose(maps["pooled"](small.repeat(2, 1).repeat(2, 2), 2), small, rtol=1e-6)


def test_condition_image(trained, tiny_run, tmp_path, caplog):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "map.png")
    arguments = ["--labels", "3", "--seeds", "1", "--condition-image", tmp_path / "map.png", "--out", tmp_path / "out"]
    assert main([str(argument) for argument in ["sample", tiny_run, *arguments]]) == 2
    run("sample", trained("control"), "--experiment", path_of("control"), *arguments)
    assert (tmp_path / "out" / "grid.png").exists()


def test_the_base_of_early_control_stays(tiny_run, tmp_path):
    own = ["--tokenizer", tiny_run / "tokenizer", "--init-from", tiny_run, "--model.vocab-size", 64, *TINY_TRANSFORMER]
    run("train", path_of("early_control"), "--workdir", tmp_path, *SHORT, *own)
    before = checkpoint.load_part(checkpoint.inspect(tiny_run), "ema")
    after = checkpoint.load_part(checkpoint.inspect(tmp_path), "params")
    assert np.abs(after["control_in"]["kernel"]).max() > 0
    jax.tree.map(np.testing.assert_array_equal, before, {name: after[name] for name in before})


def test_watermark_without_bias_is_the_base(opened):
    watermark, base, seeds, sampling = module_of("watermark"), opened(None), np.arange(6), SamplingConfig((2, 2))
    networks = dataclasses.replace(base.networks, method=watermark.marked(0.0).method)
    settings = make_settings(sampling, base.config)
    tokens = sampler.generate(networks, base.params, settings, jnp.asarray(seeds % 10), jnp.asarray(seeds)).tokens
    np.testing.assert_array_equal(tokens, tokens_of(base, seeds % 10, seeds, sampling))


def test_watermark_is_detectable(opened):
    watermark, seeds, sampling = module_of("watermark"), np.arange(30), SamplingConfig((1, 1))
    marked, plain = (tokens_of(opened(name), seeds % 10, seeds, sampling) for name in ("watermark:strong", None))
    clusters = np.asarray(watermark.clusters_of(opened(None).networks, opened(None).params))
    assert watermark.p_value(marked, clusters) < 1e-6 < 1e-3 < watermark.p_value(plain, clusters)
    assert watermark.p_value(marked, clusters, key=1) > 1e-3
    ours = np.array([watermark.p_value(row[None], clusters) for row in marked])
    assert np.median(ours) < 0.01


def test_p_values_of_watermarks_are_exact(opened):
    watermark, rng = module_of("watermark"), np.random.default_rng(0)
    clusters, codes = np.arange(64) // 8, rng.integers(0, 64, (4, 16))
    codes[1:, :8] = codes[0, :8]  # the same coins
    found = np.array([watermark.p_value(codes, clusters, key) for key in range(400)])
    for level in (0.5, 0.2, 0.05):  # a p-value is as small as this as often as it says
        assert np.mean(found <= level) <= level + 3 * np.sqrt(level * (1 - level) / 400)
    assert np.mean(found <= 0.6) > 0.4
    natural = watermark.tosses(rng.integers(0, 64, (30, 16)), clusters) / 30
    found = np.array([watermark.p_value(codes, clusters, key, natural) for key in range(400)])
    assert np.mean(found <= 0.2) <= 0.2 + 3 * 0.02 and np.mean(found <= 0.6) > 0.4
    one = watermark.p_value(codes[:1], clusters, 3)
    greens = np.asarray(watermark.colours(3, np.arange(16), 8))[np.arange(16), clusters[codes[0]]].sum()
    assert one == pytest.approx(scipy.stats.binom.sf(greens - 1, 16, 0.5))


def test_the_noise_of_a_seed_is_found_in_its_tokens(opened):
    watermark, seeds, sampling = module_of("watermark"), np.arange(60, dtype=np.uint32), SamplingConfig((1, 1))
    tokens = tokens_of(opened(None), seeds % 10, seeds, sampling)
    right, wrong = (watermark.seed_p_value(tokens, seeds + offset, 64) for offset in (0, 1000))
    assert np.median(right) < 1e-6 and scipy.stats.kstest(wrong, "uniform").pvalue > 0.001
    key, logits = jax.random.key(3), jax.random.normal(jax.random.key(4), (64,))
    assert jax.random.categorical(key, logits) == jnp.argmax(logits + jax.random.gumbel(key, (64,)))


def test_detector(tiny_run, tmp_path, monkeypatch, capsys):
    run("sample", tiny_run, "--labels", "3", "--seeds", "1,2", "--out", tmp_path)
    watermark, images = module_of("watermark"), sorted(tmp_path.glob("*_seed*.png"))
    for seeds in ((), (1, 2, 3)):
        watermark.detect(str(tiny_run), tuple(images), (images[0],), seeds, first=8)
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert len(images) == 2 and all(re.search(r"p = [\d.e-]+$", line) for line in lines) and "together" in lines[2]


def chosen(opened, count, groups, score, seeds=range(6), sampling=None, **given):
    """Tokens with the best of so many beginnings, and the passes."""
    base, early = opened(None), module_of("early_choice")
    networks = dataclasses.replace(base.networks, method=early.best_of(count, groups, score).method)
    seeds, settings = jnp.asarray(seeds), make_settings(sampling or SamplingConfig((2, 0.5)), base.config)
    samples = sampler.generate(networks, base.params, settings, seeds % 10, seeds, **given)
    return np.asarray(samples.tokens), np.asarray(samples.calls)


def candidate(number):
    """A score that chooses this candidate of three."""
    return lambda networks, params, settings, state, groups, seeds: jnp.arange(len(seeds)) % 3 == number


def test_one_beginning_is_the_base(opened):
    early, seeds = module_of("early_choice"), np.arange(6)
    expected = tokens_of(opened(None), seeds % 10, seeds, SamplingConfig((2, 0.5)))
    np.testing.assert_array_equal(chosen(opened, 1, 2, early.evidence)[0], expected)
    np.testing.assert_array_equal(chosen(opened, 3, 1, candidate(5))[0], expected)  # the first of equal ones


def test_the_chosen_beginning_goes_on_with_its_own_keys(opened):
    early, base, seeds = module_of("early_choice"), opened(None), jnp.arange(6)
    settings, keys = make_settings(SamplingConfig((2, 0.5)), base.config), early.candidate_keys(jnp.arange(6), 3)
    state = sampler.begin(base.networks, base.sampler_params, settings, seeds % 10, seeds)
    state = dataclasses.replace(state, prediction=dataclasses.replace(state.prediction, keys=keys[2::3]))
    for _ in range(4):
        state = sampler.advance(base.networks, base.sampler_params, settings, state)
    tokens, calls = chosen(opened, 3, 2, candidate(2))
    np.testing.assert_array_equal(tokens, state.prediction.tokens)
    assert (calls == 3 * (8 + 1) + 8).all()


def test_beginnings_do_not_depend_on_the_batch(opened):
    early = module_of("early_choice")
    for rule in (early.evidence, early.by_preview(early.read_digit)):
        many = chosen(opened, 3, 1, rule)[0]
        np.testing.assert_array_equal(chosen(opened, 3, 1, rule, seeds=[4])[0][0], many[4])
    prefix = jnp.arange(36).reshape(6, 6)
    tokens = chosen(opened, 3, 1, early.evidence, prefix=prefix)[0]
    np.testing.assert_array_equal(tokens[:, :6], prefix)


def test_evidence_is_the_difference_of_two_passes(opened):
    early, base, seeds = module_of("early_choice"), opened(None), jnp.arange(5)
    settings = make_settings(SamplingConfig((2, 2)), base.config)
    state = sampler.begin(base.networks, base.sampler_params, settings, seeds, seeds)
    state = sampler.advance(base.networks, base.sampler_params, settings, state)
    found = early.evidence(base.networks, base.sampler_params, settings, state.prediction, 1, seeds)
    bits = [
        score(base.networks.transformer, base.params["transformer"], labels, state.prediction.tokens)[0][:, :4].sum(axis=1)
        for labels in (seeds, jnp.full(5, 10))
    ]
    np.testing.assert_allclose(found, (bits[1] - bits[0]) * np.log(2), atol=1e-4)


def test_signs_train_and_reconstruct(trained, tmp_path):
    trains_and_reconstructs("binary_tokenizer", trained("binary_tokenizer"), tmp_path)


def test_signs(trained, one_device):
    fork = load_tokenizer(trained("binary_tokenizer"), load_experiment(path_of("binary_tokenizer")), mesh=one_device)
    signs, codes = module_of("binary_tokenizer").Signs(fork.config), jnp.arange(128)
    values = signs.lookup(codes)
    np.testing.assert_allclose(jnp.linalg.norm(values, axis=1), 1, rtol=1e-6)
    assert len(np.unique(values, axis=0)) == 128
    latents = jax.random.normal(jax.random.key(0), (3, 5, 7))
    quantized = signs(latents)
    np.testing.assert_array_equal(signs(values).codes, codes)
    np.testing.assert_array_equal(signs(-latents).codes, 127 - quantized.codes)
    flipped = signs(latents * jnp.where(jnp.arange(7) == 4, -1, 1)).codes
    np.testing.assert_array_equal(flipped ^ quantized.codes, 16)
    gradient = jax.grad(lambda latents: signs(latents).values[0, 0, 0])(latents)
    assert np.abs(gradient[0, 0]).min() > 0 and np.abs(gradient[1:]).max() == 0
    loss = dataclasses.replace(load_experiment(path_of("binary_tokenizer")).config.loss, entropy=1.0, entropy_temperature=0.01)
    every, one = (signs.losses(signs(rows[None]), loss)["entropy"] for rows in (values, values[:1]))
    assert every == pytest.approx(-7 * np.log(2), rel=1e-3) and one == pytest.approx(0, abs=1e-3)


def test_fsq_codes():
    experiment = load_experiment(path_of("binary_tokenizer:fsq"))
    quantizer = experiment.build_model().quantizer(experiment.config.model)
    codes = jnp.arange(128)[None]
    values = quantizer.lookup(codes)
    assert values.shape == (1, 128, 3) and len(np.unique(values[0], axis=0)) == 128
    np.testing.assert_array_equal(quantizer(jnp.arctanh(0.999 * values)).codes, codes)


@pytest.mark.parametrize("wrong", [["--model.code-dim", "8"], ["--loss.codebook", "1"]])
def test_signs_refuse_what_they_do_not_read(wrong, tmp_path):
    assert main(["train", path_of("binary_tokenizer"), "--workdir", str(tmp_path), *SHORT, *TINY_TOKENIZER, *wrong]) == 2


def test_a_transformer_over_signs(trained, tmp_path):
    own = ["--tokenizer", trained("binary_tokenizer"), *SHORT, *TINY_TRANSFORMER]
    run("train", path_of("binary_tokenizer:transformer"), "--workdir", tmp_path / "run", *own)
    arguments = ["--experiment", path_of("binary_tokenizer:transformer"), "--labels", "3", "--seeds", "1", "--out", tmp_path]
    run("sample", tmp_path / "run", *arguments)


def test_a_fork_trained_by_muon_resumes_bit_equal(trained, tmp_path):
    resumed = shutil.copytree(trained("binary_tokenizer"), tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "3")
    run(
        "train",
        path_of("binary_tokenizer"),
        "--workdir",
        resumed,
        *SHORT,
        *TINY_TOKENIZER,
        *OWN["binary_tokenizer"],
        "--resume",
    )
    for part in ("params", "opt_state"):
        states = [checkpoint.load_part(checkpoint.inspect(folder), part) for folder in (trained("binary_tokenizer"), resumed)]
        jax.tree.map(np.testing.assert_array_equal, *states)
