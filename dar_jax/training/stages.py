"""The two stages of training: what to initialise, which loss to minimise on which batch, with which frozen networks."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.config import TokenizerTraining, TransformerTraining
from dar_jax.data.codes import CodesSource, fingerprint
from dar_jax.data.pipeline import batches
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment, LossFn
from dar_jax.features.dinov2 import Dinov2, Dinov2Config
from dar_jax.features.load import load_dinov2, load_lpips
from dar_jax.features.vgg_lpips import SMALLEST, Lpips
from dar_jax.models.pixels import to_float
from dar_jax.training.checkpoint import Info, Loaded, load, save_for_inference
from dar_jax.training.losses import next_token_loss, tokenizer_loss
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.state import Params
from dar_jax.weights.published import resolve


@dataclass(frozen=True)
class Description:
    """One stage without its data and weights: what training compiles, and what a plan needs.

    init_params: makes the parameters; they depend on the seed only.
    loss_fn: as `make_train_step` takes it, on batches as the data gives them.
    frozen: shapes of the parameters, by name, that loss_fn uses and does not train.
    """

    experiment: Experiment
    model: nn.Module
    init_params: Callable[[], Params]
    loss_fn: LossFn
    frozen: dict[str, Any]

    def make_optimizer(self) -> optax.GradientTransformation:
        """The experiment's optimizer, or the library's."""
        config = self.experiment.config
        return (self.experiment.optimizer or make_optimizer)(config.optimizer, config.train.steps)


@dataclass(frozen=True)
class Stage:
    """One stage, ready to train. `frozen`: arrays on the mesh; `tokenizer`: a transformer's, with all that decoding needs."""

    described: Description
    source: Any
    class_names: tuple[str, ...]
    frozen: dict[str, Any]
    tokenizer: Loaded | None

    @property
    def experiment(self) -> Experiment:
        return self.described.experiment

    @property
    def model(self) -> nn.Module:
        return self.described.model


def describe(experiment: Experiment, dtype: jnp.dtype, encoder: nn.Module | None = None) -> Description:
    """A stage of either kind, with matrix products in `dtype`.

    Args: encoder, of a transformer, the tokenizer that computes its codes within the step; None: the data are codes.
    Raises InputError where a setting does not go with the experiment's parts.
    """
    experiment.check()
    config = experiment.config
    model = experiment.build_model(dtype, config.train.remat)
    frozen = {}
    if isinstance(config, TokenizerTraining):
        _check_terms(config)
        frozen = _feature_shapes(config)
    elif encoder is not None:
        frozen = {"tokenizer": jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, *encoder.data_shape)))["params"]}
    if experiment.frozen is not None:
        frozen |= jax.eval_shape(lambda: experiment.frozen(config))
    default = tokenizer_loss if isinstance(config, TokenizerTraining) else next_token_loss
    loss = (experiment.loss or default)(config, model)

    def loss_fn(params: Params, batch: dict, key: jax.Array, frozen: dict, step: jax.Array):
        if "image" in batch:
            batch = {**batch, "image": to_float(batch["image"])}
        if encoder is not None:
            batch["codes"] = encoder.apply({"params": frozen["tokenizer"]}, batch["image"], method="codes")
        if not isinstance(config, TokenizerTraining):
            batch = {**batch, "condition": experiment.condition(batch)}
        return loss(params, batch, key, frozen, step)

    return Description(experiment, model, functools.partial(experiment.init_params, model), loss_fn, frozen)


def open_stage(experiment: Experiment, workdir: epath.Path, mesh: Mesh, before: Info | None) -> Stage:
    """Either stage with its data and weights on the mesh; `before` is the checkpoint that a run goes on from."""
    if isinstance(experiment.config, TokenizerTraining):
        return tokenizer_stage(experiment, mesh)
    return transformer_stage(experiment, workdir, mesh, before)


def tokenizer_stage(experiment: Experiment, mesh: Mesh) -> Stage:
    """Stage 1. Raises InputError where the data or the networks of a loss term cannot be opened."""
    config = experiment.config
    described = describe(experiment, matmul_dtype(config.train.dtype))
    source = (experiment.source or open_source)(config.data)
    frozen = _on_mesh(_feature_networks(config) | _own_frozen(experiment), mesh, experiment.rules)
    return Stage(described, source, tuple(source.class_names), frozen, None)


def transformer_stage(experiment: Experiment, workdir: epath.Path, mesh: Mesh, before: Info | None) -> Stage:
    """Stage 2: codes are read, or computed within the training step by the frozen tokenizer.

    A new run copies its tokenizer into WORKDIR/tokenizer, so that the folder alone can be sampled from; a resumed one reads it
    from there.

    Args: before, the checkpoint that a resumed run goes on from.

    Raises InputError where the data or the tokenizer cannot be opened or do not fit the model, or a resumed run names another
    tokenizer than its own.
    """
    config = experiment.config
    source = (experiment.source or open_source)(config.data)
    own_copy = workdir / "tokenizer"
    path = own_copy if before else config.tokenizer
    if path is None:
        raise InputError("a transformer needs a trained tokenizer; pass --tokenizer FOLDER")
    tokenizer = load(path, experiment.tokenizer, mesh=mesh)
    if before:
        experiment = _with_own_tokenizer(experiment, before, tokenizer, mesh)
    _check_fit(config, tokenizer, source)
    if tokenizer.workdir.resolve() != own_copy.resolve():
        save_for_inference(own_copy, tokenizer.config, tokenizer.params, tokenizer.step, tokenizer.class_names, tokenizer.hooks)

    dtype, stored = matmul_dtype(config.train.dtype), isinstance(source, CodesSource)
    described = describe(experiment, dtype, None if stored else tokenizer.experiment.build_model(dtype))
    frozen = _on_mesh(_own_frozen(experiment), mesh, experiment.rules) | ({} if stored else {"tokenizer": tokenizer.params})
    return Stage(described, source, tuple(source.class_names), frozen, tokenizer)


def _with_own_tokenizer(experiment: Experiment, before: Info, tokenizer: Loaded, mesh: Mesh) -> Experiment:
    """The experiment of a resumed run, with its tokenizer named in the settings. Raises InputError where they name another."""
    named, used = experiment.config.tokenizer, getattr(before.config, "tokenizer", None)
    if named is None:
        return experiment.with_config(dataclasses.replace(experiment.config, tokenizer=used))
    if named != used:
        other = load(named, experiment.tokenizer, mesh=mesh)
        if fingerprint(other.params) != fingerprint(tokenizer.params):
            raise InputError(f"the run in {before.workdir} has another tokenizer than {named}; leave out --tokenizer")
    return experiment


def device_batches(stage: Stage, mesh: Mesh, start_step: int) -> Iterator[dict[str, jax.Array]]:
    """Batches as global arrays, of which every host reads the rows that its devices hold."""
    config = stage.experiment.config
    settings = {"batch_size": config.train.batch_size, "seed": config.train.seed, "start_step": start_step}
    own, parts = parallel.batch_parts(mesh)
    with contextlib.ExitStack() as open_parts:
        readers = [batches(stage.source, config.data, **settings, host=part, hosts=parts) for part in own]
        for reader in readers:
            open_parts.enter_context(contextlib.closing(reader))
        for read in zip(*readers):
            rows = read[0] if len(read) == 1 else {name: np.concatenate([part[name] for part in read]) for name in read[0]}
            yield parallel.global_batch(rows, mesh)


def matmul_dtype(name: str) -> jnp.dtype:
    """The dtype of matrix products that `train.dtype` names; auto: bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _check_terms(config: TokenizerTraining) -> None:
    loss, model = config.loss, config.model
    if loss.lpips != 0 and model.image_size < SMALLEST:
        raise InputError(f"loss.lpips needs images of at least {SMALLEST} pixels; set it to 0")
    if loss.repa != 0 and model.velocity.repa_width != Dinov2Config().width:
        width = model.velocity.repa_width
        raise InputError(f"model.velocity.repa_width is {width}, but DINOv2's features have {Dinov2Config().width} numbers")


def _feature_networks(config: TokenizerTraining) -> dict[str, Any]:
    """The parameters of the frozen networks of the loss terms that have a weight."""
    loss, networks = config.loss, {}
    if loss.lpips != 0:
        networks["lpips"] = load_lpips(*resolve("lpips_vgg16", loss.lpips_weights).files)
    if loss.repa != 0:
        networks["dinov2"] = load_dinov2(*resolve("dinov2_vitb14", loss.dinov2_weights).files, Dinov2Config())
    return networks


def _feature_shapes(config: TokenizerTraining) -> dict[str, Any]:
    """The same as shapes, without any file."""
    images, key, shapes = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32), jax.random.key(0), {}
    if config.loss.lpips != 0:
        shapes["lpips"] = jax.eval_shape(Lpips().init, key, images, images)["params"]
    if config.loss.repa != 0:
        shapes["dinov2"] = jax.eval_shape(Dinov2(Dinov2Config()).init, key, images)["params"]
    return shapes


def _own_frozen(experiment: Experiment) -> dict[str, Any]:
    return {} if experiment.frozen is None else experiment.frozen(experiment.config)


def _on_mesh(networks: dict[str, Any], mesh: Mesh, rules: parallel.Rules) -> dict[str, Any]:
    return parallel.put(networks, parallel.shardings(networks, mesh, rules))


def _check_fit(config: TransformerTraining, tokenizer: Loaded, source: Any) -> None:
    stored = isinstance(source, CodesSource)
    check_tokenizer(config, tokenizer.config, f"the run in {tokenizer.workdir}", takes_images=not stored)
    classes = len(source.class_names)
    _require_equal("model.num_classes", config.model.num_classes, "the number of classes of the data is", classes)
    if stored:
        tokens = source.info.tokens
        _require_equal("model.num_tokens", config.model.num_tokens, "the number of stored codes per image is", tokens)
        if source.info.tokenizer != fingerprint(tokenizer.params):
            raise InputError(f"the codes in {source.folder} were made by another tokenizer than {tokenizer.workdir}")


def check_tokenizer(config: TransformerTraining, made: TokenizerTraining, name: str, takes_images: bool) -> None:
    """Raises InputError where a transformer cannot learn the codes of a tokenizer.

    Args: made, the tokenizer's settings; name, what messages call it; takes_images, whether it encodes images in training.
    """
    if not isinstance(made, TokenizerTraining):
        raise InputError(f"{name} is of a transformer, not of a tokenizer")
    if not made.model.vq_enable:
        raise InputError(f"{name} is of a continuous tokenizer (vq_enable is false), which makes no codes")
    model, data = config.model, config.data
    _require_equal("model.vocab_size", model.vocab_size, "the tokenizer's codebook_size is", made.model.codebook_size)
    _require_equal("model.num_tokens", model.num_tokens, "the tokenizer's num_tokens is", made.model.num_tokens)
    if takes_images:
        _require_equal("data.image_size", data.image_size, "the tokenizer's image_size is", made.model.image_size)
        _require_equal("data.channels", data.channels, "the tokenizer's channels are", made.model.channels)


def _require_equal(what: str, ours: Any, whose: str, theirs: Any) -> None:
    if ours != theirs:
        raise InputError(f"{what} is {ours}, but {whose} {theirs}")
