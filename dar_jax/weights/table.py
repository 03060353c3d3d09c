"""Parameters from and to the release's tensors, by the table in `names`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dar_jax.errors import InputError


class Layout(Protocol):
    """How one parameter is stored by the release. `shape` is ours, without the axis of layers."""

    def to_ours(self, tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray: ...

    def to_theirs(self, array: np.ndarray) -> list[np.ndarray]: ...


class Same:
    """The same axes."""

    def to_ours(self, tensors, shape):
        return tensors[0]

    def to_theirs(self, array):
        return [array]


class Flat:
    """One axis there, one or several here (biases of heads)."""

    def to_ours(self, tensors, shape):
        return tensors[0].reshape(shape)

    def to_theirs(self, array):
        return [array.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """[out, in] there, [in..., out...] here; `inputs` is how many of our axes are inputs, `ones` how many axes of size 1
    theirs has at the end (1x1 convolutions)."""

    inputs: int = 1
    ones: int = 0

    def to_ours(self, tensors, shape):
        return tensors[0].reshape(tensors[0].shape[:2]).T.reshape(shape)

    def to_theirs(self, array):
        matrix = array.reshape(int(np.prod(array.shape[: self.inputs])), -1).T
        return [matrix.reshape(matrix.shape + (1,) * self.ones)]


class Convolution:
    """[out, in, rows, columns] there, [rows, columns, in, out] here."""

    def to_ours(self, tensors, shape):
        return tensors[0].transpose(2, 3, 1, 0)

    def to_theirs(self, array):
        return [array.transpose(3, 2, 0, 1)]


class FusedHeads:
    """All query heads, then all keys, then all values there; grouped by key/value head here: [D, M, R + 2, K]."""

    def to_ours(self, tensors, shape):
        width, kv_heads, rows, size = shape
        q, k, v = np.split(tensors[0].T, [(rows - 2) * kv_heads * size, (rows - 1) * kv_heads * size], axis=1)
        parts = [q.reshape(width, kv_heads, rows - 2, size), *(x.reshape(width, kv_heads, 1, size) for x in (k, v))]
        return np.concatenate(parts, axis=2)

    def to_theirs(self, array):
        parts = [array[:, :, :-2], array[:, :, -2], array[:, :, -1]]
        return [np.concatenate([x.reshape(len(array), -1) for x in parts], axis=1).T]


class Pair:
    """Two matrices [out, in] there, one [in, 2, out] here."""

    def to_ours(self, tensors, shape):
        return np.stack([x.T for x in tensors], axis=1)

    def to_theirs(self, array):
        return [array[:, 0].T, array[:, 1].T]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Their name(s), the path of our parameter, and the layout. `layers` counts the copies that `{i}` runs over."""

    theirs: tuple[str, ...]
    ours: str
    layout: Layout
    layers: int | None = None


def prefixed(theirs: str, ours: str, table: list[tuple], layers: int | None = None) -> list[Entry]:
    """Entries from rows (their name or names, our path, layout), with what stands before the names on each side."""

    def names(name):
        return tuple(theirs + n for n in ((name,) if isinstance(name, str) else name))

    return [Entry(names(name), ours + path, layout, layers) for name, path, layout in table]


def linear(theirs: str, ours: str, ones: int = 0, bias: bool = True) -> list[tuple]:
    """The rows of a linear, which is a 1x1 convolution there if `ones` is 2."""
    weight = [(f"{theirs}.weight", f"{ours}/kernel", Matrix(ones=ones))]
    return weight + ([(f"{theirs}.bias", f"{ours}/bias", Flat())] if bias else [])


def norm(theirs: str, ours: str) -> list[tuple]:
    """The rows of an affine norm."""
    return [(f"{theirs}.weight", f"{ours}/scale", Same()), (f"{theirs}.bias", f"{ours}/bias", Same())]


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
