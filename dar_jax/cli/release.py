"""Commands for the files of the authors' release."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dar_jax.cli.options import Optional, Place
from dar_jax.config import Heads
from dar_jax.console import show


@dataclass(frozen=True)
class Import:
    """Make an ordinary checkpoint of a file of the authors' PyTorch release.

    Takes their tokenizer or transformer, as `.pt` in any of PyTorch's formats or as `.safetensors`, with sizes from the file's
    configuration or from the shapes. Nothing in the file is run, and PyTorch is not needed. The names dar_tokenizer_v1, dar_l
    and dar_xl stand for the authors' files, which are downloaded if they are not in the cache folder (DAR_JAX_CACHE).

    Example: dar-jax import D-AR-L-360K.pt --tokenizer D-AR-tokenizer_v1.pt --workdir runs/dar_l
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]  # to read
    workdir: str  # the folder to make; `sample`, `reconstruct`, `info` and `train --resume` take it as a checkpoint
    tokenizer: Optional[str] = None  # of a transformer: a file of the release, or a checkpoint; it is copied into the folder
    heads: Optional[Heads] = None  # of a transformer's attention, where its size is none of the release's

    def run(self) -> None:
        from dar_jax.release.checkpoints import import_checkpoint

        show("\n".join(import_checkpoint(self.file, self.workdir, self.tokenizer, self.heads)))


@dataclass(frozen=True)
class Export:
    """Write a checkpoint in the names and the format of the authors' PyTorch release.

    The tokenizer of a transformer is in its folder's sub-folder `tokenizer`.

    Example: dar-jax export runs/tokenizer tokenizer.pt
    """

    checkpoint: Place  # a run's folder, or one of its checkpoints/STEP
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]  # to write
    format: Literal["pt", "safetensors"] = "pt"  # pt: trained weights and moving average; safetensors: the moving average

    def run(self) -> None:
        from dar_jax.release.checkpoints import export_checkpoint

        show("\n".join(export_checkpoint(self.checkpoint, self.file, self.format)))
