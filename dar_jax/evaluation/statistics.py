"""Statistics of a set of images, all that the metrics need, by the Inception network on all devices; and their files.

Shapes: N images, n of them at a time, B batch, D pooled features (2048), H W pixels, C channels.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dar_jax.errors import InputError
from dar_jax.evaluation.extractor import Extractor, Network
from dar_jax.evaluation.images import Images, choose
from dar_jax.evaluation.metrics import Moments, RunningMoments, RunningScore, Score
from dar_jax.features.inception import InceptionFeatures
from dar_jax.files import hash_file, replacing
from dar_jax.inference import npz

LARGEST = 1 << 12  # features that a file may have; Inception has 2048
LARGEST_VALUE = 1e9  # of a mean, a covariance or a feature in a file
ROUNDING = 1e-3  # of a covariance, relative to its norm; float16 leaves 2e-4
LONGEST = 1 << 16  # bytes of what a file says about itself


# --- statistics ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """All that the metrics need of a set of images.

    pool, spatial: moments of the features of FID and sFID; `spatial` is None where a file lacks them.
    features: float32 [n, D], the pooled features of some of the images, for precision and recall; None where a file lacks them.
    score: the inception score; None without the network's classifier.
    source: where the images come from, one line.
    shape: (H, W, C) of the images; None where a file does not say.
    unreadable: images of the source that could not be read, and are left out.
    network: what computed the moments; None where a file does not say.
    """

    pool: Moments
    spatial: Moments | None
    features: np.ndarray | None
    score: Score | None
    source: str
    shape: tuple[int, ...] | None
    unreadable: int
    network: Network | None


def collect(
    extractor: Extractor, images: Images, keep: int, progress: Callable[[int], None] = lambda count: None
) -> Statistics:
    """The statistics of images, each read once, in memory that does not grow with their number.

    Args:
      keep: number of images whose pooled features are kept (all, if there are fewer), drawn at random with a fixed seed.
      progress: called with the number of further images that are done.

    Raises InputError for fewer than two images, and what reading the images raises.
    """
    running = RunningStatistics(extractor.network, images.count, keep)
    add_features(extractor, ((running, chunk) for chunk in images.chunks()), progress)
    return running.result(images.source, images.shape)


class RunningStatistics:
    """The statistics of features that arrive in batches.

    Args: count, the most images there will be; keep, the number of them whose pooled features are kept.
    """

    def __init__(self, network: Network, count: int, keep: int):
        self.network, self.count, self.added = network, count, 0
        self._chosen, self._kept = choose(count, keep), []
        self._pool, self._spatial, self._score = RunningMoments(), RunningMoments(), None

    def add(self, features: InceptionFeatures) -> None:
        """Adds the features of further images, NumPy arrays."""
        count = len(features.pool)
        self._pool.add(features.pool)
        self._spatial.add(features.spatial.reshape(count, -1))
        self._kept.append(features.pool[self._chosen[self.added : self.added + count]])
        if features.logits is not None:
            self._score = self._score or RunningScore()
            self._score.add(features.logits)
        self.added += count

    def result(self, source: str, shape: tuple[int, ...]) -> Statistics:
        """Args: where the images came from, and their (H, W, C). Raises InputError for fewer than two images."""
        if not self.added:
            raise InputError(f"none of the {self.count:,} images of {source} can be read")
        return Statistics(
            pool=self._pool.result(),
            spatial=self._spatial.result(),
            features=np.concatenate(self._kept),
            score=self._score and self._score.result(),
            source=source,
            shape=shape,
            unreadable=self.count - self.added,
            network=self.network,
        )


def add_features(
    extractor: Extractor,
    chunks: Iterable[tuple[RunningStatistics, np.ndarray]],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Adds the features of images uint8 [n, H, W, C] to the statistics that each chunk of them comes with.

    Chunks of several statistics share the batches of the extractor, and are read while the devices work on those before.
    """
    owners: collections.deque[RunningStatistics] = collections.deque()  # of each image that the extractor has read

    def images() -> Iterator[np.ndarray]:
        for running, chunk in chunks:
            owners.extend([running] * len(chunk))
            yield chunk

    for features in extractor(images()):
        start = 0
        for running, group in itertools.groupby([owners.popleft() for _ in features.pool]):
            rows = slice(start, start := start + len(list(group)))
            running.add(jax.tree.map(lambda values, rows=rows: values[rows], features))
        progress(len(features.pool))


# --- files -----------------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike, statistics: Statistics) -> None:
    """Writes statistics as NPZ, completely or not at all.

    The moments have the names of ADM's reference files, mu, sigma, mu_s and sigma_s, so that other tools read them too;
    `features` and, as JSON, `about` are this project's.
    """
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    if statistics.features is not None:
        arrays["features"] = statistics.features
    about = {
        "count": statistics.pool.count,
        "score": statistics.score and dataclasses.astuple(statistics.score),
        "source": statistics.source,
        "shape": statistics.shape,
        "unreadable": statistics.unreadable,
        "network": statistics.network and dataclasses.astuple(statistics.network),
    }
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load(path: str | os.PathLike) -> Statistics:
    """Reads the statistics of `save`, of ADM's reference files, or of pytorch-fid, which has mu and sigma only.

    Images in the same file, as ADM's have them, are not read.
    Raises InputError where the file is damaged, holds none, or numbers that cannot be a mean and a covariance of features.
    """
    optional = {"mu_s": ["mu_s", "sigma_s"], "features": ["features"], "about": ["about"]}
    names = npz.names(path)
    arrays = npz.read(path, "mu", "sigma", *(name for first in optional if first in names for name in optional[first]))
    about = _about(path, arrays.pop("about")) if "about" in arrays else {}
    pool = _moments(path, arrays, "mu", "sigma", about.get("count"))
    features = arrays.get("features")
    if features is not None:
        if features.dtype != np.float32 or features.shape[1:] != pool.mean.shape:
            form = f"{features.dtype} {features.shape}"
            raise InputError(f"features in {path} is {form}, it should be float32 (N, {len(pool.mean)})")
        _check_finite(path, {"features": features})
    return Statistics(
        pool=pool,
        spatial=_moments(path, arrays, "mu_s", "sigma_s", about.get("count")) if "mu_s" in arrays else None,
        features=features,
        score=about.get("score"),
        source=f"{about['source']}, as kept in {path}" if about else f"{path} (SHA-256 {hash_file(path)})",
        shape=about.get("shape"),
        unreadable=about.get("unreadable", 0),
        network=about.get("network"),
    )


def _moments(path: str | os.PathLike, arrays: dict[str, np.ndarray], mean: str, covariance: str, count: int | None) -> Moments:
    pair = {name: arrays[name] for name in (mean, covariance)}
    shapes = [values.shape for values in pair.values()]
    size = shapes[0][0]
    if any(values.dtype.kind != "f" for values in pair.values()) or shapes != [(size,), (size, size)] or size > LARGEST:
        held = " and ".join(f"{name} {values.dtype} {values.shape}" for name, values in pair.items())
        raise InputError(
            f"{path} holds {held}; a mean and a covariance of features are floats (D,) and (D, D), D at most {LARGEST}"
        )
    _check_finite(path, pair)
    moments = Moments(*(values.astype(np.float64) for values in pair.values()), count)
    error = np.linalg.norm(moments.root.T @ moments.root - moments.covariance)  # the root, which is kept, is needed anyway
    if error > ROUNDING * np.linalg.norm(moments.covariance):
        raise InputError(f"{covariance} in {path} is no covariance: it is asymmetric, or has negative eigenvalues")
    return moments


def _check_finite(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Raises InputError where values are not finite, or so large that they measure nothing."""
    for name, values in arrays.items():
        if not (float(values.min()) >= -LARGEST_VALUE and float(values.max()) <= LARGEST_VALUE):
            raise InputError(f"{name} in {path} holds values that are not finite, or beyond {LARGEST_VALUE:.0e}")


def _about(path: str | os.PathLike, text: np.ndarray) -> dict[str, Any]:
    """The metadata of `save`, checked."""
    if text.dtype == np.uint8 and text.size <= LONGEST:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            about = json.loads(text.tobytes())
            known = {
                "count": None if about["count"] is None else int(about["count"]),
                "score": about["score"] and Score(*map(float, about["score"])),
                "source": str(about["source"]),
                "shape": about["shape"] and tuple(map(int, about["shape"])),
                "unreadable": int(about["unreadable"]),
                "network": about["network"] and Network(*map(str, about["network"])),
            }
            score = known["score"] or Score(0.0, 0.0)
            least = (2 if known["count"] is None else known["count"]) - 2, known["unreadable"], *(known["shape"] or ())
            if math.isfinite(score.mean) and math.isfinite(score.std) and min(least) >= 0:
                return known
    raise InputError(f"about in {path} is not what dar-jax writes; make the file again")
