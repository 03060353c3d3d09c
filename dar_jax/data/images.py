"""Images stored as PNG, JPEG or WebP of any mode, to uint8 [H, W, C]: the only reader of such files.

Reading takes bounded memory whatever a file holds, and every failure is one ImageError with the file's name.
"""

import contextlib
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dar_jax.errors import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 1 << 26  # 8192 x 8192; decoding takes up to 8 bytes for each
MAX_BYTES = 1 << 29  # of a file, that many pixels of 8 bytes
STRIP = 1 << 22  # pixels converted at a time

log = logging.getLogger("dar_jax.data")
_report_lock = threading.Lock()
warnings.filterwarnings("ignore", module=r"PIL\.")  # about odd metadata, in lines that do not name the file


class ImageError(InputError):
    """An image cannot be read. The message names it."""


def read_image(
    file: str | os.PathLike | BinaryIO, channels: int, smaller_side: int = 1, name: str | os.PathLike | None = None
) -> np.ndarray:
    """Decodes an image to uint8 [H, W, channels]: upright by its EXIF orientation, on white where it is transparent, 16-bit
    grey rounded to 8 bits.

    Args:
      channels: 1 (grey) or 3 (RGB).
      smaller_side: pixels that the smaller side may be scaled up to afterwards.
      name: of the image in errors; None: that of the file.

    Raises ImageError if it is damaged or no regular file, or if it has more than MAX_PIXELS, scaled up or not.
    """
    with _open(file, name) as image:
        width, height = image.size
        if width * height * max(1, smaller_side / min(width, height)) ** 2 > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many or too narrow")
        image.load()
        with contextlib.suppress(Exception):  # about other metadata, which may be odd; the pixels are transposed before
            ImageOps.exif_transpose(image, in_place=True)
        pixels = np.empty((image.height, image.width, channels), np.uint8)
        rows = max(1, STRIP // image.width)
        for top in range(0, image.height, rows):
            strip = image.crop((0, top, image.width, min(top + rows, image.height)))
            pixels[top : top + rows] = _eight_bits(strip, channels).reshape(-1, image.width, channels)
    return pixels


def size_of_image(file: str | os.PathLike) -> tuple[int, int]:
    """Width and height as stored. Only the header is read. Raises ImageError if it is damaged."""
    with _open(file) as image:
        return image.size


class EncodedImages:
    """Images stored as PNG, JPEG or WebP, decoded by `read_image` when they are read.

    One that cannot be read, or would have too many pixels once its smaller side is scaled up to `smaller_side`, is logged once
    by name and counted in `unreadable` (by each process for itself), and its neighbour takes its place.

    A subclass has `__len__`, `encoded(index)`, which returns the image (a path or an open file) and its label, `name(index)`
    for messages, and perhaps a shorter `key(index)`.
    """

    def __init__(self, channels: int, smaller_side: int):
        self._channels, self._smaller_side = channels, smaller_side
        self._unreadable: set[int] = set()

    @property
    def unreadable(self) -> int:
        """The number of images that this process could not read so far."""
        return len(self._unreadable)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self)):
            if (element := self.read((index + step) % len(self))) is not None:
                return element
        raise InputError(f"none of the {len(self)} images can be read, for instance {self.name(index)}")

    def read(self, index: int) -> dict[str, Any] | None:
        """The element of exactly this index, or None if it cannot be read."""
        if index in self._unreadable:
            return None
        try:
            file, label = self.encoded(index)
            return {"image": read_image(file, self._channels, self._smaller_side, self.name(index)), "label": label}
        except Exception as error:  # what the libraries of data sets raise on damaged records is of many kinds
            self.skip(index, error)
            return None

    def skip(self, index: int, error: Exception) -> None:
        """Counts an image that cannot be read, and logs it once."""
        reason = error if isinstance(error, ImageError) else f"the image {self.name(index)} cannot be read: {error}"
        with _report_lock:
            if index not in self._unreadable:
                self._unreadable.add(index)
                log.warning("skipped: %s", reason)

    def key(self, index: int) -> str:
        """What the image is known by in the data set."""
        return self.name(index)


def read_encoded(file: str | os.PathLike | BinaryIO) -> bytes:
    """The bytes of an image as it is stored. Raises ValueError or OSError for more than MAX_BYTES, and for no regular file."""
    if isinstance(file, (str, os.PathLike)):
        _check_file(file)
        with open(file, "rb") as opened:
            return opened.read(MAX_BYTES)
    return file.read()


def _check_file(path: str | os.PathLike) -> None:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    check_bytes(status.st_size)


def check_bytes(size: int) -> None:
    """Raises ValueError where an image has more bytes than are read."""
    if size > MAX_BYTES:
        raise ValueError(f"it has {size:,} bytes, {MAX_BYTES:,} are the most")


@contextlib.contextmanager
def _open(file: str | os.PathLike | BinaryIO, name: str | os.PathLike | None = None) -> Iterator[Image.Image]:
    """Opens an image. Whatever its decoders raise, here and in the body, becomes an ImageError."""
    try:
        if isinstance(file, (str, os.PathLike)):
            name = name or file
            _check_file(file)
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(f"there is no image {name}") from error
    except Exception as error:  # of many kinds: SyntaxError, struct.error, zlib.error, MemoryError, DecompressionBombError ...
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no PNG, JPEG or WebP"
        else:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"the image {name} cannot be read: {reason}") from error


def _eight_bits(image: Image.Image, channels: int) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] of an image of any mode."""
    if image.mode.startswith("I"):
        image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB" if channels == 3 else "L"))
