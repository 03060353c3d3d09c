"""Checkpoints: WORKDIR/checkpoints/STEP, written by Orbax in the background and whole or not at all.

A checkpoint has the parts `params`, `ema` and `opt_state` (perhaps only `ema` if it was imported or made for inference), and
beside them, as JSON, what it is: the run's settings, its class names, and which parts of the method the experiment had replaced
(hooks). So a checkpoint alone can be sampled from, and reading the weights needs no optimizer.

`files.json` lists the size and the CRC-32 of every file, which tell a checkpoint that was copied in part, cut short by a full
disk or changed since, before it is used. They are made in the background, after the checkpoint is written, and compared when a
part is read, with that part's files only: several at once, in threads, at about 1 GB/s per core, which leaves the files in the
system's cache for the reading that follows. Of many hosts each compares its share, and ends the job where that is damaged.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import re
import secrets
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from dar_jax import parallel
from dar_jax.config import TokenizerTraining, TrainConfig, TransformerTraining, from_dict, to_dict, validate
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.files import is_remote, size_of
from dar_jax.parallel import hosts
from dar_jax.training.state import Params, TrainState

PathLike = str | os.PathLike
TRAINING_HOOKS = ("loss", "features", "frozen", "optimizer", "source")  # replaced parts that using a checkpoint does not need
FORMAT = 1  # of what is written beside the arrays; 0, which has no number, lists sizes without checksums
METADATA = "_CHECKPOINT_METADATA"  # Orbax's name of the file with `_about`
MOST_JSON = 64 * 2**20  # bytes that are read of a JSON file
MOST_STEPS = 2**31 - 1

# Settings that a resumed run may have otherwise without learning anything else, and those of a model that are no part of it.
HARMLESS = re.compile(
    r"name|mesh\..*|sampling\..*|data\.(path|workers|verify|held_out_split)|train\.(remat|log_every|\w*checkpoint\w*|keep_every|"
    r"sample_every|evaluate_\w+|profile|peak_flops)"
)
TRAINING_ONLY = re.compile(r"model\.(\w+_dropout|init_std|gate_init)")


@dataclass(frozen=True)
class Info:
    """A checkpoint that is looked at: what it says about itself. No arrays are read."""

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
class Loaded(Info):
    """The same with its weights; `experiment` has this checkpoint's settings, its `build_model` makes the model."""

    params: Params
    experiment: Experiment


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


def steps(workdir: PathLike) -> list[int]:
    """The steps of the complete checkpoints in WORKDIR, in order. Half-written ones have other names."""
    folder = absolute(workdir) / "checkpoints"
    if not folder.is_dir():
        return []
    with _reading(folder):
        for path in folder.iterdir():
            if path.name.isdigit():
                _step(path)
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))


def latest_step(workdir: PathLike) -> int | None:
    """The step of the newest complete checkpoint in WORKDIR, None if there is none."""
    return max(steps(workdir), default=None)


def inspect(path: PathLike) -> Info:
    """What a checkpoint is. `path`: a WORKDIR (its newest checkpoint) or WORKDIR/checkpoints/STEP.

    Raises InputError where there is no checkpoint, it is damaged or written by a newer version, or its settings are unfit.
    """
    folder = absolute(path)
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist or is no folder; give a run's folder or one of its checkpoints/STEP")
    if folder.name.isdigit() and folder.parent.name == "checkpoints" and not (folder / "checkpoints").is_dir():
        workdir, step = folder.parent.parent, _step(folder)
        if not any((folder / name).exists() for name in (METADATA, "files.json")):
            raise InputError(f"{folder} holds no checkpoint")
    else:
        workdir, step = folder, latest_step(folder)
        if step is None:
            raise InputError(f"{folder} holds no checkpoint")
        folder = folder / "checkpoints" / str(step)
    with _reading(folder):
        about = _read_json(folder / METADATA)["custom_metadata"]
        checksum = about.pop("crc32", None)  # format 0 has none
        if checksum is not None and checksum != _crc32_of(about):
            raise ValueError(f"{METADATA} is not what was written")
        number = about.get("format", 0)
        if type(number) is not int or number < 0:
            raise ValueError(f"its format is {number!r}")
    if number > FORMAT:
        raise InputError(f"{folder} was written by a newer dar_jax (format {number}, this one knows {FORMAT}); update dar_jax")
    _require_whole(folder, "ema")
    with _reading(folder):
        class_names, hooks = (_strings(about, name) for name in ("class_names", "hooks"))
        settings = about["config"]
    try:
        config = from_dict(settings)
        validate(config)
    except InputError as error:
        raise InputError(f"{folder} is of another version: {_short(error)}") from error
    if isinstance(config, TransformerTraining) and len(class_names) != config.model.num_classes:
        raise InputError(
            f"{folder} names {len(class_names)} classes, but its model.num_classes is {config.model.num_classes}; they "
            "should be as many"
        )
    return Info(folder, workdir, step, config, class_names, hooks)


def require_same_run(before: Info, experiment: Experiment, class_names: Sequence[str]) -> list[str]:
    """What differs between a checkpoint and the run that goes on from it, as lines for people.

    Raises InputError where the run is of another stage, model or (of a transformer) other classes.
    """
    if type(before.config) is not type(experiment.config):
        raise InputError(f"{before.path} is of a {before.config.name} run of the other stage; choose another folder")
    if "model" in before.hooks and "model" not in experiment.hooks:
        raise InputError(f"{before.path} is of an experiment with its own model, which this one lacks; choose another folder")
    theirs, ours = dict(settings(before.config)), dict(settings(experiment.config))
    changes = [(name, theirs[name], ours[name]) for name in ours if theirs[name] != ours[name]]
    of_model = [change for change in changes if change[0].startswith("model.") and not TRAINING_ONLY.fullmatch(change[0])]
    if of_model:
        shown = ", ".join(f"{name} {_short(old, 60)} there, {_short(new, 60)} here" for name, old, new in of_model[:3])
        raise InputError(f"{before.path} is of another experiment, its model differs: {shown}; choose another folder")
    lines = []
    for name, old, new in changes:
        effect = "" if HARMLESS.fullmatch(name) else " (changes what is learnt from here on)"
        lines.append(f"{name}: {_short(old, 60)} -> {_short(new, 60)}{effect}")
    if before.hooks != experiment.hooks:
        replaced = (", ".join(hooks) or "nothing" for hooks in (before.hooks, experiment.hooks))
        lines.append("replaced by the experiment: " + " -> ".join(replaced) + " (changes what is learnt from here on)")
    if tuple(class_names) != before.class_names:
        difference = _difference(before.class_names, class_names)
        knows_classes, order = isinstance(before.config, TransformerTraining), list(range(len(before.class_names)))
        if knows_classes and class_numbers(class_names, before.class_names) != order:
            raise InputError(f"{before.path} was trained with other classes: {difference}; choose another folder")
        lines.append(f"names of classes: {difference}")
    return ["differs from the checkpoint: " + line for line in lines]


def class_numbers(names: Sequence[str], of_run: Sequence[str]) -> list[int]:
    """The number in a run of each class of a data set, by its name.

    Where a run's classes are but numbered, as of imported files, and no name is among the numbers, the order counts.

    Raises InputError for names that the run does not have, or has twice.
    """
    if tuple(names) == tuple(of_run):
        return list(range(len(names)))
    numbers = {name: number for number, name in enumerate(of_run)}
    if list(of_run) == [str(number) for number in range(len(names))] and not numbers.keys() & set(names):
        return list(range(len(names)))
    if unknown := [name for name in names if name not in numbers]:
        raise InputError(f"the data have classes that the run does not know: {_some(unknown)}; it knows {_some(of_run)}")
    if twice := [name for name in names if of_run.count(name) > 1 or names.count(name) > 1]:
        raise InputError(f"several classes have the same name: {_some(twice)}; so they cannot be told by it")
    return [numbers[name] for name in names]


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
      experiment: needed if the run had replaced its model, condition or parts of sampling; its own settings are not used.
      mesh: where the weights go, cut by `parallel.RULES`; None: the first device.

    Raises InputError where there is no checkpoint, it is damaged, lacks these weights, or needs its experiment.
    """
    info = inspect(path)
    given = (*TRAINING_HOOKS, *(experiment.hooks if experiment else ()))
    given = [hook.removeprefix("method.") for hook in given]  # there were checkpoints that wrote "guidance"
    if missing := [hook for hook in info.hooks if hook.removeprefix("method.") not in given]:
        raise InputError(f"{info.path} was trained with its own {' and '.join(missing)}; pass --experiment FILE")
    experiment = (experiment or Experiment(info.config)).with_config(info.config)
    if not (info.path / weights).is_dir():
        raise InputError(f"{info.path} was made for inference and holds no {weights}, only ema")
    _require_settings(info, weights, experiment)
    params = load_part(info, weights, mesh, experiment.rules)
    return Loaded(**{f.name: getattr(info, f.name) for f in dataclasses.fields(info)}, params=params, experiment=experiment)


def load_part(info: Info, part: str, mesh: Mesh | None = None, rules: parallel.Rules = ()) -> Any:
    """Reads one part of a checkpoint, onto the mesh or the first device. Raises InputError where it is missing or damaged."""
    _require_whole(info.path, part)
    stored = stored_shapes(info.path, part)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), target)
    else:
        places = parallel.shardings(target, mesh, rules)
    with _reading(info.path):
        return ocp.load_checkpointables(info.path, {part: parallel.placed(target, places)})[part]


def _about(config: TokenizerTraining | TransformerTraining, class_names: Sequence[str], hooks: Sequence[str]) -> dict[str, Any]:
    about = {"format": FORMAT, "config": to_dict(config), "class_names": list(class_names), "hooks": list(hooks)}
    return about | {"crc32": _crc32_of(about)}  # Orbax writes its file whenever it likes, with times of its own


def stored_shapes(path: epath.Path, part: str) -> Any:
    """The tree of what a part of a checkpoint holds; its leaves have a shape and a dtype. No array is read."""
    with _reading(path):
        return ocp.metadata(path, checkpointable_name=part).metadata


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its path, such as `model.velocity.width`."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, name + ".")
        else:
            yield name, value


def _checkpointer(workdir: PathLike, preserve: Any = None) -> ocp.training.Checkpointer:
    folder = writable_folder(workdir) / "checkpoints"
    context = ocp.Context()
    context.async_options.post_finalization_callback = lambda: _write_files(folder)
    context.memory_options.deepcopy_host_arrays = False  # nobody changes them while they are written
    return ocp.training.Checkpointer(folder, context=context, preservation_policy=preserve, cleanup_tmp_directories=True)


def _write_files(folder: epath.Path) -> None:
    """Adds files.json to the checkpoint at hand, which does not count as finished yet."""
    for path in folder.iterdir() if hosts.first() else ():
        if not (path / "files.json").exists():
            listed: dict[str, Any] = {}
            for part in [part for part in path.iterdir() if part.is_dir()]:
                sizes = _sizes(part)
                checksums = _checksums(part, list(sizes))
                listed[part.name] = {name: [sizes[name], checksums[name]] for name in sizes}
            (path / "files.json").write_text(json.dumps(listed))


def _sizes(folder: epath.Path, prefix: str = "") -> dict[str, int]:
    sizes = {}
    for path in folder.iterdir():
        name = prefix + path.name
        sizes |= _sizes(path, f"{name}/") if path.is_dir() else {name: size_of(path)}
    return sizes


def _checksums(folder: epath.Path, names: Sequence[str]) -> dict[str, int]:
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: _crc32(folder / name), names)))


def _crc32(path: epath.Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            crc = zlib.crc32(block, crc)
    return crc


def _crc32_of(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _require_whole(path: epath.Path, part: str) -> None:
    """Compares the files of a part with files.json. Raises InputError where one is missing or not what was written."""
    with _reading(path):
        listed = _read_json(path / "files.json")[part]
        wanted = {name: entry if isinstance(entry, list) else [entry] for name, entry in listed.items()}  # format 0: no list
        found = _sizes(path / part)
    for name, (size, *_) in wanted.items():
        if found.get(name) != size:
            state = f"has {found[name]} bytes" if name in found else "is missing"
            raise _damaged(path, f"{_short(os.path.join(part, name))} {state}, it was written with {_short(size)}")
    share = [name for name, (_, *crc) in wanted.items() if crc]
    if hosts.many():
        share = share[jax.process_index() :: jax.process_count()]
    with _reading(path):
        checksums = _checksums(path / part, share)
    for name in share:
        if wanted[name][1:] != [checksums[name]]:
            raise _damaged(path, f"{os.path.join(part, name)} is not what was written")


def _read_json(path: epath.Path) -> Any:
    if path.stat().length > MOST_JSON:
        raise ValueError(f"{path.name} is larger than {MOST_JSON} bytes")
    return json.loads(path.read_text())


def _strings(about: dict[str, Any], name: str) -> tuple[str, ...]:
    if not isinstance(about[name], list) or not all(isinstance(value, str) for value in about[name]):
        raise ValueError(f"its {name} are no list of texts")
    return tuple(about[name])


def _step(folder: epath.Path) -> int:
    """The step that a checkpoint's folder is named by. Raises InputError where it is no step."""
    name = folder.name
    if not re.fullmatch("0|[1-9][0-9]{0,9}", name) or int(name) > MOST_STEPS:
        raise InputError(f"{folder} is named by no step, a number up to {MOST_STEPS}; move it elsewhere")
    return int(name)


# What a reader meets that has nothing to do with what the files hold.
CIRCUMSTANCES = re.compile(
    "PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|Too many open files|Input/output error"
)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    """Turns whatever Orbax, TensorStore or JSON raise while reading into one line, without what Orbax logs before.

    Only what comes of the files' contents counts as damage.
    """
    jax.devices()  # what is wrong with them is nothing of the checkpoint's
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (InputError, jax.errors.JaxRuntimeError):
        raise  # of the latter kind is that another host is gone
    except Exception as error:
        reason = _short(f"{type(error).__name__}: {error}")
        of_files = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        if (isinstance(error, OSError) and not isinstance(error, of_files)) or CIRCUMSTANCES.search(str(error)):
            raise InputError(f"{path} cannot be read: {reason}") from error
        raise _damaged(path, reason) from error
    finally:
        logger.setLevel(level)


def _damaged(path: epath.Path, reason: str) -> InputError:
    return InputError(f"{path} is damaged; delete it to go on from an earlier checkpoint ({reason})")


def _short(value: object, most: int = 200) -> str:
    """A value in one line for a message."""
    return " ".join(str(value).split())[:most]


def _some(names: Sequence[str]) -> str:
    return ", ".join(_short(name, 60) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    if len(before) != len(now):
        return f"{len(before)} there ({_some(before)}), {len(now)} here ({_some(now)})"
    return _some([f"{old} there, {new} here" for old, new in zip(before, now) if old != new])


def _require_settings(info: Info, part: str, experiment: Experiment) -> None:
    """Raises InputError where a checkpoint's weights are not those of the model that its settings describe."""
    try:
        expected = jax.eval_shape(lambda: experiment.init_params(experiment.build_model()))
    except Exception as error:  # whatever a model raises whose sizes do not fit together
        raise InputError(f"the settings in {info.path} describe no model: {_short(error)}") from error
    if differing := _differing(stored_shapes(info.path, part), expected):
        raise InputError(f"the settings in {info.path} are not those of its weights: {differing}")


def _require_same(path: epath.Path, part: str, wanted: Any) -> None:
    if differing := _differing(stored_shapes(path, part), wanted):
        raise InputError(f"{path} is of another experiment, its {part} differ: {differing}; choose another folder")


def _differing(stored: Any, wanted: Any) -> str:
    """The first names of parameters whose shapes differ, as text; empty where none do."""
    there, here = _shapes(stored), _shapes(wanted)
    names = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    shown = ", ".join(f"{name} {there.get(name, 'missing')} there, {here.get(name, 'missing')} here" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {parallel.path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
