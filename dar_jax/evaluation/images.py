"""Images to evaluate: of one size, read in order, never all in memory, from an NPZ file, a folder, or any data source.

Shapes: N images, n of them at a time, H W pixels, C channels (1 grey, 3 RGB).
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dar_jax.config import DataConfig
from dar_jax.data.pipeline import elements
from dar_jax.data.sources import Source, open_source
from dar_jax.data.transforms import center_crop
from dar_jax.errors import InputError
from dar_jax.inference import npz

READ = 64  # images of a source at a time
LARGEST = 1 << 28  # bytes of an image
ARRAY = "arr_0"  # where ADM's sample files keep the images


@dataclass(frozen=True)
class Images:
    """N images [H, W, C] of one size.

    source: where they come from, one line.
    count: N, including unreadable files of a folder, which are left out.
    shape: (H, W, C).
    chunks: starts reading; yields uint8 [n, H, W, C], n of any size.
    chosen: (indices [n]) -> the same of these images alone, where that takes less reading; else None.
    """

    source: str
    count: int
    shape: tuple[int, int, int]
    chunks: Callable[[], Iterator[np.ndarray]]
    chosen: Callable[[np.ndarray], Iterator[np.ndarray]] | None = None


def from_npz(path: str | os.PathLike) -> Images:
    """The uint8 array `arr_0` [N, H, W, C] of an NPZ file.

    Raises InputError where there is none; reading does where it is damaged.
    """
    dtype, shape = npz.header(path, ARRAY)
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
        raise InputError(f"{ARRAY} in {path} is {dtype} {shape}; images are uint8 (N, height, width, 1 or 3)")
    if math.prod(shape[1:]) > LARGEST:
        raise InputError(f"{ARRAY} in {path} has images of {shape[2]} x {shape[1]} pixels, which is too large")
    return Images(str(path), shape[0], shape[1:], lambda: npz.chunks(path, ARRAY))


def from_source(source: Source, image_size: int | None = None) -> Images:
    """Centre crops of `image_size` pixels of a data source, or with None its images as they are.

    Raises InputError for stored codes; reading does where images as they are differ in size.
    """
    first = source[0]
    if "image" not in first:
        raise InputError(f"{source.description}: these are codes, not images; give the images that they were made of")
    shape = first["image"].shape if image_size is None else (image_size, image_size, first["image"].shape[-1])

    def same_size(image: np.ndarray) -> np.ndarray:
        if image.shape != shape:
            sizes = [f"{width} x {height}" for height, width, _ in (shape, image.shape)]
            raise InputError(
                f"{source.description}: the images should be of one size, but there are {' and '.join(sizes)} pixels; "
                "give the data source with an image_size to crop them to"
            )
        return image

    def chosen(indices: np.ndarray) -> Iterator[np.ndarray]:
        crop = same_size if image_size is None else lambda image: center_crop(image, image_size)
        for batch in elements(source, DataConfig(image_size=shape[0]), indices, batch_size=READ, crop=crop):
            yield batch["image"][batch["valid"]]

    return Images(source.description, len(source), shape, lambda: chosen(np.arange(len(source))), chosen)


def open_images(what: str | os.PathLike | DataConfig) -> Images:
    """Images of an NPZ file, of a folder as they are, or of a data source (its config, or its name as `data_source` takes it),
    centre-cropped to the image_size of its config.

    Raises InputError where there are none.
    """
    if isinstance(what, str) and not Path(what).exists():
        what = data_source(what) or what
    if isinstance(what, DataConfig):
        return from_source(open_source(what), what.image_size)
    if Path(what).is_dir():
        return from_source(open_source(DataConfig(path=str(what), crop="none", image_size=1)))
    return from_npz(what)


def data_source(name: str) -> DataConfig | None:
    """The data source of a name SOURCE/SPLIT[/SIZE][:PLACE]; None for another name.

    PLACE is the folder, or the data set of TFDS. SIZE, in pixels, may be left out of digits, cifar10 and idx.
    Examples: digits/test, cifar10/train:cifar-10-batches-bin, folder/val/256:imagenet, tfds/train[:10000]/256:imagenet2012.
    Raises InputError where SIZE is missing.
    """
    match = re.fullmatch(r"(digits|cifar10|idx|folder|packed|tar|tfds)/([^/:\[]+(?:\[[^\]]*\])?)(?:/(\d+))?(?::(.+))?", name)
    if match is None:
        return None
    source, split, size, place = match.groups()
    size = int(size) if size else {"digits": 8, "cifar10": 32, "idx": 28}.get(source)
    if not size:
        example = f"{source}/{split}/256" + (f":{place}" if place else "")
        raise InputError(f"{name} lacks the size in pixels to crop the images to, such as {example}")
    where = {"dataset": place} if source == "tfds" else {"path": place}
    return DataConfig(source=source, split=split, image_size=size, channels=1 if source in ("digits", "idx") else 3, **where)


def subset(images: Images, count: int) -> Images:
    """`count` of the images in their order, drawn at random with a fixed seed: the first ones would often be of one class.

    Raises InputError where there are fewer.
    """
    if not 1 <= count <= images.count:
        raise InputError(f"{images.source} has {images.count:,} images, {count:,} of them cannot be taken")
    if count == images.count:
        return images
    chosen = choose(images.count, count)

    def chunks() -> Iterator[np.ndarray]:
        if images.chosen is not None:
            yield from images.chosen(np.flatnonzero(chosen))
            return
        start = 0
        for chunk in images.chunks():
            yield chunk[chosen[start : start + len(chunk)]]
            start += len(chunk)

    source = f"{images.source}; {count:,} of {images.count:,} drawn at random"
    return dataclasses.replace(images, source=source, count=count, chunks=chunks, chosen=None)


def choose(total: int, count: int) -> np.ndarray:
    """A mask, bool [total], of `count` elements drawn at random with a fixed seed; all, if there are fewer."""
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(0).permutation(total)[:count]] = True
    return chosen
