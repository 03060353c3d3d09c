"""Rotary positions, bicubic resizing, dropout, and what a stack of blocks computes with and without storing it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from parity_cases import Case

from dar_jax.models.attention import FLASH_UNIT, _attend_tpu, apply_rope, causal_mask, pad_rope, rope_1d, rope_2d
from dar_jax.models.layers import dropout
from dar_jax.models.pixels import resize_bicubic


def test_rope_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    rope = rope_1d(jnp.arange(50), 16, 10000.0)

    def product(i, j):
        turned = [apply_rope(x, tuple(part[place : place + 1] for part in rope)) for x, place in ((q, i), (k, j))]
        return float(jnp.vdot(*turned))

    assert product(3, 10) == pytest.approx(product(40, 47), abs=1e-5)
    assert product(3, 10) != pytest.approx(product(3, 11), abs=1e-3)


def test_rope_2d_turns_halves_by_row_and_column():
    cos, sin = rope_2d(3, 5, 8, 10000.0)
    assert cos.shape == sin.shape == (15, 8)
    np.testing.assert_allclose(sin[7], np.sin([-1, 1, -0.01, 0.01, -2, 2, -0.02, 0.02]), rtol=1e-5)  # row 1, column 2
    cos, sin = pad_rope((cos, sin), 2)
    np.testing.assert_array_equal(cos[15:], 1)
    np.testing.assert_array_equal(sin[15:], 0)


def test_causal_mask_of_a_later_piece():
    np.testing.assert_array_equal(causal_mask(2, 5, 2)[0], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def test_resize_bicubic_is_that_of_pytorch(request):
    """The frozen network's input of the parity cases: 256 -> 224 pixels."""
    case = Case.load(request.config.rootpath / "tests" / "golden", "dinov2_vitb14")
    images = case.rules.smooth_images(case.seed, "images", 2, 256).transpose(0, 2, 3, 1)
    images = ((images + 1) / 2 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    resized = resize_bicubic(jnp.asarray(images, jnp.float32), 224, 224)
    case.check("preprocessed", resized.transpose(0, 3, 1, 2), atol=5e-5)


def test_dropout_keeps_the_mean():
    x = jnp.ones((400, 500))
    dropped = dropout(x, 0.1, jax.random.key(0))
    assert float((dropped == 0).mean()) == pytest.approx(0.1, abs=5e-3)
    assert float(dropped.mean()) == pytest.approx(1, abs=5e-3)
    assert dropout(x, 0.1, None) is x


def test_tpu_kernel_is_attention():
    """The values and gradients of the kernel that bfloat16 takes on TPU, interpreted."""
    keys = jax.random.split(jax.random.key(0), 3)
    heads = [jax.random.normal(key, (1, FLASH_UNIT, 2, 64), jnp.bfloat16) for key in keys]

    def loss(attention, *heads):
        return jnp.sum(jnp.sin(attention(*heads).astype(jnp.float32)))

    with pltpu.force_tpu_interpret_mode():
        found = jax.value_and_grad(lambda *heads: loss(_attend_tpu, *heads), argnums=(0, 1, 2))(*heads)
    expected = jax.value_and_grad(lambda *heads: loss(jax.nn.dot_product_attention, *heads), argnums=(0, 1, 2))(*heads)
    chex.assert_trees_all_close(found, expected, atol=0.02, rtol=0.02)
