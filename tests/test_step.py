"""The training step: the same on every mesh, with accumulation, and harmless where the loss is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_in

from dar_jax import objectives, parallel
from dar_jax.config import LlamaConfig, MeshConfig, OptimizerConfig, TokenizerLossConfig, TrainConfig
from dar_jax.llama import Llama
from dar_jax.training.state import TrainState, make_optimizer
from dar_jax.training.step import make_train_step

CONFIG = dataclasses.replace(
    stand_in.config,
    optimizer=OptimizerConfig(1e-3, weight_decay=0.1, ema_decay=0.5),
    train=TrainConfig(steps=10, batch_size=16),
)


def run(loss_fn, params, batch, sizes=(1, 1, 1), config=CONFIG, steps=1):
    """Takes some steps on a mesh; returns the initial and the last state, and the metrics of each step, as NumPy."""
    mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    history = []
    with jax.set_mesh(mesh):
        params = jax.device_get(params)
        before = TrainState(np.int32(0), params, params, jax.device_get(optimizer.init(params)))
        state = jax.device_put(before, parallel.shardings(before, mesh))
        train_step = make_train_step(loss_fn, optimizer, config, state, mesh)
        batch = jax.device_put(batch, parallel.batch_sharding(mesh))
        for _ in range(steps):
            state, metrics = train_step(state, batch, {})
            history.append(jax.device_get(metrics))
    return before, jax.device_get(state), history


def require_same_on(sizes, loss_fn, params, batch):
    _, one, expected = run(loss_fn, params, batch, steps=2)
    for shape in sizes:
        _, many, found = run(loss_fn, params, batch, shape, steps=2)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose([m[name] for m in found], [m[name] for m in expected], rtol=1e-5)
        assert found[0]["loss"] != found[1]["loss"]
        # AdamW's first moment is linear in the gradients, where its steps are not
        jax.tree.map(require_close, first_moment(many), first_moment(one))


def first_moment(state):
    return state.opt_state[1][0].mu


def require_close(found, expected):
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-8


def test_tokenizer_on_eight_devices_is_as_on_one(tiny_tokenizer):
    model, params = tiny_tokenizer()
    images = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32)

    def loss_fn(params, batch, key, frozen):
        return objectives.tokenizer_loss(model, params, batch, key, TokenizerLossConfig(entropy=0.1))

    require_same_on([(2, 2, 2)], loss_fn, params, images)


def test_transformer_on_eight_devices_is_as_on_one():
    model = Llama(LlamaConfig(layers=2, heads=4, width=32, num_tokens=8, vocab_size=32, num_classes=10, mlp_multiple=16))
    rng = np.random.default_rng(0)
    labels, codes = rng.integers(0, 10, 16).astype(np.int32), rng.integers(0, 32, (16, 8)).astype(np.int32)
    params = model.init(jax.random.key(0), labels[:1], codes[:1])["params"]

    def loss_fn(params, batch, key, frozen):
        return objectives.next_token_loss(model, params, *batch, key)  # with dropout

    require_same_on([(2, 2, 2), (8, 1, 1), (1, 1, 8)], loss_fn, params, (codes, labels))


def linear_loss(params, batch, key, frozen):
    error = jnp.square(batch["x"] @ params["kernel"] - batch["y"]).mean()
    return error, {"count": jnp.sum(batch["y"] > 0), "draw": jax.random.uniform(key)}


@pytest.fixture
def linear():
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(16, 4)).astype(np.float32), "y": rng.normal(size=16).astype(np.float32)}
    return {"kernel": jnp.asarray(rng.normal(size=4), jnp.float32)}, batch


@pytest.fixture
def one_dimensional_rule(monkeypatch):
    monkeypatch.setattr(parallel, "RULES", (("kernel", parallel.P("fsdp")),))


@pytest.mark.usefixtures("one_dimensional_rule")
def test_accumulation_is_one_large_batch(linear):
    params, batch = linear
    _, whole, [expected] = run(linear_loss, params, batch)
    parts = dataclasses.replace(CONFIG, train=TrainConfig(steps=10, batch_size=16, accumulate=4))
    _, summed, [found] = run(linear_loss, params, batch, (2, 2, 1), parts)
    np.testing.assert_allclose(summed.params["kernel"], whole.params["kernel"], rtol=1e-6)
    np.testing.assert_allclose([found["loss"], found["grad_norm"]], [expected["loss"], expected["grad_norm"]], rtol=1e-6)
    assert found["count"] == expected["count"] == np.sum(batch["y"] > 0)
    key = jax.random.fold_in(jax.random.key(0), 0)
    draws = [jax.random.uniform(jax.random.fold_in(key, part)) for part in range(4)]
    np.testing.assert_allclose(found["draw"], np.mean(draws), rtol=1e-6)


@pytest.mark.usefixtures("one_dimensional_rule")
def test_step_follows_from_seed_and_number(linear):
    before, after, history = run(linear_loss, *linear, steps=3)
    draws = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), step)) for step in range(3)]
    np.testing.assert_allclose([m["draw"] for m in history], draws, rtol=1e-6)
    assert after.step == 3 and all(m["finite"] for m in history)
    _, first, _ = run(linear_loss, *linear)
    np.testing.assert_allclose(first.ema["kernel"], (before.params["kernel"] + first.params["kernel"]) / 2, rtol=1e-6)


@pytest.mark.usefixtures("one_dimensional_rule")
@pytest.mark.parametrize("spoil", ["loss", "gradient"])
def test_state_survives_what_is_not_finite(linear, spoil):
    def loss_fn(params, batch, key, frozen):
        loss, metrics = linear_loss(params, batch, key, frozen)
        if spoil == "loss":
            return loss + jnp.inf, metrics
        return loss + jnp.sqrt(jnp.sum(0 * params["kernel"])), metrics  # the slope of sqrt at 0 is infinite

    before, after, [metrics] = run(loss_fn, *linear)
    assert not metrics["finite"]
    for part in dataclasses.fields(TrainState):
        if part.name != "step":
            jax.tree.map(np.testing.assert_array_equal, getattr(after, part.name), getattr(before, part.name))
