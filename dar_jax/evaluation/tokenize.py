"""A data set -> stored codes, shard by shard, so that an interrupted run goes on where it stopped."""

import os
from collections.abc import Callable

import jax
import numpy as np

from dar_jax.config import DataConfig, TokenizerConfig
from dar_jax.data import codes, transforms
from dar_jax.data.pipeline import epoch
from dar_jax.data.sources import Source
from dar_jax.errors import InputError
from dar_jax.evaluation.loading import Trained, full_batch
from dar_jax.evaluation.progress import Progress
from dar_jax.evaluation.reconstruct import encode


def tokenize(
    trained: Trained, source: Source, data: DataConfig, out: str | os.PathLike, batch_size: int = 64, shard_size: int = 4096
) -> codes.CodesInfo:
    """Encodes every image of a data set and stores the codes in the folder `out`, see `data.codes`.

    Args:
      source: the data set, of `open_source(data)`.
      data: how images are cropped. `center` stores one crop of each, and its mirror image too where `flip` is set;
        `ten_crop` stores ten, mirror images included.
      batch_size: images (each with all its crops) at a time.
      shard_size: images per file.

    Raises InputError where the settings do not fit the tokenizer or each other, or `out` holds other codes.
    """
    check_data(trained.config, data)
    crop = _crops(data)
    mirrored = " and its mirror image" if data.flip and data.crop == "center" else ""
    info = codes.CodesInfo(
        images=len(source),
        shard_size=shard_size,
        crops=len(crop(np.zeros((data.image_size, data.image_size, data.channels), np.uint8))),
        tokens=trained.config.num_tokens,
        codebook_size=trained.config.codebook_size,
        class_names=tuple(source.class_names),
        tokenizer=codes.fingerprint(jax.tree.map(np.asarray, trained.params["tokenizer"])),
        data=f"{source.description}; {data.crop} crops{mirrored} of {data.image_size} pixels",
    )
    missing = codes.missing_shards(out, info)
    size = full_batch(batch_size, trained.mesh)
    with Progress("tokenized", info.images) as progress:
        progress.skip(info.images - sum(len(info.elements(shard)) for shard in missing))
        for shard in missing:
            places = info.elements(shard)
            stored, labels = [], []
            for batch in epoch(source, data, batch_size=size, start=places.start, stop=places.stop, crop=crop):
                crops = batch["image"]  # [B, crops, S, S, C]
                tokens = encode(trained, crops.reshape(-1, *crops.shape[2:]), size * info.crops)
                stored.append(tokens.reshape(size, info.crops, -1)[batch["valid"]])
                labels.append(batch["label"][batch["valid"]])
                progress.add(min(size, places.stop - places.start - (len(stored) - 1) * size))
            codes.write_shard(out, shard, np.concatenate(stored), np.concatenate(labels))
    codes.finish(out)
    return info


def check_data(tokenizer: TokenizerConfig, data: DataConfig) -> None:
    """Raises InputError where images as `data` gives them cannot be stored as codes of a tokenizer."""
    if not tokenizer.vq_enable:
        raise InputError("the tokenizer is continuous (vq_enable is false), it makes no codes")
    if data.source == "codes":
        raise InputError("data.source is codes, which are stored already")
    if data.crop == "random":
        raise InputError("data.crop is random, stored codes are of fixed crops; set it to center or ten_crop")
    for name in ("image_size", "channels"):
        if getattr(data, name) != getattr(tokenizer, name):
            raise InputError(f"data.{name} is {getattr(data, name)}, but the tokenizer's is {getattr(tokenizer, name)}")


def _crops(data: DataConfig) -> Callable[[np.ndarray], np.ndarray]:
    """image uint8 [H, W, C] -> its crops uint8 [crops, S, S, C]. Lambdas, because worker processes have to receive them."""
    size, scale, mirror = data.image_size, data.ten_crop_scale, data.flip
    if data.crop == "ten_crop":
        return lambda image: transforms.ten_crops(image, size, scale)

    def center(image: np.ndarray) -> np.ndarray:
        crop = transforms.center_crop(image, size)
        return np.stack([crop, transforms.flip(crop)] if mirror else [crop])

    return center
