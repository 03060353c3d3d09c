"""What a change of a tokenizer's recipe is worth: trains each arm with several seeds and measures it on held-out images.

Command:  python experiments/benchmarks/recipes.py experiments/digits_tokenizer.py --workdir runs/recipes --json recipes.json \
              --arms "adamw=--optimizer.learning-rate 8e-3" "muon=--optimizer.name muon --optimizer.learning-rate 8e-3"
Options:  --common="--train.steps 800"  (for all arms)  --seeds 0,1,2  --num-images 10000
          An arm is NAME=OPTIONS of `dar-jax train`, or NAME=FILE OPTIONS for another experiment file.
Result:   a table, mean +- standard deviation over the seeds, and JSON with every run. Finished runs are not trained again.

psnr: of reconstructions, dB; from 0: decoded from x = 0; distance: Fréchet distance of held-out images and reconstructions
(`reader.py` says of what); read: share of reconstructions read as their class; entropy, at position: bits of a code, and given
its position; flow: the training loss of the last record, which is comparable between arms of one path and weight only; seconds:
of training, with compilation.
"""

import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from common import machine_name, print_table, run, write_report
from reader import Reader, make_reader

from dar_jax.cli.main import main as dar_jax
from dar_jax.cli.options import Ints
from dar_jax.errors import InputError
from dar_jax.evaluation.metrics import code_statistics
from dar_jax.evaluation.tokenizer import noiseless
from dar_jax.experiment import load_experiment
from dar_jax.inference.reconstruct import reconstruct
from dar_jax.inference.trained import Trained, load_tokenizer
from dar_jax.training.checkpoint import inspect


@dataclass(frozen=True)
class Options:
    """Compare recipes of a tokenizer."""

    file: tyro.conf.Positional[Path]  # the experiment of arms that name none
    workdir: Path
    arms: tuple[str, ...]  # NAME=OPTIONS or NAME=FILE OPTIONS
    common: str = ""  # options of all arms
    seeds: Ints[int] = (0, 1, 2)
    num_images: int = 10_000  # held out, at most
    json: Path | None = None


def main(options: Options) -> None:
    options.workdir.mkdir(parents=True, exist_ok=True)
    rows, reader = [], None
    for arm in options.arms:
        name, _, text = arm.partition("=")
        words = shlex.split(text)
        file = words.pop(0) if words and not words[0].startswith("-") else str(options.file)
        for seed in options.seeds:
            folder = options.workdir / f"{name}_{seed}"
            arguments = [*shlex.split(options.common), *words, "--train.seed", str(seed)]
            seconds = trained_in(file, folder, arguments)
            reader = reader or make_reader(inspect(folder).config.data, options.workdir)
            figures = measure(load_tokenizer(folder, load_experiment(file)), reader, options.num_images)
            rows.append({"arm": name, "seed": seed, **figures, **last_record(folder), "seconds": seconds})
            print(rows[-1], flush=True)
    print_table([summary([row for row in rows if row["arm"] == name]) for name in dict.fromkeys(row["arm"] for row in rows)])
    write_report(options.json, rows, shlex.join(sys.argv), machine=machine_name())


def trained_in(file: str, folder: Path, arguments: list[str]) -> float:
    """Trains a run, unless it is finished; seconds."""
    stamp = folder / "seconds.json"
    if not stamp.exists():
        started = time.perf_counter()
        if dar_jax(["train", file, "--workdir", str(folder), *arguments]) != 0:
            raise InputError(f"the run in {folder} failed")
        stamp.write_text(json.dumps({"seconds": round(time.perf_counter() - started, 1)}))
    return json.loads(stamp.read_text())["seconds"]


def measure(trained: Trained, reader: Reader, most: int) -> dict[str, float]:
    """The figures of a tokenizer on held-out images."""
    images, labels = reader.held_out[:most], reader.held_out_labels[:most]
    seeds = np.arange(len(images))
    result = reconstruct(trained, images, seeds, batch_size=100)
    counts = np.zeros((trained.config.num_tokens, trained.config.codebook_size), int)
    np.add.at(counts, (np.arange(len(counts)), result.codes), 1)
    codes = code_statistics(counts)
    return {
        "psnr": float(result.psnr.mean()),
        "from 0": float(reconstruct(noiseless(trained), images, seeds, batch_size=100).psnr.mean()),
        "distance": reader.distance(result.images, images),
        "read": reader.accuracy(result.images, labels),
        "entropy": codes.entropy,
        "at position": codes.entropy_at_position,
    }


def last_record(folder: Path) -> dict[str, float]:
    *_, last = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    return {name: json.loads(last)[name] for name in ("flow", "images_per_second")}


def summary(rows: list[dict]) -> dict[str, str]:
    """Mean and standard deviation of every figure over the seeds."""
    values = {name: np.array([row[name] for row in rows]) for name in rows[0] if name not in ("arm", "seed")}
    spread = {name: f" +- {value.std(ddof=1):.2g}" if len(value) > 1 else "" for name, value in values.items()}
    return {"arm": rows[0]["arm"], **{name: f"{value.mean():.4g}{spread[name]}" for name, value in values.items()}}


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options)))
