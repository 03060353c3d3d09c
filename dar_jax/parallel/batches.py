"""Batches over the devices of a mesh, and which rows each host holds."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dar_jax.errors import InputError
from dar_jax.parallel.mesh import BATCH
from dar_jax.parallel.sharding import put


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches are cut along their first dimension over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def batch_shares(mesh: Mesh) -> int:
    """Over how many devices a batch is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(size: int, parts: int, mesh: Mesh) -> None:
    """Raises InputError where a batch, in so many parts, cannot be spread over the mesh."""
    shares = batch_shares(mesh)
    if size < 1 or size % (parts * shares):
        raise InputError(
            f"train.batch_size {size} in {parts} parts cannot be spread over data x fsdp = {shares} devices; "
            f"make it a multiple of {parts * shares}"
        )


def batch_parts(mesh: Mesh) -> tuple[list[int], int]:
    """Which parts of a batch the devices of this host hold: (numbers of the parts in order, number of equal parts in all).

    With one part for every host this would be (host, hosts), but a mesh that follows the wires of a TPU slice may give a host
    rows that do not lie together, and one whose `tensor` axis crosses hosts gives several hosts the same rows.
    """
    shares = batch_shares(mesh)
    places = batch_sharding(mesh).addressable_devices_indices_map((shares,)).values()
    own = sorted({place[0].start or 0 for place in places})
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
    """Arrays of the rows of this host's `batch_parts`, one part after the other -> global arrays, cut as `batch_sharding`."""
    own, parts = batch_parts(mesh)
    sharding = batch_sharding(mesh)

    def whole(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) // len(own) * parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(whole, batch)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays [B, ...], whole on every host -> arrays cut over the mesh along B, which `full_batch` made fit."""
    return put(batch, batch_sharding(mesh))


def full_batch(size: int, *meshes: Mesh) -> int:
    """`size` rounded up to a multiple of the devices that share a batch, on each of the meshes."""
    shares = math.lcm(*map(batch_shares, meshes))
    return -(-size // shares) * shares


def pad(rows: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last of the rows [n, ...] until there are `size`."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array, also where other processes hold parts of it (all of them have to ask for it)."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def over_batches(
    function: Callable[..., Any], batches: Iterable[tuple[np.ndarray, ...]], size: int, *meshes: Mesh
) -> Iterator[tuple[int, Any]]:
    """Runs a function on the devices over batches from the host, and gives its results on the host, one batch behind.

    So the devices work on a batch while the caller handles the one before and the next one is read.

    Args:
      function: takes arrays [B, ...] sharded over the first mesh, returns a tree of arrays with the batch first.
      batches: tuples of host arrays of up to `size` rows; shorter ones are padded, so that one compilation serves.
      size: rows at a time on the devices, rounded up to a multiple of those that share a batch, on each of the meshes.

    Yields (rows, results): how many rows the batch had, and NumPy arrays of so many. Every one of several hosts gives the same
    batches and gets all results.
    """
    size, waiting = full_batch(size, *meshes), None

    def finished(rows: int, results: Any) -> tuple[int, Any]:
        return rows, jax.tree.map(lambda leaf: to_host(leaf)[:rows], results)

    for batch in batches:
        rows = len(batch[0])
        with jax.set_mesh(meshes[0]):
            results = function(*put_batch(tuple(pad(array, size) for array in batch), meshes[0]))
        if waiting is not None:
            yield finished(*waiting)
        waiting = rows, results
    if waiting is not None:
        yield finished(*waiting)


def split_rows(size: int, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays [N, ...] as batches of `size` rows, the last one perhaps of fewer."""
    for start in range(0, len(arrays[0]), size):
        yield tuple(array[start : start + size] for array in arrays)
