"""Pictures for the log of a training run, made with the moving average of its weights."""

from collections.abc import Mapping

import jax
import numpy as np

from dar_jax.config import SamplingConfig, TokenizerTraining
from dar_jax.evaluation import pictures
from dar_jax.evaluation.loading import to_host
from dar_jax.evaluation.reconstruct import at_image_size, quantize
from dar_jax.sampling.logits import linear_guidance
from dar_jax.sampling.sampler import Networks, decode, generate, initial_noise, make_settings, sample_keys
from dar_jax.training.stages import Stage
from dar_jax.training.state import Params

COUNT = 16


def log_pictures(stage: Stage, ema: Params, batch: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """What `training.loop.train` logs every `sample_every` steps: pictures uint8 [h, w, 3] by name.

    Of a tokenizer, images of the batch beside their reconstructions; of a transformer, samples of its first classes.
    """
    if isinstance(stage.experiment.config, TokenizerTraining):
        return {"reconstructions": _reconstructions(stage, ema, batch["image"][:COUNT])}
    return {"samples": _samples(stage, ema)}


def _reconstructions(stage: Stage, ema: Params, images: jax.Array) -> np.ndarray:
    config = at_image_size(stage.experiment.config.model)
    networks, params = Networks(stage.model.clone(config=config)), {"tokenizer": ema}
    noise = initial_noise(sample_keys(np.arange(len(images), dtype=np.uint32)), config)
    values = quantize(networks, params, images).values
    decoded = decode(networks, params, make_settings(SamplingConfig(), config), values, noise).images
    return pictures.beside(to_host(images), pictures.to_uint8(to_host(decoded)))


def _samples(stage: Stage, ema: Params) -> np.ndarray:
    tokenizer = stage.tokenizer.experiment.build_model(stage.model.dtype)
    networks = Networks(tokenizer, stage.model)
    params = {"tokenizer": stage.tokenizer.params, "llama": ema}
    settings = make_settings(stage.experiment.config.sampling, tokenizer.config, stage.experiment.guidance or linear_guidance)
    labels = np.arange(COUNT, dtype=np.int32) % len(stage.class_names)
    images = generate(networks, params, settings, labels, np.arange(COUNT, dtype=np.uint32)).images
    return pictures.sheet(pictures.to_uint8(to_host(images)), [stage.class_names[label] for label in labels])
