"""PyTorch's files, read and written without PyTorch and without trusting them.

Such a file is a pickle that describes objects, and raw storages with the numbers of its tensors. The pickle is never run:
`pickletools` takes it apart into opcodes, and `_unpickle` follows only those that build plain data; the few functions it may
name are looked up in a table here, never imported. Storages are mapped into memory: tensors cost nothing until they are used.

Three containers are read: the zip archive of today's `torch.save` and of TorchScript, the older stream of pickles followed by
storages, and a bare pickle (of NumPy arrays, as JAX ports of weights use).
"""

import dataclasses
import io
import math
import mmap
import os
import pickletools
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dar_jax.errors import InputError, require
from dar_jax.files import replacing

STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format
MAX_STEPS = 500_000  # of a pickle: opcodes and copied items; the files this is for need about a hundred thousand
MAX_DEPTH = 100  # of dicts, lists and tuples within each other
MAX_REPEATS = 8  # tensors may share storage, but not claim more than this many times the file's size
MAX_RANK = 32
MAX_DIRECTORY = 1 << 20  # bytes of a zip archive's list of entries, which needs less than a hundred an entry
MAX_NAME = 500  # characters
MAX_ARGUMENTS = 8  # of a call
DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
NUMPY_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


class Record(dict):
    """The attributes of an object whose class is not constructed: argparse.Namespace, the release's Config, a module."""


def read(path: str | os.PathLike) -> Any:
    """The contents of a file of PyTorch (or of a pickle of NumPy arrays), as plain data.

    Returns dicts, lists, tuples, numbers, strings, `Record`s, and for tensors read-only NumPy arrays that are mapped to the
    file (bfloat16 is that of ml_dtypes). A TorchScript archive gives a flat dict: its modules' tensors by their dotted names
    and its constants as CONSTANTS.c0, CONSTANTS.c1, ... What is returned is a tree without cycles, not deeper than MAX_DEPTH
    and with at most MAX_STEPS values, so that it can be walked through, copied and printed.

    Raises InputError where the file names anything but known harmless types, is damaged, or is something else; OSError where it
    cannot be opened.
    """
    with _File(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise InputError(f"{path} is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return _read(file, mapped)
        except InputError as error:
            raise InputError(f"{path}: {_one_line(error)}") from error
        except Exception as error:  # whatever parsing a hostile file may raise
            reason = f"{type(error).__name__}: {_one_line(error)}"
            raise InputError(f"{path} is damaged or no file of PyTorch ({reason})") from error


def write(path: str | os.PathLike, contents: Any) -> None:
    """Writes dicts, lists, tuples, strings, numbers and NumPy arrays as a zip archive, whole or not at all.

    `torch.load(path, weights_only=True)` reads it back, arrays as tensors of the same dtype. Array by array is written, so a
    mapping that makes its arrays when they are asked for is never in memory as a whole.

    Raises TypeError for anything else.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        pickle = _Pickle(lambda key, array: _store(archive, f"archive/data/{key}", array))
        pickle.save(contents)
        _store(archive, "archive/data.pkl", np.frombuffer(pickle.finish(), np.uint8))
        _store(archive, "archive/byteorder", np.frombuffer(b"little", np.uint8))
        _store(archive, "archive/version", np.frombuffer(b"3\n", np.uint8))


class _File(io.FileIO):
    """A file that does not let `zipfile` read more at a time than a list of entries may take."""

    def read(self, size: int = -1) -> bytes:
        require(size <= MAX_DIRECTORY, "its list of entries has no end")
        return super().read(size)


def _one_line(error: Exception) -> str:
    """The message of an error, which may quote names from a hostile file."""
    return "".join(character if character.isprintable() else "?" for character in str(error)[:200])


def _read(file: BinaryIO, mapped: mmap.mmap) -> Any:
    if mapped[:4] == b"PK\x03\x04":
        return _read_zip(zipfile.ZipFile(file), mapped)
    if mapped[:1] != b"\x80":
        raise InputError("neither a zip archive nor a pickle; this is no file of PyTorch")
    first = _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)))
    if isinstance(first, int) and first == STREAM_MAGIC:
        return _read_stream(mapped)
    require(mapped.tell() == len(mapped), f"{len(mapped) - mapped.tell()} bytes follow the pickle")
    return first


# --- containers ------------------------------------------------------------------------------------------------------------


def _read_zip(archive: zipfile.ZipFile, mapped: mmap.mmap) -> Any:
    entries = {info.filename: info for info in archive.infolist()}
    require(len(entries) == len(archive.infolist()), "two entries have the same name")
    # Entries that overlap would let a small file keep the checksums busy for ever.
    require(sum(info.compress_size for info in entries.values()) <= len(mapped), "its entries are larger than the file")
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    require(len(pickles) == 1, f"the archive has {len(pickles)} files data.pkl, not one")
    root = pickles[0].removesuffix("data.pkl")
    tensors = _Tensors(len(mapped))

    def content(name: str) -> memoryview:
        require(root + name in entries, f"{name} is missing")
        return _stored(entries[root + name], mapped)

    if root + "byteorder" in entries:
        require(content("byteorder") == b"little", "it was written on a big-endian machine")

    def load(name: str, folder: str, torchscript: bool) -> Any:
        loaded: dict[str, memoryview] = {}

        def storage(dtype: np.dtype, key: str, count: int) -> memoryview:
            if key not in loaded:
                loaded[key] = content(f"{folder}/{key}")
            require(len(loaded[key]) == count * dtype.itemsize, f"storage {key} has {len(loaded[key])} bytes, not as announced")
            return loaded[key]

        operations = pickletools.genops(io.BytesIO(content(name)))
        return _unpickle(operations, tensors.of(storage), torchscript)

    if root + "constants.pkl" not in entries:
        return load("data.pkl", "data", torchscript=False)
    constants = load("constants.pkl", "constants", torchscript=True)
    named = {f"CONSTANTS.c{i}": value for i, value in enumerate(_only(tuple, constants)) if isinstance(value, np.ndarray)}
    return _tensors_by_name(load("data.pkl", "data", torchscript=True)) | named


def _stored(info: zipfile.ZipInfo, mapped: mmap.mmap) -> memoryview:
    """The bytes of an entry, in place. Archives of PyTorch are not compressed, so an entry cannot be larger than the file."""
    name = info.filename
    require(info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1, f"{name} is compressed or encrypted")
    require(info.compress_size == info.file_size, f"{name} has two sizes")
    require(info.header_offset >= 0, f"{name} is not where the archive says")
    header = mapped[info.header_offset : info.header_offset + 30]
    require(len(header) == 30 and header[:4] == b"PK\x03\x04", f"{name} is not where the archive says")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    require(start + info.file_size <= len(mapped), f"{name} reaches beyond the end of the file")
    content = memoryview(mapped)[start : start + info.file_size]
    # PyTorch can be told to write no checksums; they are zero then.
    require(info.CRC in (0, zlib.crc32(content)), f"{name} does not have its checksum, the file is damaged")
    return content


def _read_stream(mapped: mmap.mmap) -> Any:
    """The older format: magic number, version, machine, contents, list of storages, each a pickle; then the storages."""
    version, machine = (_unpickle(pickletools.genops(mapped), _Tensors(len(mapped))) for _ in range(2))
    require(isinstance(version, int) and version == 1001, "this version of the format is not known")
    require(_only(dict, machine).get("little_endian") is True, "it was written on a big-endian machine")
    start = mapped.tell()

    # The contents name storages that come after them, whose places follow from their types: so they are gone through twice.
    announced: dict[str, tuple[np.dtype, int]] = {}

    def announce(dtype: np.dtype, key: str, count: int) -> None:
        require(announced.setdefault(key, (dtype, count)) == (dtype, count), f"storage {key} is announced in two ways")

    _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)).of(announce))
    keys = _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)))
    require(isinstance(keys, list) and all(isinstance(key, str) for key in keys), "the list of storages is none")
    require(sorted(keys) == sorted(announced), "the list of storages does not fit the contents")
    storages, position = {}, mapped.tell()
    for key in keys:
        dtype, count = announced[key]
        require(mapped[position : position + 8] == struct.pack("<q", count), f"storage {key} has not the announced size")
        position += 8 + count * dtype.itemsize
        require(position <= len(mapped), f"storage {key} reaches beyond the end of the file")
        storages[key] = memoryview(mapped)[position - count * dtype.itemsize : position]
    require(position == len(mapped), f"{len(mapped) - position} bytes follow the last storage")
    mapped.seek(start)
    return _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)).of(lambda dtype, key, count: storages[key]))


def _tensors_by_name(module: Any) -> dict[str, np.ndarray]:
    """The tensors of a tree of modules by dotted names."""
    tensors, pending = {}, [("", module)]
    while pending:
        name, value = pending.pop()
        require(len(name) <= MAX_NAME, "a name of a tensor has no end")
        if isinstance(value, np.ndarray):
            require(name not in tensors, "two tensors have the same name")
            tensors[name] = value
        elif isinstance(value, Record):
            pending.extend((f"{name}.{key}".lstrip("."), item) for key, item in reversed(value.items()))
    return tensors


# --- reading a pickle ------------------------------------------------------------------------------------------------------


class _Global(str):
    """The name of something that a pickle refers to."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
    """The numbers of one or more tensors."""

    dtype: np.dtype
    content: memoryview | None  # bytes; None where their place in the file is not known yet


class _Tensors:
    """Makes arrays of storages. All tensors of a file together are limited to a multiple of its size."""

    def __init__(self, file_size: int):
        self.left = MAX_REPEATS * file_size
        self.content: Callable[[np.dtype, str, int], memoryview | None] | None = None

    def of(self, content: Callable[[np.dtype, str, int], memoryview | None]) -> "_Tensors":
        """Sets where storages come from: (dtype, key, number of elements) -> bytes, or None where they are not yet known."""
        self.content = content
        return self

    def spend(self, size: int) -> None:
        self.left -= size
        require(self.left >= 0, f"its contents claim more than {MAX_REPEATS} times the size of the file")

    def open(self, identity: Any) -> _Storage:
        """The storage that a persistent id of a pickle names, ("storage", type, key, device, elements[, view])."""
        require(self.content is not None and isinstance(identity, tuple) and len(identity) in (5, 6), "unknown persistent id")
        tag, kind, key, _, count, *view = identity
        kind = kind.removeprefix("torch.") if isinstance(kind, _Global) else None
        require(isinstance(tag, str) and tag == "storage" and kind in DTYPES, "a storage is of no known type")
        require(isinstance(key, str) and _is_size(count), "a storage has no proper name and size")
        dtype = DTYPES[kind]
        content = self.content(dtype, key, count)
        if view and view[0] is not None:
            _, offset, length = _only(tuple, view[0])
            require(_is_size(offset) and _is_size(length) and offset + length <= count, "a storage reaches beyond its end")
            content = content and content[offset * dtype.itemsize : (offset + length) * dtype.itemsize]
        return _Storage(dtype, content)

    def rebuild(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray | None:
        """A tensor in a storage; offset and strides count elements."""
        # A tensor in place of a storage would be dangerous: it can have more elements than there are bytes behind it.
        storage = _only(_Storage, storage)
        require(len(_only(tuple, size)) == len(_only(tuple, stride)) <= MAX_RANK, "a tensor has no proper shape")
        require(all(map(_is_size, (offset, *size, *stride))), "a tensor has no proper shape")
        if storage.content is None:
            return None
        itemsize, count = storage.dtype.itemsize, math.prod(size)
        if count == 0:
            return np.zeros(size, storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        require(last < len(storage.content) // itemsize, "a tensor reaches beyond the end of its storage")
        self.spend(count * itemsize)
        strides = [step * itemsize if n > 1 else 0 for n, step in zip(size, stride)]
        array = np.ndarray(size, storage.dtype, storage.content, offset * itemsize, strides)
        # NumPy relies on that when it counts truth values and indexes with them.
        require(array.dtype != bool or array.view(np.uint8).max() <= 1, "a truth value is neither 0 nor 1")
        return array

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Bytes, as protocol 2 stores them: `_codecs.encode(text, "latin1")`."""
        require(_only(str, encoding) == "latin1", "it has bytes of no known encoding")
        self.spend(len(_only(str, text)))
        return text.encode("latin1")


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62


class _NumpyArray:
    """A NumPy array of which the pickle has not said yet what it holds."""

    value: np.ndarray | None = None

    def set(self, state: Any) -> None:
        _, shape, dtype, fortran, content = _only(tuple, state)
        self.value = _only(_NumpyDtype, dtype).array(content, shape, "F" if fortran is True else "C")


class _NumpyDtype:
    """A NumPy dtype of plain numbers, little-endian."""

    def __init__(self, name: Any, *_: Any):
        require(_only(str, name) in NUMPY_DTYPES, f"NumPy arrays of type {name[:100]} are not read")
        self.value = np.dtype(f"<{name}")

    def set(self, state: Any) -> None:
        require(_only(str, _only(tuple, state)[1]) in ("<", "|"), "a NumPy array is big-endian")

    def array(self, content: Any, shape: Any, order: str = "C") -> np.ndarray:
        require(isinstance(content, bytes), "a NumPy array has no content")
        require(len(_only(tuple, shape)) <= MAX_RANK and all(map(_is_size, shape)), "a NumPy array has no proper shape")
        return np.frombuffer(content, self.value).reshape(shape, order=order)


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
# What a pickle may call, and what is done instead.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): {_key(key): item for key, item in _only(list | tuple, pairs)},
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": lambda size: tuple(_only(list | tuple, size)),
    "torch.device": lambda *device: device,
    "__builtin__.bytes": lambda: b"",  # how protocol 2 stores no bytes
    "numpy.dtype": _NumpyDtype,
    **{f"{module}._reconstruct": lambda *_: _NumpyArray() for module in _NUMPY},
    **{f"{module}.scalar": lambda dtype, content: _only(_NumpyDtype, dtype).array(content, ()).item() for module in _NUMPY},
}
_TORCHSCRIPT_CALLS = {f"torch.jit._pickle.{name}": lambda items, *_: items for name in _LISTS}
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_RECORDS = ("argparse.Namespace", "config_util.Config")
_SCALARS = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_VALUES = (*(f"torch.{name}" for name in (*DTYPES, *_SCALARS)), "numpy.ndarray")  # named, never called
_LEAVES = (bool, int, float, str, bytes, np.ndarray, types.NoneType)


def _unpickle(operations: Any, tensors: _Tensors, torchscript: bool = False) -> Any:
    """What a pickle describes, built of plain data. Anything it names that is not in the tables above is refused.

    Values of a hostile pickle are neither hashed, compared nor printed before their type is known: tuples of tuples that share
    their parts can make each of these take for ever.
    """
    calls = _CALLS | dict.fromkeys(_REBUILD, tensors.rebuild) | {"_codecs.encode": tensors.encode}
    calls |= _TORCHSCRIPT_CALLS if torchscript else {}
    steps = 0
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def step(count: int = 1) -> None:
        nonlocal steps
        steps += count
        require(steps <= MAX_STEPS, "its description of the contents has no end")

    def is_record(name: str) -> bool:
        return name in _RECORDS or (torchscript and name.startswith("__torch__."))

    def named(name: str) -> _Global:
        if name not in calls and name not in _VALUES and not is_record(name):
            raise InputError(f"refused, because it wants to use {name[:100]}, which is not needed for weights")
        return _Global(name)

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, value, _ in operations:
        step()
        match opcode.name:
            case "BINGET" | "LONG_BINGET":
                known = memo[value]
                stack.append(known.value if isinstance(known, _NumpyArray) else known)
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(value)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(value)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(value)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                start = len(stack) - {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}[opcode.name]
                require(start >= 0, "its pickle contradicts itself")
                stack[start:] = [tuple(stack[start:])]
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND":
                item = stack.pop()
                _only(list, stack[-1]).append(item)
            case "APPENDS":
                items = since_mark()
                _only(list, stack[-1]).extend(items)
            case "SETITEM":
                item = stack.pop()
                _only(dict, stack[-2]).update({_key(stack.pop()): item})
            case "SETITEMS":
                items = since_mark()
                _only(dict, stack[-1]).update({_key(key): item for key, item in zip(items[::2], items[1::2], strict=True)})
            case "GLOBAL":
                stack.append(named(".".join(value.split(" "))))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(named(f"{_only(str, stack.pop())}.{_only(str, name)}"))
            case "BINPERSID":
                stack.append(tensors.open(stack.pop()))
            case "NEWOBJ":
                require(len(_only(tuple, stack.pop())) == 0, "an object is not plain")
                require(isinstance(stack[-1], _Global) and is_record(stack[-1]), "an object is not plain")
                stack[-1] = Record()
            case "REDUCE":
                arguments = _only(tuple, stack.pop())
                require(isinstance(stack[-1], _Global) and stack[-1] in calls, "its pickle calls what cannot be called")
                require(len(arguments) <= MAX_ARGUMENTS, "its pickle contradicts itself")
                step(sum(len(argument) for argument in arguments if isinstance(argument, list | tuple)))
                stack[-1] = calls[stack[-1]](*arguments)
            case "BUILD":
                state = _only(dict | tuple, stack.pop())
                step(len(state))
                stack[-1] = _with_state(stack[-1], state)
            case "PROTO" | "FRAME":
                pass
            case "POP":
                stack.pop()
            case "STOP":
                require(len(stack) == 1, "its pickle contradicts itself")
                return _tree(stack[0])
            case name:
                raise InputError(f"refused, because its pickle uses {name}, which is not needed for weights")
    raise InputError("its description of the contents is cut short")


def _with_state(target: Any, state: dict | tuple) -> Any:
    if isinstance(target, Record):
        target.update(_only(dict, state))
    elif isinstance(target, _NumpyDtype):
        target.set(state)
    elif isinstance(target, _NumpyArray):
        target.set(state)
        return target.value
    else:  # an OrderedDict with attributes, of which state dicts have one: the versions of modules
        require(type(target) is dict and set(_only(dict, state)) <= {"_metadata"}, "an object is not plain")
    return target


def _tree(contents: Any) -> Any:
    """Refuses cycles, parts that are shared so often that they unfold to more than the file holds, and unfinished values."""
    pending, values = [(contents, 0)], 0
    while pending:
        value, depth = pending.pop()
        require(depth <= MAX_DEPTH, "its contents are nested without end")
        if isinstance(value, dict | list | tuple):
            values += len(value)
            require(values <= MAX_STEPS, "its contents have no end")
            parts = value.values() if isinstance(value, dict) else value
            pending.extend((part, depth + 1) for part in parts)
        else:
            require(isinstance(value, _LEAVES), "it contains what is neither a tensor nor plain data")
    return contents


def _only(kind: type | types.UnionType, value: Any) -> Any:
    require(isinstance(value, kind), f"its pickle contradicts itself: {type(value).__name__} in a wrong place")
    return value


def _key(key: Any) -> Any:
    # Hashing tuples within tuples can be made to take for ever; so can large numbers, chosen to have the same hash.
    proper = isinstance(key, str | bytes | None) or (isinstance(key, int) and 0 <= key < 2**16)
    require(proper, "a dict has keys that are neither text nor small numbers")
    return key


# --- writing ---------------------------------------------------------------------------------------------------------------


def _store(archive: zipfile.ZipFile, name: str, content: np.ndarray) -> None:
    """Adds the bytes of an array, from a multiple of 64 on, as PyTorch does it to be able to map them."""
    content = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
    info = zipfile.ZipInfo(name)
    info.file_size = content.size
    large = content.size * 1.05 > zipfile.ZIP64_LIMIT  # zipfile adds 20 bytes to the header then
    padding = -(archive.fp.tell() + 30 + len(name) + 4 + 20 * large) % 64
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w") as entry:
        entry.write(content.data)


class _Pickle:
    """Writes a pickle (protocol 2) opcode by opcode; arrays go through `store(key, array)`."""

    def __init__(self, store: Callable[[str, np.ndarray], None]):
        self.store = store
        self.out = io.BytesIO()
        self.out.write(b"\x80\x02")
        self.arrays = 0

    def finish(self) -> bytes:
        self.out.write(b".")
        return self.out.getvalue()

    def save(self, value: Any) -> None:
        write = self.out.write
        if value is None or isinstance(value, bool):
            write({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int) and -(2**31) <= value < 2**31:
            write(b"J" + struct.pack("<i", value))
        elif isinstance(value, int) and -(2**63) <= value < 2**63:
            write(b"\x8a\x08" + struct.pack("<q", value))
        elif isinstance(value, float):
            write(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            text = value.encode()
            write(b"X" + struct.pack("<I", len(text)) + text)
        elif isinstance(value, Mapping):
            write(b"}(")
            for key, item in value.items():
                self.save(key)
                self.save(item)
            write(b"u")
        elif isinstance(value, list):
            write(b"](")
            for item in value:
                self.save(item)
            write(b"e")
        elif isinstance(value, tuple):
            write(b"(")
            for item in value:
                self.save(item)
            write(b"t")
        elif isinstance(value, np.ndarray):
            self._save_array(value)
        else:
            raise TypeError(f"{type(value).__name__} cannot be written to a file of PyTorch")

    def _save_array(self, array: np.ndarray) -> None:
        kind = next((name for name, dtype in DTYPES.items() if dtype == array.dtype), None)
        if kind is None:
            raise TypeError(f"arrays of {array.dtype} cannot be written to a file of PyTorch")
        key, self.arrays = str(self.arrays), self.arrays + 1
        self.store(key, array)
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        write = self.out.write
        write(b"ctorch._utils\n_rebuild_tensor_v2\n((")  # a call, its arguments, the persistent id
        self.save("storage")
        write(f"ctorch\n{kind}\n".encode())
        self.save(key)
        self.save("cpu")
        self.save(array.size)
        write(b"tQ")
        self.save(0)
        self.save(array.shape)
        self.save(strides)
        write(b"\x89ccollections\nOrderedDict\n)RtR")  # needs no gradient, has no hooks
