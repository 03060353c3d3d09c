"""The schedule, the decay mask and the initial state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_in import Model

from dar_jax import parallel
from dar_jax.config import MeshConfig, OptimizerConfig, TokenizerConfig, TransformerConfig, VelocityConfig
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.training.optimizer import decay_mask, learning_rate, make_optimizer
from dar_jax.training.state import init_state


@pytest.mark.parametrize(
    "schedule, warmup, expected",
    [
        ("constant", 0, {0: 1.0, 99: 1.0}),
        ("constant", 10, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("linear", 10, {9: 1.0, 39: 1.0, 69: 0.6, 99: 0.2}),
        ("cosine", 10, {9: 1.0, 39: 1.0, 54: 0.6 + 0.4 * np.cos(np.pi / 4), 69: 0.6, 99: 0.2}),
        ("linear", 50, {24: 0.5, 49: 1.0, 50: 1.0, 99: 0.2}),  # the decay waits for the warm-up
    ],
)
def test_learning_rate_at_the_corners(schedule, warmup, expected):
    config = OptimizerConfig(1.0, schedule, warmup_steps=warmup, decay_start=39, final_learning_rate=0.2)
    rate = learning_rate(config, steps=100)
    np.testing.assert_allclose([rate(step) for step in expected], list(expected.values()), rtol=1e-6)


def test_decayed_are_the_tensors_of_two_or_more_dimensions_of_the_method():
    """Counted without the layers axis of stacks, and a bias is a vector there even where it is stored by heads, [N, K]."""
    sizes = VelocityConfig(share_time_encoding=True, mlp_head=True)
    tokenizer = jax.eval_shape(Tokenizer(TokenizerConfig(velocity=sizes)).init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    llama = jax.eval_shape(Llama(TransformerConfig()).init, jax.random.key(0), jnp.zeros(1, int), jnp.zeros((1, 4), int))
    decayed = []
    for tree in (tokenizer["params"], llama["params"]):
        mask = jax.tree.leaves(decay_mask(tree))
        for (path, leaf), decays in zip(jax.tree_util.tree_leaves_with_path(tree), mask):
            name = parallel.path_name(path)
            dimensions = 1 if name.endswith("bias") else leaf.ndim - ("blocks/" in name)
            assert decays == (dimensions > 1), name
            decayed.append(decays)
    assert 40 < sum(decayed) < len(decayed) / 2


def test_optimizer_decays_what_the_mask_says():
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((2, 3))}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05 * np.ones((2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], np.zeros((2, 3)))


def test_initial_state_does_not_depend_on_the_mesh():
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def init():
        return Model(None).init(jax.random.key(3), jnp.zeros((1, 8, 8, 1)))["params"]

    states = []
    for sizes in ((1, 1, 1), (2, 2, 2), (1, 8, 1)):
        mesh = parallel.make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
        with jax.set_mesh(mesh):
            states.append(init_state(init, optimizer, mesh))
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
    state = states[1]
    assert state.params["in"]["kernel"].sharding.shard_shape((64, 32)) == (32, 16)
    jax.tree.map(np.testing.assert_array_equal, state.ema, state.params)
    assert state.step == 0 and np.any(state.params["in"]["kernel"])
