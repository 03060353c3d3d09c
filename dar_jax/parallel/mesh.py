"""The device mesh: axes `data`, `fsdp` and `tensor`."""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dar_jax.config import MeshConfig
from dar_jax.errors import InputError
from dar_jax.memory import keep_freed_memory

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # those that shard a batch
MOST_PARTS = 16  # along `fsdp`, where both it and `data` are left open


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices` (default: all of them), axes data, fsdp and tensor.

    Devices are ordered by the physical topology: `tensor` neighbours are closest, then `fsdp`. Slices of TPUs and nodes of
    GPUs, between which the network is slower, are split along `data`, and along `fsdp` only where there are more of them.

    Raises InputError where the sizes do not multiply to the number of devices, or do not fit the number of slices.
    """
    keep_freed_memory()
    devices = jax.devices() if devices is None else devices
    if config.data == config.fsdp == -1 and config.tensor > 0:
        shards = len(devices) // config.tensor
        fsdp = max(size for size in range(1, MOST_PARTS + 1) if shards % size == 0)
        config = dataclasses.replace(config, fsdp=fsdp)
    sizes = [config.data, config.fsdp, config.tensor]
    text = f"mesh data x fsdp x tensor = {' x '.join(map(str, sizes))}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{text}: sizes should be at least 1, and at most one of them, or data and fsdp, -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(f"{text} does not fit the {len(devices)} devices")
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of these sizes, see `make_mesh`."""
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    left, across = len(slices), []
    for size in sizes:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1 or len(set(slices.values())) > 1:
        shape, counts = " x ".join(map(str, sizes)), " + ".join(map(str, slices.values()))
        raise InputError(f"mesh data x fsdp x tensor = {shape} cannot be split into slices or nodes of {counts} devices")
    within = [size // parts for size, parts in zip(sizes, across)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
