"""Counting floating-point operations: against hand computation and against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from dar_jax.config import TokenizerTraining, TransformerConfig
from dar_jax.models.transformer import Llama
from dar_jax.training.flops import count_flops, matrix_products, model_flops
from dar_jax.training.losses import cross_entropy, tokenizer_loss


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


A, B = array(3, 4), array(4, 5)
ONCE = 2 * 3 * 4 * 5


def repeated(a, b):
    """The product, 7 times in an outer loop of 2 turns."""

    def outer(carry, _):
        return jax.lax.scan(lambda c, _: (c + a @ b, None), carry, length=7)[0], None

    return jax.lax.scan(outer, jnp.zeros((3, 5)), length=2)[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b: jnp.sin(a @ b) + 1, ONCE),
        (lambda a, b: jax.jit(jnp.matmul)(a, b) @ (a @ b).T, 2 * ONCE + 2 * 3 * 5 * 3),
        (lambda a, b: jnp.einsum("ij,jk->k", a, b), 2 * 4 * 5),
        (repeated, 14 * ONCE),
        (jax.grad(lambda a, b: jnp.sum((a @ b) ** 2), argnums=(0, 1)), 3 * ONCE),
        (jax.grad(jax.checkpoint(lambda a, b: jnp.sum(jnp.sin(a @ b) @ b.T))), 5 * ONCE),
        (
            lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: (a @ b) @ (b.T @ b)),
            ONCE + 2 * 5 * 4 * 5 + 2 * 3 * 5 * 5,
        ),
        (lambda a, b: jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c + a @ b, jnp.zeros((3, 5))), ONCE),
        (jax.vmap(lambda a, b: a @ b, in_axes=(0, None)), 2 * 3 * 4 * 5),
    ],
)
def test_counts_by_hand(function, expected):
    assert count_flops(function, A, B) == expected


def convolve(stride, padding, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: jax.lax.conv_general_dilated(x, w, stride, padding, dimension_numbers=numbers, **options)


def pulled(function, *arguments):
    """A function's value and its gradients."""
    value, pull = jax.vjp(function, *arguments)
    return value, pull(value)


@pytest.mark.parametrize(
    "function",
    [
        convolve((1, 1), "SAME"),
        convolve((2, 3), "VALID"),
        convolve((1, 1), [(2, 1), (0, 3)], lhs_dilation=(2, 1), rhs_dilation=(1, 2)),
        lambda x, w: pulled(convolve((2, 2), "SAME"), x, w),
    ],
)
def test_agrees_with_xla(function):
    """Where nothing but products takes operations, XLA's count is the same, taps on padding left out."""
    arguments = array(2, 9, 11, 3), array(3, 3, 3, 4)
    expected = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
    assert count_flops(function, *arguments) == expected


def test_every_layer_of_a_transformer_counts_and_so_does_what_is_computed_again():
    config = TransformerConfig(layers=3, heads=2, width=16, num_tokens=8, vocab_size=32, num_classes=4, mlp_multiple=8)
    batch, width, hidden, length = 2, 16, config.mlp_width, 8
    layer = 2 * width * (4 * width + 3 * hidden) + 4 * width * length
    forward = batch * length * (3 * layer + 2 * width * 32)

    def of(remat):
        model = Llama(config, remat=remat)
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(1, jnp.int32), jnp.zeros((1, 8), jnp.int32)))
        run = lambda params, labels, codes: model.apply(params, labels, codes).sum()  # noqa: E731
        inputs = (params, array(batch, dtype=jnp.int32), array(batch, length, dtype=jnp.int32))
        return count_flops(run, *inputs), count_flops(jax.grad(run), *inputs)

    (once, trained), (_, again) = of("none"), of("full")
    assert once == forward
    # The first inputs' gradients are those of tables, which take no product; so the three layers, twice, and the head.
    assert trained == 3 * forward
    assert trained < again <= 4 * forward


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_model_flops_leave_out_what_is_computed_again(remat, tiny_tokenizer):
    """In every kind of block: self attention, cross attention, and those of the transformer."""
    tokenizer, params = tiny_tokenizer()
    config = TransformerConfig(layers=3, heads=2, width=16, num_tokens=8, vocab_size=32, num_classes=4, mlp_multiple=8)

    def encode_and_denoise(remat):
        model, key = tokenizer.clone(remat=remat), jax.random.key(0)
        loss = lambda params, images: tokenizer_loss(TokenizerTraining(), model)(params, {"image": images}, key, {}, 0)[0]  # noqa: E731
        return jax.jit(jax.grad(loss)).trace(params, array(2, 8, 8, 1))

    def predict(remat):
        model = Llama(config, remat=remat)
        loss = lambda params, labels, codes: cross_entropy(model.apply({"params": params}, labels, codes), codes)[0]  # noqa: E731
        inputs = array(2, dtype=jnp.int32), array(2, 8, dtype=jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        return jax.jit(jax.grad(loss)).trace(params, *inputs)

    for trace in (encode_and_denoise, predict):
        once, again = trace("none"), trace(remat)
        assert sum(product.flops for product in matrix_products(again.jaxpr)) > model_flops(again) == model_flops(once) > 0


def test_cudnn_attention_counts_as_attention_without_a_kernel(monkeypatch):
    """Traced as on a GPU that has cuDNN, forward and backward."""
    kernels = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernels, "check_is_flash_attention", lambda *arguments: None)

    def flops(implementation):
        attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=implementation).sum()  # noqa: E731
        sides = array(2, 128, 4, 16, dtype=jnp.bfloat16), *[array(2, 64, 4, 16, dtype=jnp.bfloat16)] * 2
        return count_flops(attend, *sides), count_flops(jax.grad(attend, argnums=(0, 1, 2)), *sides)

    assert flops("cudnn") == flops("xla") == (4 * 2 * 128 * 64 * 4 * 16, 12 * 2 * 128 * 64 * 4 * 16)


def test_products_tell_where_they_are_and_of_what_they_are_made():
    def function(a, b):
        with jax.named_scope("attention"):
            return jnp.matmul(a, b, precision="highest")

    (product,) = matrix_products(jax.make_jaxpr(function)(A, B))
    assert (product.sizes, product.precision, product.dtypes) == ((3, 5, 4), "highest", ("float32", "float32"))
    assert "attention" in product.name
