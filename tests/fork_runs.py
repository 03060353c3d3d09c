"""The forks and variants, small enough to train in a moment, and how tests run and load them."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dar_jax.cli.main import main
from dar_jax.experiment import load_experiment
from dar_jax.inference.samples import sample

ROOT = Path(__file__).parent.parent
FORKS = ROOT / "tests" / "forks"
VARIANTS = ROOT / "experiments" / "variants"
TRANSFORMERS = {  # by the file that tests them
    "forks": ["heun", "heun:early", "inpainting", "text", "edges", "steps", "solvers", "stochastic", "noise", "observe"],
    "tokens": ["group_parallel", "speculative", "any_block", "block_diffusion", "unmasking", "energy"],
    "condition": ["control", "early_control", "watermark", "early_choice"],
}
PROGRAMS = ["decoder_report", "particles"]  # which take any run, see test_variants_flow.py and test_forks.py
TOKENIZERS = ["cosine_path", "unrolled", "gan", "few_steps", "patch_pyramid", "series", "binary_tokenizer", "perceptual"]

SHORT = ["--train.steps", "3", "--train.batch-size", "8", "--train.sample-every", "0", "--optimizer.name", "adamw"]
TINY_TRANSFORMER = ["--model.layers", "1", "--model.heads", "2", "--model.width", "16", "--model.mlp-multiple", "8"]
VELOCITY = ["--model.velocity.width", "16", "--model.velocity.layers", "1", "--model.velocity.head-size", "8"]
WIDTHS = ["--model.encoder-width", "16", "--model.decoder-width", "16", "--model.head-size", "8"]
TINY_TOKENIZER = [*VELOCITY, *WIDTHS, "--model.encoder-layers", "1", "--model.decoder-layers", "1"]
DIGITS = ["--data.source", "digits", "--data.image-size", "8", "--data.channels", "1", "--data.flip", "False"]
OWN = {  # settings that make a large recipe small, or show more
    "binary_tokenizer": ["--optimizer.name", "muon", "--loss.flow-power", "2", "--train.checkpoint-every", "1"],
    "perceptual": [*DIGITS, "--train.checkpoint-every", "1", "--model.channels", "1", "--model.codebook-size", "64"]
    + ["--fork.last", "1"],
    "few_steps": ["--train.checkpoint-every", "1"],
    "gan": [*DIGITS, "--model.image-size", "8", "--model.channels", "1", "--model.num-tokens", "16", "--model.num-groups", "4"]
    + ["--model.codebook-size", "64", "--fork.width", "16", "--fork.halvings", "1", "--fork.start-step", "1"],
}


def path_of(name):
    file, colon, value = name.partition(":")
    folder = FORKS if (FORKS / f"{file}.py").exists() else VARIANTS
    return f"{folder / file}.py{colon}{value}"


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def train(name, folder, tiny_run):
    own = [*TINY_TOKENIZER, *OWN.get(name, ())]
    if name not in TOKENIZERS:
        own = [*TINY_TRANSFORMER, "--model.vocab-size", 64, "--tokenizer", tiny_run / "tokenizer"]
    run("train", path_of(name), "--workdir", folder, *SHORT, *own)


def tokens_of(opened, labels, seeds, sampling, **given):
    return np.concatenate([batch.tokens for batch in sample(opened, labels, seeds, sampling, **given)])


def module_of(name):
    load_experiment(path_of(name))
    return sys.modules[f"experiment_{name}"]


def trains_and_samples(name, folder, out):
    """A transformer's run is sampled from with its file, and not without."""
    arguments = ["--labels", "3", "--seeds", "1,2", "--out", str(out)]
    assert main(["sample", str(folder), *arguments]) == 2
    run("sample", folder, "--experiment", path_of(name), *arguments)
    assert (out / "grid.png").exists() and len(list(out.glob("*_seed*.png"))) == 2


def trains_and_reconstructs(name, folder, out, size=8):
    for number in range(2):
        Image.fromarray(np.full((size, size), 100 * number, np.uint8)).save(out / f"{number}.png")
    run("reconstruct", folder, "--experiment", path_of(name), "--images", out, "--out", out / "out")
    assert (out / "out" / "grid.png").exists()
