"""Other data: series of 32 numbers, float32 [L, C], instead of images. Stage 1 is `experiment`, stage 2 FILE:transformer.

Replaced is what knows about pixels. The commands make pictures; series come from `sampling.sampler`. Parts: source, model.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dar_jax.experiment import Experiment
from dar_jax.models.quantizer import Quantizer
from dar_jax.models.token_decoder import TokenDecoder
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.velocity import time_features
from dar_jax.quickstart import DIGITS, TOKENIZER, TRANSFORMER


class Waves(list):
    class_names, description = ("slow", "fast"), "sines of two frequencies"


def wave(index):
    phase = np.random.default_rng(index).uniform(0, 2 * np.pi) + np.arange(32)[:, None] * (0.2 + 0.4 * (index % 2))
    return {"image": np.sin(phase).astype(np.float32), "label": index % 2}


class Series(nn.Module):
    out: tuple[int, ...]  # shape of the result, by one hidden layer, of x and whatever else is known

    @nn.compact
    def __call__(self, x, *known):
        x = jnp.concatenate([part.reshape(len(x), -1) for part in (x, *known)], axis=1)
        return nn.Dense(np.prod(self.out), name="out")(nn.silu(nn.Dense(128, name="in")(x))).reshape(-1, *self.out)


class SeriesTokenizer(Tokenizer):
    data_shape = noise_shape = property(lambda self: (32, self.config.channels))

    def setup(self):
        self.encoder = Series((self.config.num_tokens, self.config.code_dim))
        self.bottleneck = Quantizer(self.config, name="quantizer")
        self.token_decoder = TokenDecoder(self.config, self.dtype, self.remat)
        self.decoder = Series(self.data_shape, name="velocity")

    def velocity(self, x, t, condition, return_repa=False):
        return self.decoder(x, time_features(jnp.broadcast_to(t, len(x)), 32), condition), None


data = dataclasses.replace(DIGITS, crop="none")
experiment = Experiment(
    dataclasses.replace(TOKENIZER, name="series", data=data),
    model=lambda config, dtype, remat: SeriesTokenizer(config.model, dtype, remat),
    source=lambda data: Waves(map(wave, range(512))),
)
sizes = dataclasses.replace(TRANSFORMER.model, num_classes=2)
config = dataclasses.replace(TRANSFORMER, name="series", model=sizes, data=data)
transformer = Experiment(config, source=experiment.source, tokenizer=experiment)
