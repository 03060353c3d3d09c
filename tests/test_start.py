"""Starting from other weights: what is loaded, newly initialised and skipped, on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stand_in

from dar_jax import parallel
from dar_jax.config import MeshConfig
from dar_jax.training import checkpoint
from dar_jax.training.loop import train
from dar_jax.training.start import Start, start_from
from dar_jax.training.state import init_state


def tree(value, layers=3, classes=11, codes=16, head=True):
    shapes = {"blocks": {"mlp": {"down": {"kernel": (layers, 8, 4)}}}, "class_table": (classes, 8)}
    shapes |= {"position_table": (layers * 4, 8), "token_table": (codes, 8)}
    shapes |= {"repa": {"linear0": {"kernel": (8, 8)}}} if head else {}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: value + jnp.arange(shape[0], dtype=jnp.float32).reshape(-1, *[1] * (len(shape) - 1))
                        * jnp.ones(shape), shapes, is_leaf=is_shape)  # fmt: skip


@pytest.mark.parametrize("mesh", [(1, 1, 8), (2, 4, 1)])
def test_what_fits_is_taken(mesh):
    mesh = parallel.make_mesh(MeshConfig(*mesh))
    with jax.set_mesh(mesh):
        state = init_state(lambda: tree(0.0), optax.adam(1e-3), mesh)
        start = Start("other", jax.device_get(tree(100.0, layers=2, classes=6, codes=32, head=False) | {"extra": jnp.ones(3)}))
        found, lines = start_from(start, state)
    params = found.params
    np.testing.assert_array_equal(params["blocks"]["mlp"]["down"]["kernel"][:, 0, 0], [100, 101, 2])
    np.testing.assert_array_equal(params["position_table"][:, 0], [*range(100, 108), 8, 9, 10, 11])
    np.testing.assert_array_equal(params["class_table"][:, 0], [*range(10), 105])  # the null class is the last row
    np.testing.assert_array_equal(params["token_table"], state.params["token_table"])
    np.testing.assert_array_equal(params["repa"]["linear0"]["kernel"], state.params["repa"]["linear0"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, found.ema, params)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, state.params)
    table = "\n".join(lines)
    for words in (
        "start from other: 0 of its 5 tensors loaded in full, the others:",
        "partly loaded blocks/mlp/down/kernel 2 x 8 x 4 3 x 8 x 4 the first 2 of 3",
        "new class_table 6 x 8 11 x 8 its null class was loaded",
        "new token_table 32 x 8 16 x 8 another shape",
        "new repa/linear0/kernel - 8 x 8 not in those weights",
        "skipped extra 3 - not in this model",
    ):
        assert words in " ".join(table.split()), words


def test_the_same_shapes_are_taken_whole():
    mesh = parallel.make_mesh(MeshConfig(-1))
    state = init_state(lambda: tree(0.0), optax.adam(1e-3), mesh)
    found, lines = start_from(Start("other", jax.device_get(tree(7.0))), state)
    jax.tree.map(np.testing.assert_array_equal, found.params, tree(7.0))
    assert lines == ["start from other: 5 of its 5 tensors loaded in full"]


def test_a_run_starts_from_weights_once(tmp_path, capsys):
    config = stand_in.config
    still = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0))
    standing = stand_in.experiment.with_config(still)
    train(stand_in.experiment, tmp_path / "first")
    weights = jax.device_get(checkpoint.load(tmp_path / "first", stand_in.experiment).params)
    calls = []

    def start():
        calls.append(1)
        return Start("first", weights)

    train(standing, tmp_path / "second", start=start)
    assert "start from first" in capsys.readouterr().out
    for part in ("params", "ema"):  # nothing is learnt: what the run ends with is what it began with
        begun = jax.device_get(checkpoint.load(tmp_path / "second", standing, part).params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), begun, weights)
    train(standing, tmp_path / "second", resume=True, start=start)
    said = capsys.readouterr().out
    assert "not read again" in said and "nothing is left to do" in said and len(calls) == 1
    assert config.train.steps == checkpoint.latest_step(tmp_path / "second")
