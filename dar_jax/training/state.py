"""The state of a training run: parameters, their moving average and the optimizer."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dar_jax import parallel

Params = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training. Randomness and data follow from `step`, so no key and no iterator is kept.

    step: int32 scalar, the number of steps done. params, ema: trees of float32 arrays. opt_state: of the
    experiment's optimizer.
    """

    step: jax.Array
    params: Params
    ema: Params
    opt_state: optax.OptState


def _initializer(init_params: Callable[[], Params], optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    def init() -> TrainState:
        params = init_params()
        ema = jax.tree.map(jnp.copy, params)
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
    """The state before the first step, initialised on the mesh; the values do not depend on the mesh.

    Args:
      init_params: makes the parameters, a dictionary, such as `lambda: model.init(key, images)["params"]`. The EMA starts
        equal to them.
      rules: a fork's own sharding rules, see `parallel.shardings`.
    """
    abstract = abstract_state(init_params, optimizer, mesh, rules)
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(_initializer(init_params, optimizer), out_shardings=out)()
