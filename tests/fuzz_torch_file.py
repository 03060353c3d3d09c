"""Inputs that attack the reader of PyTorch's files: an assembler of pickles, mutations of good files, random pickles.

`test_torch_file.py` tries some hundreds of inputs; `python tests/fuzz_torch_file.py --seconds 600` tries them for ten minutes.
"""

import argparse
import collections
import contextlib
import faulthandler
import functools
import io
import mmap
import pickle
import pickletools
import re
import resource
import signal
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from dar_jax.errors import InputError
from dar_jax.weights import torch_file

GOLDEN = Path(__file__).parent / "golden" / "torch"
SECONDS = 5.0  # of processor time for one input
MEMORY = 512 << 20  # bytes of address space for one input, besides the file
STORAGE = np.arange(64, dtype=np.uint8).tobytes()
MARK, APPENDS, SETITEMS, BUILD, REDUCE, NEWOBJ, TUPLE, PERSID = b"(", b"e", b"u", b"b", b"R", b"\x81", b"t", b"Q"

# --- an assembler of pickles -----------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def binary(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def put(index: int) -> bytes:
    return b"r" + struct.pack("<I", index)


def get(index: int) -> bytes:
    return b"j" + struct.pack("<I", index)


def items(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + APPENDS


def pairs(*values: bytes) -> bytes:
    return b"}(" + b"".join(values) + SETITEMS


def group(*values: bytes) -> bytes:
    return MARK + b"".join(values) + TUPLE


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + group(*arguments) + REDUCE


def instance(name: str, state: bytes) -> bytes:
    return named(name) + b")" + NEWOBJ + state + BUILD


def storage(count: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return group(text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), number(count)) + PERSID


def tensor(place: bytes, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    shape, steps = (group(*map(number, numbers)) for numbers in (size, stride))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", place, number(offset), shape, steps, b"\x89", hooks)


def array(content: bytes, shape: tuple[int, ...], dtype: str = "f4", order: str = "<") -> bytes:
    made = call("numpy.dtype", text(dtype), b"\x89", b"\x88")
    made += group(number(3), text(order), b"N", b"N", b"N", number(-1), number(-1), number(0)) + BUILD
    empty = call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), group(number(0)), binary(b"b"))
    return empty + group(number(1), group(*map(number, shape)), made, b"\x89", binary(content)) + BUILD


def whole(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


# --- containers ------------------------------------------------------------------------------------------------------------


def archive(contents: bytes, entries: dict[str, bytes] | None = None) -> bytes:
    """A zip archive with a given data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in {"data.pkl": contents, "data/0": STORAGE, **(entries or {})}.items():
            out.writestr(f"archive/{name}", content)
    return file.getvalue()


def torchscript(contents: bytes, constants: bytes = whole(b")")) -> bytes:
    return archive(contents, {"constants.pkl": constants, "constants/0": STORAGE})


def stream(contents: bytes, storages: dict[str, tuple[int, bytes]] | None = None, little: bytes = b"\x88") -> bytes:
    """The older format; storages are (announced number of elements, bytes) by their keys."""
    storages = {"0": (16, STORAGE)} if storages is None else storages
    head = whole(number(torch_file.STREAM_MAGIC)) + whole(number(1001)) + whole(pairs(text("little_endian"), little))
    tail = b"".join(struct.pack("<q", count) + content for count, content in storages.values())
    return head + contents + whole(items(*map(text, storages))) + tail


# --- what must hold for every input ----------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """Not an Exception, which the reader would take for damage of the file."""


@contextlib.contextmanager
def limits(file_size: int) -> Iterator[None]:
    """Raises TooSlow after SECONDS, and lets allocations fail beyond MEMORY."""

    def stop(*_: Any) -> None:
        raise TooSlow

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY + 8 * file_size, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(path: Path, data: bytes) -> str | None:
    """Reads `data` from `path`. Returns the message where it is refused.

    Raises AssertionError where it is neither read properly nor refused properly, TooSlow where it takes too long.
    """
    path.unlink(missing_ok=True)  # a new file: the old one may still be mapped
    path.write_bytes(data)
    try:
        with limits(len(data)):
            contents = torch_file.read(path)
    except InputError as error:
        message = str(error)
        assert message.startswith(str(path)) and message.isprintable() and len(message) < 400 + len(str(path)), message
        assert not any(name in message for name in ("MemoryError", "RecursionError", "SystemError")), message
        return message
    for leaf in leaves(contents):
        assert type(leaf) in (bool, int, float, str, bytes, np.ndarray, torch_file._Global, type(None)), type(leaf)
        if isinstance(leaf, np.ndarray):
            check_inside(leaf, len(data))
    repr(contents)
    return None


def leaves(value: Any) -> Iterator[Any]:
    """Recursive, as callers may be."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def check_inside(leaf: np.ndarray, file_size: int) -> None:
    """Every element of an array lies in the mapped file (or in the bytes of a pickle), and can be touched."""
    if leaf.size == 0:
        return
    assert not leaf.flags.writeable and leaf.nbytes <= torch_file.MAX_REPEATS * file_size
    owner = leaf
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    assert isinstance(owner, mmap.mmap | bytes), type(owner)
    memory = np.frombuffer(owner, np.uint8)
    assert memory.size <= file_size
    (start, end), (first, last) = map(np.lib.array_utils.byte_bounds, (memory, leaf))
    assert start <= first and last <= end
    leaf.tobytes()


# --- inputs ----------------------------------------------------------------------------------------------------------------

SIZES = (0, 1, 2, 3, 4, 8, 15, 16, 17, 63, 64, 65)
INTEGERS = (*SIZES, 255, 1000, -1, -2, 2**31, 2**32 - 1, 2**61, 2**63 - 1, 2**63, -(2**63), 2**900)
CONSTANTS = (b"N", b"\x88", b"\x89", b")", b"]", b"}", text(""), text("x"), text("_metadata"), b"G" + bytes(8))
KNOWN = b"".join(value + put(index) + b"0" for index, value in enumerate((b"]", b"}", b")", text("x"))))  # in the memo
ENDS = (REDUCE, BUILD, NEWOBJ, b"a", b"s", b"u", b"e", b"0", b"\x93", b"\x86")  # operations on what is on the stack
NAMES = (*torch_file._CALLS, *torch_file._TORCHSCRIPT_CALLS, *torch_file._REBUILD, *torch_file._VALUES, *torch_file._RECORDS)
ALL_NAMES = (*NAMES, "_codecs.encode", "__torch__.Module", "os.system")
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]


@functools.cache
def corpus() -> tuple[bytes, ...]:
    files = [path.read_bytes() for path in sorted(GOLDEN.glob("*.pt"))]
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(1.5), "c": [b"bytes", "text", np.arange(3, dtype=np.uint8)]}
    assert files
    return (*files, *(pickle.dumps(arrays, protocol) for protocol in (2, 4)))


def mutate(random: Random, data: bytes) -> bytes:
    """One or a few changes of bytes, anywhere."""
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        place = random.randrange(len(data) + 1)
        length = random.choice((1, 2, 4, 16, 64, 500))
        match random.randrange(7):
            case 0:
                data[place : place + 1] = bytes([random.randrange(256)])
            case 1:
                data[place : place + 1] = bytes(byte ^ (1 << random.randrange(8)) for byte in data[place : place + 1])
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                other = random.choice(corpus())
                start = random.randrange(len(other))
                data[place : place + random.choice((0, length))] = other[start : start + length]
            case 6:
                form, size = random.choice((("<H", 2), ("<I", 4), ("<Q", 8)))
                data[place : place + size] = struct.pack(form, random.choice(INTEGERS) % 256**size)
    return bytes(data)


def operations(data: bytes) -> list[bytes]:
    """The operations of the pickles that a file begins with, and what follows them."""
    file, places = io.BytesIO(data), []
    while data[file.tell() : file.tell() + 1] == b"\x80":
        places.extend(place for _, _, place in pickletools.genops(file))
    places.extend((file.tell(), len(data)))
    return [data[start:end] for start, end in zip(places, places[1:])]


def mutate_operations(random: Random, data: bytes) -> bytes:
    """Pickles of which operations were dropped, doubled, exchanged, or mixed with others."""
    parts = operations(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        match random.randrange(6):
            case 0:
                parts[at] = b""
            case 1:
                parts[at] += parts[at]
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = parts[other]
            case 4:
                parts[at] = random_value(random, 2)
            case 5:
                some = b"".join(parts[at : at + random.randrange(1, 9)])
                parts[at] = some * min(random.choice((2, 2, 10, 100_000)), 1_000_000 // max(len(some), 1))
    return b"".join(parts)


def random_value(random: Random, depth: int) -> bytes:
    """Operations that put a value on the stack, most of the time."""
    again = functools.partial(random_value, random, depth - 1)
    choose = random.choice

    def some(most: int = 4) -> list[bytes]:
        return [again() for _ in range(random.randrange(most))]

    def numbers() -> tuple[int, ...]:
        return tuple(choose(choose((SIZES[:5],) * 9 + (INTEGERS,))) for _ in range(random.randrange(4)))

    def place() -> bytes:
        kind = choose(list(torch_file.DTYPES))
        count = len(STORAGE) // torch_file.DTYPES[kind].itemsize
        return choose((storage(count, kind),) * 9 + (storage(choose(INTEGERS), kind), storage(count, kind, "9"), again()))

    def rebuilt() -> bytes:
        size = numbers()
        zeros, ones = (0,) * len(size), (1,) * len(size)
        return tensor(place(), choose((0, choose(SIZES), choose(INTEGERS))), size, choose((size, ones, zeros, numbers())))

    def numpy_array() -> bytes:
        content, dtype = choose((b"", STORAGE[:4], STORAGE)), choose(("f4", "i1", "u1", "u1", "O"))
        return array(content, choose((numbers(), (-1,), (len(content),))), dtype, choose("<<|>"))

    def record() -> bytes:
        return instance(choose((*torch_file._RECORDS, "__torch__.Module")), pairs(text("x"), again(), text("y"), again()))

    def ordered() -> bytes:
        return call("collections.OrderedDict", items(group(text("x"), again()), *some())) + choose((b"", again() + BUILD))

    simple: dict[Callable[[], bytes], int] = {  # and how often they are chosen
        lambda: choose(CONSTANTS): 12,
        lambda: number(choose(INTEGERS)): 12,
        lambda: get(random.randrange(4)): 6,
        lambda: named(choose(ALL_NAMES)): 2,
        lambda: choose(OPCODES): 1,
    }
    nested: dict[Callable[[], bytes], int] = {
        lambda: items(*some()): 4,
        lambda: group(*some()): 4,
        lambda: pairs(text("x"), again(), number(3), again()): 4,
        lambda: again() + put(random.randrange(4)): 4,
        lambda: again() + again() + choose(ENDS): 1,
        lambda: call(choose(ALL_NAMES), *some()): 1,
        lambda: call("_codecs.encode", choose((again(), text("bytes"))), text("latin1")): 1,
        lambda: group(*some(7)) + PERSID: 1,
        rebuilt: 8,
        numpy_array: 4,
        record: 4,
        ordered: 4,
    }
    makers = nested if depth > 0 else simple
    return random.choices(list(makers), list(makers.values()))[0]()


def random_input(random: Random) -> bytes:
    """A damaged file, an archive whose pickle was changed but whose checksums hold, or a random pickle in some container."""
    original = random.choice(corpus())
    match random.randrange(4):
        case 0:
            return mutate(random, original)
        case 1:
            return change_pickle(random, original)
        case _:
            container = random.choice((archive, archive, torchscript, stream, bytes))
            return container(whole(KNOWN, random_value(random, random.randrange(1, 6))))


def change_pickle(random: Random, data: bytes) -> bytes:
    """A file with proper checksums whose description of the contents was changed."""
    if not data.startswith(b"PK"):
        return mutate_operations(random, data)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        for info in old.infolist():
            info.CRC = None  # not to be checked, since unchecked.pt has none
        contents = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    return archive(random.choice((mutate, mutate_operations))(random, contents.pop("data.pkl")), contents)


# --- by hand ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the next ones count on")
    options = parser.parse_args()
    faulthandler.enable()
    refused: collections.Counter[str] = collections.Counter()
    seed, slowest, end = options.seed, 0.0, time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.pt"
        while time.monotonic() < end:
            data = random_input(Random(seed))
            start = time.process_time()
            try:
                message = attempt(path, data)
            except BaseException:
                print(f"input of seed {seed}:")
                raise
            slowest = max(slowest, time.process_time() - start)
            seed += 1
            if message is not None:
                refused[re.sub(r"\d+", "0", message.removeprefix(f"{path}"))[:70]] += 1
    tried, peak = seed - options.seed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{tried} inputs: {tried - refused.total()} read, {refused.total()} refused; slowest {slowest:.2f} s, peak {peak} MB")
    for message, count in refused.most_common(60):
        print(f"{count:8} {message}")


if __name__ == "__main__":
    main()
