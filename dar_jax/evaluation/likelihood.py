"""What a transformer makes of real images' codes: bits per token, at every position, with and without the class.

Shapes: B images, T tokens, V codes.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dar_jax.config import DataConfig
from dar_jax.console import Progress
from dar_jax.data.pipeline import epoch
from dar_jax.data.sources import Source
from dar_jax.errors import InputError
from dar_jax.files import replacing, write_json
from dar_jax.inference.reconstruct import quantize
from dar_jax.inference.trained import Trained
from dar_jax.models.transformer import score
from dar_jax.parallel.batches import full_batch, put_batch, to_host
from dar_jax.training.resume import class_numbers


def evaluate_transformer(
    trained: Trained,
    source: Source,
    data: DataConfig,
    batch_size: int = 64,
    num_images: int | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Scores the codes of a data set's images, centre-cropped, or stored codes, of which the first crop counts.

    Args:
      trained: of `load_sampler`.
      num_images: only so many, from the first on; None: all.
      class_names: those of the transformer, in its order; None: as its checkpoint says. The data's are found among them.

    Returns a report: `bits_per_token` and `accuracy` (share of tokens that were the most probable), given the class, and the
    same with `_without_class`; `bits_of_each_position` and `accuracy_of_each_position` [T], also without class; `images`.

    Raises InputError where the data do not fit the transformer or have classes that it does not know.
    """
    model, total = trained.networks.transformer, min(num_images or len(source), len(source))
    numbers = np.array(class_numbers(source.class_names, trained.class_names if class_names is None else class_names), np.int32)
    size = full_batch(min(batch_size, total), trained.mesh)
    sums = {name: np.zeros((2, model.config.num_tokens)) for name in ("bits", "accuracy")}
    images = 0
    with Progress("scored", total) as progress, jax.set_mesh(trained.mesh):
        for batch in epoch(source, data, batch_size=size, stop=total):
            if "codes" in batch:
                codes = put_batch(batch["codes"], trained.mesh)
            else:
                codes = quantize(trained.networks, trained.params, put_batch(batch["image"], trained.mesh)).codes
            if codes.shape[1] != model.config.num_tokens:
                raise InputError(f"the data have {codes.shape[1]} codes per image, the transformer {model.config.num_tokens}")
            further = {name: put_batch(value, trained.mesh) for name, value in batch.items() if name not in ("label", "valid")}
            labels = put_batch(numbers[batch["label"]], trained.mesh)
            condition = trained.networks.condition({**further, "label": labels})
            for row, given in enumerate((condition, model.null(condition))):
                bits, right = score(model, trained.params["transformer"], given, codes)
                sums["bits"][row] += to_host(bits)[batch["valid"]].sum(axis=0, dtype=np.float64)
                sums["accuracy"][row] += to_host(right)[batch["valid"]].sum(axis=0)
            images += int(batch["valid"].sum())
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
    """Writes report.json and positions.png, the bits of each position as a curve, into a folder; returns the paths."""
    out = Path(out)
    write_json(out / "report.json", report)
    curves = {name: report[f"bits_of_each_position{suffix}"] for name, suffix in CURVES}
    plot_positions(out / "positions.png", curves, groups, math.log2(codebook_size))
    return [out / "report.json", out / "positions.png"]


CURVES = (("given the class", ""), ("without class", "_without_class"))


def plot_positions(path: str | os.PathLike, curves: dict[str, Sequence[float]], groups: int, most: float) -> None:
    """A plot of bits per token against the position, with the groups of a denoising step marked and the bits of a code that
    is one of all with equal probability, `most`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(np.arange(len(values)), values, label=f"{name}, {np.mean(values):.2f} on average")
        length = len(values)
    for start in np.arange(1, groups) * length / groups:
        axes.axvline(start - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.axhline(most, color="0.5", linestyle=":", label=f"all codes equally probable, {most:.0f}")
    axes.set(xlabel="token", ylabel="bits", xlim=(0, length - 1), ylim=(0, None))
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
