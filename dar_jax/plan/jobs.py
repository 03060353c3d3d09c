"""The functions that are planned, traced on shapes alone: the training step, or the sampler, of an experiment.

No data is opened and no weights are read.
"""

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import ShapeDtypeStruct
from jax.sharding import Mesh, NamedSharding

from dar_jax import parallel
from dar_jax.config import TokenizerTraining
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.sampling.sampler import generate
from dar_jax.sampling.settings import Networks, make_settings
from dar_jax.training import checkpoint
from dar_jax.training.stages import check_tokenizer, describe
from dar_jax.training.state import abstract_state
from dar_jax.training.step import make_train_step


@dataclass(frozen=True)
class Job:
    """A traced function.

    parameters: number of the trained or sampled networks' parameters. memory: bytes on one device of its arguments by name.
    notes: where it differs from a real run.
    """

    traced: jax.stages.Traced
    parameters: int
    memory: dict[str, float]
    notes: tuple[str, ...] = ()


def training_job(experiment: Experiment, mesh: Mesh) -> Job:
    """The training step of either stage. A transformer without a tokenizer learns from stored codes.

    Raises InputError where the settings contradict each other or the batch cannot be spread over the mesh.
    """
    config, train = experiment.config, experiment.config.train
    parallel.check_batch(train.batch_size, train.accumulate, mesh)
    learns_codes, stored = not isinstance(config, TokenizerTraining), config.data.source == "codes"
    tokenizer = find_tokenizer(experiment, takes_images=True) if learns_codes and not stored else None
    stage = describe(experiment, dtype_of(experiment), tokenizer and model_of(tokenizer))
    optimizer, rules = stage.make_optimizer(), (*experiment.rules, *(tokenizer.rules if tokenizer else ()))
    frozen = parallel.placed(stage.frozen, parallel.shardings(stage.frozen, mesh, rules))
    batch = {"label": ShapeDtypeStruct((train.batch_size,), jnp.int32)}
    if learns_codes and tokenizer is None:
        batch["codes"] = ShapeDtypeStruct((train.batch_size, config.model.num_tokens), jnp.int32)
    else:
        size, channels = config.data.image_size, config.data.channels
        batch["image"] = ShapeDtypeStruct((train.batch_size, size, size, channels), jnp.uint8)
    with jax.set_mesh(mesh):
        state = abstract_state(stage.init_params, optimizer, mesh, experiment.rules)
        step = make_train_step(stage.loss_fn, optimizer, config, state, mesh)
        traced = step.trace(state, with_sharding(batch, parallel.batch_sharding(mesh)), frozen)
    arguments = {"parameters": state.params, "average": state.ema, "optimizer": state.opt_state, "frozen": frozen}
    notes = ()
    if "codes" in batch and not stored:
        notes = ("codes are taken as stored; to plan their computation in the step, pass --tokenizer",)
    return Job(traced, count(state.params), {name: bytes_on_device(tree) for name, tree in arguments.items()}, notes)


def sampling_job(experiment: Experiment, mesh: Mesh) -> Job:
    """The sampler with the experiment's sampling settings, for a batch of `train.batch_size`.

    Raises InputError for a tokenizer's experiment, for a transformer's that does not know its tokenizer, and where the batch
    cannot be spread over the mesh.
    """
    if isinstance(experiment.config, TokenizerTraining):
        raise InputError("sampling needs the experiment of a transformer, this one is of a tokenizer")
    tokenizer = find_tokenizer(experiment, takes_images=False)
    if tokenizer is None:
        raise InputError("sampling needs the tokenizer too; pass --tokenizer with its experiment file or a checkpoint")
    batch_size = experiment.config.train.batch_size
    parallel.check_batch(batch_size, 1, mesh)
    networks = Networks(model_of(tokenizer), model_of(experiment), experiment.method)
    settings = make_settings(experiment.config.sampling, networks.tokenizer.config, networks.method)
    params = {}
    for name, stage in (("tokenizer", tokenizer), ("transformer", experiment)):
        shapes = jax.eval_shape(functools.partial(stage.init_params, getattr(networks, name)))
        params[name] = parallel.placed(shapes, parallel.shardings(shapes, mesh, stage.rules))
    condition = jax.eval_shape(experiment.condition, {"label": ShapeDtypeStruct((batch_size,), jnp.int32)})
    seeds = ShapeDtypeStruct((batch_size,), jnp.uint32)
    with jax.set_mesh(mesh):
        settings = with_sharding(jax.eval_shape(lambda: settings), parallel.replicated(mesh))
        condition, seeds = with_sharding((condition, seeds), parallel.batch_sharding(mesh))
        traced = jax.jit(generate, static_argnums=0).trace(networks, params, settings, condition, seeds)
    notes = ("how many passes guesses save depends on the tokens; one for each group is counted",) * bool(settings.speculate)
    return Job(traced, count(params), {"parameters": bytes_on_device(params)}, notes)


def find_tokenizer(experiment: Experiment, takes_images: bool) -> Experiment | None:
    """The experiment of a transformer's tokenizer, which `config.tokenizer` names by a checkpoint or by an experiment file;
    None where it names none. Raises InputError where there is no such file, or it does not fit the transformer, as
    `stages.check_tokenizer` says."""
    path = experiment.config.tokenizer
    if path is None:
        tokenizer = experiment.tokenizer
    elif os.fspath(path).endswith(".py"):
        tokenizer = load_experiment(path)
    else:
        config = checkpoint.inspect(path).config
        tokenizer = experiment.tokenizer.with_config(config) if experiment.tokenizer else Experiment(config)
    if tokenizer is not None:
        check_tokenizer(experiment.config, tokenizer.config, path or "the experiment's tokenizer", takes_images)
    return tokenizer


def dtype_of(experiment: Experiment) -> jnp.dtype:
    """The dtype of matrix products on accelerators, whatever this machine has."""
    name = experiment.config.train.dtype
    return jnp.dtype("bfloat16" if name == "auto" else name)


def model_of(experiment: Experiment) -> nn.Module:
    """The experiment's network as accelerators compute it."""
    return experiment.build_model(dtype_of(experiment))


def with_sharding(tree: Any, sharding: NamedSharding) -> Any:
    """A tree of shapes, all with one sharding."""
    return jax.tree.map(lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def count(tree: Any) -> int:
    """The number of parameters in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_on_device(tree: Any) -> float:
    """What a tree of sharded shapes takes on one device."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))
