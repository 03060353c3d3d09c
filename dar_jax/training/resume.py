"""A run that goes on from a checkpoint is the same run: what may differ in its settings, its replaced parts and its classes."""

import re
from collections.abc import Sequence

from dar_jax.config import TransformerTraining, flat
from dar_jax.errors import InputError, one_line
from dar_jax.experiment import Experiment
from dar_jax.training.checkpoint import Info

# Settings that have no influence on what is learnt (a tokenizer with other weights is refused elsewhere), and those of a model
# that have none on its parameters.
HARMLESS = re.compile(
    r"name|tokenizer|mesh\..*|sampling\..*|data\.(path|workers|verify|held_out_split)|"
    r"train\.(remat|log_every|\w*checkpoint\w*|keep_every|sample_every|evaluate_\w+|profile|peak_flops)"
)
TRAINING_ONLY = re.compile(r"model\.(\w+_dropout|init_std|gate_init)")
EFFECT = " (changes what is learnt from here on)"


def require_same_run(before: Info, experiment: Experiment, class_names: Sequence[str]) -> list[str]:
    """The differences between a checkpoint and the run that goes on from it, as lines for people.

    Raises InputError where the run is of another stage, model or (of a transformer) other classes.
    """
    if type(before.config) is not type(experiment.config):
        raise InputError(f"{before.path} is of a {before.config.name} run of the other stage; choose another folder")
    if "model" in before.hooks and "model" not in experiment.hooks:
        raise InputError(f"{before.path} is of an experiment with its own model, which this one lacks; choose another folder")
    theirs, ours = (flat(config) for config in (before.config, experiment.config))
    differing = {name: (one_line(theirs[name], 60), one_line(ours[name], 60)) for name in ours if theirs[name] != ours[name]}
    of_model = [name for name in differing if name.startswith("model.") and not TRAINING_ONLY.fullmatch(name)]
    if of_model:
        shown = ", ".join("{} {} there, {} here".format(name, *differing[name]) for name in of_model[:3])
        raise InputError(f"{before.path} is of another experiment, its model differs: {shown}; choose another folder")
    lines = [f"{name}: {old} -> {new}{'' if HARMLESS.fullmatch(name) else EFFECT}" for name, (old, new) in differing.items()]
    if before.hooks != experiment.hooks:
        replaced = (", ".join(hooks) or "nothing" for hooks in (before.hooks, experiment.hooks))
        lines.append("replaced by the experiment: " + " -> ".join(replaced) + EFFECT)
    if tuple(class_names) != before.class_names:
        difference = _difference(before.class_names, class_names)
        if isinstance(before.config, TransformerTraining):
            numbers = class_numbers(class_names, before.class_names)
            if numbers != list(range(len(before.class_names))):
                raise InputError(f"{before.path} was trained with other classes: {difference}; choose another folder")
        lines.append(f"names of classes: {difference}")
    return ["differs from the checkpoint: " + line for line in lines]


def class_numbers(names: Sequence[str], of_run: Sequence[str]) -> list[int]:
    """The number in a run of each class of a data set, by its name.

    Where a run's classes are but numbered, as of imported files, and no name is among the numbers, the order counts.

    Raises InputError for names that the run does not have, or has twice.
    """
    numbers, in_order = {name: number for number, name in enumerate(of_run)}, list(range(len(names)))
    if tuple(names) == tuple(of_run) or (list(of_run) == list(map(str, in_order)) and not numbers.keys() & {*names}):
        return in_order
    if unknown := [name for name in names if name not in numbers]:
        raise InputError(f"the data have classes that the run does not know: {_some(unknown)}; it knows {_some(of_run)}")
    if twice := [name for name in names if of_run.count(name) > 1 or names.count(name) > 1]:
        raise InputError(f"several classes have the same name: {_some(twice)}; which therefore does not identify them")
    return [numbers[name] for name in names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(one_line(name, 60) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    if len(before) != len(now):
        return f"{len(before)} there ({_some(before)}), {len(now)} here ({_some(now)})"
    return _some([f"{old} there, {new} here" for old, new in zip(before, now) if old != new])
