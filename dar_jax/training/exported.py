"""A checkpoint as a folder to publish: the moving average of the weights as safetensors, and its description as JSON.

The folder holds `model.safetensors`, float32 arrays by the names of the network's parameters; `files.json`, as `integrity` has
it; and, written last, `dar_jax.json`, which makes it a checkpoint. A transformer's has its tokenizer in `tokenizer`.
"""

import shutil
from typing import Any

import jax
import numpy as np
import safetensors
from etils import epath
from flax import traverse_util
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from dar_jax import parallel
from dar_jax.files import replacing, size_of, write_json
from dar_jax.training.integrity import CHECKSUMS, checksum_of_file
from dar_jax.training.state import Params

DESCRIPTION = "dar_jax.json"
WEIGHTS = "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(bfloat16)}


def is_exported(folder: epath.Path) -> bool:
    """True for a complete folder of `write`."""
    return (folder / DESCRIPTION).is_file()


def write(folder: epath.Path, params: Params, description: dict[str, Any]) -> int:
    """Writes host arrays and the description of their checkpoint, JSON-able. Returns the number of tensors."""
    arrays = {name: np.ascontiguousarray(array) for name, array in traverse_util.flatten_dict(params, sep="/").items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(arrays, temporary, {"format": "np"})
    size, checksum = size_of(folder / WEIGHTS), checksum_of_file(folder / WEIGHTS)
    write_json(folder / CHECKSUMS, {"ema": {WEIGHTS: [size, checksum]}})
    shutil.copymode(folder / CHECKSUMS, folder / WEIGHTS)  # safetensors makes files that only their owner reads
    write_json(folder / DESCRIPTION, description)
    return len(arrays)


def shapes(folder: epath.Path) -> Any:
    """The parameters as a tree of ShapeDtypeStructs. Raises whatever a damaged file makes safetensors raise."""
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        flat = {name: jax.ShapeDtypeStruct(each.get_shape(), DTYPES[each.get_dtype()]) for name, each in slices.items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def read(folder: epath.Path, shardings: Any) -> Params:
    """The parameters, one after the other onto a tree of shardings."""
    with safetensors.safe_open(folder / WEIGHTS, framework="numpy") as file:
        flat = {
            name: parallel.put(file.get_tensor(name), sharding)
            for name, sharding in traverse_util.flatten_dict(shardings, sep="/").items()
        }
    return traverse_util.unflatten_dict(flat, sep="/")
