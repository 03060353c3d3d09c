"""A checkpoint as one object for notebooks and scripts: `dar_jax.load`.

Shapes: N samples or images, T tokens, G groups, H W pixels, C channels.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dar_jax.config import SamplingConfig, TransformerTraining
from dar_jax.errors import InputError
from dar_jax.experiment import load_experiment
from dar_jax.inference.reconstruct import encode
from dar_jax.inference.samples import check_given, class_number, pair, rows_in_turn, sample
from dar_jax.inference.trained import Trained, Weights, load_sampler, load_tokenizer
from dar_jax.models.pixels import to_float, to_uint8
from dar_jax.models.transformer import score
from dar_jax.parallel.batches import over_batches, row_slices, split_rows
from dar_jax.sampling.sampler import decode, lookup_codes
from dar_jax.sampling.settings import make_settings
from dar_jax.training.checkpoint import inspect

DENOISING = ("solver", "steps", "num_denoising_steps", "num_groups")  # the settings of `decode`


class Model:
    """A trained tokenizer, or a transformer with its tokenizer, on this machine's devices.

    Images are uint8 [N, H, W, C], codes int32 [N, T]. Every sample follows from its seed alone: the same label, seed and
    settings give the same image in any batch and on any devices. Every method raises InputError, in one line, for arguments
    that do not fit the model.
    """

    def __init__(self, trained: Trained, batch_size: int = 64):
        self.trained, self.batch_size = trained, batch_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; labels may be given by name or by number."""
        return self.trained.class_names

    def sample(self, labels: Sequence[int | str], seeds: Sequence[int] = (0,), **settings: Any) -> np.ndarray:
        """Images of these classes: uint8 [N, H, W, C].

        Args:
          labels, seeds: one label goes with many seeds, one seed with many labels, equally many pair up.
          settings: fields of `SamplingConfig` that differ from the run's, such as `guidance=(1.1, 8.0)` or `temperature=0.9`;
            `prefix`, int32 [k] or [N, k], fixes the first k tokens; `given` is what the experiment's condition reads beside
            the label, arrays [n, ...] by name, of which sample i gets row i modulo n.
        """
        *_, images = self._draw(labels, seeds, settings, previews=False)
        return images

    def stream(self, labels: Sequence[int | str], seeds: Sequence[int] = (0,), **settings: Any) -> Iterator[np.ndarray]:
        """Yields the previews uint8 [N, H, W, C] after each of the G groups, the last of which are the images. As `sample`."""
        return self._draw(labels, seeds, settings, previews=True)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """The codes int32 [N, T] of images uint8 [N, H, W, C] of the tokenizer's size."""
        config, images = self.trained.config, np.asarray(images)
        fits = images.dtype == np.uint8 and images.shape[1:] == (config.image_size, config.image_size, config.channels)
        if not fits or not len(images):
            shape = f"uint8 [N, {config.image_size}, {config.image_size}, {config.channels}]"
            raise InputError(f"images are {images.dtype} {list(images.shape)}, the tokenizer takes {shape}")
        return encode(self.trained, images, self.batch_size)

    def decode(self, codes: np.ndarray, seeds: Sequence[int] | None = None, **settings: Any) -> np.ndarray:
        """Images uint8 [N, H, W, C] of codes int32 [N, T], denoised from the noise of these seeds (default: 0 .. N - 1).

        settings: those of `DENOISING` that differ from the defaults, such as `steps="late3"`.
        """
        codes, trained = self._codes(codes), self.trained
        _, numbers = pair([0] * len(codes), range(len(codes)) if seeds is None else seeds)
        if len(numbers) != len(codes):
            raise InputError(f"there are {len(codes)} images and {len(numbers)} seeds")
        if void := sorted(set(settings) - set(DENOISING)):
            raise InputError(f"{void[0]} is no setting of decoding, which are {', '.join(DENOISING)}")
        chosen = make_settings(_with(SamplingConfig(), settings), trained.config, trained.networks.method)

        def images(codes: jax.Array, seeds: jax.Array) -> jax.Array:
            values = lookup_codes(trained.networks, trained.params, codes)
            return decode(trained.networks, trained.sampler_params, chosen, values, seeds).images

        return to_uint8(self._over_rows(images, codes, np.array(numbers, np.uint32)))

    def score(
        self, images: np.ndarray, labels: Sequence[int | str], given: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """The bits float32 [N, T] that each code of these images takes, given their classes and the codes before it.

        The experiment's condition reads the images, and what is `given` as in `sample`.
        """
        networks, params = self._transformer().networks, self.trained.params["transformer"]
        check_given(given or {}, networks.condition)
        others = rows_in_turn(given or {}, slice(0, len(images)))
        numbers = np.asarray([self._number(label) for label in labels], np.int32)
        if len(numbers) != len(images):
            raise InputError(f"{len(images)} images and {len(numbers)} labels do not pair up")

        def bits_of(codes: jax.Array, images: jax.Array, labels: jax.Array, others: dict[str, jax.Array]) -> jax.Array:
            condition = networks.condition({**others, "label": labels, "image": to_float(images)})
            return score(networks.transformer, params, condition, codes)[0]

        return self._over_rows(bits_of, self.encode(images), np.asarray(images), numbers, others)

    def _over_rows(self, function: Callable[..., jax.Array], *arrays: Any) -> np.ndarray:
        """A function of arrays [N, ...], or trees of them, on the devices batch by batch."""
        size = self.trained.full_batch(self.batch_size)
        batches = split_rows(row_slices(0, len(arrays[0]), size), *arrays)
        return np.concatenate([part for _, part in over_batches(function, batches, size, self.trained.mesh)])

    def _draw(self, labels: Sequence[int | str], seeds: Sequence[int], settings: dict[str, Any], previews: bool):
        info = self._transformer().info
        assert info is not None and isinstance(info.config, TransformerTraining)
        base = info.config.sampling
        prefix, given = settings.pop("prefix", None), settings.pop("given", None)
        check_given(given or {}, self.trained.networks.condition)
        sampling = _with(base, settings)
        numbers, each = pair([self._number(label) for label in labels], seeds)
        if not numbers:
            raise InputError("there are no labels or no seeds")
        if prefix is not None:
            prefix = self._prefix(np.asarray(prefix), len(numbers))
        options = {"prefix": prefix, "previews": previews, "given": given}
        batches = sample(self.trained, numbers, each, sampling, min(self.batch_size, len(numbers)), **options)
        finished: dict[int, list[np.ndarray]] = {}  # by group, the images of the batches so far
        for batch in batches:
            parts = finished.setdefault(batch.groups, [])
            parts.append(batch.images)
            if batch.rows.stop == len(numbers):
                yield np.concatenate(parts)

    def _transformer(self) -> Trained:
        if self.trained.networks.transformer is None:
            raise InputError("this is a tokenizer; sampling and scoring need the folder of a transformer's run")
        return self.trained

    def _number(self, label: int | str) -> int:
        names = self.class_names if isinstance(label, str) else [""] * len(self.class_names)  # a number is no name
        return class_number(str(label), names)

    def _prefix(self, tokens: np.ndarray, count: int) -> np.ndarray:
        longest, most = self.trained.config.num_tokens, self.trained.config.codebook_size
        if tokens.ndim not in (1, 2) or tokens.shape[-1] > longest or tokens.shape[:-1] not in ((), (count,)):
            raise InputError(f"the prefix is {list(tokens.shape)}, it should be [k] or [{count}, k] with k up to {longest}")
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.size and not 0 <= tokens.min() <= tokens.max() < most:
            raise InputError(f"the prefix should be integers, 0 .. {most - 1}")
        return tokens.astype(np.int32)

    def _codes(self, codes: np.ndarray) -> np.ndarray:
        codes, config = np.asarray(codes), self.trained.config
        if not np.issubdtype(codes.dtype, np.integer):
            raise InputError(f"codes are {codes.dtype}, they should be integers")
        if codes.ndim != 2 or codes.shape[1] != config.num_tokens or not len(codes):
            raise InputError(f"codes are {list(codes.shape)}, the tokenizer takes [N, {config.num_tokens}]")
        if codes.min() < 0 or codes.max() >= config.codebook_size:
            raise InputError(f"codes are {codes.min()} .. {codes.max()}, the tokenizer has 0 .. {config.codebook_size - 1}")
        return codes.astype(np.int32)


def _with(base: SamplingConfig, settings: dict[str, Any]) -> SamplingConfig:
    if unknown := sorted(set(settings) - {field.name for field in dataclasses.fields(base)}):
        raise InputError(f"there is no setting {unknown[0]!r}; settings are {', '.join(vars(base))}")
    return dataclasses.replace(base, **settings)


def load(
    path: str | os.PathLike, experiment: str | os.PathLike | None = None, weights: Weights = "ema", batch_size: int = 64
) -> Model:
    """Opens a checkpoint for use.

    Args:
      path: a run's folder, of a transformer or a tokenizer, or one of its checkpoints/STEP; or hf://OWNER/NAME.
      experiment: the run's experiment file, needed if that replaced the model or parts of sampling.
      weights: the moving average, or the weights of the last step.
      batch_size: samples or images at a time.

    Raises InputError, in one line, where there is no checkpoint, it is damaged, or needs its experiment.
    """
    parts = None if experiment is None else load_experiment(experiment)
    open_checkpoint = load_tokenizer if inspect(path).is_tokenizer else load_sampler
    return Model(open_checkpoint(path, parts, weights), batch_size)
