"""PyTorch's files: what PyTorch wrote is read, what was written is read back, and what attacks is refused.

`golden/torch` holds the files and says how they were made.
"""

import datetime
import pickle
import struct
import sys
import zipfile

import fuzz_torch_file as attack
import ml_dtypes
import numpy as np
import pytest
from fuzz_torch_file import (
    archive,
    call,
    get,
    group,
    instance,
    items,
    named,
    number,
    pairs,
    put,
    storage,
    stream,
    tensor,
    text,
    torchscript,
    whole,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_jax.weights import torch_file

DTYPES = {"bfloat16": ml_dtypes.bfloat16} | {
    name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
NET = {"bias": np.arange(3, dtype="f4"), "inner.weight": np.arange(6, dtype="f4").reshape(3, 2), "inner.count": np.array(5)}


def same(found, expected):
    """Compares trees of plain data and arrays: types, dtypes, shapes, values, order of keys."""
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for one, other in zip(found, expected):
            same(one, other)
    else:
        assert type(found) is type(expected) and found == expected


# --- files that PyTorch wrote ----------------------------------------------------------------------------------------------


def contents():
    base = np.arange(48, dtype="f4").reshape(6, 8)
    return {
        "dtypes": {name: np.arange(12).reshape(3, 4).astype(DTYPES[name]) for name in GOLDEN_DTYPES},
        "views": {
            "base": base,
            "transposed": base.T,
            "slice": base[1:5:2, 2:7:3],
            "element": np.array(base[3, 4]),
            "permuted": np.arange(24, dtype="i2").reshape(2, 3, 4).transpose(2, 0, 1),
            "expanded": np.tile(np.arange(3, dtype="f4"), (4, 1)),
            "empty": np.zeros((0, 4), "f4"),
        },
        "parameter": np.arange(3, dtype="f4"),
        "state": NET,
        "args": {"lr": 1e-4, "name": "GPT-L", "sizes": [1, (2, 3)], "large": 2**40, "small": -3, "nothing": None, "yes": True},
        "config": {"_data": {"model": {"width": 64, "scales": [0.5, 2]}}},
        "others": {"size": (3, 4), "device": ("cpu",), "array": np.arange(6.0).reshape(2, 3), "scalar": 2.5, "steps": {7: "x"}},
    }


GOLDEN_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@pytest.mark.parametrize("name", ["zip", "protocol4", "stream"])
def test_reads_both_formats(name):
    found = torch_file.read(attack.GOLDEN / f"{name}.pt")
    assert found["others"].pop("dtype") == "torch.float32"
    same(found, contents())
    assert isinstance(found["args"], torch_file.Record) and isinstance(found["config"], torch_file.Record)
    views = found["views"]
    assert np.shares_memory(views["base"], views["transposed"]) and views["expanded"].strides == (0, 4)
    assert not any(array.flags.writeable for array in views.values() if array.size)


def test_reads_archives_without_checksums():
    same(torch_file.read(attack.GOLDEN / "unchecked.pt"), np.arange(48, dtype="f4").reshape(6, 8))


def test_reads_torchscript():
    same(torch_file.read(attack.GOLDEN / "script.pt"), NET)
    same(torch_file.read(attack.GOLDEN / "trace.pt"), NET | {"CONSTANTS.c0": np.array([2, 3, 4], "f4")})


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_reads_pickles_of_numpy_arrays(tmp_path, protocol):
    arrays = {name: np.arange(12).reshape(3, 4).astype(name) for name in DTYPES if name not in ("bfloat16", "bool")}
    arrays |= {"fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "shape": (), "empty": np.zeros((0, 2))}
    for value in (arrays | {"again": arrays["int8"]}, arrays["float32"]):
        (tmp_path / "arrays.pkl").write_bytes(pickle.dumps(value, protocol))
        same(torch_file.read(tmp_path / "arrays.pkl"), value)


# --- files that we write ---------------------------------------------------------------------------------------------------


def everything():
    """Plain data and arrays of every kind that can be written."""
    arrays = {name: np.arange(12).reshape(3, 4).astype(dtype) for name, dtype in DTYPES.items()}
    base = np.arange(24.0).reshape(2, 3, 4)
    views = {"transposed": base.T, "strided": base[:, ::-2, 1::2], "expanded": np.broadcast_to(base[0], (2, 3, 4))}
    small = {"element": np.array(2.5, "f2"), "empty": np.zeros((3, 0, 2), "i4"), "none": np.zeros(0, "u1")}
    numbers = [0, -1, 255, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63), 0.1, float("inf"), -0.0]
    plain = {"text": ["", "é\n\0", "x" * 70000], "other": (None, True, False, (), [], {}, ({"a": [(1,)]},)), 7: numbers}
    return {"arrays": arrays, "views": views, "small": small, "plain": plain}


def test_reads_what_it_wrote(tmp_path):
    torch_file.write(tmp_path / "file.pt", everything())
    same(torch_file.read(tmp_path / "file.pt"), everything())
    with zipfile.ZipFile(tmp_path / "file.pt") as written:
        assert written.testzip() is None
    torch_file.write(tmp_path / "file.pt", [torch_file.Record(a=1)])
    same(torch_file.read(tmp_path / "file.pt"), [{"a": 1}])


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 100])
def test_storages_begin_at_multiples_of_64(tmp_path, monkeypatch, limit):
    """Also those of two gigabytes, whose entries have longer headers."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    arrays = {str(size): np.arange(size, dtype="u1") for size in (1, 90, 96, 100, 200)}
    torch_file.write(tmp_path / "file.pt", arrays)
    found = torch_file.read(tmp_path / "file.pt")
    same(found, arrays)
    assert [array.ctypes.data % 64 for array in found.values()] == [0] * 5


def test_torch_reads_what_it_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    torch_file.write(tmp_path / "file.pt", everything())
    for mmap in (False, True):
        found = torch.load(tmp_path / "file.pt", weights_only=True, mmap=mmap)
        assert str(found["arrays"]["bfloat16"].dtype) == "torch.bfloat16"
        for part in ("arrays", "views", "small"):
            found[part] = {
                name: value.view(torch.uint8).numpy().view(everything()[part][name].dtype) if value.ndim else value.numpy()
                for name, value in found[part].items()
            }
        same(found, everything())


@pytest.mark.parametrize(
    "value", [np.zeros(2, "c8"), np.zeros(2, "u2"), np.zeros(2, ">f4"), np.array(["x"]), np.array([None]), {1, 2}, 2**63, b"x"]
)
def test_writes_whole_or_not_at_all(tmp_path, value):
    torch_file.write(tmp_path / "file.pt", "before")
    with pytest.raises(TypeError, match="cannot be written to a file of PyTorch"):
        torch_file.write(tmp_path / "file.pt", {"good": np.zeros(3), "bad": value})
    assert torch_file.read(tmp_path / "file.pt") == "before" and len(list(tmp_path.iterdir())) == 1


# --- files that attack -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(tmp_path):
    """refuse(data, expected): the file must be refused in a line that says so, in little time and memory."""

    def check(data: bytes, expected: str) -> None:
        message = attack.attempt(tmp_path / "file.pt", data)
        assert message is not None and expected in message, message

    return check


VIEW = tensor(storage(16), 0, (4,), (1,))
ORDERED, SIZE, NAMESPACE = "collections.OrderedDict", "torch.Size", "argparse.Namespace"


def test_the_attacks_start_from_good_files(tmp_path):
    """Else all of them might be refused for another reason than the one that is tested."""
    expected = np.frombuffer(attack.STORAGE[:16], "<f4")
    module = instance("__torch__.M", pairs(text("w"), VIEW))
    for data in (archive(whole(VIEW)), stream(whole(VIEW)), torchscript(whole(module))):
        (tmp_path / "file.pt").write_bytes(data)
        found = torch_file.read(tmp_path / "file.pt")
        same(found["w"] if isinstance(found, dict) else found, expected)
    (tmp_path / "file.pt").write_bytes(whole(attack.array(attack.STORAGE, (2, 8))))
    same(torch_file.read(tmp_path / "file.pt"), np.frombuffer(attack.STORAGE, "<f4").reshape(2, 8))


def deep(levels: int) -> bytes:
    """A tuple of two tuples of two tuples ..., all of them shared: 2 ** levels to hash, compare or print."""
    return b")" + b"".join(put(level) + get(level) + b"\x86" for level in range(levels))


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new)


NOT_NEEDED = {
    "reduce": (call("os.system", text("touch executed")), "os.system"),
    "posix": (call("posix.system", text("touch executed")), "posix.system"),
    "stack_global": (text("os") + text("system") + b"\x93" + group(text("touch executed")) + b"R", "os.system"),
    "eval": (call("builtins.eval", text("open('executed', 'w')")), "builtins.eval"),
    "python2": (call("__builtin__.exec", text("open('executed', 'w')")), "__builtin__.exec"),
    "getattr": (call("builtins.getattr", named("torch.Size"), text("__class__")), "builtins.getattr"),
    "nested_load": (call("torch.load", text("other.pt")), "torch.load"),
    "storage_load": (call("torch.storage._load_from_bytes", attack.binary(b"\x80\x02N.")), "torch.storage._load_from_bytes"),
    "import": (named("this.s"), "this.s"),
    "dotted": (text("torch") + text("Size.__class__") + b"\x93", "torch.Size.__class__"),
    "object": (named("builtins.object") + b")" + attack.NEWOBJ, "builtins.object"),
    "torchscript_class": (instance("__torch__.Module", b"}"), "__torch__.Module"),
    "torchscript_list": (call("torch.jit._pickle.build_intlist", b"]"), "torch.jit._pickle.build_intlist"),
    "lines": (text("a\x1b[31m\nb") + text("c\rd") + b"\x93", "a?[31m?b.c?d"),
    "inst": (b"(" + text("touch executed") + b"ios\nsystem\n", "INST"),
    "obj": (b"(" + named("torch.Size") + b"o", "OBJ"),
    "newobj_ex": (named(NAMESPACE) + b")}\x92", "NEWOBJ_EX"),
    "ext1": (b"\x82\x01", "EXT1"),
    "ext4": (b"\x84\x01\0\0\0", "EXT4"),
    "persid": (b"Pname\n", "PERSID"),
    "dup": (b"N2", "DUP"),
    "set": (b"\x8f", "EMPTY_SET"),
    "next_buffer": (b"\x97", "NEXT_BUFFER"),
}


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_runs_nothing(refuse, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    operations, expected = NOT_NEEDED[name]
    for data in (archive(whole(operations)), stream(whole(operations)), whole(operations)):
        refuse(data, f"{expected}, which is not needed for weights")
    assert not (tmp_path / "executed").exists() and "this" not in sys.modules


CONTRADICTIONS = {
    "call_value": (named("torch.FloatStorage") + b")R", "calls what cannot be called"),
    "call_record": (named(NAMESPACE) + b")R", "calls what cannot be called"),
    "call_text": (text("torch.Size") + b")R", "calls what cannot be called"),
    "call_without_tuple": (named(SIZE) + b"]R", "list in a wrong place"),
    "new_with_arguments": (named(NAMESPACE) + group(number(1)) + attack.NEWOBJ, "an object is not plain"),
    "new_function": (named(SIZE) + b")" + attack.NEWOBJ, "an object is not plain"),
    "build_text": (text("x") + b"}b", "an object is not plain"),
    "build_name": (named(SIZE) + b"}b", "an object is not plain"),
    "build_tensor": (VIEW + b"}b", "an object is not plain"),
    "build_list": (b"]}b", "an object is not plain"),
    "build_attributes": (b"}" + pairs(text("__class__"), b"N") + b"b", "an object is not plain"),
    "build_slots": (named(NAMESPACE) + b")\x81" + group(b"N", b"}") + b"b", "tuple in a wrong place"),
    "encode_other": (call("_codecs.encode", text("x"), text("zlib")), "no known encoding"),
    "encode_number": (call("_codecs.encode", number(3), text("latin1")), "int in a wrong place"),
    "encode_deep": (call("_codecs.encode", deep(60), text("latin1")), "tuple in a wrong place"),
    "encoding_deep": (call("_codecs.encode", text("x"), deep(60)), "tuple in a wrong place"),
    "size_of_text": (call(SIZE, text("x")), "str in a wrong place"),
    "key_deep": (b"}" + deep(60) + b"Ns", "neither text nor small numbers"),
    "key_deep_setitems": (pairs(deep(60), b"N"), "neither text nor small numbers"),
    "key_deep_ordered": (call(ORDERED, items(group(deep(60), b"N"))), "neither text nor small numbers"),
    "key_list": (b"}]Ns", "neither text nor small numbers"),
    "key_that_collides": (pairs(number(2**61 - 1), b"N"), "neither text nor small numbers"),
    "half_a_pair": (pairs(text("x")), "is damaged"),
    "persistent_deep": (deep(60) + b"Q", "unknown persistent id"),
    "persistent_of_deep": (deep(60) + put(60) + group(*[get(60)] * 5) + b"Q", "no known type"),
    "persistent_text": (text("0") + b"Q", "unknown persistent id"),
    "persistent_module": (changed(storage(16), text("storage"), text("module")), "no known type"),
    "persistent_class": (changed(storage(16), b"FloatStorage", b"Size"), "no known type"),
    "persistent_name_as_text": (changed(storage(16), named("torch.FloatStorage"), text("FloatStorage")), "no known type"),
    "persistent_view": (storage(16)[:-2] + group(b"N", number(10), number(7)) + b"tQ", "reaches beyond its end"),
    "persistent_view_negative": (storage(16)[:-2] + group(b"N", number(-1), number(7)) + b"tQ", "reaches beyond its end"),
    "append_to_tuple": (b")Na", "tuple in a wrong place"),
    "append_to_tensor": (VIEW + b"Na", "ndarray in a wrong place"),
    "set_in_list": (b"]" + text("x") + b"Ns", "list in a wrong place"),
    "memo_missing": (get(5), "KeyError: 5"),
    "memo_huge": (b"N" + put(2**32 - 1) + get(2**31), "KeyError: 2147483648"),
    "nothing": (b"", "contradicts itself"),
    "two_values": (b"NN", "contradicts itself"),
    "empty_stack": (b"0", "IndexError"),
    "no_mark": (b"t", "IndexError"),
    "tuple_of_nothing": (b"\x87", "contradicts itself"),
    "bare_storage": (storage(16), "neither a tensor nor plain data"),
    "contains_itself": (b"]" + put(0) + get(0) + b"a", "nested without end"),
    "dict_contains_itself": (b"}" + put(0) + text("x") + get(0) + b"s", "nested without end"),
    "record_contains_itself": (named(NAMESPACE) + b")\x81" + put(0) + pairs(text("x"), get(0)) + b"b", "nested without end"),
    "deep_lists": (b"]" * 100_000 + b"a" * 99_999, "nested without end"),
    "deep_tuples": (b")" + b"\x85" * 100_000, "nested without end"),
    "deep_dicts": ((b"}" + text("")) * 60_000 + b"N" + b"s" * 60_000, "nested without end"),
    "laughs": (deep(60), "its contents have no end"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_refuses_contradictions(refuse, name):
    operations, expected = CONTRADICTIONS[name]
    refuse(archive(whole(operations)), expected)


def repeated(name: str, argument: bytes, use: bytes = b"R") -> bytes:
    """The same thing made of the same large argument, over and over."""
    return whole(argument + put(0) + b"0" + named(name) + put(1) + b"(" + (get(1) + get(0) + use) * 150_000 + b"t")


ENTRIES = b"".join(text(str(index)) + b"N" for index in range(20_000))
BOMBS = {
    "opcodes": (whole(b"(" + b"]" * 500_000 + b"t"), "no end"),
    "sizes": (repeated(SIZE, items(b"N" * 100_000) + b"\x85"), "no end"),
    "devices": (repeated("torch.device", group(b"N" * 100_000)), "its pickle contradicts itself"),
    "dicts": (repeated(ORDERED, items(group(text("x"), b"N") * 50_000) + b"\x85"), "no end"),
    "records": (repeated(NAMESPACE, pairs(ENTRIES), b"0)\x81" + get(0) + b"b"), "no end"),
    "encoded": (repeated("_codecs.encode", group(text("x" * 10**6), text("latin1"))), "8 times the size of the file"),
    "numpy_dtypes": (whole(call("numpy.dtype", text("i4," * 10**6 + "i4"))), "are not read"),
    "colliding_keys": (whole(pairs(*(number(k * (2**61 - 1)) + b"N" for k in range(1, 60_000)))), "small numbers"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_work_and_memory_are_bounded(refuse, name):
    data, expected = BOMBS[name]
    refuse(archive(data), expected)


TENSORS = {
    "offset": (tensor(storage(16), 16, (1,), (1,)), "beyond the end of its storage"),
    "offset_huge": (tensor(storage(16), 2**61, (1,), (1,)), "beyond the end of its storage"),
    "offset_negative": (tensor(storage(16), -1, (1,), (1,)), "no proper shape"),
    "offset_overflow": (tensor(storage(16), 2**63, (1,), (1,)), "no proper shape"),
    "size": (tensor(storage(16), 0, (17,), (1,)), "beyond the end of its storage"),
    "size_negative": (tensor(storage(16), 0, (-1, -4), (1, 1)), "no proper shape"),
    "size_overflow": (tensor(storage(16), 0, (2**63,), (1,)), "no proper shape"),
    "size_wraps": (tensor(storage(16), 0, (2**32, 2**32), (0, 0)), "8 times the size of the file"),
    "size_of_text": (changed(tensor(storage(16), 0, (), ()), b"(t(t", text("ab") * 2), "str in a wrong place"),
    "stride": (tensor(storage(16), 1, (2, 2), (8, 7)), "beyond the end of its storage"),
    "stride_negative": (tensor(storage(16), 8, (4,), (-1,)), "no proper shape"),
    "stride_wraps": (tensor(storage(16), 0, (5,), (2**62,)), "no proper shape"),
    "stride_huge": (tensor(storage(16), 0, (5,), (2**61,)), "beyond the end of its storage"),
    "stride_missing": (tensor(storage(16), 0, (2, 2), (1,)), "no proper shape"),
    "rank": (tensor(storage(16), 0, (1,) * 33, (1,) * 33), "no proper shape"),
    "expanded": (tensor(storage(16), 0, (10**12,), (0,)), "8 times the size of the file"),
    "expanded_often": (items(*[tensor(storage(16), 0, (3000,), (0,))] * 1000), "8 times the size of the file"),
    "of_a_tensor": (tensor(tensor(storage(16), 0, (50,), (0,)), 0, (50,), (1,)), "in a wrong place"),
    "of_bytes": (tensor(attack.binary(bytes(64)), 0, (4,), (1,)), "bytes in a wrong place"),
    "elements": (tensor(storage(15), 0, (4,), (1,)), "64 bytes, not as announced"),
    "elements_other_type": (tensor(storage(16, "DoubleStorage"), 0, (4,), (1,)), "64 bytes, not as announced"),
    "elements_negative": (tensor(storage(-16), 0, (4,), (1,)), "no proper name and size"),
    "elements_overflow": (tensor(storage(2**63), 0, (4,), (1,)), "no proper name and size"),
    "truth": (tensor(storage(64, "BoolStorage"), 0, (4,), (1,)), "neither 0 nor 1"),
    "missing": (tensor(storage(16, key="1"), 0, (4,), (1,)), "data/1 is missing"),
    "elsewhere": (tensor(storage(16, key="../../x"), 0, (4,), (1,)), "data/../../x is missing"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_stay_in_their_storages(refuse, name):
    operations, expected = TENSORS[name]
    refuse(archive(whole(operations)), expected)
    if name not in ("elements", "elements_other_type", "truth", "missing", "elsewhere"):  # which a stream would announce
        refuse(stream(whole(operations)), expected)


NUMPY = {
    "objects": (attack.array(bytes(16), (2,), "O8"), "NumPy arrays of type O8 are not read"),
    "records": (attack.array(bytes(16), (2,), "i4,i4"), "NumPy arrays of type i4,i4 are not read"),
    "text": (attack.array(bytes(16), (2,), "U2"), "NumPy arrays of type U2 are not read"),
    "type_deep": (call("numpy.dtype", deep(60)), "tuple in a wrong place"),
    "big_endian": (attack.array(bytes(16), (4,), order=">"), "a NumPy array is big-endian"),
    "shape": (attack.array(bytes(16), (5,)), "cannot reshape"),
    "shape_negative": (attack.array(bytes(16), (-1,)), "no proper shape"),
    "shape_huge": (attack.array(bytes(16), (2**40, 2**40)), "is damaged"),
    "content": (changed(attack.array(bytes(16), (4,)), attack.binary(bytes(16)), b"]"), "has no content"),
    "unfinished": (call("numpy.core.multiarray._reconstruct"), "neither a tensor nor plain data"),
    "dtype": (call("numpy.dtype", text("f4")), "neither a tensor nor plain data"),
    "scalar": (call("numpy.core.multiarray.scalar", text("f4"), attack.binary(bytes(4))), "str in a wrong place"),
}


def test_strides_of_single_elements_do_not_matter(tmp_path):
    (tmp_path / "file.pt").write_bytes(archive(whole(tensor(storage(16), 3, (1, 2, 1), (2**61, 4, 0)))))
    same(torch_file.read(tmp_path / "file.pt"), np.frombuffer(attack.STORAGE, "<f4")[3:9:4].reshape(1, 2, 1))


@pytest.mark.parametrize("name", NUMPY)
def test_numpy_arrays_are_checked(refuse, name):
    operations, expected = NUMPY[name]
    refuse(whole(operations), expected)


def test_modules_are_checked(refuse):
    module = named("__torch__.M") + b")" + attack.NEWOBJ + put(0)
    refuse(torchscript(whole(module + pairs(text("m"), get(0)) + b"b")), "nested without end")
    refuse(torchscript(whole(instance("__torch__.M", pairs(text("m" * 1000), VIEW)))), "a name of a tensor has no end")
    refuse(
        torchscript(whole(instance("__torch__.M", pairs(text("w"), VIEW, text(".w"), VIEW)))), "two tensors have the same name"
    )
    many = [text(str(index)) for index in range(1000)]
    shared = module + pairs(*(name + b"N" for name in many)) + b"b0"
    top = instance("__torch__.M", pairs(*(name + get(0) for name in many)))
    refuse(torchscript(whole(shared + top)), "its contents have no end")
    refuse(torchscript(whole(VIEW), constants=whole(b"]")), "list in a wrong place")


def test_zip_archives_are_checked(refuse, tmp_path):
    good = archive(whole(VIEW))
    pickled, stored = good.index(b"PK\1\2"), good.rindex(b"PK\1\2")  # in the list of entries

    def edited(place: int, *values: int) -> bytes:
        """`values` in four bytes each."""
        return good[:place] + struct.pack(f"<{len(values)}I", *values) + good[place + 4 * len(values) :]

    refuse(edited(pickled + 8, zipfile.ZIP_DEFLATED << 16), "data.pkl is compressed or encrypted")
    refuse(edited(pickled + 8, 1), "data.pkl is compressed or encrypted")
    refuse(edited(pickled + 16, 1), "data.pkl does not have its checksum")
    refuse(edited(pickled + 20, 5), "data.pkl has two sizes")
    refuse(edited(pickled + 24, 2**31), "data.pkl has two sizes")
    refuse(edited(stored + 20, len(good) // 2, len(good) // 2), "data/0 reaches beyond the end of the file")
    refuse(edited(pickled + 20, 2**31, 2**31), "its entries are larger than the file")
    refuse(edited(pickled + 42, 7), "data.pkl is not where the archive says")
    refuse(edited(pickled + 42, 2**31), "data.pkl is not where the archive says")
    refuse(edited(pickled, 7), "Bad magic number for central directory")
    refuse(edited(len("archive/data.pkl") + 30, 7), "data.pkl does not have its checksum")
    refuse(changed(good, b"archive/data.pkl", b"archive/other.pk"), "0 files data.pkl, not one")
    two = archive(whole(VIEW), {"data/data.pkl": b"", "data/1": b""})
    refuse(changed(two, b"archive/data/data.pkl", b"archive_data/data.pkl"), "2 files data.pkl, not one")
    refuse(changed(two, b"data/1", b"data/0"), "two entries have the same name")
    refuse(archive(whole(VIEW), {"byteorder": b"big"}), "big-endian machine")

    compressed = tmp_path / "compressed.zip"
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", whole(VIEW) + bytes(10**8))
    refuse(compressed.read_bytes(), "data.pkl is compressed or encrypted")


def test_entries_cannot_overlap(refuse):
    """A thousand entries that are the same bytes would keep the checksums busy for ever."""
    tensors = (tensor(storage(10**6, "ByteStorage", str(key)), 0, (1,), (1,)) for key in range(1000))
    good = archive(whole(group(*tensors)), {"data/0": bytes(10**6)})
    start, last = good.index(b"PK\1\2"), good.rindex(b"PK\1\2")
    names = [f"archive/data/{key}".encode() for key in range(1000)]
    before, after = good[last : last + 28], good[last + 30 : last + 46]
    entries = b"".join(before + struct.pack("<H", len(name)) + after + name for name in names)
    refuse(good[:last] + entries + directory_end(start, last - start + len(entries)), "its entries are larger than the file")


def test_lists_of_entries_are_bounded(refuse):
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, *[0] * 8, 5, *[0] * 6)
    entries = b"".join(entry + b"%05x" % index for index in range(30_000))
    refuse(b"PK\3\4" + entries + directory_end(4, len(entries)), "its list of entries has no end")


def directory_end(start: int, size: int) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, size, start, 0)


def test_streams_are_checked(refuse):
    contents = whole(group(VIEW, tensor(storage(4, key="1"), 0, (4,), (1,))))
    storages = {"0": (16, attack.STORAGE), "1": (4, attack.STORAGE[:16])}
    refuse(stream(contents), "the list of storages does not fit the contents")
    refuse(stream(whole(VIEW), storages), "the list of storages does not fit the contents")
    refuse(stream(contents, storages | {"1": (5, attack.STORAGE[:20])}), "storage 1 has not the announced size")
    refuse(stream(contents, storages | {"1": (4, attack.STORAGE[:12])}), "storage 1 reaches beyond the end of the file")
    refuse(stream(contents, storages | {"1": (4, attack.STORAGE[:20])}), "4 bytes follow the last storage")
    refuse(stream(whole(group(VIEW, tensor(storage(8), 0, (4,), (1,))))), "storage 0 is announced in two ways")
    refuse(stream(contents, storages, little=b"\x89"), "big-endian machine")
    refuse(changed(stream(contents, storages), number(1001), number(1002)), "this version of the format is not known")
    refuse(whole(VIEW), "unknown persistent id")
    refuse(whole(b"N") + b"x", "1 bytes follow the pickle")


@pytest.mark.parametrize(
    "data, expected", [(b"", "is empty"), (b"GIF89a", "no file of PyTorch"), (b"PK\3\4", "not a zip file")]
)
def test_other_files(refuse, data, expected):
    refuse(data, expected)


@pytest.mark.parametrize("name", ["zip", "stream", "trace"])
def test_truncated_files(refuse, name):
    whole_file = (attack.GOLDEN / f"{name}.pt").read_bytes()
    for size in (*range(1, 60), *range(60, len(whole_file), 61), len(whole_file) - 1):
        refuse(whole_file[:size], "")


def test_missing_files_are_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.pt")


@settings(max_examples=400, derandomize=True, database=None, deadline=datetime.timedelta(seconds=attack.SECONDS))
@given(random=st.randoms(use_true_random=False))
def test_random_inputs(tmp_path_factory, random):
    attack.attempt(tmp_path_factory.getbasetemp() / "fuzz_torch_file.pt", attack.random_input(random))
