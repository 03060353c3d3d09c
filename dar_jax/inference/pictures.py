"""Pictures of images: labelled grids, originals beside reconstructions, samples group by group, animated denoising; plots.

Everything is uint8 in and out. Shapes: N images, G groups, H W pixels, C channels (1 grey, 3 RGB); h w pixels of a picture.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dar_jax.console import printable
from dar_jax.files import replacing

MIN_SIDE = 64  # pixels; smaller images are enlarged by whole factors, so that 8-pixel ones can be seen
GAP = 4
LINE = 14  # height of a line of text
MOST_WEBP = 16383  # pixels along a side
MAX_LABEL = 300  # pixels of the text at the left of a row


def grid(
    images: np.ndarray,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[str] = (),
) -> np.ndarray:
    """A picture of images in rows and columns, each enlarged by the same whole factor to at least `MIN_SIDE` pixels.

    Args:
      images: uint8 [rows, columns, H, W, C].
      row_labels, column_labels: text at the left of every row and above every column, shortened if long; none: no space for it.
      captions: text under each image, row by row, shortened to its width; positions without one stay white.

    Returns: uint8 [h, w, 3].
    """
    rows, columns, height, width, _ = images.shape
    scale = max(1, -(-MIN_SIDE // min(height, width)))
    font = ImageFont.load_default()
    row_labels = [_fit(label, MAX_LABEL, font) for label in row_labels]
    left = GAP + max((int(font.getlength(label)) + GAP for label in row_labels), default=0)
    top = GAP + (LINE if column_labels else 0)
    step_x, step_y = width * scale + GAP, height * scale + GAP + (LINE if captions else 0)
    canvas = Image.new("RGB", (left + columns * step_x, top + rows * step_y), "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        draw.text((left + column * step_x, GAP // 2), _fit(label, width * scale, font), "black", font)
    for row, label in enumerate(row_labels):
        draw.text((GAP, top + row * step_y + (height * scale - LINE) // 2), label, "black", font)
    shown = len(captions) if captions else rows * columns
    for index in range(shown):
        row, column = divmod(index, columns)
        x, y = left + column * step_x, top + row * step_y
        canvas.paste(_enlarge(images[row, column], scale), (x, y))
        if captions:
            draw.text((x, y + height * scale), _fit(captions[index], width * scale, font), "black", font)
    return np.asarray(canvas)


def sheet(images: np.ndarray, captions: Sequence[str], columns: int = 8) -> np.ndarray:
    """N captioned images [N, H, W, C], row after row: uint8 [h, w, 3]."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    padded = np.zeros((rows * columns, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    return grid(padded.reshape(rows, columns, *images.shape[1:]), captions=captions)


def beside(originals: np.ndarray, reconstructions: np.ndarray, columns: int = 4) -> np.ndarray:
    """Each original [N, H, W, C] with its reconstruction at its right, `columns` such pairs in a row: uint8 [h, w, 3]."""
    pairs = np.stack([originals, reconstructions], axis=1).reshape(-1, *originals.shape[1:])
    return sheet(pairs, ["original", "decoded"] * len(originals), 2 * columns)


def group_by_group(previews: np.ndarray, row_labels: Sequence[str]) -> np.ndarray:
    """One row per sample, one column per group: previews [G, N, H, W, C] and N labels -> uint8 [h, w, 3]."""
    columns = [f"group {group + 1}" for group in range(len(previews))]
    return grid(np.swapaxes(previews, 0, 1), row_labels, columns)


def save_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Writes uint8 [H, W, C], completely or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "PNG")


def save_animation(path: str | os.PathLike, frames: Sequence[np.ndarray], milliseconds: int = 500, hold: int = 2000) -> None:
    """Writes an endless, lossless WebP animation of uint8 [h, w, 3] frames, completely or not at all.

    Args:
      milliseconds, hold: how long each frame, and the last one, is shown.
    """
    images = [Image.fromarray(frame) for frame in frames]
    durations = [milliseconds] * (len(images) - 1) + [hold]
    with replacing(path) as temporary:
        images[0].save(
            temporary, "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0, lossless=True, quality=50
        )


@contextlib.contextmanager
def plot(path: str | os.PathLike) -> Iterator[Any]:
    """Yields axes of Matplotlib to draw on, and writes them with a legend as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _enlarge(image: np.ndarray, scale: int) -> Image.Image:
    """uint8 [H, W, C] -> an RGB picture, `scale` times larger with sharp pixels."""
    image = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
    return Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))


def _fit(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The longest beginning of a text that is at most `width` pixels wide, printable."""
    text = printable(text[:width])
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
