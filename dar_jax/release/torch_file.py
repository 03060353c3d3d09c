"""PyTorch's files, read and written without PyTorch and without trusting them.

Such a file is a pickle that describes objects, and raw storages with the numbers of its tensors. The pickle is never run:
`pickletools` takes it apart into opcodes, and `_unpickle` follows only those that build plain data; the few functions it may
name are looked up in a table here, never imported. Storages are mapped into memory: tensors cost nothing until they are used.

Three containers are read: the zip archive of today's `torch.save` and of TorchScript, the older stream of pickles followed by
storages, and a bare pickle (of NumPy arrays, as JAX ports of weights use).
"""

import io
import math
import mmap
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dar_jax.errors import InputError
from dar_jax.files import replacing

STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format
MAX_OPCODES = 2_000_000  # the files this is for need about a hundred thousand
MAX_REPEATS = 8  # tensors may share storage, but not claim more than this many times the file's size
MAX_RANK = 32
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


class Record(dict):
    """The attributes of an object whose class is not constructed: argparse.Namespace, the release's Config, a module."""


def read(path: str | os.PathLike) -> Any:
    """The contents of a file of PyTorch (or of a pickle of NumPy arrays), as plain data.

    Returns dicts, lists, tuples, numbers, strings, `Record`s, and for tensors read-only NumPy arrays that are mapped to the
    file (bfloat16 is that of ml_dtypes). A TorchScript archive gives a flat dict: its modules' tensors by their dotted names
    and its constants as CONSTANTS.c0, CONSTANTS.c1, ...

    Raises InputError where the file names anything but known harmless types, is damaged, or is something else; OSError where it
    cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise InputError(f"{path} is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return _read(file, mapped)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except Exception as error:  # whatever parsing a hostile file may raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
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


def _read(file: BinaryIO, mapped: mmap.mmap) -> Any:
    if mapped[:4] == b"PK\x03\x04":
        return _read_zip(zipfile.ZipFile(file), mapped)
    if mapped[:1] != b"\x80":
        raise InputError("neither a zip archive nor a pickle; this is no file of PyTorch")
    first = _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)))
    if first != STREAM_MAGIC:
        _require(mapped.tell() == len(mapped), f"{len(mapped) - mapped.tell()} bytes follow the pickle")
        return first
    return _read_stream(mapped)


# --- containers ------------------------------------------------------------------------------------------------------------


def _read_zip(archive: zipfile.ZipFile, mapped: mmap.mmap) -> Any:
    entries = {info.filename: info for info in archive.infolist()}
    _require(len(entries) == len(archive.infolist()), "two entries have the same name")
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    _require(len(pickles) == 1, "there is no data.pkl in the archive")
    root = pickles[0].removesuffix("data.pkl")
    tensors = _Tensors(len(mapped))

    def content(name: str) -> memoryview:
        _require(root + name in entries, f"{name} is missing")
        return _stored(entries[root + name], mapped)

    if root + "byteorder" in entries:
        _require(bytes(content("byteorder")) == b"little", "it was written on a big-endian machine")

    def load(name: str, folder: str, torchscript: bool) -> Any:
        loaded: dict[str, memoryview] = {}

        def storage(dtype: np.dtype, key: str, count: int) -> np.ndarray:
            if key not in loaded:
                loaded[key] = content(f"{folder}/{key}")
            _require(
                len(loaded[key]) == count * dtype.itemsize, f"storage {key} has {len(loaded[key])} bytes, not as announced"
            )
            return np.frombuffer(loaded[key], dtype)

        operations = pickletools.genops(io.BytesIO(content(name)))
        return _unpickle(operations, tensors.of(storage), torchscript)

    if root + "constants.pkl" not in entries:
        return load("data.pkl", "data", torchscript=False)
    constants = load("constants.pkl", "constants", torchscript=True)
    named = {f"CONSTANTS.c{i}": value for i, value in enumerate(constants) if isinstance(value, np.ndarray)}
    return _tensors_by_name(load("data.pkl", "data", torchscript=True)) | named


def _stored(info: zipfile.ZipInfo, mapped: mmap.mmap) -> memoryview:
    """The bytes of an entry, in place. Archives of PyTorch are not compressed, so an entry cannot be larger than the file."""
    name = info.filename
    _require(info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1, f"{name} is compressed or encrypted")
    _require(info.header_offset >= 0, f"{name} is not where the archive says")
    header = mapped[info.header_offset : info.header_offset + 30]
    _require(len(header) == 30 and header[:4] == b"PK\x03\x04", f"{name} is not where the archive says")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    _require(start + info.file_size <= len(mapped), f"{name} reaches beyond the end of the file")
    content = memoryview(mapped)[start : start + info.file_size]
    # PyTorch can be told to write no checksums; they are zero then.
    _require(info.CRC in (0, zlib.crc32(content)), f"{name} does not have its checksum, the file is damaged")
    return content


def _read_stream(mapped: mmap.mmap) -> Any:
    """The older format: magic number, version, machine, contents, list of storages, each a pickle; then the storages."""
    version, machine = (_unpickle(pickletools.genops(mapped), _Tensors(len(mapped))) for _ in range(2))
    _require(version == 1001, f"version {version} of the format is not known")
    _require(machine.get("little_endian") is True, "it was written on a big-endian machine")
    start = mapped.tell()

    # The contents name storages that come after them, whose places follow from their types: so they are gone through twice.
    announced: dict[str, tuple[np.dtype, int]] = {}

    def announce(dtype: np.dtype, key: str, count: int) -> None:
        _require(announced.setdefault(key, (dtype, count)) == (dtype, count), f"storage {key} is announced in two ways")

    _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)).of(announce))
    keys = _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)))
    _require(isinstance(keys, list) and all(isinstance(key, str) for key in keys), "the list of storages is none")
    _require(sorted(keys) == sorted(announced), "the list of storages does not fit the contents")
    storages, position = {}, mapped.tell()
    for key in keys:
        dtype, count = announced[key]
        _require(mapped[position : position + 8] == struct.pack("<q", count), f"storage {key} has not the announced size")
        position += 8 + count * dtype.itemsize
        _require(position <= len(mapped), f"storage {key} reaches beyond the end of the file")
        storages[key] = np.frombuffer(mapped, dtype, count, position - count * dtype.itemsize)
    _require(position == len(mapped), f"{len(mapped) - position} bytes follow the last storage")
    mapped.seek(start)
    return _unpickle(pickletools.genops(mapped), _Tensors(len(mapped)).of(lambda dtype, key, count: storages[key]))


def _tensors_by_name(module: Any, limit: int = 100_000) -> dict[str, np.ndarray]:
    """The tensors of a tree of modules by dotted names."""
    tensors, pending = {}, [("", module)]
    while pending:
        name, value = pending.pop()
        limit -= 1
        _require(limit > 0, "the modules are nested without end")
        if isinstance(value, np.ndarray):
            tensors[name] = value
        elif isinstance(value, Record):
            pending.extend((f"{name}.{key}".lstrip("."), item) for key, item in reversed(value.items()))
    return tensors


# --- reading a pickle ------------------------------------------------------------------------------------------------------


class _Global(str):
    """The name of something that a pickle refers to."""


class _Tensors:
    """Makes arrays of storages. All tensors of a file together are limited to a multiple of its size."""

    def __init__(self, file_size: int):
        self.left = MAX_REPEATS * file_size
        self.storage: Callable[[np.dtype, str, int], np.ndarray | None] | None = None

    def of(self, storage: Callable[[np.dtype, str, int], np.ndarray | None]) -> "_Tensors":
        """Sets where storages come from: (dtype, key, number of elements) -> 1-D array, or None where it is not yet known."""
        self.storage = storage
        return self

    def open(self, identity: Any) -> np.ndarray | None:
        """The storage that a persistent id of a pickle names, ("storage", type, key, device, elements[, view])."""
        _require(self.storage is not None and isinstance(identity, tuple) and len(identity) in (5, 6), "unknown persistent id")
        tag, kind, key, _, count, *view = identity
        kind = kind.removeprefix("torch.") if isinstance(kind, _Global) else None
        _require(tag == "storage" and kind in DTYPES, "a storage is of no known type")
        _require(isinstance(key, str) and type(count) is int and count >= 0, "a storage has no proper name and size")
        array = self.storage(DTYPES[kind], key, count)
        if view and view[0] is not None and array is not None:
            _, offset, length = view[0]
            array = self.view(array, offset, (length,), (1,))
        return array

    def view(self, storage: np.ndarray | None, offset: Any, size: Any, stride: Any) -> np.ndarray | None:
        """A tensor in a storage; offset and strides count elements."""
        numbers = (offset, *size, *stride)
        _require(all(type(n) is int and 0 <= n < 2**62 for n in numbers), "a tensor has no proper shape")
        _require(len(size) == len(stride) <= MAX_RANK, "a tensor has no proper shape")
        if storage is None:
            return None
        if math.prod(size) == 0:
            return np.zeros(size, storage.dtype)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        _require(last < len(storage), "a tensor reaches beyond the end of its storage")
        self.left -= math.prod(size) * storage.itemsize
        _require(self.left >= 0, f"the tensors claim more than {MAX_REPEATS} times the size of the file")
        strides = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


class _NumpyArray:
    """A NumPy array of which the pickle has not said yet what it holds."""

    value: np.ndarray | None = None


class _NumpyDtype:
    """A NumPy dtype of plain numbers, little-endian."""

    def __init__(self, name: Any, *_: Any):
        _require(isinstance(name, str), "a NumPy array is of no known type")
        self.value = np.dtype(name)
        _require(self.value.kind in "biuf", f"NumPy arrays of {self.value} are not read")

    def set(self, state: Any) -> None:
        _require(state[1] in ("<", "|"), "a NumPy array is big-endian")

    def array(self, content: Any, shape: Any, fortran: bool) -> np.ndarray:
        _require(isinstance(content, bytes) and isinstance(shape, tuple), "a NumPy array has no content")
        return np.frombuffer(content, self.value).reshape(shape, order="F" if fortran else "C")


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
# What a pickle may call, and what is done instead.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): {_key(key): item for key, item in pairs},
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch.Size": lambda size: tuple(size),
    "torch.device": lambda *device: device,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how protocol 2 stores bytes
    "numpy.dtype": _NumpyDtype,
    **{f"{module}._reconstruct": lambda *_: _NumpyArray() for module in _NUMPY},
    **{f"{module}.scalar": lambda dtype, content: dtype.array(content, (), False).item() for module in _NUMPY},
}
_TORCHSCRIPT_CALLS = {f"torch.jit._pickle.{name}": lambda items, *_: items for name in _LISTS}
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_RECORDS = ("argparse.Namespace", "config_util.Config")
_SCALARS = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_VALUES = (*(f"torch.{name}" for name in (*DTYPES, *_SCALARS)), "numpy.ndarray")  # named, never called


def _unpickle(operations: Any, tensors: _Tensors, torchscript: bool = False) -> Any:
    """What a pickle describes, built of plain data. Anything it names that is not in the tables above is refused.

    Values of a hostile pickle are neither hashed, compared nor printed before their type is known: tuples of tuples that share
    their parts can make each of these take for ever.
    """
    calls = dict.fromkeys(_REBUILD, lambda storage, offset, size, stride, *_: tensors.view(storage, offset, size, stride))
    calls |= _CALLS | (_TORCHSCRIPT_CALLS if torchscript else {})
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

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

    for count, (opcode, value, _) in enumerate(operations):
        _require(count < MAX_OPCODES, "its description of the contents has no end")
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
                _require(start >= 0, "its pickle contradicts itself")
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
                _only(dict, stack[-2]).update(_checked({_key(stack.pop()): item}))
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
                arguments = stack.pop()
                _require(isinstance(stack[-1], _Global) and is_record(stack[-1]) and arguments == (), "an object is not plain")
                stack[-1] = Record()
            case "REDUCE":
                arguments = stack.pop()
                _require(isinstance(stack[-1], _Global) and stack[-1] in calls, "its pickle calls what cannot be called")
                stack[-1] = calls[stack[-1]](*_only(tuple, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1] = _with_state(stack[-1], state)
            case "PROTO" | "FRAME":
                pass
            case "POP":
                stack.pop()
            case "STOP":
                (result,) = stack
                return result
            case name:
                raise InputError(f"refused, because its pickle uses {name}, which is not needed for weights")
    raise InputError("its description of the contents is cut short")


def _with_state(target: Any, state: Any) -> Any:
    if isinstance(target, Record):
        target.update(_checked(_only(dict, state)))
    elif isinstance(target, _NumpyDtype):
        target.set(state)
    elif isinstance(target, _NumpyArray):
        _, shape, dtype, fortran, content = state
        target.value = dtype.array(content, shape, fortran)
        return target.value
    else:  # an OrderedDict with attributes, of which state dicts have one: the versions of modules
        _require(type(target) is dict and type(state) is dict and set(state) <= {"_metadata"}, "an object is not plain")
    return target


def _only(kind: type, value: Any) -> Any:
    _require(isinstance(value, kind), "its pickle contradicts itself")
    return value


def _key(key: Any) -> Any:
    # Nothing nested: hashing tuples within tuples can be made to take for ever.
    _require(isinstance(key, str | int | float | bytes | None), "a dict has keys that are neither text nor numbers")
    return key


def _checked(mapping: dict) -> dict:
    for key in mapping:
        _key(key)
    return mapping


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


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
