"""Checkpoints in use: networks and their weights, on the devices.

A transformer's folder holds its tokenizer in the sub-folder `tokenizer`, so it also serves where a tokenizer is needed.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax.core import FrozenDict
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.config import MeshConfig, TokenizerConfig, TokenizerTraining
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.parallel.batches import full_batch
from dar_jax.sampling.prepare import SamplerParams, prepare, separate
from dar_jax.sampling.settings import Method, Networks
from dar_jax.training import checkpoint
from dar_jax.training.stages import check_tokenizer, matmul_dtype

log = logging.getLogger("dar_jax.evaluation")

Weights = Literal["ema", "params"]
T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """A checkpoint in use: networks with their weights on a mesh, as the sampler takes them.

    info: of the run, None for one that is still training. params: {"tokenizer": ..., "transformer": ..., "others": ...}.
    decoder_mesh: separate devices that denoise samples, see `prepare.separate`.
    """

    info: checkpoint.Info | None
    class_names: tuple[str, ...]
    networks: Networks
    params: dict[str, Any]
    mesh: Mesh
    decoder_mesh: Mesh | None = None

    @property
    def config(self) -> TokenizerConfig:
        """The tokenizer's sizes."""
        return self.networks.tokenizer.config

    def full_batch(self, size: int) -> int:
        """`size` rounded up to a multiple of the devices that share a batch."""
        return full_batch(size, self.mesh, self.decoder_mesh or self.mesh)

    @functools.cached_property
    def sampler_params(self) -> SamplerParams:
        """The parameters as the sampler reads them, prepared at the first use."""
        with jax.set_mesh(self.mesh):
            params = prepare(self.networks, self.params)
        return params if self.decoder_mesh is None else separate(params, self.decoder_mesh)

    def with_tokenizer(self, config: TokenizerConfig) -> "Trained":
        """The same weights in a tokenizer of other settings; only its resolutions may differ."""
        tokenizer = self.networks.tokenizer.clone(config=config)
        return dataclasses.replace(self, networks=dataclasses.replace(self.networks, tokenizer=tokenizer))


def inspect_transformer(path: str | os.PathLike) -> checkpoint.Info:
    """`checkpoint.inspect` of a transformer that has its tokenizer. Raises InputError for a tokenizer alone, and for two stages
    that do not fit each other."""
    info = checkpoint.inspect(path)
    if info.is_tokenizer:
        raise InputError(f"{path} holds a tokenizer; sampling needs the folder of a transformer's run")
    check_tokenizer(info.config, info.tokenizer.config, f"the run in {info.tokenizer.workdir}", takes_images=False)
    return info


def load_tokenizer(
    path: str | os.PathLike, experiment: Experiment | None = None, weights: Weights = "ema", mesh: Mesh | None = None
) -> Trained:
    """The tokenizer of a checkpoint of either stage.

    Args:
      experiment: that of the checkpoint's run, needed if it had replaced the model.
      weights: of a tokenizer's own run; a transformer's folder holds only the moving average of its tokenizer.
      mesh: where the weights go; None: that of `run_mesh`.

    Raises InputError where the checkpoint is missing, damaged, or needs its experiment.
    """
    info = checkpoint.inspect(path)
    weights = weights if info.is_tokenizer else "ema"
    mesh = mesh or run_mesh(info.tokenizer.config.mesh)
    network, params = _load(info.tokenizer.path, tokenizer_part(experiment), weights, mesh)
    method = experiment.method if experiment else Method()
    return Trained(info, info.class_names, Networks(network, method=method), {"tokenizer": params}, mesh)


def load_sampler(
    path: str | os.PathLike,
    experiment: Experiment | None = None,
    weights: Weights = "ema",
    mesh: Mesh | None = None,
    decoder_mesh: Mesh | None = None,
) -> Trained:
    """Both stages of a transformer's checkpoint. Arguments as of `load_tokenizer`; `weights` are the transformer's.

    With a `decoder_mesh`, whose devices are not those of `mesh`, samples are denoised there, see `prepare.separate`.

    Raises InputError where the checkpoint is missing, damaged, a tokenizer's, or needs its experiment.
    """
    info = inspect_transformer(path)
    mesh = mesh or run_mesh(info.config.mesh)
    transformer, transformer_params = _load(info.path, experiment, weights, mesh)
    tokenizer, tokenizer_params = _load(info.tokenizer.path, tokenizer_part(experiment), "ema", mesh)
    parts = experiment or Experiment(info.config)
    others = {name: _load(folder, None, "ema", mesh) for name, folder in parts.others.items()}
    modules = FrozenDict({name: module for name, (module, _) in others.items()})
    networks = Networks(tokenizer, transformer, parts.method, parts.condition, modules)
    params = {"tokenizer": tokenizer_params, "transformer": transformer_params}
    params |= {"others": {name: weights for name, (_, weights) in others.items()}}
    return Trained(info, info.class_names, networks, params, mesh, decoder_mesh)


def unless_missing(load: Callable[[], T], path: str | None = None) -> T | None:
    """The weights that `load` reads; None, with a warning, where they are missing and no `path` was asked for."""
    try:
        return load()
    except InputError as error:
        if path is not None:
            raise
        log.warning("not evaluated: %s", error)
        return None


def run_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh for using the weights of a run: `tensor` as there, the other devices along `data`, where that fits the devices
    (default: all).

    Nothing is sharded over `fsdp`, which would gather all weights for every token.
    """
    try:
        return parallel.make_mesh(MeshConfig(data=1 if config.tensor == -1 else -1, tensor=config.tensor), devices)
    except InputError as error:
        log.info("%s; using all of them along data", error)
        return parallel.make_mesh(MeshConfig(), devices)


def seeds_from(first: int, count: int) -> np.ndarray:
    """The seeds first, first + 1, ...: uint32 [count]. Raises InputError where one is not in [0, 2**32)."""
    if not 0 <= first <= 2**32 - count:
        raise InputError(f"the seeds {first} .. {first + count - 1} are not all between 0 and 2**32 - 1")
    return np.arange(first, first + count).astype(np.uint32)


def _load(path: str | os.PathLike, experiment: Experiment | None, weights: Weights, mesh: Mesh) -> tuple[Any, Any]:
    loaded = checkpoint.load(path, experiment, weights, mesh)
    return loaded.experiment.build_model(matmul_dtype(loaded.info.config.train.dtype)), loaded.params


def tokenizer_part(experiment: Experiment | None) -> Experiment | None:
    """The tokenizer's experiment, given that of either stage."""
    if experiment is None or isinstance(experiment.config, TokenizerTraining):
        return experiment
    return experiment.tokenizer
