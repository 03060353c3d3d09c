import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.data import transforms


class FixedDraws:
    """In place of a random generator: gives the listed numbers and keeps the bounds that were asked for."""

    def __init__(self, *values):
        self.values, self.bounds = list(values), []

    def integers(self, *bounds):
        self.bounds.append(bounds)
        return self.values.pop(0)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def halve(image):
    """Means of 2 x 2 pixels, rounded half up after the columns and again after the rows."""
    wide = image.astype(int)
    wide = (wide[:, 0::2] + wide[:, 1::2] + 1) // 2
    return (wide[0::2] + wide[1::2] + 1) // 2


def bicubic(signal, length):
    """Resizes axis 0 with the cubic kernel a = -1/2, widened when shrinking, in float64."""
    scale = len(signal) / length
    width = max(scale, 1.0)
    rows = []
    for i in range(length):
        x = np.abs((np.arange(len(signal)) + 0.5 - (i + 0.5) * scale) / width)
        weights = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))
        rows.append(np.tensordot(weights / weights.sum(), signal, 1))
    return np.stack(rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_center_crop_halves_by_box(channels):
    image = noise(32, 48, channels)
    np.testing.assert_array_equal(transforms.center_crop(image, 8), halve(halve(image))[:, 2:10])


@pytest.mark.parametrize("shape,size", [((12, 15, 3), 8), ((5, 6, 1), 8)])
def test_center_crop_scales_bicubically(shape, size):
    image = noise(*shape)
    width = round(shape[1] * size / shape[0])
    expected = bicubic(bicubic(image.astype(float), size).swapaxes(0, 1), width).swapaxes(0, 1)
    left = (width - size) // 2
    cropped = transforms.center_crop(image, size)
    assert cropped.dtype == np.uint8
    np.testing.assert_allclose(cropped, np.clip(expected, 0, 255)[:, left : left + size], atol=1.5)


def test_center_crop_keeps_pixels_of_the_wanted_size():
    image = noise(9, 14, 3)
    np.testing.assert_array_equal(transforms.center_crop(image, 9), image[:, 2:11])


def test_random_crop_draws_side_then_place():
    image = noise(10, 13, 3)
    draws = FixedDraws(10, 1, 4)
    cropped = transforms.random_crop(image, 8, (0.8, 1.0), draws)
    assert draws.bounds == [(8, 11), (3,), (6,)]
    np.testing.assert_array_equal(cropped, image[1:9, 4:12])


def test_random_crop_scales_to_the_side_drawn():
    image = noise(40, 40, 1)
    cropped = transforms.random_crop(image, 8, (0.8, 1.0), FixedDraws(10, 0, 2))
    np.testing.assert_array_equal(cropped, halve(halve(image))[0:8, 2:10])


def test_ten_crops_of_the_published_size():
    image = noise(281, 281, 1)
    crops = transforms.ten_crops(image, 256)
    for half, picture in ((crops[:5], image), (crops[5:], image[:, ::-1])):
        for crop, (top, left) in zip(half, [(0, 0), (0, 25), (25, 0), (25, 25), (12, 12)]):
            np.testing.assert_array_equal(crop, picture[top : top + 256, left : left + 256])


def test_ten_crops_of_many_images_on_a_device():
    images = noise(2, 9, 9, 3)
    for on_device, one_by_one in zip(
        transforms.ten_crops(jnp.asarray(images), 6), zip(*(transforms.ten_crops(i, 6) for i in images))
    ):
        np.testing.assert_array_equal(on_device, np.stack(one_by_one))


def test_one_of_ten_is_that_one_of_the_ten():
    image = noise(30, 20, 3)
    crops = transforms.ten_crops(transforms.center_crop(image, 11), 8)
    assert len(np.unique(crops, axis=0)) == 10
    for index, crop in enumerate(crops):
        draws = FixedDraws(index)
        np.testing.assert_array_equal(transforms.one_of_ten(image, 8, 1.4, draws), crop)
        assert draws.bounds == [(10,)]


def test_flip_exchanges_left_and_right():
    np.testing.assert_array_equal(transforms.flip(np.arange(6).reshape(1, 2, 3, 1))[0, :, :, 0], [[2, 1, 0], [5, 4, 3]])
