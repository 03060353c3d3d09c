"""Every part that an experiment may replace, replaced: each fork trains and is used with the ordinary commands, and does its
thing."""

import dataclasses
import itertools
import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax.core import FrozenDict
from PIL import Image

from dar_jax.cli.main import main
from dar_jax.config import MeshConfig, SamplingConfig, TokenizerConfig, TransformerConfig
from dar_jax.experiment import load_experiment
from dar_jax.inference.reconstruct import quantize
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import load_sampler, load_tokenizer
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama, score
from dar_jax.parallel import make_mesh
from dar_jax.sampling import sampler
from dar_jax.sampling.predict import token_by_token
from dar_jax.sampling.prepare import SamplerParams, Unstacked, prepare, unstacked
from dar_jax.sampling.settings import Method, Networks, make_settings
from dar_jax.sampling.solvers import Velocity
from dar_jax.training import checkpoint

ROOT = Path(__file__).parent.parent
FORKS = ROOT / "tests" / "forks"
VARIANTS = ROOT / "experiments" / "variants"
TRANSFORMERS = ["group_parallel", "heun", "heun:early", "inpainting", "speculative", "control", "watermark", "text"]
TRANSFORMERS += ["any_block", "edges", "early_choice", "early_control", "steps", "solvers", "stochastic", "noise"]
TRANSFORMERS += ["observe", "block_diffusion", "unmasking", "energy"]
PROGRAMS = ["decoder_report", "particles"]  # which take any run, see test_variants_flow.py and below
TOKENIZERS = ["binary_tokenizer", "cosine_path", "unrolled", "gan", "series"]
TOKENIZERS += ["few_steps", "patch_pyramid"]

SHORT = ["--train.steps", "3", "--train.batch-size", "8", "--train.sample-every", "0", "--train.checkpoint-every", "1"]
TINY_TRANSFORMER = ["--model.layers", "1", "--model.heads", "2", "--model.width", "16", "--model.mlp-multiple", "8"]
VELOCITY = ["--model.velocity.width", "16", "--model.velocity.layers", "1", "--model.velocity.head-size", "8"]
WIDTHS = ["--model.encoder-width", "16", "--model.decoder-width", "16", "--model.head-size", "8"]
TINY_TOKENIZER = [*VELOCITY, *WIDTHS, "--model.encoder-layers", "1", "--model.decoder-layers", "1"]
DIGITS = ["--data.source", "digits", "--data.image-size", "8", "--data.channels", "1", "--data.flip", "False"]
OWN = {  # settings that make a large recipe small, or show more
    "binary_tokenizer": ["--optimizer.name", "muon", "--loss.flow-power", "2"],
    "gan": [*DIGITS, "--model.image-size", "8", "--model.channels", "1", "--model.num-tokens", "16", "--model.num-groups", "4"]
    + ["--model.codebook-size", "64", "--fork.width", "16", "--fork.halvings", "1", "--fork.start-step", "1"],
}


def path_of(name):
    file, colon, value = name.partition(":")
    folder = FORKS if (FORKS / f"{file}.py").exists() else VARIANTS
    return f"{folder / file}.py{colon}{value}"


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_run):
    """The folder of a fork's run of three steps, made at first use."""
    folders = {}

    def make(name):
        name = {"unmasking": "block_diffusion", "energy": "block_diffusion"}.get(name, name)  # whose runs they sample from
        if name not in folders:
            folder = folders[name] = tmp_path_factory.mktemp("fork")
            own = [*TINY_TOKENIZER, *OWN.get(name, ())]
            if name in TRANSFORMERS:
                own = [*TINY_TRANSFORMER, "--model.vocab-size", 64, "--tokenizer", tiny_run / "tokenizer"]
            run("train", path_of(name), "--workdir", folder, *SHORT, *own)
        return folders[name]

    return make


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="session")
def opened(tiny_run, one_device):
    """The random transformer of `tiny_run` with a fork's parts of sampling; None: without."""
    return lambda name: load_sampler(tiny_run, None if name is None else load_experiment(path_of(name)), mesh=one_device)


def tokens_of(opened, labels, seeds, sampling, **given):
    return np.concatenate([batch.tokens for batch in sample(opened, labels, seeds, sampling, **given)])


def module_of(name):
    load_experiment(path_of(name))
    return sys.modules[f"experiment_{name}"]


def test_every_file_is_tested():
    files = {path.stem for folder in (FORKS, VARIANTS) for path in folder.glob("*.py")}
    assert files == {name.split(":")[0] for name in TRANSFORMERS + TOKENIZERS + PROGRAMS}
    for path in FORKS.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_trains_and_samples(name, trained, tmp_path):
    folder = trained(name)
    arguments = ["--labels", "3", "--seeds", "1,2", "--out", str(tmp_path)]
    assert main(["sample", str(folder), *arguments]) == 2  # it needs its file
    run("sample", folder, "--experiment", path_of(name), *arguments)
    assert (tmp_path / "grid.png").exists() and len(list(tmp_path.glob("*_seed*.png"))) == 2


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "series"])
def test_tokenizer_trains_and_reconstructs(name, trained, tmp_path):
    folder = trained(name)
    for number in range(2):
        Image.fromarray(np.full((8, 8), 100 * number, np.uint8)).save(tmp_path / f"{number}.png")
    run("reconstruct", folder, "--experiment", path_of(name), "--images", tmp_path, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "grid.png").exists()


def speculated(opened, window, small=False, sampling=None, seeds=range(6), **given):
    """Tokens and passes of samples with a window of so many guesses, whose drafter is the model itself."""
    opened = opened(None)
    method, model = module_of("speculative").speculation(window, small), opened.networks.transformer
    networks = dataclasses.replace(opened.networks, method=method, others=FrozenDict({"draft": model} if small else {}))
    params = {**opened.params, "others": {"draft": opened.params["transformer"]} if small else {}}
    seeds = jnp.asarray(seeds)
    settings = make_settings(sampling or SamplingConfig((2, 2)), opened.config, method)
    params = prepare(networks, params)
    state = sampler.begin(networks, params, settings, seeds % 10, seeds, **given)
    for _ in range(settings.num_groups):
        state = sampler.advance(networks, params, settings, state)
    return np.asarray(state.prediction.tokens[:, : opened.config.num_tokens]), np.asarray(state.prediction.calls)


@pytest.mark.parametrize(
    ("window", "sampling"),
    [
        (1, SamplingConfig((1, 1))),
        (16, SamplingConfig((1.1, 8), temperature=0.0)),
        (8, SamplingConfig((3, 0.5), top_k=20)),
        (5, SamplingConfig((2, 2), top_p=0.9, cfg_interval=5)),
    ],
)
def test_speculation_gives_the_same_tokens(window, sampling, opened):
    seeds = np.arange(6)
    expected = tokens_of(opened(None), seeds % 10, seeds, sampling)
    tokens, calls = speculated(opened, window, sampling=sampling)
    np.testing.assert_array_equal(tokens, expected)
    assert calls.max() <= 16 and (window > 1 or calls.min() == 16)


def test_speculation_after_given_tokens(opened):
    seeds, prefix = np.arange(6), np.arange(30).reshape(6, 5)
    expected = tokens_of(opened(None), seeds % 10, seeds, SamplingConfig((2, 2)), prefix=prefix)
    np.testing.assert_array_equal(speculated(opened, 5, prefix=prefix)[0], expected)


def test_guesses_set_the_passes(opened):
    """All right: a pass for each window; all wrong: at most one for each token; a network that drafts for itself is right."""
    seeds = np.arange(6)
    expected = tokens_of(opened(None), seeds % 10, seeds, SamplingConfig((2, 2)))
    for guesses, most in ((expected, 4), ((expected + 1) % 64, 16)):
        tokens, calls = speculated(opened, 5, prefix=guesses, num_given=np.zeros(6, np.int32))
        np.testing.assert_array_equal(tokens, expected)
        assert calls.max() <= most
    tokens, calls = speculated(opened, 5, small=True)
    np.testing.assert_array_equal(tokens, expected)
    assert (calls == 4).all()


def test_passes_are_those_of_each_sample_alone(opened):
    one, calls = speculated(opened, 4, seeds=[3])
    many, all_calls = speculated(opened, 4, seeds=range(6))
    np.testing.assert_array_equal(one[0], many[3])
    assert calls[0] == all_calls[3] and len(set(all_calls.tolist())) > 1


def test_passes_are_reported_where_a_fork_finds_the_tokens(opened, caplog):
    seeds = np.arange(6)
    with caplog.at_level("INFO", "dar_jax"):
        (base,) = sample(opened(None), seeds % 10, seeds, SamplingConfig((2, 2)))
        assert (base.calls == 16).all() and "passes" not in caplog.text
        (fork,) = sample(opened("speculative"), seeds % 10, seeds, SamplingConfig((2, 2)))
    mean, most = fork.calls.mean(), fork.calls.max()
    assert 2 <= mean < 16 and f"{mean:.1f} passes of the transformer a sample, at most {most}" in caplog.text


@pytest.mark.parametrize("name", ["speculative", "group_parallel", "any_block", "block_diffusion", "unmasking", "energy"])
def test_a_sample_does_not_depend_on_its_batch(name, trained, one_device):
    fork = load_sampler(trained(name), load_experiment(path_of(name)), mesh=one_device)
    together = [batch.images for batch in sample(fork, [1, 2, 3], [4, 5, 6], SamplingConfig((2, 1)))]
    alone = [batch.images for batch in sample(fork, [1, 2, 3], [4, 5, 6], SamplingConfig((2, 1)), batch_size=1)]
    assert np.abs(np.concatenate(together).astype(int) - np.concatenate(alone)).max() <= 1


def test_group_parallel_predicts_as_it_trains(trained, one_device):
    fork = load_sampler(trained("group_parallel"), load_experiment(path_of("group_parallel")), mesh=one_device)
    params = dict(fork.params["transformer"])
    params["output"] = jax.random.normal(jax.random.key(0), params["output"].shape)
    params = {**fork.params, "transformer": params}
    settings = make_settings(SamplingConfig((1, 1), temperature=0.0), fork.config, fork.networks.method)
    samples = sampler.generate(fork.networks, params, settings, jnp.arange(3), jnp.arange(3))
    logits = fork.networks.transformer.apply({"params": params["transformer"]}, jnp.arange(3), samples.tokens)
    np.testing.assert_array_equal(logits.argmax(-1), samples.tokens)
    assert len(np.unique(samples.tokens[:, :4])) > 3  # the slots of the first group are told apart


def any_block(trained, one_device, name="any_block"):
    """A fork of three steps whose logits are no longer close to zero, and what its tokens are drawn with."""
    fork = load_sampler(trained("any_block"), load_experiment(path_of(name)), mesh=one_device)
    params = dict(fork.params["transformer"])
    for number, part in enumerate(("output", "shift_table", "token_table", "class_table")):
        params[part] = jax.random.normal(jax.random.key(number), params[part].shape)
    return fork.networks, params, fork


def test_blocks_of_one_are_the_base(trained, one_device):
    networks, params, fork = any_block(trained, one_device, "any_block:ones")
    base = Llama(networks.transformer.config)
    codes, labels = jax.random.randint(jax.random.key(0), (3, 16), 0, 64), jnp.arange(3)
    logits = networks.transformer.apply({"params": params}, labels, codes)
    np.testing.assert_array_equal(logits, base.apply({"params": params}, labels, codes))
    settings = make_settings(SamplingConfig((2, 1)), fork.config)
    tokens = []
    for each in (networks, dataclasses.replace(networks, transformer=base, method=Method())):
        weights = prepare(each, {**fork.params, "transformer": params})
        tokens.append(sampler.generate(each, weights, settings, labels, jnp.arange(3)).tokens)
    np.testing.assert_array_equal(*tokens)


def test_a_block_is_predicted_in_one_pass_as_in_training(trained, one_device):
    for name in ("any_block:halves", "any_block", "any_block:groups"):
        networks, params, fork = any_block(trained, one_device, name)
        model, labels = networks.transformer, jnp.arange(3)
        settings = make_settings(SamplingConfig((1, 1), temperature=0.0), fork.config)
        weights = prepare(networks, {**fork.params, "transformer": params})
        tokens = sampler.generate(networks, weights, settings, labels, jnp.arange(3)).tokens
        np.testing.assert_array_equal(model.apply({"params": params}, labels, tokens).argmax(-1), tokens)


def test_a_block_sees_the_blocks_before_it(trained, one_device):
    networks, params, _ = any_block(trained, one_device)
    model, codes = networks.transformer, jnp.zeros((1, 16), jnp.int32)
    starts = np.arange(16) // model.sizes() * model.sizes()

    def logits(change):
        return model.apply({"params": params}, jnp.zeros(1, jnp.int32), codes + change.astype(jnp.int32))

    for place in range(15):
        changed = np.abs(logits(jnp.arange(16) == place) - logits(jnp.zeros(16)))[0].max(-1) > 0
        np.testing.assert_array_equal(changed, starts > place)  # all tokens of the blocks that begin after it


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


def test_inpainting_keeps_what_is_observed(opened):
    inpainting, fork = module_of("inpainting"), opened("inpainting")
    settings = make_settings(SamplingConfig((1, 1)), fork.config, fork.networks.method)
    image = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1), minval=-1)
    arguments = (fork.networks, fork.sampler_params, settings, jnp.arange(3), jnp.arange(3))
    result = sampler.generate(*arguments, observed=inpainting.upper_half(image)).images
    np.testing.assert_allclose(result[:, :4], image[:, :4], atol=1e-4)
    assert np.abs(result[:, 4:] - image[:, 4:]).mean() > 0.1
    default = sampler.generate(*arguments).images
    np.testing.assert_allclose(default[:, :4], jnp.broadcast_to(inpainting.DEFAULT["image"][:, :4], (3, 4, 8, 1)), atol=1e-4)


def test_heun_is_of_second_order():
    """On dx/dt = x, whose solution is e^t: twice the steps, a quarter of the error."""

    def error(steps):
        x = jnp.ones((1, 1))
        for i in range(steps):
            x, _, _ = module_of("heun").heun_step(Velocity(lambda x, t: x), x, None, i / steps, (i + 1) / steps, None)
        return abs(float(x[0, 0]) - np.e)

    assert 3.4 < error(8) / error(16) < 4.6


def test_early_times_give_groups_several_steps_and_none(opened):
    fork = opened("heun:early")
    settings = make_settings(SamplingConfig(num_denoising_steps=6), fork.config, fork.networks.method)
    counts = [len(sampler.steps_of_group(fork.networks, settings, group)) for group in range(4)]
    assert sum(counts) == 6 and max(counts) > 1
    settings = make_settings(SamplingConfig(num_denoising_steps=3), fork.config, fork.networks.method)
    assert 0 in [len(sampler.steps_of_group(fork.networks, settings, group)) for group in range(4)]


def test_edges_are_read(trained, one_device):
    experiment = load_experiment(path_of("edges"))
    fork = load_sampler(trained("edges"), experiment, mesh=one_device)
    element = experiment.source(experiment.config.data)[0]
    assert element["edges"].shape == (8, 8) and element["edges"].max() > 0.2
    model, params = fork.networks.transformer, dict(fork.params["transformer"])
    params["output"] = jax.random.normal(jax.random.key(0), params["output"].shape)
    empty = experiment.condition({"label": jnp.array([3])})
    drawn = experiment.condition({"label": jnp.array([3]), "edges": element["edges"][None]})
    codes = jnp.zeros((1, 16), jnp.int32)
    logits = [model.apply({"params": params}, condition, codes) for condition in (empty, drawn)]
    assert logits[0].shape == (1, 16, 64) and np.abs(logits[0] - logits[1]).max() > 1e-3


def test_text_is_read_to_its_setting(trained):
    assert checkpoint.inspect(trained("text")).config.fork == {"max_characters": 5}
    condition = load_experiment(path_of("text")).condition({"label": jnp.array([0, 7])})
    assert bytes(np.asarray(condition[1], np.uint8)) == b"seven"


def test_cosine_path_is_consistent():
    path = module_of("cosine_path").path
    noise, data = jax.random.normal(jax.random.key(0), (2, 5, 4))
    t = jnp.linspace(0.1, 0.9, 5)
    slope = jax.jvp(lambda t: path.at(noise, data, t), (t,), (jnp.ones(5),))[1]
    np.testing.assert_allclose(path.velocity(noise, data, t), slope, atol=1e-5)
    np.testing.assert_allclose(path.data(path.at(noise, data, t), slope, t), data, atol=1e-5)


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


EXAMPLES = [block for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "forking.md").read_text(), re.S)]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_of_the_docs(number, tiny_run, tmp_path):
    file, own = tmp_path / "example.py", [*SHORT, *TINY_TOKENIZER]
    file.write_text(EXAMPLES[number].replace("runs/digits", str(tiny_run)))
    transformer = "TRANSFORMER" in EXAMPLES[number]
    if transformer:
        own = [*SHORT, *TINY_TRANSFORMER, "--model.vocab-size", 64, "--tokenizer", tiny_run / "tokenizer"]
    run("train", file, "--workdir", tmp_path / "run", *own)
    if transformer:
        arguments = ["--labels", "3", "--seeds", "1", "--out", tmp_path]
        run("sample", tmp_path / "run", "--experiment", file, *arguments)


def test_gan_teaches_both_sides(trained):
    log = (trained("gan") / "logs" / "metrics.jsonl").read_text()
    assert re.search(r'"discriminator": 0\.\d*[1-9]', log) and re.search(r'"generator": 0\.\d*[1-9]', log)


def test_few_steps_keep_the_codes(trained):
    """Bit by bit from one step to the next, while the decoder learns."""
    folders = (trained("few_steps") / "checkpoints" / step for step in ("2", "3"))
    before, after = (checkpoint.load_part(checkpoint.inspect(folder), "params") for folder in folders)
    for name, tuned in (("encoder", False), ("quantizer", False), ("token_decoder", True), ("velocity", True)):
        same = jax.tree.map(np.array_equal, before[name], after[name])
        assert all(jax.tree.leaves(same)) != tuned


def test_particles_of_anything(tiny_run, tmp_path, capsys):
    module = runpy.run_path(path_of("particles"))
    for observe in ("profiles", "reader"):
        options = module["Options"](run=tiny_run, out=tmp_path, observe=observe, num=3, particles=(1, 16))
        module["main"](options)
        errors = [float(line.split()[6].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
        assert (tmp_path / f"{observe}.png").exists() and (observe == "reader" or errors[1] < errors[0])


def test_unrolled_term_is_in_the_loss(trained):
    assert re.search(r'"unrolled": 0\.\d*[1-9]', (trained("unrolled") / "logs" / "metrics.jsonl").read_text())


def test_series_in_both_stages(trained, tmp_path, one_device):
    experiment = load_experiment(path_of("series"))
    fork = load_tokenizer(trained("series"), experiment, mesh=one_device)
    series = np.stack([experiment.source(None)[index]["image"] for index in range(3)])
    values = quantize(fork.networks, fork.params, series).values
    settings = make_settings(SamplingConfig(), fork.config)
    decoded = sampler.decode(fork.networks, fork.sampler_params, settings, values, jnp.arange(3)).images
    assert decoded.shape == (3, 32, 1) and decoded.dtype == jnp.float32
    name, own = "series:transformer", ["--tokenizer", trained("series"), *SHORT, *TINY_TRANSFORMER]
    run("train", path_of(name), "--workdir", tmp_path, *own)
    fork = load_sampler(tmp_path, load_experiment(path_of(name)), mesh=one_device)
    samples = sampler.generate(fork.networks, fork.sampler_params, settings, jnp.arange(2), jnp.arange(2))
    assert samples.images.shape == (2, 32, 1) and np.isfinite(samples.images).all()


def two_streams(trained, one_device, name="block_diffusion"):
    """A run of block_diffusion.py, whose logits are no longer close to zero, with a file's parts of sampling."""
    fork = load_sampler(trained("block_diffusion"), load_experiment(path_of(name)), mesh=one_device)
    params = dict(fork.params["transformer"])
    for number, part in enumerate(("output", "mask", "token_table", "class_table")):
        params[part] = jax.random.normal(jax.random.key(number), params[part].shape)
    return dataclasses.replace(fork, params={**fork.params, "transformer": params})


def predicted(fork, predict=None, sampling=None, seeds=range(6), **given):
    """The state of a predictor after all groups."""
    predict, seeds = predict or fork.networks.method.predict, jnp.asarray(seeds)
    settings = make_settings(sampling or SamplingConfig((2, 0.5), temperature=0.9), fork.config)
    arguments = fork.networks, prepare(fork.networks, fork.params), settings
    state = predict.begin(*arguments, seeds % 10, seeds, given.get("prefix"), given.get("num_given"))
    for group in range(4):
        state = predict.group(*arguments, state, group)
    return state


def test_the_known_stream_is_the_base(trained, one_device):
    fork = two_streams(trained, one_device)
    model, params = fork.networks.transformer, {"params": fork.params["transformer"]}
    base = {"params": {name: value for name, value in params["params"].items() if name != "mask"}}
    codes, labels = jax.random.randint(jax.random.key(0), (3, 16), 0, 64), jnp.arange(3)
    expected = Llama(model.config).apply(base, labels, codes)
    np.testing.assert_array_equal(model.apply(params, labels, codes), expected)
    known, masked = model.apply(params, labels, codes, jnp.ones((3, 16), bool), jnp.arange(16), method="streams")
    np.testing.assert_allclose(known, expected, atol=1e-5)
    np.testing.assert_allclose(masked, expected, atol=1e-5)  # blocks of 1


def test_streams_see_what_they_may(trained, one_device):
    fork = two_streams(trained, one_device)
    model, params = fork.networks.transformer, {"params": fork.params["transformer"]}
    starts, hidden = jnp.asarray([0] * 3 + [3] * 5 + [8] * 8), jnp.arange(16) % 3 == 0

    @jax.jit
    def logits(codes):
        return jnp.stack(model.apply(params, jnp.zeros(1, int), codes[None], hidden[None], starts, method="streams"))[:, 0]

    before = logits(jnp.zeros(16, int))
    for place in range(16):
        known, masked = np.abs(logits(jnp.zeros(16, int).at[place].set(1)) - before).max(axis=-1) > 0
        np.testing.assert_array_equal(known, np.arange(16) > place)
        inside = (starts == starts[place]) & ~hidden[place] & (place < 15 and starts[place + 1] == starts[place])
        np.testing.assert_array_equal(masked, (starts > place) | inside)


def test_hidden_tokens_cost_what_they_cost_in_any_order(one_device):
    """With all rates: the mean over the orders in which three tokens become known."""
    block_diffusion = module_of("block_diffusion")
    block_diffusion.LOWEST_RATE = 0.0
    config = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=3, vocab_size=3, num_classes=2)
    model, codes, starts = block_diffusion.TwoStreams(config), jnp.asarray([[0, 2, 1]]), jnp.zeros(3, int)
    arguments = jnp.zeros(1, int), codes, jnp.ones((1, 3), bool), starts
    params = model.init(jax.random.key(0), *arguments, method="streams")["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    each = {}
    for hidden in itertools.product([True, False], repeat=3):
        logits = model.apply({"params": params}, *arguments[:2], jnp.asarray([hidden]), starts, method="streams")[1][0]
        each[hidden] = -jnp.take_along_axis(jax.nn.log_softmax(logits), codes[0, :, None], axis=-1)[:, 0]
    orders = list(itertools.permutations(range(3)))
    costs = [each[tuple(place in order[index:] for place in range(3))][order[index]] for order in orders for index in range(3)]
    many = [jnp.repeat(leaf, 4000, axis=0) for leaf in arguments[:2]]
    losses = jax.jit(lambda key: block_diffusion.losses(model, params, *many, starts, key)[2])
    drawn = [losses(jax.random.key(seed)) for seed in range(8)]
    assert np.mean(drawn) == pytest.approx(np.mean(costs), abs=5 * np.std(drawn) / np.sqrt(8)) and np.std(drawn) < 0.2


@pytest.mark.parametrize("sampling", [SamplingConfig((2, 0.5)), SamplingConfig((3, 1), temperature=0.0)])
def test_a_network_that_drafts_for_itself_gives_its_own_tokens(sampling, trained, one_device):
    fork, prefix = two_streams(trained, one_device), jnp.arange(30).reshape(6, 5)
    for given in ({}, {"prefix": prefix}):
        expected = predicted(fork, Method().predict, sampling, **given).tokens
        state = predicted(fork, sampling=sampling, **given)
        np.testing.assert_array_equal(state.tokens[:, :16], expected)
        assert state.calls.max() <= 16 and state.calls.min() < 16


def rule_of(name):
    """The rule of an experiment of unmasking.py."""
    return getattr(module_of("unmasking"), name).method.predict.group.args[0].args[0]


@pytest.mark.parametrize("name", ["experiment", "left_two", "random_two", "ascend", "entropies", "sure", "sums"])
def test_rules(name):
    """Each place once, at least one a pass, whatever the other rows are; the numbers of places of the simple rules."""
    rule, keys = rule_of(name), jax.random.split(jax.random.key(1), 5)
    each = jax.nn.log_softmax(jnp.asarray([0, 1, 4, 8, 20])[:, None, None] * jax.random.normal(jax.random.key(0), (5, 8, 6)))
    still_open, counts = jnp.ones((5, 8), bool).at[0, :3].set(False), []
    for number in range(8):
        chosen = still_open & rule(each, still_open, number, keys)
        alone = still_open[2:3] & rule(each[2:3], still_open[2:3], number, keys[2:3])
        np.testing.assert_array_equal(chosen[2:3], alone)
        assert (chosen.any(axis=1) == still_open.any(axis=1)).all()
        counts.append(int(chosen[1].sum()))
        still_open = still_open & ~chosen
    assert not still_open.any()
    expected = {"experiment": [8], "left_two": [2] * 4, "random_two": [2] * 4, "ascend": [1, 2, 5]}
    assert name not in expected or [count for count in counts if count] == expected[name]


def test_bounds_of_rules():
    unmasking = module_of("unmasking")
    each = jax.nn.log_softmax(jnp.log(jnp.asarray([[[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4, [0.95, 0.05, 0, 0]]])))
    bits = unmasking.entropy(each)
    np.testing.assert_allclose(bits[0, :3], [1, 0, 2], atol=1e-6)
    for rule, expected in (
        (unmasking.bounded(jnp.inf), [1, 1, 1, 1]),
        (unmasking.bounded(0.5), [1, 1, 0, 1]),  # 0, 0.29, 1: without the largest 0, 0, 0.29
        (unmasking.confident(0.9), [0, 1, 0, 1]),
        (unmasking.adaptive(1.5), [1, 1, 0, 0]),
        (unmasking.adaptive(0.5), [1, 0, 0, 0]),
        (unmasking.left(3), [1, 1, 1, 0]),
    ):
        np.testing.assert_array_equal(rule(each, jnp.ones((1, 4), bool), 0, None)[0], expected)


@pytest.mark.parametrize(("name", "passes"), [("experiment", 7), ("left_two", 10), ("groups", 8)])
def test_a_group_of_masks_is_drawn_as_it_is_trained(name, passes, trained, one_device):
    """Passes, and the probabilities of what was drawn, against the whole sequence in one pass for each place that was known."""
    fork, sampling = two_streams(trained, one_device, f"unmasking:{name}"), SamplingConfig((1, 1), temperature=0.7)
    state, model = predicted(fork, sampling=sampling), fork.networks.transformer
    assert (state.calls == passes).all() and (np.isnan(state.log_q[:, :4]) == (name != "groups")).all()
    starts, params = jnp.arange(16) // 4 * 4, {"params": fork.params["transformer"]}
    hidden = jnp.ones((6, 16), bool)
    last = {"experiment": [0, 1, 2, 3], "left_two": [2, 3], "groups": []}[name]  # places of the last pass
    hidden = hidden & jnp.isin(jnp.arange(16) % 4, jnp.asarray(last, int))
    logits = model.apply(params, jnp.arange(6), state.tokens, hidden, starts, method="streams")[1] / 0.7
    log_q = jnp.take_along_axis(jax.nn.log_softmax(logits), state.tokens[..., None], axis=-1)[..., 0]
    known = np.isin(np.arange(16) % 4, last) & (np.arange(16) >= 4)
    np.testing.assert_allclose(state.log_q[:, known], log_q[:, known], atol=1e-4)


def test_uniform_codes_stay_uniform(trained, one_device):
    """A rule that looked at what was drawn would prefer some codes."""
    fork = two_streams(trained, one_device, "unmasking:ascend")
    params = {**fork.params["transformer"], "output": jnp.zeros_like(fork.params["transformer"]["output"])}
    fork = dataclasses.replace(fork, params={**fork.params, "transformer": params})
    state = predicted(fork, sampling=SamplingConfig((1, 1)), seeds=range(300))
    assert scipy.stats.chisquare(np.bincount(state.tokens[:, 4:].reshape(-1), minlength=64)).pvalue > 1e-4
    np.testing.assert_allclose(state.log_q[:, 4:], -np.log(64), rtol=1e-5)


def test_one_candidate_is_the_block_of_masks(trained, one_device):
    fork, energy = two_streams(trained, one_device, "energy"), module_of("energy")
    expected = predicted(two_streams(trained, one_device, "unmasking"))
    for given in ({}, {"prefix": jnp.arange(36).reshape(6, 6)}):
        state = predicted(fork, energy.candidates(1).method.predict, **given)
        assert given or (state.calls == 4 + 2 * 3).all()
    state = predicted(fork, energy.candidates(1).method.predict)
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    of_groups = [np.reshape(each.log_q, (-1, 4, 4)).sum(axis=2) for each in (state, expected)]  # NaN in the first
    np.testing.assert_allclose(*of_groups, atol=1e-4)


def test_candidates_are_read_as_one_after_the_other(trained, one_device):
    """The keys of the chosen one are those of a fresh pass; more candidates bring the divergence down."""
    fork, energy = two_streams(trained, one_device, "energy"), module_of("energy")
    sampling, seeds = SamplingConfig((1, 1), temperature=1.0), jnp.arange(64)
    model, params = fork.networks.transformer, fork.params["transformer"]
    divergences = []
    for count in (1, 8):
        state = predicted(fork, energy.candidates(count).method.predict, sampling, seeds)
        bits, _ = score(model, params, seeds % 10, state.tokens)
        divergences.append(np.mean(np.sum(state.log_q[:, 4:] / np.log(2) + bits[:, 4:], axis=1)))
    assert 0 < divergences[1] < 0.8 * divergences[0]
    given = token_by_token.begin(
        fork.networks,
        prepare(fork.networks, fork.params),
        make_settings(sampling, fork.config),
        seeds % 10,
        seeds,
        state.tokens,
    )
    for cache, expected in zip(state.base.caches, given.caches):
        np.testing.assert_allclose(cache.keys, expected.keys, atol=1e-4)


def tiny_streams(predict, count):
    """Tokens 2 and 3 of `count` samples after given ones, of 4 codes in groups of 2, their log_q, and the 16 probabilities of
    the known stream."""
    config = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=4, vocab_size=4, num_classes=2)
    model = module_of("block_diffusion").TwoStreams(config, largest=2)
    params = model.init(jax.random.key(0), jnp.zeros(1, int), jnp.zeros((1, 4), int))["params"]
    params = jax.tree.map(lambda leaf: 0.7 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    params["output"] *= 0.4
    tokenizer = Tokenizer(TokenizerConfig(image_size=8, channels=1, num_tokens=4, num_groups=2, num_denoising_steps=2))
    networks, settings = Networks(tokenizer, model), make_settings(SamplingConfig((1, 1)), tokenizer.config)
    arguments = networks, SamplerParams(Unstacked({}, ()), unstacked(params, jnp.float32)), settings
    labels, seeds, prefix = jnp.zeros(count, int), jnp.arange(count), jnp.tile(jnp.asarray([[1, 2]]), (count, 1))
    state = predict.begin(*arguments, labels, seeds, prefix)
    for group in range(2):
        state = predict.group(*arguments, state, group)
    every = jnp.stack([jnp.full(16, 1), jnp.full(16, 2), jnp.arange(16) // 4, jnp.arange(16) % 4], axis=1)
    bits, _ = score(model, params, labels[:16], every)
    return (
        np.asarray(state.tokens[:, 2] * 4 + state.tokens[:, 3]),
        state.log_q[:, 2:].sum(axis=1),
        2.0 ** -bits[:, 2:].sum(axis=1),
    )


def test_probabilities_of_chosen_places_are_those_of_the_draws():
    outcomes, log_q, _ = tiny_streams(module_of("unmasking").ascend.method.predict, 4000)
    found, first, counts = np.unique(outcomes, return_index=True, return_counts=True)
    assert len(found) == 16 and np.exp(log_q[first]).sum() == pytest.approx(1, abs=1e-4)
    shares = np.exp(np.asarray(log_q[first], np.float64))
    assert scipy.stats.chisquare(counts, 4000 * shares / shares.sum()).pvalue > 1e-4


def test_weights_make_independent_draws_the_joint_distribution():
    """The total variation to one by one falls with the number of candidates."""
    energy, variations = module_of("energy"), []
    for count in (1, 32):
        outcomes, _, expected = tiny_streams(energy.candidates(count).method.predict, 4000)
        variations.append(np.abs(np.bincount(outcomes, minlength=16) / 4000 - expected).sum() / 2)
    assert variations[0] > 0.08 and variations[1] < 0.2 * variations[0]
