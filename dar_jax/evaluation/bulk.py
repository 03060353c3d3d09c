"""Many samples into one NPZ file, batch by batch, so that an interrupted run goes on where it stopped.

Shapes: N samples, B at a time, H W pixels, C channels.
"""

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from dar_jax import hosts
from dar_jax.config import SamplingConfig
from dar_jax.errors import InputError
from dar_jax.evaluation.loading import Trained, full_batch, pad, put_batch, to_host
from dar_jax.evaluation.pictures import to_uint8
from dar_jax.evaluation.progress import Progress
from dar_jax.files import replacing, write_json
from dar_jax.sampling.sampler import generate, make_settings
from dar_jax.training.checkpoint import require_shared

Labels = Literal["balanced", "uniform"]


def class_labels(kind: Labels, num: int, classes: int, seed: int) -> np.ndarray:
    """The classes of samples 0 .. num - 1, int64: all in turn (balanced), or drawn independently (uniform) from the seed."""
    if kind == "balanced":
        return np.arange(num) % classes
    return np.random.default_rng(seed).integers(0, classes, num)


def generate_npz(
    trained: Trained,
    out: str | os.PathLike,
    num: int,
    labels: Labels,
    sampling: SamplingConfig,
    batch_size: int = 64,
    seed: int = 0,
) -> Path:
    """Draws samples and writes them in ADM's layout: `arr_0` uint8 [N, H, W, C] and `arr_1`, their classes, int64 [N].

    Sample i has the seed `seed` + i and does not depend on the batch, so a run that was interrupted ends with the images of an
    undisturbed one. Until the file is whole, batches are kept in the folder OUT.parts. While the devices draw a batch, the host
    writes the one before; no more are in memory. Of several hosts, which share the folder, the first writes.

    Raises InputError where OUT exists, OUT.parts holds batches of other settings, or the settings do not fit.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another file")
    if not 0 <= seed <= 2**32 - num:
        raise InputError(f"seeds {seed} .. {seed + num - 1} are not all between 0 and 2**32 - 1")
    settings = make_settings(sampling, trained.config, trained.guidance)
    size = full_batch(min(batch_size, num), trained.mesh)
    classes = class_labels(labels, num, len(trained.class_names), seed)
    parts = _Parts(out.with_name(out.name + ".parts"), num, size)
    require_shared(parts.folder)
    parts.claim(_about(trained, num, labels, sampling, size, seed))
    seeds = (seed + np.arange(num)).astype(np.uint32)
    waiting = None
    with Progress("generated", num) as progress:
        progress.skip(sum(part.stop - part.start for part in parts.done()))
        for rows in parts.missing():
            arguments = put_batch((pad(classes[rows].astype(np.int32), size), pad(seeds[rows], size)), trained.mesh)
            with jax.set_mesh(trained.mesh):
                images = generate(trained.networks, trained.sampler_params, settings, *arguments).images
            if waiting:
                parts.write(*waiting)
                progress.add(waiting[0].stop - waiting[0].start)
            waiting = rows, images
        if waiting:
            parts.write(*waiting)
            progress.add(waiting[0].stop - waiting[0].start)
    if hosts.first():
        with replacing(out) as temporary:
            _assemble(temporary, parts, classes)
        shutil.rmtree(parts.folder)
    hosts.wait("the file is written")
    return out


def _about(trained: Trained, num: int, labels: Labels, sampling: SamplingConfig, size: int, seed: int) -> dict[str, Any]:
    """What batches have to agree in to belong to the same file."""
    checkpoint = trained.found.transformer
    return {
        "checkpoint": str(checkpoint.path.resolve()),
        "samples": num,
        "labels": labels,
        "sampling": dataclasses.asdict(sampling),
        "batch": size,
        "seed": seed,
    }


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The folder of the batches, one .npy file of images each."""

    folder: Path
    num: int
    size: int

    def claim(self, about: dict[str, Any]) -> None:
        """Makes the folder, or checks that it holds batches of the same settings."""
        path = self.folder / "settings.json"
        if not path.exists():
            write_json(path, about)
            return
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        if found != json.loads(json.dumps(about)):
            raise InputError(f"{self.folder} holds batches of other settings; delete it, or choose another file")

    def all(self) -> Iterator[slice]:
        for start in range(0, self.num, self.size):
            yield slice(start, min(start + self.size, self.num))

    def done(self) -> list[slice]:
        return [rows for rows in self.all() if self.path(rows).exists()]

    def missing(self) -> list[slice]:
        return [rows for rows in self.all() if not self.path(rows).exists()]

    def path(self, rows: slice) -> Path:
        return self.folder / f"{rows.start:09d}.npy"

    def write(self, rows: slice, images: jax.Array) -> None:
        pixels = to_uint8(to_host(images)[: rows.stop - rows.start])
        if hosts.first():
            with replacing(self.path(rows)) as temporary, temporary.open("wb") as file:
                np.save(file, pixels)


def _assemble(path: Path, parts: _Parts, classes: np.ndarray) -> None:
    """The batches as one array in an NPZ file, never all in memory."""
    shape = np.load(parts.path(slice(0, 0)), mmap_mode="r").shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (parts.num, *shape)}
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for rows in parts.all():
                member.write(np.ascontiguousarray(np.load(parts.path(rows))).data)
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, classes, allow_pickle=False)
