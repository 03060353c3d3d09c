"""The command that packs a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dar_jax.cli.options import Optional, first
from dar_jax.config import Batch, Pixels
from dar_jax.console import show
from dar_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Pack a data set of images into few large files, for training from a disk or a bucket.

    The source is a folder of images, of webdataset's tars or of Parquet files as the Hub has them, a zip archive such as
    Kaggle's, one .tar or .parquet, or tfds:NAME, a data set of TFDS in its ArrayRecord format. Images keep their bytes; each is
    decoded once, and those that cannot be read are named and left out. An interrupted run goes on where it stopped. With
    several hosts, each writes its share into the same folder. Train on it with `--data.source packed --data.path OUT`.

    Example: dar-jax pack imagenet --out packed/train
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]  # a folder, an archive, or tfds:NAME
    out: str  # the folder to write to, perhaps gs://BUCKET/...
    split: str = "train"
    labels: Optional[str] = None  # file of lines "IMAGE CLASS", or CSV, for a split without class folders
    data_dir: Optional[str] = None  # of TFDS, where it has its data sets
    min_side: Optional[Pixels] = None  # scale larger images to a smaller side of so many pixels: smaller JPEGs of quality 95
    shard_size: Batch = 4096  # images per file

    def run(self) -> None:
        import jax

        jax.config.update("jax_platforms", "cpu")  # no device is needed, and others may be using those that there are

        from dar_jax.data import packed
        from dar_jax.data.shards import open_shards
        from dar_jax.files import check_writable
        from dar_jax.inference import identity
        from dar_jax.training.checkpoint import require_shared

        source = self.open_source()
        if first():
            show(f"{source.description}; stored as {packed.encoding(self.min_side)}")
        check_writable(self.out)
        require_shared(self.out)
        about = {"source": identity.of_source(source), "split": self.split, "shard_size": self.shard_size}
        identity.claim(self.out, about | {"encoding": packed.encoding(self.min_side)}, "shard-*")
        info = packed.pack(source, self.out, self.split, self.shard_size, self.min_side)
        if first():
            stored = len(open_shards(self.out, packed.PackedInfo))
            show(
                f"{self.out}: {stored} images of {len(info.class_names)} classes in {info.shards} files",
            )
            if stored < info.images:
                show(f"left out: {info.images - stored} of {info.images}, which could not be read")

    def open_source(self):
        """The data set to pack, its images as they are encoded."""
        from dar_jax.data.archives import ParquetSource, TarSource, ZipSource, archive_files
        from dar_jax.data.sources import FolderSource, TfdsSource

        side = self.min_side or 1
        kind, _, name = self.source.partition(":")
        if kind == "tfds":
            return TfdsSource(name, self.data_dir, self.split, 3, side)
        path = Path(self.source)
        if not path.exists():
            raise InputError(f"{path} does not exist")
        if path.is_file() and path.suffix == ".zip":
            return ZipSource(path, self.split, 3, side, self.labels)
        for suffix, archives in ((".parquet", ParquetSource), (".tar", TarSource)):
            if archive_files(path, self.split, suffix):
                return archives(path, self.split, 3, side)
        if not path.is_dir():
            raise InputError(f"{path} is no folder and no archive (.zip, .tar, .parquet)")
        return FolderSource(path, self.split, 3, side, self.labels)
