"""The identity of a result that is written piece by piece, so that an interrupted run does not go on with anything else.

The identity of a result is JSON-able data: SHA-256 of weights, images and code, and every setting as it is. It is kept in
`identity.json` beside the pieces and compared completely. The division of the work (batch size, mesh, hosts) is no part of it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dar_jax import __version__
from dar_jax.data.codes import fingerprint
from dar_jax.data.sources import FolderSource, Source
from dar_jax.errors import InputError
from dar_jax.files import write_json
from dar_jax.inference.trained import Trained
from dar_jax.parallel import hosts
from dar_jax.training.checkpoint import absolute

FILE = "identity.json"
TAIL = 4096  # last bytes of an image file that are hashed: there PNG keeps a checksum of all pixels
PROBES = 64  # images of another source that are hashed
THREADS = 16  # for reading image files
STANDARD_LIBRARY = sysconfig.get_path("stdlib")
SHOWN = 3  # differences in a message
LONGEST = 32  # characters of a value in a message


def of_model(trained: Trained) -> dict[str, Any]:
    """The identity of a model: weights, networks with all their settings, class names, and the version of this package.

    Where parameters are sharded over several processes, all of them have to call it.
    """
    weights = {name: fingerprint(params) for name, params in trained.params.items() if params}
    class_names = list(trained.class_names)
    return {"weights": weights, "networks": describe(trained.networks), "class_names": class_names, "dar_jax": __version__}


def of_source(source: Source) -> dict[str, Any]:
    """The identity of a data set: its classes, and its images' names, labels and contents.

    Reading all images would take as long as the work itself. So the size and the last 4 KB of image files count (another file
    that is equal in both goes unnoticed), and 64 evenly spread images of other sources.
    """
    images, class_names = len(source), list(source.class_names)
    if isinstance(source, FolderSource):
        parts = (range(start, min(start + 1000, images)) for start in range(0, images, 1000))
        with ThreadPoolExecutor(THREADS) as threads:
            contents = list(threads.map(lambda indices: digest([_file(source, index) for index in indices]), parts))
    else:
        indices = np.unique(np.linspace(0, images - 1, PROBES).astype(int)).tolist()
        contents = [describe(source[index]) for index in indices]
    return {"kind": _code(type(source)), "images": images, "class_names": class_names, "contents": digest(contents)}


def describe(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Settings, modules and arrays as JSON-able data. Arrays and code become SHA-256, objects their class, functions with what
    they captured.

    Args: within, the ids of functions that are being described, which may capture themselves.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item, within) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item, within) for item in value]
    if isinstance(value, functools.partial):
        return describe([value.func, value.args, value.keywords], within)
    function = inspect.unwrap(value)
    if isinstance(function, types.FunctionType) and id(function) not in within and (captured := _captured(function)):
        return [_code(value), describe(captured, (*within, id(function)))]
    if isinstance(value, np.dtype):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name")]  # Flax's own
        return {"class": _code(type(value)), **{name: describe(getattr(value, name), within) for name in names}}
    if isinstance(getattr(value, "dtype", None), np.dtype):  # an array, or a type such as jnp.float32
        return fingerprint({"": value}) if hasattr(value, "shape") else value.dtype.name
    return _code(value if hasattr(value, "__qualname__") else type(value))


def _captured(function: types.FunctionType) -> dict[str, Any]:
    """The values of variables around a function that it uses, by name, and its defaults."""
    found = dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    return found


def claim(folder: str | os.PathLike, identity: Mapping[str, Any], pieces: str) -> None:
    """Writes the identity of a result into its folder, or compares it with that of the pieces that are there.

    With several hosts, which share the folder, the first writes and all compare.

    Args:
      pieces: pattern of the pieces' names.

    Raises InputError, which names what differs, where the folder holds pieces of another result, or does not say of which.
    """
    folder = absolute(folder)
    path = folder / FILE
    if hosts.first() and not path.exists():
        if folder.exists() and any(folder.glob(pieces)):
            raise InputError(f"{folder} holds pieces and no {FILE}, which says of what; delete it, or choose another place")
        write_json(path, identity)
    hosts.wait(f"{FILE} is there")
    try:
        there = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}); delete {folder}, or choose another place") from error
    if differing := list(_differences(there, json.loads(json.dumps(identity)))):
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise InputError(
            f"{folder} was begun with something else, {', '.join(differing[:SHOWN])}{more}; delete it, or choose another place"
        )


def digest(value: Any) -> str:
    """SHA-256 (hex) of JSON-able data, whatever the order of names."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file(source: FolderSource, index: int) -> list[Any]:
    """Name, label, size and SHA-256 of the end of an image file."""
    path, label = source.encoded(index)
    size = tail = None  # of an unreadable file, and of a pipe, which would wait for a writer
    with contextlib.suppress(OSError):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - TAIL))
                tail = hashlib.sha256(file.read(TAIL)).hexdigest()
    return [os.path.relpath(path, source.folder), label, size, tail]


def _code(value: Any) -> str:
    """The name of a class or function, for the user's own with the SHA-256 of all Python files loaded from its folder.

    Installed packages are known by name only.
    """
    name, module = f"{value.__module__}.{value.__qualname__}", sys.modules.get(value.__module__)
    if not _is_users(module):
        return name
    folder = Path(module.__file__).resolve().parent
    files = {Path(other.__file__).resolve() for other in list(sys.modules.values()) if _is_users(other)}
    hashes = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(files) if file.is_relative_to(folder)]
    return f"{name} {hashlib.sha256(b''.join(hashes)).hexdigest()}"


def _is_users(module: Any) -> bool:
    """True for a module that was loaded from a file that belongs neither to this package nor to an installed one."""
    if not getattr(module, "__file__", None) or module.__name__.partition(".")[0] == "dar_jax":
        return False
    file = Path(module.__file__).absolute()
    installed = not {"site-packages", "dist-packages"}.isdisjoint(file.parts) or file.is_relative_to(STANDARD_LIBRARY)
    return file.is_file() and not installed


def _differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """The paths at which two JSON values differ, a line each."""
    if isinstance(there, (dict, list)) and type(there) is type(here):
        there, here = (dict(enumerate(value)) if isinstance(value, list) else value for value in (there, here))
        for name in there | here:
            yield from _differences(there.get(name), here.get(name), f"{path}.{name}".lstrip("."))
    elif there != here:
        texts = [json.dumps(value) for value in (there, here)]
        there, here = (text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..." for text in texts)
        yield f"{path}: {there} there, {here} here"
