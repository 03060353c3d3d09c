"""The contents of a checkpoint as text for people."""

import math
import os
from collections import Counter

import jax

from dar_jax import parallel
from dar_jax.config import TokenizerTraining, flat
from dar_jax.console import printable
from dar_jax.training import checkpoint
from dar_jax.training.checkpoint import Info


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
    stored = checkpoint.stored_shapes(info.path, "ema")
    counts = Counter()
    for name, leaf in jax.tree_util.tree_leaves_with_path(stored):
        counts[parallel.path_name(name).split("/")[0]] += math.prod(leaf.shape)
    return dict(counts)


def _describe(info: Info) -> str:
    config, counts = info.config, parameter_counts(info)
    kind = "tokenizer" if isinstance(config, TokenizerTraining) else "transformer"
    parts, steps = checkpoint.parts_of(info), ", ".join(map(str, checkpoint.steps(info.workdir)))
    names = ", ".join(map(printable, info.class_names[:10])) + (", ..." if len(info.class_names) > 10 else "")
    lines = [
        f"{kind} {config.name!r} in {info.workdir}",
        f"step {info.step} of {config.train.steps}" + (f"; checkpoints of steps {steps}" if steps else ""),
        f"holds {', '.join(parts)}" + ("" if "opt_state" in parts else " (resumed training starts a new optimizer)"),
        f"{sum(counts.values()):,} parameters: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())),
        f"{len(info.class_names)} classes: {names}",
    ]
    if info.hooks:
        lines.append(f"its experiment replaced: {', '.join(map(printable, info.hooks))}")
    for name, value in flat(config).items():  # spelt as on the command line
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        lines.append(f"  {name.replace('_', '-')} = {printable(text)}")
    return "\n".join(lines)
