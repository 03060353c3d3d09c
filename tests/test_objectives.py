"""The losses beyond what the parity cases store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import TokenizerLossConfig
from dar_jax.objectives import entropy_loss, tokenizer_loss

IMAGES = jnp.tanh(jax.random.normal(jax.random.key(8), (64, 8, 8, 1)))


def test_entropy_loss_by_hand():
    sure = 100.0 * jnp.eye(4)  # four tokens, each sure of a code of its own
    assert float(entropy_loss(sure, 1.0)) == pytest.approx(-np.log(4), abs=1e-3)
    collapsed = jnp.tile(sure[:1], (4, 1))  # all sure of the same code
    assert float(entropy_loss(collapsed, 1.0)) == pytest.approx(0, abs=1e-3)
    assert float(entropy_loss(jnp.zeros((4, 4)), 1.0)) == pytest.approx(0, abs=1e-3)  # unsure of all


def test_terms_weights_and_counts(tiny_tokenizer):
    model, params = tiny_tokenizer()
    key = jax.random.key(0)
    loss, metrics = tokenizer_loss(model, params, IMAGES, key, TokenizerLossConfig(entropy=0.1))
    parts = [float(metrics[name]) for name in ("flow", "codebook", "commitment", "entropy")]
    assert float(loss) == pytest.approx(sum(parts), rel=1e-5)
    assert parts[2] == pytest.approx(0.25 * parts[1], rel=1e-5)
    assert int(metrics["code_counts"].sum()) == 64 * 16
    doubled = TokenizerLossConfig(flow=2.0, codebook=0.0, commitment=0.0)
    assert float(tokenizer_loss(model, params, IMAGES, key, doubled)[0]) == pytest.approx(2 * parts[0], rel=1e-5)


def test_times_and_noise_follow_the_key(tiny_tokenizer):
    model, params = tiny_tokenizer()
    losses = [float(tokenizer_loss(model, params, IMAGES, jax.random.key(k), TokenizerLossConfig())[0]) for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_feature_terms_are_added(tiny_tokenizer):
    """The hook for perceptual terms sees the images and the prediction, and its gradient reaches the encoder."""
    model, params = tiny_tokenizer()

    def features(images, output):
        return {"pixels": 3 * jnp.abs(images - output.image).mean()}

    def loss(params, hook):
        return tokenizer_loss(model, params, IMAGES, jax.random.key(0), TokenizerLossConfig(), hook)

    (with_hook, metrics), plain = loss(params, features), loss(params, None)[0]
    assert float(with_hook - plain) == pytest.approx(float(metrics["pixels"]), rel=1e-4)
    gradients = [jax.grad(lambda p, hook=hook: loss(p, hook)[0])(params)["encoder"] for hook in (features, None)]
    assert any(not np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, gradients)))
