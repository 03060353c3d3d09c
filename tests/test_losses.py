"""The losses beyond what the parity cases store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import TokenizerLossConfig, TokenizerTraining, TrainConfig, VelocityConfig
from dar_jax.errors import InputError
from dar_jax.features.dinov2 import Dinov2, Dinov2Config, preprocess
from dar_jax.features.vgg_lpips import Lpips
from dar_jax.models.flow import Path
from dar_jax.models.quantizer import entropy_loss
from dar_jax.training import losses
from dar_jax.training.losses import feature_terms, flow_weight, tokenizer_loss

IMAGES = jnp.tanh(jax.random.normal(jax.random.key(8), (64, 8, 8, 1)))


def test_entropy_loss_by_hand():
    sure = 100.0 * jnp.eye(4)  # four tokens, each sure of a code of its own
    assert float(entropy_loss(sure, 1.0)) == pytest.approx(-np.log(4), abs=1e-3)
    collapsed = jnp.tile(sure[:1], (4, 1))  # all sure of the same code
    assert float(entropy_loss(collapsed, 1.0)) == pytest.approx(0, abs=1e-3)
    assert float(entropy_loss(jnp.zeros((4, 4)), 1.0)) == pytest.approx(0, abs=1e-3)  # unsure of all


def loss_of(model, params, key, config, images=IMAGES, frozen=None, terms=()):
    loss_fn = jax.jit(tokenizer_loss(TokenizerTraining(loss=config), model, terms))
    return loss_fn(params, {"image": images}, key, frozen or {}, 0)


def test_terms_weights_and_counts(tiny_tokenizer):
    model, params = tiny_tokenizer()
    key = jax.random.key(0)
    loss, metrics = loss_of(model, params, key, TokenizerLossConfig(entropy=0.1))
    parts = [float(metrics[name]) for name in ("flow", "codebook", "commitment", "entropy")]
    assert float(loss) == pytest.approx(sum(parts), rel=1e-5)
    assert parts[2] == pytest.approx(0.25 * parts[1], rel=1e-5)
    assert int(metrics["code_counts"].sum()) == 64 * 16
    doubled = TokenizerLossConfig(flow=2.0, codebook=0.0, commitment=0.0)
    assert float(loss_of(model, params, key, doubled)[0]) == pytest.approx(2 * parts[0], rel=1e-5)


@pytest.mark.parametrize(
    ("message", "term"),
    [
        ("two terms of the loss are called flow", {"flow": 0.0}),
        ("two terms of the loss are called loss", {"loss": 0.0}),
        (r"the term l1 of the loss is \[64\]", {"l1": jnp.zeros(64)}),
        ("it should be {name: scalar}", jnp.zeros(())),
    ],
)
def test_terms_that_cannot_be_added(tiny_tokenizer, message, term):
    model, params = tiny_tokenizer()
    with pytest.raises(InputError, match=message):
        loss_of(model, params, jax.random.key(0), TokenizerLossConfig(), terms=[lambda *_: term])


@pytest.mark.parametrize("last", [None, 0.0])
def test_flow_power_measures_images(tiny_tokenizer, last):
    """Power 2 is the error of the image, over the mean of (1 - t')^2; with a final power of 0 the run ends at the paper's."""
    model, params = tiny_tokenizer()
    config = TokenizerTraining(loss=TokenizerLossConfig(flow_power=2, final_flow_power=last), train=TrainConfig(steps=11))
    key, times = jax.random.key(0), jax.random.uniform(jax.random.split(jax.random.key(0))[0], (64,))
    noise = jax.random.normal(jax.random.split(key)[1], IMAGES.shape)
    output = jax.jit(model.apply)({"params": params}, IMAGES, times, noise)
    shifted = times / (times + 2 * (1 - times))
    mean = 4 * (1.5 - 2 * np.log(2))  # of (1 - t')^2, t uniform, by hand
    weights = flow_weight(config, model)(output.times, jnp.int32(0))
    np.testing.assert_allclose(weights, (1 - shifted) ** 2 / mean, rtol=0.01)
    loss = jax.jit(tokenizer_loss(config, model))
    flow = [float(loss(params, {"image": IMAGES}, key, {}, jnp.int32(step))[1]["flow"]) for step in (0, 10)]
    of_images = float(jnp.square(output.image - IMAGES).mean()) / mean
    plain = float(jnp.square(output.velocity - output.target).mean()) / model.config.velocity.data_std**2
    assert flow[0] == pytest.approx(of_images, rel=0.01)
    assert flow[1] == pytest.approx(of_images if last is None else plain, rel=0.01)


def test_a_weight_of_the_path_and_a_flow_power_exclude_each_other(tiny_tokenizer):
    model, _ = tiny_tokenizer()
    model = model.copy(path=Path(weight=jnp.ones_like))
    with pytest.raises(InputError, match="leave loss.flow_power at 0"):
        flow_weight(TokenizerTraining(loss=TokenizerLossConfig(flow_power=2)), model)


def test_times_and_noise_follow_the_key(tiny_tokenizer):
    model, params = tiny_tokenizer()
    losses = [float(loss_of(model, params, jax.random.key(k), TokenizerLossConfig())[0]) for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_further_terms_are_added(tiny_tokenizer):
    """They see the images and the prediction, and their gradients reach the encoder."""
    model, params = tiny_tokenizer()

    def term(params, images, output, frozen, step):
        return {"pixels": 3 * jnp.abs(images - output.image).mean()}

    def loss(params, terms):
        return loss_of(model, params, jax.random.key(0), TokenizerLossConfig(), terms=terms)

    loss = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    ((with_hook, metrics), taught), ((plain, _), gradients) = loss(params, (term,)), loss(params, ())
    assert float(with_hook - plain) == pytest.approx(float(metrics["pixels"]), rel=1e-4)
    pairs = zip(*map(jax.tree.leaves, (taught["encoder"], gradients["encoder"])))
    assert any(not np.allclose(a, b) for a, b in pairs)


@pytest.mark.usefixtures("narrow_vgg")
def test_lpips_and_repa_by_hand(tiny_tokenizer, monkeypatch):
    velocity = VelocityConfig(width=16, layers=2, head_size=8, patch_size=4, repa_layer=1, repa_hidden=8, repa_width=24)
    model, params = tiny_tokenizer(image_size=16, velocity=velocity)
    sizes = Dinov2Config(width=24, layers=1, heads=2, table_side=5)
    monkeypatch.setattr(losses, "Dinov2Config", lambda: sizes)
    images = IMAGES.reshape(16, 16, 16, 1)[:4]
    rgb = jnp.repeat(images, 3, axis=-1)
    frozen = {
        "lpips": jax.jit(Lpips().init)(jax.random.key(1), rgb[:1], rgb[:1])["params"],
        "dinov2": jax.jit(Dinov2(sizes).init)(jax.random.key(2), jnp.zeros((1, 56, 56, 3)))["params"],
    }
    noise = jax.random.normal(jax.random.key(3), images.shape)
    output = jax.jit(model.apply, static_argnums=4)({"params": params}, images, jnp.full(4, 0.4), noise, True)
    terms = jax.jit(feature_terms(TokenizerLossConfig(lpips=0.5, repa=2.0)))(params, images, output, frozen, 0)

    distances = jax.jit(Lpips().apply)({"params": frozen["lpips"]}, rgb, jnp.repeat(output.image, 3, axis=-1))
    assert float(terms["lpips"]) == pytest.approx(0.5 * float(distances.mean()), rel=1e-5)
    tokens = np.asarray(Dinov2(sizes).apply({"params": frozen["dinov2"]}, preprocess(rgb, 56)), np.float64)  # 4 x 4 of 14
    repa = np.asarray(output.repa, np.float64)
    cosines = (repa * tokens).sum(-1) / np.linalg.norm(repa, axis=-1) / np.linalg.norm(tokens, axis=-1)
    assert float(terms["repa"]) == pytest.approx(2 * (1 - cosines).mean(), rel=1e-5)

    def loss(params, config):
        return loss_of(model, params, jax.random.key(0), config, images, frozen)[0]

    config = TokenizerLossConfig(flow=0, codebook=0, commitment=0, lpips=0.5, repa=2.0)
    gradients = jax.jit(jax.grad(loss), static_argnums=1)(params, config)
    flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    assert all(jnp.isfinite(leaf).all() for leaf in flat.values())
    assert all((jnp.abs(flat[name]) > 0).any() for name in flat if "repa" in name or "patch_out" in name or "patchify" in name)
