"""A decoder of photographs tuned through its own steps with VGG16's features; the codes stay as they are.

Source:   LPIPS (arXiv 1801.03924) of reconstructions; MMD-DDM (arXiv 2301.07969), which unrolls a sampler and compares the
          distribution of its images' features with that of real ones; DRaFT (arXiv 2309.17400), which lets gradients through
          the last of the unrolled steps alone.
Command:  dar-jax train experiments/variants/perceptual.py --init-from runs/tokenizer --workdir runs/perceptual --data.path DIR
          (runs/tokenizer: a run of cifar10_tokenizer.py:small, DIR: CIFAR-10's folder; LPIPS's weights: docs/weights.md)
          A transformer of the base's codes draws with it if the folder takes the place of its RUN/tokenizer.
Differs:  from the tokenizer in the loss, and in what is trained: the velocity network and the token decoder.
          `:fashion` tunes a run of fashion_tokenizer.py; `:single` has the library's loss with LPIPS, of one step at a time.
Time:     100 steps of 64 images take 19 minutes on one CPU core; 60 of `:fashion` take 5.
Result:   Fashion-MNIST, three seeds, 60 steps: distance 5.9, base 8.5, of the samples 7.0, base 8.5; 0.1 dB more. CIFAR-10, one
          training: distance 6.3, base 16.4, LPIPS 0.462, base 0.505, at the same PSNR, but rFID 127, base 123, and
          the samples' FID 135, base 125. See docs/variants.md.

The loss is of the images that the model's steps make from noise and an image's codes: LPIPS and the squared difference of
halved images, in pairs; and the energy distance (Székely and Rizzo 2013) of statistics of VGG16's features from those of other
real images, whose deviation is the unit, so that the images are as rich in contrast and texture.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from few_steps import optimizer, unrolled

from dar_jax.config import TokenizerLossConfig
from dar_jax.errors import require
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.features.vgg_lpips import SCALE, SHIFT, Lpips, Vgg16
from dar_jax.sampling.observe import pool

PRECISION = jax.lax.Precision.HIGH


def statistics(params, images):
    """Mean and deviation over an image [B, H, W, 3] of VGG16's features, two for each of its stages: [B, C] each."""
    features = Vgg16(PRECISION).apply({"params": params["vgg"]}, (images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE))
    return [part for x in features for part in (x.mean((1, 2)), jnp.sqrt(x.var((1, 2)) + 1e-3))]


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'| of two samples [m, F] and [n, F], unbiased: 0 if they are of one distribution."""

    def distances(x, y):
        squared = jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1) - 2 * x @ y.T
        return jnp.sqrt(jnp.maximum(squared, 1e-4))  # the gradient of a root at 0 is not finite

    def within(x):
        others = 1 - jnp.eye(len(x))
        return (others * distances(x, x)).sum() / others.sum()

    return 2 * distances(a, b).mean() - within(a) - within(b)


def unpaired(real, made):
    """The mean energy distance of all statistics, of each half of the batch to the images of the other half."""
    half, total = len(real[0]) // 2, 0.0
    for a, b in zip(real, made):
        a, b = (x / jnp.sqrt(a.var(0).sum() + 1e-6) for x in (a, b))
        total += (energy_distance(a[:half], b[half:]) + energy_distance(a[half:], b[:half])) / 2
    return total / len(real)


def loss(config, model):
    weights = config.fork

    def loss_fn(params, batch, key, frozen, step):
        images, network = batch["image"], frozen["lpips"]
        require(len(images) >= 4, "halves of a batch are compared; batches should have at least 4 images")
        apply = functools.partial(model.apply, {"params": params})
        values = jax.lax.stop_gradient(apply(apply(images, method="encode"), method="quantize").values)
        made = unrolled(model, params, values, jax.random.normal(key, images.shape), weights["last"])
        terms = {
            "pixels": weights["pixels"] * jnp.square(pool(made - images, images.shape[1] // 2)).mean(),
            "lpips": config.loss.lpips * Lpips(PRECISION).apply({"params": network}, images, made).mean(),
            "unpaired": weights["unpaired"] * unpaired(statistics(network, images), statistics(network, made)),
        }
        return sum(terms.values()), terms

    return loss_fn


def tuned(file, single=False):
    """The experiment of a tokenizer's file; single: with the library's loss and LPIPS, of one step from a noised image."""
    base = load_experiment(Path(__file__).parents[1] / file).config
    steps, warmup = (200, 20) if single else (100, 10)
    config = dataclasses.replace(
        base,
        name="perceptual",
        loss=TokenizerLossConfig(lpips=0.5 if single else 1.0),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3, warmup_steps=warmup),
        train=dataclasses.replace(base.train, steps=steps, checkpoint_every=25, sample_every=0, log_every=5),
        fork={} if single else {"pixels": 0.5, "unpaired": 1.0, "last": 3},
    )
    return Experiment(config, loss=None if single else loss, optimizer=optimizer, reads=("optimizer.", "loss.lpips"))


experiment, fashion = tuned("cifar10_tokenizer.py:small"), tuned("fashion_tokenizer.py")
single = tuned("cifar10_tokenizer.py:small", single=True)
