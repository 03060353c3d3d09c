"""Both stages on the handwritten digits that come with scikit-learn: in minutes on two CPU cores, with pictures and a report.

`TOKENIZER` and `TRANSFORMER` are the recipes; `experiments/digits_tokenizer.py` trains the first one longer.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dar_jax import __version__
from dar_jax.config import (
    DataConfig,
    OptimizerConfig,
    SamplingConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TokenizerTraining,
    TrainConfig,
    TransformerConfig,
    TransformerTraining,
    VelocityConfig,
)
from dar_jax.console import columns
from dar_jax.data.sources import open_source, read_all
from dar_jax.errors import InputError
from dar_jax.evaluation.metrics import pixel_distance, pooled_pixels
from dar_jax.experiment import Experiment
from dar_jax.files import write_json
from dar_jax.inference import pictures
from dar_jax.inference.model import load
from dar_jax.inference.reconstruct import codebook_usage, reconstruct
from dar_jax.inference.tokenize import tokenize
from dar_jax.inference.trained import load_tokenizer
from dar_jax.training import checkpoint
from dar_jax.training.loop import train

DIGITS = DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False)

TOKENIZER = TokenizerTraining(
    name="digits_tokenizer",
    model=TokenizerConfig(
        image_size=8,
        channels=1,
        encoder_patch_size=4,
        encoder_layers=2,
        encoder_width=64,
        decoder_layers=1,
        decoder_width=64,
        head_size=16,
        num_tokens=16,
        num_groups=4,
        num_denoising_steps=4,
        max_tokens=16,
        codebook_size=128,
        init_std=None,
        gate_init=1.0,
        velocity=VelocityConfig(width=64, layers=3, head_size=16, patch_size=4, repa_layer=None),
    ),
    loss=TokenizerLossConfig(entropy=0.02, flow_power=2.0),
    data=DIGITS,
    optimizer=OptimizerConfig(name="muon", learning_rate=8e-3, schedule="cosine", warmup_steps=50, ema_decay=0.99),
    train=TrainConfig(steps=1000, batch_size=64, checkpoint_every=500),
)

TRANSFORMER = TransformerTraining(
    name="digits",
    model=TransformerConfig(
        layers=3,
        heads=4,
        width=128,
        num_tokens=16,
        vocab_size=128,
        num_classes=10,
        mlp_multiple=32,
        token_dropout=0.15,
        attention_dropout=0.15,
        mlp_dropout=0.15,
    ),
    data=DataConfig(source="codes", image_size=8, channels=1, crop="center", flip=False),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=4e-3, schedule="cosine", warmup_steps=50, weight_decay=0.3, ema_decay=0.99
    ),
    train=TrainConfig(steps=700, batch_size=64, checkpoint_every=500),
    sampling=SamplingConfig(guidance=(1.5, 1.5)),
)

PER_CLASS = 50  # samples that the classifier looks at
SHOWN_PER_CLASS = 8  # of them in the pictures


def recipes(workdir: Path, fast: bool) -> tuple[TokenizerTraining, TransformerTraining]:
    """The settings of both stages of a quickstart in `workdir`; `fast`: a few steps of each, to see that everything works."""
    tokenizer, transformer = TOKENIZER, TRANSFORMER
    if fast:
        tokenizer = dataclasses.replace(tokenizer, train=dataclasses.replace(tokenizer.train, steps=50))
        transformer = dataclasses.replace(transformer, train=dataclasses.replace(transformer.train, steps=50))
    data = dataclasses.replace(transformer.data, path=str(workdir / "codes"))
    return tokenizer, dataclasses.replace(transformer, tokenizer=str(workdir / "tokenizer"), data=data)


def quickstart(workdir: str | os.PathLike, fast: bool = False) -> dict[str, Any]:
    """Trains both stages on the digits in `workdir`, then writes pictures and `report.json` there; returns the report.

    An interrupted quickstart goes on where it stopped. The folder is a transformer's run: `sample`, `reconstruct` and `info`
    take it. With `fast` the numbers mean nothing; it is for trying out an installation.

    Raises InputError if the folder holds anything else, or a finished quickstart; KeyboardInterrupt after the checkpoint that
    Ctrl-C makes during training.
    """
    started = time.perf_counter()
    workdir = Path(workdir).absolute()
    tokenizer_config, transformer_config = recipes(workdir, fast)
    resumed = _check_folder(workdir, tokenizer_config, transformer_config)
    seconds = {}

    def lap(name: str) -> None:
        seconds[name] = round(time.perf_counter() - started - sum(seconds.values()), 1)

    print("stage 1 of 2: the tokenizer, images <-> codes", flush=True)
    _train(Experiment(tokenizer_config), workdir / "tokenizer")
    lap("tokenizer")
    print("storing the codes of the training digits", flush=True)
    tokenizer = load_tokenizer(workdir / "tokenizer")
    tokenize(tokenizer, open_source(DIGITS), DIGITS, workdir / "codes", batch_size=250)
    print("stage 2 of 2: the transformer, class -> codes", flush=True)
    _train(Experiment(transformer_config), workdir)
    lap("transformer")
    report = {**_evaluate(workdir), "fast": fast, "resumed": resumed, "version": __version__}
    lap("evaluation")
    report |= {"seconds": round(time.perf_counter() - started, 1), "seconds_of_each": seconds}
    write_json(workdir / "report.json", report)
    return report


def _evaluate(workdir: Path) -> dict[str, float]:
    """Measures both stages and writes the pictures."""
    model = load(workdir, batch_size=250)
    images, labels = digits("train")
    held_out, held_out_labels = digits("test")
    result = reconstruct(model.trained, held_out, np.arange(len(held_out)), model.trained.info.config.sampling, len(held_out))
    pictures.save_png(workdir / "reconstructions.png", pictures.beside(held_out[:32], result.images[:32]))
    classes = np.tile(np.arange(10), PER_CLASS)  # 0 .. 9 again and again, each time with other seeds
    print(f"drawing {len(classes)} samples", flush=True)
    previews = np.stack([*model.stream(classes, np.arange(len(classes)))])  # [G, N, H, W, C]
    _draw(workdir, previews, model.class_names)

    classify, samples = classifier(images, labels), previews[-1]
    bits = model.score(held_out, held_out_labels)  # [N, T]
    return {
        "reconstruction_psnr": float(result.psnr.mean()),
        "reconstruction_distance": pixel_distance(result.images, held_out),
        "reconstruction_accuracy": float(np.mean(classify(result.images) == held_out_labels)),
        "codebook_usage": codebook_usage(model.encode(images), model.trained.config.codebook_size),
        "bits_per_token": float(bits.mean()),
        "bits_per_image": float(bits.sum(axis=1).mean()),
        "class_accuracy": float(np.mean(classify(samples) == classes)),
        "sample_distance": pixel_distance(samples, images),
        "variety": spread(samples, classes) / spread(images, labels),
        "real_accuracy": float(np.mean(classify(held_out) == held_out_labels)),
    }


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """The mean distance of two of the first 200 images of a class, in pixels of [-1, 1]: how much variety there is."""
    from scipy.spatial.distance import pdist

    of_class = (np.asarray(pooled_pixels(images[labels == label][:200])) for label in np.unique(labels))
    return float(np.mean([pdist(pixels).mean() for pixels in of_class]))


def _draw(workdir: Path, previews: np.ndarray, names: tuple[str, ...]) -> None:
    """Writes the pictures of samples [G, N, H, W, C] of classes 0 .. 9 in turn."""
    shown = previews[:, : 10 * SHOWN_PER_CLASS].reshape(len(previews), SHOWN_PER_CLASS, 10, *previews.shape[2:]).swapaxes(1, 2)
    frames = [pictures.grid(frame, names, [f"#{i + 1}" for i in range(SHOWN_PER_CLASS)]) for frame in shown]
    pictures.save_png(workdir / "samples.png", frames[-1])
    pictures.save_animation(workdir / "denoising.webp", frames)
    pictures.save_png(workdir / "groups.png", pictures.group_by_group(previews[:, :10], names))


def summary(report: dict[str, Any]) -> str:
    """The report in lines for people."""
    lines = [
        ("reconstruction_psnr", "{:.2f} dB", "of held-out digits, encoded and decoded"),
        ("reconstruction_distance", "{:.3f}", "Fréchet distance of them to the originals, in pixels"),
        ("codebook_usage", "{:.1%}", "of the codes occur in the training digits"),
        ("bits_per_token", "{:.2f}", "that the transformer needs for the codes of held-out digits"),
        ("bits_per_image", "{:.1f}", "for all codes of one"),
        ("class_accuracy", "{:.1%}", "of the samples are read as the requested class by a support-vector classifier"),
        ("sample_distance", "{:.3f}", "Fréchet distance of the samples to the training digits, in pixels"),
        ("variety", "{:.1%}", "mean distance of two samples of a class, by that of two real digits"),
        ("reconstruction_accuracy", "{:.1%}", "of held-out digits are read correctly after encoding and decoding"),
        ("real_accuracy", "{:.1%}", "of held-out digits are read correctly by the same classifier"),
        ("seconds", "{:.0f}", "in all"),
    ]
    return columns([(name, form.format(report[name]), meaning) for name, form, meaning in lines], "<>")


def _check_folder(workdir: Path, tokenizer: TokenizerTraining, transformer: TransformerTraining) -> bool:
    """True where the folder holds an unfinished quickstart with these settings. Raises InputError if it holds anything else."""
    if (workdir / "report.json").exists():
        raise InputError(f"{workdir} already holds a finished quickstart; choose another folder")
    if not workdir.is_dir() or not any(workdir.iterdir()):
        return False
    for folder, config in ((workdir / "tokenizer", tokenizer), (workdir, transformer)):
        if checkpoint.latest_step(folder) is not None and checkpoint.inspect(folder).config != config:
            raise InputError(f"{folder} holds a run with other settings; choose another folder")
    if not (workdir / "tokenizer").is_dir():
        raise InputError(f"{workdir} is not empty and holds no quickstart; choose another folder")
    return True


def _train(experiment: Experiment, workdir: Path) -> None:
    if train(experiment, workdir, resume=True).stopped_by:
        raise KeyboardInterrupt


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All digits of a split: images uint8 [N, 8, 8, 1] and labels int [N]."""
    return read_all(dataclasses.replace(DIGITS, split=split))


def classifier(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A support-vector classifier trained on real digits: uint8 [N, 8, 8, 1] -> labels [N]."""
    from sklearn.svm import SVC

    def features(images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1) * (16 / 255)  # the scale that scikit-learn's digits come in

    machine = SVC(gamma=0.001).fit(features(images), labels)
    return lambda images: machine.predict(features(images))
