"""Parameters from and to the release's tensors, by the table in `names`."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dar_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the release stores one parameter.

    to_ours: (tensors, shape of ours without the axis of layers) -> array. to_theirs: array -> tensors, the inverse.
    """

    to_ours: Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]
    to_theirs: Callable[[np.ndarray], list[np.ndarray]]


def matrix(inputs: int = 1, ones: int = 0) -> Layout:
    """[out, in] there, [in..., out...] here. inputs: how many of our axes are inputs. ones: axes of size 1 at their end."""

    def to_theirs(array):
        transposed = array.reshape(math.prod(array.shape[:inputs]), -1).T
        return [transposed.reshape(transposed.shape + (1,) * ones)]

    return Layout(lambda tensors, shape: tensors[0].reshape(tensors[0].shape[:2]).T.reshape(shape), to_theirs)


def _split_heads(tensors, shape):
    width, kv_heads, rows, size = shape
    q, k, v = np.split(tensors[0].T, [(rows - 2) * kv_heads * size, (rows - 1) * kv_heads * size], axis=1)
    parts = [q.reshape(width, kv_heads, rows - 2, size), *(x.reshape(width, kv_heads, 1, size) for x in (k, v))]
    return np.concatenate(parts, axis=2)


def _fuse_heads(array):
    parts = [array[:, :, :-2], array[:, :, -2], array[:, :, -1]]
    return [np.concatenate([x.reshape(len(array), -1) for x in parts], axis=1).T]


SAME = Layout(lambda tensors, shape: tensors[0], lambda array: [array])
# One axis there, one or several here (biases of heads).
FLAT = Layout(lambda tensors, shape: tensors[0].reshape(shape), lambda array: [array.reshape(-1)])
# [out, in, rows, columns] there, [rows, columns, in, out] here.
CONVOLUTION = Layout(lambda tensors, shape: tensors[0].transpose(2, 3, 1, 0), lambda array: [array.transpose(3, 2, 0, 1)])
# All query heads, then all keys, then all values there; grouped by key/value head here: [D, M, R + 2, K].
FUSED_HEADS = Layout(_split_heads, _fuse_heads)
# Two matrices [out, in] there, one [in, 2, out] here.
PAIR = Layout(lambda tensors, shape: np.stack([x.T for x in tensors], axis=1), lambda array: [array[:, 0].T, array[:, 1].T])


@dataclasses.dataclass(frozen=True)
class Entry:
    """Their name(s), the path of our parameter, and the layout. `layers` counts the copies that `{i}` runs over."""

    theirs: tuple[str, ...]
    ours: str
    layout: Layout
    layers: int | None = None


def prefixed(theirs: str, ours: str, table: list[tuple], layers: int | None = None) -> list[Entry]:
    """Entries from rows (their name or names, our path, layout), with a prefix for the names on each side."""
    rows = [((names,) if isinstance(names, str) else names, path, layout) for names, path, layout in table]
    return [Entry(tuple(theirs + name for name in names), ours + path, layout, layers) for names, path, layout in rows]


def linear(theirs: str, ours: str, inputs: int = 1, ones: int = 0, bias: bool = True) -> list[tuple]:
    """The rows of a linear, which is a 1x1 convolution there if `ones` is 2; see `matrix`."""
    weight = [(f"{theirs}.weight", f"{ours}/kernel", matrix(inputs, ones))]
    return weight + ([(f"{theirs}.bias", f"{ours}/bias", FLAT)] if bias else [])


def norm(theirs: str, ours: str) -> list[tuple]:
    """The rows of an affine norm."""
    return [(f"{theirs}.weight", f"{ours}/scale", SAME), (f"{theirs}.bias", f"{ours}/bias", SAME)]


def from_release(entries: list[Entry], tensors: Mapping[str, np.ndarray], abstract: dict, unused: str | None = None) -> dict:
    """Converts the release's tensors to our parameters: float32 copies, whatever file the tensors are mapped to.

    Args:
      entries: the table for the model.
      tensors: arrays by the release's names; every one has to be used.
      abstract: the parameters' shapes, as a tree of anything with a shape (`jax.eval_shape` of the model's init).
      unused: regular expression of whole names that such files hold and the model has no use for.

    Raises: InputError that lists names that are missing or left over on either side, or tensors of a wrong shape.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}
    if unused is not None:
        tensors = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(unused, name)}
    _require_same("tensors", [name for entry in entries for names in _names_by_layer(entry) for name in names], tensors)
    _require_same("parameters", [entry.ours for entry in entries], shapes)
    stored, needed = sum(tensor.size for tensor in tensors.values()), sum(map(math.prod, shapes.values()))
    if needed > 2 * stored:  # before memory is allocated for what cannot fit; smaller differences are named per tensor below
        raise InputError(f"the tensors hold {stored:,} numbers, the model takes {needed:,}")
    params = {}
    for entry in entries:
        params[entry.ours] = array = np.empty(shapes[entry.ours], np.float32)
        for names, part in zip(_names_by_layer(entry), [array] if entry.layers is None else array, strict=True):
            layer = [tensors[name] for name in names]
            expected = entry.layout.to_theirs(np.broadcast_to(np.float32(0), part.shape))
            for name, tensor, example in zip(names, layer, expected, strict=True):
                if tensor.shape != example.shape:
                    raise InputError(f"{name} has the shape {tensor.shape}, the model takes {example.shape}")
                if not jnp.issubdtype(tensor.dtype, jnp.floating):
                    raise InputError(f"{name} holds {tensor.dtype}, not floating-point numbers")
            part[...] = entry.layout.to_ours(layer, part.shape)  # layer by layer: memory for one more
    return traverse_util.unflatten_dict(params, sep="/")


def to_release(entries: list[Entry], params: dict) -> dict[str, np.ndarray]:
    """The release's tensors from our parameters (or anything of their shapes, gradients say). The inverse of from_release."""
    flat = traverse_util.flatten_dict(params, sep="/")
    _require_same("parameters", [entry.ours for entry in entries], flat)
    tensors = {}
    for entry in entries:
        array = np.asarray(flat[entry.ours])
        for names, part in zip(_names_by_layer(entry), [array] if entry.layers is None else array, strict=True):
            tensors.update(zip(names, entry.layout.to_theirs(part), strict=True))
    return tensors


def _names_by_layer(entry: Entry) -> list[tuple[str, ...]]:
    if entry.layers is None:
        return [entry.theirs]
    return [tuple(name.replace("{i}", str(i)) for name in entry.theirs) for i in range(entry.layers)]


def _require_same(kind: str, expected: list[str], actual: Mapping) -> None:
    missing, left_over = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    if missing or left_over:
        parts = [f"{len(names)} {word} ({', '.join(name[:100] for name in names[:8])}{' ...' if len(names) > 8 else ''})"
                 for names, word in ((missing, "missing"), (left_over, "left over")) if names]  # fmt: skip
        raise InputError(f"the {kind} do not fit the model: {'; '.join(parts)}")
