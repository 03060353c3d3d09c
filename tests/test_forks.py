"""Every part that an experiment may replace, replaced: each fork trains and is used with the ordinary commands, and does its
thing."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from PIL import Image

from dar_jax.cli.main import main
from dar_jax.config import MeshConfig, SamplingConfig
from dar_jax.experiment import load_experiment
from dar_jax.inference.reconstruct import quantize
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import load_sampler, load_tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.parallel import make_mesh
from dar_jax.sampling import sampler
from dar_jax.sampling.prepare import prepare
from dar_jax.sampling.settings import Method, make_settings
from dar_jax.sampling.solvers import Velocity
from dar_jax.training import checkpoint

ROOT = Path(__file__).parent.parent
FORKS = ROOT / "tests" / "forks"
VARIANTS = ROOT / "experiments" / "variants"
TRANSFORMERS = ["group_parallel", "heun", "heun:early", "inpainting", "speculative", "control", "watermark", "text"]
TRANSFORMERS += ["any_block", "steps", "solvers", "stochastic", "noise"]
REPORTS = ["decoder_report"]  # measures a run, see test_variants_flow.py
TOKENIZERS = ["fsq", "cosine_path", "unrolled", "gan", "series"]

SHORT = ["--train.steps", "3", "--train.batch-size", "8", "--train.sample-every", "0", "--train.checkpoint-every", "1"]
TINY_TRANSFORMER = ["--model.layers", "1", "--model.heads", "2", "--model.width", "16", "--model.mlp-multiple", "8"]
VELOCITY = ["--model.velocity.width", "16", "--model.velocity.layers", "1", "--model.velocity.head-size", "8"]
WIDTHS = ["--model.encoder-width", "16", "--model.decoder-width", "16", "--model.head-size", "8"]
TINY_TOKENIZER = [*VELOCITY, *WIDTHS, "--model.encoder-layers", "1", "--model.decoder-layers", "1"]
DIGITS = ["--data.source", "digits", "--data.image-size", "8", "--data.channels", "1", "--data.flip", "False"]
OWN = {  # settings that make a large recipe small, or show more
    "fsq": ["--optimizer.name", "muon", "--loss.flow-power", "2"],
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
    assert files == {name.split(":")[0] for name in TRANSFORMERS + TOKENIZERS + REPORTS}
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


@pytest.mark.parametrize("name", ["speculative", "group_parallel", "any_block"])
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


def test_watermark_is_detectable(opened):
    watermark, seeds, sampling = module_of("watermark"), np.arange(20), SamplingConfig((1, 1))
    marked, plain = (tokens_of(opened(name), seeds % 10, seeds, sampling) for name in ("watermark", None))
    assert watermark.z_score(marked, 64) > 6 > 3 > abs(watermark.z_score(plain, 64))


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


def test_control_reads_its_map(trained, one_device):
    experiment = load_experiment(path_of("control"))
    fork = load_sampler(trained("control"), experiment, mesh=one_device)
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


def test_fsq_codes(trained, one_device):
    fork = load_tokenizer(trained("fsq"), load_experiment(path_of("fsq")), mesh=one_device)
    codes = jnp.arange(128)[None]
    quantizer = module_of("fsq").FSQ(fork.config)
    values = quantizer.lookup(codes)
    np.testing.assert_array_equal(quantizer(jnp.arctanh(0.999 * values)).codes, codes)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    found = quantize(fork.networks, fork.params, images).codes
    assert found.shape == (4, 16) and 0 <= found.min() <= found.max() < 128


def test_cosine_path_is_consistent():
    path = module_of("cosine_path").path
    noise, data = jax.random.normal(jax.random.key(0), (2, 5, 4))
    t = jnp.linspace(0.1, 0.9, 5)
    slope = jax.jvp(lambda t: path.at(noise, data, t), (t,), (jnp.ones(5),))[1]
    np.testing.assert_allclose(path.velocity(noise, data, t), slope, atol=1e-5)
    np.testing.assert_allclose(path.data(path.at(noise, data, t), slope, t), data, atol=1e-5)


def test_a_fork_trained_by_muon_resumes_bit_equal(trained, tmp_path):
    resumed = shutil.copytree(trained("fsq"), tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "3")
    run("train", path_of("fsq"), "--workdir", resumed, *SHORT, *TINY_TOKENIZER, *OWN["fsq"], "--resume")
    for part in ("params", "opt_state"):
        states = [checkpoint.load_part(checkpoint.inspect(folder), part) for folder in (trained("fsq"), resumed)]
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
