"""An experiment to copy: the digits' transformer with two parts of the method replaced, its block and its guidance schedule.

Command:  dar-jax train experiments/forkme.py --workdir runs/fork --tokenizer runs/digits/tokenizer
          (a tokenizer of the digits: of `dar-jax quickstart --workdir runs/digits`, or of digits_tokenizer.py)
Then:     dar-jax sample runs/fork --experiment experiments/forkme.py --labels 3 --seeds 1,2,3,4 --out samples
Time:     an estimate, about 1 minute on two CPU cores.
Result:   not measured; it is here to show how little a change needs.

An experiment file is ordinary Python that ends with a value `experiment`: settings, and the parts that it replaces. Nothing has
to be registered, and no file of the library has to be touched. docs/forking.md has a section for each part:

network    model: block, prefix and null, quantizer, velocity_network, path      data       source, condition
training   loss and its terms, frozen, optimizer, rules                          settings   config.fork, reads
sampling   method: guidance, draw, predict, solver, times, steer, noise; others
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dar_jax.config import DataConfig, OptimizerConfig, SamplingConfig, TrainConfig, TransformerConfig, TransformerTraining
from dar_jax.experiment import Experiment
from dar_jax.models.layers import dropout
from dar_jax.models.transformer import CausalAttention, Llama, SwiGLU
from dar_jax.sampling.settings import Method


class ParallelBlock(nn.Module):
    """Attention and MLP side by side on one normalised input, instead of one after the other.

    The signature is that of `dar_jax.models.transformer.TransformerBlock`. The sub-modules keep their names, so the sharding
    rules of `dar_jax.parallel` know all parameters; parameters with names of their own would need `Experiment(rules=...)`.
    """

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry, layer, rope, mask, position, dropout_key):
        x, cache = carry  # [B, T, D]
        normed = nn.RMSNorm(epsilon=self.config.norm_eps, dtype=jnp.float32, name="norm")(x)
        keys = (None, None) if dropout_key is None else jax.random.split(jax.random.fold_in(dropout_key, layer))
        attended, cache = CausalAttention(self.config, self.dtype, name="attention")(normed, rope, mask, cache, position)
        hidden = SwiGLU(self.config, self.dtype, name="mlp")(normed)
        x = x + dropout(attended, self.config.attention_dropout, keys[0]) + dropout(hidden, self.config.mlp_dropout, keys[1])
        return (x, cache), None


def model(config: TransformerTraining, dtype: jnp.dtype, remat: str) -> Llama:
    """The transformer with that block."""
    return Llama(config.model, dtype, remat, block=ParallelBlock)


def cosine_guidance(num_tokens: int, first: float, last: float) -> np.ndarray:
    """The guidance scale of every token [T], along half a cosine instead of a straight line: slow at both ends."""
    progress = np.linspace(0, 1, num_tokens)
    return first + (last - first) * (1 - np.cos(np.pi * progress)) / 2


experiment = Experiment(
    TransformerTraining(
        name="fork",
        model=TransformerConfig(
            layers=3,
            heads=4,
            width=128,
            num_tokens=16,
            vocab_size=128,
            num_classes=10,
            mlp_multiple=32,
            token_dropout=0.15,
            attention_dropout=0.15,
            mlp_dropout=0.15,
        ),
        data=DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50, weight_decay=0.05, ema_decay=0.99),
        train=TrainConfig(steps=700, batch_size=64, checkpoint_every=500),
        sampling=SamplingConfig(guidance=(1.0, 4.0)),
    ),
    model=model,
    method=Method(guidance=cosine_guidance),
)
