"""The functions that are planned, traced on shapes alone: the training step, or the sampler, of an experiment.

No data is opened and no weights are read.
"""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.config import TokenizerTraining
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.sampling.sampler import generate
from dar_jax.sampling.settings import Networks, make_settings
from dar_jax.training import checkpoint
from dar_jax.training.stages import check_tokenizer, describe
from dar_jax.training.state import Params, abstract_state
from dar_jax.training.step import make_train_step


@dataclass(frozen=True)
class Job:
    """A traced function.

    parameters: number of the networks' own, frozen ones left out. memory: bytes on one device of its arguments by name. notes:
    where it differs from a real run.
    """

    traced: jax.stages.Traced
    parameters: int
    memory: dict[str, float]
    notes: tuple[str, ...] = ()


def make_job(experiment: Experiment, mesh: Mesh, sampling: bool) -> Job:
    """The training step of an experiment, or its sampler; of `train.batch_size` images. Errors as of the two."""
    return (sampling_job if sampling else training_job)(experiment, mesh)


def find_tokenizer(experiment: Experiment, takes_images: bool) -> Experiment | None:
    """The experiment of a transformer's tokenizer, which `config.tokenizer` names by a checkpoint or by an experiment file;
    None where it names none. Raises InputError where there is no such file, or it does not fit the transformer, as
    `stages.check_tokenizer` says."""
    path = experiment.config.tokenizer
    if path is None:
        found = experiment.tokenizer
    elif os.fspath(path).endswith(".py"):
        found = load_experiment(path)
    else:
        config = checkpoint.inspect(path).config
        found = experiment.tokenizer.with_config(config) if experiment.tokenizer else Experiment(config)
    if found is not None:
        check_tokenizer(experiment.config, found.config, path or "the experiment's tokenizer", takes_images)
    return found


def for_accelerators(experiment: Experiment) -> Experiment:
    """The experiment with the dtype that it would have on accelerators, not that of this machine."""
    train = experiment.config.train
    if train.dtype != "auto":
        return experiment
    return experiment.with_config(dataclasses.replace(experiment.config, train=dataclasses.replace(train, dtype="bfloat16")))


def training_job(experiment: Experiment, mesh: Mesh) -> Job:
    """The training step of either stage. A transformer without a tokenizer learns from stored codes.

    Raises InputError where the settings contradict each other or the batch cannot be spread over the mesh.
    """
    experiment = for_accelerators(experiment)
    config, train = experiment.config, experiment.config.train
    parallel.check_batch(train.batch_size, train.accumulate, mesh)
    tokenizer = None
    if not isinstance(config, TokenizerTraining) and config.data.source != "codes":
        tokenizer = find_tokenizer(experiment, takes_images=True)
    encoder = None
    if tokenizer is not None:
        tokenizer = for_accelerators(tokenizer)
        encoder = tokenizer.build_model(jnp.dtype(tokenizer.config.train.dtype))
    stage = describe(experiment, jnp.dtype(train.dtype), encoder)
    codes = encoder is None and not isinstance(config, TokenizerTraining)
    image = ((config.data.image_size, config.data.image_size, config.data.channels), jnp.uint8)
    inputs = {"codes": ((config.model.num_tokens,), jnp.int32)} if codes else {"image": image}
    optimizer, rules = stage.make_optimizer(), (*experiment.rules, *(tokenizer.rules if tokenizer else ()))
    frozen = placed(stage.frozen, mesh, rules)
    with jax.set_mesh(mesh):
        state = abstract_state(stage.init_params, optimizer, mesh, experiment.rules)
        step = make_train_step(stage.loss_fn, optimizer, config, state, mesh)
        traced = step.trace(state, batch_of(train.batch_size, {**inputs, "label": ((), jnp.int32)}, mesh), frozen)
    memory = {
        "parameters": bytes_on_device(state.params),
        "average": bytes_on_device(state.ema),
        "optimizer": bytes_on_device(state.opt_state),
        "frozen": bytes_on_device(frozen),
    }
    notes = ("codes are taken as stored; to plan their computation in the step, pass --tokenizer",)
    return Job(traced, count(state.params), memory, notes if codes and config.data.source != "codes" else ())


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
    stages = {"tokenizer": for_accelerators(tokenizer), "transformer": for_accelerators(experiment)}
    models = {name: stage.build_model(jnp.dtype(stage.config.train.dtype)) for name, stage in stages.items()}
    networks = Networks(**models, method=experiment.method)
    settings = make_settings(experiment.config.sampling, networks.tokenizer.config, networks.method)
    params = {name: placed(parameters(stage, getattr(networks, name)), mesh, stage.rules) for name, stage in stages.items()}
    with jax.set_mesh(mesh):
        settings = jax.eval_shape(lambda: settings)
        settings = parallel.placed(settings, jax.tree.map(lambda _: parallel.replicated(mesh), settings))
        inputs = batch_of(batch_size, {"label": ((), jnp.int32), "seeds": ((), jnp.uint32)}, mesh)
        condition = jax.eval_shape(experiment.condition, {"label": inputs["label"]})
        condition = parallel.placed(condition, jax.tree.map(lambda _: parallel.batch_sharding(mesh), condition))
        whole = jax.jit(generate, static_argnums=0)
        traced = whole.trace(networks, params, settings, condition, inputs["seeds"])
    return Job(traced, count(params), {"parameters": bytes_on_device(params)})


def parameters(experiment: Experiment, model: Any) -> Params:
    """Shapes of a network's parameters."""
    return jax.eval_shape(functools.partial(experiment.init_params, model))


def placed(shapes: Params, mesh: Mesh, rules: parallel.Rules = ()) -> Params:
    """Shapes of parameters with their places on the mesh."""
    return parallel.placed(shapes, parallel.shardings(shapes, mesh, rules))


def batch_of(size: int, arrays: dict[str, tuple[tuple[int, ...], Any]], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of so many elements, given the shape and dtype of one, on the mesh."""
    sharding = parallel.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=sharding) for name, (shape, dtype) in arrays.items()}


def count(tree: Any) -> int:
    """The number of parameters in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def bytes_on_device(tree: Any) -> float:
    """What a tree of placed shapes takes on one device."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))
