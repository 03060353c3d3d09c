"""The likelihood of real images' codes: bits per token, at every position, with and without the class.

Shapes: B images, T tokens, V codes.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dar_jax.config import DataConfig
from dar_jax.console import Progress
from dar_jax.data.pipeline import epoch
from dar_jax.data.sources import Source
from dar_jax.errors import InputError
from dar_jax.files import write_json
from dar_jax.inference.pictures import plot
from dar_jax.inference.reconstruct import quantize
from dar_jax.inference.trained import Trained
from dar_jax.models.pixels import with_float_image
from dar_jax.models.transformer import score
from dar_jax.parallel.batches import over_batches
from dar_jax.training.resume import class_numbers


def evaluate_transformer(
    trained: Trained,
    source: Source,
    data: DataConfig,
    batch_size: int = 64,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Scores the codes of a data set's images, centre-cropped, or stored codes, of which the first crop counts.

    Args:
      trained: of `load_sampler`. The data's classes are found by name among its classes.
      num_images: the number of images, from the first on; None: all.

    Returns a report: `bits_per_token` and `accuracy` (share of tokens that were the most probable), given the class, and the
    same with `_without_class`; `bits_of_each_position` and `accuracy_of_each_position` [T], also without class; `images`.

    Raises InputError where the data do not fit the transformer or have classes that it does not know.
    """
    networks, params = trained.networks, trained.params
    model, total = networks.transformer, min(num_images or len(source), len(source))
    numbers = np.array(class_numbers(source.class_names, trained.class_names), np.int32)
    size = trained.full_batch(min(batch_size, total))
    sums = {name: np.zeros((2, model.config.num_tokens)) for name in ("bits", "accuracy")}
    images = 0

    def scores(batch: dict[str, jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
        batch = with_float_image(batch)  # a condition sees images as in training
        codes = batch["codes"] if "codes" in batch else quantize(networks, params, batch["image"]).codes
        if codes.shape[1] != model.config.num_tokens:
            raise InputError(f"the data have {codes.shape[1]} codes per image, the transformer {model.config.num_tokens}")
        condition = networks.condition(batch)
        return [score(model, params["transformer"], each, codes) for each in (condition, model.null(condition))]

    def batches() -> Iterator[tuple[np.ndarray, tuple[dict[str, np.ndarray]]]]:
        for batch in epoch(source, data, batch_size=size, stop=total):
            valid = batch.pop("valid")
            yield valid, ({**batch, "label": numbers[batch["label"]]},)

    with Progress("scored", total) as progress:
        for valid, results in over_batches(scores, batches(), size, trained.mesh):
            for row, (bits, right) in enumerate(results):
                sums["bits"][row] += bits[valid].sum(axis=0, dtype=np.float64)
                sums["accuracy"][row] += right[valid].sum(axis=0)
            images += int(valid.sum())
            progress.add(min(size, total - progress.done))
    if images == 0:
        raise InputError("none of the images can be read")
    report: dict[str, Any] = {"images": images, "data": source.description}
    for name, key in (("bits", "bits_per_token"), ("accuracy", "accuracy")):
        for row, suffix in enumerate(("", "_without_class")):
            report[key + suffix] = float(sums[name][row].mean() / images)
            report[f"{name}_of_each_position{suffix}"] = (sums[name][row] / images).tolist()
    return report


def describe(report: dict[str, Any]) -> str:
    """The report's averages in a line for people."""
    bits, without = report["bits_per_token"], report["bits_per_token_without_class"]
    return (
        f"{bits:.4f} bits per token ({without:.4f} without class), most probable {report['accuracy']:.1%} of the time "
        f"({report['accuracy_without_class']:.1%}), over {report['images']} images: {report['data']}"
    )


def write_report(report: dict[str, Any], out: str | os.PathLike, groups: int, codebook_size: int) -> list[Path]:
    """Writes report.json and positions.png into a folder; returns the paths.

    The plot shows the bits of each position, the groups of tokens, and the bits of a code that is uniformly distributed.
    """
    out = Path(out)
    write_json(out / "report.json", report)
    with plot(out / "positions.png") as axes:
        for name, suffix in (("given the class", ""), ("without class", "_without_class")):
            bits = report[f"bits_of_each_position{suffix}"]
            axes.plot(bits, label=f"{name}, {np.mean(bits):.2f} on average")
        for start in np.arange(1, groups) * len(bits) / groups:
            axes.axvline(start - 0.5, color="0.85", linewidth=0.8, zorder=0)
        most = math.log2(codebook_size)
        axes.axhline(most, color="0.5", linestyle=":", label=f"all codes equally probable, {most:.0f}")
        axes.set(xlabel="token", ylabel="bits", xlim=(0, len(bits) - 1), ylim=(0, None))
    return [out / "report.json", out / "positions.png"]
