"""The model card of an exported checkpoint: README.md as the Hugging Face Hub shows it."""

import json
import math
from collections.abc import Iterator
from typing import Any

from dar_jax.config import flat
from dar_jax.console import number, printable
from dar_jax.errors import one_line
from dar_jax.inference.info import parameter_counts
from dar_jax.training import checkpoint
from dar_jax.training.checkpoint import Info
from dar_jax.training.logs import read_records

SHOWN_CLASSES = 20
MOST_REPORT = 1 << 20  # bytes of a report that are read


def model_card(info: Info, licence: str | None) -> str:
    """The card of a checkpoint: sizes, data, how to load it, measured figures as far as the run's folder has them, settings.

    Args:
      info: of the run; a transformer's tokenizer is described too, where it has one.
      licence: of the weights, by the Hub's name, such as mit; None: the card says that none was named.
    """
    config, kind = info.config, "tokenizer" if info.is_tokenizer else "transformer"
    has_tokenizer = not info.is_tokenizer and (info.workdir / "tokenizer").is_dir()
    header = ["---", *([f"license: {licence}"] if licence else []), "library_name: dar_jax"]
    header += ["tags:", "- d-ar", "- jax", "- image-tokenizer" if info.is_tokenizer else "- image-generation", "---"]
    data = config.data
    what = f"{data.source} {data.dataset or ''}".strip() + f", {data.split}"
    pixels = f"{data.image_size} x {data.image_size} pixels, {data.channels} channel{'s' if data.channels > 1 else ''}"
    names = ", ".join(printable(one_line(name, 60)) for name in info.class_names[:SHOWN_CLASSES])
    more = f" and {len(info.class_names) - SHOWN_CLASSES:,} more" if len(info.class_names) > SHOWN_CLASSES else ""
    lines = [
        *header,
        "",
        f"# {_cell(config.name)}",
        "",
        f"The {kind} of a D-AR model, Diffusion via Autoregressive Models ([arXiv](https://arxiv.org/abs/2505.23660)), "
        f"as dar_jax trains it: the moving average of its weights after step {info.step:,} of {config.train.steps:,}, float32.",
        "",
        "## Sizes",
        "",
        "| part | parameters |",
        "|---|---|",
        *_sizes(info),
        *(_sizes(info.tokenizer, "tokenizer: ") if has_tokenizer else ()),
        "",
        "## Data",
        "",
        f"{_cell(what)}: {pixels}; {len(info.class_names):,} classes. In their order:",
        "",
        *_block(names + more),
        "",
        "## Use",
        "",
        'In a clone of dar_jax, after `pip install ".[hub]"`; OWNER/NAME is this repository, a folder on a disk does as well.',
        "",
        "```python",
        "import dar_jax",
        "",
        'model = dar_jax.load("hf://OWNER/NAME")',
        "codes = model.encode(images)  # uint8 [N, H, W, C] -> int32 [N, T]"
        if info.is_tokenizer
        else "images = model.sample(labels=[0], seeds=[1, 2, 3])  # uint8 [3, H, W, C]",
        "```",
        "",
    ]
    if needed := [hook for hook in info.hooks if hook not in checkpoint.TRAINING_HOOKS]:
        lines += [f"The run replaced its {_cell(', '.join(needed))}: loading needs its experiment file, `experiment=FILE`.", ""]
    if not info.is_tokenizer and not has_tokenizer:
        lines += ["Its tokenizer is not here; it belongs into the folder `tokenizer`.", ""]
    of_weights = f"The weights are under {licence}" if licence else "None was named for the weights"
    lines += ["## Measured", "", *_measured(info), ""]
    lines += ["## Licence", "", f"{of_weights}; the code of dar_jax is under the MIT licence.", ""]
    settings = flat(checkpoint.without_paths(config)).items()
    lines += ["## Settings", "", *_block("\n".join(f"{name.replace('_', '-')} = {_plain(value)}" for name, value in settings))]
    return "\n".join(lines) + "\n"


def _sizes(info: Info, prefix: str = "") -> Iterator[str]:
    counts = parameter_counts(info)
    for name, count in sorted(counts.items()):
        yield f"| {prefix}{_cell(name)} | {count:,} |"
    yield f"| {prefix}in all | {sum(counts.values()):,} |"


def _measured(info: Info) -> list[str]:
    """A table of the last figures in the run's log up to its step, and of a quickstart's report."""
    figures: dict[str, tuple[float, str]] = {}
    for record in read_records(info.workdir):
        if record["step"] <= info.step:
            for name, value in record.items():
                if (name == "loss" or name.startswith("eval_")) and _is_figure(value):
                    figures[name] = value, f"{record['step']:,}"
    for name, value in _report(info).items():
        if _is_figure(value) and not name.startswith("seconds"):
            figures[name] = value, "report.json"
    if not figures:
        return ["The run's folder has no figures."]
    rows = [f"| {_cell(name)} | {value:.5g} | {where} |" for name, (value, where) in figures.items()]
    count = info.config.train.evaluate_images
    note = f"`eval_` figures are of {number(count)} images, during training: compare them within this run only."
    return ["| figure | value | step |", "|---|---|---|", *rows, *(["", note] if any("eval_" in row for row in rows) else [])]


def _report(info: Info) -> dict[str, Any]:
    path = info.workdir / "report.json"
    try:
        with path.open("rb") as file:
            report = json.loads(file.read(MOST_REPORT))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> str:
    return one_line(printable(" ".join(map(str, value)) if isinstance(value, tuple) else value), 500)


def _cell(text: Any) -> str:
    """Text in a paragraph or a table, where it is nothing but text."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#&" else letter for letter in _plain(text))


def _block(text: str) -> list[str]:
    """Lines of a block that Markdown shows as they are."""
    return [f"    {line}" for line in text.splitlines()]
