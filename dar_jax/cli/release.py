"""Commands for the files of the authors' release."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dar_jax.cli.options import Optional, Place
from dar_jax.config import Heads
from dar_jax.console import show
from dar_jax.errors import InputError


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
    """Write a checkpoint for others: a folder to publish, or a file of the authors' PyTorch release.

    With --format safetensors, OUT is a new folder with the moving average of the weights, a transformer's tokenizer and a
    model card. It is a checkpoint for every command; after `hf upload OWNER/NAME OUT`, so is hf://OWNER/NAME.

    Else, and where OUT ends in .safetensors, it is a file in the names of the release. The tokenizer of a transformer is then
    written apart: it is in its folder's sub-folder `tokenizer`.

    Example: dar-jax export runs/digits published --format safetensors --licence mit

    Example: dar-jax export runs/tokenizer tokenizer.pt
    """

    checkpoint: Place  # a run's folder, or one of its checkpoints/STEP
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]  # the file or folder to write
    format: Literal["pt", "safetensors"] = "pt"  # pt: trained weights and moving average; safetensors: the moving average
    licence: Optional[str] = None  # of the weights, for the model card, by the Hub's name: mit, cc-by-4.0 ...

    def run(self) -> None:
        from dar_jax.release.checkpoints import export_checkpoint, export_folder

        if self.format == "safetensors" and not self.out.endswith(".safetensors"):
            lines = export_folder(self.checkpoint, self.out, self.licence)
        elif self.licence is not None:
            raise InputError("--licence is for the model card of a folder: --format safetensors, and OUT without an ending")
        else:
            lines = export_checkpoint(self.checkpoint, self.out, self.format)
        show("\n".join(lines))
