"""What a checkpoint holds, as text for people."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dar_jax import parallel
from dar_jax.config import TokenizerTraining
from dar_jax.console import printable
from dar_jax.errors import InputError
from dar_jax.training import checkpoint
from dar_jax.training.checkpoint import Info

PARTS = ("params", "ema", "opt_state")


def describe(path: str | os.PathLike) -> str:
    """Networks and their sizes, steps, classes, stored parts and all settings of a checkpoint, and of its tokenizer.

    Reads no weights. Raises InputError where there is no checkpoint or it is damaged.
    """
    info = checkpoint.inspect(path)
    if isinstance(info.config, TokenizerTraining):
        return _describe(info)
    folder = info.workdir / "tokenizer"
    tokenizer = _describe(checkpoint.inspect(folder)) if folder.is_dir() else f"its tokenizer is missing in {folder}"
    return f"{_describe(info)}\n\n{tokenizer}"


def parameter_counts(info: Info) -> dict[str, int]:
    """Parameters of each part of a checkpoint's network, such as {"encoder": ..., "quantizer": ...}."""
    try:
        stored = ocp.metadata(info.path, checkpointable_name="ema").metadata
    except Exception as error:  # of whatever kind Orbax, TensorStore and JSON raise on damaged files
        raise InputError(f"{info.path} is damaged ({type(error).__name__})") from error
    counts = Counter()
    for name, leaf in jax.tree_util.tree_leaves_with_path(stored):
        counts[parallel.path_name(name).split("/")[0]] += math.prod(leaf.shape)
    return dict(counts)


def _describe(info: Info) -> str:
    config, counts = info.config, parameter_counts(info)
    kind = "tokenizer" if isinstance(config, TokenizerTraining) else "transformer"
    steps = sorted(int(folder.name) for folder in (info.workdir / "checkpoints").iterdir() if folder.name.isdecimal())
    parts = [part for part in PARTS if (info.path / part).is_dir()]
    names = ", ".join(map(printable, info.class_names[:10])) + (", ..." if len(info.class_names) > 10 else "")
    lines = [
        f"{kind} {config.name!r} in {info.workdir}",
        f"step {info.step} of {config.train.steps}; checkpoints of steps {', '.join(map(str, steps))}",
        f"holds {', '.join(parts)}" + ("" if "opt_state" in parts else " (resumed training starts a new optimizer)"),
        f"{sum(counts.values()):,} parameters: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())),
        f"{len(info.class_names)} classes: {names}",
    ]
    if info.hooks:
        lines.append(f"its experiment replaced: {', '.join(map(printable, info.hooks))}")
    lines += [f"  {name} = {printable(value)}" for name, value in _settings(config)]
    return "\n".join(lines)


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its path, as the command line spells it."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, name + ".")
        else:
            yield name, " ".join(map(str, value)) if isinstance(value, tuple) else value
