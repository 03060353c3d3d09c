"""How sampling settings change what comes out: FID and company of N samples for each, and for each length of the preview."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dar_jax.config import SamplingConfig
from dar_jax.console import Progress, columns
from dar_jax.errors import InputError
from dar_jax.evaluation.extractor import Extractor
from dar_jax.evaluation.fid import SAMPLE_FEATURES, compare, open_reference
from dar_jax.evaluation.statistics import RunningStatistics
from dar_jax.files import replacing, write_json
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import Trained, seeds_from
from dar_jax.sampling.settings import Settings, make_settings

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


def variants(
    base: SamplingConfig,
    guidance: Sequence[tuple[float, float]] = (),
    temperature: Sequence[float] = (),
    top_k: Sequence[int] = (),
    top_p: Sequence[float] = (),
) -> list[SamplingConfig]:
    """Every combination of the values given; what is not given stays as in `base`."""
    axes = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    axes = {name: values or (getattr(base, name),) for name, values in axes.items()}
    return [dataclasses.replace(base, **dict(zip(axes, values))) for values in itertools.product(*axes.values())]


def share_compilation(settings: Sequence[Settings], vocab_size: int) -> list[Settings]:
    """The same settings with the same parts switched on, though without effect, so that one compilation serves all."""
    neutral = {
        "temperature": None,  # taking the most probable token is another computation
        "top_k": jnp.int32(vocab_size),
        "top_p": jnp.float32(jnp.inf),
    }
    used = [name for name in neutral if any(getattr(each, name) is not None for each in settings)]
    guided = max(each.guided for each in settings)
    return [
        dataclasses.replace(each, guided=guided, **{name: neutral[name] for name in used if getattr(each, name) is None})
        for each in settings
    ]


def sweep(
    trained: Trained,
    extractor: Extractor,
    reference: Any,
    configs: Sequence[SamplingConfig],
    groups: Sequence[int] | None = None,
    num_samples: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Draws `num_samples` samples with each of the settings, of all classes in turn and with seeds from `seed` on, and measures
    them against the reference.

    Args:
      reference: as `evaluate.evaluate` takes it.
      groups: after how many groups the previews are measured, which cost no more sampling; None: the finished images only.

    Returns a row for each setting and preview: the setting, `groups`, `tokens`, the metrics, `notes`. Raises InputError where
    settings, seeds, groups or the reference do not fit.
    """
    config, last = trained.config, trained.config.num_groups
    wanted = sorted(set(groups or (last,)))
    if not 1 <= wanted[0] <= wanted[-1] <= last:
        raise InputError(f"groups are {wanted}, they should be between 1 and {last}")
    configs = [dataclasses.replace(each, num_groups=wanted[-1]) for each in configs]
    settings = share_compilation(
        [make_settings(each, config, trained.networks.method) for each in configs],
        trained.networks.transformer.config.vocab_size,
    )
    seeds = seeds_from(seed, num_samples)
    real = open_reference(reference, extractor)
    labels = np.arange(num_samples) % trained.networks.transformer.config.num_classes
    rows = []
    for number, (each, made) in enumerate(zip(configs, settings), 1):
        running = {group: RunningStatistics(extractor.network, num_samples, SAMPLE_FEATURES) for group in wanted}
        with Progress(f"setting {number} of {len(configs)}:", num_samples) as progress:
            for drawn in sample(trained, labels, seeds, made, batch_size, previews=len(wanted) > 1):
                if drawn.groups in running:
                    for features in extractor([drawn.images]):
                        running[drawn.groups].add(features)
                if drawn.groups == wanted[-1]:
                    progress.add(len(drawn.images))
        for group in wanted:
            shape = (trained.config.image_size, trained.config.image_size, trained.config.channels)
            report = compare(running[group].result(f"samples after {group} of {last} groups", shape), real)
            rows.append(
                {
                    "guidance": list(each.guidance),
                    "temperature": each.temperature,
                    "top_k": each.top_k,
                    "top_p": each.top_p,
                    "groups": group,
                    "tokens": group * config.tokens_per_group,
                    **{name: report[name] for name in METRICS if name in report},
                    "notes": report["notes"],
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text for people, notes that all share below."""
    names = [name for name in ("guidance", "temperature", "top_k", "top_p", "tokens", *METRICS) if name in rows[0]]
    cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    return "\n".join([columns(cells, ">" * len(names)), *notes])


def write_report(rows: Sequence[dict[str, Any]], out: str | os.PathLike, about: dict[str, Any]) -> list[Path]:
    """Writes report.json (with `about`) and fid.png, FID against the settings, a line for each preview; returns the paths."""
    from matplotlib.figure import Figure

    out = Path(out)
    write_json(out / "report.json", {**about, "rows": list(rows)})
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    varied = [name for name in ("guidance", "temperature", "top_k", "top_p") if len({str(row[name]) for row in rows}) > 1]
    for tokens in sorted({row["tokens"] for row in rows}):
        chosen = [row for row in rows if row["tokens"] == tokens]
        labels = ["\n".join(f"{name} {_cell(row[name])}" for name in varied) or "all settings" for row in chosen]
        axes.plot(labels, [row["fid"] for row in chosen], marker="o", label=f"{tokens} tokens")
    axes.set(ylabel="FID", ylim=(0, None))
    axes.legend()
    with replacing(out / "fid.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return [out / "report.json", out / "fid.png"]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ":".join(f"{item:g}" for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
