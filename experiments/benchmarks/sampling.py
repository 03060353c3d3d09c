"""How fast sampling is on this machine, beside what its memory and its matrix units allow.

Command:  python experiments/benchmarks/sampling.py --json sampling.json
Options:  --models L,XL --batch-sizes 1,8,64,256 --dtype bfloat16 --repeats 3 --decoder-device
Beside the PyTorch release, in one run, each of the two alone on the machine in its turn:
          python experiments/benchmarks/sampling.py --release D-AR --release-python D-AR/venv/bin/python --dtype float32
          (a copy of github.com/showlab/D-AR, and a Python with torch and what the release imports)
Result:   a table, and the same as JSON. Weights are random, which changes no time.

The limits are the larger of two times. Memory: every matrix of the transformer once per token and the filled part of its cache,
every matrix of the decoder once per step, at the rate of a copy measured here. Products: the model's operations
(`dar_jax.training.flops`) at the rate of one large product measured here.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import (
    apart,
    attempt,
    best,
    check_release,
    machine_name,
    matrix_rate,
    peak_memory,
    print_table,
    release_seconds,
    run,
    seconds,
    write_report,
)

from dar_jax.cli.options import Flag, Ints, Words
from dar_jax.config import TRANSFORMER_SIZES, MeshConfig, SamplingConfig, TokenizerConfig, TransformerConfig
from dar_jax.errors import InputError
from dar_jax.inference.reconstruct import quantize
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.parallel import make_mesh
from dar_jax.sampling import sampler
from dar_jax.sampling.predict import predict_group
from dar_jax.sampling.prepare import SamplerParams, prepare, separate
from dar_jax.sampling.sampler import decode, generate, stream
from dar_jax.sampling.settings import Networks, Settings, make_settings
from dar_jax.training.flops import count_flops

TOKENIZER = TokenizerConfig()
SIDE_BY_SIDE = (  # what is timed beside the release: kind, size of the transformer, batch
    ("encode", None, 2),
    ("decode", None, 2),
    ("predict", "B", 1),
    ("predict", "B", 8),
    ("predict", "L", 1),
)


@dataclass(frozen=True)
class Options:
    """Time the sampler on this machine."""

    models: Words[str] = ("L", "XL")  # sizes of the transformer
    batch_sizes: Ints[int] = (1, 8, 64, 256)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products
    repeats: int = 3  # runs after the first one, of which the fastest counts
    decoder_device: Flag = False  # a second device denoises while the first one predicts
    json: Path | None = None  # also write everything to this file
    release: Path | None = None  # the PyTorch release's folder: time it beside ours instead
    release_python: Path | None = None  # the Python that runs it


@dataclass(frozen=True)
class Limits:
    """What the device can do: bytes/s that a copy reads and writes, operations/s of a matrix product."""

    bandwidth: float
    matrix_rate: float


def main(options: Options) -> None:
    check_release(options.release_python, options.release)
    machine, limits = apart(describe_machine, options.dtype)
    command = " ".join(["python", *sys.argv])
    print(f"{machine}, {date.today()}, {options.dtype}\n{command}")
    print(f"copy {limits.bandwidth / 1e9:.1f} GB/s, matrix products {limits.matrix_rate / 1e12:.2f} TFLOP/s\n")
    if options.release:
        rows = [beside_release(options, *what) for what in SIDE_BY_SIDE]
    else:
        sizes = [(model, batch) for model in options.models for batch in options.batch_sizes]
        rows = [row_of(options, limits, *size) for size in sizes]
    print_table(rows)
    write_report(options.json, rows, command, machine=machine, **dataclasses.asdict(limits))


# --- the machine -----------------------------------------------------------------------------------------------------------


def describe_machine(dtype: str) -> tuple[str, Limits]:
    """Its name, and its limits measured on large arrays."""
    array = jnp.ones((1 << (28 if jax.default_backend() == "cpu" else 30)) // 4, jnp.float32)
    size = array.nbytes
    return machine_name(), Limits(2 * size / copy_seconds(array), matrix_rate(dtype))


def copy_seconds(array: jax.Array) -> float:
    """Of reading and writing an array in place, so that no new memory has to be had from the system."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        array = jax.block_until_ready(add(array))
        times.append(time.perf_counter() - start)
    return min(times[1:])


# --- the sampler -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    networks: Networks
    params: SamplerParams
    settings: Settings


def random_params(shapes: Any) -> Any:
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.02 * generator.standard_normal(leaf.shape, np.float32), shapes)


def make_networks(size: str | None, dtype: str) -> tuple[Networks, dict[str, Any]]:
    """The paper's tokenizer and a transformer, with random parameters."""
    tokenizer = Tokenizer(TOKENIZER, jnp.dtype(dtype))
    images = jnp.zeros((1, TOKENIZER.image_size, TOKENIZER.image_size, TOKENIZER.channels))
    params = {"tokenizer": random_params(jax.eval_shape(tokenizer.init, jax.random.key(0), images)["params"])}
    if size is None:
        return Networks(tokenizer), params
    llama = Llama(TransformerConfig(**TRANSFORMER_SIZES[size]), jnp.dtype(dtype))
    inputs = (jnp.zeros(1, jnp.int32), jnp.zeros((1, llama.config.num_tokens), jnp.int32))
    params["transformer"] = random_params(jax.eval_shape(llama.init, jax.random.key(0), *inputs)["params"])
    return Networks(tokenizer, llama), params


def make_sampler(size: str | None, dtype: str, decoder_device: bool = False) -> Sampler:
    networks, params = make_networks(size, dtype)
    params = prepare(networks, params)
    if decoder_device:
        if len(jax.devices()) < 2:
            raise InputError("--decoder-device needs two devices (CPU: XLA_FLAGS=--xla_force_host_platform_device_count=2)")
        params = separate(params, make_mesh(MeshConfig(), jax.devices()[1:2]))
    return Sampler(networks, params, make_settings(SamplingConfig(), TOKENIZER))


def draw(made: Sampler, function: Callable, batch: int) -> Any:
    """`generate` or `stream` of a batch."""
    arguments = jnp.arange(batch), jnp.arange(batch, dtype=jnp.uint32)
    return function(made.networks, made.params, made.settings, *arguments)


def predict(made: Sampler, batch: int) -> jax.Array:
    """The tokens of a batch alone."""
    arguments = made.networks, made.params, made.settings, jnp.arange(batch), jnp.arange(batch, dtype=jnp.uint32)
    state = sampler.begin(*arguments)
    for _ in range(TOKENIZER.num_groups):
        prediction = predict_group(*arguments[:3], state.prediction, state.group)
        state = dataclasses.replace(state, group=state.group + 1, prediction=prediction)
    return state.prediction.tokens


def decode_batch(made: Sampler, batch: int) -> jax.Array:
    values = jnp.zeros((batch, TOKENIZER.num_tokens, TOKENIZER.code_dim))
    return decode(made.networks, made.params, made.settings, values, jnp.arange(batch, dtype=jnp.uint32)).images


def first_preview(made: Sampler, batch: int) -> jax.Array:
    return next(draw(made, stream, batch)).images


def measure(size: str, dtype: str, batch: int, repeats: int, decoder_device: bool) -> dict[str, float]:
    """Seconds of everything, GiB, and what the limits follow from."""
    made = make_sampler(size, dtype, decoder_device)
    jax.block_until_ready(made.params)
    compiling = seconds(draw, made, generate, batch)
    whole = min(seconds(draw, made, generate, batch) for _ in range(repeats))
    found = {
        "generate_seconds": whole,
        "compile_seconds": compiling - whole,
        "stream_seconds": best(lambda: list(draw(made, stream, batch)), repeats=repeats),
        "first_preview_seconds": best(first_preview, made, batch, repeats=repeats),
        "predict_seconds": best(predict, made, batch, repeats=repeats),
        "decode_seconds": best(decode_batch, made, batch, repeats=repeats),
        "peak_gib": peak_memory(),
    }
    made = dataclasses.replace(made, params=dataclasses.replace(made.params, decoder_mesh=None))  # to be traced as one program
    llama, rows = made.networks.transformer.config, 2 * batch
    matrices = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(made.params.transformer.layers))
        + made.params.transformer.rest["output"].nbytes
    )
    entry = 2 * llama.layers * (llama.kv_heads or llama.heads) * llama.width // llama.heads * jnp.dtype(dtype).itemsize
    cache = rows * entry * llama.num_tokens * (llama.num_tokens + 1) / 2
    velocity = sum(leaf.nbytes for leaf in jax.tree.leaves(made.params.decoder.rest["velocity"]))
    return found | {
        "predict_bytes": llama.num_tokens * matrices + cache,
        "predict_flops": count_flops(lambda: predict(made, batch)),
        "decode_bytes": len(made.settings.times) * velocity,
        "decode_flops": count_flops(lambda: decode_batch(made, batch)),
    }


def row_of(options: Options, limits: Limits, size: str, batch: int) -> dict[str, Any]:
    """A row of the table: rates, and the share of what the limits allow."""
    found = attempt(measure, size, options.dtype, batch, options.repeats, options.decoder_device)
    if "note" in found:
        return {"model": size, "batch": batch, **found}
    bounds, together = {}, max if options.decoder_device else sum
    for part in ("predict", "decode"):
        times = found[f"{part}_bytes"] / limits.bandwidth, found[f"{part}_flops"] / limits.matrix_rate
        bounds[part] = max(times), "memory" if times[0] > times[1] else "products"
    return {
        "model": size,
        "batch": batch,
        "tokens/s": batch * TOKENIZER.num_tokens / found["predict_seconds"],
        "of its limit": f"{bounds['predict'][0] / found['predict_seconds']:.0%} {bounds['predict'][1]}",
        "decoded/s": batch / found["decode_seconds"],
        "of its limit ": f"{bounds['decode'][0] / found['decode_seconds']:.0%} {bounds['decode'][1]}",
        "images/s": batch / found["generate_seconds"],
        "of the limit": f"{together(bound for bound, _ in bounds.values()) / found['generate_seconds']:.0%}",
        "first preview s": found["first_preview_seconds"],
        "stream/generate": found["stream_seconds"] / found["generate_seconds"],
        "GiB": found["peak_gib"],
        "compile s": found["compile_seconds"],
        "measured": found,
    }


# --- beside the release ------------------------------------------------------------------------------------------------------


def beside_release(options: Options, kind: str, size: str | None, batch: int) -> dict[str, Any]:
    ours = apart(time_ours, kind, size, batch, options.dtype, options.repeats)
    worker = options.release_python, options.release
    theirs = release_seconds(*worker, kind, size, batch, options.dtype, options.repeats)
    what = kind if size is None else f"{kind} {size}"
    return {"what": what, "batch": batch, "ours s": ours, "release s": theirs, "release/ours": theirs / ours}


def time_ours(kind: str, size: str | None, batch: int, dtype: str, repeats: int) -> float:
    if kind == "encode":
        networks, params = make_networks(size, dtype)
        images = np.zeros((batch, TOKENIZER.image_size, TOKENIZER.image_size, TOKENIZER.channels), np.uint8)
        return best(quantize, networks, jax.device_put(params), images, repeats=repeats)
    made = make_sampler(size, dtype)
    return best(functools.partial({"decode": decode_batch, "predict": predict}[kind], made), batch, repeats=repeats)


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options, description=__doc__)))
