"""Pictures and metrics for the log of a training run, made with the moving average of its weights."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from dar_jax.config import SamplingConfig, TokenizerTraining
from dar_jax.data.sources import Source, held_out, open_source
from dar_jax.errors import InputError
from dar_jax.evaluation.extractor import Extractor, open_extractor
from dar_jax.evaluation.fid import compare
from dar_jax.evaluation.images import from_source, subset
from dar_jax.evaluation.likelihood import evaluate_transformer
from dar_jax.evaluation.statistics import RunningStatistics, Statistics, collect
from dar_jax.evaluation.tokenizer import NAMES, LpipsWeights, evaluate_tokenizer, open_lpips
from dar_jax.inference import pictures
from dar_jax.inference.reconstruct import at_image_size, quantize
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import Trained, unless_missing
from dar_jax.models.pixels import to_uint8
from dar_jax.parallel.batches import to_host
from dar_jax.sampling.sampler import decode, generate
from dar_jax.sampling.settings import Networks, make_settings
from dar_jax.training.stages import Stage
from dar_jax.training.state import Params

T = TypeVar("T")

COUNT = 16
BATCH = 64  # images at a time


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
    seeds = np.arange(len(images), dtype=np.uint32)
    values = quantize(networks, params, images).values
    decoded = decode(networks, params, make_settings(SamplingConfig(), config), values, seeds).images
    return pictures.beside(to_host(images), to_uint8(to_host(decoded)))


def _samples(stage: Stage, ema: Params) -> np.ndarray:
    tokenizer = stage.tokenizer.experiment.build_model(stage.model.dtype)
    networks = Networks(tokenizer, stage.model, stage.experiment.method, stage.experiment.condition)
    params = {"tokenizer": stage.tokenizer.params, "transformer": ema}
    settings = make_settings(stage.experiment.config.sampling, tokenizer.config, networks.method)
    labels = np.arange(COUNT, dtype=np.int32) % len(stage.class_names)
    condition = stage.experiment.condition({"label": labels})
    images = generate(networks, params, settings, condition, np.arange(COUNT, dtype=np.uint32)).images
    return pictures.sheet(to_uint8(to_host(images)), [stage.class_names[label] for label in labels])


class Evaluation:
    """What `training.loop.train` logs every `evaluate_every` steps, on `evaluate_images` images: scalars by name.

    Of a tokenizer, what `evaluate_tokenizer` measures on held-out images; of a transformer, bits per token and accuracy on
    them, and the FID of as many samples against as many images that it was trained on. So few images make a Fréchet distance
    that only the same run can be compared with. What needs weights that are missing is left out, with a warning by `open`.
    """

    def __init__(self):
        self._kept: dict[str, Any] = {}

    def open(self, stage: Stage) -> list[str]:
        """Opens all that an evaluation needs, so that a run ends before its first step where something is missing.

        Returns notes to print. Raises InputError where the held-out images are not there, or have other classes.
        """
        config = stage.experiment.config
        source = self._source(stage)
        self._extractor()
        if isinstance(config, TokenizerTraining):
            self._lpips()
        elif (names := tuple(source.class_names)) != stage.class_names:
            differing = sorted(set(names) ^ set(stage.class_names)) or ["their order"]
            raise InputError(
                f"the images to evaluate on have other classes than those to train on ({', '.join(differing[:5])}): "
                f"{source.description}; mend them, or set train.evaluate_every to 0"
            )
        if source.description == getattr(stage.source, "description", None):
            return ["there is no split to evaluate on, eval_ figures are of the training images"]
        return []

    def __call__(self, stage: Stage, ema: Params) -> dict[str, float]:
        config = stage.experiment.config
        count, data = config.train.evaluate_images, held_out(config.data)
        size, mesh = min(BATCH, count), jax.tree.leaves(ema)[0].sharding.mesh
        source, extractor = self._source(stage), self._extractor()
        if isinstance(config, TokenizerTraining):
            trained = Trained(None, Networks(stage.model), {"tokenizer": ema}, mesh)
            report = evaluate_tokenizer(trained, source, data, extractor, self._lpips(), batch_size=size, num_images=count)
            names = tuple(NAMES)
        else:
            tokenizer = stage.tokenizer.experiment.build_model(stage.model.dtype)
            networks = Networks(tokenizer, stage.model, stage.experiment.method, stage.experiment.condition)
            params = {"tokenizer": stage.tokenizer.params, "transformer": ema}
            trained = Trained(None, networks, params, mesh)
            report = evaluate_transformer(trained, source, data, size, count, stage.class_names)
            if extractor is not None and data.source != "codes":
                report["fid"] = self._fid(stage, trained, extractor, count, size)
            names = ("bits_per_token", "bits_per_token_without_class", "accuracy", "fid")
        return {f"eval_{name}": report[name] for name in names if name in report}

    def _fid(self, stage: Stage, trained: Trained, extractor: Extractor, count: int, size: int) -> float:
        config, running = trained.config, RunningStatistics(extractor.network, count, 0)
        labels = np.arange(count) % len(stage.class_names)
        for drawn in sample(trained, labels, np.arange(count), stage.experiment.config.sampling, size):
            for features in extractor([drawn.images]):
                running.add(features)

        def reference() -> Statistics:
            images = from_source(stage.source, config.image_size)
            return collect(extractor, subset(images, min(count, images.count)), 0)

        samples = running.result("samples", (config.image_size, config.image_size, config.channels))
        return compare(samples, self._once("reference", reference))["fid"]

    def _source(self, stage: Stage) -> Source:
        data = held_out(stage.experiment.config.data)
        return self._once("source", lambda: (stage.experiment.source or open_source)(data))

    def _extractor(self) -> Extractor | None:
        return self._once("extractor", lambda: unless_missing(lambda: open_extractor(batch_size=BATCH)))

    def _lpips(self) -> LpipsWeights | None:
        return self._once("lpips", lambda: unless_missing(open_lpips))

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]
