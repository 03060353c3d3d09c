"""The PatchGAN discriminator: what a logit sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.models import discriminator
from dar_jax.models.discriminator import Discriminator


@pytest.mark.parametrize("halvings, patch", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_published_size(halvings, patch, monkeypatch):
    """Without norms, each of which sees the whole image."""
    monkeypatch.setattr(discriminator.nn, "GroupNorm", lambda *_, **__: lambda x: x)
    model, images = Discriminator(16, halvings), jnp.zeros((1, 128, 128, 1))
    params = jax.tree.map(lambda x: jnp.abs(x) + 0.01, model.init(jax.random.key(0), images))
    middle = model.apply(params, images).shape[1] // 2
    seen = jax.grad(lambda x: model.apply(params, x)[0, middle, middle])(images)[0, :, :, 0] != 0
    rows, columns = np.nonzero(seen)
    assert seen.sum() == patch**2 and np.ptp(rows) == np.ptp(columns) == patch - 1


def test_an_image_s_logits_depend_on_that_image_alone():
    model = Discriminator(16, 2)
    images = jax.random.normal(jax.random.key(0), (3, 20, 20, 3))
    params = model.init(jax.random.key(1), images)
    logits = model.apply(params, images)
    assert logits.shape == (3, 3, 3)
    np.testing.assert_allclose(logits[1:2], model.apply(params, images[1:2]), rtol=1e-5, atol=1e-6)
    assert np.std(logits) > 0


def test_layers_are_those_of_the_release():
    """Convolutions of its size 256 x 256 x 3, width 128; of its norms the affine part, which depends on the time there."""
    params = jax.eval_shape(Discriminator(128, 3).init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
    shapes = {name: part["kernel"].shape for name, part in params.items() if "kernel" in part}
    assert shapes == {
        "conv0": (4, 4, 3, 128),
        "conv1": (4, 4, 128, 256),
        "conv2": (4, 4, 256, 512),
        "conv3": (4, 4, 512, 1024),
        "logits": (4, 4, 1024, 1),
    }
    assert [name for name, part in params.items() if "kernel" in part and "bias" in part] == ["conv0", "logits"]
