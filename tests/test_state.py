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
from dar_jax.training.optimizer import decay_mask, learning_rate, make_optimizer, matrix_axes
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
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup, decay_start=39, final_learning_rate=0.2)
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_decays_what_the_mask_says(name):
    params = {"blocks": {"kernel": jnp.ones((1, 2, 3)), "bias": jnp.ones((2, 3))}, "codebook": jnp.ones((2, 3))}
    optimizer = make_optimizer(OptimizerConfig(name, learning_rate=0.1, weight_decay=0.5), steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["kernel"], -0.05 * np.ones((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(updates["codebook"], -0.05 * np.ones((2, 3)), rtol=1e-6)
    np.testing.assert_array_equal(updates["blocks"]["bias"], np.zeros((2, 3)))


def test_muon_orthogonalises_each_matrix_of_a_stack():
    """Its steps have singular values near 1, times 0.2 sqrt(larger side); the rest takes Adam's, with Nesterov."""
    gradient = jnp.stack([jnp.diag(jnp.array([9.0, 1.0, 0.1])), jax.random.normal(jax.random.key(0), (3, 3))])
    params = {"blocks": {"mlp": {"in": {"kernel": gradient, "bias": jnp.ones((2, 3))}}}, "class_table": jnp.ones((4, 3))}
    optimizer = make_optimizer(OptimizerConfig("muon", learning_rate=0.1, clip_norm=None), steps=10)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    steps = updates["blocks"]["mlp"]["in"]
    values = np.linalg.svd(steps["kernel"], compute_uv=False) / (0.1 * 0.2 * 3**0.5)
    assert 0.6 < values.min() <= values.max() < 1.3
    np.testing.assert_allclose(steps["kernel"][0] - np.diag(np.diag(steps["kernel"][0])), 0, atol=1e-6)
    assert float(steps["kernel"][0, 0, 0]) < 0
    first_step = 1 + 0.9 * 0.1 / (1 - 0.9**2)  # by hand, in learning rates
    np.testing.assert_allclose([*steps["bias"].ravel(), *updates["class_table"].ravel()], -0.1 * first_step, rtol=1e-4)


def test_muon_knows_the_matrices():
    images = jnp.zeros((1, 256, 256, 3))
    shapes = jax.eval_shape(Tokenizer(TokenizerConfig()).init, jax.random.key(0), images)["params"]
    axes = matrix_axes(shapes)
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: leaf is None or hasattr(leaf, "reduction_axis"))
    named = {parallel.path_name(path): leaf for path, leaf in leaves}
    assert named["encoder/blocks/attention/q/kernel"] == ((1,), (2, 3))
    assert named["encoder/blocks/attention/out/kernel"] == ((1, 2), (3,))
    assert named["velocity/blocks/modulation/kernel"] == ((1,), (2, 3))
    assert named["encoder/blocks/mlp/in/kernel"] == ((1,), (2,))
    assert named["encoder/blocks/mlp/in/bias"] is named["quantizer/codebook"] is named["velocity/patch_out/kernel"] is None


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
