"""Every part that an experiment may replace, replaced: each fork trains and is used with the ordinary commands, and does its
thing."""

import dataclasses
import json
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fork_runs import (
    FORKS,
    OWN,
    PROGRAMS,
    ROOT,
    SHORT,
    TINY_TOKENIZER,
    TINY_TRANSFORMER,
    TOKENIZERS,
    TRANSFORMERS,
    VARIANTS,
    module_of,
    path_of,
    run,
    trains_and_reconstructs,
    trains_and_samples,
)
from PIL import Image

import dar_jax
from dar_jax.cli.main import main
from dar_jax.config import SamplingConfig
from dar_jax.errors import InputError
from dar_jax.experiment import load_experiment
from dar_jax.features.names import lpips_entries
from dar_jax.features.vgg_lpips import Lpips
from dar_jax.inference.reconstruct import quantize
from dar_jax.inference.trained import load_sampler, load_tokenizer
from dar_jax.sampling import sampler
from dar_jax.sampling.settings import make_settings
from dar_jax.sampling.solvers import Velocity
from dar_jax.training import checkpoint
from dar_jax.weights import torch_file
from dar_jax.weights.table import to_release


def test_every_file_is_tested():
    files = {path.stem for folder in (FORKS, VARIANTS) for path in folder.glob("*.py")}
    tested = {*sum(TRANSFORMERS.values(), []), *TOKENIZERS, *PROGRAMS}
    assert files == {name.split(":")[0] for name in tested}
    for path in FORKS.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", TRANSFORMERS["forks"])
def test_transformer_trains_and_samples(name, trained, tmp_path):
    trains_and_samples(name, trained(name), tmp_path)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("series", "binary_tokenizer", "perceptual")])
def test_tokenizer_trains_and_reconstructs(name, trained, tmp_path):
    trains_and_reconstructs(name, trained(name), tmp_path)


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


TURNED = """
import dataclasses
from dar_jax.experiment import Experiment
from dar_jax.quickstart import DIGITS, TRANSFORMER
config = dataclasses.replace(TRANSFORMER, name="turned", data=DIGITS)
experiment = Experiment(config, condition=lambda batch: (batch["label"] + batch.get("turn", 0)) % 10)
"""


def test_what_a_condition_reads_is_given(tiny_run, tmp_path, capsys):
    (tmp_path / "turned.py").write_text(TURNED)
    given = tmp_path / "given.npz"
    np.savez(given, turn=np.array([0, 4]))
    fork = ["--experiment", str(tmp_path / "turned.py")]
    generate = ["generate", tiny_run, *fork, "--num", 5, "--batch-size", 2, "--out", tmp_path / "fork.npz", "--condition-file"]
    run(*generate, given)
    with np.load(tmp_path / "fork.npz") as file:
        drawn = file["arr_0"]
    (tmp_path / "fork.npz.parts").mkdir()  # as of a run that was interrupted at its very end
    np.savez(tmp_path / "other.npz", turn=np.array([0, 5]))
    assert main([str(word) for word in [*generate, tmp_path / "other.npz"]]) == 2
    run(*generate, given)
    base, turned = dar_jax.load(tiny_run), dar_jax.load(tiny_run, tmp_path / "turned.py")
    labels = [0, 1 + 4, 2, 3 + 4, 4]
    np.testing.assert_array_equal(drawn, base.sample(labels, range(5)))
    images = drawn[:2]
    np.testing.assert_array_equal(turned.score(images, [0, 1], {"turn": np.array([0, 4])}), base.score(images, [0, 5]))

    sample = ["sample", str(tiny_run), "--labels", "3", "--seeds", "1,2", "--out", str(tmp_path / "out")]
    run(*sample, *fork, "--condition-file", given)
    two = [np.asarray(Image.open(path))[..., None] for path in sorted((tmp_path / "out").glob("*seed*.png"))]
    np.testing.assert_array_equal(two, base.sample([3, 7], [1, 2]))
    capsys.readouterr()
    np.savez(tmp_path / "words.npz", turn=np.array(["left"]))
    np.savez(tmp_path / "label.npz", turn=np.array([1]), label=np.array([1]))
    for more, complaint in (
        (["--condition-file", given], "turn is for an experiment whose condition reads more than the label"),
        ([*fork, "--condition-file", tmp_path / "words.npz"], "is <U4, a condition reads numbers"),
        ([*fork, "--condition-file", tmp_path / "label.npz"], "is named label; the labels are given by themselves"),
        ([*fork, "--condition-file", tmp_path / "none.npz"], "none.npz does not exist"),
    ):
        assert main([*sample, *map(str, more)]) == 2
        assert complaint in capsys.readouterr().err
    with pytest.raises(InputError, match="condition needs 'turn'; given labels alone, it has to do without"):
        dataclasses.replace(load_experiment(fork[1]), condition=lambda batch: batch["turn"]).init_params(None)
    with pytest.raises(InputError, match="turn, which is given to the condition, has no rows"):
        turned.sample([1], [1], given={"turn": np.zeros(0)})


def test_cosine_path_is_consistent():
    path = module_of("cosine_path").path
    noise, data = jax.random.normal(jax.random.key(0), (2, 5, 4))
    t = jnp.linspace(0.1, 0.9, 5)
    slope = jax.jvp(lambda t: path.at(noise, data, t), (t,), (jnp.ones(5),))[1]
    np.testing.assert_allclose(path.velocity(noise, data, t), slope, atol=1e-5)
    np.testing.assert_allclose(path.data(path.at(noise, data, t), slope, t), data, atol=1e-5)


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


def only_the_decoder_is_tuned(folder):
    """Bit by bit from one step to the next."""
    folders = (folder / "checkpoints" / step for step in ("2", "3"))
    before, after = (checkpoint.load_part(checkpoint.inspect(folder), "params") for folder in folders)
    changed = {part: not jax.tree.all(jax.tree.map(np.array_equal, before[part], after[part])) for part in before}
    return changed == {"encoder": False, "quantizer": False, "token_decoder": True, "velocity": True}


def test_few_steps_keep_the_codes(trained):
    assert only_the_decoder_is_tuned(trained("few_steps"))


@pytest.mark.usefixtures("narrow_vgg")
def test_perceptual_tuning(tmp_path):
    """With random weights of a narrow VGG16 from a file."""
    images = jnp.zeros((1, 16, 16, 3))
    params = jax.device_get(jax.jit(Lpips().init)(jax.random.key(1), images, images)["params"])
    torch_file.write(tmp_path / "lpips.pt", to_release(lpips_entries(), params))
    sizes = ["--model.image-size", "16", "--data.image-size", "16", "--loss.lpips-weights", tmp_path / "lpips.pt"]
    own = [*SHORT, *TINY_TOKENIZER, *OWN["perceptual"], *sizes]
    run("train", path_of("perceptual"), "--workdir", tmp_path / "run", *own)
    assert only_the_decoder_is_tuned(tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert all(record["lpips"] > 0 and record["pixels"] > 0 for record in log)
    (tmp_path / "images").mkdir()
    trains_and_reconstructs("perceptual", tmp_path / "run", tmp_path / "images", size=16)


def test_particles_of_anything(tiny_run, tmp_path, capsys):
    module = runpy.run_path(path_of("particles"))
    for observe in ("profiles", "reader"):
        module["main"](run=tiny_run, out=tmp_path, observe=observe, num=3, particles=(1, 16))
        errors = [float(line.split()[6].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
        assert (tmp_path / f"{observe}.png").exists() and (observe == "reader" or errors[1] < errors[0])


def test_unrolled_term_is_in_the_loss(trained):
    assert re.search(r'"unrolled": 0\.\d*[1-9]', (trained("unrolled") / "logs" / "metrics.jsonl").read_text())


def test_series_in_both_stages(trained, tmp_path, one_device, capsys):
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
    evaluate = ["evaluate-ar", str(tmp_path), "--num-images", "8", "--out", str(tmp_path / "out")]
    assert main(evaluate) == 2 and "has a source of its own" in capsys.readouterr().err
    run(*evaluate, "--experiment", path_of(name))
    assert main(["evaluate-tokenizer", str(tmp_path)]) == 2 and "has a source of its own" in capsys.readouterr().err
    assert main(["evaluate-tokenizer", str(tmp_path), "--experiment", path_of(name)]) == 2  # which has its tokenizer's source
    assert "[32, 1], but images are evaluated" in capsys.readouterr().err
