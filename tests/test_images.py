"""The one reader of image files: whatever a file holds, it is pixels or one ImageError, in bounded memory."""

import functools
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dar_jax.config import TokenizerConfig, VelocityConfig
from dar_jax.data import images
from dar_jax.data.images import ImageError, read_image, size_of_image
from dar_jax.evaluation.images import open_images
from dar_jax.inference import reconstruct

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
TOKENIZER = TokenizerConfig(
    image_size=4, encoder_patch_size=2, num_tokens=4, num_groups=2, velocity=VelocityConfig(patch_size=2)
)


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, pixels: bytes, *chunks: bytes, depth: int = 8) -> bytes:
    """A grey PNG that claims this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@functools.cache
def zeros(count: int) -> bytes:
    """So many compressed ones, made in little memory."""
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(bytes(min(1 << 20, count - start))) for start in range(0, count, 1 << 20)]
    return b"".join(parts) + compressor.flush()


SMALL = zlib.compress(bytes(4 * 5))
HOSTILE = {
    "claims": (lambda: png(60_000, 60_000, SMALL), "60000|3600000000"),
    "text": (lambda: png(4, 4, SMALL, chunk(b"zTXt", b"k\0\0" + zeros(200 << 20))), "too large"),
    "colours": (lambda: png(4, 4, SMALL, chunk(b"iCCP", b"k\0\0" + zeros(200 << 20))), "too large"),
    "cut short": (lambda: encoded("PNG")[:45], "cannot be read"),
    "nothing": (lambda: b"", "it is no PNG, JPEG or WebP"),
    "another kind": (lambda: encoded("GIF"), "it is no PNG, JPEG or WebP"),
}


@pytest.fixture(params=[*HOSTILE, "pipe", "folder", "link into nowhere"])
def hostile(request, tmp_path):
    """A path that cannot be read, beside one that can, and the reason."""
    (tmp_path / "whole.png").write_bytes(encoded("PNG"))
    path, kind = tmp_path / "0.png", request.param
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link into nowhere":
        path.symlink_to("nowhere.png")
        return path, "there is no image"
    else:
        content, reason = HOSTILE[kind]
        path.write_bytes(content())
        return path, reason
    return path, "it is no regular file"


def test_what_cannot_be_read_is_one_line_with_its_name(hostile):
    path, reason = hostile
    for read in (lambda: read_image(path, 3), lambda: reconstruct.open_image(path, TOKENIZER, 4)):
        with pytest.raises(ImageError, match=reason) as raised:
            read()
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_where_many_are_read_it_is_counted_and_skipped(hostile, caplog):
    path, _ = hostile
    source = reconstruct.open_images(path.parent, "train", TOKENIZER)
    (whole,) = [element for index in range(len(source)) if (element := source.read(index)) is not None]
    np.testing.assert_array_equal(whole["image"], PIXELS)
    assert source.unreadable == len(source) - 1 == caplog.text.count(str(path))
    np.testing.assert_array_equal(np.concatenate(list(open_images(path.parent).chunks())), PIXELS[None])


def test_a_small_file_takes_no_gigabyte(tmp_path):
    """64 million pixels of 16 bits, from 125 KB; measured in a process of its own, and limited there."""
    path = tmp_path / "a.png"
    path.write_bytes(png(8192, 8192, zeros(8192 * (2 * 8192 + 1)), depth=16))
    code = f"""
import resource
from dar_jax.data.images import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read_image({str(path)!r}, 3).shape == (8192, 8192, 3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 500 << 10  # KB
    path.write_bytes(png(8193, 8192, SMALL, depth=16))
    with pytest.raises(ImageError, match="8193 x 8192 pixels are too many"):
        read_image(path, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_whatever_else_the_metadata_hold(tmp_path, monkeypatch, orientation):
    monkeypatch.setattr(images, "STRIP", 4)  # a row or two at a time
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0), struct.pack(">HHI4s", 0x011A, 2, 4, b"odd")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + b"".join(entries) + bytes(4)  # a resolution that is a text
    (tmp_path / "a.png").write_bytes(encoded("PNG", exif=exif))
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(PIXELS),
    }
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 3), turned[orientation])
    assert size_of_image(tmp_path / "a.png") == (4, 2)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    length=st.floats(0.3, 1),
)
def test_a_damaged_file_is_pixels_or_an_image_error(kind, changes, length):
    content = bytearray(encoded(kind, exif=Image.Exif()))
    for place, value in changes:
        content[int(place * (len(content) - 1))] = value
    try:
        pixels = read_image(io.BytesIO(content[: int(length * len(content))]), 1, name="photo")
    except ImageError as error:
        assert str(error).startswith("the image photo cannot be read: ") and "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 1
