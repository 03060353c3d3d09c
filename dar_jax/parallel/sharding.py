"""Shardings: one table with the PartitionSpec of every parameter, and one of every activation.

The mesh has three axes. `data` and `fsdp` share the batch; `fsdp` also shards parameters along their width, so that each device
keeps a part and gathers the others when it needs them; `tensor` shards heads and hidden units: products into them by columns,
products out of them by rows, so that a block needs one sum over `tensor` for its attention and one for its MLP.
Callers enter the mesh with `jax.set_mesh(mesh)`; one device is a 1 x 1 x 1 mesh.

By default all devices stand along `data`: every one holds all of the state, 16 bytes a parameter, and the only traffic is the
sum of the gradients. That is best as long as the state leaves room for activations. Larger models, as in the ImageNet recipes,
take `MeshConfig(data=-1, fsdp=-1)`, which shards it over up to `MOST_PARTS` devices, at the price of gathering each layer's
parameters in the forward and in the backward pass. More shards save little memory, and on a TPU shards of less than a tile are
all-reduced, not reduce-scattered. Where the network between hosts is slow, `MeshConfig(data=-1, fsdp=N)` with the N devices of
one host keeps that traffic inside.
`tensor` is for layers that do not fit otherwise, and for sampling in small batches.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dar_jax.errors import InputError
from dar_jax.parallel.mesh import BATCH

Rules = Sequence[tuple[str, P]]
Axis = str | tuple[str, ...] | None

# (regular expression on the end of a parameter's path, sharding of its LAST dimensions). The first match counts. Dimensions
# that a rule does not name, such as the leading layers of a stack of blocks, are not sharded.
RULES: Rules = (
    # frozen feature networks: convolutions and their norms are small, and replicated
    (r"conv\d_\d/kernel|(Conv2d_\w+|branch\w+|fc)/kernel", P()),
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
    # [D, parts, hidden]: what is split later stands on an axis of its own, so that no part crosses devices
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


def path_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as names with slashes, `encoder/blocks/mlp/in/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fit(spec: P, shape: Sequence[int], mesh: Mesh) -> P:
    """`spec` applied to the last dimensions of `shape`, without the axes that do not divide their dimension."""
    return _that_divide((None,) * (len(shape) - len(spec)) + tuple(spec), shape, mesh.shape)


def shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """The NamedSharding of every array of a tree: parameters, or anything whose paths end like theirs (EMA, optimizer state).

    Args:
      tree: arrays or ShapeDtypeStructs; scalars, and vectors that no rule names, are replicated.
      rules: further rules, tried before `RULES`, for a fork's own parameters.

    Raises InputError for an array of two or more dimensions that no rule names.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return replicated(mesh)
        name = path_name(path)
        for pattern, spec in (*rules, *RULES):
            if re.search(rf"(^|/)({pattern})$", name):
                return NamedSharding(mesh, fit(spec, leaf.shape, mesh))
        if leaf.ndim - ("blocks/" in name) <= 1:  # a stack of blocks adds an axis
            return replicated(mesh)
        raise InputError(
            f"no sharding rule for {name} {leaf.shape}; give the experiment one, such as "
            f'Experiment(rules=((r"{name.rsplit("/", 1)[-1]}", PartitionSpec()),)), which replicates it'
        )

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of ShapeDtypeStructs with the shardings of another tree."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings)


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every host has completely, NumPy's or on its own devices -> global arrays of these shardings.

    Args: shardings, a tree like `tree`, or one for all.
    """

    def global_array(value: Any, sharding: NamedSharding) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(global_array, tree, jax.tree.broadcast(shardings, tree))


def replicated(mesh: Mesh) -> NamedSharding:
    """A complete copy on every device."""
    return NamedSharding(mesh, P())


# Sharding of activations, by name. Without these constraints the compiler may shard the residual stream along its width, as the
# parameters are, and all-reduce activations where all-gathering parameters is cheaper. XLA (jax 0.10) has also been seen to
# swap samples between devices where the sides of a product, or their gradients, were left to it on a 2 x 2 x 2 mesh.
ACTIVATIONS = {
    "stream": P(("data", "fsdp"), None, None),  # [B, T, D]
    "hidden": P(("data", "fsdp"), None, "tensor"),  # [B, T, H]
    "heads": P(("data", "fsdp"), None, "tensor", None),  # [B, T, N, K]
    "logits": P(("data", "fsdp"), None, "tensor"),  # [B, T, V]
    "table": P(None, None),  # [V, D], gathered before rows are looked up
    "cache": P(("data", "fsdp"), "tensor", None, None),  # [B, N, S, K]
    "images": P(("data", "fsdp")),  # [B, H, W, C], or data of other dimensions
}


def constrain(x: Array, name: str) -> Array:
    """Fixes the layout of an activation on the mesh that is set, if one is; dimensions that do not divide are not sharded."""
    if not jax.sharding.get_abstract_mesh().shape:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(name, x.shape))


def fitting(name: str, shape: Sequence[int]) -> P:
    """The layout `name` of `ACTIVATIONS` for an array, without axes that do not divide their dimension."""
    return _that_divide(ACTIVATIONS[name], shape, jax.sharding.get_abstract_mesh().shape)


def _that_divide(axes: Iterable[Axis], shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """The axes of a mesh of these sizes, each along its dimension of `shape`, None where they do not divide it."""

    def shards(axis: Axis) -> int:
        return math.prod(sizes[name] for name in ((axis,) if isinstance(axis, str) else axis or ()))

    return P(*(None if size % shards(axis) else axis for axis, size in zip(axes, shape)))
