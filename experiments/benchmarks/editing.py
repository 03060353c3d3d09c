"""What ways of editing do with the held-out images of a run's data: the tables of docs/variants.md on editing.

Command:  python experiments/benchmarks/editing.py runs/digits --json editing.json --picture editing.png
Options:  --num 297 --particles 1 4 16 64,16,4,4 --seeds 3 --tasks half quarter enlarge
Result:   a table, and the same as JSON; a picture of the first ten images. Every row has the same images and seeds.

half: the left half is known; quarter: a quarter of the pixels, at random; enlarge: the means over 2 x 2 pixels. PSNR: of what
is not known, the mean over the images; read: share that a classifier reads as the class of the original (the originals
themselves: see the last line); distance: Fréchet distance of the results to the originals; seconds: of all images, with the
fastest seed. "label": the class is given. Each figure is the mean over the seeds, with half of the range.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from common import across, machine_name, print_table, run, write_report
from reader import Reader, make_reader

from dar_jax.experiment import load_experiment
from dar_jax.inference import pictures
from dar_jax.inference.edit import edit
from dar_jax.inference.trained import Trained, load_sampler
from dar_jax.models.pixels import psnr, to_float, to_uint8
from dar_jax.sampling.observe import pool, steered

OBSERVE = Path(__file__).parents[1] / "variants" / "observe.py"


@dataclass(frozen=True)
class Options:
    """Compare ways of editing."""

    run: tyro.conf.Positional[Path]  # a transformer's run
    num: int = 297  # held-out images
    seeds: int = 3  # results of each image
    tasks: tuple[str, ...] = ("half", "quarter", "enlarge")
    particles: tuple[str, ...] = ("1", "4", "16", "64,16,4,4")  # each one number, or one for each group
    rows: int = 1024  # particles at a time
    json: Path | None = None  # also write everything to this file
    picture: Path | None = None  # also write this picture


@dataclass(frozen=True)
class Task:
    """What is given to be edited, as `inference.edit.edit` takes it; missing: True where a result is compared [N, H, W]."""

    name: str
    images: np.ndarray
    known: np.ndarray
    missing: np.ndarray


def main(options: Options) -> None:
    command = " ".join(["python", *sys.argv])
    print(f"{machine_name()}, {date.today()}\n{command}\n")
    trained = load_sampler(options.run)
    reader = make_reader(trained.info.tokenizer.config.data, options.run)
    originals, labels = reader.held_out[: options.num], reader.held_out_labels[: options.num]
    rows, shown = [], []
    for name in options.tasks:
        task = make_task(name, originals)
        for method, draw in methods(options, trained, task, labels).items():
            results, seconds = [], []
            for seed in range(options.seeds):
                started = time.perf_counter()
                results.append(draw(seed))
                seconds.append(time.perf_counter() - started)
            row = {"task": name, "method": method, **figures(reader, task, originals, labels, results)}
            rows.append({**row, "seconds": min(seconds)})
            shown.append((f"{name}: {method}", results[0][:10]))
            print_table(rows[-1:])
    print()
    print_table(rows)
    print(f"\n{reader.accuracy(originals, labels):.1%} of the originals are read as their class")
    write_report(options.json, rows, command, machine=machine_name())
    if options.picture:
        names, images = zip(("originals", originals[:10]), *shown)
        pictures.save_png(options.picture, pictures.grid(np.stack(images), names))


def make_task(name: str, originals: np.ndarray) -> Task:
    """Unknown pixels are filled with the mean of the known ones of the image."""
    count, side = originals.shape[:2]
    everything = np.ones((count, side, side), bool)
    if name == "enlarge":
        small = to_uint8(pool(to_float(originals), side // 2))
        return Task(name, small, everything[:, ::2, ::2], everything)
    if name == "half":
        known = everything & (np.arange(side) < side // 2)
    else:
        known = np.random.default_rng(0).random((count, side, side)) < 0.25
    weights = known[..., None]
    mean = (originals * weights).sum(axis=(1, 2), keepdims=True) / weights.sum(axis=(1, 2), keepdims=True)
    return Task(name, np.where(weights, originals, np.rint(mean)).astype(np.uint8), known, ~known)


def methods(options: Options, trained: Trained, task: Task, labels: np.ndarray) -> dict[str, Callable[[int], np.ndarray]]:
    """Functions from a number to results uint8 [N, H, W, C]."""
    guided = load_experiment(OBSERVE).method
    rounds = sys.modules["experiment_observe"].rounds
    seeds = lambda number: np.arange(len(labels)) + 10**6 * number  # noqa: E731
    sampling = trained.info.config.sampling

    def with_steer(steer):
        return dataclasses.replace(trained, networks=steered(trained.networks, steer))

    def encoded(trained, count):
        return lambda number: rounds(trained, task.images, task.known, seeds(number), count, options.rows)[-1]

    def edited(trained, classes, particles):
        counts = tuple(map(int, particles.split(",")))
        arguments = trained, task.images, task.known, classes
        settings = sampling, counts, 0, options.rows
        return lambda number: np.concatenate([part.images for part in edit(*arguments, seeds(number), *settings)])

    free = with_steer(lambda velocity, x, t, observed: velocity(x, t))
    found = {"encode, decode, paste": encoded(free, 1), "encode, project": encoded(trained, 1)}
    found["encode, project, 3 times"] = encoded(trained, 3)
    for name, classes in (("label, ", labels), ("", None)):
        found |= {f"{name}{count} particles": edited(trained, classes, count) for count in options.particles}
    found["label, 16 particles, paste"] = edited(free, labels, "16")
    found["label, 16 particles, gradient"] = edited(with_steer(guided.steer), labels, "16")
    return found


def figures(reader: Reader, task: Task, originals: np.ndarray, labels: np.ndarray, results: list[np.ndarray]) -> dict[str, Any]:
    """Figures, means over the seeds with half of the range."""
    share = task.missing.mean(axis=(1, 2))

    def lost(images):  # the error counts where pixels are missing only
        return float(np.mean(psnr(originals, np.where(task.missing[..., None], images, originals)) + 10 * np.log10(share)))

    values = {
        "PSNR": [lost(images) for images in results],
        "read, %": [100 * reader.accuracy(images, labels) for images in results],
        "distance": [reader.distance(images, originals) for images in results],
    }
    return {name: across(each) if len(each) > 1 else each[0] for name, each in values.items()}


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options)))
