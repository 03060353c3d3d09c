"""An experiment: settings, and optionally the parts of the method that its file replaces."""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dar_jax.config import DataConfig, TokenizerTraining, TransformerTraining, validate
from dar_jax.errors import InputError
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.parallel import Rules
from dar_jax.training.losses import FeatureLoss

Config = TokenizerTraining | TransformerTraining


@dataclass(frozen=True)
class Experiment:
    """What `dar-jax train FILE` runs: plain settings, and functions for what a fork does its own way (None: the library's).

    config: every setting of the run. InputError is raised where `config.validate` refuses it.
    model: (config.model, dtype, remat) -> the network, with the methods of `Tokenizer` or `Llama`.
    loss: (model, params, batch, key, config) -> (scalar, metrics). The batch is {"image": float32 [B, H, W, C] in
      [-1, 1], "label": int32 [B]} for a tokenizer, {"codes": int32 [B, T], "label": int32 [B]} for a transformer.
    features: further terms of the default tokenizer loss beside those of config.loss, see `objectives.FeatureLoss`.
    source: opens the data, in place of `data.sources.open_source`.
    guidance: (tokens, first, last) -> the guidance scale of every token [T] float32.
    rules: how parameters with names of their own are cut over the mesh, see `parallel.RULES`.
    tokenizer: the experiment of a transformer's tokenizer, needed only where that one has a model of its own.
    """

    config: Config
    model: Callable[[Any, Any, str], nn.Module] | None = None
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
    features: FeatureLoss | None = None
    source: Callable[[DataConfig], Any] | None = None
    guidance: Callable[[int, float, float], jax.Array] | None = None
    rules: Rules = ()
    tokenizer: "Experiment | None" = None

    def __post_init__(self):
        validate(self.config)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the replaced parts; checkpoints record them."""
        return tuple(name for name in ("model", "loss", "features", "source", "guidance") if getattr(self, name) is not None)

    def with_config(self, config: Config) -> "Experiment":
        """The same parts with other settings."""
        return dataclasses.replace(self, config=config)

    def build_model(self, dtype: Any = jnp.float32, remat: str = "none") -> nn.Module:
        """The network of this experiment; `dtype` is that of its matrix products."""
        default = Tokenizer if isinstance(self.config, TokenizerTraining) else Llama
        return (self.model or default)(self.config.model, dtype, remat)

    def init_params(self, model: nn.Module) -> Any:
        """The network's parameters before training; they depend on the settings only."""
        config = self.config.model
        key = jax.random.key(self.config.train.seed)
        if isinstance(self.config, TokenizerTraining):
            return model.init(key, jnp.zeros((1, config.image_size, config.image_size, config.channels)))["params"]
        return model.init(key, jnp.zeros(1, jnp.int32), jnp.zeros((1, config.num_tokens), jnp.int32))["params"]


def load_experiment(path: str | os.PathLike) -> Experiment:
    """Runs an experiment file and returns its `experiment`.

    Raises InputError where the file is missing, fails, or has no `experiment` of the right kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no experiment file {path}")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None:
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that dataclasses and worker processes find the module of what it defines
    try:
        spec.loader.exec_module(module)
    except InputError:
        raise
    except Exception as error:  # whatever a user's file may raise
        line = " ".join(str(error).split())
        raise InputError(f"{path} cannot be run: {type(error).__name__}: {line}") from error
    experiment = getattr(module, "experiment", None)
    if not isinstance(experiment, Experiment):
        raise InputError(f"{path} defines no `experiment` (a dar_jax.experiment.Experiment)")
    return experiment
