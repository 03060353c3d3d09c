"""The two training losses: the tokenizer's (paper section 3.2) and next-token prediction (paper section 3.3).

Each is a function (config, model) -> `LossFn`, and can be a part of an experiment's own loss.
Shapes: B batch, H W pixels, C channels, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dar_jax.config import TokenizerLossConfig, TokenizerTraining, TransformerTraining
from dar_jax.errors import require
from dar_jax.experiment import LossFn
from dar_jax.features.dinov2 import Dinov2, Dinov2Config, preprocess
from dar_jax.features.vgg_lpips import Lpips
from dar_jax.models.flow import over_batch
from dar_jax.models.tokenizer import Tokenizer, TokenizerOutput
from dar_jax.models.transformer import Llama

Metrics = dict[str, Array]
Params = Any

# (params, images [B, H, W, C] in [-1, 1], output, frozen, step) -> named scalars that are added to the loss
Term = Callable[[Params, Array, TokenizerOutput, dict[str, Any], Array], Metrics]


def tokenizer_loss(config: TokenizerTraining, model: Tokenizer, terms: Sequence[Term] = ()) -> LossFn:
    """Flow matching, the quantizer's own terms, LPIPS and REPA where they have a weight, and further `terms`.

    A time (of the model's path) and noise are drawn for every image. The metrics are the loss and its terms as scalars;
    "code_counts" [V] int32 counts how often each code was used. `frozen` has "lpips" and "dinov2" where these have a weight.
    """
    if config.loss.lpips != 0 or config.loss.repa != 0:
        terms = (feature_terms(config.loss, model.dtype), *terms)
    return_repa = bool(terms) and model.config.velocity.has_repa
    weight = flow_weight(config, model)

    def loss_fn(params: Params, batch: dict[str, Array], key: Array, frozen: dict, step: Array) -> tuple[Array, Metrics]:
        images = batch["image"]
        time_key, noise_key = jax.random.split(key)
        times = model.path.draw(time_key, (len(images),))
        noise = jax.random.normal(noise_key, images.shape)
        output = model.apply({"params": params}, images, times, noise, return_repa)
        values = tokenizer_terms(model, params, output, config.loss, weight and weight(output.times, step))
        for term in terms:
            values = _joined(values, term(params, images, output, frozen, step))
        loss = sum(values.values())
        metrics = {"loss": loss, **values}
        if output.quantized.codes is not None:
            metrics["code_counts"] = jnp.bincount(output.quantized.codes.reshape(-1), length=model.config.codebook_size)
        return loss, metrics

    return loss_fn


def flow_weight(config: TokenizerTraining, model: Tokenizer) -> Callable[[Array, Array], Array] | None:
    """(t' [B], step) -> the weight [B] of each image's flow loss, None where all count alike.

    It is (1 - t')^p over its mean, with p from `loss.flow_power` to `loss.final_flow_power` over the run. On the straight path
    the error of the image is (1 - t') times that of the velocity: p = 2 measures images. Raises InputError where the path has a
    weight of its own.
    """
    first, last, path = config.loss.flow_power, config.loss.final_flow_power, model.path
    last = first if last is None else last
    if path.weight is not None:
        require(first == last == 0, "the path of this tokenizer weighs times itself; leave loss.flow_power at 0")
        return lambda times, step: path.weight(times)
    if first == last == 0:
        return None
    drawn = path.shift(path.draw(jax.random.key(0), (2**14,)), config.model.velocity.time_shift)

    def weight(times: Array, step: Array) -> Array:
        power = first + (last - first) * step / max(1, config.train.steps - 1)
        return (1 - times) ** power / jnp.mean((1 - drawn) ** power)

    return weight


def tokenizer_terms(
    model: Tokenizer, params: Params, output: TokenizerOutput, config: TokenizerLossConfig, weight: Array | None = None
) -> Metrics:
    """The weighted terms of flow matching and of the quantizer, given one pass of the tokenizer.

    The quantizer's terms are averaged over the tokens up to the last one of the group drawn for each image. weight: of each
    image's flow loss [B].
    """
    error = jnp.square(output.velocity - output.target)
    if weight is not None:
        error = over_batch(weight, error) * error
    terms = {"flow": config.flow * error.mean() / model.config.velocity.data_std**2}
    used = jnp.arange(output.quantized.values.shape[1]) < output.tokens_used[:, None]  # [B, T]
    own = model.apply({"params": params}, output.quantized, config, method="quantizer_losses")
    return _joined(terms, {name: jnp.sum(x * used) / jnp.sum(used) if jnp.ndim(x) else x for name, x in own.items()})


def _joined(terms: Metrics, more: Metrics) -> Metrics:
    """Both. Raises InputError where a name is taken already, or a further term is no scalar."""
    require(isinstance(more, dict), f"a term of the loss is {type(more).__name__}, it should be {{name: scalar}}")
    for name, value in more.items():
        require(name not in (*terms, "loss", "code_counts"), f"two terms of the loss are called {name}; rename one")
        require(jnp.shape(value) == (), f"the term {name} of the loss is {list(jnp.shape(value))}, it should be a scalar")
    return terms | more


def feature_terms(config: TokenizerLossConfig, dtype: Any = jnp.float32) -> Term:
    """LPIPS between image and prediction, and REPA (paper section 3.2), those of them that have a weight.

    `frozen` has the parameters of `Lpips` as "lpips" and of `Dinov2` as "dinov2", where they are needed. dtype: of DINOv2's
    matrix products; LPIPS is float32 throughout.
    """

    def term(params: Params, images: Array, output: TokenizerOutput, frozen: dict, step: Array) -> Metrics:
        values = {}
        images, predicted = (jnp.broadcast_to(x, (*x.shape[:3], 3)) for x in (images, output.image))  # grey ones too
        if config.lpips != 0:
            lpips = Lpips(jax.lax.Precision.HIGH)  # on a TPU three passes for a product instead of six
            values["lpips"] = config.lpips * lpips.apply({"params": frozen["lpips"]}, images, predicted).mean()
        if config.repa != 0:
            sizes = Dinov2Config()
            side = math.isqrt(output.repa.shape[1]) * sizes.patch_size
            tokens = Dinov2(sizes, dtype).apply({"params": frozen["dinov2"]}, preprocess(images, side))
            values["repa"] = config.repa * (1 - optax.cosine_similarity(output.repa, tokens, epsilon=1e-8)).mean()
        return values

    return term


def next_token_loss(config: TransformerTraining, model: Llama) -> LossFn:
    """Mean cross entropy of "codes" [B, T] int32 given "condition", in nats per token, with the model's dropout.

    The condition is dropped with probability `class_dropout`. The metrics are the loss and `accuracy`, the share of tokens that
    were most probable.
    """

    def loss_fn(params: Params, batch: dict[str, Any], key: Array, frozen: dict, step: Array) -> tuple[Array, Metrics]:
        drop_key, dropout_key = jax.random.split(key)
        condition = drop_condition(model, batch["condition"], drop_key)
        return cross_entropy(model.apply({"params": params}, condition, batch["codes"], dropout_key), batch["codes"])

    return loss_fn


def drop_condition(model: Llama, condition: Any, key: Array) -> Any:
    """The condition [B, ...] with that of some samples replaced by the null one, with probability `class_dropout`."""
    null = model.null(condition)
    drop = jax.random.bernoulli(key, model.config.class_dropout, (len(jax.tree.leaves(condition)[0]),))
    return jax.tree.map(lambda kept, nothing: jnp.where(over_batch(drop, kept), nothing, kept), condition, null)


def cross_entropy(logits: Array, codes: Array) -> tuple[Array, Metrics]:
    """Mean cross entropy of codes [B, T] given their logits [B, T, V], in nats per token, and it with `accuracy` as metrics."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()
    return loss, {"loss": loss, "accuracy": (logits.argmax(-1) == codes).mean()}
