"""Import of the release's checkpoints, and export to its format."""

import dataclasses
import functools
import json
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import safetensors
from flax import traverse_util
from safetensors.numpy import save_file

from dar_jax.config import (
    TRANSFORMER_SIZES,
    DataConfig,
    TokenizerConfig,
    TokenizerTraining,
    TransformerTraining,
    from_dict,
    to_dict,
)
from dar_jax.errors import InputError, require
from dar_jax.experiment import Experiment
from dar_jax.files import check_file_writable, check_writable, is_remote, replacing
from dar_jax.release.card import model_card
from dar_jax.release.names import tokenizer_entries, transformer_entries
from dar_jax.release.sizes import (
    beyond_release,
    release_config,
    shape_of,
    tokenizer_config,
    tokenizer_shapes,
    transformer_config,
)
from dar_jax.training import checkpoint
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.start import Start
from dar_jax.training.state import Params
from dar_jax.weights import hub, torch_file
from dar_jax.weights.published import SOURCES, resolve
from dar_jax.weights.table import Entry, from_release, to_release

PathLike = str | os.PathLike
Tensors = Mapping[str, np.ndarray]

PREFIX = re.compile(r"^(_orig_mod\.|module\.)+")  # what torch.compile and data parallelism put before names
CODEBOOK_USED = "quantize.codebook_used"  # statistics the release keeps with its weights: the last 65,536 codes seen
REPA = "diff_decoder.net.repa_out."
CACHES = r"freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\.[kv]_cache"  # that a transformer's file may hold
LICENCE = r"[a-z0-9][a-z0-9.+-]{0,63}"  # by the Hub's names
MAX_COMPLAINT = 1000  # characters of a message, which may quote the file
WEIGHTS = ("model", "module", "state_dict")  # names that the trained weights may have in a file
ENTRIES = (*WEIGHTS, "ema", "config", "steps", "args", "optimizer")  # of a file, as far as they are read
GUIDANCE = {TRANSFORMER_SIZES["XL"]["layers"]: (1.1, 10.0)}  # the paper's, where it is not the default


@dataclass(frozen=True)
class Released:
    """A network from a file of the release.

    ema: the weights in use, the moving average if there is one. params: the trained weights, None where the file holds one set
    of weights only. opt_state: of `make_optimizer`, None where there is none. buffers: tensors that belong to none of these.
    notes: what was assumed or left out, for people.
    """

    config: TokenizerTraining | TransformerTraining
    ema: Params
    params: Params | None
    opt_state: optax.OptState | None
    buffers: dict[str, np.ndarray]
    step: int
    notes: tuple[str, ...]


def read_checkpoint(path: PathLike, tokenizer: TokenizerConfig | None = None, heads: int | None = None) -> Released:
    """Reads a tokenizer or a transformer of the release: a `.pt` file in any of its forms, or `.safetensors`.

    Args:
      tokenizer: whose codes a transformer predicts; None: the released one's 256 tokens.
      heads: of a transformer's attention, where they are not those of a known size nor of width 64.

    Parameters are NumPy arrays, float32. Raises InputError where the file is damaged, hostile, or of something else.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    contents = _contents(path)
    trained, average = _state_dicts(path, contents)
    step, notes = _step(path, contents)
    tensors = trained if average is None else average
    try:
        if "patchify.weight" in tensors:
            unused, (config, assumptions) = re.escape(CODEBOOK_USED), _tokenizer(path, contents, tensors)
        elif "cls_embedding.embedding_table.weight" in tensors:
            unused, (config, assumptions) = CACHES, _transformer(path, tensors, tokenizer, heads)
        else:
            raise InputError(f"neither a tokenizer nor a transformer of the release; it holds {_some(tensors)}")
        experiment = Experiment(from_dict(to_dict(config)))  # checks every size
        network = experiment.build_model()
        abstract = jax.eval_shape(lambda: experiment.init_params(network))
        convert = functools.partial(from_release, _entries(experiment.config), abstract=abstract, unused=unused)
        ema = convert(tensors)
        params = None if average is None or trained is None else convert(trained)
    except InputError as error:
        raise InputError(f"{path}: {str(error)[:MAX_COMPLAINT]}") from error
    try:
        names = [name for name in trained or {} if not re.fullmatch(unused, name)]
        opt_state = _optimizer(_mapping(contents, "optimizer"), trained, names, convert, experiment.config)
    except InputError as error:
        opt_state, notes = None, (*notes, f"its optimizer does not fit its weights, {error}")
    buffers = {name: np.array(tensors[name]) for name in (CODEBOOK_USED,) if name in tensors}
    if ignored := [name for name, value in contents.items() if name not in ENTRIES and not isinstance(value, np.ndarray)]:
        notes += (f"not read: {_some(ignored)}",)
    if narrow := {str(tensor.dtype) for tensor in tensors.values()} - {"float32"}:
        notes += (f"stored as {', '.join(sorted(narrow))}, held as float32",)
    return Released(experiment.config, ema, params, opt_state, buffers, step, notes + assumptions)


def import_checkpoint(
    path: PathLike, workdir: PathLike, tokenizer: PathLike | None = None, heads: int | None = None
) -> tuple[str, ...]:
    """Writes a file of the release as an ordinary checkpoint into a new WORKDIR.

    Args:
      path: a file, perhaps on the Hub (hf://...), or one of the names `dar_tokenizer_v1`, `dar_l` and `dar_xl`, see
        `weights.published`.
      tokenizer: of a transformer, a file of the release, its name or a run's folder; it is put into WORKDIR/tokenizer.
      heads: see `read_checkpoint`.

    Returns lines for people that say what was imported. Raises InputError, before anything is written, where files or folder
    are unfit.
    """
    folder = checkpoint.absolute(workdir)
    check_writable(folder)
    if (step := checkpoint.latest_step(folder)) is not None:
        raise InputError(f"{folder} already holds a run (step {step}); choose another folder")
    path = _located(path)
    tokenizer = tokenizer if tokenizer is None else hub.local(tokenizer)
    if tokenizer is None and (folder / "tokenizer").is_dir():
        tokenizer = folder / "tokenizer"
    donor = None if tokenizer is None else open_weights(tokenizer)
    if donor is not None and not isinstance(donor.config, TokenizerTraining):
        raise InputError(f"{tokenizer} is a transformer, not a tokenizer")
    if donor is not None and Path(tokenizer).is_dir() and "model" in checkpoint.inspect(tokenizer).hooks:
        raise InputError(f"{tokenizer} was trained with a model of its own, of which the release's transformers know nothing")
    released = read_checkpoint(path, donor and donor.config.model, heads)
    lines = [_summary(path, released)]
    if isinstance(released.config, TransformerTraining):
        if donor is None:
            lines.append(f"to sample from it, import its tokenizer into {folder / 'tokenizer'}")
        else:
            vocabulary, codebook = released.config.model.vocab_size, donor.config.model.codebook_size
            if not donor.config.model.vq_enable:
                raise InputError("the tokenizer is continuous (vq_enable is false), it makes no codes")
            if vocabulary != codebook:
                raise InputError(f"the transformer predicts {vocabulary} codes, the tokenizer has {codebook}")
            if checkpoint.absolute(tokenizer).resolve() != (folder / "tokenizer").resolve():
                _write(donor, folder / "tokenizer")
            lines.append(_summary(tokenizer, donor))
    elif donor is not None:
        raise InputError(f"{path} is a tokenizer; --tokenizer is for transformers")
    _write(released, folder)
    return (*lines, f"written to {folder}")


def open_weights(path: PathLike) -> Released:
    """The weights of a file of the release, or of a run's folder (or one of its checkpoints/STEP).

    Raises InputError where there are none.
    """
    path = _located(path)
    if Path(path).is_file():
        return read_checkpoint(path)
    info = checkpoint.inspect(path)
    return Released(info.config, checkpoint.load_part(info, "ema"), None, None, _buffers(info), info.step, ())


def open_start(path: PathLike, config: TokenizerTraining | TransformerTraining) -> Start:
    """Weights for `training.start`. Raises InputError where there are none, or they are of another stage than the settings."""
    weights = open_weights(path)
    if type(weights.config) is not type(config):
        raise InputError(f"{path} and the experiment are of different stages, one a tokenizer, one a transformer")
    return Start(f"{path}, step {weights.step}", jax.device_get(weights.ema))


def export_folder(path: PathLike, folder: PathLike, licence: str | None = None) -> tuple[str, ...]:
    """Writes the moving average of a checkpoint, with a transformer's tokenizer, into a new folder with a model card: a
    checkpoint for every command, on a disk or, once uploaded, as hf://OWNER/NAME. See `training.exported`.

    Args:
      path: a run's folder or one of its checkpoints/STEP.
      licence: of the weights, by the Hub's name, such as mit or cc-by-4.0; None: the card says that none was named.

    Returns lines for people. Raises InputError where the checkpoint is unfit, or the folder is in a bucket or not empty.
    """
    info = checkpoint.inspect(path)
    check_writable(folder)
    require(not is_remote(folder), f"{folder} is in a bucket; export to a disk, and copy it from there")
    folder = checkpoint.absolute(folder)
    require(not folder.exists() or not any(folder.iterdir()), f"{folder} is not empty; choose another folder")
    require(
        licence is None or re.fullmatch(LICENCE, licence), f"{licence!r} is no licence of the Hub, such as mit or cc-by-4.0"
    )
    notes = [f"upload it with: hf upload OWNER/NAME {shlex.quote(os.fspath(folder))}"]
    if not info.is_tokenizer:
        if (info.workdir / "tokenizer").is_dir():
            checkpoint.export(info.tokenizer, folder / "tokenizer")
        else:
            notes.insert(0, f"it lacks its tokenizer: {info.workdir} has none")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(model_card(info, licence))
    count = checkpoint.export(info, folder)
    return (f"{count} tensors of step {info.step} written to {folder}, with a model card", *notes)


def export_checkpoint(path: PathLike, file: PathLike, kind: Literal["pt", "safetensors"] = "pt") -> tuple[str, ...]:
    """Writes the weights of a checkpoint in the release's names, whole or not at all.

    Args:
      path: a run's folder or one of its checkpoints/STEP. A transformer's tokenizer is in its sub-folder `tokenizer`.
      file: to write. A `.pt` file holds `model` and, where they differ, `ema`, with `config` and `steps`, and is loaded by the
        release with strict checking; `.safetensors` holds the moving average, with the same as text in its metadata.

    Returns lines for people: the tensors written, and warnings. Raises InputError where the checkpoint is unfit.
    """
    info = checkpoint.inspect(path)
    if "model" in info.hooks:
        raise InputError(f"{info.path} was trained with a model of its own, for which the release has no names")
    check_file_writable(file)
    is_tokenizer = isinstance(info.config, TokenizerTraining)
    has_params = (info.path / "params").is_dir() and info.config.optimizer.ema_decay > 0
    names = ("params", "ema") if has_params and kind == "pt" else ("ema",)
    states, notes = [], ()
    for name in names:
        tensors = to_release(_entries(info.config), jax.device_get(checkpoint.load_part(info, name)))
        if is_tokenizer:
            added, notes = _completed(info, tensors)
            tensors |= added
        states.append(tensors)
    if is_tokenizer and (beyond := beyond_release(info.config.model)):
        notes += (f"the release's code cannot build this model: {', '.join(beyond)}",)
    about = {"steps": info.step, "args": {"image_size": info.config.data.image_size}}
    if is_tokenizer:
        about["config"] = {"model": release_config(info.config.model)}
    if kind == "pt":
        torch_file.write(file, dict(zip(("model", "ema"), states)) | about)
    else:
        metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in about.items()}
        with replacing(file) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in states[0].items()}, temporary, metadata)
    return (f"{len(states[0])} tensors of step {info.step} written to {file}", *notes)


def _located(path: PathLike) -> PathLike:
    """The place of one of the names in `published.SOURCES`, or of a name on the Hub (hf://...), downloaded where needed; other
    paths are returned unchanged."""
    path = hub.local(path)
    if os.fspath(path) in SOURCES and not os.path.exists(path):
        return resolve(os.fspath(path)).files[0]
    return path


# --- reading ---------------------------------------------------------------------------------------------------------------


def _contents(path: PathLike) -> dict[str, Any]:
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] != b"{" or int.from_bytes(start[:8], "little") >= 2**32:
        contents = torch_file.read(path)
        if not isinstance(contents, dict):
            raise InputError(f"{path} holds no weights by name")
        return contents
    try:  # safetensors begin with the length of the header, which is JSON
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            about = {name: json.loads(metadata[name]) for name in ("steps", "args", "config") if name in metadata}
            return {"model": {name: file.get_tensor(name) for name in file.keys()}, **about}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, RecursionError, TypeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({' '.join(str(error).split())[:150]})") from error


def _state_dicts(path: PathLike, contents: dict[str, Any]) -> tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None]:
    """The trained weights and their moving average, of which one may be missing; a file may also be bare weights."""
    trained = next((contents[name] for name in WEIGHTS if name in contents), None)
    average = contents.get("ema")
    if trained is None and average is None:
        trained = contents
    return tuple(None if state is None else _plain_names(path, state) for state in (trained, average))


def _plain_names(path: PathLike, state: Any) -> dict[str, np.ndarray]:
    if not isinstance(state, dict):
        raise InputError(f"{path} holds no weights by name")
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise InputError(f"{path}: {str(name)[:100]!r} is no tensor, where only weights should be")
        plain = PREFIX.sub("", name)
        if plain in tensors:
            raise InputError(f"{path} holds {plain} twice")
        tensors[plain] = tensor
    return tensors


def _step(path: PathLike, contents: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """The step in the file's contents or in its name, and a note where it is not in the contents."""
    step = contents.get("steps")
    if type(step) is int and 0 <= step < 2**31:
        return step, ()
    if match := re.fullmatch(r"(?:.*-)?(\d{1,9})(K?)", Path(path).stem):
        step = int(match[1]) * (1000 if match[2] else 1)
        if step < 2**31:
            return step, (f"step {step}, by the file's name",)
    return 0, ("the file names no step: step 0",)


def _tokenizer(path: PathLike, contents: dict[str, Any], tensors: Tensors) -> tuple[TokenizerTraining, tuple[str, ...]]:
    """The settings of a tokenizer, and what was assumed about it."""
    shapes = tokenizer_shapes(tensors)
    sizes = _mapping(contents, "config")
    for name in ("_data", "model"):  # the release's class keeps its mapping in `_data`
        sizes = _mapping(sizes, name) or sizes
    image_size, notes = _mapping(contents, "args").get("image_size"), ()
    if type(image_size) is not int:
        image_size, notes = 256, ("the file names no image size: 256",)
    if sizes:
        _require_same_sizes(sizes, shapes)
    else:
        paper = TokenizerConfig()
        notes += (
            f"the file has no configuration: sizes by its shapes, and {paper.num_tokens} tokens in "
            f"{paper.num_groups} groups, {paper.num_denoising_steps} steps",
        )
        sizes = release_config(paper)
        sizes |= shapes | {"diff_decoder": sizes["diff_decoder"] | shapes["diff_decoder"]}
    model = tokenizer_config(sizes, image_size)
    repa = {name: shape_of(tensors, name, 2) for name in tensors if name.startswith(REPA) and name.endswith("weight")}
    if repa:
        velocity = {"repa_hidden": max(shape[0] for shape in repa.values()), "repa_width": repa[max(repa)][0]}
    else:
        velocity = {"repa_layer": None}
        notes += ("the file has no REPA head, which only training uses",)
    velocity = dataclasses.replace(model.velocity, **velocity)
    model = dataclasses.replace(model, velocity=velocity, max_tokens=shape_of(tensors, "decoder_embedding.weight")[0])
    data = DataConfig(image_size=image_size, channels=model.channels)
    return TokenizerTraining(name=Path(path).stem, model=model, data=data), notes


def _transformer(
    path: PathLike, tensors: Tensors, tokenizer: TokenizerConfig | None, heads: int | None
) -> tuple[TransformerTraining, tuple[str, ...]]:
    notes = () if tokenizer else (f"for the {TokenizerConfig.num_tokens} tokens of the released tokenizer",)
    tokenizer = tokenizer or TokenizerConfig()
    config = TransformerTraining(name=Path(path).stem, model=transformer_config(tensors, tokenizer.num_tokens, heads))
    guidance = GUIDANCE.get(config.model.layers, config.sampling.guidance)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, image_size=tokenizer.image_size, channels=tokenizer.channels),
        sampling=dataclasses.replace(config.sampling, guidance=guidance),
    ), notes


def _optimizer(
    contents: dict[str, Any],
    tensors: Tensors,
    names: list[str],
    convert: Callable[[Tensors], Params],
    config: TokenizerTraining | TransformerTraining,
) -> optax.OptState | None:
    """The state of the release's AdamW, None where there is none.

    It numbers its parameters: in the order of the weights if they are one group, else those of two and more dimensions first.
    """
    state, groups = _mapping(contents, "state"), contents.get("param_groups")
    if not state:
        return None
    if not isinstance(groups, list) or len(groups) not in (1, 2):
        raise InputError("it has not one or two groups of parameters")
    if len(groups) == 2:
        names = sorted(names, key=lambda name: tensors[name].ndim < 2)
    numbered = [group.get("params") if isinstance(group, dict) else None for group in groups]
    numbers = [number for group in numbered if isinstance(group, list) for number in group]
    if not all(type(number) is int for number in numbers) or len(numbers) != len(names):
        raise InputError(f"it has {len(numbers)} parameters, the weights {len(names)}")
    parts = {name: _mapping(state, number) for name, number in zip(names, numbers)}
    moments = []
    for kind in ("exp_avg", "exp_avg_sq"):
        if not all(isinstance(part.get(kind), np.ndarray) for part in parts.values()):
            raise InputError(f"it lacks {kind} of some")
        moments.append(convert({name: part[kind] for name, part in parts.items()}))
    step = next(iter(parts.values())).get("step")
    is_number = isinstance(step, int | float | np.ndarray) and np.asarray(step).dtype.kind in "iuf"
    if not is_number or np.size(step) != 1 or not 0 <= step < 2**31:
        raise InputError("it names no step")
    count = np.array(step, np.int32).reshape(())
    known = {
        optax.ScaleByAdamState: lambda _: optax.ScaleByAdamState(count, *moments),
        optax.ScaleByScheduleState: lambda _: optax.ScaleByScheduleState(count),
    }
    empty = jax.eval_shape(make_optimizer(config.optimizer, config.train.steps).init, moments[0])
    return jax.tree.map(lambda part: known[type(part)](part), empty, is_leaf=lambda part: type(part) in known)


def _mapping(values: dict[str, Any], name: Any) -> dict[str, Any]:
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _require_same_sizes(sizes: dict[str, Any], shapes: dict[str, Any], where: str = "") -> None:
    """Raises InputError where the file's configuration contradicts its tensors."""
    for name, size in shapes.items():
        if isinstance(size, dict):
            _require_same_sizes(_mapping(sizes, name), size, f"{name}.")
        elif name in sizes and (type(sizes[name]) is not type(size) or sizes[name] != size):
            raise InputError(f"its configuration says {where}{name} is {sizes[name]!r:.50}, its tensors say {size}")


def _some(names: Any) -> str:
    return ", ".join(str(name)[:60] for name in list(names)[:3]) + (" ..." if len(names) > 3 else "")


# --- writing ---------------------------------------------------------------------------------------------------------------


def _write(released: Released, workdir: PathLike) -> None:
    parts = {"params": released.params, "opt_state": released.opt_state, "buffers": released.buffers or None}
    parts = {name: part for name, part in parts.items() if part is not None}
    config, class_names = released.config, ()
    if isinstance(config, TransformerTraining):  # the release's files name no classes
        class_names = tuple(map(str, range(config.model.num_classes)))
    checkpoint.save_for_inference(workdir, config, released.ema, released.step, class_names, others=parts)


def _summary(path: PathLike, released: Released) -> str:
    kind = "tokenizer" if isinstance(released.config, TokenizerTraining) else "transformer"
    count = sum(array.size for array in jax.tree.leaves(released.ema))
    weights = "moving average and trained weights" if released.params is not None else "weights"
    weights += ", with the optimizer" if released.opt_state is not None else ""
    notes = f" ({'; '.join(released.notes)})" if released.notes else ""
    return f"{Path(path).name}: {kind} of {count:,} parameters at step {released.step}, {weights}{notes}"


def _entries(config: TokenizerTraining | TransformerTraining) -> list[Entry]:
    return (tokenizer_entries if isinstance(config, TokenizerTraining) else transformer_entries)(config.model)


def _buffers(info: checkpoint.Info) -> dict[str, np.ndarray]:
    return jax.device_get(checkpoint.load_part(info, "buffers")) if (info.path / "buffers").is_dir() else {}


def _completed(info: checkpoint.Info, tensors: Tensors) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Tensors that the release's strict loading needs besides: its statistics, and a newly initialised REPA head."""
    config, added, notes = info.config, _buffers(info), ()
    if config.model.vq_enable and CODEBOOK_USED not in added:
        added[CODEBOOK_USED] = np.zeros(65536, np.float32)
    if config.model.velocity.repa_layer is None:
        velocity = dataclasses.replace(config.model.velocity, repa_layer=0)
        with_head = Experiment(dataclasses.replace(config, model=dataclasses.replace(config.model, velocity=velocity)))
        head = jax.jit(lambda: with_head.init_params(with_head.build_model())["velocity"]["repa"])()
        flat = traverse_util.flatten_dict({"velocity": {"repa": jax.device_get(head)}}, sep="/")
        entries = [entry for entry in _entries(with_head.config) if entry.ours in flat]
        added |= to_release(entries, traverse_util.unflatten_dict(flat, sep="/"))
        notes = ("a new REPA head was added, which only the release's training uses",)
    return added, notes
