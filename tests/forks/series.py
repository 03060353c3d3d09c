"""Other data: series of 32 numbers, float32 [L, C], instead of images. Stage 1 is `experiment`, stage 2 FILE:transformer.

Only what knows about pixels is replaced: encoder, velocity network and shapes. `data.crop none` leaves data as they are. The
pictures of the commands are for images; series come from `sampling.sampler`. Parts: source, model.
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

LENGTH = 32


class Waves:
    class_names, description = ("slow", "fast"), "sines of two frequencies"

    def __len__(self):
        return 512

    def __getitem__(self, index):
        phase = np.random.default_rng(index).uniform(0, 2 * np.pi) + np.arange(LENGTH)[:, None] * (0.2 + 0.4 * (index % 2))
        return {"image": np.sin(phase).astype(np.float32), "label": index % 2}


class Series(nn.Module):
    """[B, L, C] and whatever else is known -> [B, *out], by one hidden layer."""

    out: tuple[int, ...]

    @nn.compact
    def __call__(self, x, *known):
        x = jnp.concatenate([part.reshape(len(x), -1) for part in (x, *known)], axis=1)
        return nn.Dense(np.prod(self.out), name="out")(nn.silu(nn.Dense(128, name="in")(x))).reshape(-1, *self.out)


class SeriesTokenizer(Tokenizer):
    data_shape = noise_shape = property(lambda self: (LENGTH, self.config.channels))

    def setup(self):
        self.encoder = Series((self.config.num_tokens, self.config.code_dim))
        self.bottleneck = Quantizer(self.config, name="quantizer")
        self.token_decoder = TokenDecoder(self.config, self.dtype, self.remat)
        self.decoder = Series(self.data_shape, name="velocity")

    def velocity(self, x, t, condition, return_repa=False):
        t = jnp.broadcast_to(t, len(x))
        return self.decoder(x, time_features(t, 32), condition), None


data = dataclasses.replace(DIGITS, crop="none")
parts = {"source": lambda config: Waves()}
experiment = Experiment(
    dataclasses.replace(TOKENIZER, name="series", data=data),
    model=lambda config, dtype, remat: SeriesTokenizer(config.model, dtype, remat),
    **parts,
)
sizes = dataclasses.replace(TRANSFORMER.model, num_classes=2)
transformer = Experiment(dataclasses.replace(TRANSFORMER, name="series", model=sizes, data=data), tokenizer=experiment, **parts)
