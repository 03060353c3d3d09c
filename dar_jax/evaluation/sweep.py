"""Sampling settings compared: FID and the other metrics of N samples with each of them, and of their previews."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dar_jax.config import SamplingConfig
from dar_jax.console import Progress, columns
from dar_jax.errors import InputError
from dar_jax.evaluation.extractor import Extractor
from dar_jax.evaluation.fid import SAMPLE_FEATURES, compare, open_reference
from dar_jax.evaluation.statistics import RunningStatistics, add_features
from dar_jax.files import write_json
from dar_jax.inference.model import DENOISING
from dar_jax.inference.pictures import plot
from dar_jax.inference.samples import SampleBatch, sample
from dar_jax.inference.trained import Trained, seeds_from
from dar_jax.sampling.settings import Settings, make_settings

SETTINGS = ("guidance", "temperature", "top_k", "top_p", "solver", "steps", "num_denoising_steps")
METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


def variants(base: SamplingConfig, *axes: Sequence[Mapping[str, Any]]) -> list[SamplingConfig]:
    """All combinations of one change of settings from each axis; an axis without any leaves them as in `base`."""
    combinations = itertools.product(*(axis or ({},) for axis in axes))
    return [dataclasses.replace(base, **collections.ChainMap(*changes)) for changes in combinations]


def share_compilation(settings: Sequence[Settings], vocab_size: int) -> list[Settings]:
    """Enables the same filters in all settings (with neutral values), so that one compiled sampler serves them all."""
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
    given: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """Draws `num_samples` samples with each of the settings, of all classes in turn and with seeds from `seed` on, and measures
    them against the reference.

    Args:
      reference: as `fid.evaluate` takes it.
      groups: numbers of groups after which the previews are measured, at no cost in sampling; None: the finished images only.
      given: as of `sample`.

    Returns a row for each setting and preview: the setting, `groups`, `tokens`, the metrics, `notes`. Raises InputError where
    settings, seeds, groups or the reference do not fit.
    """
    config, last = trained.config, trained.config.num_groups
    groups = sorted(set(groups or (last,)))
    if not 1 <= groups[0] <= groups[-1] <= last:
        raise InputError(f"groups are {groups}, they should be between 1 and {last}")
    configs = [dataclasses.replace(each, num_groups=groups[-1]) for each in configs]
    settings = share_compilation(
        [make_settings(each, config, trained.networks.method) for each in configs],
        trained.networks.transformer.config.vocab_size,
    )
    seeds = seeds_from(seed, num_samples)
    real = open_reference(reference, extractor)
    labels = np.arange(num_samples) % trained.networks.transformer.config.num_classes
    rows, drawn = [], {}
    shape = (config.image_size, config.image_size, config.channels)
    for number, (each, prepared) in enumerate(zip(configs, settings), 1):
        running = {group: RunningStatistics(extractor.network, num_samples, SAMPLE_FEATURES) for group in groups}
        of_tokens = dataclasses.replace(each, **dict.fromkeys(DENOISING))  # of one key: the same tokens, drawn once
        options = {"prefix": drawn.get(of_tokens), "previews": len(groups) > 1, "given": given}
        samples = sample(trained, labels, seeds, prepared, batch_size, **options)
        tokens = drawn.setdefault(of_tokens, np.zeros((num_samples, groups[-1] * config.tokens_per_group), np.int32))
        with Progress(f"setting {number} of {len(configs)}:", num_samples * len(groups)) as progress:
            add_features(extractor, _measured(samples, running, tokens), progress.add)
        for group in groups:
            report = compare(running[group].result(f"samples after {group} of {last} groups", shape), real)
            rows.append(
                {
                    **{name: getattr(each, name) for name in SETTINGS},
                    "num_denoising_steps": len(prepared.times),
                    "groups": group,
                    "tokens": group * config.tokens_per_group,
                    **{name: report[name] for name in METRICS if name in report},
                    "notes": report["notes"],
                }
            )
    return rows


def _measured(
    samples: Iterator[SampleBatch], running: Mapping[int, RunningStatistics], tokens: np.ndarray
) -> Iterator[tuple[RunningStatistics, np.ndarray]]:
    """The images with the statistics of their group that they belong to; writes down the tokens."""
    for batch in samples:
        tokens[batch.rows, : batch.tokens.shape[1]] = batch.tokens
        if batch.groups in running:
            yield running[batch.groups], batch.images


def varied(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The settings that are not the same in all rows."""
    return [name for name in SETTINGS if len({row[name] for row in rows}) > 1]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text for people, settings that differ and metrics, notes that all share below."""
    names = [*varied(rows), "tokens", *(name for name in METRICS if name in rows[0])]
    cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    return "\n".join([columns(cells, ">" * len(names)), *notes])


def write_report(rows: Sequence[dict[str, Any]], out: str | os.PathLike, about: dict[str, Any]) -> list[Path]:
    """Writes report.json (with `about`) and fid.png, FID against the settings, a line for each preview; returns the paths."""
    out = Path(out)
    write_json(out / "report.json", {**about, "rows": list(rows)})
    with plot(out / "fid.png") as axes:
        for tokens in sorted({row["tokens"] for row in rows}):
            curve = [row for row in rows if row["tokens"] == tokens]
            labels = ["\n".join(f"{name} {_cell(row[name])}" for name in varied(rows)) or "all settings" for row in curve]
            axes.plot(labels, [row["fid"] for row in curve], marker="o", label=f"{tokens} tokens")
        axes.set(ylabel="FID", ylim=(0, None))
    return [out / "report.json", out / "fid.png"]


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return ":".join(f"{item:g}" for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
