"""What the benchmarks share: the machine, timing, memory, a process for each measurement, and tables."""

import math
import multiprocessing
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.errors import InputError
from dar_jax.files import write_json


def run(program: Callable[[], None]) -> None:
    """Calls a program; what is wrong with its options is one line and exit code 2."""
    try:
        program()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def apart(function: Callable, *arguments: Any) -> Any:
    """Calls a function in a process of its own, so that its peak of memory is its own and the device is free afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def attempt(function: Callable, *arguments: Any) -> dict[str, Any]:
    """As `apart`, of a function that returns figures by name; a "note" takes their place where memory does not suffice."""
    try:
        return apart(function, *arguments)
    except BrokenProcessPool:
        return {"note": "killed, as processes are that take too much memory"}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"note": "out of memory"}


def machine_name() -> str:
    """The devices, or the processor where there are none."""
    if jax.default_backend() != "cpu":
        return f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{multiprocessing.cpu_count()} cores of {found[1] if found else platform.processor()}"


def matrix_rate(dtype: str) -> float:
    """Floating-point operations/s of one large matrix product on one device."""
    size = 8192 if jax.default_backend() != "cpu" else 2048
    matrix = jnp.ones((size, size), dtype)
    return 2 * size**3 / best(jax.jit(jnp.dot), matrix, matrix, repeats=5)


def best(function: Callable, *arguments: Any, repeats: int) -> float:
    """Seconds of the fastest of some runs, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    return min(seconds(function, *arguments) for _ in range(repeats))


def seconds(function: Callable, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def peak_memory() -> float:
    """GiB of the fullest device's memory, or of this process where the devices do not say."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(found.get("peak_bytes_in_use", process) for found in stats) / 2**30


def check_release(python: Path | None, release: Path | None) -> None:
    """Raises InputError where one of the two is given without the other, or is not there."""
    if (python is None) != (release is None):
        raise InputError("--release and --release-python belong together: a folder, and a Python with torch that runs it")
    if release and not release.is_dir():
        raise InputError(f"there is no folder {release}")
    if python and shutil.which(python) is None:
        raise InputError(f"{python} cannot be run")


def release_seconds(python: Path, release: Path, kind: str, size: str | None, batch: int, dtype: str, repeats: int) -> float:
    """What `release_worker.py` prints; its arguments are explained there."""
    worker = [python, Path(__file__).with_name("release_worker.py"), release, kind, size, batch, dtype, repeats]
    said = subprocess.run([str(argument) for argument in worker], check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(said.splitlines()[-1])


def write_report(path: Path | None, rows: list[dict[str, Any]], command: str, **about: Any) -> None:
    """The rows and what they are of as JSON, where a file is asked for."""
    if path:
        write_json(path, {"date": str(date.today()), "command": command, "jax": jax.__version__, **about, "rows": rows})


def across(values: Sequence[float]) -> str:
    """The mean of a figure over some runs, and half of its range."""
    digits = 0 if np.mean(values) >= 100 else 2 if np.mean(values) >= 5 else 3
    spread = f" ± {np.ptp(values) / 2:.{digits}f}" if np.ptp(values) else ""
    return f"{np.mean(values):,.{digits}f}{spread}"


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints `cells_of(rows)` in columns."""
    cells = cells_of(rows)
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))


def cells_of(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The names of the columns, which are those of the longest row, and each row as text. A "note" takes the place of what a
    row lacks, "measured" is left out."""
    names = [name for name in max(rows, key=len) if name != "measured"]
    return [names] + [[_cell(row.get(name, row.get("note", ""))) for name in names] for row in rows]


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.3g}"
