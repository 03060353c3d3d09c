"""Generated images against a reference: FID, sFID, inception score, precision and recall, with the data behind them."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from dar_jax.config import DataConfig
from dar_jax.console import Progress, columns
from dar_jax.errors import InputError
from dar_jax.evaluation.extractor import Extractor
from dar_jax.evaluation.images import ARRAY, Images, from_npz, open_images, subset
from dar_jax.evaluation.metrics import NEIGHBOURS, frechet_distance, precision_recall
from dar_jax.evaluation.statistics import Statistics, collect, load, save
from dar_jax.inference import npz
from dar_jax.weights import hub
from dar_jax.weights.published import PYTORCH_FID, TORCH_FIDELITY

# Images whose features are kept for precision and recall: as many as ADM's reference files and samples have.
REFERENCE_FEATURES, SAMPLE_FEATURES = 10_000, 50_000
FEW = 10_000  # images; with fewer, a Fréchet distance tells more of their number than of what they show
NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
}

FILES_WITH_CLASSIFIER = " and ".join(source.name for source in (TORCH_FIDELITY, PYTORCH_FID))

ImagesOrStatistics = str | os.PathLike | DataConfig | Images | Statistics


def evaluate(
    samples: ImagesOrStatistics,
    reference: ImagesOrStatistics,
    extractor: Extractor,
    num_images: int | None = None,
    reference_images: int | None = None,
    keep_as: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Measures samples against a reference.

    Args:
      samples, reference: an NPZ file (with images uint8 [N, H, W, C] in `arr_0`, or moments as `statistics.load` reads them; of
        a file with both, only precision and recall use the images), a folder of images of one size, a `DataConfig`, whose
        images are centre-cropped to its image_size, `Images`, or `Statistics`.
      num_images, reference_images: the number of them, drawn at random with a fixed seed; None: all.
      keep_as: also write the statistics of the samples to this NPZ file, a reference for other samples.

    Returns the report of `compare`. Raises InputError where something cannot be read or does not fit; before any image is read,
    if that can be known.
    """
    real, fake = _open(reference, reference_images), _open(samples, num_images)
    real = _complete(*real, extractor, REFERENCE_FEATURES, "images of the reference")
    fake = _complete(*fake, extractor, SAMPLE_FEATURES, "samples")
    if keep_as is not None:
        save(keep_as, fake)
    return compare(fake, real)


def open_reference(reference: ImagesOrStatistics, extractor: Extractor, num_images: int | None = None) -> Statistics:
    """The statistics of a reference, as `evaluate` takes it, to compare several sets of samples with. Raises as `evaluate`."""
    return _complete(*_open(reference, num_images), extractor, REFERENCE_FEATURES, "images of the reference")


def compare(samples: Statistics, reference: Statistics) -> dict[str, Any]:
    """The report on samples against a reference, JSON-able.

    Keys: `fid`, `sfid`, `inception_score` (with `inception_score_std`), `precision` and `recall`, as far as they can be
    computed; `left_out`, why the others are missing; descriptions of `samples` and `reference`; `weights` and `resize` of the
    network; `notes` for readers, a line each.

    Raises InputError where the two come from different networks or were resized differently.
    """
    _check_same_network(samples, reference)
    sides = {"samples": samples, "reference": reference}
    figures, left_out, singular = {}, {}, []

    def lacking(field: str) -> str:
        return " and the ".join(side for side, statistics in sides.items() if getattr(statistics, field) is None)

    def frechet(name: str, field: str) -> None:
        both = [getattr(statistics, field) for statistics in sides.values()]
        distance = frechet_distance(*both)
        figures[name] = distance.value
        for side, moments, rank in zip(sides, both, distance.ranks):
            if rank < len(moments.mean):
                singular.append(f"{NAMES[name]}, {side}: rank {rank:,} of {len(moments.mean):,}")

    frechet("fid", "pool")
    if which := lacking("spatial"):
        left_out["sfid"] = f"the {which} came without moments of spatial features (mu_s, sigma_s)"
    else:
        frechet("sfid", "spatial")
    if samples.score:
        figures |= {"inception_score": samples.score.mean, "inception_score_std": samples.score.std}
    else:
        left_out["inception_score"] = (
            f"it needs the network's classifier, which {samples.network.weights} lacks; {FILES_WITH_CLASSIFIER} have it"
            if samples.network
            else "the samples came as moments only, without images"
        )
    if which := lacking("features"):
        left_out["precision"] = left_out["recall"] = f"the {which} came as moments only, without images"
    elif min(len(statistics.features) for statistics in sides.values()) <= NEIGHBOURS:
        left_out["precision"] = left_out["recall"] = f"they need more than {NEIGHBOURS} images on both sides"
    else:
        figures["precision"], figures["recall"] = precision_recall(reference.features, samples.features)
    network = samples.network or reference.network
    return figures | {
        "left_out": left_out,
        **{side: _describe(statistics) for side, statistics in sides.items()},
        "weights": network and {"path": network.weights, "sha256": network.sha256},
        "resize": network and network.resize,
        "notes": _notes(sides, singular),
    }


def table(report: dict[str, Any]) -> str:
    """The report as text for people."""
    rows = []
    for name, title in NAMES.items():
        if name in report:
            deviation = f" +- {report['inception_score_std']:.4f}" if name == "inception_score" else ""
            rows.append((title, f"{report[name]:10.4f}{deviation}"))
    rows.append(())
    for side in ("samples", "reference"):
        about = report[side]
        parts = ["the number of images is not said" if about["images"] is None else f"{about['images']:,} images"]
        if about["size"]:
            parts.append(f"{about['size'][1]} x {about['size'][0]} pixels")
        if about["precision_recall_images"]:
            parts.append(f"{about['precision_recall_images']:,} for precision and recall")
        rows.append((side, f"{about['source']}: {', '.join(parts)}"))
    if report["weights"]:
        rows.append(("network", f"{report['weights']['path']} (SHA-256 {report['weights']['sha256']})"))
        rows.append(("resizing", report["resize"]))
    rows += [("left out", f"{NAMES[name]}: {why}") for name, why in report["left_out"].items()]
    return columns([*rows, *(("note", note) for note in report["notes"])])


def _open(what: ImagesOrStatistics, count: int | None) -> tuple[Statistics | None, Images | None]:
    """Statistics, or images to compute them from, or both: then the images are for their features."""
    what = hub.local(what) if isinstance(what, str | os.PathLike) else what
    if not isinstance(what, (DataConfig, Images, Statistics)) and Path(what).is_file():
        names = npz.names(what)
        if "mu" in names:
            statistics = load(what)
            images = from_npz(what) if ARRAY in names and statistics.features is None else None
        else:
            statistics, images = None, from_npz(what)
    elif isinstance(what, Statistics):
        statistics, images = what, None
    else:
        statistics, images = None, what if isinstance(what, Images) else open_images(what)
    if count is None:
        return statistics, images
    if statistics:
        raise InputError(f"{statistics.source} has moments of all its images, {count:,} of them cannot be taken")
    return None, subset(images, count)


def _complete(statistics: Statistics | None, images: Images | None, extractor: Extractor, keep: int, what: str) -> Statistics:
    if images is None:
        return statistics
    if statistics:
        images = subset(images, min(keep, images.count))
    with Progress(what, images.count) as progress:
        collected = collect(extractor, images, keep, progress.add)
    return collected if statistics is None else dataclasses.replace(statistics, features=collected.features)


def _check_same_network(samples: Statistics, reference: Statistics) -> None:
    sizes = [len(statistics.pool.mean) for statistics in (samples, reference)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the samples have {sizes[0]} features and the reference has {sizes[1]}; they are of different networks"
        )
    networks = samples.network, reference.network
    if all(networks) and networks[0].resize != networks[1].resize:
        raise InputError(
            f"the samples were resized as {networks[0].resize} and the reference as {networks[1].resize}; "
            "make the statistics of one of them again"
        )


def _describe(statistics: Statistics) -> dict[str, Any]:
    return {
        "source": statistics.source,
        "images": statistics.pool.count,
        "size": statistics.shape and list(statistics.shape),
        "unreadable": statistics.unreadable,
        "precision_recall_images": None if statistics.features is None else len(statistics.features),
    }


def _notes(sides: dict[str, Statistics], singular: list[str]) -> list[str]:
    notes = []
    counts = {side: statistics.pool.count for side, statistics in sides.items()}
    if few := [f"{count:,} in the {side}" for side, count in counts.items() if count is not None and count < FEW]:
        notes.append(
            f"FID and sFID of fewer than {FEW:,} images ({', '.join(few)}) are biased upwards, about as 1 / N: compare them "
            "only with figures from equally many images; published ones take 50,000 samples"
        )
    if singular:
        notes.append(f"covariances are singular, of too few images or of features that never change ({'; '.join(singular)})")
    for side, statistics in sides.items():
        if statistics.unreadable:
            notes.append(f"{statistics.unreadable:,} images of the {side} could not be read and are left out")
        if statistics.network is None:
            notes.append(
                f"the moments of the {side} are their file's own, which does not say how they were computed: they hold only if "
                "by the same network with the same resizing (ADM's files: tensorflow1)"
            )
    samples, reference = sides.values()
    if samples.shape and reference.shape and samples.shape != reference.shape:
        shapes = [" x ".join(map(str, statistics.shape)) for statistics in (samples, reference)]
        notes.append(f"the samples are {shapes[0]} (height, width, channels), the reference is {shapes[1]}")
    if samples.network and reference.network and samples.network.sha256 != reference.network.sha256:
        notes.append(f"the reference was computed with another file of weights (SHA-256 {reference.network.sha256})")
    return notes
