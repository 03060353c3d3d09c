"""Ways of denoising beside the paper's: what they cost and how good the images are. Tables of docs/variants.md.

Command:  python experiments/benchmarks/denoising.py runs/digits --json denoising.json
Options:  RUNS, of the same recipe with other seeds: means over them, and half of the range
          --rows uniform uniform@8 late3 euler experiments/variants/solvers.py:plain@8      (WAY or FILE[:NAME], @ steps)
          a number of uniform steps or the name of late ones
          --images 1000 --samples 2000 (0: none) --noises 3 --batch-size 256 --repeats 5
          --perceptual: LPIPS (from 16 pixels on) and rFID too, from one noise; docs/weights.md says where weights are put
Result:   a table, and the same as JSON. All rows have the same codes, noise and seeds; `uniform` is the paper's.

evaluations: of the velocity network for an image; operations: of the whole decoding, as a share of the first row's; PSNR,
distance, accuracy: of held-out images, encoded and decoded; samples: of the transformer's, with the run's guidance. Distances
are Fréchet distances to the held-out images, accuracy is the share that is read as its class, both by `reader.py` (digits: in
the pixels, in [-1, 1]). images/s are of decoding codes, the fastest of some repeats, which all rows take in turn.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import across, machine_name, print_table, run, seconds, write_report
from reader import make_reader

from dar_jax.config import LATE_STEPS, SamplingConfig
from dar_jax.evaluation.extractor import Extractor, open_extractor
from dar_jax.evaluation.metrics import Moments, frechet_distance, moments
from dar_jax.evaluation.tokenizer import lpips_distance, open_lpips
from dar_jax.experiment import load_experiment
from dar_jax.features.vgg_lpips import SMALLEST
from dar_jax.inference.model import Model, load
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import Trained
from dar_jax.models.pixels import psnr
from dar_jax.parallel.batches import row_slices
from dar_jax.sampling.sampler import decode
from dar_jax.sampling.settings import Method, Settings, make_settings
from dar_jax.training.flops import count_flops


@dataclass(frozen=True)
class Options:
    """Compare ways of denoising with the paper's uniform steps."""

    runs: tyro.conf.Positional[tuple[str, ...]]  # of tokenizers, or of transformers for the samples' figures too
    rows: tuple[str, ...] = ("uniform", "uniform@2", "uniform@3", "uniform@8", "euler", *LATE_STEPS)
    images: int = 1000  # held-out ones, at most
    samples: int = 2000
    noises: int = 3  # that the held-out images are decoded from
    batch_size: int = 256
    repeats: int = 5
    perceptual: bool = False  # LPIPS and rFID too
    keep: Path | None = None  # where a network that reads the images is kept; None: in the folder of the run
    json: Path | None = None  # also write everything to this file


def main(options: Options) -> None:
    command = " ".join(["python", *sys.argv])
    print(f"{machine_name()}, {date.today()}\n{command}\n")
    runs = [measure(options, path) for path in options.runs]
    rows = []
    for way, *figures in zip(options.rows, *runs):
        row = {"way": way} | {name: across([each[name] for each in figures]) for name in figures[0]}
        for name in ("PSNR", "distance", "accuracy, %"):
            row[f"{name} - base's"] = across([each[name] - run[0][name] for each, run in zip(figures, runs)])
        rows.append(row)
    print_table(rows)
    write_report(options.json, rows, command, machine=machine_name(), runs=dict(zip(options.runs, runs)))


def measure(options: Options, path: str) -> list[dict[str, float]]:
    """The figures of every row for one run."""
    base = load(path, batch_size=options.batch_size)
    info, transformer = base.trained.info, base.trained.networks.transformer
    reader = make_reader(info.tokenizer.config.data, keep_in=info.workdir if options.keep is None else options.keep)
    images, labels = (each[: options.images] for each in (reader.held_out, reader.held_out_labels))
    codes, drawn = base.encode(images), None
    classes, seeds = np.arange(options.samples) % len(base.class_names), np.arange(options.samples)
    if transformer is not None and options.samples:
        batches = sample(base.trained, classes, seeds, info.config.sampling, options.batch_size)
        drawn = np.concatenate([batch.tokens for batch in batches])
    rows, timed = [], []
    if options.perceptual:
        extractor, lpips = open_extractor(), open_lpips()
        real = inception_moments(extractor, images)
    for way in options.rows:
        model, settings = way_of(way, base)
        results = [model.decode(codes, np.arange(len(codes)) + 10_000 * noise, **settings) for noise in range(options.noises)]
        chosen = make_settings(SamplingConfig(**settings), model.trained.config, model.trained.networks.method)
        row = {
            "evaluations": len(chosen.times),
            "operations": operations(model.trained, chosen),
            "PSNR": np.mean([psnr(images, result).mean() for result in results]),
            "distance": np.mean([reader.distance(result, images) for result in results]),
            "accuracy, %": 100 * np.mean([reader.accuracy(result, labels) for result in results]),
        }
        if options.perceptual:
            row["rFID"] = frechet_distance(real, inception_moments(extractor, results[0])).value
            if images.shape[1] >= SMALLEST:
                each = [
                    lpips_distance(lpips.params, images[rows], results[0][rows])
                    for rows in row_slices(0, len(images), options.batch_size)
                ]
                row["LPIPS"] = float(np.mean(np.concatenate(each)))
        if drawn is not None:
            samples = model.decode(drawn, seeds, **settings)
            row["samples: distance"] = reader.distance(samples, reader.held_out)
            row["samples: accuracy, %"] = 100 * reader.accuracy(samples, classes)
        rows.append(row)
        timed.append(functools.partial(model.decode, np.resize(codes, (options.batch_size, codes.shape[1])), **settings))
    for _ in range(options.repeats):
        for row, once in zip(rows, timed):
            row["images/s"] = max(options.batch_size / seconds(once), row.get("images/s", 0))
    return [row | {"operations": row["operations"] / rows[0]["operations"]} for row in rows]


def inception_moments(extractor: Extractor, images: np.ndarray) -> Moments:
    """Of the pooled features of images uint8 [N, H, W, C]."""
    return moments(np.concatenate([features.pool for features in extractor([images])]))


def way_of(way: str, model: Model) -> tuple[Model, dict[str, Any]]:
    """The model with the parts of sampling that a row names, and its settings."""
    name, _, count = way.partition("@")
    settings: dict[str, Any] = {"num_denoising_steps": int(count)} if count.isdigit() else {"steps": count} if count else {}
    method = load_experiment(name).method if name.partition(":")[0].endswith(".py") else Method()
    networks = dataclasses.replace(model.trained.networks, method=method)
    if name in LATE_STEPS:
        settings["steps"] = name
    elif name in ("euler", "adams2"):
        settings["solver"] = name
    return Model(dataclasses.replace(model.trained, networks=networks), model.batch_size), settings


def operations(trained: Trained, settings: Settings) -> float:
    """Operations of decoding one image."""
    shapes = jax.eval_shape(lambda params: params, trained.sampler_params)
    values = jax.ShapeDtypeStruct((1, trained.config.num_tokens, trained.config.code_dim), jnp.float32)
    seeds = jax.ShapeDtypeStruct((1,), jnp.uint32)
    return count_flops(lambda *given: decode(trained.networks, given[0], settings, *given[1:]).images, shapes, values, seeds)


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options)))
