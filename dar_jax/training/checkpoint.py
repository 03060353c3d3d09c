"""Checkpoints: WORKDIR/checkpoints/STEP, written by Orbax in the background, complete or not at all.

A checkpoint has the parts `params`, `ema` and `opt_state` (perhaps only `ema` if it was imported or made for inference), and
beside them, as JSON, the run's settings, its class names, and which parts of the method the experiment had replaced (hooks). So
a checkpoint alone can be sampled from, and reading the weights needs no optimizer. Checksums of all files: see `integrity`.

Wherever a checkpoint is read, its place may also be a name on the Hugging Face Hub (`weights.hub`), or a folder of
`dar-jax export --format safetensors` (`exported`), which holds `ema` only.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import path as ocp_path
from orbax.checkpoint import v1 as ocp

from dar_jax import parallel
from dar_jax.config import TokenizerTraining, TrainConfig, TransformerTraining, from_dict, to_dict
from dar_jax.errors import InputError, one_line, require
from dar_jax.experiment import Experiment
from dar_jax.files import ON_HUB, check_writable, is_remote
from dar_jax.parallel import hosts
from dar_jax.training import exported
from dar_jax.training.integrity import CHECKSUMS, checksum_of, read_json, reading, require_intact, write_checksums
from dar_jax.training.state import Params, TrainState
from dar_jax.weights import hub

PathLike = str | os.PathLike
TRAINING_HOOKS = ("loss", "features", "frozen", "optimizer", "source")  # replaced parts that using a checkpoint does not need
FORMAT = 1  # of what is written beside the arrays; 0, which has no number, lists sizes without checksums
METADATA = "_CHECKPOINT_METADATA"  # Orbax's name of the file with `_about`
MOST_STEPS = 2**31 - 1


@dataclass(frozen=True)
class Info:
    """A checkpoint's settings and the like. No arrays are read."""

    path: epath.Path  # of this step
    workdir: epath.Path
    step: int
    config: TokenizerTraining | TransformerTraining
    class_names: tuple[str, ...]
    hooks: tuple[str, ...]

    @property
    def is_tokenizer(self) -> bool:
        return isinstance(self.config, TokenizerTraining)

    @functools.cached_property
    def tokenizer(self) -> "Info":
        """The tokenizer's checkpoint: this one, or that in a transformer's sub-folder. Raises InputError where it lacks one."""
        if self.is_tokenizer:
            return self
        folder = self.workdir / "tokenizer"
        if not folder.is_dir():
            raise InputError(f"{self.workdir} lacks its tokenizer; put one there with: dar-jax import FILE --workdir {folder}")
        return inspect(folder)


@dataclass(frozen=True)
class Loaded:
    """A checkpoint with its weights; `experiment` has its settings, `experiment.build_model` makes the model."""

    info: Info
    params: Params
    experiment: Experiment


def absolute(path: PathLike) -> epath.Path:
    """The path from the root, as Orbax wants it; a bucket's (`gs://...`) is so already. InputError without gcsfs for it, and
    for the Hub (`hf://...`), where only existing checkpoints can be named."""
    path = os.fspath(path)
    if path.startswith(ON_HUB):
        check_writable(path)
    if path.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise InputError(f'{path} is in a bucket; that needs: pip install "dar_jax[gcs]"')
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def require_shared(workdir: PathLike) -> None:
    """Raises InputError where the hosts do not see the same folder, so that each would keep its parts for itself."""
    if not hosts.many():
        return
    folder = absolute(workdir)
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f"hosts-{hosts.broadcast_from_first(secrets.randbelow(2**31))}"
    if hosts.first():
        marker.write_text("")
    hosts.wait("the marker is written")
    try:
        if not hosts.all_agree(marker.exists()):
            raise InputError(f"{folder} is not the same folder on all hosts; give one that they share, or gs://BUCKET/FOLDER")
    finally:
        if hosts.first():
            marker.unlink()


def open_checkpoints(workdir: PathLike, train: TrainConfig) -> ocp.training.Checkpointer:
    """The checkpoints of a run, to be closed by the caller (a context manager). Leftovers of interrupted writes are deleted."""
    policies = ocp.training.preservation_policies
    keep = [policies.LatestN(train.keep_checkpoints)]
    if train.keep_every is not None:
        keep.append(policies.EveryNSteps(train.keep_every))
    return _checkpointer(workdir, policies.AnyPreservationPolicy(keep))


def save(
    checkpointer: ocp.training.Checkpointer,
    state: TrainState,
    experiment: Experiment,
    class_names: Sequence[str],
    after: Any = None,
) -> Any:
    """Starts to write a checkpoint; returns as soon as the state may be donated to the next step.

    Args: after, what the last call returned: that checkpoint is written first.
    Returns an object whose `result()` waits until it is written, raises what went wrong, and ends the thread of the writing.
    """
    if after:
        after.result()
    parts = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    about = _about(experiment.config, class_names, experiment.hooks)
    return checkpointer.save_checkpointables_async(int(state.step), parts, custom_metadata=about, force=True)


def export(info: Info, folder: epath.Path) -> int:
    """Writes the moving average of a checkpoint as an `exported` folder. Returns the number of its tensors.

    Where the settings name files of this machine, they are left out.
    """
    about = _about(without_paths(info.config), info.class_names, info.hooks, step=info.step)
    return exported.write(folder, jax.device_get(load_part(info, "ema")), about)


def save_for_inference(
    workdir: PathLike,
    config: TokenizerTraining | TransformerTraining,
    params: Params,
    step: int,
    class_names: Sequence[str],
    hooks: Sequence[str] = (),
    others: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that holds weights only, replacing one of the same step.

    Args: params, written as `ema`, from which everything but training works; others, further parts by name.
    Raises InputError if WORKDIR cannot be written to.
    """
    with _checkpointer(workdir) as checkpointer:
        about = _about(config, class_names, hooks)
        parts = {"ema": params, **(others or {})}
        checkpointer.save_checkpointables(step, parts, custom_metadata=about, force=True, overwrite=True)


def steps(workdir: PathLike) -> list[int]:
    """The steps of the complete checkpoints in WORKDIR, in order. Only names are read, and what says that one is whole."""
    folder = absolute(workdir) / "checkpoints"
    if not folder.is_dir():
        return []
    with reading(folder):
        paths = {_step(path): path for path in folder.iterdir() if path.name.isdigit()}
        return sorted(step for step, path in paths.items() if ocp_path.step.is_path_finalized(path))


def latest_step(workdir: PathLike) -> int | None:
    """The step of the newest complete checkpoint in WORKDIR, None if there is none."""
    return max(steps(workdir), default=None)


def inspect(path: PathLike) -> Info:
    """The settings and the like of a checkpoint. `path`: a WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP, or an
    exported folder; perhaps by a name on the Hub, hf://...

    Raises InputError where there is no checkpoint, it is damaged or written by a newer version, or its settings are unfit.
    """
    folder = path = absolute(hub.local(path))
    if not path.is_dir():
        raise InputError(f"{path} does not exist or is no folder; give a run's folder or one of its checkpoints/STEP")
    if is_exported := exported.is_exported(path) and not (path / "checkpoints").is_dir():  # else a run was begun in it
        require(not is_remote(path), f"{path} is in a bucket, where exported folders are not read; copy it to a disk")
        workdir, step = path, None
    elif path.name.isdigit() and path.parent.name == "checkpoints" and not (path / "checkpoints").is_dir():
        workdir, step = path.parent.parent, _step(path)
    else:
        workdir, step = path, latest_step(path)
        folder = path / "checkpoints" / str(step)
    for each in (path, folder):
        require(
            is_remote(each) or not each.exists() or os.access(each, os.R_OK | os.X_OK), f"{each} cannot be read: no permission"
        )
    if not is_exported and not any((folder / name).exists() for name in (METADATA, CHECKSUMS)):
        raise InputError(f"{path} holds no checkpoint")
    with reading(folder):
        about = read_json(folder / exported.DESCRIPTION) if is_exported else read_json(folder / METADATA)["custom_metadata"]
        checksum, number = about.pop("crc32", None), about.get("format", 0)
        if checksum not in (None, checksum_of(about)):  # format 0 has none
            raise ValueError(f"{exported.DESCRIPTION if is_exported else METADATA} is not what was written")
        if is_exported and (type(step := about["step"]) is not int or not 0 <= step <= MOST_STEPS):
            raise ValueError(f"its step is {step!r}")
        if type(number) is not int or number < 0:
            raise ValueError(f"its format is {number!r}")
        if number > FORMAT:
            raise InputError(
                f"{folder} was written by a newer dar_jax (format {number}, this one knows {FORMAT}); update dar_jax"
            )
        class_names, hooks = (_strings(about, name) for name in ("class_names", "hooks"))
        try:
            config = from_dict(about["config"])
        except InputError as error:
            raise InputError(f"{folder} is of another version: {one_line(error)}") from error
    require_intact(folder, "ema")
    if isinstance(config, TransformerTraining) and len(class_names) != config.model.num_classes:
        raise InputError(
            f"{folder} names {len(class_names)} classes, but its model.num_classes is {config.model.num_classes}; they "
            "should be as many"
        )
    return Info(folder, workdir, step, config, class_names, hooks)


def restore(path: PathLike, state: TrainState) -> TrainState:
    """Reads a complete training state.

    Args:
      path: a WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP.
      state: `abstract_state` of this run; the arrays are read into its shardings, whatever mesh they were written from.

    Where the checkpoint holds weights only (it was imported, or made for inference), `opt_state` is None, and the parameters
    are the moving average if it holds nothing else.

    Raises InputError where there is no checkpoint, it is damaged, or is of another experiment, in which case the first
    differing names are given.
    """
    info = inspect(path)
    parts = {name: getattr(state, name) for name in ("params", "ema", "opt_state") if (info.path / name).is_dir()}
    for name, tree in parts.items():
        require_intact(info.path, name)
        if differing := _differing(stored_shapes(info.path, name), tree):
            raise InputError(f"{info.path} is of another experiment, its {name} differ: {differing}; choose another folder")
    with reading(info.path):
        parts = ocp.load_checkpointables(info.path, parts)
    params = parts["params"] if "params" in parts else jax.tree.map(jnp.copy, parts["ema"])
    return TrainState(parallel.put(np.int32(info.step), state.step.sharding), params, parts["ema"], parts.get("opt_state"))


def load(
    path: PathLike, experiment: Experiment | None = None, weights: Literal["ema", "params"] = "ema", mesh: Mesh | None = None
) -> Loaded:
    """Reads weights for inference, and nothing else.

    Args:
      path: a WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP.
      experiment: needed if the run had replaced its model, condition or parts of sampling; its own settings are not used.
      mesh: where the weights go, sharded by `parallel.RULES`; None: the first device.

    Raises InputError where there is no checkpoint, it is damaged, lacks these weights, or needs its experiment.
    """
    info = inspect(path)
    known = (*TRAINING_HOOKS, *(experiment.hooks if experiment else ()))
    known = {hook.removeprefix("method.") for hook in known}  # there were checkpoints that wrote "guidance"
    if missing := [hook for hook in info.hooks if hook.removeprefix("method.") not in known]:
        raise InputError(f"{info.path} was trained with its own {' and '.join(missing)}; pass --experiment FILE")
    experiment = (experiment or Experiment(info.config)).with_config(info.config)
    if weights not in parts_of(info):
        raise InputError(f"{info.path} was made for inference and holds no {weights}, only ema")
    try:
        expected = jax.eval_shape(lambda: experiment.init_params(experiment.build_model()))
    except Exception as error:  # whatever a model raises whose sizes do not fit together
        raise InputError(f"the settings in {info.path} describe no model: {one_line(error)}") from error
    if differing := _differing(stored_shapes(info.path, weights), expected):
        raise InputError(f"the settings in {info.path} are not those of its weights: {differing}")
    return Loaded(info, load_part(info, weights, mesh, experiment.rules), experiment)


def parts_of(info: Info) -> tuple[str, ...]:
    """Which of the parts of a training state a checkpoint holds."""
    if exported.is_exported(info.path):
        return ("ema",)
    return tuple(part for part in ("params", "ema", "opt_state") if (info.path / part).is_dir())


def load_part(info: Info, part: str, mesh: Mesh | None = None, rules: parallel.Rules = ()) -> Any:
    """Reads one part of a checkpoint, onto the mesh or the first device. Raises InputError where it is missing or damaged."""
    require_intact(info.path, part)
    shapes = stored_shapes(info.path, part)
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), shapes)
    else:
        shardings = parallel.shardings(shapes, mesh, rules)
    with reading(info.path):
        if exported.is_exported(info.path):
            return exported.read(info.path, shardings)
        return ocp.load_checkpointables(info.path, {part: parallel.placed(shapes, shardings)})[part]


def stored_shapes(path: epath.Path, part: str) -> Any:
    """A part of a checkpoint as a tree of ShapeDtypeStructs. No array is read."""
    with reading(path):
        if exported.is_exported(path):
            return exported.shapes(path)
        metadata = ocp.metadata(path, checkpointable_name=part).metadata
        if metadata is None:  # Orbax only logs what it could not open
            raise OSError(f"{part} could not be opened")
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata)


def _about(
    config: TokenizerTraining | TransformerTraining, class_names: Sequence[str], hooks: Sequence[str], **more: Any
) -> dict[str, Any]:
    about = {"format": FORMAT, "config": to_dict(config), "class_names": list(class_names), "hooks": list(hooks), **more}
    return about | {"crc32": checksum_of(about)}  # Orbax writes its file whenever it likes, with times of its own


def without_paths(config: TokenizerTraining | TransformerTraining) -> TokenizerTraining | TransformerTraining:
    """The settings without the names of files and folders, but for those on the Hub."""

    def kept(part: Any, *names: str) -> Any:
        values = {name: getattr(part, name) for name in names}
        return dataclasses.replace(part, **{name: v if v and v.startswith(ON_HUB) else None for name, v in values.items()})

    config = dataclasses.replace(config, data=kept(config.data, "path", "labels"))
    if isinstance(config, TransformerTraining):
        return kept(config, "tokenizer")
    return dataclasses.replace(config, loss=kept(config.loss, "lpips_weights", "dinov2_weights"))


def _checkpointer(workdir: PathLike, preserve: Any = None) -> ocp.training.Checkpointer:
    folder = absolute(workdir) / "checkpoints"
    check_writable(folder)
    context = ocp.Context()
    context.async_options.post_finalization_callback = lambda: _finish(folder)
    context.memory_options.deepcopy_host_arrays = False  # nobody changes them while they are written
    # Smaller arrays are written by one replica: to slice them compiles one program for each shape and place.
    context.array_options.saving.min_slice_bytes_for_replica_parallel = 1 << 20
    return ocp.training.Checkpointer(folder, context=context, preservation_policy=preserve, cleanup_tmp_directories=True)


def _finish(folder: epath.Path) -> None:
    """Adds the checksums to the checkpoint at hand, which does not count as finished yet."""
    for path in folder.iterdir() if hosts.first() else ():
        if path.is_dir() and not ocp_path.step.is_path_finalized(path) and not (path / CHECKSUMS).exists():
            write_checksums(path)


def _strings(about: dict[str, Any], name: str) -> tuple[str, ...]:
    if not isinstance(about[name], list) or not all(isinstance(value, str) for value in about[name]):
        raise ValueError(f"its {name} are no list of texts")
    return tuple(about[name])


def _step(folder: epath.Path) -> int:
    """The step in the name of a checkpoint's folder. Raises InputError where it is none."""
    name = folder.name
    if not re.fullmatch("0|[1-9][0-9]{0,9}", name) or int(name) > MOST_STEPS:
        raise InputError(f"{folder} is named by no step, a number up to {MOST_STEPS}; move it elsewhere")
    return int(name)


def _differing(stored: Any, expected: Any) -> str:
    """The first names of parameters whose shapes differ, as text; empty where none do."""
    there, here = (
        {parallel.path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (stored, expected)
    )
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    shown = ", ".join(f"{name} {there.get(name, 'missing')} there, {here.get(name, 'missing')} here" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
