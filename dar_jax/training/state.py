"""The state of a training run: parameters, their moving average and the optimizer."""

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.config import OptimizerConfig

Params = Any

DISCRIMINATOR = "discriminator"  # what a GAN's opponent is called among the parameters
DECAYED = re.compile(r"(^|/)(kernel|output|codebook|\w+_table)$")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training. Randomness and data follow from `step`, so no key and no iterator is kept.

    step: int32 scalar, the number of steps done. params, ema: trees of float32 arrays; a discriminator is trained with the
    others, but not averaged. opt_state: of `make_optimizer`.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState


def without_discriminator(params: Params) -> Params:
    """The parameters of the model alone."""
    return {name: part for name, part in params.items() if name != DISCRIMINATOR}


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of step 0 .. steps - 1.

    It rises linearly and is full at step `warmup_steps - 1`; with a linear or cosine schedule it then falls from `decay_start`
    (the end of the warm-up at the earliest) to `final_learning_rate` at the last step.
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
    """True for what weight decay acts on: the tensors of two or more dimensions, seen without the layers of a stack.

    So matrices, tables and the codebook; not biases, norms and gates. The rank cannot tell them apart, because stacks of
    blocks add a dimension and biases of heads have two; names can.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: bool(DECAYED.search(parallel.path_name(path))), params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (eps 1e-8), for a run of `steps` steps. A discriminator's norm is its own."""
    clip = optax.identity() if config.clip_norm is None else optax.stateless(functools.partial(_clip, config.clip_norm))
    adamw = optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=1e-8,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return optax.chain(clip, adamw)


def _clip(norm: float, gradients: Params, _: Params) -> Params:
    clip, model = optax.clip_by_global_norm(norm), without_discriminator(gradients)
    others = {name: part for name, part in gradients.items() if name not in model}
    return {**clip.update(model, optax.EmptyState())[0], **clip.update(others, optax.EmptyState())[0]}


def _initializer(init_params: Callable[[], Params], optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    def init() -> TrainState:
        params = init_params()
        ema = jax.tree.map(jnp.copy, without_discriminator(params))
        return TrainState(jnp.int32(0), params, ema, optimizer.init(params))

    return init


def abstract_state(
    init_params: Callable[[], Params], optimizer: optax.GradientTransformation, mesh: Mesh, rules: parallel.Rules = ()
) -> TrainState:
    """Shapes, dtypes and shardings of the state, as a TrainState of ShapeDtypeStructs. Nothing is computed."""
    shapes = jax.eval_shape(_initializer(init_params, optimizer))
    return parallel.placed(shapes, parallel.shardings(shapes, mesh, rules))


def with_new_optimizer(state: TrainState, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The state with the optimizer as at the start of training, but the learning rate of its step.

    Args: abstract, `abstract_state` of the run, for the shardings.
    """
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)
    opt_state = jax.jit(optimizer.init, out_shardings=out)(state.params)
    schedules = optax.ScaleByScheduleState
    opt_state = jax.tree.map(
        lambda part: schedules(state.step.copy()) if isinstance(part, schedules) else part,
        opt_state,
        is_leaf=lambda part: isinstance(part, schedules),
    )
    return dataclasses.replace(state, opt_state=opt_state)


def init_state(
    init_params: Callable[[], Params], optimizer: optax.GradientTransformation, mesh: Mesh, rules: parallel.Rules = ()
) -> TrainState:
    """The state before the first step, made in place on the mesh; the values do not depend on the mesh.

    Args:
      init_params: makes the parameters, a dictionary, such as `lambda: model.init(key, images)["params"]`. The EMA starts
        equal to them.
      rules: a fork's own sharding rules, see `parallel.shardings`.
    """
    abstract = abstract_state(init_params, optimizer, mesh, rules)
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(_initializer(init_params, optimizer), out_shardings=out)()
