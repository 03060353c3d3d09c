"""The tokenizer's size, what its parts may see, and its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import TokenizerConfig, VelocityConfig
from dar_jax.models.tokenizer import Tokenizer

IMAGES = jnp.tanh(jax.random.normal(jax.random.key(8), (3, 8, 8, 1)))


def test_released_size():
    params = jax.eval_shape(Tokenizer(TokenizerConfig()).init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(params)) == 307_444_672


def test_queries_see_patches_and_earlier_queries(tiny_tokenizer):
    """Moving query j's vector moves the latents from j on and no earlier ones; every pixel moves every latent."""
    model, params = tiny_tokenizer()

    def latents(table, images):
        moved = params | {"encoder": params["encoder"] | {"query_table": table}}
        return model.apply({"params": moved}, images, method="encode")[0]

    table = params["encoder"]["query_table"]
    of_queries = np.abs(jax.jacrev(latents)(table, IMAGES[:1])).sum((1, 3))[:, :16]  # [T, T]
    np.testing.assert_array_equal(np.triu(of_queries, 1), 0)
    assert np.all(of_queries[np.tril_indices(16)] > 0)
    of_pixels = np.abs(jax.jacrev(latents, argnums=1)(table, IMAGES[:1])).sum(1)
    assert np.all(of_pixels > 0)


def test_condition_step_is_condition(tiny_tokenizer):
    from dar_jax.models.blocks import unstack

    model, params = tiny_tokenizer()
    apply = functools.partial(model.apply, {"params": params})
    values = jax.random.normal(jax.random.key(0), (2, 16, 8))
    whole = apply(values, method="condition")
    caches, pieces = model.empty_caches(2), []
    layers = unstack(params["token_decoder"]["blocks"], model.config.decoder_layers)
    for start, stop in ((0, 4), (4, 5), (5, 16)):
        piece, caches = apply(layers, values[:, start:stop], caches, start, method="condition_step")
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, atol=2e-6)


def test_nearest_code_and_straight_through_gradient(tiny_tokenizer):
    model, params = tiny_tokenizer()
    apply = functools.partial(model.apply, {"params": params})
    latents = jax.random.normal(jax.random.key(0), (2, 16, 8))
    quantized = apply(latents, method="quantize")
    rows = np.asarray(params["quantizer"]["codebook"], np.float64)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    normal = np.asarray(latents, np.float64) / np.linalg.norm(latents, axis=-1, keepdims=True)
    distances = np.linalg.norm(normal[..., None, :] - rows, axis=-1)
    np.testing.assert_array_equal(quantized.codes, distances.argmin(-1))
    np.testing.assert_allclose(quantized.values, rows[quantized.codes], atol=1e-6)
    np.testing.assert_allclose(apply(quantized.codes, method="lookup"), quantized.values, atol=1e-6)

    weights = jax.random.normal(jax.random.key(1), latents.shape)
    through = jax.grad(lambda z: jnp.vdot(weights, apply(z, method="quantize").values))(latents)
    of_norm = jax.grad(lambda z: jnp.vdot(weights, z / jnp.linalg.norm(z, axis=-1, keepdims=True)))(latents)
    np.testing.assert_allclose(through, of_norm, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {
            "query_low_rank": False,
            "velocity": VelocityConfig(width=16, layers=2, head_size=8, patch_size=2, repa_layer=1, repa_grid=2, repa_hidden=8),
        },
        {"vq_enable": False, "velocity": VelocityConfig(16, 2, 8, 4, share_time_encoding=True, mlp_head=True, repa_layer=None)},
    ],
)
def test_options_train(tiny_tokenizer, sizes):
    """Every parameter of every option gets a gradient, in bfloat16 products as well."""
    model, params = tiny_tokenizer(encoder_layers=1, decoder_layers=1, **sizes)
    with_repa = model.config.velocity.repa_layer is not None

    def loss(params, dtype):
        noise = jax.random.normal(jax.random.key(0), IMAGES.shape)
        output = model.clone(dtype=dtype).apply({"params": params}, IMAGES, jnp.array([0.1, 0.5, 0.9]), noise, with_repa)
        total = jnp.square(output.velocity - output.target).mean()
        total += jnp.square(output.quantized.latents - (output.quantized.entries if model.config.vq_enable else 0)).mean()
        return total + (jnp.square(output.repa).mean() if with_repa else 0)

    exact, half = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    for path, gradient in jax.tree.leaves_with_path(exact[1]):
        assert np.any(gradient), jax.tree_util.keystr(path)
    assert float(half[0]) == pytest.approx(float(exact[0]), rel=0.05)
    if with_repa:
        assert model.apply({"params": params}, IMAGES, return_repa=True).repa.shape == (3, 4, 768)


def test_repa_is_refused_where_there_is_none(tiny_tokenizer):
    model, params = tiny_tokenizer()
    with pytest.raises(ValueError, match="repa_layer"):
        model.apply({"params": params}, IMAGES, return_repa=True)
