"""Compilation for a TPU topology with libtpu, without a TPU, and a cache of compiled programs.

JAX's own compilation cache can write executables for absent devices but not read them. So the text of the compiled program is
cached, and all figures come from it.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.experimental import topologies

from dar_jax.errors import InputError
from dar_jax.files import is_remote, replacing
from dar_jax.plan.chips import chip_of


@dataclass(frozen=True)
class Program:
    """A compiled program, or how it failed to fit.

    needed: bytes of memory on each chip; arguments, temporaries: those of its arguments, and of everything else.
    hlo: its text, None where it does not fit. warnings: the compiler's, of arrays that it gathers completely on every chip.
    """

    needed: float
    arguments: float
    temporaries: float
    hlo: str | None
    warnings: tuple[str, ...]


def open_topology(name: str) -> Sequence[jax.Device]:
    """The devices of a topology such as v5e:8x8, to compile for.

    Raises InputError where libtpu is not installed or knows no such topology.
    """
    chip = chip_of(name)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError('planning needs libtpu, which compiles without a TPU too: pip install "jax[tpu]"')
    try:
        with capture_stderr():
            topology = topologies.get_topology_desc(topology_name=name, platform="tpu", chip_config_name=chip.config)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"libtpu knows no topology {name} (one is {chip.example}): {error}") from error
    return topology.devices


def compile_for(lowered: jax.stages.Lowered, topology: str, cache: Path | None, starting: Callable[[], None]) -> Program:
    """The compiled program, from `cache` if it is there; `starting` is called before a compilation, which may take minutes.

    Raises InputError where the compilation fails for another reason than memory.
    """
    versions = [importlib.metadata.version(package) for package in ("jax", "libtpu")]
    fields = [field.name for field in dataclasses.fields(Program)]
    key = hashlib.sha256("\n".join([lowered.as_text(), topology, *versions, *fields]).encode()).hexdigest()
    path = cache and cache / f"{key}.json.gz"
    with contextlib.suppress(OSError, EOFError, zlib.error, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        stored = json.loads(gzip.decompress(path.read_bytes())) if path else None
        if stored:
            return Program(**{**stored, "warnings": tuple(stored["warnings"])})
    starting()
    program = _compile(lowered)
    if path:
        with contextlib.suppress(OSError), replacing(path) as temporary:
            temporary.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(program)).encode()))
    return program


def cache_folder() -> Path | None:
    """The folder of cached programs: beside JAX's compilation cache; None where JAX has none on this machine."""
    folder = jax.config.jax_compilation_cache_dir
    return None if folder is None or is_remote(folder) else Path(folder) / "plan"


def _compile(lowered: jax.stages.Lowered) -> Program:
    lines: list[str] = []
    try:
        with capture_stderr() as lines:
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = memory_wanted("\n".join([*lines, str(error)]))
        if needed is None:
            raise InputError(f"the compiler failed: {error}") from error
        return Program(needed, 0.0, 0.0, None, warnings_of(lines))
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, results, memory.generated_code_size_in_bytes)
    return Program(sum(parts), parts[0], sum(parts[1:]), compiled.as_text(), warnings_of(lines))


def memory_wanted(message: str) -> float | None:
    """Bytes that the program needs, by the compiler's error of too little memory; None for another error."""
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"Used {size} of \S+ hbm", rf"required for [\w ]+ \({size}\) exceeds available HBM"):
        if found := re.search(pattern, message):
            return float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")
    return None


def warnings_of(lines: Sequence[str]) -> tuple[str, ...]:
    """The compiler's warnings of arrays that it can only reshard by gathering them completely on every chip."""
    return tuple(line[line.index("Involuntary") :] for line in lines if "Involuntary full rematerialization" in line)


@contextlib.contextmanager
def without_jax_cache() -> Iterator[None]:
    """Switches JAX's compilation cache off, which works where nothing has been compiled yet."""
    used = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)


@contextlib.contextmanager
def capture_stderr() -> Iterator[list[str]]:
    """Captures what libraries write to the standard error stream; the list has its lines afterwards."""
    lines: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
