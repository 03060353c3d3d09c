"""An experiment: settings, and optionally the parts of the method that its file replaces (docs/forking.md shows each)."""

import dataclasses
import functools
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from dar_jax.config import DataConfig, OptimizerConfig, TokenizerTraining, TransformerTraining, validate
from dar_jax.errors import InputError, one_line, require
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.parallel import Rules
from dar_jax.sampling.settings import Condition, Method, label_of

Config = TokenizerTraining | TransformerTraining

# (params, batch, key, frozen, step) -> (scalar loss, metrics)
LossFn = Callable[[Any, dict[str, Any], jax.Array, dict[str, Any], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

ALWAYS_READ = ("optimizer.ema_decay",)  # by the training step
# What only the library's own part reads: (part, section of the settings, names in it; none: all of them).
VOID = (("loss", "loss", ()), ("optimizer", "optimizer", ()), ("frozen", "loss", ("lpips_weights", "dinov2_weights")))


@dataclass(frozen=True)
class Experiment:
    """What `dar-jax train FILE` runs: plain settings, and functions for what a fork does its own way (None: the library's).

    config: every setting of the run; `config.fork` is a dictionary for settings of the fork's own. InputError is raised where
      `config.validate` refuses it.
    model: (config, dtype, remat) -> the network, with the methods of `Tokenizer` or `Llama`; config.model has its sizes.
    loss: (config, model) -> a `LossFn` (params, batch, key, frozen, step) -> (scalar, metrics); those of `training.losses` are
      such. The batch has what the source's elements have, images as float32 in [-1, 1], and for a transformer "codes" int32
      [B, T] and "condition"; `step` is the number of steps done.
    frozen: config -> parameters by name that the loss reads and that are not trained, beside those of `training.losses`.
    optimizer: (config.optimizer, train.steps) -> an optax transformation.
    source: opens the data, in place of `data.sources.open_source`.
    condition: batch -> what the transformer is conditioned on, any tree of arrays with the batch first. In sampling the batch
      has "label", and what `--condition-file` or `--condition-image` give.
    method: the parts of sampling, see `Method`.
    others: further networks for the predictor, by name: the folders of their runs. See `Networks.others`.
    rules: how parameters with names of their own are sharded, see `parallel.RULES`.
    reads: settings that replaced parts read although they belong to the library's, such as "optimizer." or "loss.lpips".
    tokenizer: the experiment of a transformer's tokenizer, needed only where that one has a model of its own.
    """

    config: Config
    model: Callable[[Config, Any, str], nn.Module] | None = None
    loss: Callable[[Config, nn.Module], LossFn] | None = None
    frozen: Callable[[Config], dict[str, Any]] | None = None
    optimizer: Callable[[OptimizerConfig, int], optax.GradientTransformation] | None = None
    source: Callable[[DataConfig], Any] | None = None
    condition: Condition = label_of
    method: Method = Method()
    others: Mapping[str, str] = field(default_factory=dict)
    rules: Rules = ()
    reads: tuple[str, ...] = ()
    tokenizer: "Experiment | None" = None

    def __post_init__(self):
        validate(self.config)
        require(not isinstance(self.reads, str), f"Experiment(reads=...) should be a tuple of names: ({self.reads!r},)")
        pairs = not any(isinstance(rule, str) for rule in self.rules)
        require(pairs, "Experiment(rules=...) should be a tuple of pairs: ((pattern, PartitionSpec), ...)")

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the replaced parts; checkpoints record them."""
        own = ("model", "loss", "frozen", "optimizer", "source")
        names = [name for name in own if getattr(self, name) is not None]
        names += ["condition"] * (self.condition is not label_of) + ["others"] * bool(self.others)
        return (*names, *(f"method.{name}" for name in self.method.replaced))

    def with_config(self, config: Config) -> "Experiment":
        """The same parts with other settings. A fork's own that they lack stay; InputError for one that this fork has not."""
        if unknown := [name for name in config.fork if name not in self.config.fork]:
            raise InputError(
                f"fork.{unknown[0]} is no setting of this experiment, which has {', '.join(self.config.fork) or 'none'}"
            )
        return dataclasses.replace(self, config=dataclasses.replace(config, fork={**self.config.fork, **config.fork}))

    def check(self) -> None:
        """Raises InputError where a setting is changed that a replaced part makes void, so that none is silently ignored."""
        for part, section, names in VOID:
            values = getattr(self.config, section, None)
            if getattr(self, part) is None or values is None:
                continue
            for name in names or vars(values):
                path, value = f"{section}.{name}", getattr(values, name)
                usual = (type(values)(), getattr(type(self.config)(), section))  # a stage has defaults of its own
                default = getattr(usual[-1], name)
                if value not in [getattr(each, name) for each in usual] and not path.startswith((*ALWAYS_READ, *self.reads)):
                    raise InputError(
                        f"{path} is {value}, but this experiment replaces its {part}, which does not read it; "
                        f"leave it at {default} (or name it in Experiment(reads=...))"
                    )

    def build_model(self, dtype: Any = jnp.float32, remat: str = "none") -> nn.Module:
        """The network of this experiment; `dtype` is that of its matrix products."""
        if self.model is not None:
            return self.model(self.config, dtype, remat)
        if isinstance(self.config, TokenizerTraining):
            return Tokenizer(self.config.model, dtype, remat)
        return Llama(self.config.model, dtype, remat)

    def init_params(self, model: nn.Module) -> Any:
        """The network's parameters before training; they depend on the settings only."""
        key = jax.random.key(self.config.train.seed)
        if isinstance(self.config, TokenizerTraining):
            return _init(model, key, jnp.zeros((1, *model.data_shape)))
        try:
            condition = self.condition({"label": jnp.zeros(1, jnp.int32)})
        except KeyError as error:
            raise InputError(f"the experiment's condition needs {error}; given labels alone, it has to do without") from error
        return _init(model, key, condition, jnp.zeros((1, self.config.model.num_tokens), jnp.int32))


@functools.partial(jax.jit, static_argnums=0)  # traced once for shapes, shardings and values
def _init(model: nn.Module, key: jax.Array, *inputs: Any) -> Any:
    return model.init(key, *inputs)["params"]


def load_experiment(path: str | os.PathLike) -> Experiment:
    """Runs an experiment file and returns its `experiment`, or of FILE:NAME the experiment called NAME.

    Raises InputError where the file is missing, fails, or has no such experiment.
    """
    file, name = os.fspath(path), "experiment"
    if not os.path.exists(file) and ":" in file:
        file, name = file.rsplit(":", 1)
    module = _run(Path(file))
    experiment = getattr(module, name, None)
    if not isinstance(experiment, Experiment):
        names = [f"{file}:{other}" for other, value in vars(module).items() if isinstance(value, Experiment)]
        hint = f"give one of {', '.join(names)}" if names else "it should be a dar_jax.experiment.Experiment"
        raise InputError(f"{file} defines no `{name}`; {hint}")
    return experiment


class _NotCached(importlib.machinery.SourceFileLoader):
    """Without `__pycache__`, which takes a file of the same second and size for the one before, and is left in its folder."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _run(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise InputError(f"there is no experiment file {path}")
    loader = _NotCached(f"experiment_{path.stem}", str(path))
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    if spec is None or path.suffix != ".py":
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and worker processes find the module of what it defines
    if (folder := str(path.parent.absolute())) not in sys.path:
        sys.path.append(folder)  # it may import files beside it, as scripts do
    try:
        loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:  # whatever a user's file may raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f", line {lines[-1]}," if lines else ""
        raise InputError(f"{path}{place} cannot be run: {type(error).__name__}: {one_line(error)}") from error
    return module
