"""Commands that train, or plan a training."""

import dataclasses
import functools
import os
import signal
from dataclasses import dataclass
from typing import Any, Literal

from dar_jax.cli.options import Figure, Flag, OnExperiment, Optional, Settings, Tries, Words, check_writable, fail, write_json
from dar_jax.config import Batch
from dar_jax.console import show


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
        from dar_jax.quickstart import quickstart, summary

        check_writable(self.workdir, folder=True)
        report = quickstart(self.workdir, self.fast)
        show(f"\n{summary(report)}\n\nThe pictures and report.json are in {self.workdir}")
        show(f"Now see it draw: dar-jax serve {self.workdir}")


@dataclass(frozen=True, kw_only=True)
class Train(OnExperiment[Settings]):
    """Run an experiment file: train a tokenizer or a transformer.

    Every setting of the experiment can be overridden, such as `--train.steps 100` or `--optimizer.learning-rate 3e-4`. To see
    them all with the experiment's values: dar-jax train EXPERIMENT --help. A folder that holds a run already is only taken with
    --resume. Ctrl-C and SIGTERM stop after a checkpoint, a second Ctrl-C at once. For many hosts see dar-jax --help.

    Example: dar-jax train experiments/digits_tokenizer.py --workdir runs/tokenizer --train.steps 500
    """

    workdir: str  # the run's folder, for checkpoints and logs; perhaps gs://BUCKET/...
    resume: Flag = False  # go on from the last checkpoint in the folder, or begin if there is none
    init_from: Optional[str] = None  # begin with these weights as far as they fit: a checkpoint, or a file of the release
    track: Literal["wandb", "trackio", "none"] = "none"  # send the log to Weights & Biases or Trackio too (docs/training.md)

    def run(self) -> int:
        from dar_jax.evaluation.during_training import Evaluation, log_pictures
        from dar_jax.release.checkpoints import open_start
        from dar_jax.training.loop import train
        from dar_jax.training.meter import TrainingDiverged
        from dar_jax.training.track import require_tracker

        track = None if self.track == "none" else self.track
        if track is not None:
            require_tracker(track)
        experiment = self.load()
        start = None if self.init_from is None else functools.partial(open_start, self.init_from, experiment.config)
        try:
            summary = train(experiment, self.workdir, self.resume, log_pictures, start, Evaluation(), track)
        except TrainingDiverged as error:
            return fail(error, 1)
        return 130 if summary.stopped_by == signal.SIGINT else 0


@dataclass(frozen=True, kw_only=True)
class Plan(OnExperiment[Settings]):
    """What would an experiment take on TPUs? Memory, traffic, time and cost, from a compilation without any TPU.

    Needs libtpu (pip install "jax[tpu]"), which compiles the real training step, or the sampler, on any machine: seconds for
    small models, minutes for large ones, and kept for the next time. Times are what the chips' figures allow at best, nothing
    is measured. Several topologies make a table. Every setting of the experiment can be overridden as in `dar-jax train`. A
    transformer whose --tokenizer names an experiment file or a checkpoint computes the codes of its images within the step;
    else it learns from stored codes. The sampler's mesh is that of `dar-jax generate`: --mesh.tensor, the rest along data.

    Example: dar-jax plan experiments/imagenet256_ar.py:l --topology v5e:8x8 --mesh.fsdp 8
    """

    topology: Words[str]  # as libtpu names them, such as v5e:8x8 or v5p:4x4x4; several make a table
    batch_size: Optional[Batch] = None  # images of all chips together, in place of train.batch_size
    sampling: Flag = False  # plan the sampler instead of the training step
    search: Tries = 6  # at most so many more compilations, for the largest batch and the least remat that fit; 0: none
    peak: Optional[Figure] = None  # TFLOP/s of a chip's bfloat16 products, in place of the published figure
    memory: Optional[Figure] = None  # GiB that a program may use of a chip
    memory_bandwidth: Optional[Figure] = None  # GB/s
    ici_bandwidth: Optional[Figure] = None  # GB/s that a chip sends to others, over all links
    json: Optional[str] = None  # also write everything to this file, in bytes, seconds and operations

    @classmethod
    def with_defaults(cls, experiment: str) -> tuple[Any, Any]:
        """The type to parse and the values of what is not given."""
        from dar_jax.plan import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
        return super().with_defaults(experiment)

    def run(self) -> None:
        from dar_jax.plan.chips import GIB, chip_of
        from dar_jax.plan.planner import plan
        from dar_jax.plan.report import table, text

        for topology in self.topology:
            chip_of(topology)
        check_writable(self.json)
        figures = {"peak": (self.peak, 1e12), "memory": (self.memory, GIB)}
        figures |= {"memory_bandwidth": (self.memory_bandwidth, 1e9), "ici_bandwidth": (self.ici_bandwidth, 1e9)}
        figures = {name: value * unit for name, (value, unit) in figures.items() if value is not None}
        experiment = self.load()
        plans = [plan(experiment, topology, self.batch_size, self.sampling, self.search, figures) for topology in self.topology]
        write_json(self.json, [dataclasses.asdict(each) for each in plans])
        show(text(plans[0]) if len(plans) == 1 else table(plans))
