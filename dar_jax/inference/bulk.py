"""Many samples in one NPZ file, batch by batch, so that an interrupted run goes on where it stopped.

Shapes: N samples, B at a time, H W pixels, C channels.
"""

import dataclasses
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from dar_jax.config import SamplingConfig
from dar_jax.console import Progress
from dar_jax.errors import InputError
from dar_jax.files import replacing
from dar_jax.inference import identity
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import Trained, seeds_from
from dar_jax.parallel import hosts
from dar_jax.parallel.batches import row_slices
from dar_jax.sampling.settings import make_settings
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
    given: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Draws samples and writes them in ADM's layout: `arr_0` uint8 [N, H, W, C] and `arr_1`, their classes, int64 [N].

    Sample i has the seed `seed` + i and does not depend on the batch, so a run that was interrupted ends with the images of an
    undisturbed one, also with other batches and devices. Until the file is complete, batches are kept in the folder OUT.parts.
    While the devices draw a batch, the host writes the one before; no more are in memory. With several hosts, which share the
    folder, the first writes.

    given: as of `sample`.

    Raises InputError where OUT exists, OUT.parts holds batches of anything else (other weights, settings or code, see
    `identity`), or the settings do not fit.
    """
    out = Path(out)
    parts = _Parts(out.with_name(out.name + ".parts"), num)
    if out.exists() and not parts.folder.exists():
        raise InputError(f"{out} exists already; choose another file")
    seeds = seeds_from(seed, num)
    settings = make_settings(sampling, trained.config, trained.networks.method)
    size = trained.full_batch(min(batch_size, num))
    classes = class_labels(labels, num, len(trained.class_names), seed)
    require_shared(parts.folder)
    about = {"model": identity.of_model(trained), "sampling": dataclasses.asdict(sampling)}
    about |= {"guidance_scales": identity.describe(settings.scales), "samples": num, "labels": labels, "seed": seed}
    if given:
        about["given"] = identity.describe(given)
    mark = f"dar_jax {identity.digest(about)}".encode()
    if not out.exists():
        identity.claim(parts.folder, about, "*.npy")
        missing = parts.missing(size)
        with Progress("generated", num) as progress:
            progress.skip(num - sum(rows.stop - rows.start for rows in missing))
            for batch in sample(trained, classes, seeds, settings, size, batches=missing, given=given):
                parts.write(batch.rows, batch.images)
                progress.add(len(batch.images))
    elif _comment(out) != mark:  # else this very file was finished, but its parts not yet deleted
        raise InputError(f"{out} exists already; choose another file")
    if hosts.first():
        if not out.exists():
            with replacing(out) as temporary:
                _assemble(temporary, parts, classes, mark)
        shutil.rmtree(parts.folder)
    hosts.wait("the file is written")
    return out


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The folder of the batches: START-STOP.npy with the images of these samples."""

    folder: Path
    num: int

    def done(self) -> list[slice]:
        """The samples that are drawn, batch by batch in their order."""
        names = sorted(path.stem for path in self.folder.glob("*-*.npy"))
        return [slice(*map(int, name.split("-"))) for name in names]

    def missing(self, size: int) -> list[slice]:
        """The other samples, in batches of `size` at most."""
        done = self.done()
        gaps = zip([0, *(rows.stop for rows in done)], [*(rows.start for rows in done), self.num])
        return [rows for start, stop in gaps for rows in row_slices(start, stop, size)]

    def path(self, rows: slice) -> Path:
        return self.folder / f"{rows.start:010d}-{rows.stop:010d}.npy"

    def write(self, rows: slice, images: np.ndarray) -> None:
        if hosts.first():
            with replacing(self.path(rows)) as temporary, temporary.open("wb") as file:
                np.save(file, images)

    def read(self, rows: slice) -> np.ndarray:
        try:
            return np.load(self.path(rows))
        except (ValueError, EOFError) as error:
            raise InputError(f"{self.path(rows)} is damaged ({error}); delete it and run the command again") from error


def _assemble(path: Path, parts: _Parts, classes: np.ndarray, comment: bytes) -> None:
    """The batches as one array in an NPZ file, never all in memory."""
    done = parts.done()
    header = {"descr": "|u1", "fortran_order": False, "shape": (parts.num, *parts.read(done[0]).shape[1:])}
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = comment
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for rows in done:
                member.write(np.ascontiguousarray(parts.read(rows)).data)
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, classes, allow_pickle=False)


def _comment(path: Path) -> bytes | None:
    """The comment of a zip archive; None for another file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except (zipfile.BadZipFile, OSError):
        return None
