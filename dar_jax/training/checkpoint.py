"""Checkpoints: WORKDIR/checkpoints/STEP, written by Orbax in the background and whole or not at all.

A checkpoint has the parts `params`, `ema` and `opt_state` (perhaps only `ema` if it was imported or made for inference), and
beside them, as JSON, what it is: the run's settings, its class names, and which parts of the method the experiment had replaced
(hooks). So a checkpoint alone can be sampled from, and reading the weights needs no optimizer. `files.json` lists the sizes of
the parts' files, which tells a checkpoint that was copied in part, or cut short by a full disk, before anything is read.
"""

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dar_jax import hosts, parallel
from dar_jax.config import TokenizerTraining, TrainConfig, TransformerTraining, from_dict, to_dict
from dar_jax.errors import InputError
from dar_jax.files import is_remote, size_of
from dar_jax.training.experiment import Experiment
from dar_jax.training.state import Params, TrainState

PathLike = str | os.PathLike
INFERENCE_HOOKS = ("model", "guidance")  # replaced parts without which a checkpoint cannot be used


@dataclass(frozen=True)
class Info:
    """What a checkpoint says about itself; no arrays are read."""

    path: epath.Path  # of this step
    workdir: epath.Path
    step: int
    config: TokenizerTraining | TransformerTraining
    class_names: tuple[str, ...]
    hooks: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's weights with all that is needed to use them."""

    config: TokenizerTraining | TransformerTraining
    params: Params
    step: int
    class_names: tuple[str, ...]
    hooks: tuple[str, ...]
    workdir: epath.Path
    experiment: Experiment  # with this checkpoint's settings; its `build_model` makes the model


def absolute(path: PathLike) -> epath.Path:
    """The path from the root, as Orbax wants it; a bucket's (`gs://...`) is so already. InputError without gcsfs for it."""
    path = os.fspath(path)
    if path.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise InputError(f'{path} is in a bucket; that needs: pip install "dar_jax[gcs]"')
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def writable_folder(path: PathLike) -> epath.Path:
    """Creates the folder where needed. Raises InputError if files cannot be written to it."""
    folder = absolute(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not is_remote(folder):  # a bucket says so when the first file is written
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


def require_shared(workdir: PathLike) -> None:
    """Raises InputError where several hosts do not see the same folder, and would leave their parts here and there."""
    if not hosts.many():
        return
    folder = writable_folder(workdir)
    marker = folder / f"hosts-{hosts.of_first(secrets.randbelow(2**31))}"
    if hosts.first():
        marker.write_text("")
    hosts.wait("the marker is written")
    try:
        if not hosts.everywhere(marker.exists()):
            raise InputError(f"{folder} is not the same folder on all hosts; give one that they share, or gs://BUCKET/FOLDER")
    finally:
        if hosts.first():
            marker.unlink()


def open_checkpoints(workdir: PathLike, train: TrainConfig) -> ocp.training.Checkpointer:
    """The checkpoints of a run, to be closed by the caller (a context manager). Remains of interrupted writing are removed."""
    policies = ocp.training.preservation_policies
    keep = [policies.LatestN(train.keep_checkpoints)]
    if train.keep_every is not None:
        keep.append(policies.EveryNSteps(train.keep_every))
    return _checkpointer(workdir, policies.AnyPreservationPolicy(keep))


def save(
    checkpointer: ocp.training.Checkpointer, state: TrainState, experiment: Experiment, class_names: Sequence[str]
) -> None:
    """Starts to write a checkpoint; returns as soon as the state may be donated to the next step."""
    parts = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    about = _about(experiment.config, class_names, experiment.hooks)
    checkpointer.save_checkpointables_async(int(state.step), parts, custom_metadata=about, force=True)


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


def latest_step(workdir: PathLike) -> int | None:
    """The step of the newest complete checkpoint in WORKDIR, None if there is none. Half-written ones have other names."""
    folder = absolute(workdir) / "checkpoints"
    if not folder.is_dir():
        return None
    with _reading(folder):
        steps = ocp.path.step.standard_name_format().find_all(folder)
        return max((found.step for found in steps), default=None)


def inspect(path: PathLike) -> Info:
    """What a checkpoint is. `path`: a WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP.

    Raises InputError where there is no checkpoint or it is damaged.
    """
    folder = absolute(path)
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist or is no folder; give a run's folder or one of its checkpoints/STEP")
    if folder.name.isdigit() and folder.parent.name == "checkpoints":
        workdir, step = folder.parent.parent, int(folder.name)
    else:
        workdir, step = folder, latest_step(folder)
        if step is None:
            raise InputError(f"{folder} holds no checkpoint")
        folder = folder / "checkpoints" / str(step)
    _require_whole(folder, "ema")
    with _reading(folder):
        about = ocp.metadata(folder, checkpointable_name="ema").custom_metadata
        settings, class_names, hooks = about["config"], tuple(about["class_names"]), tuple(about["hooks"])
    try:
        return Info(folder, workdir, step, from_dict(settings), class_names, hooks)
    except InputError as error:
        raise InputError(f"{folder} is of another version: {error}") from error


def restore(path: PathLike, state: TrainState) -> TrainState:
    """Reads a whole training state.

    Args:
      path: a WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP.
      state: `abstract_state` of this run; the arrays are read into its shardings, whatever mesh they were written from.

    Where the checkpoint holds weights only (it was imported, or made for inference), `opt_state` is None, and the parameters
    are the moving average if it holds nothing else.

    Raises InputError where there is no checkpoint, it is damaged, or is of another experiment, in which case the first
    differing names are given.
    """
    info = inspect(path)
    wanted = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    stored = {name: tree for name, tree in wanted.items() if (info.path / name).is_dir()}
    for part, tree in stored.items():
        _require_whole(info.path, part)
        _require_same(info.path, part, tree)
    if "params" not in stored:
        _require_same(info.path, "ema", state.params)
    with _reading(info.path):
        parts = {name: ocp.load_checkpointables(info.path, {name: tree})[name] for name, tree in stored.items()}
    params = parts["params"] if "params" in parts else jax.tree.map(jnp.copy, parts["ema"])
    step = parallel.put(np.int32(info.step), state.step.sharding)
    return TrainState(step, params, parts["ema"], parts.get("opt_state"))


def load(
    path: PathLike, experiment: Experiment | None = None, weights: Literal["ema", "params"] = "ema", mesh: Mesh | None = None
) -> Loaded:
    """Reads weights for inference, and nothing else.

    Args:
      path: a WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP.
      experiment: needed if the run had replaced its model or its guidance; its own settings are not used.
      mesh: where the weights go, cut by `parallel.RULES`; None: the first device.

    Raises InputError where there is no checkpoint, it is damaged, lacks these weights, or needs its experiment.
    """
    info = inspect(path)
    given = () if experiment is None else experiment.hooks
    if missing := [hook for hook in INFERENCE_HOOKS if hook in info.hooks and hook not in given]:
        raise InputError(f"{info.path} was trained with its own {' and '.join(missing)}; pass --experiment FILE")
    experiment = (experiment or Experiment(info.config)).with_config(info.config)
    if not (info.path / weights).is_dir():
        raise InputError(f"{info.path} was made for inference and holds no {weights}, only ema")
    params = load_part(info, weights, mesh, experiment.rules)
    return Loaded(info.config, params, info.step, info.class_names, info.hooks, info.workdir, experiment)


def load_part(info: Info, part: str, mesh: Mesh | None = None, rules: parallel.Rules = ()) -> Any:
    """Reads one part of a checkpoint, onto the mesh or the first device. Raises InputError where it is missing or damaged."""
    _require_whole(info.path, part)
    with _reading(info.path):
        stored = ocp.metadata(info.path, checkpointable_name=part).metadata
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), target)
    else:
        places = parallel.shardings(target, mesh, rules)
    with _reading(info.path):
        return ocp.load_checkpointables(info.path, {part: parallel.placed(target, places)})[part]


def _about(config: TokenizerTraining | TransformerTraining, class_names: Sequence[str], hooks: Sequence[str]) -> dict[str, Any]:
    return {"config": to_dict(config), "class_names": list(class_names), "hooks": list(hooks)}


def _checkpointer(workdir: PathLike, preserve: Any = None) -> ocp.training.Checkpointer:
    folder = writable_folder(workdir) / "checkpoints"
    context = ocp.Context()
    context.async_options.post_finalization_callback = lambda: _write_sizes(folder)
    context.memory_options.deepcopy_host_arrays = False  # nobody changes them while they are written
    return ocp.training.Checkpointer(folder, context=context, preservation_policy=preserve, cleanup_tmp_directories=True)


def _write_sizes(folder: epath.Path) -> None:
    """Adds files.json to the checkpoint at hand, which does not count as finished yet."""
    for path in folder.iterdir() if hosts.first() else ():
        if not (path / "files.json").exists():
            (path / "files.json").write_text(json.dumps({part.name: _sizes(part) for part in path.iterdir() if part.is_dir()}))


def _sizes(folder: epath.Path, prefix: str = "") -> dict[str, int]:
    sizes = {}
    for path in folder.iterdir():
        name = prefix + path.name
        sizes |= _sizes(path, f"{name}/") if path.is_dir() else {name: size_of(path)}
    return sizes


def _require_whole(path: epath.Path, part: str) -> None:
    with _reading(path):
        wanted = json.loads((path / "files.json").read_text())[part]
    found = _sizes(path / part)
    for name, size in wanted.items():
        if found.get(name) != size:
            state = f"has {found[name]} bytes" if name in found else "is missing"
            raise _damaged(path, f"{part}/{name} {state}, it was written with {size}")


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns whatever Orbax, TensorStore or JSON raise while reading into one line, without what Orbax logs before."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # another host is gone
    except Exception as error:
        raise _damaged(path, " ".join(f"{type(error).__name__}: {error}".split())[:200]) from error
    finally:
        logger.setLevel(level)


def _damaged(path: epath.Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged; delete it to go on from an earlier checkpoint ({reason})")


def _require_same(path: epath.Path, part: str, wanted: Any) -> None:
    with _reading(path):
        saved = _shapes(ocp.metadata(path, checkpointable_name=part).metadata)
    here = _shapes(wanted)
    differing = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if differing:
        shown = ", ".join(
            f"{name} {saved.get(name, 'missing')} there, {here.get(name, 'missing')} here" for name in differing[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise InputError(f"{path} is of another experiment, its {part} differ: {shown}{more}; choose another folder")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {parallel.path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
