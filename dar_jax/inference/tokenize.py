"""A data set -> stored codes, shard by shard, so that an interrupted run goes on where it stopped; on one host or on many."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.config import DataConfig, TokenizerConfig
from dar_jax.console import Progress
from dar_jax.data import codes, shards, transforms
from dar_jax.data.pipeline import elements
from dar_jax.data.sources import Source
from dar_jax.errors import InputError
from dar_jax.inference import identity
from dar_jax.inference.reconstruct import quantize
from dar_jax.inference.trained import Trained
from dar_jax.parallel.batches import over_batches
from dar_jax.sampling.settings import Networks
from dar_jax.training.checkpoint import require_shared


def tokenize(
    trained: Trained, source: Source, data: DataConfig, out: str | os.PathLike, batch_size: int = 64, shard_size: int = 4096
) -> codes.CodesInfo:
    """Encodes every image of a data set and stores the codes in the folder `out`, see `data.codes`.

    With several processes, each encodes its own shards on its own devices. A process that finishes early takes over shards
    that are still missing. Process 0 ends with a finished folder.

    Args:
      trained: of `load_tokenizer`, on a mesh of devices of this process.
      source: the data set, of `open_source(data)`.
      data: how images are cropped. `center` stores one crop of each, and its mirror image too where `flip` is set;
        `ten_crop` stores ten, mirror images included.
      out: a folder, or one in a bucket; the same one for all processes.
      batch_size: images (each with all its crops) at a time.
      shard_size: images per file.

    Raises InputError where the settings do not fit the tokenizer or each other, or `out` holds codes of anything else: other
    weights, settings, code or images, see `identity`.
    """
    check_data(trained.config, data)
    model = identity.of_model(trained)
    mirrored = " and its mirror image" if data.flip and data.crop == "center" else ""
    info = codes.CodesInfo(
        images=len(source),
        shard_size=shard_size,
        crops=len(_crops(np.zeros((_side(data), _side(data), data.channels), np.uint8), data)),
        tokens=trained.config.num_tokens,
        codebook_size=trained.config.codebook_size,
        class_names=tuple(source.class_names),
        tokenizer=model["weights"]["tokenizer"],
        data=f"{source.description}; {data.crop} crops{mirrored} of {data.image_size} pixels",
    )
    require_shared(out)
    about = {"model": model, "source": identity.of_source(source), "shard_size": shard_size}
    about["data"] = dataclasses.asdict(dataclasses.replace(data, workers=0))  # their number changes nothing
    identity.claim(out, about, "shard-*")
    size = trained.full_batch(batch_size)
    side = _side(data)
    encode = functools.partial(_codes, trained.networks, trained.params, data)

    def write(numbers: Sequence[int], progress: Progress) -> None:
        indices = [_padded(info.elements(shard), size) for shard in numbers]
        owners = np.repeat(numbers, [len(each) // size for each in indices]).tolist()  # the shard of every batch
        with contextlib.closing(
            elements(
                source,
                data,
                np.concatenate(indices),
                batch_size=size,
                crop=lambda image: transforms.center_crop(image, side),
            )
        ) as batches:
            tagged = (((shard, batch), (batch["image"],)) for shard, batch in zip(owners, batches))
            results = over_batches(encode, tagged, size, trained.mesh)
            for shard, of_shard in itertools.groupby(results, lambda result: result[0][0]):
                stored, labels = [], []
                for (_, batch), tokens in of_shard:
                    progress.add(min(size, len(info.elements(shard)) - len(stored) * size))
                    stored.append(tokens[batch["valid"]])
                    labels.append(batch["label"][batch["valid"]])
                codes.write_shard(out, info, shard, np.concatenate(stored), np.concatenate(labels))

    shards.write_missing(out, info, write, "tokenized")
    return info


def check_data(tokenizer: TokenizerConfig, data: DataConfig) -> None:
    """Raises InputError where a tokenizer cannot store the codes of such data."""
    if not tokenizer.vq_enable:
        raise InputError("the tokenizer is continuous (vq_enable is false), it makes no codes")
    if data.source == "codes":
        raise InputError("data.source is codes, which are stored already")
    if data.crop == "random":
        raise InputError("data.crop is random, stored codes are of fixed crops; set it to center or ten_crop")
    check_images(tokenizer, data)


def check_images(tokenizer: TokenizerConfig, data: DataConfig) -> None:
    """Raises InputError where a tokenizer cannot take the images of such data."""
    for name in ("image_size", "channels"):
        if getattr(data, name) != getattr(tokenizer, name):
            raise InputError(f"data.{name} is {getattr(data, name)}, but the tokenizer's is {getattr(tokenizer, name)}")


@functools.partial(jax.jit, static_argnames=("networks", "data"))
def _codes(networks: Networks, params: dict, data: DataConfig, images: jax.Array) -> jax.Array:
    """Centre crops uint8 [B, S, S, C] -> codes [B, crops, T]. Cropping here moves a tenth of the pixels."""
    crops = jnp.stack(_crops(images, data), axis=1)
    tokens = quantize(networks, params, crops.reshape(-1, *crops.shape[2:])).codes
    return tokens.reshape(*crops.shape[:2], -1)


def _side(data: DataConfig) -> int:
    """Pixels along a side of the centre crop, from which the other crops are taken."""
    return int(data.image_size * data.ten_crop_scale) if data.crop == "ten_crop" else data.image_size


def _crops(images: Any, data: DataConfig) -> list[Any]:
    """Centre crops [..., S, S, C] -> the crops to store of each, arrays [..., image_size, image_size, C]."""
    if data.crop == "ten_crop":
        return transforms.ten_crops(images, data.image_size)
    return [images, transforms.flip(images)] if data.flip else [images]


def _padded(shard: range, size: int) -> np.ndarray:
    """A shard's indices, padded with -1 to whole batches of `size`."""
    indices = np.full(-(-len(shard) // size) * size, -1)
    indices[: len(shard)] = shard
    return indices
