"""The quality of a tokenizer's reconstructions: PSNR, SSIM, LPIPS, Fréchet distances, and what its codes carry.

Shapes: B images, H W pixels, C channels, V codes.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.config import DataConfig, SamplingConfig
from dar_jax.console import columns
from dar_jax.data.sources import Source
from dar_jax.errors import InputError, require
from dar_jax.evaluation import metrics
from dar_jax.evaluation.extractor import Extractor
from dar_jax.evaluation.fid import FEW
from dar_jax.evaluation.statistics import RunningStatistics, add_features
from dar_jax.features.load import load_lpips
from dar_jax.features.vgg_lpips import SMALLEST, Lpips
from dar_jax.inference.reconstruct import reconstruct_source
from dar_jax.inference.trained import Trained, seeds_from
from dar_jax.models.pixels import to_float
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.parallel.batches import over_batches
from dar_jax.weights.published import resolve

FROM_ZERO = 1024  # images decoded from x = 0

NAMES = {  # psnr_without_noise is of the first FROM_ZERO images; bits_per_image is T times the entropy of a code at a position
    "psnr": "PSNR (dB)",
    "psnr_without_noise": "PSNR from x = 0 (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS (VGG16)",
    "rfid": "rFID",
    "rsfid": "rsFID",
    "pixel_distance": "distance of pixels",
    "codebook_usage": "codes in use",
    "codebook_entropy": "entropy of codes (bits)",
    "entropy_at_position": "at a position (bits)",
    "bits_per_image": "bits per image, at most",
}


@dataclass(frozen=True)
class LpipsWeights:
    """Parameters of `Lpips`, and a line about their files."""

    params: dict
    description: str


def open_lpips(path: str | os.PathLike | None = None) -> LpipsWeights:
    """The weights of LPIPS, of a file or folder, or where `published.resolve` finds them. Raises InputError as that."""
    resolved = resolve("lpips_vgg16", path)
    return LpipsWeights(load_lpips(*resolved.files), str(resolved))


def require_images(tokenizer: Tokenizer) -> None:
    """Raises InputError for a tokenizer of other data."""
    shape = list(tokenizer.data_shape)
    require(len(shape) == 3, f"the tokenizer's data are {shape}, but images are evaluated, [height, width, channels]")


def evaluate_tokenizer(
    trained: Trained,
    source: Source,
    data: DataConfig,
    extractor: Extractor | None = None,
    lpips: LpipsWeights | None = None,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
    batch_size: int = 64,
    num_images: int | None = None,
) -> dict[str, Any]:
    """Encodes and decodes the images of a data set, centre-cropped to the tokenizer's size.

    Args:
      extractor: for rFID (and rsFID, of the spatial features), between originals and decoded images; None: left out.
      lpips: None: left out.
      sampling: its solver and number of steps count.
      seed: image i is denoised from the noise of seed + i.
      num_images: the number of images, from the first on; None: all.

    Returns a JSON-able report: the keys of `NAMES`, means over images where they are of each; `left_out`, why one is missing;
    `images`, `unreadable`, `data`, `weights`, `notes`. Raises InputError where the tokenizer's data are no images, no
    image can be read, or a seed is not in [0, 2**32).
    """
    require_images(trained.networks.tokenizer)
    total = min(num_images or len(source), len(source))
    seeds = seeds_from(seed, total)
    config, left_out, of_each = trained.config, {}, collections.defaultdict(list)
    measures: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {}  # (originals, decoded) -> [B]
    if config.image_size >= metrics.WINDOW:
        measures["ssim"] = _ssim
    else:
        left_out["ssim"] = f"it needs images of at least {metrics.WINDOW} pixels"
    if lpips is not None and config.image_size >= SMALLEST:
        measures["lpips"] = functools.partial(lpips_distance, lpips.params)
    else:
        left_out["lpips"] = f"it needs images of at least {SMALLEST} pixels" if lpips else "there are no weights for it"
    if extractor is None:
        left_out["rfid"] = left_out["rsfid"] = "there are no weights of Inception"
    sides = [] if extractor is None else [RunningStatistics(extractor.network, total, 0) for _ in range(2)]
    pixels = [metrics.RunningMoments() for _ in range(2)]
    counts = np.zeros((config.num_tokens, config.codebook_size), np.int64)

    def measure_pairs(originals: jax.Array, decoded: jax.Array) -> dict[str, jax.Array]:
        values = {name: measure(originals, decoded) for name, measure in measures.items()}
        return values | {"pixels": jnp.stack([metrics.pooled_pixels(x) for x in (originals, decoded)], axis=1)}

    def measured() -> Iterator[tuple[RunningStatistics, np.ndarray]]:
        """Takes all measures but those of the extractor, and yields the images for it."""
        results = reconstruct_source(trained, source, data, "evaluated", seeds, sampling, batch_size)
        pairs = ((result, (result.originals, result.images)) for _, result in results)
        size = trained.full_batch(min(batch_size, total))
        for result, values in over_batches(measure_pairs, pairs, size, trained.mesh):
            for moments, features in zip(pixels, values.pop("pixels").swapaxes(0, 1)):
                moments.add(features)
            for name, value in {"psnr": result.psnr, **values}.items():
                of_each[name].append(value)
            if result.codes is not None:
                np.add.at(counts, (np.arange(counts.shape[0]), result.codes), 1)
            yield from zip(sides, (result.originals, result.images))

    if extractor is None:
        collections.deque(measured(), maxlen=0)
    else:
        add_features(extractor, measured())
    images = sum(map(len, of_each["psnr"]))
    if images == 0:
        raise InputError(f"none of the {total} images can be read: {source.description}")
    from_zero = seeds[:FROM_ZERO]
    for _, result in reconstruct_source(noiseless(trained), source, data, "from x = 0", from_zero, sampling, batch_size):
        of_each["psnr_without_noise"].append(result.psnr)

    report = {name: float(np.mean(np.concatenate(values))) for name, values in of_each.items()}
    if sides and images == 1:
        left_out["rfid"] = left_out["rsfid"] = "it needs more than one image"
    elif sides:
        shape = (config.image_size, config.image_size, config.channels)
        real, fake = (side.result(source.description, shape) for side in sides)
        report["rfid"] = metrics.frechet_distance(real.pool, fake.pool).value
        report["rsfid"] = metrics.frechet_distance(real.spatial, fake.spatial).value
    if images > 1:
        report["pixel_distance"] = metrics.frechet_distance(*(moments.result() for moments in pixels)).value
    else:
        left_out["pixel_distance"] = "it needs more than one image"
    if config.vq_enable:
        codes = metrics.code_statistics(counts)
        report |= {"codebook_usage": codes.usage, "codebook_entropy": codes.entropy}
        report |= {"entropy_at_position": codes.entropy_at_position}
        report |= {"bits_per_image": config.num_tokens * codes.entropy_at_position}
    else:
        of_codes = ("codebook_usage", "codebook_entropy", "entropy_at_position", "bits_per_image")
        left_out |= dict.fromkeys(of_codes, "the tokenizer is continuous")
    notes = []
    if "rfid" in report and images < FEW:
        notes.append(f"rFID of {images:,} images is biased upwards, about as 1 / N: compare it only at equal numbers")
    return report | {
        "left_out": left_out,
        "images": images,
        "unreadable": total - images,
        "data": source.description,
        "weights": {
            "inception": extractor and f"{extractor.network.weights} (SHA-256 {extractor.network.sha256})",
            "resize": extractor and extractor.network.resize,
            "lpips": lpips and lpips.description,
        },
        "notes": notes,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text for people."""
    rows = []
    for name, title in NAMES.items():
        if name in report:
            rows.append((title, f"{report[name]:10.1%}" if name == "codebook_usage" else f"{report[name]:10.4f}"))
    unreadable = f", {report['unreadable']:,} unreadable" if report["unreadable"] else ""
    rows += [(), ("images", f"{report['images']:,}{unreadable}: {report['data']}")]
    rows += [(title, text) for title, text in report["weights"].items() if text]
    rows += [("left out", f"{NAMES[name]}: {why}") for name, why in report["left_out"].items()]
    return columns([*rows, *(("note", note) for note in report["notes"])])


def _zeros(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros((len(keys), *shape))


def noiseless(trained: Trained) -> Trained:
    """The same networks, denoising from x = 0 instead of noise: nearly the mean of what the noises lead to."""
    method = dataclasses.replace(trained.networks.method, noise=_zeros)
    return dataclasses.replace(trained, networks=dataclasses.replace(trained.networks, method=method))


_ssim = jax.jit(metrics.ssim)


@jax.jit
def lpips_distance(params: dict, images: jax.Array, others: jax.Array) -> jax.Array:
    """LPIPS of images uint8 [B, H, W, C], grey or RGB, from others -> [B]. params: those of `open_lpips`."""
    images, others = (to_float(jnp.broadcast_to(x, (*x.shape[:3], 3))) for x in (images, others))
    return Lpips().apply({"params": params}, images, others)
