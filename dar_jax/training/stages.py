"""The two stages of training: network, loss, batches and frozen networks of each."""

import contextlib
import dataclasses
from collections.abc import Iterator
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
from dar_jax.data.codes import CodesSource, check_made_by, fingerprint
from dar_jax.data.pipeline import batches
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError, require
from dar_jax.experiment import Experiment, LossFn
from dar_jax.features.dinov2 import Dinov2, Dinov2Config
from dar_jax.features.load import load_dinov2, load_lpips
from dar_jax.features.vgg_lpips import SMALLEST, Lpips
from dar_jax.models.pixels import with_float_image
from dar_jax.parallel import hosts
from dar_jax.sampling.settings import make_settings
from dar_jax.training.checkpoint import Info, Loaded, latest_step, load, save_for_inference
from dar_jax.training.losses import next_token_loss, tokenizer_loss
from dar_jax.training.optimizer import learning_rate, make_optimizer
from dar_jax.training.state import Params
from dar_jax.weights.published import resolve


@dataclass(frozen=True)
class Stage:
    """One stage of training: described, as a plan needs it, or opened, with its data and weights.

    loss_fn: as `make_train_step` takes it, on batches as the data gives them.
    frozen: the parameters, by name, that loss_fn uses and does not train: shapes, or once opened, arrays on the mesh.
    source: the data, once opened; tokenizer: a transformer's, with all that decoding needs.
    """

    experiment: Experiment
    model: nn.Module
    loss_fn: LossFn
    frozen: dict[str, Any]
    source: Any = None
    tokenizer: Loaded | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.source.class_names)

    def init_params(self) -> Params:
        """The parameters before training; they depend on the settings only."""
        return self.experiment.init_params(self.model)

    def make_optimizer(self) -> optax.GradientTransformation:
        """The experiment's optimizer, or the library's."""
        config = self.experiment.config
        return (self.experiment.optimizer or make_optimizer)(config.optimizer, config.train.steps)

    @property
    def schedule(self) -> optax.Schedule | None:
        """The learning rate of the library's optimizer; None for an experiment's own, which need not follow the settings."""
        config = self.experiment.config
        return None if self.experiment.optimizer else learning_rate(config.optimizer, config.train.steps)


def describe(experiment: Experiment, dtype: jnp.dtype, encoder: nn.Module | None = None) -> Stage:
    """A stage of either kind, with matrix products in `dtype`, without its data and weights.

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
        batch = with_float_image(batch)
        if encoder is not None:
            batch["codes"] = encoder.apply({"params": frozen["tokenizer"]}, batch["image"], method="codes")
        if not isinstance(config, TokenizerTraining):
            batch = {**batch, "condition": experiment.condition(batch)}
        return loss(params, batch, key, frozen, step)

    return Stage(experiment, model, loss_fn, frozen)


def open_stage(experiment: Experiment, workdir: epath.Path, mesh: Mesh, before: Info | None) -> Stage:
    """Either stage with its data and weights on the mesh. A transformer's codes are read, or computed within the training step
    by the frozen tokenizer.

    A resumed run of a transformer reads its tokenizer from WORKDIR/tokenizer, see `keep_tokenizer`.

    Args: before, the checkpoint that a resumed run goes on from.

    Raises InputError where the data, the networks of a loss term or the tokenizer cannot be opened or do not fit the model, or
    a resumed run names another tokenizer than its own.
    """
    config, own_copy = experiment.config, workdir / "tokenizer"
    dtype, source = matmul_dtype(config.train.dtype), open_source(config.data, experiment.source)
    tokenizer = encoder = None
    if isinstance(config, TransformerTraining):
        path = own_copy if before else config.tokenizer
        if path is None:
            raise InputError("a transformer needs a trained tokenizer; pass --tokenizer FOLDER")
        tokenizer = load(path, experiment.tokenizer, mesh=mesh)
        if before:
            experiment = _with_own_tokenizer(experiment, before, tokenizer, mesh)
        _check_fit(config, tokenizer, source)
        make_settings(config.sampling, tokenizer.info.config.model, experiment.method)  # what it refuses, it refuses now
        if not isinstance(source, CodesSource):
            encoder = tokenizer.experiment.build_model(dtype)
    stage = describe(experiment, dtype, encoder)
    if config.data.crop == "none" and not isinstance(source, CodesSource):
        shape, expected = np.shape(source[0]["image"]), tuple((encoder or stage.model).data_shape)
        require(shape == expected, f"the images are {list(shape)}, the tokenizer takes {list(expected)}")
    frozen = {} if tokenizer else _feature_networks(config)
    if experiment.frozen is not None:
        frozen |= experiment.frozen(config)
    frozen = parallel.put(frozen, parallel.shardings(frozen, mesh, experiment.rules))
    if encoder is not None:
        frozen["tokenizer"] = tokenizer.params
    return dataclasses.replace(stage, frozen=frozen, source=source, tokenizer=tokenizer)


def keep_tokenizer(stage: Stage, workdir: epath.Path) -> None:
    """Copies a transformer's tokenizer into WORKDIR/tokenizer, unless it is from there, so that the folder alone can be sampled
    from. Raises InputError where another step of a tokenizer is there, which would be read in its place."""
    own_copy, info = workdir / "tokenizer", stage.tokenizer and stage.tokenizer.info
    if info is None or info.workdir.resolve() == own_copy.resolve():
        return
    there = hosts.broadcast_from_first(latest_step(own_copy))
    if there not in (None, info.step):
        raise InputError(
            f"{own_copy} holds a tokenizer of step {there} already, that of {info.workdir} is of step {info.step}; "
            f"delete {own_copy}, or choose another folder"
        )
    save_for_inference(own_copy, info.config, stage.tokenizer.params, info.step, info.class_names, info.hooks)


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
    with contextlib.ExitStack() as open_readers:
        readers = [batches(stage.source, config.data, **settings, host=part, hosts=parts) for part in own]
        for reader in readers:
            open_readers.enter_context(contextlib.closing(reader))
        for rows in zip(*readers):
            joined = rows[0] if len(rows) == 1 else jax.tree.map(lambda *each: np.concatenate(each), *rows)
            yield parallel.global_batch(joined, mesh)


def matmul_dtype(name: str) -> jnp.dtype:
    """The dtype of matrix products that `train.dtype` names; auto: bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _check_terms(config: TokenizerTraining) -> None:
    loss, model, features = config.loss, config.model, Dinov2Config().width
    width = model.velocity.repa_width
    fits = loss.lpips == 0 or model.image_size >= SMALLEST
    require(fits, f"loss.lpips needs images of at least {SMALLEST} pixels; set it to 0")
    fits = loss.repa == 0 or width == features
    require(fits, f"model.velocity.repa_width is {width}, but DINOv2's features have {features} numbers")


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


def _check_fit(config: TransformerTraining, tokenizer: Loaded, source: Any) -> None:
    stored = isinstance(source, CodesSource)
    check_tokenizer(config, tokenizer.info.config, f"the run in {tokenizer.info.workdir}", takes_images=not stored)
    classes = len(source.class_names)
    _require_equal("model.num_classes", config.model.num_classes, "the number of classes of the data is", classes)
    if stored:
        tokens = source.info.tokens
        _require_equal("model.num_tokens", config.model.num_tokens, "the number of stored codes per image is", tokens)
        check_made_by(source, tokenizer.params, tokenizer.info.workdir)


def check_tokenizer(config: TransformerTraining, tokenizer: TokenizerTraining, name: str, takes_images: bool) -> None:
    """Raises InputError where a transformer cannot learn the codes of a tokenizer.

    Args: tokenizer, its settings; name, for messages; takes_images, True where it encodes images in training.
    """
    if not isinstance(tokenizer, TokenizerTraining):
        raise InputError(f"{name} is of a transformer, not of a tokenizer")
    sizes = tokenizer.model
    require(sizes.vq_enable, f"{name} is of a continuous tokenizer (vq_enable is false), which makes no codes")
    model, data = config.model, config.data
    _require_equal("model.vocab_size", model.vocab_size, "the tokenizer's codebook_size is", sizes.codebook_size)
    _require_equal("model.num_tokens", model.num_tokens, "the tokenizer's num_tokens is", sizes.num_tokens)
    if takes_images:
        _require_equal("data.image_size", data.image_size, "the tokenizer's image_size is", sizes.image_size)
        _require_equal("data.channels", data.channels, "the tokenizer's channels are", sizes.channels)


def _require_equal(name: str, value: Any, other: str, expected: Any) -> None:
    require(value == expected, f"{name} is {value}, but {other} {expected}")
