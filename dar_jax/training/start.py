"""Starting from other weights: what fits is loaded, what does not is newly initialised and listed."""

import dataclasses
import re
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
from dar_jax.training.resume import require_same_run
from dar_jax.training.stages import Stage
from dar_jax.training.state import Params, TrainState, init_state, with_new_optimizer

# Tables whose rows keep their meaning when there are more or fewer of them: layers of a stack, and positions.
BY_ROW = re.compile(r"(^|/)(blocks/.*|query_table|position_table)$")
CLASS_TABLE = re.compile(r"(^|/)class_table$")


@dataclass(frozen=True)
class Start:
    """Weights to start from: their name, and a tree of arrays that every host has in full."""

    name: str
    params: Params


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
        state = init_state(stage.init_params, optimizer, mesh, stage.experiment.rules)
        return (state, []) if start is None else start_from(start, state)
    notes = require_same_run(before, stage.experiment, stage.class_names)
    state = checkpoint.restore(before.path, abstract)
    if state.opt_state is None:
        state = with_new_optimizer(state, optimizer, abstract)
        notes.append("the checkpoint holds no optimizer, a new one starts here")
    if before.step >= stage.experiment.config.train.steps:
        notes.append("nothing is left to do; to go on, raise train.steps")
    return state, notes


def opening(stage: Stage, params: Params, mesh: Mesh, step: int | None, resume: bool) -> str:
    """The first lines of a run: its size, steps, devices and data. `step`: of the checkpoint it resumes from."""
    config = stage.experiment.config
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    missing = " (no checkpoint to resume from)" if resume else ""
    where = f"from the beginning{missing}" if step is None else f"from step {step}"
    first = f"{config.name}: {count:,} parameters, {config.train.steps} steps {where}, {mesh.size} devices ({sizes})"
    return f"{first}\n{describe(stage.source)}"


def start_from(start: Start, state: TrainState) -> tuple[TrainState, list[str]]:
    """A new run's state with the parameters that fit replaced by those of `start`, and lines that say which do not.

    A parameter of the same name and shape is loaded. If stacks of blocks and tables of positions have another number of rows,
    their first rows are loaded. A class table for other classes is newly initialised but for its null class, the last row. So
    is a parameter of another shape; one that the model does not have is skipped. The moving average starts equal to the
    parameters.
    """
    theirs = {parallel.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(start.params)}
    total, rows = len(theirs), []  # (how it was initialised, name, shape there, shape here, note)

    def merge(path: tuple, mine: jax.Array) -> jax.Array:
        name = parallel.path_name(path)
        other = theirs.pop(name, None)
        if other is not None and other.shape == mine.shape:
            return parallel.put(np.asarray(other).astype(mine.dtype), mine.sharding)
        value, outcome, note = _partly(name, mine, other)
        rows.append((outcome, name, "-" if other is None else _text(other.shape), _text(mine.shape), note))
        return value

    params = jax.tree_util.tree_map_with_path(merge, state.params)
    equal = len(jax.tree.leaves(params)) - len(rows)
    rows += [("skipped", name, _text(other.shape), "-", "not in this model") for name, other in theirs.items()]
    ema = jax.tree.map(lambda new: new.copy(), params)
    heading = f"start from {start.name}: {equal} of its {total} tensors loaded in full" + (", the others:" if rows else "")
    lines = [heading, *(f"  {line}" for line in columns(rows).splitlines())]
    return dataclasses.replace(state, params=params, ema=ema), lines


def _partly(name: str, mine: jax.Array, other: Any) -> tuple[jax.Array, str, str]:
    """The value of a parameter whose shape differs, how it was initialised, and a note."""
    if other is None:
        return mine, "new", "not in those weights"
    if other.shape[1:] == mine.shape[1:]:
        if CLASS_TABLE.search(name):
            return _rows(mine, other, slice(-1, None)), "new", "its null class was loaded"
        if BY_ROW.search(name):
            count = min(len(other), len(mine))
            return _rows(mine, other, slice(0, count)), "partly loaded", f"the first {count} of {len(mine)}"
    return mine, "new", "another shape"


def _rows(mine: jax.Array, other: Any, rows: slice) -> jax.Array:
    """`mine` with those rows of `other`, which have the same numbers counted from the start or from the end."""
    replaced = jax.jit(lambda a, b: a.at[rows].set(b), out_shardings=mine.sharding)
    return replaced(mine, np.asarray(other[rows]))


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
