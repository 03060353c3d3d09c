"""Batches over the devices of a mesh, and which rows each host holds."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dar_jax.errors import InputError
from dar_jax.parallel.mesh import BATCH
from dar_jax.parallel.sharding import put

Tag = TypeVar("Tag")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are sharded along their first dimension over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def batch_shares(mesh: Mesh) -> int:
    """The number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(size: int, parts: int, mesh: Mesh) -> None:
    """Raises InputError where a batch, in so many parts, cannot be sharded over the mesh."""
    shares = batch_shares(mesh)
    if size < 1 or size % (parts * shares):
        raise InputError(
            f"train.batch_size {size} in {parts} parts cannot be spread over data x fsdp = {shares} devices; "
            f"make it a multiple of {parts * shares}"
        )


def batch_parts(mesh: Mesh) -> tuple[list[int], int]:
    """The parts of a batch that the devices of this host hold: (numbers of the parts in order, number of equal parts in all).

    With one part for every host this would be (host, hosts), but a mesh that follows the topology of a TPU slice may give a
    host rows that do not lie together, and one whose `tensor` axis crosses hosts gives several hosts the same rows.
    """
    shares = batch_shares(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((shares,)).values()
    own = sorted({index[0].start or 0 for index in indices})
    for size in range(len(own), 0, -1):  # the fewest parts: as many neighbouring shares in each as possible
        parts = own[::size]
        if (
            shares % size == 0
            and all(part % size == 0 for part in parts)
            and own == [p + i for p in parts for i in range(size)]
        ):
            return [part // size for part in parts], shares // size
    raise AssertionError("single shares always fit")


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """The rows of this host's `batch_parts`, one part after the other -> global arrays, sharded as `batch_sharding`."""
    own, parts = batch_parts(mesh)
    sharding = batch_sharding(mesh)

    def global_array(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) // len(own) * parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(global_array, batch)


def full_batch(size: int, *meshes: Mesh) -> int:
    """`size` rounded up to a multiple of the devices that share a batch, on each of the meshes."""
    shares = math.lcm(*map(batch_shares, meshes))
    return -(-size // shares) * shares


def to_host(array: jax.Array) -> np.ndarray:
    """The complete array, also where other processes hold shards of it (all of them have to ask for it)."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def over_batches(
    function: Callable[..., Any], batches: Iterable[tuple[Tag, tuple]], size: int, mesh: Mesh
) -> Iterator[tuple[Tag, Any]]:
    """Runs a function on the devices over batches from the host, and gives its results on the host, one batch behind.

    So the devices work on a batch while the caller handles the one before and the next one is read.

    Args:
      function: takes trees of arrays [size, ...], sharded over the batch axes of the mesh; returns a tree of arrays with the
        batch first, or an iterator of such trees, each of which is handed on as it ends, before the next batch begins.
      batches: (tag, arguments): any value to know the batch by, and trees of host arrays of up to `size` rows; shorter batches
        are padded with copies of their last row, so that one compilation serves.
      size: rows at a time on the devices, see `full_batch`.

    Yields (tag, results): NumPy arrays of as many rows as the batch has. Every host gives the same batches, and gets all
    results.
    """
    waiting = None

    def finished(tag: Tag, rows: int, results: Any) -> Iterator[tuple[Tag, Any]]:
        for result in _on_mesh(results, mesh) if isinstance(results, Iterator) else [results]:
            yield tag, jax.tree.map(lambda leaf: to_host(leaf)[:rows], result)

    for tag, arguments in batches:
        rows = len(jax.tree.leaves(arguments)[0])
        padded = jax.tree.map(lambda array: np.concatenate([array, np.repeat(array[-1:], size - len(array), 0)]), arguments)
        padded = put(padded, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            results = function(*padded)
        if waiting is not None:
            yield from finished(*waiting)
        waiting = tag, rows, results
    if waiting is not None:
        yield from finished(*waiting)


def _on_mesh(results: Iterator[Any], mesh: Mesh) -> Iterator[Any]:
    """The same values; the mesh is set while each of them is computed, and not while the caller handles it."""
    while True:
        with jax.set_mesh(mesh):
            result = next(results, None)
        if result is None:
            return
        yield result


def row_slices(start: int, stop: int, size: int) -> list[slice]:
    """Rows start .. stop - 1, `size` at a time."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def split_rows(slices: Iterable[slice], *arrays: Any) -> Iterator[tuple[slice, tuple]]:
    """Batches for `over_batches`: these rows of trees of arrays [N, ...], such as None."""
    for rows in slices:
        yield rows, jax.tree.map(operator.itemgetter(rows), arrays)
