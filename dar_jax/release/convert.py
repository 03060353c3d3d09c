"""Parameters from and to the release's tensors, by the table in `names`."""

import math
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dar_jax.errors import InputError
from dar_jax.release.names import Entry


def from_release(entries: list[Entry], tensors: Mapping[str, np.ndarray], abstract: dict, unused: str | None = None) -> dict:
    """Our parameters, float32 and without ties to the file the tensors may be mapped to, from the release's tensors.

    Args:
      entries: the table for the model.
      tensors: arrays by the release's names; every one has to be used.
      abstract: the wanted parameters as a tree of anything with a shape (`jax.eval_shape` of the model's init).
      unused: regular expression of whole names that such files hold and the model has no use for.

    Raises: InputError that lists names that are missing or left over on either side, or tensors of a wrong shape.
    """
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    theirs = [name for entry in entries for name in _names(entry)]
    if unused is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(unused, name)}
    _require_same("tensors", theirs, tensors)
    _require_same("parameters", [entry.ours for entry in entries], wanted)
    given, taken = (sum(math.prod(array.shape) for array in arrays.values()) for arrays in (tensors, wanted))
    if taken > 2 * given:  # before memory is taken for what cannot fit; smaller differences are told tensor by tensor below
        raise InputError(f"the tensors hold {given:,} numbers, the model takes {taken:,}")
    params = {}
    for entry in entries:
        shape = tuple(wanted[entry.ours].shape)
        shape = shape if entry.layers is None else shape[1:]
        params[entry.ours] = array = np.empty(wanted[entry.ours].shape, np.float32)
        for names, part in zip(_names_by_layer(entry), [array] if entry.layers is None else array, strict=True):
            part[...] = _to_ours(entry, [tensors[name] for name in names], shape, names)  # layer by layer: memory for one more
    return traverse_util.unflatten_dict(params, sep="/")


def to_release(entries: list[Entry], params: dict) -> dict[str, np.ndarray]:
    """The release's tensors from our parameters (or anything of their shapes, gradients say). The inverse of from_release."""
    flat = traverse_util.flatten_dict(params, sep="/")
    _require_same("parameters", [entry.ours for entry in entries], flat)
    tensors = {}
    for entry in entries:
        array = np.asarray(flat[entry.ours])
        copies = [array] if entry.layers is None else list(array)
        for names, copy in zip(_names_by_layer(entry), copies, strict=True):
            tensors.update(zip(names, entry.layout.to_theirs(copy), strict=True))
    return tensors


def _names_by_layer(entry: Entry) -> list[tuple[str, ...]]:
    if entry.layers is None:
        return [entry.theirs]
    return [tuple(name.replace("{i}", str(i)) for name in entry.theirs) for i in range(entry.layers)]


def _names(entry: Entry) -> list[str]:
    return [name for names in _names_by_layer(entry) for name in names]


def _to_ours(entry: Entry, tensors: list[np.ndarray], shape: tuple[int, ...], names: tuple[str, ...]) -> np.ndarray:
    expected = [x.shape for x in entry.layout.to_theirs(np.broadcast_to(np.float32(0), shape))]
    for name, tensor, wanted in zip(names, tensors, expected, strict=True):
        if tensor.shape != wanted:
            raise InputError(f"{name} has the shape {tensor.shape}, the model takes {wanted}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(f"{name} holds {tensor.dtype}, not floating-point numbers")
    return entry.layout.to_ours(tensors, shape)


def _require_same(kind: str, table: list[str], given: Mapping) -> None:
    missing, left_over = sorted(set(table) - set(given)), sorted(set(given) - set(table))
    if missing or left_over:
        parts = [f"{len(names)} {word} ({', '.join(name[:100] for name in names[:8])}{' ...' if len(names) > 8 else ''})"
                 for names, word in ((missing, "missing"), (left_over, "left over")) if names]  # fmt: skip
        raise InputError(f"the {kind} do not fit the model: {'; '.join(parts)}")
