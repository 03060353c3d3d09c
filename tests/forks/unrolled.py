"""The decoder tuned through its own sampler: two Euler steps from noise, compared with the image in a frozen network's eyes.

The network here is a random convolution, which needs no file. Its term grows over the first `--fork.warmup` steps. Parts: loss
(the library's with one more term), frozen, config.fork, rules.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from dar_jax.experiment import Experiment
from dar_jax.models import flow
from dar_jax.quickstart import TOKENIZER
from dar_jax.training.losses import tokenizer_loss


def frozen(config):
    shape = (3, 3, config.model.channels, 16)
    return {"eyes": {"kernel": jax.random.normal(jax.random.key(7), shape) / 3}}


def seen(eyes, images):
    return jax.nn.relu(jax.lax.conv(images.transpose(0, 3, 1, 2), eyes["kernel"].transpose(3, 2, 0, 1), (1, 1), "SAME"))


def loss(config, model):
    steps = flow.schedule(flow.uniform_times(2, config.model), config.model, model.path)
    count, std = config.model.tokens_per_step, config.model.velocity.data_std

    def unrolled(params, images, output, frozen, step):
        bound = model.bind({"params": params})
        condition = bound.condition(output.quantized.values)
        x = jax.random.normal(jax.random.fold_in(jax.random.key(config.train.seed), step), images.shape)
        for start, t, t_next in zip(steps.starts, steps.times, steps.times[1:]):
            x = x + (t_next - t) * bound.velocity(x, jnp.full(1, t), condition[:, start : start + count])[0]
        error = jnp.square(seen(frozen["eyes"], x / std) - seen(frozen["eyes"], images)).mean()
        weight = config.fork["weight"] * jnp.minimum(1, (step + 1) / config.fork["warmup"])
        return {"unrolled": weight * error}

    return tokenizer_loss(config, model, terms=(unrolled,))


experiment = Experiment(
    dataclasses.replace(TOKENIZER, name="unrolled", fork={"weight": 0.1, "warmup": 100}),
    loss=loss,
    frozen=frozen,
    rules=((r"eyes/kernel", P()),),
    reads=("loss.",),
)
