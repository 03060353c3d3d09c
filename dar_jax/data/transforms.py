"""The crops of ADM (Dhariwal & Nichol 2021) and the mirror, as pure functions on uint8 images [H, W, C] with C = 1 or 3."""

import math
from typing import Any

import numpy as np
from PIL import Image


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle square of an image whose smaller side is first scaled to `size`, up or down.

    image: uint8 [H, W, C]. Returns uint8 [size, size, C]; an image whose smaller side is `size` already is only cropped.
    """
    image = scale_to(image, size)
    return _crop(image, (image.shape[0] - size) // 2, (image.shape[1] - size) // 2, size)


def random_crop(image: np.ndarray, size: int, fraction: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A random square that covers a random share of an image's smaller side (the tokenizer's augmentation).

    image: uint8 [H, W, C]. fraction: least and greatest share, 0 < least <= greatest <= 1. The smaller side is scaled to a
    length drawn uniformly from ceil(size / greatest) .. ceil(size / least), then the position of the square.
    Returns uint8 [size, size, C].
    """
    least, greatest = fraction
    image = scale_to(image, int(rng.integers(math.ceil(size / greatest), math.ceil(size / least) + 1)))
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
    return _crop(image, top, left, size)


def ten_crops(image: Any, size: int) -> list[Any]:
    """The four corners and the middle of square images, then those of their mirror images.

    image: NumPy or JAX array [..., S, S, C], S >= size. Returns ten arrays [..., size, size, C] in the order top left, top
    right, bottom left, bottom right, middle, and the same five crops of the mirror image; those of NumPy are views.
    """
    spare = image.shape[-3] - size
    middle = round(spare / 2)
    corners = ((0, 0), (0, spare), (spare, 0), (spare, spare), (middle, middle))
    return [_crop(side, top, left, size) for side in (image, flip(image)) for top, left in corners]


def one_of_ten(image: np.ndarray, size: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """A random one of `ten_crops` of the centre crop of int(scale * size) pixels (the transformer's augmentation).

    image: uint8 [H, W, C]. scale >= 1. Returns uint8 [size, size, C].
    """
    return ten_crops(center_crop(image, int(size * scale)), size)[rng.integers(10)]


def flip(image: np.ndarray) -> np.ndarray:
    """The mirror image, left and right exchanged: uint8 [..., W, C]."""
    return image[..., ::-1, :]


def scale_to(image: np.ndarray, side: int) -> np.ndarray:
    """Scales the smaller side to `side`: halved by box filter while it is at least twice that, then bicubic."""
    if min(image.shape[:2]) == side:
        return image
    grey = image.shape[2] == 1
    picture = Image.fromarray(image[..., 0] if grey else image)
    while min(picture.size) >= 2 * side:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = side / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    return np.asarray(picture)[..., None] if grey else np.asarray(picture)


def _crop(image: Any, top: int, left: int, size: int) -> Any:
    return image[..., top : top + size, left : left + size, :]
