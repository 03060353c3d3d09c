"""Starting from other weights: what fits is taken, what does not is made anew, and both are said."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.console import columns
from dar_jax.data.sources import describe
from dar_jax.training import checkpoint
from dar_jax.training.stages import Stage
from dar_jax.training.state import Params, TrainState, init_state, with_new_optimizer

# Tables whose rows keep their meaning when there are more or fewer of them: layers of a stack, and positions.
BY_ROW = re.compile(r"(^|/)(blocks/.*|query_table|position_table)$")
CLASS_TABLE = re.compile(r"(^|/)class_table$")


@dataclass(frozen=True)
class Start:
    """Weights to start from: what they are called, and a tree of arrays that every host has as a whole."""

    name: str
    params: Params


@dataclass(frozen=True)
class Row:
    """What became of one parameter: taken, taken in part, re-made or skipped."""

    fate: str
    name: str
    there: tuple[int, ...] | None
    here: tuple[int, ...] | None
    note: str = ""


UNREAD = Start("", {})  # stands for weights that a resumed run does not read again


def first_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    mesh: Mesh,
    before: checkpoint.Info | None,
    start: Start | None,
) -> tuple[TrainState, list[str]]:
    """The state that a run begins with, and lines that say what is remarkable about it.

    Args: before, the checkpoint to resume from; start, weights to start from where there is none.
    Raises InputError where the checkpoint is damaged or is of another run.
    """
    if before is None:
        state = init_state(stage.described.init_params, optimizer, mesh, stage.experiment.rules)
        return (state, []) if start is None else start_from(start, state)
    notes = checkpoint.require_same_run(before, stage.experiment, stage.class_names)
    state = checkpoint.restore(before.path, abstract)
    if state.opt_state is None:
        state = with_new_optimizer(state, optimizer, abstract)
        notes.append("the checkpoint holds no optimizer, a new one starts here")
    if start is not None:
        notes.append("the weights to start from are not read again")
    if before.step >= stage.experiment.config.train.steps:
        notes.append("nothing is left to do; to go on, raise train.steps")
    return state, notes


def opening(stage: Stage, params: Params, mesh: Mesh, found: int | None, resume: bool) -> str:
    """The first lines of a run: its size, its steps and its devices, and what it learns from."""
    config = stage.experiment.config
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    if found is not None:
        where = f"from step {found}"
    else:
        where = "from the beginning" + (" (no checkpoint to resume from)" if resume else "")
    first = f"{config.name}: {count:,} parameters, {config.train.steps} steps {where}, {mesh.size} devices ({sizes})"
    return f"{first}\n{describe(stage.source)}"


def start_from(start: Start, state: TrainState) -> tuple[TrainState, list[str]]:
    """A new run's state with the parameters that fit replaced by those of `start`, and a table of what was done, line by line.

    A parameter of the same name and shape is taken. Of stacks of blocks and tables of positions with another number of rows,
    the common first ones are taken. A class table for other classes is made anew but for its null class, the last row. What
    has another shape is made anew, what the model does not have is skipped. The moving average starts equal to the parameters.
    """
    theirs = {parallel.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(start.params)}
    rows = []

    def replace(path: tuple, mine: jax.Array) -> jax.Array:
        name = parallel.path_name(path)
        other = theirs.pop(name, None)
        value, row = _merge(name, mine, other)
        rows.append(row)
        return value

    params = jax.tree_util.tree_map_with_path(replace, state.params)
    rows += [Row("skipped", name, other.shape, None, "not in this model") for name, other in theirs.items()]
    ema = jax.tree.map(lambda new: new.copy(), params)
    return dataclasses.replace(state, params=params, ema=ema), table(start.name, rows)


def table(name: str, rows: Sequence[Row]) -> list[str]:
    """The rows for people: what was taken is summed up by part of the network, what is new or skipped is listed one by one."""
    taken: dict[tuple[str, str, str], list[int]] = {}
    lines = []
    for row in rows:
        if row.fate in ("taken", "in part"):
            taken.setdefault((row.fate, _part(row.name), row.note), []).append(math.prod(map(min, row.there, row.here)))
        else:
            lines.append((row.fate, row.name, _text(row.there), _text(row.here), row.note))
    summed = [
        (fate, f"{part} ({len(sizes)} tensor{'s' * (len(sizes) > 1)})", "", f"{sum(sizes):,} numbers", note)
        for (fate, part, note), sizes in sorted(taken.items(), key=lambda item: item[0][0], reverse=True)
    ]
    lines = [("what", "parameters", "there", "here", ""), *summed, *lines]
    return [f"start from {name}:", *(f"  {line}" for line in columns(lines).split("\n"))]


def _merge(name: str, mine: jax.Array, other: Any) -> tuple[jax.Array, Row]:
    if other is None:
        return mine, Row("re-made", name, None, mine.shape, "not in those weights")
    if other.shape == mine.shape:
        return parallel.put(np.asarray(other).astype(mine.dtype), mine.sharding), Row("taken", name, other.shape, mine.shape)
    shapes = (name, other.shape, mine.shape)
    if other.shape[1:] == mine.shape[1:]:
        if CLASS_TABLE.search(name):
            return _rows(mine, other, slice(-1, None)), Row("re-made", *shapes, "its null class was kept")
        if BY_ROW.search(name):
            count = min(len(other), len(mine))
            return _rows(mine, other, slice(0, count)), Row("in part", *shapes, f"the first {count} of {len(mine)}")
    return mine, Row("re-made", *shapes, "another shape")


def _rows(mine: jax.Array, other: Any, rows: slice) -> jax.Array:
    """`mine` with those rows of `other`, which have the same numbers counted from the start or from the end."""
    replaced = jax.jit(lambda a, b: a.at[rows].set(b), out_shardings=mine.sharding)
    return replaced(mine, np.asarray(other[rows]))


def _part(name: str) -> str:
    """The first names of a parameter, down to the stack of blocks it may be in."""
    head, blocks, _ = name.partition("blocks/")
    return head + "blocks" if blocks else name.split("/")[0]


def _text(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))
