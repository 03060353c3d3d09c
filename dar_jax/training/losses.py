"""The two training losses: the tokenizer's (paper section 3.2) and next-token prediction (paper section 3.3).

Shapes: B batch, H W pixels, C channels, T tokens, V codebook size.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dar_jax.config import LlamaConfig, TokenizerLossConfig
from dar_jax.features.dinov2 import Dinov2, Dinov2Config, preprocess
from dar_jax.features.vgg_lpips import Lpips
from dar_jax.models.discriminator import Discriminator
from dar_jax.models.layers import DType
from dar_jax.models.quantizer import similarity
from dar_jax.models.tokenizer import Tokenizer, TokenizerOutput
from dar_jax.models.transformer import Llama

Metrics = dict[str, Array]
FeatureLoss = Callable[[Array, TokenizerOutput], Metrics]  # (images, output) -> named terms, weights included


def tokenizer_loss(
    model: Tokenizer,
    params: dict,
    images: Array,
    key: Array,
    config: TokenizerLossConfig,
    features: Sequence[FeatureLoss] = (),
) -> tuple[Array, Metrics]:
    """Flow matching + codebook + commitment + entropy, with a time and noise drawn per image.

    Args:
      images: [B, H, W, C] float32 in [-1, 1].
      features: add terms such as LPIPS or REPA, which look at the predicted image or at the REPA features (None in a model
        without their head).

    Returns: the loss, and its parts as scalars; "code_counts" [V] int32 counts how often each code was used.
    """
    time_key, noise_key = jax.random.split(key)
    times = jax.random.uniform(time_key, (len(images),))
    noise = jax.random.normal(noise_key, images.shape)
    return_repa = bool(features) and model.config.velocity.has_repa
    output = model.apply({"params": params}, images, times, noise, return_repa)
    terms = tokenizer_terms(model, output, config)
    for more in features:
        terms |= more(images, output)
    loss = sum(terms.values())
    metrics = {"loss": loss, **terms}
    if output.quantized.codes is not None:
        metrics["code_counts"] = jnp.bincount(output.quantized.codes.reshape(-1), length=model.config.codebook_size)
    return loss, metrics


def feature_terms(frozen: dict, config: TokenizerLossConfig, dtype: DType = jnp.float32) -> FeatureLoss:
    """LPIPS between image and prediction, and REPA (paper section 3.2), those of them that have a weight.

    Args:
      frozen: parameters of `Lpips` as "lpips" and of `Dinov2` as "dinov2", where they are needed.
      dtype: of DINOv2's matrix products; LPIPS is float32 throughout.
    """

    def terms(images: Array, output: TokenizerOutput) -> Metrics:
        found = {}
        images, predicted = (jnp.broadcast_to(x, (*x.shape[:3], 3)) for x in (images, output.image))  # grey ones too
        if config.lpips != 0:
            lpips = Lpips(jax.lax.Precision.HIGH)  # on a TPU three passes for a product instead of six
            found["lpips"] = config.lpips * lpips.apply({"params": frozen["lpips"]}, images, predicted).mean()
        if config.repa != 0:
            sizes = Dinov2Config()
            side = math.isqrt(output.repa.shape[1]) * sizes.patch_size
            tokens = Dinov2(sizes, dtype).apply({"params": frozen["dinov2"]}, preprocess(images, side))
            found["repa"] = config.repa * (1 - optax.cosine_similarity(output.repa, tokens, epsilon=1e-8)).mean()
        return found

    return terms


def adversarial_terms(discriminator: Discriminator, params: dict, config: TokenizerLossConfig, step: Array) -> FeatureLoss:
    """The non-saturating loss (Goodfellow et al. 2014, arXiv 1406.2661) of the predicted image, times its weight, and the
    discriminator's own; both are 0, and are not computed, before step `gan_start_step`.

    Each teaches its own side only: the first the tokenizer, the second the discriminator, whose parameters these are.
    """

    def terms(images: Array, output: TokenizerOutput) -> Metrics:
        stop = jax.lax.stop_gradient

        def judge(params: dict, images: Array, real: bool) -> Array:
            logits = discriminator.apply({"params": params}, images)
            return jax.nn.softplus(-logits if real else logits).mean()

        def play() -> tuple[Array, Array]:
            deceived = judge(stop(params), output.image, True)
            told_apart = (judge(params, images, True) + judge(params, stop(output.image), False)) / 2
            return config.gan * deceived, told_apart

        gan, own = jax.lax.cond(step >= config.gan_start_step, play, lambda: (jnp.float32(0), jnp.float32(0)))
        return {"gan": gan, "discriminator": own}

    return terms


def tokenizer_terms(model: Tokenizer, output: TokenizerOutput, config: TokenizerLossConfig) -> Metrics:
    """The weighted terms of the loss, given one pass of the tokenizer.

    The quantiser's terms are averaged over the tokens up to the last one of the group drawn for each image.
    """
    error = jnp.square(output.velocity - output.target).mean()
    terms = {"flow": config.flow * error / model.config.velocity.data_std**2}
    if not model.config.vq_enable:
        return terms
    quantized = output.quantized
    used = jnp.arange(quantized.codes.shape[1]) < output.tokens_used[:, None]  # [B, T]

    def mean_over_used(a: Array, b: Array) -> Array:
        return jnp.sum(jnp.square(a - b).mean(-1) * used) / jnp.sum(used)

    stop = jax.lax.stop_gradient
    terms["codebook"] = config.codebook * mean_over_used(quantized.entries, stop(quantized.latents))
    terms["commitment"] = config.commitment * mean_over_used(stop(quantized.entries), quantized.latents)
    if config.entropy != 0:
        affinity = 2 * similarity(quantized.latents, output.codebook).reshape(-1, model.config.codebook_size)
        terms["entropy"] = config.entropy * entropy_loss(affinity, config.entropy_temperature)
    return terms


def entropy_loss(affinity: Array, temperature: float) -> Array:
    """Mean entropy of each token's soft code minus the entropy of their mean: low when tokens are sure and codes all used.

    Args: affinity [tokens, V], minus the squared distances up to a constant.
    """
    log_probabilities = jax.nn.log_softmax(affinity / temperature, axis=-1)
    probabilities = jnp.exp(log_probabilities)
    mean = probabilities.mean(axis=0)
    each = -jnp.sum(probabilities * log_probabilities, axis=-1).mean()
    return each + jnp.sum(mean * jnp.log(mean + 1e-5))


def drop_labels(labels: Array, key: Array, config: LlamaConfig) -> Array:
    """Replaces labels [B] by the null class with probability `class_dropout`."""
    drop = jax.random.bernoulli(key, config.class_dropout, labels.shape)
    return jnp.where(drop, config.num_classes, labels)


def next_token_loss(model: Llama, params: dict, codes: Array, labels: Array, key: Array | None = None) -> tuple[Array, Metrics]:
    """Mean cross entropy of the codes [B, T] int32 given labels [B] int32, in nats per token.

    With a key, labels and activations are dropped out as in training; without one, nothing is. The metrics hold the loss
    and the share of tokens whose most probable code is the right one.
    """
    if key is not None:
        label_key, key = jax.random.split(key)
        labels = drop_labels(labels, label_key, model.config)
    logits = model.apply({"params": params}, labels, codes, key)  # [B, T, V]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == codes)
    return loss, {"loss": loss, "accuracy": accuracy}
