"""The metrics against the stored case, closed forms, and plain implementations in NumPy and SciPy."""

import jax
import numpy as np
import pytest
import scipy.linalg
from parity_cases import Case

from dar_jax.errors import InputError
from dar_jax.evaluation import metrics
from dar_jax.evaluation.metrics import (
    Moments,
    RunningMoments,
    RunningScore,
    code_statistics,
    frechet_distance,
    pooled_pixels,
    precision_recall,
    ssim,
)
from dar_jax.models.pixels import psnr


def pytest_generate_tests(metafunc):
    if "metrics_name" in metafunc.fixturenames:
        files = metafunc.config.getoption("--golden").glob("metrics*.json")
        metafunc.parametrize("metrics_name", sorted(file.stem for file in files))


def rng(seed=0):
    return np.random.default_rng(seed)


def moments(features):
    running = RunningMoments()
    running.add(features)
    return running.result()


def inception_score(logits, split=metrics.SPLIT):
    running = RunningScore(split)
    running.add(logits)
    return running.result()


def test_stored_case(golden, metrics_name):
    case = Case.load(golden, metrics_name)
    reference, samples = case.expected["reference_features"], case.expected["sample_features"]
    case.check_relative("frechet_distance", frechet_distance(moments(reference), moments(samples)).value, rtol=1e-6)
    precision, recall = precision_recall(reference, samples, case.info["neighbours"])
    case.check_relative("precision", precision, rtol=1e-12)
    case.check_relative("recall", recall, rtol=1e-12)
    logits = np.log(case.expected["probabilities"])
    case.check_relative("inception_score", inception_score(logits, case.info["inception_split"]).mean, rtol=1e-6)
    assert set(case.expected) - {"reference_features", "sample_features", "probabilities"} == case.compared


def test_frechet_distance_is_that_of_scipy():
    features = [rng(seed).normal(size=(400, 64)) @ rng(seed + 2).normal(size=(64, 64)) + seed / 9 for seed in (0, 1)]
    a, b = map(moments, features)
    means, covariances = [x.mean(axis=0) for x in features], [np.cov(x, rowvar=False) for x in features]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(covariances[0] + covariances[1] - 2 * root)
    distance = frechet_distance(a, b)
    assert distance.value == pytest.approx(expected, rel=1e-6) and distance.ranks == (64, 64)
    assert distance.value == pytest.approx(frechet_distance(b, a).value, rel=1e-12)
    assert frechet_distance(a, a).value < 1e-12 * np.trace(a.covariance)


def test_frechet_distance_of_singular_covariances():
    turn = np.linalg.qr(rng().normal(size=(50, 50)))[0]
    values = np.r_[np.zeros(20), rng(1).uniform(1e-6, 4, 30)], np.r_[rng(2).uniform(1e-6, 4, 40), np.zeros(10)]
    a, b = (Moments(np.zeros(50), turn * v @ turn.T, None) for v in values)
    distance = frechet_distance(a, b)
    assert distance.value == pytest.approx(np.sum((np.sqrt(values[0]) - np.sqrt(values[1])) ** 2), rel=1e-9)
    assert distance.ranks == (30, 40)


def test_frechet_distance_of_fewer_images_than_features():
    x, y = rng(0).normal(size=(20, 60)), rng(1).normal(size=(30, 60)) + 0.1
    distance = frechet_distance(moments(x), moments(y))
    # The roots of the covariances' product are the singular values of the centred features' product.
    x0, y0 = x - x.mean(axis=0), y - y.mean(axis=0)
    overlap = np.linalg.svd(x0 @ y0.T, compute_uv=False).sum() / np.sqrt(19 * 29)
    expected = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2) + np.sum(x0**2) / 19 + np.sum(y0**2) / 29 - 2 * overlap
    assert distance.value == pytest.approx(expected, rel=1e-10) and distance.ranks == (19, 29)


def test_running_moments_far_from_zero():
    features = rng().normal(size=(1000, 8)) + 1e7  # the sum of squares would lose all digits of the variance
    running = RunningMoments()
    for batch in np.split(features, [1, 1, 400, 407, 800]):
        running.add(batch)
    result = running.result()
    np.testing.assert_allclose(result.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(result.covariance, np.cov(features - 1e7, rowvar=False), atol=1e-8)
    assert result.count == 1000
    with pytest.raises(InputError, match="at least 2 images, there are 1"):
        moments(features[:1])


def test_inception_score_batch_by_batch():
    logits = rng().normal(0, 3, size=(23, 6))
    running = RunningScore(split=10)
    for batch in np.split(logits, [4, 4, 17]):
        running.add(batch)
    scores = []
    for part in (logits[:10], logits[10:20], logits[20:]):
        p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
        scores.append(np.exp(np.mean(np.sum(p * np.log(p / p.mean(axis=0)), axis=1))))
    assert running.result().mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert running.result().std == pytest.approx(np.std(scores), rel=1e-12)
    with np.errstate(divide="ignore"):
        certain = np.log(np.eye(4))  # probabilities of zero; four classes, each image sure of another one
    assert inception_score(certain).mean == pytest.approx(4, rel=1e-12)
    with pytest.raises(InputError, match="at least one image"):
        inception_score(logits[:0])


@pytest.mark.parametrize("block", [metrics.BLOCK, 64])  # 64: many blocks, the last ones not full
def test_precision_and_recall(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    reference = rng(0).normal(size=(150, 5)).astype(np.float32) + 300  # far from zero, as pooled features are
    samples = rng(1).normal(0.5, 1.5, size=(201, 5)).astype(np.float32) + 300

    def inside(points, others):
        distances = np.sqrt(np.sum((others[:, None].astype(np.float64) - others) ** 2, axis=-1))
        radii = np.sort(distances, axis=1)[:, 3]
        return np.mean((np.sqrt(np.sum((points[:, None].astype(np.float64) - others) ** 2, axis=-1)) <= radii).any(axis=1))

    expected = inside(samples, reference), inside(reference, samples)
    assert 0.2 < expected[0] < 0.8 < expected[1] < 1
    assert precision_recall(reference, samples) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_of_samples_that_are_all_the_same():
    reference = rng(0).normal(size=(40, 2048)).astype(np.float32) + 100
    for row in reference[:4, None]:  # rounding alone would put some of them outside the balls of their copies
        assert precision_recall(reference, np.repeat(row, 30, axis=0)) == (1, 1 / 40)
    assert precision_recall(reference, np.repeat(reference[3:4] + 50, 30, axis=0)) == (0, 0)
    with pytest.raises(InputError, match="more than 3 images, not 3"):
        precision_recall(reference, reference[:3])


def test_psnr():
    image = np.array([200, 100, 50], np.uint8).reshape(1, 1, 1, 3)
    assert psnr(image, image + np.uint8(51))[0] == pytest.approx(20 * np.log10(5))
    assert psnr(image, image - np.uint8(50))[0] == pytest.approx(20 * np.log10(5.1))  # no wrap-around of uint8
    assert psnr(image / 127.5, (image + 51.0) / 127.5, data_range=2)[0] == pytest.approx(20 * np.log10(5))
    assert psnr(image, image)[0] == pytest.approx(148.13, abs=0.01)


def test_ssim():
    noise = rng().integers(0, 256, size=(2, 14, 17, 3)) // np.array([4, 64]).reshape(2, 1, 1, 1)
    images = (noise + 190).astype(np.uint8)  # the second one bright and flat: where float32 would lose digits
    others = np.clip(images + rng(1).normal(0, 20, images.shape), 0, 255).astype(np.uint8)
    others[1] = images[1] + rng(2).integers(0, 9, images[1].shape)
    window = np.exp(-((np.arange(11)[:, None] - 5.0) ** 2 + (np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[..., None]
    expected = []
    for x, y in zip(images.astype(np.float64), others.astype(np.float64)):
        values = []
        for row in range(4):
            for column in range(7):
                a, b = (z[row : row + 11, column : column + 11] for z in (x, y))
                mean_a, mean_b = (window * a).sum(axis=(0, 1)), (window * b).sum(axis=(0, 1))
                variance_a, variance_b = (window * (a - mean_a) ** 2).sum((0, 1)), (window * (b - mean_b) ** 2).sum((0, 1))
                covariance = (window * (a - mean_a) * (b - mean_b)).sum((0, 1))
                luminance = (2 * mean_a * mean_b + 2.55**2) / (mean_a**2 + mean_b**2 + 2.55**2)
                values.append(luminance * (2 * covariance + 7.65**2) / (variance_a + variance_b + 7.65**2))
        expected.append(np.mean(values))
    np.testing.assert_allclose(jax.jit(ssim)(images, others), expected, atol=3e-6)
    np.testing.assert_allclose(ssim(images / 255, others / 255, data_range=1.0), expected, atol=2e-5)
    np.testing.assert_allclose(ssim(images, images), 1, atol=1e-6)
    assert 0.1 < expected[0] < 0.9
    with pytest.raises(InputError, match="at least 11 pixels, these have 14x10"):
        ssim(images[:, :, :10], images[:, :, :10])


def test_code_statistics():
    uniform = code_statistics(np.array([[5, 0, 5, 5, 5, 0, 0, 0]]))
    assert (uniform.usage, uniform.entropy) == pytest.approx((0.5, 2))
    by_place = code_statistics(np.array([[2, 2, 0, 0], [0, 0, 4, 0]]))  # half a code is known from its place
    assert (by_place.usage, by_place.entropy, by_place.entropy_at_position) == pytest.approx((0.75, 1.5, 0.5))
    skewed = code_statistics(np.array([[3, 1]]))
    assert (skewed.usage, skewed.entropy) == pytest.approx((1, 2 - 0.75 * np.log2(3)))
    assert code_statistics(np.array([[0, 7]])).entropy == 0
    with pytest.raises(InputError, match="no codes"):
        code_statistics(np.array([[1, 1], [0, 0]]))


def test_pooled_pixels():
    small = rng().integers(0, 256, (3, 8, 8, 1), np.uint8)
    np.testing.assert_allclose(pooled_pixels(small), small.reshape(3, -1) / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(
        pooled_pixels(np.repeat(np.repeat(small, 4, 1), 4, 2)).mean(1), pooled_pixels(small).mean(1), atol=0.01
    )
    assert pooled_pixels(np.zeros((2, 28, 28, 3), np.uint8)).shape == (2, 192)
