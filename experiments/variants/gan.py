"""The CIFAR-10 tokenizer with a PatchGAN discriminator (Isola et al. 2017, arXiv 1611.07004) that learns beside it.

Command:  dar-jax train experiments/variants/gan.py --workdir runs/gan --data.path CIFAR10
          (settings of its own: --fork.weight, --fork.start-step, --fork.width, --fork.halvings)
Differs:  from experiments/cifar10_tokenizer.py in two terms of the loss, after `start-step`: the non-saturating loss
          (Goodfellow et al. 2014, arXiv 1406.2661) of the predicted image, and the discriminator's own.
Time:     not measured.
Result:   not measured.

The discriminator is a part of the tokenizer's parameters, so that checkpoints, sharding and the optimizer take care of it. Each
term teaches its own side only. Norms are over groups of channels within one image, so an image's logits depend on it alone.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from dar_jax.errors import InputError
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.parallel.sharding import constrain
from dar_jax.training.losses import tokenizer_loss

KERNEL = 4  # pixels a convolution sees along each side
NORM_GROUPS = 16
MOST_DOUBLINGS = 3  # of the number of channels


class Discriminator(nn.Module):
    """Convolutions of stride 2, which double the channels, and two of stride 1; each logit sees one patch of the image: 70
    pixels along a side with three halvings, 34 with two, 16 with one."""

    width: int  # channels after the first convolution
    halvings: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):
        """[B, H, W, C] float32 in [-1, 1] -> logits [B, h, w] float32, h = H // 2^halvings - 2: high for real patches."""
        convolution = functools.partial(
            nn.Conv, kernel_size=(KERNEL, KERNEL), padding=1, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02)
        )
        x = constrain(images, "images")
        for layer in range(self.halvings + 1):
            stride = 2 if layer < self.halvings else 1
            channels = self.width * 2 ** min(layer, MOST_DOUBLINGS)
            x = convolution(channels, strides=stride, use_bias=layer == 0, name=f"conv{layer}")(x)
            if layer > 0:
                x = nn.GroupNorm(NORM_GROUPS, epsilon=1e-5, name=f"norm{layer}")(x).astype(self.dtype)
            x = constrain(nn.leaky_relu(x, 0.2), "images")
        return convolution(1, name="logits")(x).squeeze(-1).astype(jnp.float32)


class AdversarialTokenizer(Tokenizer):
    """A tokenizer with the parameters of its discriminator, whose logits `judge` gives."""

    width: int = 128
    halvings: int = 2

    def setup(self):
        super().setup()
        self.discriminator = Discriminator(self.width, self.halvings, self.dtype)

    def __call__(self, images, *arguments):
        if self.is_initializing():
            self.judge(images)
        return super().__call__(images, *arguments)

    def judge(self, images):
        return self.discriminator(images)


def model(config, dtype, remat):
    width, halvings = config.fork["width"], config.fork["halvings"]
    if width < NORM_GROUPS or width % NORM_GROUPS:
        raise InputError(f"fork.width is {width}, it should be a multiple of {NORM_GROUPS}")
    if halvings < 1 or config.model.image_size >> halvings < 3:
        size = config.model.image_size
        raise InputError(f"fork.halvings is {halvings}, it should be at least 1 and leave 3 pixels or more of {size}")
    return AdversarialTokenizer(config.model, dtype, remat, width=width, halvings=halvings)


def loss(config, model):
    """The tokenizer's loss with both adversarial terms, which are 0 and not computed before the step `fork.start_step`."""

    def adversarial(params, images, output, frozen, step):
        def judged(params, images, real):
            logits = model.apply({"params": params}, images, method="judge")
            return jax.nn.softplus(-logits if real else logits).mean()

        def terms():
            stop = jax.lax.stop_gradient
            generator = judged(stop(params), output.image, real=True)
            discriminator = (judged(params, images, real=True) + judged(params, stop(output.image), real=False)) / 2
            return config.fork["weight"] * generator, discriminator

        values = jax.lax.cond(step >= config.fork["start_step"], terms, lambda: (jnp.float32(0), jnp.float32(0)))
        return dict(zip(("generator", "discriminator"), values))

    return tokenizer_loss(config, model, terms=(adversarial,))


base = load_experiment(Path(__file__).parents[1] / "cifar10_tokenizer.py").config
experiment = Experiment(
    dataclasses.replace(base, name="gan", fork={"weight": 0.1, "start_step": 5000, "width": 64, "halvings": 2}),
    model=model,
    loss=loss,
    rules=((r"discriminator/.*", P()),),  # small, and replicated
    reads=("loss.",),
)
