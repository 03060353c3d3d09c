"""An experiment small enough to train in a moment: its own model, loss and data. Tests import it, and load it by path."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dar_jax.config import DataConfig, OptimizerConfig, TokenizerConfig, TokenizerTraining, TrainConfig
from dar_jax.experiment import Experiment


class Model(nn.Module):
    """Denoises 8-pixel grey images with one hidden layer; `codes` makes 4 codes of 16 for each."""

    config: Any
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(len(images), -1)
        return nn.Dense(x.shape[-1], name="out")(nn.silu(nn.Dense(32, name="in")(x))).reshape(images.shape)

    @property
    def data_shape(self) -> tuple[int, ...]:
        return 8, 8, 1

    def codes(self, images: jax.Array) -> jax.Array:
        return jnp.argmax(self(images).reshape(len(images), 4, 16), axis=-1)


def loss(config: TokenizerTraining, model: Model):
    def loss_fn(params: Any, batch: dict, key: jax.Array, frozen: dict, step: jax.Array):
        images = batch["image"]
        out = model.apply({"params": params}, images + 0.1 * jax.random.normal(key, images.shape))
        return jnp.square(out - images).mean(), {"code_counts": jnp.bincount(batch["label"], length=16)}

    return loss_fn


class Source:
    """64 fixed noise images in 10 classes; reading one takes `seconds`."""

    class_names = tuple("0123456789")
    description = "noise"

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        time.sleep(self.seconds)
        return {"image": self.images[index], "label": index % 10}


DATA = DataConfig(image_size=8, channels=1, crop="center")
config = TokenizerTraining(
    name="stand-in",
    model=TokenizerConfig(image_size=8, channels=1, encoder_patch_size=4, num_tokens=4, num_groups=2, codebook_size=16),
    data=DATA,
    optimizer=OptimizerConfig(learning_rate=1e-2, schedule="cosine", weight_decay=0.1, ema_decay=0.9),
    train=TrainConfig(steps=8, batch_size=8, log_every=2, checkpoint_every=2),
)
experiment = Experiment(config, model=Model, loss=loss, source=lambda data: Source())
