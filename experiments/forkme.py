"""An experiment to copy: the digits' transformer with two parts of the method replaced, its block and its guidance schedule.

Command:  dar-jax train experiments/forkme.py --workdir runs/fork --tokenizer runs/digits/tokenizer
          (a tokenizer of the digits: of `dar-jax quickstart --workdir runs/digits`, or of digits_tokenizer.py)
Then:     dar-jax sample runs/fork --experiment experiments/forkme.py --labels 3 --seeds 1,2,3,4 --out samples
Time:     an estimate, about 1 minute on two CPU cores.
Result:   not measured; it is here to show how little a change needs.

An experiment file is ordinary Python that ends with a value `experiment`. What it replaces is handed over to `Experiment`;
nothing has to be registered, and no file of the library has to be touched. `Experiment` names everything that can be handed
over; docs/forking.md has an example of each.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dar_jax.config import LlamaConfig
from dar_jax.experiment import Experiment
from dar_jax.models.layers import dropout
from dar_jax.models.transformer import Llama, LlamaAttention, SwiGLU
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.settings import Method


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one normalised input, instead of one after the other.

    The signature is that of `dar_jax.models.transformer.LlamaBlock`. The sub-modules keep their names, so the sharding rules of
    `dar_jax.parallel` know all parameters; parameters with names of their own would need `Experiment(rules=...)`.
    """

    config: LlamaConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, layer, rope, mask, position, dropout_key):
        x, cache = carry  # [B, T, D]
        normed = nn.RMSNorm(epsilon=self.config.norm_eps, dtype=jnp.float32, name="norm")(x)
        keys = (None, None) if dropout_key is None else jax.random.split(jax.random.fold_in(dropout_key, layer))
        attended, cache = LlamaAttention(self.config, self.dtype, name="attention")(normed, rope, mask, cache, position)
        hidden = SwiGLU(self.config, self.dtype, name="mlp")(normed)
        x = x + dropout(attended, self.config.attention_dropout, keys[0]) + dropout(hidden, self.config.mlp_dropout, keys[1])
        return (x, cache), None


def model(config: LlamaConfig, dtype: jnp.dtype, remat: str) -> Llama:
    """The transformer with that block."""
    return Llama(config, dtype, remat, block=ParallelBlock)


def cosine_guidance(num_tokens: int, first: float, last: float) -> np.ndarray:
    """The guidance scale of every token [T], along half a cosine instead of a straight line: slow at both ends."""
    progress = np.linspace(0, 1, num_tokens)
    return first + (last - first) * (1 - np.cos(np.pi * progress)) / 2


experiment = Experiment(
    # Settings are plain data: begin with a recipe and replace what should differ.
    dataclasses.replace(
        TRANSFORMER,
        name="fork",
        data=DIGITS,
        sampling=dataclasses.replace(TRANSFORMER.sampling, guidance=(1.0, 4.0)),
    ),
    # Parts are functions and classes.
    model=model,
    method=Method(guidance=cosine_guidance),
)
