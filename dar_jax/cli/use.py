"""Commands that use a checkpoint."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dar_jax.cli.options import (
    Conditioned,
    Decoding,
    FirstStep,
    Flag,
    Ints,
    Length,
    Mesh,
    Number,
    OfRun,
    OnData,
    Optional,
    Particles,
    Place,
    Sampling,
    Settings,
    Token,
    Words,
    check_writable,
    make_mesh,
)
from dar_jax.config import Batch, DataConfig, MeshConfig, Pixels, Seed
from dar_jax.console import show
from dar_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sample(Sampling, Conditioned):
    """Sample images from a trained transformer.

    One label goes with many seeds, one seed with many labels, and equally many of both pair up one by one. The same label, seed
    and settings always give the same image. Writes NAME_label3_seed11.png for each sample and grid.png.

    Example: dar-jax sample runs/digits --labels 3,7 --seeds 11,12 --out samples

    Example of layout control, the first tokens of an image under another label:

    dar-jax sample runs/digits --labels 3 --seeds 1,2 --prefix-image seven.png --prefix-length 8 --out samples
    """

    labels: Words[str]  # classes, by name or number
    seeds: Ints[Seed]  # integers from 0 on
    out: str  # the folder to write to
    previews: Flag = False  # also write every sample after every group as it ends, and groups.png
    animate: Flag = False  # also write denoising.webp, the grid after every group
    prefix_image: Optional[str] = None  # take the first tokens from this image instead of drawing them
    prefix_tokens: Optional[Ints[Token]] = None  # or take these
    prefix_length: Optional[Length] = None  # so many tokens of the prefix image (or of the prefix tokens)
    start_image: Optional[str] = None  # start from this image with noise instead of from noise alone
    start_step: Optional[FirstStep] = None  # the denoising step to start from it at, 1 or more
    condition_image: Optional[str] = None  # an image for the condition of the run's experiment, a map of control for instance
    resolution: OfRun[Pixels] = None  # pixels along a side while denoising, if more than trained with
    output_resolution: OfRun[Pixels] = None  # resize what is denoised down to this
    decoder_mesh: Optional[Mesh] = None  # as many for denoising alone, while --mesh, the others, predict the next group
    batch_size: Batch = 32  # images at a time

    def run(self) -> None:
        from dar_jax.inference.samples import make_request, write_samples
        from dar_jax.inference.trained import inspect_transformer

        info = inspect_transformer(self.checkpoint)
        request = make_request(
            info,
            self.labels,
            self.seeds,
            self.sampling(info.config.sampling),
            prefix_image=self.prefix_image,
            prefix_tokens=self.prefix_tokens,
            prefix_length=self.prefix_length,
            start_image=self.start_image,
            resolution=self.resolution,
            output_resolution=self.output_resolution,
            condition_image=self.condition_image,
            condition_file=self.condition_file,
            **({"method": self.replaced.method, "condition": self.replaced.condition} if self.replaced else {}),
        )
        check_writable(self.out, folder=True)
        trained = self.load_sampler(*self.meshes(info.config.mesh))
        written = write_samples(trained, request, self.out, self.batch_size, self.previews, self.animate)
        show("\n".join(map(str, written)))

    def meshes(self, of_run: MeshConfig) -> tuple[Any, Any]:
        """The mesh of the transformer, and that of the last devices where denoising has a mesh of its own."""
        import jax

        from dar_jax.inference.trained import run_mesh

        if self.decoder_mesh is None:
            return make_mesh(self.mesh), None
        count, devices = math.prod(self.decoder_mesh), jax.devices()
        if min(self.decoder_mesh) < 1 or count >= len(devices) or jax.process_count() > 1:
            raise InputError(
                f"a decoder mesh takes some of the devices of one host, not {' x '.join(map(str, self.decoder_mesh))} of "
                f"{len(devices)} on {jax.process_count()}"
            )
        mesh = make_mesh(self.mesh, devices[:-count]) if self.mesh else run_mesh(of_run, devices[:-count])
        return mesh, make_mesh(self.decoder_mesh, devices[-count:])


@dataclass(frozen=True, kw_only=True)
class Edit(Sampling):
    """Draw a part of an image anew, or enlarge an image.

    The white part of the mask, an image of the same size, is drawn anew; the rest stays as it is, pixel by pixel. Of many
    samples (--particles) those stay, after every group of tokens, whose previews agree best with what is known. Writes
    NAME_label3_seed11.png for each seed, and grid.png. Without a label, the image decides which class it is.

    Example: dar-jax edit runs/digits --image seven.png --mask mask.png --label 3 --seeds 1,2,3 --out edited

    Example of an enlargement: dar-jax edit runs/digits --image small.png --enlarge 4 --out edited
    """

    image: str  # the image; its middle square is scaled to the model's size
    out: str  # the folder to write to
    mask: Optional[str] = None  # an image of the same size: white is drawn anew, black stays
    enlarge: Optional[Pixels] = None  # in place of a mask: scale the image to so many pixels, then enlarge it
    label: Optional[str] = None  # the class, by name or number
    seeds: Ints[Seed] = (0,)  # integers from 0 on, each for a result of its own
    particles: Ints[Particles] = (16,)  # samples that compete for each result, one number or one for each group of tokens
    prefix_length: Length = 0  # keep so many first tokens of the image, and with them its layout
    start_step: Optional[FirstStep] = None  # start from the old content with noise, at this denoising step, 1 or more
    previews: Flag = False  # also write groups.png, every result after every group
    batch_size: Batch = 64  # particles at a time

    def run(self) -> None:
        from dar_jax.inference.edit import make_edit, write_edits
        from dar_jax.inference.trained import inspect_transformer
        from dar_jax.sampling.settings import Method

        info = inspect_transformer(self.checkpoint)
        request = make_edit(
            info,
            self.image,
            self.mask,
            self.enlarge,
            self.label,
            self.seeds,
            self.sampling(info.config.sampling),
            self.particles,
            self.prefix_length,
            self.replaced.method if self.replaced else Method(),
        )
        check_writable(self.out, folder=True)
        written = write_edits(self.load_sampler(), request, self.out, self.batch_size, self.previews)
        show("\n".join(map(str, written)))


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling, Conditioned):
    """Draw many samples into one NPZ file, for `dar-jax evaluate` and the ADM suite.

    The file has the images in `arr_0` (uint8, N x height x width x channels) and their classes in `arr_1`. Sample i has the
    seed --seed + i. An interrupted run goes on where it stopped, to the same file.

    Example: dar-jax generate runs/ar --num 50000 --out samples.npz
    """

    out: str  # the file to write
    num: Number = 50_000  # samples
    labels: Literal["balanced", "uniform"] = "balanced"  # all classes in turn, or drawn at random
    seed: Seed = 0  # of the first sample, and of the classes drawn

    def run(self) -> None:
        from dar_jax.files import check_file_writable
        from dar_jax.inference.bulk import generate_npz
        from dar_jax.inference.trained import inspect_transformer

        info = inspect_transformer(self.checkpoint)
        sampling = self.sampling(info.config.sampling)
        self.check_sampling(sampling, info.tokenizer.config.model)
        given = self.read_given()
        check_file_writable(self.out)
        trained = self.load_sampler()
        show(generate_npz(trained, self.out, self.num, self.labels, sampling, self.batch_size, self.seed, given))


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Decoding):
    """Encode and decode the images of a folder: how good is the tokenizer?

    Writes the decoded images, grid.png with originals beside them, and report.json with the PSNR of each; prints the mean.

    Example: dar-jax reconstruct runs/tokenizer --images photos --out decoded
    """

    images: str  # a folder of images (png, jpg, webp), sub-folders included
    out: str  # the folder to write to
    split: str = "train"  # where the folder has sub-folders train, val or test: which of them

    def run(self) -> None:
        from dar_jax.inference.reconstruct import open_images, reconstruct_folder
        from dar_jax.training.checkpoint import inspect

        info = inspect(self.checkpoint)
        sampling = self.sampling(info)
        source = open_images(self.images, self.split, info.tokenizer.config.model)
        check_writable(self.out, folder=True)
        report = reconstruct_folder(self.load_tokenizer(), source, self.out, sampling, self.seed, self.batch_size)
        usage = report["codebook_usage"]
        show(
            f"PSNR {report['psnr']:.2f} dB over {report['images']} images ({report['unreadable']} unreadable)"
            + (f", codebook usage {usage:.1%}" if usage is not None else "")
            + f"\n{Path(self.out) / 'grid.png'}\n{Path(self.out) / 'report.json'}"
        )


@dataclass(frozen=True, kw_only=True)
class Tokenize(OnData[Settings]):
    """Store the codes of a data set, for training a transformer on them.

    `--data.*` say which images and which crops. The defaults are those of the tokenizer's own training, with ten crops
    in place of random ones: dar-jax tokenize CHECKPOINT --help. An interrupted run goes on where it stopped. Train on the
    result with `--data.source codes --data.path OUT`. With several hosts, each writes its share into the same folder.

    Example: dar-jax tokenize runs/tokenizer --data.path imagenet --out imagenet_codes
    """

    out: str  # the folder to write to, perhaps gs://BUCKET/...
    shard_size: Batch = 4096  # images per file
    mesh: Optional[Mesh] = None  # each host's devices along data, fsdp and tensor; else all of them along data
    batch_size: Batch = 64  # images, each with all its crops, at a time

    @classmethod
    def default_data(cls, checkpoint: str) -> DataConfig:
        """The data of the tokenizer's training, with ten crops in place of random ones."""
        data = dataclasses.replace(cls.run_of(checkpoint).config.data, held_out_split=None)
        return dataclasses.replace(data, crop="ten_crop", flip=False) if data.crop == "random" else data

    def run(self) -> None:
        import jax

        from dar_jax.files import check_writable
        from dar_jax.inference.tokenize import check_data, tokenize
        from dar_jax.training.checkpoint import inspect

        check_data(inspect(self.checkpoint).tokenizer.config.model, self.data)
        source = self.open_source()
        check_writable(self.out)
        trained = self.load_tokenizer(make_mesh(self.mesh, jax.local_devices()))
        info = tokenize(trained, source, self.data, self.out, self.batch_size, self.shard_size)
        show(f"{self.out}: {info.crops} x {info.tokens} codes for each of {info.images} images, in {info.shards} files")


@dataclass(frozen=True)
class Info:
    """Say what a checkpoint holds: networks and their sizes, steps, data and settings.

    Example: dar-jax info runs/digits
    """

    checkpoint: Place  # a run's folder, or one of its checkpoints/STEP

    def run(self) -> None:
        from dar_jax.inference.info import describe

        show(describe(self.checkpoint))
