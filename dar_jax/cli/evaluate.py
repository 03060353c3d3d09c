"""Commands that measure."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from dar_jax.cli.options import (
    Conditioned,
    Decoding,
    Floats,
    Inception,
    Ints,
    Mesh,
    Number,
    OfRun,
    OnData,
    Optional,
    Place,
    Scales,
    Settings,
    Words,
    check_writable,
    first,
    make_mesh,
    write_json,
)
from dar_jax.config import Batch, DenoisingSteps, Seed, Share, Solvers, Steps, Temperature, Tokens, TopK
from dar_jax.console import show
from dar_jax.errors import InputError


@dataclass(frozen=True)
class Evaluate:
    """Measure images against a reference: FID, sFID, inception score, precision and recall.

    The definitions are those of the ADM suite. Images are an NPZ file with `arr_0` (uint8, N x height x width x channels), a
    folder of images of one size, or a data source SOURCE/SPLIT[/SIZE][:PLACE], whose images are cropped to SIZE pixels. The
    reference is such a one too, or an NPZ file of statistics: ADM's VIRTUAL_*.npz, pytorch-fid's, or one of --save-statistics.
    Says which reference, how many images and which weights were used. Without a reference, --save-statistics only makes one.

    Example: dar-jax evaluate cifar10/test:cifar-10-batches-bin --save-statistics cifar10_test.npz

    Example: dar-jax evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json report.json

    Example: dar-jax evaluate cifar10/train:cifar-10-batches-bin --reference cifar10/test:cifar-10-batches-bin
    """

    samples: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAMPLES")]  # NPZ file, folder or data source
    reference: Optional[str] = None  # NPZ file, folder or data source
    json: Optional[str] = None  # also write the report to this file
    save_statistics: Optional[str] = None  # keep the statistics of the samples in this NPZ file, as a later reference
    weights: Optional[str] = None  # file of the Inception network; else looked for as docs/weights.md says
    resize: Literal["tensorflow1", "half_pixel"] = "tensorflow1"  # how images are resized to 299 x 299; ADM: tensorflow1
    num_images: Optional[Number] = None  # only so many samples, drawn at random with a fixed seed
    batch_size: Batch = 64  # images at a time
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else all of them along data

    def run(self) -> None:
        from dar_jax.evaluation.extractor import open_extractor
        from dar_jax.evaluation.fid import evaluate, open_reference, table
        from dar_jax.evaluation.statistics import save

        if self.reference is None and (self.save_statistics is None or self.json is not None):
            raise InputError("give a --reference to compare with, or --save-statistics alone, to make one")
        check_writable(self.json, self.save_statistics)
        extractor = open_extractor(self.weights, self.resize, self.batch_size, make_mesh(self.mesh))
        if self.reference is None:
            statistics = open_reference(self.samples, extractor, self.num_images)
            if first():
                save(self.save_statistics, statistics)
            return show(f"{statistics.source}: statistics in {self.save_statistics}")
        keep_as = self.save_statistics if first() else None
        report = evaluate(self.samples, self.reference, extractor, self.num_images, keep_as=keep_as)
        write_json(self.json, report)
        show(table(report))


@dataclass(frozen=True, kw_only=True)
class EvaluateTokenizer(Inception, Decoding, OnData[Settings]):
    """How well does a tokenizer keep images? PSNR, SSIM, LPIPS, rFID and codebook usage on held-out images.

    The defaults of `--data.*` are those of the tokenizer's own training, but for the split: test for digits and CIFAR-10, val
    for folders, validation for TFDS. A metric whose weights are missing is left out, with a line that says so.

    Example: dar-jax evaluate-tokenizer runs/tokenizer --json report.json
    """

    json: Optional[str] = None  # also write the report to this file
    num_images: Optional[Number] = None  # only so many, from the first on
    lpips: Optional[str] = None  # file or folder with the weights of LPIPS; else looked for as docs/weights.md says

    def run(self) -> None:
        from dar_jax.evaluation.tokenizer import evaluate_tokenizer, open_lpips, table
        from dar_jax.inference.tokenize import check_images
        from dar_jax.inference.trained import unless_missing
        from dar_jax.training.checkpoint import inspect

        check_writable(self.json)
        info, mesh = inspect(self.checkpoint), make_mesh(self.mesh)
        if self.data.source == "codes":
            raise InputError("data.source is codes, give the images that they were made of")
        check_images(info.tokenizer.config.model, self.data)
        sampling, source = self.sampling(info), self.open_source()
        extractor = unless_missing(lambda: self.open_extractor(mesh), self.inception)
        lpips = unless_missing(lambda: open_lpips(self.lpips), self.lpips)
        trained = self.load_tokenizer(mesh)
        report = evaluate_tokenizer(
            trained, source, self.data, extractor, lpips, sampling, self.seed, self.batch_size, self.num_images
        )
        write_json(self.json, report)
        show(table(report))


@dataclass(frozen=True, kw_only=True)
class EvaluateAr(OnData[Settings]):
    """How well does a transformer predict the codes of real images?

    Prints bits per token and the share of tokens that it finds most probable, given the class and without it, and writes
    report.json and positions.png, the bits at every position. The defaults of `--data.*` are those of the run's own training,
    but for the split: test for digits and CIFAR-10, val for folders, validation for TFDS.

    Example: dar-jax evaluate-ar runs/ar --out evaluation
    """

    checkpoint: Place  # a transformer's run folder, or one of its checkpoints/STEP; comes first
    out: str  # the folder to write to
    num_images: Optional[Number] = None  # only so many, from the first on

    @staticmethod
    def run_of(checkpoint: str) -> Any:
        """The transformer's."""
        from dar_jax.inference.trained import inspect_transformer

        return inspect_transformer(checkpoint)

    def run(self) -> None:
        from dar_jax.data.codes import check_made_by
        from dar_jax.evaluation.likelihood import describe, evaluate_transformer, write_report
        from dar_jax.inference.tokenize import check_images
        from dar_jax.inference.trained import inspect_transformer

        if self.data.source != "codes":
            check_images(inspect_transformer(self.checkpoint).tokenizer.config.model, self.data)
        source = self.open_source()
        check_writable(self.out, folder=True)
        trained = self.load_sampler()
        check_made_by(source, trained.params["tokenizer"], self.checkpoint)
        report = evaluate_transformer(trained, source, self.data, self.batch_size, self.num_images)
        if first():
            written = write_report(report, self.out, trained.config.num_groups, trained.config.codebook_size)
            show("\n".join([describe(report), *map(str, written)]))


@dataclass(frozen=True, kw_only=True)
class Sweep(Inception, Conditioned):
    """Try sampling settings: FID and company of samples for every combination, and for previews.

    The samples are of all classes in turn, with seeds from --seed on. Writes report.json and fid.png. How tokens are drawn is
    compiled once for all settings, and previews come from the same samples.

    Example: dar-jax sweep runs/ar --reference images.npz --guidance 1:1,1.1:4,1.1:8 --groups 2,4,6,8 --out sweep

    Example: dar-jax sweep runs/ar --reference images.npz --num-denoising-steps 2,4,8 --steps late3,late6 --out sweep
    """

    reference: str  # NPZ file, folder or data source, as of `dar-jax evaluate`
    out: str  # the folder to write to
    num: Number = 1000  # samples for each setting
    guidance: OfRun[Scales] = None  # scales of the first and the last token, such as 1:1,1.1:4
    temperature: OfRun[Floats[Temperature]] = None  # such as 0.9,1
    top_k: OfRun[Ints[TopK]] = None  # such as 0,600
    top_p: OfRun[Floats[Share]] = None  # such as 0.9,1
    solver: OfRun[Words[Solvers]] = None  # of the denoising steps: adams2,euler
    steps: OfRun[Words[Steps]] = None  # when they are, such as uniform,late6; beside --num-denoising-steps, not times it
    num_denoising_steps: OfRun[Ints[DenoisingSteps]] = None  # how many uniform steps, such as 2,4,8
    groups: Optional[Ints[Tokens]] = None  # measure previews after so many groups, such as 2,4,6,8
    seed: Seed = 0  # of the first sample

    def run(self) -> None:
        from dar_jax.evaluation.sweep import sweep, table, variants, write_report
        from dar_jax.inference.trained import inspect_transformer

        info, mesh = inspect_transformer(self.checkpoint), make_mesh(self.mesh)
        names = ("guidance", "temperature", "top_k", "top_p", "solver")
        axes = [[{name: value} for value in getattr(self, name) or ()] for name in names]
        counts = [{"steps": "uniform", "num_denoising_steps": count} for count in self.num_denoising_steps or ()]
        times = [{"steps": steps, "num_denoising_steps": None} for steps in self.steps or ()]
        configs = variants(info.config.sampling, *axes, counts + times)
        given = self.read_given()
        check_writable(self.out, folder=True)
        extractor = self.open_extractor(mesh)
        trained = self.load_sampler(mesh)
        rows = sweep(trained, extractor, self.reference, configs, self.groups, self.num, self.batch_size, self.seed, given)
        about = {
            "checkpoint": str(info.path),
            "reference": self.reference,
            "samples": self.num,
            "seed": self.seed,
            "condition_file": self.condition_file,
            "weights": f"{extractor.network.weights} (SHA-256 {extractor.network.sha256})",
            "resize": self.resize,
        }
        if first():
            show("\n".join([table(rows), *map(str, write_report(rows, self.out, about))]))
