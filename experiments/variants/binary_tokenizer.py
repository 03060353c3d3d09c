"""Codes that are signs: binary spherical quantization in place of the codebook, and finite scalar quantization beside it.

Source:   the binary tokenizer of Beyond Words (arXiv 2503.20198), here as in BSQ (arXiv 2406.07548); FSQ (arXiv 2309.15505).
Command:  dar-jax train experiments/variants/binary_tokenizer.py --workdir runs/signs
          dar-jax train experiments/variants/binary_tokenizer.py:transformer --tokenizer runs/signs --workdir runs/signs_ar
          dar-jax sample runs/signs_ar --experiment experiments/variants/binary_tokenizer.py:transformer --labels 3 \
              --seeds 1,2 --out samples
          and the same with :fsq and :fsq_transformer
Differs:  from the digits' tokenizer of the quickstart in the quantizer: there is no codebook to learn.
Time:     that of the base.
Result:   signs reconstruct with 1.2 dB less than the codebook on digits (three trainings) and 0.6 on Fashion-MNIST (two), at a
          larger distance; FSQ is level with it. Of 16,384 codes the codebook uses all, signs 58 %. See docs/variants.md.

`signs`: a latent of E numbers is normalised, and bit j of its code is the sign of number j, so that V = 2^E; what is decoded is
the corner of the cube, +-1 / sqrt(E). `fsq`: each number is rounded to a few levels, whose product is V (--fork.levels 8,4,4).
Neither compares a latent with V rows, and no code can die. Other sizes: --model.codebook-size 512 --model.code-dim 9.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dar_jax.config import TokenizerConfig
from dar_jax.errors import InputError, require
from dar_jax.experiment import Experiment
from dar_jax.models.quantizer import Quantized, normalize
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.quickstart import DIGITS, TOKENIZER, TRANSFORMER


class Signs(nn.Module):
    config: TokenizerConfig

    def __call__(self, latents):
        latents = normalize(latents)
        codes = jnp.sum((latents > 0) << jnp.arange(self.config.code_dim), axis=-1).astype(jnp.int32)
        return straight_through(latents, self.lookup(codes), codes)

    def lookup(self, codes):
        bits = codes[..., None] >> jnp.arange(self.config.code_dim) & 1
        return (2 * bits - 1) / math.sqrt(self.config.code_dim)

    def losses(self, quantized, config):
        """The commitment, and an entropy, low where bits are sure and both values are used: a sum over bits, not codes."""
        error = jnp.square(quantized.latents - jax.lax.stop_gradient(quantized.entries))
        terms = {"commitment": config.commitment * error.mean(-1)}
        if config.entropy != 0:
            sharpness = config.entropy_temperature * math.sqrt(self.config.code_dim)
            ones = jax.nn.sigmoid(2 * quantized.latents / sharpness).reshape(-1, self.config.code_dim)
            each, together = entropy(ones).mean(axis=0), entropy(ones.mean(axis=0))
            terms["entropy"] = config.entropy * jnp.sum(each - together)
        return terms


class FSQ(nn.Module):
    config: TokenizerConfig
    levels: tuple[int, ...]

    def __call__(self, latents):
        latents = jnp.tanh(latents)
        digits = jnp.round((latents + 1) / 2 * (np.array(self.levels) - 1)).astype(jnp.int32)
        codes = jnp.sum(digits * self.place_values(), axis=-1)
        return straight_through(latents, self.lookup(codes), codes)

    def lookup(self, codes):
        digits = codes[..., None] // self.place_values() % np.array(self.levels)
        return 2 * digits / (np.array(self.levels, np.float32) - 1) - 1

    def losses(self, quantized, config):
        return {}

    @nn.nowrap
    def place_values(self):
        return np.cumprod((1, *self.levels[:-1]))


def straight_through(latents, entries, codes):
    return Quantized(latents + jax.lax.stop_gradient(entries - latents), latents, entries, codes)


def entropy(probability):
    """Of a bit that is 1 with this probability, in nats."""
    return jax.scipy.special.entr(probability) + jax.scipy.special.entr(1 - probability)


def signs_model(config, dtype, remat):
    sizes = config.model
    require(config.loss.codebook == 0, "signs have no codebook to learn; loss.codebook should be 0")
    require(
        sizes.codebook_size == 2**sizes.code_dim,
        f"model.codebook_size is {sizes.codebook_size}, with model.code_dim {sizes.code_dim} it should be {2**sizes.code_dim}",
    )
    return Tokenizer(sizes, dtype, remat, quantizer=Signs)


def fsq_model(config, dtype, remat):
    sizes, text = config.model, config.fork["levels"]
    try:
        levels = tuple(map(int, text.split(",")))
    except ValueError as error:
        raise InputError(f"fork.levels is {text}, it should be numbers separated by commas") from error
    void = config.loss.codebook, config.loss.commitment, config.loss.entropy
    require(not any(void), "FSQ has no losses; loss.codebook, loss.commitment and loss.entropy should be 0")
    require(
        min(levels) > 1 and (len(levels), math.prod(levels)) == (sizes.code_dim, sizes.codebook_size),
        f"fork.levels {text} should be {sizes.code_dim} numbers of 2 or more (model.code_dim) with the product "
        f"{sizes.codebook_size} (model.codebook_size)",
    )
    return Tokenizer(sizes, dtype, remat, quantizer=fsq_of(levels))


@functools.cache  # one object, or everything would be compiled for each
def fsq_of(levels):
    return functools.partial(FSQ, levels=levels)


def tokenizer(name, model, code_dim, fork, **loss):
    sizes = dataclasses.replace(TOKENIZER.model, code_dim=code_dim)
    config = dataclasses.replace(TOKENIZER, name=name, model=sizes, loss=dataclasses.replace(TOKENIZER.loss, **loss), fork=fork)
    return Experiment(config, model=model)


def over(tokenizer):
    """The digits' transformer over the codes of a tokenizer of this file."""
    config = dataclasses.replace(TRANSFORMER, name=f"{tokenizer.config.name}_ar", data=DIGITS)
    return Experiment(config, tokenizer=tokenizer)


experiment = tokenizer("signs", signs_model, 7, {}, codebook=0.0, entropy_temperature=0.3)
fsq = tokenizer("fsq", fsq_model, 3, {"levels": "8,4,4"}, codebook=0.0, commitment=0.0, entropy=0.0)
transformer, fsq_transformer = over(experiment), over(fsq)
