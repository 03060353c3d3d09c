"""How fast a training step is here: time, images and tokens a second, MFU and memory, for each of the paper's models.

Command:  python experiments/benchmarks/train_step.py --json train_step.json
Options:  --models tokenizer,B,L --batch-sizes 64,256 --remats none,dots --dtype bfloat16 --optimizer muon
          --mesh.fsdp -1 --peak-flops 989e12
Beside the PyTorch release, in one run, each of the two alone on the machine in its turn:
          python experiments/benchmarks/train_step.py --release D-AR --release-python D-AR/venv/bin/python \\
              --models B --batch-sizes 8 --dtype float32
          (a copy of github.com/showlab/D-AR, and a Python with torch and what the release imports)
Result:   a table, and the same as JSON. Weights and data are random, which changes no time.

The step is that of `dar-jax train`, on all devices of this machine: the tokenizer's with LPIPS and REPA, the transformers' on
stored codes. Several steps are handed over in a row, as in training, and the fastest of some such rows counts. MFU is the
model's operations (`dar_jax.training.flops.model_flops`: nothing twice, frozen networks too) by time and by the devices'
bfloat16 peak: `--peak-flops`, else that of `dar_jax.training.flops.PEAKS`, else the rate of one large product measured here.
"""

import dataclasses
import itertools
import sys
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from common import (
    apart,
    attempt,
    check_release,
    machine_name,
    matrix_rate,
    peak_memory,
    print_table,
    release_seconds,
    run,
    write_report,
)

from dar_jax import parallel
from dar_jax.cli.options import Ints, Words
from dar_jax.config import TRANSFORMER_SIZES, MeshConfig, TransformerConfig
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.plan.jobs import training_job
from dar_jax.training.flops import PEAKS, model_flops

EXPERIMENTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """Time the training step on this machine."""

    models: Words[str] = ("tokenizer", "L", "XL", "XXL")  # the tokenizer, and sizes of the transformer
    batch_sizes: Ints[int] = (64, 256)  # of all devices together
    remats: Words[str] = ("none", "dots")  # what the backward pass computes again: none, dots or full
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products
    optimizer: Literal["adamw", "muon"] = "adamw"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 10  # in a row
    repeats: int = 3  # rows, of which the fastest counts
    peak_flops: float | None = None  # operations/s of one device
    json: Path | None = None  # also write everything to this file
    release: Path | None = None  # the PyTorch release's folder: time its transformers beside ours instead
    release_python: Path | None = None  # the Python that runs it


@dataclass(frozen=True)
class Machine:
    """Its name, and the bfloat16 operations/s of one device with where they are from."""

    name: str
    peak: float
    source: str


def main(options: Options) -> None:
    check_release(options.release_python, options.release)
    machine = apart(describe_machine, options)
    command = " ".join(["python", *sys.argv])
    print(f"{machine.name}, {date.today()}, {options.dtype}, jax {jax.__version__}\n{command}")
    print(f"peak of a device {machine.peak / 1e12:.4g} TFLOP/s ({machine.source})\n")
    make_row = beside_release if options.release else row_of
    models, remats = options.models, options.remats
    if options.release:
        models, remats = [model for model in models if model != "tokenizer"], ("none",)
    choices = itertools.product(models, options.batch_sizes, remats)
    rows = [make_row(options, machine, *choice) for choice in choices]
    print_table(rows)
    write_report(options.json, rows, command, machine=dataclasses.asdict(machine), dtype=options.dtype)


def describe_machine(options: Options) -> Machine:
    kind = jax.devices()[0].device_kind
    if options.peak_flops:
        return Machine(machine_name(), options.peak_flops, "--peak-flops")
    if kind in PEAKS:
        return Machine(machine_name(), PEAKS[kind], "published")
    return Machine(machine_name(), matrix_rate(options.dtype), f"one product in {options.dtype}, measured")


def experiment_of(options: Options, model: str, batch: int, remat: str) -> Experiment:
    """The paper's recipe of this model, changed as the options have it."""
    tokenizer = model == "tokenizer"
    experiment = load_experiment(EXPERIMENTS / ("imagenet256_tokenizer.py" if tokenizer else "imagenet256_ar.py:l"))
    config = experiment.config
    train = dataclasses.replace(config.train, batch_size=batch, accumulate=1, remat=remat, dtype=options.dtype)
    optimizer = dataclasses.replace(config.optimizer, name=options.optimizer)
    changes = {"train": train, "mesh": options.mesh, "optimizer": optimizer}
    if not tokenizer:
        changes |= {
            "model": TransformerConfig(**TRANSFORMER_SIZES[model]),
            "data": dataclasses.replace(config.data, source="codes"),
        }
    return experiment.with_config(dataclasses.replace(config, **changes))


def random_like(shapes: Any, shardings: Any) -> Any:
    """Arrays of these shapes in their places: small numbers, and integers below 256, which every table has."""

    def make(path: tuple, leaf: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), len(path))
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.randint(key, leaf.shape, 0, 256).astype(leaf.dtype)
        return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.jit(lambda: jax.tree_util.tree_map_with_path(make, shapes), out_shardings=shardings)()


def zeros_like(shapes: Any, shardings: Any) -> Any:
    return jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), out_shardings=shardings)()


def measure(options: Options, model: str, batch: int, remat: str) -> dict[str, Any]:
    """Seconds, GiB, and the model's operations."""
    mesh = parallel.make_mesh(options.mesh)
    experiment = experiment_of(options, model, batch, remat)
    traced = training_job(experiment, mesh).traced
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        step = traced.lower().compile()
        compiling = time.perf_counter() - start
        (state, data, frozen), places = traced.args_info[0], step.input_shardings[0]
        params = random_like(state.params, places[0].params)
        rest = zeros_like(dataclasses.replace(state, params=None), dataclasses.replace(places[0], params=None))
        state = dataclasses.replace(rest, params=params)
        data, frozen = random_like(data, places[1]), random_like(frozen, places[2])
        times = []
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            for _ in range(options.steps):
                state, metrics = step(state, data, frozen)
            jax.block_until_ready(state)
            times.append((time.perf_counter() - start) / options.steps)
    return {
        "step_seconds": min(times[1:]),
        "compile_seconds": compiling,
        "model_flops": model_flops(traced),
        "devices": mesh.size,
        "tokens_per_image": experiment.config.model.num_tokens,
        "peak_gib": peak_memory(),
    }


def row_of(options: Options, machine: Machine, model: str, batch: int, remat: str) -> dict[str, Any]:
    """A row of the table."""
    found = attempt(measure, options, model, batch, remat)
    row = {"model": model, "batch": batch, "remat": remat}
    if "note" in found:
        return row | found
    images = batch / found["step_seconds"]
    return row | {
        "step ms": 1e3 * found["step_seconds"],
        "images/s": images,
        "tokens/s": images * found["tokens_per_image"],
        "TFLOP": found["model_flops"] / 1e12,
        "MFU": f"{found['model_flops'] / (found['step_seconds'] * found['devices'] * machine.peak):.1%}",
        "GiB": found["peak_gib"],
        "compile s": found["compile_seconds"],
        "measured": found,
    }


def beside_release(options: Options, machine: Machine, model: str, batch: int, remat: str) -> dict[str, Any]:
    """A row with both times, each the fastest of some single steps."""
    options = dataclasses.replace(options, steps=1)
    ours = row_of(options, machine, model, batch, remat)
    if "note" in ours:
        return ours
    worker = options.release_python, options.release
    theirs = release_seconds(*worker, "train", model, batch, options.dtype, options.repeats)
    return ours | {"release ms": 1e3 * theirs, "release/ours": theirs / ours["measured"]["step_seconds"]}


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options, description=__doc__)))
