"""The two stages of training: what to initialise, which loss to minimise on which batch, with which frozen networks."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.config import TokenizerTraining, TransformerTraining
from dar_jax.data.codes import CodesSource, fingerprint
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.features.dinov2 import Dinov2Config
from dar_jax.features.load import load_dinov2, load_lpips
from dar_jax.features.vgg_lpips import SMALLEST
from dar_jax.models.discriminator import Discriminator
from dar_jax.models.pixels import to_float
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.training.checkpoint import Info, Loaded, load, save_for_inference
from dar_jax.training.losses import adversarial_terms, feature_terms, next_token_loss, tokenizer_loss
from dar_jax.training.state import DISCRIMINATOR, Params, without_discriminator
from dar_jax.training.step import LossFn
from dar_jax.weights.published import resolve


@dataclass(frozen=True)
class Stage:
    """One stage, ready to train.

    init_params: makes the parameters; they depend on the seed only.
    loss_fn: as `make_train_step` takes it, on batches as the data gives them.
    frozen: parameters that loss_fn uses and does not train.
    tokenizer: of a transformer; its weights with all that is needed to decode samples.
    """

    experiment: Experiment
    model: nn.Module
    source: Any
    class_names: tuple[str, ...]
    init_params: Callable[[], Params]
    loss_fn: LossFn
    frozen: Params
    tokenizer: Loaded | None


def tokenizer_stage(experiment: Experiment, mesh: Mesh) -> Stage:
    """Stage 1. Raises InputError where the data or the networks of a loss term cannot be opened."""
    config = experiment.config
    check_terms(experiment)
    model = experiment.build_model(matmul_dtype(config.train.dtype), config.train.remat)
    source = (experiment.source or open_source)(config.data)
    frozen = {} if experiment.loss else _feature_networks(config, mesh)
    init_params, loss_fn = functools.partial(tokenizer_params, experiment, model), tokenizer_loss_fn(experiment, model)
    return Stage(experiment, model, source, tuple(source.class_names), init_params, loss_fn, frozen, None)


def check_terms(experiment: Experiment) -> None:
    """Raises InputError where a term of the tokenizer's loss does not go with the experiment."""
    loss, model = experiment.config.loss, experiment.config.model
    if experiment.loss is not None:
        if loss.gan != 0:
            raise InputError("loss.gan is a part of the library's loss, which this experiment replaces; set it to 0")
        return
    if loss.lpips != 0 and model.image_size < SMALLEST:
        raise InputError(f"loss.lpips needs images of at least {SMALLEST} pixels; set it to 0")
    if loss.repa != 0 and model.velocity.repa_width != Dinov2Config().width:
        width = model.velocity.repa_width
        raise InputError(f"model.velocity.repa_width is {width}, but DINOv2's features have {Dinov2Config().width} numbers")


def tokenizer_params(experiment: Experiment, model: nn.Module) -> Params:
    """What stage 1 trains: the tokenizer and, for a GAN, its discriminator; from the settings only."""
    config, params = experiment.config, experiment.init_params(model)
    if config.loss.gan == 0:
        return params
    images = jnp.zeros((1, config.model.image_size, config.model.image_size, config.model.channels))
    key = jax.random.fold_in(jax.random.key(config.train.seed), 1)
    return {**params, DISCRIMINATOR: _discriminator(config, jnp.float32).init(key, images)["params"]}


def tokenizer_loss_fn(experiment: Experiment, model: nn.Module) -> LossFn:
    """The loss of stage 1 on batches of uint8 images; the frozen parameters are those of `objectives.feature_terms`."""
    config = experiment.config

    def loss_fn(params: Params, batch: dict, key: jax.Array, frozen: Params, step: jax.Array):
        images = to_float(batch["image"])
        if experiment.loss is not None:
            return experiment.loss(model, params, {**batch, "image": images}, key, config)
        features = [experiment.features] if experiment.features else []
        if frozen:
            features.append(feature_terms(frozen, config.loss, model.dtype))
        if config.loss.gan != 0:
            opponent = _discriminator(config, model.dtype)
            features.append(adversarial_terms(opponent, params[DISCRIMINATOR], config.loss, step))
        return tokenizer_loss(model, without_discriminator(params), images, key, config.loss, features)

    return loss_fn


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

    dtype = matmul_dtype(config.train.dtype)
    model = experiment.build_model(dtype, config.train.remat)
    encoder = tokenizer.experiment.build_model(dtype)
    init_params, loss_fn = functools.partial(experiment.init_params, model), transformer_loss_fn(experiment, model, encoder)
    frozen = {} if isinstance(source, CodesSource) else tokenizer.params
    return Stage(experiment, model, source, tuple(source.class_names), init_params, loss_fn, frozen, tokenizer)


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


def transformer_loss_fn(experiment: Experiment, model: nn.Module, encoder: Tokenizer | None = None) -> LossFn:
    """The loss of stage 2 on batches of codes, or of uint8 images, whose codes come from `encoder` with frozen parameters."""
    loss = experiment.loss or _transformer_loss

    def loss_fn(params: Params, batch: dict, key: jax.Array, frozen: Params, step: jax.Array):
        if "image" in batch:
            codes = encoder.apply({"params": frozen}, to_float(batch["image"]), method="codes")
            batch = {"codes": codes, "label": batch["label"]}
        return loss(model, params, batch, key, experiment.config)

    return loss_fn


def matmul_dtype(name: str) -> jnp.dtype:
    """The dtype of matrix products that `train.dtype` names; auto: bfloat16 on accelerators, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _feature_networks(config: TokenizerTraining, mesh: Mesh) -> Params:
    """The frozen networks of the loss terms that have a weight, on the mesh."""
    loss, networks = config.loss, {}
    if loss.lpips != 0:
        networks["lpips"] = load_lpips(*resolve("lpips_vgg16", loss.lpips_weights).files)
    if loss.repa != 0:
        networks["dinov2"] = load_dinov2(*resolve("dinov2_vitb14", loss.dinov2_weights).files, Dinov2Config())
    return parallel.put(networks, parallel.shardings(networks, mesh))


def _discriminator(config: TokenizerTraining, dtype: jnp.dtype) -> Discriminator:
    return Discriminator(config.loss.gan_width, config.loss.gan_halvings, dtype)


def _transformer_loss(model: nn.Module, params: Params, batch: dict, key: jax.Array, config: TransformerTraining):
    return next_token_loss(model, params, batch["codes"], batch["label"], key)


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
