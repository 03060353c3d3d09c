"""AdamW, Muon, clipping and the learning-rate schedule."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from dar_jax import parallel
from dar_jax.config import OptimizerConfig
from dar_jax.training.state import Params

DECAYED = re.compile(r"(^|/)(kernel|output|codebook|\w+_table)$")
KERNEL = re.compile(r"(^|/)blocks/(?P<two_axes_in>.*attention/out/)?.*kernel$")


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


def matrix_axes(params: Params) -> Any:
    """Which axes of each parameter are a matrix for Muon, None where AdamW is meant: a tree like `params`.

    These are the kernels of blocks [L, in ..., out ...], one matrix a layer. Into the attention's output lead two axes, heads
    and what each has; all others have one. Muon is not for embeddings, tables, the codebook, and first and last layers.
    """

    def axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        kernel = KERNEL.search(parallel.path_name(path))
        if kernel is None:
            return None
        first_out = 3 if kernel["two_axes_in"] else 2
        return MuonDimensionNumbers(tuple(range(1, first_out)), tuple(range(first_out, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(axes, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then `config.name`, for a run of `steps` steps: the default of `Experiment.optimizer`.

    Muon (Jordan et al. 2024) orthogonalises the momentum of matrices (beta 0.95, five Newton-Schulz iterations); its steps have
    the size of AdamW's (arXiv 2502.16982), which has the rest, here with Nesterov's momentum as optax has it, so that one
    learning rate and one weight decay serve both.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    rate, decay = learning_rate(config, steps), config.weight_decay
    if config.name == "adamw":
        adamw = optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=1e-8, weight_decay=decay, mask=decay_mask)
        return optax.chain(clip, adamw)
    muon = optax.contrib.muon(
        -1.0,  # the sign of a gradient, for what follows
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=matrix_axes,
        consistent_rms=0.2,
    )
    return optax.chain(clip, muon, optax.add_decayed_weights(decay, decay_mask), optax.scale_by_learning_rate(rate))
