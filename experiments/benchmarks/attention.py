"""The library's attention kernels beside XLA's own, at the velocity network's and the transformer's sizes.

Command:  python experiments/benchmarks/attention.py --json attention.json
Options:  --tokens 256,1024 --batch-sizes 8,64 --heads 12 --head-size 64 --repeats 5
Result:   a table, and the same as JSON: milliseconds of attention forward, and forward with backward, in bfloat16.

"library" is `models.attention.attend`: cuDNN's kernel on NVIDIA GPUs from Ampere on, JAX's Pallas kernel on TPU, and XLA's on a
CPU, where both columns are the same program.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from common import attempt, best, machine_name, print_table, run, write_report

from dar_jax.cli.options import Ints
from dar_jax.models.attention import attend


@dataclass(frozen=True)
class Options:
    """Time attention on this machine."""

    tokens: Ints[int] = (256, 1024)
    batch_sizes: Ints[int] = (8, 64)
    heads: int = 12
    head_size: int = 64
    repeats: int = 5
    json: Path | None = None  # also write everything to this file


def main(options: Options) -> None:
    command, machine = " ".join(["python", *sys.argv]), machine_name()
    print(f"{machine}, {date.today()}, jax {jax.__version__}\n{command}\n")
    rows = [row_of(options, tokens, batch) for tokens in options.tokens for batch in options.batch_sizes]
    print_table(rows)
    write_report(options.json, rows, command, machine=machine)


def row_of(options: Options, tokens: int, batch: int) -> dict[str, float]:
    return {"tokens": tokens, "batch": batch, **attempt(measure, options, tokens, batch)}


def measure(options: Options, tokens: int, batch: int) -> dict[str, float]:
    """Milliseconds by name."""
    shape = (3, batch, tokens, options.heads, options.head_size)
    inputs = tuple(jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))

    def milliseconds(attention: Callable, backward: bool) -> float:
        def loss(*inputs: jax.Array) -> jax.Array:
            return attention(*inputs).astype(jnp.float32).sum()

        return 1e3 * best(jax.jit(jax.grad(loss, (0, 1, 2)) if backward else attention), *inputs, repeats=options.repeats)

    found = {}
    for name, backward in (("forward", False), ("with backward", True)):
        library, xla = (milliseconds(attention, backward) for attention in (attend, jax.nn.dot_product_attention))
        found |= {f"{name}: library ms": library, f"XLA's ms ({name})": xla, f"ratio ({name})": xla / library}
    return found


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options, description=__doc__)))
