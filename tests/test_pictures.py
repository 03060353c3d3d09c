"""Pictures: what lands where, and files that are whole or not there."""

import numpy as np
import pytest
from PIL import Image

from dar_jax.errors import InputError
from dar_jax.files import check_writable, replacing
from dar_jax.inference import pictures
from dar_jax.models.pixels import to_uint8


def test_to_uint8_rounds_and_clips():
    np.testing.assert_array_equal(to_uint8([-3.0, -1.0, 0.004, 1.0, 2.0]), [0, 0, 128, 255, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image_enlarged_and_in_its_place(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 8, 8, channels), np.uint8)
    picture = pictures.grid(images)
    scale, step = 8, 64 + pictures.GAP
    for row in range(2):
        for column in range(3):
            y, x = pictures.GAP + row * step, pictures.GAP + column * step
            shown = picture[y : y + 64, x : x + 64]
            expected = np.broadcast_to(images[row, column], (8, 8, 3)).repeat(scale, 0).repeat(scale, 1)
            np.testing.assert_array_equal(shown, expected)
    assert picture.shape == (pictures.GAP + 2 * step, pictures.GAP + 3 * step, 3)


def test_grid_leaves_room_for_text_beside_the_images():
    images = np.zeros((2, 2, 64, 64, 3), np.uint8)
    bare = pictures.grid(images)
    labelled = pictures.grid(images, ["a row", "b"], ["one", "two"], ["w", "x", "y", "z"])
    left, top = labelled.shape[1] - bare.shape[1], labelled.shape[0] - bare.shape[0]
    assert left > 20 and top == 3 * pictures.LINE
    for margin in (labelled[:, :left], labelled[: pictures.LINE]):
        assert margin.min() < 64 and margin.max() == 255  # black text on white
    assert np.count_nonzero((labelled == 0).all(-1)) >= 4 * 64 * 64  # no image is covered


def test_sheet_stays_white_where_there_are_no_images():
    picture = pictures.sheet(np.zeros((3, 64, 64, 1), np.uint8), ["a", "b", "c"], columns=2)
    assert (picture[-64 - pictures.LINE :, -64 - pictures.GAP :] == 255).all()
    assert (picture[: pictures.GAP + 64, -64 - pictures.GAP : -pictures.GAP][pictures.GAP :] == 0).all()


def test_beside_puts_the_reconstruction_at_the_right():
    originals, decoded = np.full((1, 64, 64, 1), 10, np.uint8), np.full((1, 64, 64, 1), 200, np.uint8)
    middle = pictures.beside(originals, decoded)[pictures.GAP + 32]
    assert middle[pictures.GAP + 32, 0] == 10 and middle[2 * pictures.GAP + 64 + 32, 0] == 200


def test_group_by_group_has_a_row_for_each_sample():
    previews = np.arange(6, dtype=np.uint8).reshape(3, 2, 1, 1, 1).repeat(64, 2).repeat(64, 3)  # [G, N, H, W, C]
    picture = pictures.group_by_group(previews, ["", ""])
    for group in range(3):
        for sample in range(2):
            y = pictures.GAP + pictures.LINE + sample * (64 + pictures.GAP) + 32
            x = picture.shape[1] - (3 - group) * (64 + pictures.GAP) + 32
            assert picture[y, x, 0] == previews[group, sample, 0, 0, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_png_comes_back_as_it_was(tmp_path, channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    pictures.save_png(tmp_path / "new" / "a.png", image)
    with Image.open(tmp_path / "new" / "a.png") as read:
        assert read.mode == ("L" if channels == 1 else "RGB")
        np.testing.assert_array_equal(np.asarray(read).reshape(image.shape), image)


def test_animation_loops_and_holds_its_last_frame(tmp_path):
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 200)]
    pictures.save_animation(tmp_path / "a.webp", frames, milliseconds=300, hold=1500)
    with Image.open(tmp_path / "a.webp") as animation:
        assert animation.n_frames == 3 and animation.info["loop"] == 0
        for index, (frame, milliseconds) in enumerate(zip(frames, (300, 300, 1500))):
            animation.seek(index)
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), frame)
            assert animation.info["duration"] == milliseconds


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "before"


def test_check_writable_creates_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(InputError, match="file is a file"):
        check_writable(tmp_path / "file" / "b")
