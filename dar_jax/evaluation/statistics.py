"""What the metrics need to know of a set of images, by the Inception network on all devices, and the files that keep it.

Shapes: N images, n of them at a time, B batch, D pooled features (2048), H W pixels, C channels.
"""

import contextlib
import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


# --- features --------------------------------------------------------------------------------------------------------------


# --- statistics ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """What the metrics need to know of a set of images.

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
    """The statistics of images, each looked at once, in memory that does not grow with their number.

    Args:
      keep: of how many the pooled features are kept (of all, if there are fewer), drawn at random with a fixed seed.
      progress: told how many more are done.

    Raises InputError for fewer than two images, and what reading the images raises.
    """
    running = RunningStatistics(extractor.network, images.count, keep)
    for features in extractor(images.chunks()):
        running.add(features)
        progress(len(features.pool))
    return running.result(images.source, images.shape)


class RunningStatistics:
    """The statistics of features that arrive in batches.

    Args: count, of how many images they will be at most; keep, of how many of these the pooled features are kept.
    """

    def __init__(self, network: Network, count: int, keep: int):
        self.network, self.count, self.seen = network, count, 0
        self._chosen, self._kept = choose(count, keep), []
        self._pool, self._spatial, self._score = RunningMoments(), RunningMoments(), None

    def add(self, features: InceptionFeatures) -> None:
        """Adds the features of some more images, NumPy arrays."""
        count = len(features.pool)
        self._pool.add(features.pool)
        self._spatial.add(features.spatial.reshape(count, -1))
        self._kept.append(features.pool[self._chosen[self.seen : self.seen + count]])
        if features.logits is not None:
            self._score = self._score or RunningScore()
            self._score.add(features.logits)
        self.seen += count

    def result(self, source: str, shape: tuple[int, ...]) -> Statistics:
        """Args: where the images came from, and their (H, W, C). Raises InputError for fewer than two images."""
        if not self.seen:
            raise InputError(f"none of the {self.count:,} images of {source} can be read")
        return Statistics(
            pool=self._pool.result(),
            spatial=self._spatial.result(),
            features=np.concatenate(self._kept),
            score=self._score and self._score.result(),
            source=source,
            shape=shape,
            unreadable=self.count - self.seen,
            network=self.network,
        )


# --- files -----------------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike, statistics: Statistics) -> None:
    """Writes statistics as NPZ, whole or not at all.

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

    Images that the file holds besides, as ADM's do, are not looked at.
    Raises InputError where the file is damaged, holds none, or numbers that cannot be a mean and a covariance of features.
    """
    with npz.opened(path) as archive:
        names = npz.names(archive)
        about = _about(archive) if "about" in names else {}
        pool = _moments(archive, "mu", "sigma", about.get("count"))
        spatial = _moments(archive, "mu_s", "sigma_s", about.get("count")) if "mu_s" in names else None
        features = None
        if "features" in names:
            dtype, shape = npz.header(archive, "features")
            if dtype != np.float32 or len(shape) != 2 or shape[1] != len(pool.mean):
                raise InputError(f"features in {path} is {dtype} {shape}, it should be float32 (N, {len(pool.mean)})")
            features = _measured(archive, "features")
    return Statistics(
        pool=pool,
        spatial=spatial,
        features=features,
        score=about.get("score"),
        source=f"{about['source']}, as kept in {path}" if about else f"{path} (SHA-256 {hash_file(path)})",
        shape=about.get("shape"),
        unreadable=about.get("unreadable", 0),
        network=about.get("network"),
    )


def _moments(archive: zipfile.ZipFile, mean: str, covariance: str, count: int | None) -> Moments:
    dtypes, shapes = zip(*(npz.header(archive, name) for name in (mean, covariance)))
    size = shapes[0][0]
    if any(dtype.kind != "f" for dtype in dtypes) or shapes != ((size,), (size, size)) or size > LARGEST:
        held = " and ".join(f"{name} {dtype} {shape}" for name, dtype, shape in zip((mean, covariance), dtypes, shapes))
        expected = f"a mean and a covariance of features are floats (D,) and (D, D), D at most {LARGEST}"
        raise InputError(f"{archive.filename} holds {held}; {expected}")
    moments = Moments(*(_measured(archive, name).astype(np.float64) for name in (mean, covariance)), count)
    error = np.linalg.norm(moments.root.T @ moments.root - moments.covariance)  # the root, which is kept, is needed anyway
    if error > ROUNDING * np.linalg.norm(moments.covariance):
        raise InputError(f"{covariance} in {archive.filename} is no covariance: it is asymmetric, or has negative eigenvalues")
    return moments


def _measured(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of numbers. Raises InputError where some are not finite, or so large that they measure nothing."""
    values = npz.read(archive, name)
    if not (float(values.min()) >= -LARGEST_VALUE and float(values.max()) <= LARGEST_VALUE):
        raise InputError(f"{name} in {archive.filename} holds values that are not finite, or beyond {LARGEST_VALUE:.0e}")
    return values


def _about(archive: zipfile.ZipFile) -> dict[str, Any]:
    """What `save` wrote besides arrays."""
    dtype, shape = npz.header(archive, "about")
    if dtype == np.uint8 and math.prod(shape) <= LONGEST:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            about = json.loads(npz.read(archive, "about").tobytes())
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
    raise InputError(f"about in {archive.filename} is not what dar-jax writes; make the file again")
