"""AdamW, clipping and the learning-rate schedule."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dar_jax import parallel
from dar_jax.config import OptimizerConfig
from dar_jax.training.state import Params

DECAYED = re.compile(r"(^|/)(kernel|output|codebook|\w+_table)$")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of step 0 .. steps - 1.

    Linear warm-up reaches the full rate at step `warmup_steps - 1`; with a linear or cosine schedule it then falls from
    `decay_start` (the end of the warm-up at the earliest) to `final_learning_rate` at the last step.
    """
    start = max(config.decay_start, config.warmup_steps)
    length = max(1, steps - 1 - start)

    def schedule(step: jax.Array) -> jax.Array:
        progress = jnp.clip((step - start) / length, 0.0, 1.0)
        height = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + jnp.cos(jnp.pi * progress)) / 2}[config.schedule]
        rate = config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * height
        return rate * jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))

    return schedule


def decay_mask(params: Params) -> Any:
    """True for what weight decay acts on: the tensors of two or more dimensions, not counting the layers of a stack.

    So matrices, tables and the codebook; not biases, norms and gates. The rank cannot tell them apart, because stacks of
    blocks add a dimension and biases of heads have two; names can.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(DECAYED.search(parallel.path_name(path))), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (eps 1e-8), for a run of `steps` steps: the default of `Experiment.optimizer`."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)
