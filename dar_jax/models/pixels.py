"""uint8 and back, and resizing as PyTorch and TensorFlow do it."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def resize_bicubic(images: Array, height: int, width: int, scale: tuple[float, float] | None = None) -> Array:
    """Bicubic resizing as PyTorch's `interpolate` does it: a = -0.75, no antialiasing, half-pixel centres, edges repeated.

    Args:
      images: [B, H, W, C] float32.
      scale: enlargement of rows and columns by which pixels are placed (PyTorch's `scale_factor`), where it is not exactly
        height / H and width / W.

    Returns: [B, height, width, C].
    """
    factors = (height / images.shape[1], width / images.shape[2]) if scale is None else scale
    rows, columns = map(bicubic_matrix, images.shape[1:3], (height, width), factors)
    return jnp.einsum("oh,bhwc,pw->bopc", rows, images, columns, precision=jax.lax.Precision.HIGHEST)


def bicubic_matrix(size: int, length: int, scale: float, a: float = -0.75) -> np.ndarray:
    position = (np.arange(length) + 0.5) / scale - 0.5
    first = np.floor(position).astype(int)
    matrix = np.zeros((length, size), np.float32)
    for offset in range(-1, 3):
        d = np.abs(position - first - offset)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(matrix, (np.arange(length), np.clip(first + offset, 0, size - 1)), np.where(d <= 1, near, far))
    return matrix


def to_float(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]; floating-point data are taken as they are."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    return images.astype(jnp.float32) / 127.5 - 1


def with_float_image(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch whose "image", if it has one, is as `to_float` has it."""
    return {**batch, "image": to_float(batch["image"])} if "image" in batch else dict(batch)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] (what lies outside is clipped) to uint8, any shape."""
    return np.clip(np.rint((np.asarray(images, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def resize_bilinear(images: Array, height: int, width: int, convention: Literal["tensorflow1", "half_pixel"]) -> Array:
    """Bilinear resizing without antialiasing, edges repeated.

    Args:
      images: [B, H, W, C] float32.
      convention: where pixel i of the result lies among the N pixels of a row, if it has n itself: at i N / n, as TensorFlow 1
        has it, or at (i + 1/2) N / n - 1/2.

    Returns: [B, height, width, C].
    """
    rows = _bilinear_matrix(images.shape[1], height, convention)
    columns = _bilinear_matrix(images.shape[2], width, convention)
    return jnp.einsum("oh,bhwc,pw->bopc", rows, images, columns, precision=jax.lax.Precision.HIGHEST)


def _bilinear_matrix(size: int, length: int, convention: str) -> np.ndarray:
    shift = {"tensorflow1": 0.0, "half_pixel": 0.5}[convention]
    position = np.clip((np.arange(length) + shift) * size / length - shift, 0, size - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size))).astype(np.float32)


def psnr(images: np.ndarray, others: np.ndarray, data_range: float = 255.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of images [N, H, W, C] of any dtype: float64 [N] in dB.

    data_range: largest minus smallest possible value. Equal images have no ratio; they get that of a mean squared error of
    1e-10 grey levels of 255, which is 148 dB.
    """
    error = np.square(images.astype(np.float64) - others).mean(axis=(1, 2, 3)) * (255 / data_range) ** 2
    return 10 * np.log10(255**2 / np.maximum(error, 1e-10))
