"""Sizes of the paper's table, and what options may not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import TRANSFORMER_SIZES, TransformerConfig
from dar_jax.models.transformer import Llama
from dar_jax.training.losses import cross_entropy, drop_condition, next_token_loss

PARAMETERS = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672, "XXXL": 3_893_027_840}
TINY = TransformerConfig(layers=3, heads=4, width=32, num_tokens=8, vocab_size=16, num_classes=5, mlp_multiple=8)
LABELS, TOKENS = jnp.array([0, 4]), jax.random.randint(jax.random.key(1), (2, 8), 0, 16)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size):
    config = TransformerConfig(**TRANSFORMER_SIZES[size])
    tokens = jnp.zeros((1, config.num_tokens), jnp.int32)
    params = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros(1, jnp.int32), tokens)
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(params)) == PARAMETERS[size]
    assert TransformerConfig() == TransformerConfig(**TRANSFORMER_SIZES["L"])


@pytest.fixture(scope="module")
def params():
    params = jax.jit(Llama(TINY).init)(jax.random.key(0), LABELS, TOKENS)["params"]
    assert not np.any(params["output"])  # the head starts at zero
    return params | {"output": jax.random.normal(jax.random.key(2), params["output"].shape)}


def test_remat_changes_nothing(params):
    """With dropout on: the second forward pass has to draw the same masks."""

    def gradients(remat):
        loss, batch = next_token_loss(None, Llama(TINY, remat=remat)), {"codes": TOKENS, "condition": LABELS}
        return jax.jit(jax.grad(lambda p: loss(p, batch, jax.random.key(3), {}, 0)[0]))(params)

    stored = gradients("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stored, gradients(remat))


def test_dropout_differs_by_key_and_layer(params):
    model = Llama(TINY)
    logits = [model.apply({"params": params}, LABELS, TOKENS, key) for key in (None, *jax.random.split(jax.random.key(0), 2))]
    assert not np.allclose(logits[0], logits[1]) and not np.allclose(logits[1], logits[2])


def test_labels_are_dropped_to_the_null_class(params):
    labels = jnp.arange(10_000) % 5
    dropped = drop_condition(Llama(TINY), labels, jax.random.key(0))
    assert float((dropped == 5).mean()) == pytest.approx(0.1, abs=0.01)
    np.testing.assert_array_equal(dropped[dropped != 5], labels[dropped != 5])

    always = dataclasses.replace(TINY, class_dropout=1.0, token_dropout=0.0, attention_dropout=0.0, mlp_dropout=0.0)
    loss_fn, batch = next_token_loss(None, Llama(always)), {"codes": TOKENS, "condition": LABELS}
    trained = loss_fn(params, batch, jax.random.key(0), {}, 0)[0]
    expected = cross_entropy(Llama(TINY).apply({"params": params}, jnp.full(2, 5), TOKENS), TOKENS)[0]
    assert float(trained) == pytest.approx(float(expected), rel=1e-6)
