"""Every experiment file loads, holds together, and has the size it says."""

import math
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fork_runs import TINY_TOKENIZER, TINY_TRANSFORMER, run
from jax.sharding import PartitionSpec as P
from PIL import Image
from test_archives import write_idx

from dar_jax.config import MeshConfig, OptimizerConfig, TokenizerTraining, TransformerConfig, TransformerTraining, validate
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.parallel import make_mesh, shardings
from dar_jax.quickstart import TOKENIZER

FOLDER = Path(__file__).parent.parent / "experiments"
PARAMETERS = {
    "cifar10_ar": 45_107_200,
    "cifar10_ar:small": 2_166_528,
    "cifar10_tokenizer": 48_771_888,
    "cifar10_tokenizer:small": 5_281_008,
    "imagenet256_ar:l": 342_910_976,
    "imagenet256_ar:xl": 774_699_520,
    "imagenet256_ar:xxl": 1_410_972_672,
    "imagenet256_tokenizer": 307_444_672,
}
DIGITS = ["digits_ar", "digits_tokenizer", "forkme"]  # of the quickstart's sizes
EXPERIMENTS = [*PARAMETERS, *DIGITS, "fashion_ar", "fashion_tokenizer"]
PAPER = [name for name in PARAMETERS if name.startswith("imagenet256")]


def path_of(name):
    file, colon, value = name.partition(":")
    return f"{FOLDER / file}.py{colon}{value}"


def load(name):
    return load_experiment(path_of(name))


def parameters(experiment):
    config, model = experiment.config.model, experiment.build_model()
    if isinstance(experiment.config, TokenizerTraining):
        inputs = (jnp.zeros((1, config.image_size, config.image_size, config.channels)),)
    else:
        inputs = (jnp.zeros(1, jnp.int32), jnp.zeros((1, config.num_tokens), jnp.int32))
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


def test_every_file_is_listed():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted({name.split(":")[0] for name in EXPERIMENTS})


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name):
    experiment = load(name)
    validate(experiment.config)
    params = parameters(experiment)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == PARAMETERS[name] if name in PARAMETERS else 0 < count < 3_000_000
    shardings(params, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), experiment.rules)  # knows every path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_docstring_says_how_to_run_it(name):
    text = (FOLDER / f"{name.split(':')[0]}.py").read_text()
    assert f"dar-jax train experiments/{name.split(':')[0]}.py" in text
    assert "\nTime: " in text and "\nResult: " in text
    if name in PAPER:
        assert f"{PARAMETERS[name]:,} parameters" in text


@pytest.mark.parametrize("stage", ["digits", "fashion", "cifar10", "imagenet256"])
def test_the_stages_fit_each_other(stage):
    for name in EXPERIMENTS:
        if name.startswith(f"{stage}_ar") or (stage == "digits" and name == "forkme"):
            own = name.replace("_ar", "_tokenizer")
            tokenizer, transformer = load(own if own in PARAMETERS else f"{stage}_tokenizer").config, load(name).config
            assert transformer.model.num_tokens == tokenizer.model.num_tokens
            assert transformer.model.vocab_size == tokenizer.model.codebook_size
            assert transformer.data.image_size == tokenizer.data.image_size
            assert transformer.data.channels == tokenizer.data.channels


def write_images(stage, folder):
    """A few random images in the files that the stage's recipes read."""
    rng, labels = np.random.default_rng(0), np.arange(20) % 10
    if stage == "cifar10":
        for file in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
            np.column_stack([labels[:4], rng.integers(0, 256, (4, 3072))]).astype(np.uint8).tofile(folder / file)
    elif stage == "fashion":
        write_idx(folder, labels, pixels=rng.integers(0, 256, (20, 28, 28)))
    else:
        for split, label in (("train", 0), ("train", 1), ("val", 0), ("val", 1)):
            (folder / split / f"n{label}").mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / f"n{label}" / f"{number}.png")


@pytest.mark.parametrize("stage", ["fashion", "cifar10", "imagenet256"])
def test_both_recipes_of_a_stage_train_on_its_files(stage, tmp_path):
    """On networks of one layer, at 32 pixels for ImageNet; without the networks whose weights would be downloaded."""
    (data := tmp_path / "data").mkdir()
    write_images(stage, data)
    tokenizer, codes, own, classes = tmp_path / "tokenizer", data, [], []
    if stage == "imagenet256":
        own = ["--model.image-size", 32, "--data.image-size", 32, "--model.num-tokens", 16, "--model.max-tokens", 16]
        own += ["--loss.lpips", 0, "--loss.repa", 0, "--model.velocity.repa-layer", "None", "--data.workers", 0]
        classes = ["--data.image-size", 32, "--model.num-tokens", 16, "--model.num-classes", 2, "--data.workers", 0]
    short = ["--train.steps", 2, "--train.batch-size", 8, "--train.sample-every", 0]
    common = [*TINY_TOKENIZER, "--model.codebook-size", 32, *short, *own]
    run("train", path_of(f"{stage}_tokenizer"), "--workdir", tokenizer, "--data.path", data, *common)
    transformer = f"{stage}_ar:l" if stage == "imagenet256" else f"{stage}_ar"
    if load(transformer).config.data.source == "codes":
        run("tokenize", tokenizer, "--data.path", data, "--out", codes := tmp_path / "codes", "--batch-size", 8)
    common = [*TINY_TRANSFORMER, "--model.vocab-size", 32, *short, *classes]
    run("train", path_of(transformer), "--workdir", tmp_path / "ar", "--tokenizer", tokenizer, "--data.path", codes, *common)


def test_paper_recipes():
    """The published settings, which a change of the library's defaults may not change."""
    tokenizer = load("imagenet256_tokenizer").config
    assert (tokenizer.train.steps, tokenizer.train.batch_size) == (210_000, 1024)
    assert (tokenizer.optimizer.learning_rate, tokenizer.optimizer.warmup_steps) == (2e-4, 500)
    for size, last in (("l", 8.0), ("xl", 10.0), ("xxl", 10.0)):
        config = load(f"imagenet256_ar:{size}").config
        assert (config.train.steps, config.train.batch_size) == (360_000, 1024)
        assert (config.optimizer.learning_rate, config.optimizer.final_learning_rate) == (4e-4, 1e-5)
        assert (config.optimizer.decay_start, config.optimizer.weight_decay) == (300_000, 0.05)
        assert (config.data.crop, config.data.ten_crop_scale, config.data.flip) == ("ten_crop", 1.1, False)
        assert config.sampling.guidance == (1.1, last)


def test_forked_parts_are_used():
    experiment = load("forkme")
    assert experiment.hooks == ("model", "method.guidance")
    model = experiment.build_model()
    assert model.block.__name__ == "ParallelBlock" and isinstance(model.config, TransformerConfig)
    scales = experiment.method.guidance(9, 1.0, 5.0)
    np.testing.assert_allclose(scales[[0, 4, 8]], [1, 3, 5])
    assert scales[1] < np.linspace(1, 5, 9)[1] and scales[7] > np.linspace(1, 5, 9)[7]


def test_a_file_that_changes_within_a_second_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "changes.py"
    for steps in (1, 2):
        file.write_text(
            "from dar_jax.config import TokenizerTraining, TrainConfig\nfrom dar_jax.experiment import Experiment\n"
            f"experiment = Experiment(TokenizerTraining(train=TrainConfig(steps={steps})))\n"
        )
        os.utime(file, (1e9, 1e9))
        assert load_experiment(file).config.train.steps == steps
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_may_import_those_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("from dar_jax.quickstart import TOKENIZER as config\n")
    file = tmp_path / "imports.py"
    file.write_text(
        "from beside_it import config\nfrom dar_jax.experiment import Experiment\nexperiment = Experiment(config)\n"
    )
    assert load_experiment(file).config == TOKENIZER


def test_defaults_of_a_stage_are_no_changes():
    """A transformer's own default of the learning rate is another than that of `OptimizerConfig`."""
    for optimizer in (TransformerTraining().optimizer, OptimizerConfig()):
        Experiment(TransformerTraining(optimizer=optimizer), optimizer=lambda config, steps: optax.sgd(0.1)).check()
    with pytest.raises(InputError, match="optimizer.learning_rate is 1.0"):
        Experiment(TransformerTraining(optimizer=OptimizerConfig(learning_rate=1.0)), optimizer=lambda *_: None).check()


@pytest.mark.parametrize("part", [{"reads": "loss."}, {"rules": ("kernel", P())}])
def test_parts_that_are_no_tuples_of_tuples(part):
    with pytest.raises(InputError, match="should be a tuple of"):
        Experiment(TransformerTraining(), **part)
