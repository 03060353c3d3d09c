"""The C library keeps large buffers, where they are a CPU's."""

import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dar_jax import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's")


def test_freed_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch):
    calls = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *given: calls.append(given)))
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    memory.keep_freed_memory.__wrapped__()
    assert sorted(calls) == [(-8, 1), (-3, 2**31 - 1), (-1, -1)]  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    for name, value in (("MALLOC_TRIM_THRESHOLD_", "131072"), ("JAX_PLATFORMS", "cuda")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            memory.keep_freed_memory.__wrapped__()
        assert len(calls) == 3
    monkeypatch.delenv("JAX_PLATFORMS")
    for plugins, expected in (["cuda"], 3), ([], 6):
        monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda group, plugins=plugins: plugins)
        monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
        memory.keep_freed_memory.__wrapped__()
        assert len(calls) == expected


def test_pages_of_a_large_step_are_cleared_once():
    """Also where a thread of JAX's own takes them."""
    code = """
import resource
from dar_jax.memory import keep_freed_memory
keep_freed_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda i, y: jnp.sin(y) + i, x).sum())
x = jnp.ones(3 * 10**7)  # 120 MB, more than a heap of another thread holds
for _ in range(30):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    faults = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert int(faults) * resource.getpagesize() < 15 * 120e6  # in every step: 30 times
