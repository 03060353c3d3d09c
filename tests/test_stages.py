"""What an experiment's parts become in a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.config import VelocityConfig
from dar_jax.quickstart import TOKENIZER
from dar_jax.training.experiment import Experiment
from dar_jax.training.stages import tokenizer_stage


def test_feature_terms_join_the_loss_of_a_run():
    """The hook gets the images and the REPA features of a model that has their head; its terms are logged and summed up."""
    velocity = VelocityConfig(width=32, layers=2, head_size=16, patch_size=4, repa_layer=1, repa_hidden=8, repa_width=12)
    model = dataclasses.replace(TOKENIZER.model, encoder_layers=1, encoder_width=32, decoder_width=32, velocity=velocity)

    def features(images, output):
        assert output.repa.shape == (3, 4, 12)
        return {"brightness": jnp.abs(images.mean() - output.image.mean()), "repa": jnp.square(output.repa).mean()}

    stage = tokenizer_stage(Experiment(dataclasses.replace(TOKENIZER, model=model), features=features))
    batch = {"image": np.stack([stage.source[i]["image"] for i in range(3)]), "label": np.arange(3)}
    loss, metrics = jax.jit(stage.loss_fn)(stage.init_params(), batch, jax.random.key(0), {})
    parts = ("flow", "codebook", "commitment", "entropy", "brightness", "repa")
    assert all(metrics[name] != 0 for name in parts)
    np.testing.assert_allclose(loss, sum(metrics[name] for name in parts), rtol=1e-5)
