"""The command `dar-jax`. Every sub-command is a dataclass of its options with a short `run` over the library.

Exit codes: 0 done, or training stopped by SIGTERM, SIGHUP or a closed pipe with a checkpoint; 1 training diverged; 2 something
the user gave is wrong or a disk is full, in one line; 3 (or 134, from JAX itself) another host is gone; 130 interrupted; 141
nobody reads the output.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import io
import logging
import math
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dar_jax import __version__
from dar_jax.config import (
    Batch,
    CfgInterval,
    DataConfig,
    DenoisingSteps,
    Devices,
    Guidance,
    Heads,
    MeshConfig,
    Pixels,
    Range,
    SamplingConfig,
    Seed,
    Share,
    Temperature,
    Tokens,
    TopK,
    checked,
)
from dar_jax.console import PrintableMessages, escape_unknown_characters, printable, show
from dar_jax.errors import InputError

# Whatever imports JAX is imported where it is needed, so that --help and mistyped commands answer at once.


def _list_of(kind: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec:
    """One argument that holds values separated by commas."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda arguments: tuple(kind(item.strip()) for item in arguments[0].split(",")),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


T = TypeVar("T")
Words = Annotated[tuple[str, ...], _list_of(str, "A,B")]
Ints = Annotated[tuple[T, ...], _list_of(int, "N,N")]
Floats = Annotated[tuple[T, ...], _list_of(float, "A[,B]")]
Number = Annotated[int, Range(1, 10**7)]  # of images or samples
Token = Annotated[int, Range(0, 2**24 - 1)]
Length = Annotated[int, Range(0, 16384)]  # of a prefix
FirstStep = Annotated[int, Range(1, 999)]
Tries = Annotated[int, Range(0, 100)]
Figure = Annotated[float, Range(1e-3, 1e9)]  # of a chip
Mesh = Ints[Devices]
Place = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
OfRun = Annotated[T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(default: of the checkpoint's run)")]
Optional = Annotated[T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(optional)")]
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Listed:
    """Stands for settings that depend on the file or checkpoint, as long as none is given."""


@dataclass(frozen=True)
class Quickstart:
    """Train both stages on handwritten digits, with pictures and a report, in minutes on two CPU cores.

    The digits come with scikit-learn, nothing is downloaded. Writes reconstructions.png, samples.png, groups.png,
    denoising.webp and report.json into the folder, which `sample`, `reconstruct` and `info` then take as a checkpoint. If it is
    interrupted, the same command goes on.

    Example: dar-jax quickstart --workdir runs/digits
    """

    workdir: str  # the folder to make
    fast: Flag = False  # only a few steps, to see that everything works; the pictures will not show digits

    def run(self) -> None:
        from dar_jax.files import check_writable
        from dar_jax.quickstart import quickstart, summary

        check_writable(self.workdir)
        report = quickstart(self.workdir, self.fast)
        show(f"\n{summary(report)}\n\nThe pictures and report.json are in {self.workdir}")


@dataclass(frozen=True)
class Train(Generic[Settings]):
    """Run an experiment file: train a tokenizer or a transformer.

    Every setting of the experiment can be overridden, such as `--train.steps 100` or `--optimizer.learning-rate 3e-4`. To see
    them all with the experiment's values: dar-jax train EXPERIMENT --help. A folder that holds a run already is only taken with
    --resume. Ctrl-C and SIGTERM stop after a checkpoint, a second Ctrl-C at once. For many hosts see dar-jax --help.

    Example: dar-jax train experiments/digits_tokenizer.py --workdir runs/tokenizer --train.steps 500
    """

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]  # its file; comes first
    workdir: str  # the run's folder, for checkpoints and logs; perhaps gs://BUCKET/...
    config: Annotated[Settings, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    resume: Flag = False  # go on from the last checkpoint in the folder, or begin if there is none
    init_from: Optional[str] = None  # begin with these weights as far as they fit: a checkpoint, or a file of the release

    @classmethod
    def with_defaults(cls, experiment: str) -> tuple[Any, "Train"]:
        """The type to parse and the values of what is not given."""
        from dar_jax.training.experiment import load_experiment

        config = load_experiment(experiment).config
        return cls[type(config)], cls(experiment, tyro.MISSING, config)

    def run(self) -> int:
        from dar_jax.evaluation.logged import Evaluation, log_pictures
        from dar_jax.release.checkpoints import open_start
        from dar_jax.training.experiment import load_experiment
        from dar_jax.training.loop import TrainingDiverged, train

        experiment = load_experiment(self.experiment)
        if not isinstance(self.config, Listed):
            experiment = experiment.with_config(self.config)
        start = None
        if self.init_from is not None:
            start = functools.partial(open_start, self.init_from, experiment.config)
        try:
            summary = train(experiment, self.workdir, self.resume, log_pictures, start, Evaluation())
        except TrainingDiverged as error:
            return _fail(error, 1)
        return 130 if summary.stopped_by == signal.SIGINT else 0


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How samples are drawn; what is not given is as the checkpoint's run has it."""

    guidance: OfRun[Floats[Guidance]] = None  # classifier-free guidance scale, of the first and the last token; 1: none
    cfg_interval: OfRun[CfgInterval] = None  # N >= 0: tokens with an index above N + 1 are not guided
    temperature: OfRun[Temperature] = None  # 0: always the most probable token
    top_k: OfRun[TopK] = None  # draw from the K most probable tokens only; 0: off
    top_p: OfRun[Share] = None  # draw from the most probable tokens that hold this share only; 1: off
    solver: OfRun[Literal["adams2", "euler"]] = None  # of the denoising steps
    num_denoising_steps: OfRun[DenoisingSteps] = None  # steps from noise to image
    groups: OfRun[Tokens] = None  # stop after so many groups of tokens, with their preview

    def sampling(self, of_run: SamplingConfig, **others: Any) -> SamplingConfig:
        """The run's settings with what was given, here or by `others`."""
        names = ("cfg_interval", "temperature", "top_k", "top_p", "solver", "num_denoising_steps")
        given = {name: getattr(self, name) for name in names}
        given |= {"guidance": _two(self.guidance), "num_groups": self.groups}
        return dataclasses.replace(of_run, **_given(given | others))


@dataclass(frozen=True)
class Sample(SamplingOptions):
    """Sample images from a trained transformer.

    One label goes with many seeds, one seed with many labels, and equally many of both pair up one by one. The same label, seed
    and settings always give the same image. Writes NAME_label3_seed11.png for each sample and grid.png.

    Example: dar-jax sample runs/digits --labels 3,7 --seeds 11,12 --out samples

    Example of layout control, the first tokens of an image under another label:

    dar-jax sample runs/digits --labels 3 --seeds 1,2 --prefix-image seven.png --prefix-length 8 --out samples
    """

    checkpoint: Place  # a transformer's run folder, or one of its checkpoints/STEP
    labels: Words  # classes, by name or number
    seeds: Ints[Seed]  # integers from 0 on
    out: str  # the folder to write to
    previews: Flag = False  # also write every sample after every group as it ends, and groups.png
    animate: Flag = False  # also write denoising.webp, the grid after every group
    prefix_image: Optional[str] = None  # take the first tokens from this image instead of drawing them
    prefix_tokens: Optional[Ints[Token]] = None  # or take these
    prefix_length: Optional[Length] = None  # so many tokens of the prefix image (or of the prefix tokens)
    start_image: Optional[str] = None  # start from this image with noise instead of from noise alone
    start_step: Optional[FirstStep] = None  # the denoising step to start from it at, 1 or more
    resolution: OfRun[Pixels] = None  # pixels along a side while denoising, if more than trained with
    output_resolution: OfRun[Pixels] = None  # resize what is denoised down to this
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model or the guidance
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else along tensor as in the run, the rest along data
    decoder_mesh: Optional[Mesh] = None  # as many for denoising alone, while --mesh, the others, predict the next group
    batch_size: Batch = 32  # samples at a time

    def run(self) -> None:
        from dar_jax.evaluation.generate import make_request, write_samples
        from dar_jax.evaluation.loading import find_transformer, load_sampler
        from dar_jax.files import check_writable

        found, experiment = find_transformer(self.checkpoint), _experiment(self.experiment)
        request = make_request(
            found,
            self.labels,
            self.seeds,
            self.sampling(found.transformer.config.sampling, start_step=self.start_step),
            prefix_image=self.prefix_image,
            prefix_tokens=self.prefix_tokens,
            prefix_length=self.prefix_length,
            start_image=self.start_image,
            resolution=self.resolution,
            output_resolution=self.output_resolution,
        )
        check_writable(self.out)
        meshes = _two_meshes(self.mesh, self.decoder_mesh, found.transformer.config.mesh)
        trained = load_sampler(self.checkpoint, experiment, self.weights, *meshes)
        written = write_samples(trained, request, self.out, self.batch_size, self.previews, self.animate)
        show("\n".join(map(str, written)))


@dataclass(frozen=True)
class Generate(SamplingOptions):
    """Draw many samples into one NPZ file, for `dar-jax evaluate` and the ADM suite.

    The file has the images in `arr_0` (uint8, N x height x width x channels) and their classes in `arr_1`. Sample i has the
    seed --seed + i. An interrupted run goes on where it stopped, to the same file.

    Example: dar-jax generate runs/ar --num 50000 --out samples.npz
    """

    checkpoint: Place  # a transformer's run folder, or one of its checkpoints/STEP
    out: str  # the file to write
    num: Number = 50_000  # samples
    labels: Literal["balanced", "uniform"] = "balanced"  # all classes in turn, or drawn at random
    seed: Seed = 0  # of the first sample, and of the classes drawn
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model or the guidance
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else along tensor as in the run, the rest along data
    batch_size: Batch = 64  # samples at a time

    def run(self) -> None:
        from dar_jax.evaluation.bulk import generate_npz
        from dar_jax.evaluation.loading import find_transformer, load_sampler
        from dar_jax.files import check_file_writable
        from dar_jax.sampling.sampler import make_settings

        found, experiment = find_transformer(self.checkpoint), _experiment(self.experiment)
        sampling = self.sampling(found.transformer.config.sampling)
        make_settings(sampling, found.tokenizer.config.model)
        check_file_writable(self.out)
        trained = load_sampler(self.checkpoint, experiment, self.weights, _mesh(self.mesh))
        show(generate_npz(trained, self.out, self.num, self.labels, sampling, self.batch_size, self.seed))


@dataclass(frozen=True)
class Reconstruct:
    """Encode and decode the images of a folder: how good is the tokenizer?

    Writes the decoded images, grid.png with originals beside them, and report.json with the PSNR of each; prints the mean.

    Example: dar-jax reconstruct runs/tokenizer --images photos --out decoded
    """

    checkpoint: Place  # a run's folder, of a tokenizer or a transformer, or one of its checkpoints/STEP
    images: str  # a folder of images (png, jpg, webp), sub-folders included
    out: str  # the folder to write to
    split: str = "train"  # where the folder has sub-folders train, val or test: which of them
    solver: OfRun[Literal["adams2", "euler"]] = None  # of the denoising steps
    num_denoising_steps: OfRun[DenoisingSteps] = None  # steps from noise to image
    seed: Seed = 0  # image i is denoised from the noise of seed + i
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else along tensor as in the run, the rest along data
    batch_size: Batch = 64  # images at a time

    def run(self) -> None:
        from dar_jax.evaluation.loading import find, load_tokenizer
        from dar_jax.evaluation.reconstruct import open_images, reconstruct_folder
        from dar_jax.files import check_writable
        from dar_jax.sampling.sampler import make_settings

        found, experiment = find(self.checkpoint), _experiment(self.experiment)
        config = found.tokenizer.config.model
        of_run = found.transformer.config.sampling if found.transformer else SamplingConfig()
        given = {"solver": self.solver, "num_denoising_steps": self.num_denoising_steps}
        sampling = SamplingConfig(solver=of_run.solver, num_denoising_steps=of_run.num_denoising_steps)
        sampling = dataclasses.replace(sampling, **_given(given))
        make_settings(sampling, config)
        source = open_images(self.images, self.split, config)
        check_writable(self.out)
        trained = load_tokenizer(self.checkpoint, experiment, self.weights, _mesh(self.mesh))
        report = reconstruct_folder(trained, source, self.out, sampling, self.seed, self.batch_size)
        usage = report["codebook_usage"]
        show(
            f"PSNR {report['psnr']:.2f} dB over {report['images']} images ({report['unreadable']} unreadable)"
            + (f", codebook usage {usage:.1%}" if usage is not None else "")
            + f"\n{Path(self.out) / 'grid.png'}\n{Path(self.out) / 'report.json'}"
        )


@dataclass(frozen=True)
class Tokenize(Generic[Settings]):
    """Store the codes of a data set, for training a transformer on them.

    Which images and which crops is said by `--data.*`. The defaults are those of the tokenizer's own training, with ten crops
    in place of random ones: dar-jax tokenize CHECKPOINT --help. An interrupted run goes on where it stopped. Train on the
    result with `--data.source codes --data.path OUT`. Of several hosts each writes its share into the same folder.

    Example: dar-jax tokenize runs/tokenizer --data.path imagenet --out imagenet_codes
    """

    checkpoint: Place  # a run's folder, of a tokenizer or a transformer, or one of its checkpoints/STEP; comes first
    out: str  # the folder to write to, perhaps gs://BUCKET/...
    data: Annotated[Settings, tyro.conf.FlagConversionOff]
    shard_size: Batch = 4096  # images per file
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model or the source
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # each host's devices along data, fsdp and tensor; else all of them along data
    batch_size: Batch = 64  # images, each with all its crops, at a time

    @classmethod
    def with_defaults(cls, checkpoint: str) -> tuple[Any, "Tokenize"]:
        """The type to parse and the values of what is not given."""
        from dar_jax.evaluation.loading import find

        data = find(checkpoint).tokenizer.config.data
        if data.crop == "random":
            data = dataclasses.replace(data, crop="ten_crop", flip=False)
        return cls[DataConfig], cls(checkpoint, tyro.MISSING, data)

    def run(self) -> None:
        import jax

        from dar_jax.data.sources import open_source
        from dar_jax.evaluation.loading import find, load_tokenizer
        from dar_jax.evaluation.tokenize import check_data, tokenize
        from dar_jax.files import check_writable

        experiment, model = _experiment(self.experiment), find(self.checkpoint).tokenizer.config.model
        check_data(model, self.data)
        source = ((experiment and experiment.source) or open_source)(self.data)
        check_writable(self.out)
        trained = load_tokenizer(self.checkpoint, experiment, self.weights, _mesh(self.mesh, jax.local_devices()))
        info = tokenize(trained, source, self.data, self.out, self.batch_size, self.shard_size)
        show(f"{self.out}: {info.crops} x {info.tokens} codes for each of {info.images} images, in {info.shards} files")


@dataclass(frozen=True)
class Evaluate:
    """Measure images against a reference: FID, sFID, inception score, precision and recall.

    The definitions are those of the ADM suite. Images are an NPZ file with `arr_0` (uint8, N x height x width x channels), a
    folder of images of one size, or a data source SOURCE/SPLIT[/SIZE][:PLACE], whose images are cropped to SIZE pixels. The
    reference is such a one too, or an NPZ file of statistics: ADM's VIRTUAL_*.npz, pytorch-fid's, or one of --save-statistics.
    Says which reference, how many images and which weights were used.

    Example: dar-jax evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --json report.json

    Example: dar-jax evaluate cifar10/train:cifar-10-batches-bin --reference cifar10/test:cifar-10-batches-bin
    """

    samples: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SAMPLES")]  # NPZ file, folder or data source
    reference: str  # NPZ file, folder or data source
    json: Optional[str] = None  # also write the report to this file
    save_statistics: Optional[str] = None  # also keep the statistics of the samples in this NPZ file, as a later reference
    weights: Optional[str] = None  # file of the Inception network; else looked for as the README says
    resize: Literal["tensorflow1", "half_pixel"] = "tensorflow1"  # how images come to 299 pixels; all of ADM's: tensorflow1
    num_images: Optional[Number] = None  # only so many samples, drawn at random with a fixed seed
    batch_size: Batch = 64  # images at a time
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else all of them along data

    def run(self) -> None:
        from dar_jax.evaluation.evaluate import evaluate, table
        from dar_jax.evaluation.statistics import open_extractor

        for path in (self.json, self.save_statistics):
            _check_file(path)
        extractor = open_extractor(self.weights, self.resize, self.batch_size, _mesh(self.mesh))
        keep_as = self.save_statistics if _first() else None
        report = evaluate(self.samples, self.reference, extractor, self.num_images, keep_as=keep_as)
        _write_json(self.json, report)
        show(table(report))


@dataclass(frozen=True)
class EvaluateTokenizer(Generic[Settings]):
    """How well does a tokenizer keep images? PSNR, SSIM, LPIPS, rFID and codebook usage on held-out images.

    The defaults of `--data.*` are those of the tokenizer's own training, but for the split: test for digits and CIFAR-10, val
    for folders, validation for TFDS. A metric whose weights are missing is left out, with a line that says so.

    Example: dar-jax evaluate-tokenizer runs/tokenizer --json report.json
    """

    checkpoint: Place  # a run's folder, of a tokenizer or a transformer, or one of its checkpoints/STEP; comes first
    data: Annotated[Settings, tyro.conf.FlagConversionOff]
    json: Optional[str] = None  # also write the report to this file
    num_images: Optional[Number] = None  # only so many, from the first on
    inception: Optional[str] = None  # file of the Inception network; else looked for as the README says
    lpips: Optional[str] = None  # file or folder with the weights of LPIPS; else looked for likewise
    resize: Literal["tensorflow1", "half_pixel"] = "tensorflow1"  # how images come to 299 pixels for rFID
    solver: OfRun[Literal["adams2", "euler"]] = None  # of the denoising steps
    num_denoising_steps: OfRun[DenoisingSteps] = None  # steps from noise to image
    seed: Seed = 0  # image i is denoised from the noise of seed + i
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model or the source
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else along tensor as in the run, the rest along data
    batch_size: Batch = 64  # images at a time

    @classmethod
    def with_defaults(cls, checkpoint: str) -> tuple[Any, "EvaluateTokenizer"]:
        """The type to parse and the values of what is not given."""
        from dar_jax.data.sources import held_out
        from dar_jax.evaluation.loading import find

        return cls[DataConfig], cls(checkpoint, held_out(find(checkpoint).tokenizer.config.data))

    def run(self) -> None:
        from dar_jax.data.sources import open_source
        from dar_jax.evaluation.evaluate_tokenizer import evaluate_tokenizer, open_lpips, table
        from dar_jax.evaluation.loading import find, load_tokenizer, unless_missing
        from dar_jax.evaluation.statistics import open_extractor
        from dar_jax.sampling.sampler import make_settings

        _check_file(self.json)
        experiment, model = _experiment(self.experiment), find(self.checkpoint).tokenizer.config.model
        given = {"solver": self.solver, "num_denoising_steps": self.num_denoising_steps}
        sampling = dataclasses.replace(SamplingConfig(), **_given(given))
        make_settings(sampling, model)
        source = ((experiment and experiment.source) or open_source)(self.data)
        mesh = _mesh(self.mesh)
        extractor = unless_missing(lambda: open_extractor(self.inception, self.resize, self.batch_size, mesh), self.inception)
        lpips = unless_missing(lambda: open_lpips(self.lpips), self.lpips)
        trained = load_tokenizer(self.checkpoint, experiment, self.weights, mesh)
        data = dataclasses.replace(self.data, image_size=model.image_size)
        report = evaluate_tokenizer(
            trained, source, data, extractor, lpips, sampling, self.seed, self.batch_size, self.num_images
        )
        _write_json(self.json, report)
        show(table(report))


@dataclass(frozen=True)
class EvaluateAr(Generic[Settings]):
    """How well does a transformer predict the codes of real images?

    Prints bits per token and the share of tokens that it finds most probable, given the class and without it, and writes
    report.json and positions.png, the bits at every position. The defaults of `--data.*` are those of the run's own training,
    but for the split: test for digits and CIFAR-10, val for folders, validation for TFDS.

    Example: dar-jax evaluate-ar runs/ar --out evaluation
    """

    checkpoint: Place  # a transformer's run folder, or one of its checkpoints/STEP; comes first
    out: str  # the folder to write to
    data: Annotated[Settings, tyro.conf.FlagConversionOff]
    num_images: Optional[Number] = None  # only so many, from the first on
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model or the source
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else along tensor as in the run, the rest along data
    batch_size: Batch = 64  # images at a time

    @classmethod
    def with_defaults(cls, checkpoint: str) -> tuple[Any, "EvaluateAr"]:
        """The type to parse and the values of what is not given."""
        from dar_jax.data.sources import held_out
        from dar_jax.evaluation.loading import find_transformer

        return cls[DataConfig], cls(checkpoint, tyro.MISSING, held_out(find_transformer(checkpoint).transformer.config.data))

    def run(self) -> None:
        from dar_jax.data.sources import open_source
        from dar_jax.evaluation.likelihood import describe, evaluate_transformer, write_report
        from dar_jax.evaluation.loading import load_sampler

        experiment = _experiment(self.experiment)
        source = ((experiment and experiment.source) or open_source)(self.data)
        _check_folder(self.out)
        trained = load_sampler(self.checkpoint, experiment, self.weights, _mesh(self.mesh))
        report = evaluate_transformer(trained, source, self.data, self.batch_size, self.num_images)
        if _first():
            written = write_report(report, self.out, trained.config.num_groups, trained.config.codebook_size)
            show("\n".join([describe(report), *map(str, written)]))


@dataclass(frozen=True)
class Sweep:
    """Try sampling settings: FID and company of samples for every combination, and for previews.

    The samples are of all classes in turn, with seeds from --seed on. Writes report.json and fid.png. The sampler is compiled
    once for all settings, and previews come from the same samples.

    Example: dar-jax sweep runs/ar --reference images.npz --guidance 1:1,1.1:4,1.1:8 --groups 2,4,6,8 --out sweep
    """

    checkpoint: Place  # a transformer's run folder, or one of its checkpoints/STEP
    reference: str  # NPZ file, folder or data source, as of `dar-jax evaluate`
    out: str  # the folder to write to
    num: Number = 1000  # samples for each setting
    guidance: OfRun[Words] = None  # scales of the first and the last token, such as 1:1,1.1:4
    temperature: OfRun[Floats[Temperature]] = None  # such as 0.9,1
    top_k: OfRun[Ints[TopK]] = None  # such as 0,600
    top_p: OfRun[Floats[Share]] = None  # such as 0.9,1
    groups: Optional[Ints[Tokens]] = None  # measure previews after so many groups, such as 2,4,6,8
    seed: Seed = 0  # of the first sample
    inception: Optional[str] = None  # file of the Inception network; else looked for as the README says
    resize: Literal["tensorflow1", "half_pixel"] = "tensorflow1"  # how images come to 299 pixels
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model or the guidance
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else along tensor as in the run, the rest along data
    batch_size: Batch = 64  # samples at a time

    def run(self) -> None:
        from dar_jax.evaluation.loading import find_transformer, load_sampler
        from dar_jax.evaluation.statistics import open_extractor
        from dar_jax.evaluation.sweep import sweep, table, variants, write_report

        found, experiment = find_transformer(self.checkpoint), _experiment(self.experiment)
        base = found.transformer.config.sampling
        pairs = [_pair(text) for text in self.guidance or ()]
        configs = variants(base, pairs, self.temperature or (), self.top_k or (), self.top_p or ())
        _check_folder(self.out)
        mesh = _mesh(self.mesh)
        extractor = open_extractor(self.inception, self.resize, self.batch_size, mesh)
        trained = load_sampler(self.checkpoint, experiment, self.weights, mesh)
        rows = sweep(trained, extractor, self.reference, configs, self.groups, self.num, self.batch_size, self.seed)
        about = {
            "checkpoint": str(found.transformer.path),
            "reference": self.reference,
            "samples": self.num,
            "seed": self.seed,
            "weights": f"{extractor.network.weights} (SHA-256 {extractor.network.sha256})",
            "resize": self.resize,
        }
        if _first():
            show("\n".join([table(rows), *map(str, write_report(rows, self.out, about))]))


@dataclass(frozen=True)
class Plan(Generic[Settings]):
    """What would an experiment take on TPUs? Memory, traffic, time and cost, from a compilation without any TPU.

    Needs libtpu (pip install "jax[tpu]"), which compiles the real training step, or the sampler, on any machine: seconds for
    small models, minutes for large ones, and kept for the next time. Times are what the chips' figures allow at best, nothing
    is measured. Several topologies make a table. Every setting of the experiment can be overridden as in `dar-jax train`. A
    transformer whose --tokenizer names an experiment file or a checkpoint computes the codes of its images within the step;
    else it learns from stored codes. The sampler's mesh is that of `dar-jax generate`: --mesh.tensor, the rest along data.

    Example: dar-jax plan experiments/imagenet256_ar_l.py --topology v5e:8x8 --mesh.fsdp 8
    """

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]  # its file; comes first
    topology: Words  # as libtpu names them, such as v5e:8x8 or v5p:4x4x4; several make a table
    config: Annotated[Settings, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    batch_size: Optional[Batch] = None  # images of all chips together, in place of train.batch_size
    sampling: Flag = False  # plan the sampler instead of the training step
    search: Tries = 6  # at most so many more compilations, for the largest batch and the least remat that fit; 0: none
    peak: Optional[Figure] = None  # TFLOP/s of a chip's bfloat16 products, in place of the published figure
    memory: Optional[Figure] = None  # GiB that a program may use of a chip
    memory_bandwidth: Optional[Figure] = None  # GB/s
    ici_bandwidth: Optional[Figure] = None  # GB/s that a chip sends to others, over all links
    json: Optional[str] = None  # also write everything to this file, in bytes, seconds and operations

    @classmethod
    def with_defaults(cls, experiment: str) -> tuple[Any, "Plan"]:
        """The type to parse and the values of what is not given."""
        from dar_jax.plan import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
        from dar_jax.training.experiment import load_experiment

        config = load_experiment(experiment).config
        return cls[type(config)], cls(experiment, tyro.MISSING, config)

    def run(self) -> None:
        from dar_jax.plan.chips import GIB, chip_of
        from dar_jax.plan.planner import plan
        from dar_jax.plan.report import table, text
        from dar_jax.training.experiment import load_experiment

        for topology in self.topology:
            chip_of(topology)
        _check_file(self.json)
        figures = {"peak": (self.peak, 1e12), "memory": (self.memory, GIB)}
        figures |= {"memory_bandwidth": (self.memory_bandwidth, 1e9), "ici_bandwidth": (self.ici_bandwidth, 1e9)}
        figures = {name: value * unit for name, (value, unit) in figures.items() if value is not None}
        experiment = load_experiment(self.experiment).with_config(self.config)
        plans = [plan(experiment, topology, self.batch_size, self.sampling, self.search, figures) for topology in self.topology]
        _write_json(self.json, [dataclasses.asdict(found) for found in plans])
        show(text(plans[0]) if len(plans) == 1 else table(plans))


@dataclass(frozen=True)
class Info:
    """Say what a checkpoint holds: networks and their sizes, steps, data and settings.

    Example: dar-jax info runs/digits
    """

    checkpoint: Place  # a run's folder, or one of its checkpoints/STEP

    def run(self) -> None:
        from dar_jax.evaluation.info import describe

        show(describe(self.checkpoint))


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


COMMANDS = {
    "quickstart": Quickstart,
    "train": Train,
    "sample": Sample,
    "generate": Generate,
    "reconstruct": Reconstruct,
    "tokenize": Tokenize,
    "evaluate": Evaluate,
    "evaluate-tokenizer": EvaluateTokenizer,
    "evaluate-ar": EvaluateAr,
    "sweep": Sweep,
    "plan": Plan,
    "info": Info,
    "import": Import,
    "export": Export,
}

MANY_HOSTS = ("train", "generate", "tokenize", "evaluate", "evaluate-tokenizer", "evaluate-ar", "sweep")
Seconds = Annotated[int, Range(1, 10**6)]
HOST_NUMBERS = {
    "num_processes": Annotated[int, Range(1, 10**6)],
    "process_id": Annotated[int, Range(0, 10**6)],
    "heartbeat_timeout": Seconds,
    "start_timeout": Seconds,
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of the process) and returns the exit code. `--help` raises SystemExit, as ever."""
    escape_unknown_characters()
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableMessages())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("dar_jax").setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where there is no home folder for its cache
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports there what it raises besides
    warnings.filterwarnings("ignore", module=r"orbax\.")
    code = 128 + signal.SIGPIPE
    try:
        try:
            code = _run(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:  # of stdout; what is left in it would be tried again at the end of the process
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            code = _fail(_disk_full(error) or error, 2)
        elif (hosts := _many_hosts()) is not None:
            hosts.leave(f"{hosts.name()}: nobody reads the output", code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        arguments = join_hosts(sys.argv[1:] if arguments is None else list(arguments))
        command = parse(arguments)
        if command is None:
            return 0
        use_compilation_cache()
        with _only_first_prints():
            return command.run() or 0
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            raise
        return _fail(_disk_full(error) or error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, RuntimeError) and "initialize backend" in str(error):  # JAX's, of what JAX_PLATFORMS names
            return _fail(error, 2)
        if (full := _disk_full(error)) is not None:
            return _fail(full, 2)
        if (hosts := _many_hosts()) is not None:
            hosts.leave(None, 1)
        raise


def join_hosts(arguments: list[str]) -> list[str]:
    """Takes the options for many hosts out of a command line and joins the hosts, if there are several, see `hosts.join`.

    That comes before the rest is looked at, because an experiment file or a checkpoint may make JAX look for its devices.
    """
    if not arguments or arguments[0] not in MANY_HOSTS or "-h" in arguments or "--help" in arguments:
        return arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--coordinator-address")
    for name in HOST_NUMBERS:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    options = _given(vars(options))
    for name, kind in HOST_NUMBERS.items():
        if name in options:
            checked(kind, options[name], name)
    from dar_jax import hosts

    hosts.join(**options, preemptible=arguments[0] == "train")
    return others


def parse(arguments: Sequence[str]) -> Any:
    """The command that a command line asks for, or None where it only asked for an overview, which is printed.

    Raises InputError, in one line, where it is wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return None
    name, *rest = arguments
    if name == "--version":
        print(f"dar-jax {__version__}")
        return None
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {similar[0]}?" if similar else f"commands are {', '.join(COMMANDS)}"
        raise InputError(f"there is no command {name!r}; {hint}")
    command, default = COMMANDS[name], None
    if hasattr(command, "with_defaults"):
        if rest and not rest[0].startswith("-"):
            command, default = command.with_defaults(rest[0])
        else:
            command = command[Listed]
    help_wanted = any(argument in ("-h", "--help") for argument in rest)
    return _parse(command, default, ["--help"] if help_wanted else rest, f"dar-jax {name}")


def overview() -> str:
    """What `dar-jax --help` prints."""
    lines = [f"  {name:20}{command.__doc__.splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dar-jax COMMAND ...",
            "",
            "D-AR, diffusion via autoregressive models: images as tokens whose order is a denoising schedule.",
            "",
            *lines,
            "",
            "`dar-jax COMMAND --help` explains a command, `dar-jax --version` prints the version.",
            "",
            "Many hosts: run the same command on each. On Cloud TPU, under SLURM's srun and Open MPI they find each other;",
            "elsewhere give --coordinator-address HOST:PORT --num-processes N --process-id 0 .. N-1, or set",
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. They wait for each other --start-timeout (300)",
            f"seconds, and end when one is silent for --heartbeat-timeout (60) seconds. This is for {', '.join(MANY_HOSTS)}.",
            "",
            "Example: dar-jax quickstart --workdir runs/digits",
        ]
    )


def use_compilation_cache() -> None:
    """Keeps compiled functions in ~/.cache/dar_jax, or where JAX_COMPILATION_CACHE_DIR says: a second run starts fast."""
    import jax

    from dar_jax.files import user_cache

    folder = user_cache()
    if jax.config.jax_compilation_cache_dir is not None or folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _parse(command: Any, default: Any, arguments: Sequence[str], prog: str) -> Any:
    """tyro's parsing, with its boxed complaints made one line, and ranges."""
    options = {} if default is None else {"default": default}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = tyro.cli(command, prog=prog, args=arguments, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(_condense(complaint.getvalue(), prog)) from None
    kinds = get_type_hints(type(parsed), include_extras=True)
    for name, value in vars(parsed).items():
        checked(kinds[name], value, "" if name == "config" else name)  # as in --train.steps, without the field's own name
    return parsed


def _condense(complaint: str, prog: str) -> str:
    """The message in a box of tyro's, and the options it thinks were meant."""
    lines = [re.sub("[╭╮╰╯│]", "", line).rstrip() for line in complaint.splitlines()[1:]]
    message, *others = re.split(r"\n ─+\n", "\n".join(lines))
    if message.startswith(" Missing from"):  # each option is followed by its help, deeper to the right
        first, *options = [line.strip() for line in message.split("\n") if not line.startswith(" " * 9)]
        message = f"{first} {', '.join(options)}"
    similar = [
        line.split()[0]
        for section in others
        if section.startswith((" Perhaps", " Arguments similar"))
        for line in section.split("\n")
        if line.strip().startswith("--")
    ]
    hint = f"; did you mean {' or '.join(dict.fromkeys(similar))}?" if similar else f" (see {prog} --help)"
    return " ".join(message.split()).rstrip(".") + hint


def _is_unread(stream: Any) -> bool:
    """Whether a stream is a pipe that is closed at its other end."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _disk_full(error: BaseException | None, depth: int = 0) -> str | None:
    """What an exception says of a full disk, in itself or in those that led to it; None where it is something else."""
    if error is None or depth > 20:
        return None
    for text in map(os.strerror, FULL):
        if text in str(error):
            path = re.search(r"/[^\s\"'\]:]+", str(error))
            return f"cannot write{f' {path[0]}' if path else ''}: {text}; make room, then give the command again"
    causes = [*getattr(error, "exceptions", ()), error.__cause__, error.__context__]
    return next((full for cause in causes if (full := _disk_full(cause, depth + 1)) is not None), None)


@contextlib.contextmanager
def _only_first_prints() -> Iterator[None]:
    """Of many hosts, all but the first print only what goes wrong."""
    if _first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _fail(what: object, code: int) -> int:
    """Says what is wrong; a host of many ends here, so that the others do not wait for it."""
    if (hosts := _many_hosts()) is not None:
        hosts.leave(f"{hosts.name()}: " + printable(" ".join(str(what).split())), code)
    return _say(what, code)


def _first() -> bool:
    """Whether this process prints, and writes what is written once: it is alone, or the first of several hosts."""
    return (hosts := _many_hosts()) is None or hosts.first()


def _many_hosts() -> Any:
    """The module `hosts` where this process is one of several hosts, else None."""
    hosts = sys.modules.get("dar_jax.hosts")
    return hosts if hosts is not None and hosts.many() else None


def _say(what: object, code: int) -> int:
    print("dar-jax: " + printable(" ".join(str(what).split())), file=sys.stderr)
    return code


def _check_folder(path: str) -> None:
    """Raises InputError where the process that writes cannot write to a folder."""
    from dar_jax.files import check_writable

    if _first():
        check_writable(path)


def _check_file(path: str | None) -> None:
    """The same for a file that may have been asked for."""
    from dar_jax.files import check_file_writable

    if path is not None and _first():
        check_file_writable(path)


def _write_json(path: str | None, values: Any) -> None:
    """Writes a file that may have been asked for, once."""
    from dar_jax.files import write_json

    if path is not None and _first():
        write_json(path, values)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _two(guidance: tuple[float, ...] | None) -> tuple[float, float] | None:
    if guidance is not None and len(guidance) > 2:
        raise InputError(f"guidance is one scale or two, of the first and the last token, not {len(guidance)}")
    return guidance and (guidance[0], guidance[-1])


def _pair(text: str) -> tuple[float, float]:
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise InputError(f"guidance {text!r} is not two scales, of the first and the last token, such as 1.1:8")
    return checked(tuple[Guidance, Guidance], (numbers[0], numbers[-1]), "guidance")


def _mesh(sizes: tuple[int, ...] | None, devices: Sequence[Any] | None = None) -> Any:
    """The mesh of these sizes; without any, all `devices` along data, or None where those are not given either."""
    from dar_jax.parallel import make_mesh

    if sizes is not None and len(sizes) != 3:
        raise InputError(f"a mesh has three sizes, of data, fsdp and tensor, not {len(sizes)}")
    return None if sizes is None and devices is None else make_mesh(MeshConfig(*sizes or ()), devices)


def _two_meshes(sizes: tuple[int, ...] | None, decoder_sizes: tuple[int, ...] | None, of_run: MeshConfig) -> tuple[Any, Any]:
    """The mesh of these sizes (default: as `run_mesh`), and that of the last devices where the decoder has sizes of its own."""
    import jax

    from dar_jax.evaluation.loading import run_mesh

    if decoder_sizes is None:
        return _mesh(sizes), None
    count, devices = math.prod(decoder_sizes), jax.devices()
    if min(decoder_sizes) < 1 or count >= len(devices) or jax.process_count() > 1:
        raise InputError(
            f"a decoder mesh takes some of the devices of one host, not {' x '.join(map(str, decoder_sizes))} of "
            f"{len(devices)} on {jax.process_count()}"
        )
    others = devices[:-count]
    return _mesh(sizes, others) if sizes else run_mesh(of_run, others), _mesh(decoder_sizes, devices[-count:])


def _experiment(path: str | None) -> Any:
    from dar_jax.training.experiment import load_experiment

    return None if path is None else load_experiment(path)
