"""Pictures and metrics for the log of a training run, with the moving average of its weights."""

from collections.abc import Mapping

import jax
import numpy as np

from dar_jax.config import TokenizerTraining
from dar_jax.data.codes import check_made_by
from dar_jax.data.sources import Source, held_out, open_source
from dar_jax.errors import InputError
from dar_jax.evaluation.extractor import Extractor, open_extractor
from dar_jax.evaluation.fid import compare
from dar_jax.evaluation.images import from_source, subset
from dar_jax.evaluation.likelihood import evaluate_transformer
from dar_jax.evaluation.statistics import RunningStatistics, Statistics, add_features, collect
from dar_jax.evaluation.tokenizer import NAMES, LpipsWeights, evaluate_tokenizer, open_lpips, require_images
from dar_jax.inference import pictures
from dar_jax.inference.reconstruct import reconstruct
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import Trained, unless_missing
from dar_jax.parallel.batches import to_host
from dar_jax.sampling.settings import Networks, label_of
from dar_jax.training.stages import Stage
from dar_jax.training.state import Params

COUNT = 16
BATCH = 64  # images at a time


def log_pictures(stage: Stage, ema: Params, batch: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """The pictures uint8 [h, w, 3], by name, that `training.loop.train` logs every `sample_every` steps.

    Images of the batch beside their reconstructions for a tokenizer, samples of the first classes for a transformer; where the
    experiment's condition is its own, samples of what the batch has.
    """
    trained, config, seeds = _trained(stage, ema), stage.experiment.config, np.arange(COUNT)
    if isinstance(config, TokenizerTraining):
        images = to_host(batch["image"][:COUNT])
        decoded = reconstruct(trained, images, seeds[: len(images)], batch_size=len(images)).images
        return {"reconstructions": pictures.beside(images, decoded)}
    labels, given = seeds % len(stage.class_names), {}
    if stage.experiment.condition is not label_of:
        given = {name: to_host(rows[:COUNT]) for name, rows in batch.items() if name != "codes"}
        labels = given.pop("label")
    samples = sample(trained, labels, seeds[: len(labels)], config.sampling, len(labels), given=given)
    images = np.concatenate([batch.images for batch in samples])
    return {"samples": pictures.sheet(images, [stage.class_names[label] for label in labels])}


class Evaluation:
    """The scalars, by name, that `training.loop.train` logs every `evaluate_every` steps, on `evaluate_images` images.

    For a tokenizer, the measures of `evaluate_tokenizer` on held-out images; for a transformer, bits per token and accuracy on
    them, and the FID of as many samples against as many images that it was trained on. So few images make a Fréchet distance
    that only the same run can be compared with. A measure without its weights is left out, with a warning by `open`.
    """

    source: Source
    extractor: Extractor | None
    lpips: LpipsWeights | None = None
    reference: Statistics | None = None

    def open(self, stage: Stage) -> list[str]:
        """Opens all that an evaluation needs, so that a run ends before its first step where something is missing.

        Returns notes to print. Raises InputError where the held-out images are not there, or have other classes.
        """
        config = stage.experiment.config
        source = self.source = open_source(held_out(config.data), stage.experiment.source)
        self.extractor = unless_missing(lambda: open_extractor(batch_size=BATCH))
        if isinstance(config, TokenizerTraining):
            require_images(stage.model)
            self.lpips = unless_missing(open_lpips)
        elif (names := tuple(source.class_names)) != stage.class_names:
            differing = sorted(set(names) ^ set(stage.class_names)) or ["their order"]
            raise InputError(
                f"the images to evaluate on have other classes than those to train on ({', '.join(differing[:5])}): "
                f"{source.description}; mend them, or set train.evaluate_every to 0"
            )
        if stage.tokenizer is not None:
            check_made_by(source, stage.tokenizer.params, stage.tokenizer.info.workdir)
        if source.description == stage.source.description:
            return ["there is no split to evaluate on, eval_ figures are of the training images"]
        return []

    def __call__(self, stage: Stage, ema: Params) -> dict[str, float]:
        config, trained = stage.experiment.config, _trained(stage, ema)
        count, data = config.train.evaluate_images, held_out(config.data)
        size = min(BATCH, count)
        if isinstance(config, TokenizerTraining):
            report = evaluate_tokenizer(
                trained, self.source, data, self.extractor, self.lpips, batch_size=size, num_images=count
            )
            names = tuple(NAMES)
        else:
            report = evaluate_transformer(trained, self.source, data, size, count)
            if self.extractor is not None and data.source != "codes":
                report["fid"] = self._fid(stage, trained, count, size)
            names = ("bits_per_token", "bits_per_token_without_class", "accuracy", "fid")
        return {f"eval_{name}": report[name] for name in names if name in report}

    def _fid(self, stage: Stage, trained: Trained, count: int, size: int) -> float:
        config, running = trained.config, RunningStatistics(self.extractor.network, count, 0)
        labels = np.arange(count) % len(stage.class_names)
        samples = sample(trained, labels, np.arange(count), stage.experiment.config.sampling, size)
        add_features(self.extractor, ((running, batch.images) for batch in samples))
        if self.reference is None:
            images = from_source(stage.source, config.image_size)
            self.reference = collect(self.extractor, subset(images, min(count, images.count)), 0)
        shape = (config.image_size, config.image_size, config.channels)
        return compare(running.result("samples", shape), self.reference)["fid"]


def _trained(stage: Stage, ema: Params) -> Trained:
    """The networks of a stage, with the moving average of the weights that it trains."""
    mesh = jax.tree.leaves(ema)[0].sharding.mesh
    networks, params = Networks(stage.model), {"tokenizer": ema}
    if stage.tokenizer is not None:
        tokenizer = stage.tokenizer.experiment.build_model(stage.model.dtype)
        networks = Networks(tokenizer, stage.model, stage.experiment.method, stage.experiment.condition)
        params = {"tokenizer": stage.tokenizer.params, "transformer": ema}
    return Trained(None, stage.class_names, networks, params, mesh)
