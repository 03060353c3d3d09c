"""What requests to the server hold, and images as files: bounded, whatever is sent.

Shapes: H W pixels, C channels.
"""

import base64
import binascii
import contextlib
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from PIL import ExifTags, Image
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from dar_jax.config import Guidance, Range, Seed, Share, Temperature, TokenizerConfig, Tokens, TopK
from dar_jax.data.images import ImageError, read_image, size_of_image
from dar_jax.data.transforms import center_crop
from dar_jax.errors import InputError
from dar_jax.inference.edit import open_masked
from dar_jax.inference.reconstruct import check_size

MOST_IMAGES = 16  # of a request
MOST_PARTICLES = 64
MOST_PIXELS = 1 << 24  # of an image that is sent, 4096 x 4096
MOST_SCANS = 200  # of a JPEG, each of which goes over all pixels
MOST_TOKENS = 16384


@dataclass(frozen=True)
class Generation:
    """The body of /v1/images/generations, without its image. What is None is as the checkpoint's run has it."""

    prompt: str  # a class, by name or number
    model: str | None = None
    n: Annotated[int, Range(1, MOST_IMAGES)] = 1  # image i has the seed seed + i
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    stream: bool = False
    partial_images: Annotated[int, Range(0, MOST_TOKENS)] | None = None  # previews in a stream; None: after every group
    seed: Seed | None = None  # None: at random
    noise_seed: Seed | None = None  # of the noise of all images; None: each image's own seed
    guidance: tuple[Guidance, Guidance] | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Share | None = None
    groups: Tokens | None = None  # stop after so many
    prefix_tokens: tuple[Annotated[int, Range(0, 2**24)], ...] | None = None
    prefix_length: Annotated[int, Range(0, MOST_TOKENS)] | None = None  # of the prefix image's tokens


@dataclass(frozen=True)
class Edit(Generation):
    """The body of /v1/images/edits, without image and mask: a part is drawn anew, or without a mask, all of it from the image
    with noise."""

    start_step: Annotated[int, Range(1, 999)] | None = None  # the later, the more of the image stays; None: half of the steps,
    # but with a mask, from noise alone
    particles: Annotated[int, Range(1, MOST_PARTICLES)] | None = None  # with a mask, samples that compete; None: 16


@dataclass(frozen=True)
class OnlyImage:
    """The body of /v1/images/tokens, which has an image only."""


def encode_image(pixels: np.ndarray, kind: str, about: str | None = None) -> str:
    """uint8 [H, W, C] as a file in base64, with a description in its EXIF data."""
    exif, file = Image.Exif(), io.BytesIO()
    if about is not None:
        exif[ExifTags.Base.ImageDescription] = about
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    quality = {} if kind == "png" else {"quality": 95}
    image.save(file, kind.upper(), exif=exif, **quality)
    return base64.b64encode(file.getvalue()).decode()


def read_pixels(image: bytes, side: int, config: TokenizerConfig) -> np.ndarray:
    """An image file, centre-cropped: uint8 [side, side, C]. Raises InputError."""
    check_pixels(image)
    pixels = read_image(io.BytesIO(image), config.channels, side, "of the request")
    check_size("the image", pixels.shape[1::-1], config)
    return center_crop(pixels, side)


def read_masked(image: bytes, mask: bytes, config: TokenizerConfig) -> tuple[np.ndarray, np.ndarray]:
    """An image file and its mask, see `open_masked`. Raises InputError."""
    for file in (image, mask):
        check_pixels(file)
    return open_masked(io.BytesIO(image), io.BytesIO(mask), config, config.resolution, ("of the request",) * 2)


def check_pixels(image: bytes) -> None:
    """Raises InputError for an image file of too many pixels, or that takes far longer to read than its pixels say."""
    with contextlib.suppress(ImageError):  # then reading says it better
        width, height = size_of_image(io.BytesIO(image))
        if width * height > MOST_PIXELS:
            raise InputError(f"the image has {width} x {height} pixels, {MOST_PIXELS:,} are the most")
    if image.startswith(b"\xff\xd8") and image.count(b"\xff\xda") > MOST_SCANS:
        raise InputError(f"the image has more than {MOST_SCANS} scans")


def read_base64(text: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"^data:image/[\w.+-]{1,20};base64,", "", text), validate=True)
    except (binascii.Error, ValueError):
        raise InputError("the image is no base64") from None


def read_json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the body is no JSON") from None
    if not isinstance(fields, dict):
        raise InputError("the body should be a JSON object")
    return fields


async def read_form(headers: Headers, body: bytes) -> dict[str, Any]:
    """The fields of a form, as JSON would have them: numbers and lists where these are meant."""
    if "charset" in headers["content-type"].lower():  # some take long to decode
        raise InputError("a form is UTF-8, without a charset")

    async def stream() -> AsyncIterator[bytes]:
        yield body

    try:
        form = await MultiPartParser(headers, stream(), max_files=2, max_fields=40, max_part_size=1 << 20).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise InputError(f"the form cannot be read: {error}") from None
    fields = {}
    async with contextlib.AsyncExitStack() as stack:
        for name, value in form.multi_items():
            if isinstance(value, str):
                fields[name] = form_value(value) if name not in ("prompt", "model", "size") else value
            else:
                stack.push_async_callback(value.close)
                fields[name] = await value.read()
    return fields


def form_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
