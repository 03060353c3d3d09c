"""One training step, a pure function: gradients, clipping, AdamW and the moving average."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dar_jax import parallel
from dar_jax.config import TokenizerTraining, TransformerTraining
from dar_jax.experiment import LossFn
from dar_jax.training.state import Params, TrainState

Batch = Any  # a tree of arrays, the batch first
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    config: TokenizerTraining | TransformerTraining,
    state: TrainState,
    mesh: Mesh,
    schedule: optax.Schedule | None = None,
) -> TrainStep:
    """Returns the jitted `train_step(state, batch, frozen) -> (state, metrics)`, which consumes (donates) its state.

    Args:
      loss_fn: (params, batch, key, frozen, step) -> (scalar loss, metrics). Metrics are means over the batch where they are
        floating point and counts where they are integers; `frozen` holds parameters that are not trained; `step` is the
        number of steps done, int32.
      state: the state or its abstract form; only the shardings are looked at.
      schedule: the optimizer's learning rate at each step, for the metrics.

    Step k draws its randomness from fold_in(key(seed), k), with accumulation also from the number of the part. The metrics
    gain `grad_norm` (before clipping), `finite` (loss, gradient and the parameters after the step are), and `learning_rate`
    where there is a `schedule` or the optimizer is one of `optax.inject_hyperparams`. Where loss or gradient are not finite,
    parameters, EMA and optimizer stay as they were.
    """
    train, decay = config.train, config.optimizer.ema_decay
    optimizer = optax.with_extra_args_support(optimizer)  # some read the loss, `value`
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def gradients(params: Params, batch: Batch, key: jax.Array, frozen: Any, step: jax.Array) -> tuple[Params, Metrics]:
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, key, frozen, step)
        grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        return grads, {**metrics, "loss": loss}

    def accumulated(params: Params, batch: Batch, key: jax.Array, frozen: Any, step: jax.Array) -> tuple[Params, Metrics]:
        def add_part(total: Params, numbered: tuple[jax.Array, Batch]) -> tuple[Params, Metrics]:
            number, part = numbered
            grads, metrics = gradients(params, part, jax.random.fold_in(key, number), frozen, step)
            return jax.tree.map(jnp.add, total, grads), metrics

        parts = (jnp.arange(train.accumulate), split_batch(batch, train.accumulate, mesh))
        total, metrics = jax.lax.scan(add_part, jax.tree.map(jnp.zeros_like, params), parts)
        mean = jax.tree.map(lambda x: x / train.accumulate, total)
        return mean, {name: jnp.sum(x, 0) if is_count(x) else jnp.mean(x, 0) for name, x in metrics.items()}

    def train_step(state: TrainState, batch: Batch, frozen: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(train.seed), state.step)
        grads, metrics = (accumulated if train.accumulate > 1 else gradients)(state.params, batch, key, frozen, state.step)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=metrics["loss"])
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        new, old = (params, ema, opt_state), (state.params, state.ema, state.opt_state)
        params, ema, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        finite &= jnp.isfinite(optax.tree.norm(params))  # of what is written anyway; the update may have overflowed
        metrics |= {"grad_norm": grad_norm, "finite": finite}
        rate = schedule(state.step) if schedule else _injected_rate(opt_state)
        if rate is not None:
            metrics["learning_rate"] = rate
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, parallel.replicated(mesh)))


def _injected_rate(opt_state: optax.OptState) -> jax.Array | None:
    """The learning rate in the state of `optax.inject_hyperparams`, None where there is none or there are several."""
    tables = [table for _, table in optax.tree.get_all_with_path(opt_state, "hyperparams")]
    rates = [table["learning_rate"] for table in tables if "learning_rate" in table]
    return rates[0] if len(rates) == 1 else None


def is_count(metric: jax.Array) -> bool:
    """Integer metrics are counts: they add up over parts of a batch and over steps, where others are averaged."""
    return jnp.issubdtype(metric.dtype, jnp.integer)


def split_batch(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """[B, ...] -> [parts, B / parts, ...], each part spread over the devices as the batch is, so that nothing moves."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, P(None, parallel.BATCH)))

    return jax.tree.map(split, batch)
