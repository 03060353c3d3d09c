"""Where arrays live: the device mesh, and one table that says how every parameter is cut over it.

The mesh has three axes. `data` and `fsdp` share the batch; `fsdp` also cuts parameters along their width, so that each device
keeps a part and gathers the rest when it is needed; `tensor` cuts heads and hidden units: products into them by columns,
products out of them by rows, so that a block needs one sum over `tensor` for its attention and one for its MLP.
Callers enter the mesh with `jax.set_mesh(mesh)`; one device is a 1 x 1 x 1 mesh.

By default all devices stand along `data`: every one holds all of the state, 16 bytes a parameter, and the only traffic is the
sum of the gradients. That is best as long as the state leaves room for activations. Larger models, as in the ImageNet recipes,
take `MeshConfig(data=-1, fsdp=-1)`, which cuts it over up to `MOST_PARTS` devices, at the price of gathering each layer's
parameters in the forward and in the backward pass. More parts save little memory, and on a TPU parts of less than a tile are
not scattered but summed up whole. Where the network between hosts is slow, `MeshConfig(data=-1, fsdp=N)` with the N devices of
one host keeps that traffic inside.
`tensor` is for layers that do not fit otherwise, and for sampling in small batches.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dar_jax.config import MeshConfig
from dar_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
MOST_PARTS = 16  # along `fsdp`, where both it and `data` are left open
Rules = Sequence[tuple[str, P]]

# (regular expression on the end of a parameter's path, how its LAST dimensions are cut). The first match counts. Dimensions
# that a rule does not name, such as the leading layers of a stack of blocks, stay whole.
RULES: Rules = (
    # frozen feature networks and the discriminator: convolutions and their norms are small, and whole everywhere
    (r"conv\d_\d/kernel|(Conv2d_\w+|branch\w+|fc)/kernel|discriminator/\w+/kernel", P()),
    (r"class_token|head\d|mean|var", P()),
    (r"qkv/bias", P("tensor", None, None)),
    # attention: kernels [D, N, K] and [N, K, D], fused kernel [D, M, R + 2, K]
    (r"[qkv]/kernel", P("fsdp", "tensor", None)),
    (r"[qkv]/bias", P("tensor", None)),
    (r"qkv/kernel", P("fsdp", "tensor", None, None)),
    (r"(cross_)?attention/out/kernel", P("tensor", None, "fsdp")),
    # linears into a wider or hidden layer, and out of it
    (r"(in|linear0|linear2)/kernel", P("fsdp", "tensor")),
    (r"(in|linear0|linear2)/bias", P("tensor")),
    # [D, parts, hidden]: what is taken apart later stands on an axis of its own, so that no part crosses devices
    (r"(gate_up|modulation|head_modulation)/kernel", P("fsdp", None, "tensor")),
    (r"(modulation|head_modulation)/bias", P(None, "tensor")),
    (r"(out|down|linear1)/kernel", P("tensor", "fsdp")),
    # what leads into the width of a network, and out of it
    (r"(patchify|patch_in|query_linear|from_code|condition_in)/kernel", P(None, "fsdp")),
    (r"(to_code|patch_out)/kernel", P("fsdp", None)),
    (r"(class|token|query|position)_table", P(None, "fsdp")),
    (r"output", P("fsdp", "tensor")),
    (r"codebook", P()),
    (r"bias|scale|gate[12]", P()),
    # key/value caches [B, N, S, K]
    (r"keys|values", P(BATCH, "tensor", None, None)),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices` (default: all of them), axes data, fsdp and tensor.

    It follows the wires: neighbours along `tensor`, then `fsdp`, are near each other; slices of TPUs and nodes of GPUs, between
    which the network is slower, are taken apart along `data`, along `fsdp` only where there are more of them.

    Raises InputError where the sizes do not multiply to the number of devices, or do not fit the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    if config.data == config.fsdp == -1 and config.tensor > 0:
        rest = len(devices) // config.tensor
        fsdp = max(size for size in range(1, MOST_PARTS + 1) if rest % size == 0)
        config = dataclasses.replace(config, fsdp=fsdp)
    sizes = [config.data, config.fsdp, config.tensor]
    given = f"mesh data x fsdp x tensor = {' x '.join(map(str, sizes))}"
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{given}: sizes should be at least 1, and at most one of them, or data and fsdp, -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(f"{given} does not fit the {len(devices)} devices")
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of these sizes, see `make_mesh`."""
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    rest, across = len(slices), []
    for size in sizes:
        across.append(math.gcd(size, rest))
        rest //= across[-1]
    if rest > 1 or len(set(slices.values())) > 1:
        given, counts = " x ".join(map(str, sizes)), " + ".join(map(str, slices.values()))
        raise InputError(f"mesh data x fsdp x tensor = {given} cannot be cut into slices or nodes of {counts} devices")
    within = [size // parts for size, parts in zip(sizes, across)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def path_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as names with slashes, `encoder/blocks/mlp/in/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fit(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """`spec` applied to the last dimensions of `shape`, without the axes that do not divide their dimension."""
    axes = (None,) * (len(shape) - len(spec)) + tuple(spec)

    def divides(axis: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    return P(*(axis if divides(axis, size) else None for axis, size in zip(axes, shape)))


def shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """The NamedSharding of every array of a tree: parameters, or anything whose paths end like theirs (EMA, optimizer state).

    Args:
      tree: arrays or ShapeDtypeStructs; scalars are replicated.
      rules: further rules, tried before `RULES`, for a fork's own parameters.

    Raises ValueError for a path that no rule matches.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return replicated(mesh)
        name = path_name(path)
        for pattern, spec in (*rules, *RULES):
            if re.search(rf"(^|/)({pattern})$", name):
                return NamedSharding(mesh, fit(spec, leaf.shape, mesh))
        raise ValueError(f"no sharding rule for {name} {leaf.shape}; add one to parallel.RULES or to Experiment.rules")

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(shapes: Any, places: Any) -> Any:
    """A tree of ShapeDtypeStructs and the tree of their shardings put together."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places)


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


def put(tree: Any, places: Any) -> Any:
    """Arrays that every host has as a whole, NumPy's or on its own devices -> global arrays of these shardings.

    Args: places, a tree of shardings like `tree`, or one for all.
    """

    def each(value: Any, place: NamedSharding) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

    return jax.tree.map(each, tree, jax.tree.broadcast(places, tree))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())
