"""Finite scalar quantization (Mentzer et al. 2023) in place of the codebook: each latent number is rounded to a few levels.

There is no codebook to learn, so of the quantizer's losses only a commitment remains. Parts: model (`quantizer`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dar_jax.config import TokenizerConfig
from dar_jax.experiment import Experiment
from dar_jax.models.quantizer import Quantized
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.quickstart import TOKENIZER

LEVELS = (8, 4, 4)  # of each number of a latent
PLACE_VALUES = np.cumprod((1, *LEVELS[:-1]))


class FSQ(nn.Module):
    config: TokenizerConfig

    def __call__(self, latents):
        latents = jnp.tanh(latents)
        digits = jnp.round((latents + 1) / 2 * (np.array(LEVELS) - 1)).astype(jnp.int32)
        codes = jnp.sum(digits * PLACE_VALUES, axis=-1)
        entries = self.lookup(codes)
        return Quantized(latents + jax.lax.stop_gradient(entries - latents), latents, entries, codes)

    def lookup(self, codes):
        digits = codes[..., None] // PLACE_VALUES % np.array(LEVELS)
        return 2 * digits / (np.array(LEVELS, np.float32) - 1) - 1

    def losses(self, quantized, config):
        error = jnp.square(quantized.latents - jax.lax.stop_gradient(quantized.entries))
        return {"commitment": config.commitment * error.mean(-1)}


sizes = dataclasses.replace(TOKENIZER.model, code_dim=len(LEVELS), codebook_size=math.prod(LEVELS))
loss = dataclasses.replace(TOKENIZER.loss, codebook=0.0, entropy=0.0)  # FSQ has neither
experiment = Experiment(
    dataclasses.replace(TOKENIZER, name="fsq", model=sizes, loss=loss),
    model=lambda config, dtype, remat: Tokenizer(config.model, dtype, remat, quantizer=FSQ),
)
