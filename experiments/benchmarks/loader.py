"""Does the loader keep up with the accelerators? Images per second and host core, against what the ImageNet recipes need.

Command:  python experiments/benchmarks/loader.py [--images FOLDER] [--workers N] [--json FILE]
Measures: decoding and each of the crops, the same images packed and in a tar, and stored codes, through the pipeline that
          training uses. One core: images for each second of processor time, in threads of one process. This host: images a
          second with N worker processes.
Images:   of a folder, or 64 of 500 x 375 pixels made on the spot: noise with a spectrum like that of photographs, as JPEG of
          quality 90, about 110 KB each, the average of ImageNet. They are read from memory; a disk has to be as fast besides.
Needs:    floating-point operations of one image, counted in the model, at the share of the peak that is aimed at.
Time:     about 2 minutes on two CPU cores.
"""

import copy
import dataclasses
import math
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import run
from PIL import Image

from dar_jax.config import DataConfig, MeshConfig, TransformerTraining
from dar_jax.data import codes, shards
from dar_jax.data.archives import TarSource
from dar_jax.data.packed import open_packed, pack
from dar_jax.data.pipeline import Batch, batches, elements
from dar_jax.data.sources import FolderSource, Source, open_source
from dar_jax.data.transforms import center_crop
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.files import write_json
from dar_jax.parallel import make_mesh
from dar_jax.plan.jobs import training_job
from dar_jax.training.flops import PEAKS, count_flops, model_flops

BATCH = 64
STORED = 16_384  # images in the folder of codes
PACKED = 512  # images at most, packed and in a tar
EXPERIMENTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Machine:
    """What one host has: peak of all its accelerators together in bfloat16 operations/s, and processor cores."""

    peak: float
    cores: int


MACHINES = {
    # 8 of the chips of a slice such as v5e:8x8, whose hosts have 224 virtual processors, two to a core
    "v5e host (8 chips)": Machine(8 * PEAKS["TPU v5 lite"], 112),
    # one of the 8 of a DGX H200, which has 112 cores
    "H200": Machine(PEAKS["NVIDIA H200"], 14),
}


@dataclass(frozen=True)
class Need:
    """One image of a recipe: its floating-point operations, share of the peak that is aimed at, and what the loader does."""

    flops: float
    utilisation: float
    reading: str


def main(images: str | None = None, workers: int = os.cpu_count() or 1, seconds: float = 5.0, json: str | None = None) -> None:
    """Prints what the loader delivers and what each recipe needs.

    Args:
      images: a folder of images, with a sub-folder of each class; else they are made on the spot.
      workers: processes of the second measurement; 0: none.
      seconds: of each measurement.
      json: also write everything to this file.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(DataConfig(path=images or write_images(Path(folder) / "images")))
        readings = image_readings(source) | other_forms(source, Path(folder))
        readings["stored codes"] = stored_codes(Path(folder) / "codes")
        rates = {name: measure(reading, workers, seconds) for name, reading in readings.items()}
    rows = [row for name, need in needs().items() for row in compare(name, need, rates[need.reading][0])]
    print(source.description if images else "64 images of 500 x 375 pixels, JPEG, about 110 KB each")
    print("\n".join([*_rates_table(rates, workers), "", *_needs_table(rows)]))
    if json is not None:
        measured = {name: {"images_per_second_and_core": core, "with_workers": host} for name, (core, host) in rates.items()}
        write_json(json, {"processors": os.cpu_count(), "workers": workers, "readings": measured, "recipes": rows})


def _rates_table(rates: dict[str, tuple[float, float | None]], workers: int) -> Iterator[str]:
    title = f"images/s (this host has {os.cpu_count()} processors)"
    yield f"{title:<44}{'a core':>10}" + (f"{f'{workers} processes':>16}" if workers else "")
    for name, (core, host) in rates.items():
        yield f"{name:<44}{core:>10,.0f}" + (f"{host:>16,.0f}" if workers else "")


def _needs_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'recipe':<24}{'GFLOP':>7}  {'machine':<20}{'images/s':>9}{'cores needed':>14}{'there':>7}  {'fed':<5}reading"
    for row in rows:
        yield (
            f"{row['recipe']:<24}{row['flops_per_image'] / 1e9:>7,.0f}  {row['machine']:<20}{row['images_per_second']:>9,.0f}"
            f"{row['cores_needed']:>14}{row['cores']:>7}  {'yes' if row['fed'] else 'NO':<5}{row['reading']}"
        )


def image_readings(source: Source) -> dict[str, Callable[[int], Iterator[Batch]]]:
    """What is done with images, by name: a function from a number of worker processes to batches without end."""

    def tokenizing(workers: int) -> Iterator[Batch]:
        config, indices = DataConfig(workers=workers), np.resize(np.arange(len(source)), 10**6)
        return elements(source, config, indices, batch_size=BATCH, crop=lambda image: center_crop(image, 281))

    return {
        "decode, ADM random crop": training(source, "random"),
        "decode, centre crop": training(source, "center"),
        "decode, one of ten crops": training(source, "ten_crop"),
        "decode, centre crop of 281 to store ten": tokenizing,
    }


def training(source: Source, crop: str) -> Callable[[int], Iterator[Batch]]:
    """Batches for training with one of the crops."""
    config = DataConfig(crop=crop, flip=crop == "random")
    return lambda workers: batches(source, dataclasses.replace(config, workers=workers), batch_size=BATCH, seed=0)


def other_forms(source: FolderSource, folder: Path) -> dict[str, Callable[[int], Iterator[Batch]]]:
    """The first of the images packed, and in a tar as webdataset's, read for the ADM random crop."""
    few = copy.copy(source)
    few.files = source.files[:PACKED]
    pack(few, folder / "packed", "train")
    with tarfile.open(folder / "images.tar", "w") as tar:
        for number, file in enumerate(few.files):
            tar.add(file, f"{number:06d}{Path(file).suffix}")
            (folder / "label.cls").write_text("0")
            tar.add(folder / "label.cls", f"{number:06d}.cls")
    side = DataConfig().image_size
    return {
        "packed, decode, ADM random crop": training(open_packed(folder / "packed", "train", smaller_side=side), "random"),
        "tar, decode, ADM random crop": training(TarSource(folder / "images.tar", "train", 3, side), "random"),
    }


def stored_codes(folder: Path) -> Callable[[int], Iterator[Batch]]:
    """The same for stored codes: those of `STORED` images, ten crops of 256 each, drawn at random."""
    rng = np.random.default_rng(0)
    info = codes.CodesInfo(STORED, 4096, 10, 256, 2**14, tuple(map(str, range(1000))), "random", "no images")
    shards.begin(folder, info)
    for shard in range(info.shards):
        count = len(info.elements(shard))
        codes.write_shard(folder, info, shard, rng.integers(0, 2**14, (count, 10, 256)), rng.integers(0, 1000, count))
    shards.finish(folder, codes.CodesInfo)
    source = codes.open_codes(folder)
    return lambda workers: batches(source, DataConfig(source="codes", workers=workers), batch_size=BATCH, seed=0)


def measure(reading: Callable[[int], Iterator[Batch]], workers: int, seconds: float) -> tuple[float, float | None]:
    """Images for each second of processor time in one process, and images a second with worker processes (None without)."""
    core = _rate(reading(0), time.process_time, seconds)
    return core, _rate(reading(workers), time.perf_counter, seconds) if workers else None


def _rate(data: Iterator[Batch], clock: Callable[[], float], seconds: float) -> float:
    with closing(data):
        for _ in range(3):  # threads or processes have started, and what they made ahead is not counted as free
            next(data)
        began, images, ends = clock(), 0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            images += len(next(data)["label"])
        return images / (clock() - began)


def needs() -> dict[str, Need]:
    """Every ImageNet recipe, with images and with stored codes, and storing them."""
    experiments = {path.stem: load_experiment(path) for path in sorted(EXPERIMENTS.glob("imagenet256_*.py"))}
    tokenizer = experiments.pop("imagenet256_tokenizer")
    encoding = encoder_flops(tokenizer)
    found = {
        "tokenizer": Need(step_flops(tokenizer), 0.45, "decode, ADM random crop"),
        "storing ten crops": Need(10 * encoding, 0.45, "decode, centre crop of 281 to store ten"),
    }
    for name, experiment in experiments.items():
        size, flops = name.rpartition("_")[2].upper(), step_flops(experiment)
        found[f"transformer {size}, images"] = Need(flops + encoding, 0.5, "decode, one of ten crops")
        found[f"transformer {size}, codes"] = Need(flops, 0.5, "stored codes")
    return found


def compare(recipe: str, need: Need, rate: float) -> Iterator[dict[str, Any]]:
    """A row for each machine."""
    for name, machine in MACHINES.items():
        wanted = machine.peak * need.utilisation / need.flops
        cores = math.ceil(wanted / rate)
        yield {
            "recipe": recipe,
            "flops_per_image": need.flops,
            "machine": name,
            "images_per_second": wanted,
            "reading": need.reading,
            "cores_needed": cores,
            "cores": machine.cores,
            "fed": cores <= machine.cores,
        }


def step_flops(experiment: Experiment) -> float:
    """Of one image in a training step: the tokenizer's with its frozen networks, a transformer's on stored codes."""
    config = experiment.config
    changes = {"train": dataclasses.replace(config.train, batch_size=1, accumulate=1)}
    if isinstance(config, TransformerTraining):
        changes["data"] = dataclasses.replace(config.data, source="codes")
    changed = experiment.with_config(dataclasses.replace(config, **changes))
    return model_flops(training_job(changed, make_mesh(MeshConfig(), jax.devices()[:1])).traced)


def encoder_flops(experiment: Experiment) -> float:
    """Of one image that becomes codes."""
    config, model = experiment.config.model, experiment.build_model()
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), jnp.float32)
    params = jax.eval_shape(lambda: experiment.init_params(model))
    return count_flops(lambda params, images: model.apply({"params": params}, images, method="codes"), params, images)


def write_images(folder: Path, count: int = 64) -> str:
    """Writes images like those of ImageNet in size and effort, upright and across, and returns the folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = ((375, 500), (500, 375))[number % 2]
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = np.inf
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.1, (height, width))
        noise = noise / noise.std(axis=(1, 2), keepdims=True)
        noise = 80 * noise.mean(axis=0) + 18 * noise  # colours go along with brightness
        pixels = np.clip(118 + noise.transpose(1, 2, 0), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
    return str(folder)


if __name__ == "__main__":
    run(lambda: tyro.cli(main))
