"""Metrics of generated and decoded images. Pure functions of arrays: no networks, no files.

The definitions are those of ADM's evaluation suite (Dhariwal and Nichol 2021, arXiv 2105.05233). Sums over a data set are kept
on the host in float64; comparisons of every image with every other run on the device, block by block.
Shapes: N samples, M reference images, D features, K classes or codes, B batch, H W pixels, C channels.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.errors import InputError
from dar_jax.models.pixels import to_float

SPLIT = 5000  # images of one inception score
NEIGHBOURS = 3  # of precision and recall
BLOCK = 512  # rows of a block of distances, as many columns as there are points
NOISE = 4e-6  # a squared distance below this share of the squared norms is rounding: the points are the same
WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
K1, K2 = 0.01, 0.03


@dataclass(frozen=True)
class Moments:
    """Mean [D] and unbiased covariance [D, D] of a set of features, float64: all that a Fréchet distance depends on.

    `count` is the number of features, None where a file does not say it.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None

    @functools.cached_property
    def root(self) -> np.ndarray:
        """[rank, D]; root.T @ root is the covariance. Kept, because a reference is compared with many sets of samples."""
        values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
        return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


class RunningMoments:
    """The moments of features that arrive in batches, in float64 and in memory of D x D numbers.

    Every batch is centred on its own mean before anything is squared (Chan, Golub and LeVeque 1979), so that features far from
    zero lose no digits.
    """

    def __init__(self):
        self.count, self._mean, self._scatter = 0, 0.0, 0.0

    def add(self, features: np.ndarray) -> None:
        """Adds features [B, D] of any float dtype."""
        features = np.asarray(features, np.float64)
        if len(features):
            mean = features.mean(axis=0)
            centred = features - mean
            total, apart = self.count + len(features), mean - self._mean
            self._scatter = self._scatter + centred.T @ centred
            self._scatter += np.outer(apart * (self.count * len(features) / total), apart)
            self._mean = self._mean + apart * (len(features) / total)
            self.count = total

    def result(self) -> Moments:
        """Raises InputError for fewer than two features, which have no covariance."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least 2 images, there are {self.count}")
        return Moments(self._mean, self._scatter / (self.count - 1), self.count)


def moments(features: np.ndarray) -> Moments:
    """The moments of features [N, D]. Raises InputError for fewer than two."""
    running = RunningMoments()
    running.add(features)
    return running.result()


@dataclass(frozen=True)
class FrechetDistance:
    """`value` is the squared distance, which is what is called FID. `ranks` are those of the two covariances.

    Where a rank is below D, the covariance is singular: there were too few images, or some features never change.
    """

    value: float
    ranks: tuple[int, int]


def frechet_distance(a: Moments, b: Moments) -> FrechetDistance:
    """The squared Fréchet distance between two normal distributions, of features: FID (Heusel et al. 2017, arXiv 1706.08500).

    |mean_a - mean_b|^2 + tr A + tr B - 2 tr (A B)^(1/2). The last trace is the sum of the singular values of
    A^(1/2) B^(1/2), with square roots from symmetric eigen-decompositions: unlike a square root of the product A B it stays
    real, and keeps its digits, where a covariance is singular.
    """
    difference = a.mean - b.mean
    overlap = np.linalg.svd(a.root @ b.root.T, compute_uv=False).sum()
    value = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap
    return FrechetDistance(max(float(value), 0.0), (len(a.root), len(b.root)))


def energy_distance(images: np.ndarray, others: np.ndarray) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of N images [N, ...] and N others: 0 on average for samples of one distribution.

    Image i of one set may belong to image i of the other, such as two decodings of the same: such pairs are left out. Takes
    memory of N x N numbers.
    """
    a, b = (each.reshape(len(each), -1).astype(np.float64) for each in (images, others))

    def apart(x: np.ndarray, y: np.ndarray) -> float:
        squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
        return float(np.sqrt(np.maximum(squares, 0))[~np.eye(len(x), dtype=bool)].mean())

    return 2 * apart(a, b) - apart(a, a) - apart(b, b)


@dataclass(frozen=True)
class Score:
    """An inception score: mean and standard deviation over the splits."""

    mean: float
    std: float


class RunningScore:
    """The inception score: certainty of a classifier, and variety of its answers (Salimans et al. 2016, arXiv 1606.03498).

    exp(mean over the images of KL(p(class | image) || p(class))), for each `split` images in the order of the batches (the last
    split may be shorter), as ADM computes it.
    """

    def __init__(self, split: int = SPLIT):
        self._split, self._scores = split, []
        self._begin()

    def add(self, logits: np.ndarray) -> None:
        """Adds logits, or logarithms of probabilities, [B, K] of any float dtype."""
        logits = np.asarray(logits, np.float64)
        while len(logits):
            part, logits = np.split(logits, [self._split - self._count])
            log_p = part - part.max(axis=1, keepdims=True)
            log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
            self._count += len(part)
            self._probabilities = self._probabilities + np.exp(log_p).sum(axis=0)
            self._negative_entropy += _p_log_p(np.exp(log_p))
            if self._count == self._split:
                self._scores.append(self._score())
                self._begin()

    def result(self) -> Score:
        """Raises InputError if nothing was added."""
        scores = self._scores + ([self._score()] if self._count else [])
        if not scores:
            raise InputError("an inception score needs at least one image")
        return Score(float(np.mean(scores)), float(np.std(scores)))

    def _begin(self) -> None:
        self._count, self._probabilities, self._negative_entropy = 0, 0.0, 0.0

    def _score(self) -> float:
        return np.exp(self._negative_entropy / self._count - _p_log_p(self._probabilities / self._count))


def _p_log_p(p: np.ndarray) -> float:
    positive = p[p > 0]
    return float(positive @ np.log(positive))


def precision_recall(reference: np.ndarray, samples: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    A set's manifold is the union of balls about its points that reach to the k-th nearest other point. Precision is the share
    of the samples in the manifold of the reference, recall the share of the reference in the manifold of the samples; so
    recall depends on how many samples there are.

    Args:
      reference, samples: float32 [M, D] and [N, D]. Distances are computed about the reference's mean, which keeps float32
        exact enough; those within rounding count as zero.

    Raises InputError where one set has no more than k points.
    """
    if min(len(reference), len(samples)) <= k:
        raise InputError(f"precision and recall need more than {k} images, not {min(len(reference), len(samples))}")
    centre = reference.mean(axis=0, dtype=np.float64).astype(np.float32)
    real, fake = (jnp.asarray(rows - centre) for rows in (reference, samples))
    precise = _inside(fake, real, _radii(real, k, BLOCK), BLOCK)
    recalled = _inside(real, fake, _radii(fake, k, BLOCK), BLOCK)
    return int(precise.sum()) / len(samples), int(recalled.sum()) / len(reference)


@functools.partial(jax.jit, static_argnames=("k", "block"))
def _radii(points: Array, k: int, block: int) -> Array:
    """Squared distances [N] to the k-th nearest other point."""
    norms = jnp.square(points).sum(axis=1)

    def radius(row: tuple[Array, Array]) -> Array:
        distances = _squared_distances(*row, points, norms)
        for _ in range(k):  # without the nearest, which is first the point itself, at 0; `top_k` is ten times slower on a CPU
            distances = jnp.where(jnp.arange(len(distances)) == distances.argmin(), jnp.inf, distances)
        return distances.min()

    return jax.lax.map(radius, (points, norms), batch_size=block)


@functools.partial(jax.jit, static_argnames="block")
def _inside(points: Array, centres: Array, radii: Array, block: int) -> Array:
    """The points [N] that lie in a ball about one of the centres [M], of squared radii [M]: bool [N]."""
    norms = jnp.square(centres).sum(axis=1)

    def inside(row: tuple[Array, Array]) -> Array:
        return (_squared_distances(*row, centres, norms) <= radii).any()

    return jax.lax.map(inside, (points, jnp.square(points).sum(axis=1)), batch_size=block)


def _squared_distances(point: Array, norm: Array, points: Array, norms: Array) -> Array:
    """Between a point [D] and points [N, D], of squared norms [] and [N]: [N]."""
    norms = norm + norms
    squared = norms - 2 * jnp.matmul(points, point, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(squared < NOISE * norms, 0, squared)


def ssim(images: Array, others: Array, data_range: float = 255.0) -> Array:
    """Structural similarity of each pair of images (Wang et al. 2004, IEEE Transactions on Image Processing 13 (4)).

    A Gaussian window of 11 pixels (sigma 1.5) wherever all of it fits, K1 = 0.01, K2 = 0.03, each channel by itself, then the
    mean over positions and channels.

    Args:
      images, others: [B, H, W, C] of any dtype, values in [0, data_range].

    Returns: [B] float32. Raises InputError for images of less than 11 pixels.
    """
    if min(images.shape[1:3]) < WINDOW:
        raise InputError(f"SSIM needs images of at least {WINDOW} pixels, these have {images.shape[1]}x{images.shape[2]}")
    offset = data_range / 2  # variances are the same without it, and lose fewer digits
    x, y = (jnp.asarray(image, jnp.float32) - offset for image in (images, others))
    mean_x, mean_y, xx, yy, xy = jnp.split(_blur(jnp.concatenate([x, y, x * x, y * y, x * y])), 5)
    variances = xx - mean_x**2 + yy - mean_y**2
    covariance = xy - mean_x * mean_y
    mean_x, mean_y = mean_x + offset, mean_y + offset
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.mean(axis=(1, 2, 3))


def _blur(x: Array) -> Array:
    """The Gaussian window over [B, H, W, C] where it fits: [B, H - 10, W - 10, C]. Sums, not products of matrices, whose
    operands some devices round."""
    taps = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / SIGMA))
    for axis in (1, 2):
        length = x.shape[axis] - WINDOW + 1
        x = sum(tap * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, tap in enumerate(taps / taps.sum()))
    return x


@dataclass(frozen=True)
class CodeStatistics:
    """The use of a codebook: share of the codes that occur, and entropies of their frequencies in bits.

    `entropy` is that of all codes together, `entropy_at_position` the mean of those at each position: H(code | position), which
    says how much of a code is not known from its place alone.
    """

    usage: float
    entropy: float
    entropy_at_position: float


def code_statistics(counts: np.ndarray) -> CodeStatistics:
    """Args: counts, how often each code occurs at each position, integers [T, K]. Raises InputError if one has none."""
    counts = np.asarray(counts, np.float64)
    if not np.all(counts.sum(axis=1) > 0):
        raise InputError("no codes were counted, so there is nothing to say about their use")

    def entropy(counts: np.ndarray) -> float:
        return max(0.0, -_p_log_p(counts / counts.sum()) / np.log(2))

    at_position = np.mean([entropy(row) for row in counts])
    return CodeStatistics(float(np.mean(counts.any(axis=0))), entropy(counts.sum(axis=0)), float(at_position))


def pooled_pixels(images: Array) -> Array:
    """uint8 [N, H, W, C] -> float32 [N, D] in [-1, 1]: the pixels, of larger images averaged to 8 x 8, as plain features.

    Their Fréchet distance needs no network and tells recipes apart on small images; it is not FID.
    """
    count, height, width, channels = images.shape
    pooled = jax.image.resize(to_float(images), (count, min(8, height), min(8, width), channels), "linear", antialias=True)
    return pooled.reshape(count, -1)


def pixel_distance(images: np.ndarray, others: np.ndarray) -> float:
    """Fréchet distance of two sets of images uint8 [N, H, W, C] in their `pooled_pixels`."""
    return frechet_distance(*(moments(pooled_pixels(each)) for each in (images, others))).value
