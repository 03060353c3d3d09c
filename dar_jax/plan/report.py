"""From a compiled program to figures and words: memory, traffic, time, cost, and where there is waste."""

import collections
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dar_jax.config import TrainConfig
from dar_jax.console import columns, number
from dar_jax.plan.chips import GIB, Chip
from dar_jax.plan.hlo import PASSES, Collective
from dar_jax.training.flops import Product

LANES, ROWS = 128, 8  # a TPU multiplies matrices in pieces of 128 columns and terms, and 8 rows
WORTH_A_NOTE = 0.03  # share of the work, below which waste is not mentioned


@dataclass(frozen=True)
class Plan:
    """What one step of training, or one batch of samples, takes on a topology. Bytes, operations and seconds.

    memory: on each chip by name, with "total" and "limit". model_flops: of the model's products on all chips, what training
    computes twice to save memory left out; flops: with it; compiled_flops: of all chips, as compiled; kernel_flops: of these,
    what the program lacks outside of hand-written kernels, which say nothing of their own. seconds: the least that matrix
    products, memory and interconnect need, and "step", the most of the three. Where the program does not fit, there are no
    compiled_flops, collectives, seconds and so on.
    """

    experiment: str
    sampling: bool
    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str
    fits: bool
    memory: dict[str, float]
    model_flops: float
    flops: float
    notes: list[str]
    compiled_flops: float | None = None
    kernel_flops: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    seconds: dict[str, float] | None = None
    mfu: float | None = None
    recipe: dict[str, float] | None = None
    tried: list[str] = field(default_factory=list)
    suggestion: str | None = None


def roofline(chip: Chip, flops: float, memory_bytes: float, sent_bytes: float) -> dict[str, float]:
    """The least seconds of one step on a chip that does nothing but multiply, move data in its memory, or send, and the most
    of the three as "step": a step takes so long if all of it goes on at once and at the full rate."""
    seconds = {
        "matrix": flops / chip.peak,
        "memory": memory_bytes / chip.memory_bandwidth,
        "interconnect": sent_bytes / chip.ici_bandwidth,
    }
    return {**seconds, "step": max(seconds.values())}


def recipe(train: TrainConfig, tokens: int, step_seconds: float, chips: int) -> dict[str, float]:
    """A whole training run: steps, images, tokens (of `tokens` an image), days, and hours of all chips together."""
    hours, images = train.steps * step_seconds / 3600, train.steps * train.batch_size
    return {"steps": train.steps, "images": images, "tokens": images * tokens, "days": hours / 24, "chip_hours": hours * chips}


def notes_on_products(products: Sequence[Product]) -> list[str]:
    """Waste in the model's products: float32 where bfloat16 would do, and sizes that do not fill the matrix unit."""
    notes = []
    total = sum(product.flops for product in products) or 1.0
    passes = sum(product.flops * _passes(product) for product in products) or 1.0
    float32 = collections.defaultdict(list)
    for product in products:
        if "float32" in product.dtypes:
            float32[product.precision].append(product)
    for precision, group in float32.items():
        share = sum(product.flops for product in group) / total
        time = sum(product.flops * _passes(product) for product in group) / passes
        if share >= WORTH_A_NOTE or time >= WORTH_A_NOTE:
            largest = max(group, key=lambda product: product.flops)
            cost = f"{PASSES[precision]} passes each, {time:.0%} of all passes" if PASSES[precision] > 1 else "one pass each"
            what = f"float32 products of {precision} precision: {share:.1%} of the operations ({cost})"
            notes.append(f"{what}, most of them in {largest.name}")
    padding = collections.Counter()
    for product in products:
        padding[product.sizes] += product.flops * (_padding(product.sizes) - 1)
    work = total + padding.total()
    if padding.total() >= WORTH_A_NOTE * work:
        ((sizes, most),) = padding.most_common(1)
        name = next(product.name for product in products if product.sizes == sizes)
        notes.append(
            f"padding: {padding.total() / work:.0%} of the matrix unit's work fills products up to {LANES}; {most / work:.0%} "
            f"those of {' x '.join(map(str, sizes))} (rows x columns x terms), as in {name}"
        )
    return notes


def notes_on_program(
    memory: Mapping[str, float], arguments: float, ratio: float, collectives: Sequence[Collective], parameters: float, fsdp: int
) -> list[str]:
    """Waste that only the compiled program shows.

    Args:
      memory: bytes of the arguments by name, as their shapes have it; arguments: as compiled, with tiles filled up.
      ratio: operations of all chips by those of the model.
      parameters: their number, of the whole model; fsdp: the number of parts that the mesh shards them into.
    """
    notes = []
    filled = arguments - sum(memory.values())
    if filled > max(WORTH_A_NOTE * arguments, 0.1 * GIB):
        notes.append(f"layout: {filled / GIB:.2f} GiB of each chip's memory only fill parameters up to tiles of 8 x 128")
    if ratio > 1 + WORTH_A_NOTE:
        notes.append(f"replicated work: the chips compute {ratio:.2f} times the operations of the model")
    by_kind = {row.kind: row for row in collectives}
    whole = 2 * parameters  # in bfloat16
    if (row := by_kind.get("all-gather")) and row.bytes_outside_loops > 0.5 * whole:
        notes.append(f"all-gathers outside of loops bring {row.bytes_outside_loops / GIB:.2f} GiB at once to every chip")
    if fsdp > 1 and (row := by_kind.get("all-reduce")) and row.bytes > whole:
        notes.append(
            f"all-reduce takes {row.bytes / GIB:.2f} GiB of traffic although fsdp = {fsdp} shards the parameters: gradients "
            "are summed unsharded, or weights gathered by sums. Compare a smaller --mesh.fsdp, which leaves wider parts"
        )
    return notes


def attempt(plan: Plan) -> str:
    """One line on one of the choices of a search."""
    what = f"batch {plan.batch_size}" + ("" if plan.sampling else f", remat {plan.remat}")
    if plan.seconds is None or not plan.fits:
        return f"{what}: {_gib(plan.memory['total'])}, does not fit"
    return f"{what}: {_gib(plan.memory['total'])}, at most {plan.batch_size / plan.seconds['step']:,.0f} images/s"


def suggestion(best: tuple[int, str] | None, given: tuple[int, str]) -> str:
    """The result of a search for batch size and remat that began with the given ones."""
    if best is None:
        return "nothing that was tried fits; take more chips, or shard the parameters over more of them (--mesh.fsdp)"
    if best == given:
        return "as given; neither a larger batch nor less remat that fits was found"
    remat = "" if best[1] == given[1] else f" --train.remat {best[1]}"
    return f"--train.batch-size {best[0]}{remat} fits"


def text(plan: Plan) -> str:
    """What `dar-jax plan` prints for one topology."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    work = f"sampling {plan.batch_size} images"
    if not plan.sampling:
        parts = f" in {plan.accumulate} parts" if plan.accumulate > 1 else ""
        work = f"training, batch {plan.batch_size}{parts}, remat {plan.remat}"
    memory = dict(plan.memory)
    total, limit = _gib(memory.pop("total")), _gib(memory.pop("limit"))
    again = plan.flops / plan.model_flops - 1
    sections = {
        "memory": [
            f"{'fits' if plan.fits else 'DOES NOT FIT'}: {total} of {limit} on each chip",
            ", ".join(f"{name} {_gib(size)}" for name, size in memory.items() if size),
        ],
        "operations": [number(plan.model_flops, "FLOP") + (f", and {again:.0%} of them again" if again > 1e-3 else "")],
    }
    if plan.seconds is not None:
        share = plan.compiled_flops / plan.flops
        kernels = f", {plan.kernel_flops / plan.flops:.1%} in kernels" if plan.kernel_flops else ""
        sections["operations"].append(f"compiled, all chips together: {share:.3f} of that{kernels}")
        calls = [f"{row.kind}: {row.count:,.0f} calls, each chip sends {_gib(row.bytes)}" for row in plan.collectives]
        parts = {name: f"{1e3 * value:.3g} ms" for name, value in plan.seconds.items()}
        step = parts.pop("step")
        sections["traffic"] = calls or ["none"]
        sections["time"] = [
            f"at least {step}: {', '.join(f'{name} {value}' for name, value in parts.items())}",
            f"MFU at most {plan.mfu:.0%}, at most {plan.batch_size / plan.seconds['step']:,.0f} images/s",
        ]
    if plan.recipe is not None:
        counts = [f"{plan.recipe['steps']:,} steps", *(number(plan.recipe[name], name) for name in ("images", "tokens"))]
        cost = f"at least {plan.recipe['days']:.3g} days, {plan.recipe['chip_hours']:,.0f} chip-hours"
        sections["recipe"] = [f"{', '.join(counts)}: {cost}"]
    sections |= {"notes": plan.notes, "tried": plan.tried, "suggestion": [plan.suggestion] if plan.suggestion else []}
    title = f"{plan.experiment} on {plan.topology}: {work}, {plan.chips} chips ({mesh})"
    rows = [(f"  {name}" if i == 0 else "", line) for name, lines in sections.items() for i, line in enumerate(lines) if line]
    return f"{title}\n{columns(rows)}"


def table(plans: Sequence[Plan]) -> str:
    """The plans as a table in Markdown, one row each."""
    rows = [_row(plan) for plan in plans]
    names = list(max(rows, key=len))
    cells = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return textwrap.dedent(columns([("", *row, "") for row in cells], separator=" | "))


def _row(plan: Plan) -> dict[str, str]:
    memory = f"{plan.memory['total'] / GIB:.1f} of {plan.memory['limit'] / GIB:.1f}" + ("" if plan.fits else ": does not fit")
    row = {
        "experiment": plan.experiment,
        "topology": plan.topology,
        "batch, remat": f"{plan.batch_size}" + ("" if plan.sampling else f", {plan.remat}"),
        "GiB on a chip": memory,
        "PFLOP a step": f"{plan.model_flops / 1e15:.3g}",
    }
    if plan.seconds is None:
        return row
    cost = f"{plan.batch_size / plan.seconds['step']:,.0f} images/s at most"
    if plan.recipe:
        cost = f"{plan.recipe['days']:.3g} days, {plan.recipe['chip_hours']:,.0f} chip-hours"
    seconds = [f"{1e3 * plan.seconds[name]:.0f}" for name in ("matrix", "memory", "interconnect")]
    return row | {
        "GiB sent by a chip": f"{sum(row.bytes for row in plan.collectives) / GIB:.2f}",
        "ms of products, memory, interconnect": ", ".join(seconds),
        "MFU at most": f"{plan.mfu:.0%}",
        "at least": cost,
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= 0.1 * GIB else f"{size / 2**20:.2f} MiB"


def _passes(product: Product) -> int:
    return PASSES[product.precision] if "float32" in product.dtypes else 1


def _padding(sizes: tuple[int, int, int]) -> float:
    """The matrix unit's work on a padded product, divided by that of the product itself; either side may be the rows."""

    def up(size: int, to: int) -> int:
        return math.ceil(size / to) * to

    rows, columns, terms = sizes
    sides = min(up(rows, LANES) * up(columns, ROWS), up(rows, ROWS) * up(columns, LANES))
    return sides * up(terms, LANES) / (rows * columns * terms)
