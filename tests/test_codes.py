import contextlib
import dataclasses
import errno
import json
import os
import pickle
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from grain.sources import ArrayRecordDataSource
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_jax.config import DataConfig
from dar_jax.data import shards
from dar_jax.data.codes import CodesInfo, fingerprint, open_codes, write_shard
from dar_jax.data.pipeline import batches
from dar_jax.data.shards import begin, finish, missing_shards
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError

INFO = CodesInfo(
    images=10,
    shard_size=4,
    crops=2,
    tokens=3,
    codebook_size=50,
    class_names=("ant", "bée"),
    tokenizer="f00d",
    data="ten images",
)
CODES = np.arange(60, dtype=np.int32).reshape(10, 2, 3) % 50
LABELS = np.arange(10) % 2


def shard_name(number):
    return f"shard-{number:05d}.array_record"


def write_all(folder, info=INFO):
    begin(folder, info)
    for shard in missing_shards(folder, info):
        part = list(info.elements(shard))
        write_shard(folder, info, shard, CODES[part], LABELS[part])
    finish(folder, CodesInfo)


def test_what_was_written_is_read(tmp_path):
    write_all(tmp_path / "codes")
    source = pickle.loads(pickle.dumps(open_codes(tmp_path / "codes")))
    assert len(source) == 10 and source.class_names == INFO.class_names and source.info == INFO
    for i in range(10):
        element = source[i]
        assert element["codes"].dtype == np.int32 and element["label"] == LABELS[i]
        np.testing.assert_array_equal(element["codes"], CODES[i])
    with pytest.raises(IndexError):
        source[10]
    assert len(open_source(DataConfig(source="codes", path=str(tmp_path / "codes")))) == 10
    assert len(open_source(DataConfig(source="codes", path=str(tmp_path), split="codes"))) == 10


def test_records_are_plain_little_endian_numbers(tmp_path):
    """What other programs need to know to read the files."""
    write_all(tmp_path)
    (first, *_) = ArrayRecordDataSource(str(tmp_path / "shard-00001.array_record"))
    assert first == struct.pack("<i6H", LABELS[4], *CODES[4].ravel())


def test_codes_of_a_large_codebook(tmp_path):
    info = dataclasses.replace(INFO, images=1, shard_size=1, codebook_size=100_000)
    large = np.full((1, 2, 3), 99_999)
    begin(tmp_path, info)
    write_shard(tmp_path, info, 0, large, [1])
    finish(tmp_path, CodesInfo)
    np.testing.assert_array_equal(open_codes(tmp_path)[0]["codes"], large[0])


def test_unreadable_images_are_left_out(tmp_path):
    begin(tmp_path, INFO)
    write_shard(tmp_path, INFO, 0, CODES[:0], LABELS[:0])
    write_shard(tmp_path, INFO, 1, CODES[5:8], LABELS[5:8])
    write_shard(tmp_path, INFO, 2, CODES[8:], LABELS[8:])
    finish(tmp_path, CodesInfo)
    source = open_codes(tmp_path)
    assert [source[i]["codes"][0, 0] for i in range(len(source))] == [30, 36, 42, 48, 4]


def test_interrupted_writing_goes_on_at_the_missing_shards(tmp_path, monkeypatch):
    begin(tmp_path, INFO)
    assert missing_shards(tmp_path, INFO) == [0, 1, 2]
    write_shard(tmp_path, INFO, 0, CODES[:4], LABELS[:4])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        class Interrupted(shards.ArrayRecordWriter):
            def close(self):
                raise KeyboardInterrupt

        patch.setattr(shards, "ArrayRecordWriter", Interrupted)
        write_shard(tmp_path, INFO, 1, CODES[4:8], LABELS[4:8])
    assert sorted(os.listdir(tmp_path)) == ["codes.json", shard_name(0)]
    (tmp_path / f"{shard_name(1)}.0123.tmp").write_text("left behind by a killed process")
    with pytest.raises(InputError, match="not complete"):
        open_codes(tmp_path)
    with pytest.raises(InputError, match=f"{shard_name(1)} is missing"):
        finish(tmp_path, CodesInfo)
    before = (tmp_path / shard_name(0)).stat().st_mtime_ns
    assert missing_shards(tmp_path, INFO) == [1, 2]
    write_all(tmp_path)
    assert (tmp_path / shard_name(0)).stat().st_mtime_ns == before
    assert len(open_codes(tmp_path)) == 10
    assert sorted(os.listdir(tmp_path)) == ["codes.json", *map(shard_name, range(3))]
    assert missing_shards(tmp_path, INFO) == []


def test_a_shard_that_is_there_stays(tmp_path):
    begin(tmp_path, INFO)
    write_shard(tmp_path, INFO, 0, CODES[:4], LABELS[:4])
    before = (tmp_path / shard_name(0)).stat()
    write_shard(tmp_path, INFO, 0, CODES[4:8], LABELS[4:8])
    assert (tmp_path / shard_name(0)).stat().st_ino == before.st_ino


def test_a_full_disk_leaves_no_shard(tmp_path, monkeypatch):
    begin(tmp_path, INFO)
    monkeypatch.setattr(shards, "ArrayRecordWriter", lambda path, options: ArrayRecordWriter("/dev/full", options))
    with pytest.raises(OSError, match=f"{shard_name(0)}: .*No space left"):
        write_shard(tmp_path, INFO, 0, CODES[:4], LABELS[:4])
    assert os.listdir(tmp_path) == ["codes.json"]


@pytest.mark.parametrize("change", [{"tokenizer": "beef"}, {"data": "other images"}, {"images": 11}, {"shard_size": 5}])
def test_codes_of_something_else_are_not_mixed_in(tmp_path, change):
    begin(tmp_path, INFO)
    for ask in (begin, missing_shards):
        with pytest.raises(InputError, match=f"another {next(iter(change))}"):
            ask(tmp_path, dataclasses.replace(INFO, **change))


def test_codes_that_do_not_fit(tmp_path):
    begin(tmp_path, INFO)
    for shard, part, labels in [
        (0, CODES[:5], LABELS[:5]),
        (2, CODES[:3], LABELS[:3]),
        (3, CODES[:1], LABELS[:1]),
        (0, CODES[:4, :1], LABELS[:4]),
        (0, CODES[:4], LABELS[:3]),
        (0, CODES[:4] + 40, LABELS[:4]),
        (0, CODES[:4] - 1, LABELS[:4]),
        (0, CODES[:4], LABELS[:4] + 1),
        (0, CODES[:4], LABELS[:4] - 1),
    ]:
        with pytest.raises(ValueError):
            write_shard(tmp_path, INFO, shard, part, labels)
    assert missing_shards(tmp_path, INFO) == [0, 1, 2]


def test_damage_is_found_before_anything_is_read(tmp_path):
    write_all(tmp_path)
    shard = tmp_path / shard_name(1)
    whole = shard.read_bytes()
    for content in (whole[:-1], whole + b"0", b""):
        shard.write_bytes(content)
        with pytest.raises(InputError, match=f"{shard.name} is damaged"):
            open_codes(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        open_codes(tmp_path)
    write_all(tmp_path)
    assert shard.read_bytes() == whole and len(open_codes(tmp_path, verify=True)) == 10


def test_damage_that_keeps_the_size_is_found_by_sha_256_or_when_it_is_read(tmp_path):
    write_all(tmp_path)
    shard = tmp_path / shard_name(1)
    whole = shard.read_bytes()
    record = struct.pack("<i6H", LABELS[5], *CODES[5].ravel())
    place = whole.index(record) + len(record) - 1
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        open_source(DataConfig(source="codes", path=str(tmp_path), verify=True))
    source = open_source(DataConfig(source="codes", path=str(tmp_path)))
    np.testing.assert_array_equal(source[4]["codes"], CODES[4])
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        source[5]
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        next(batches(source, DataConfig(source="codes"), batch_size=10, seed=0))
    shard.write_bytes(b"0" * len(whole))
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        open_codes(tmp_path)[4]


def test_damaged_codes_json(tmp_path):
    write_all(tmp_path)
    manifest = tmp_path / "codes.json"
    values = json.loads(manifest.read_text())
    texts = [json.dumps(values)[:-5], "[]", "", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", " " * shards.MAX_JSON + "{}"]
    texts += [json.dumps({name: value for name, value in values.items() if name != missing}) for missing in values]
    for change in [
        {"version": CodesInfo.VERSION - 1},
        {"tokens": "many"},
        {"tokens": 10**12},
        {"tokens": 16384, "crops": 4096},  # more than is in the files
        {"tokens": 4},
        {"crops": 0},
        {"images": 2.5},
        {"images": True},
        {"images": 2**31 - 1, "shard_size": 1},
        {"codebook_size": 10**9},
        {"class_names": [1, 2]},
        {"class_names": "ab"},
        {"surplus": 1},
        {"shards": []},
        {"shards": [{}] * 3},
        {"shards": [shard | {"records": shard["records"] + 1} for shard in values["shards"]]},
        {"shards": [shard | {"records": -1} for shard in values["shards"]]},
    ]:
        texts.append(json.dumps(values | change))
    for text in texts:
        manifest.write_text(text)
        with pytest.raises(InputError, match="codes.json|shard-00000") as raised:
            open_codes(tmp_path)
        assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)
    manifest.unlink()
    with pytest.raises(InputError, match="without codes.json"):
        begin(tmp_path, INFO)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([1, 2, 3, 50, 10**12]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), change=JSON)
def test_codes_json_of_any_form_is_read_or_refused(written, data, change):
    values = json.loads(written.text)
    table = data.draw(st.sampled_from([values, *values["shards"]]))
    table[data.draw(st.sampled_from(sorted(table)))] = change
    (written.folder / "codes.json").write_text(json.dumps(values))
    with contextlib.suppress(InputError):
        source = open_codes(written.folder)
        assert all(source[index]["codes"].shape == (source.info.crops, source.info.tokens) for index in range(len(source)))


@dataclasses.dataclass
class Written:
    folder: Path
    text: str


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_all(folder)
    return Written(folder, (folder / "codes.json").read_text())


@pytest.mark.parametrize(
    "label,code,message",
    [
        (1_000_000, 0, "label 1000000, labels are 0 .. 1"),
        (-1, 0, "label -1"),
        (2, 0, "label 2"),
        (0, 60_000, "code 60000, codes are 0 .. 49"),
        (0, 50, "code 50"),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_labels_and_codes_out_of_range_are_refused_with_the_name_of_the_shard(tmp_path, label, code, message, place):
    """Of the first record of a shard when the folder is opened, of others when they are read, by worker processes too."""
    write_all(tmp_path)
    shard = tmp_path / shard_name(1)
    wrong = np.zeros(4, INFO.record)
    wrong["label"][place], wrong["codes"][place, 1, 2] = label, code
    shard.unlink()
    writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for record in wrong:
        writer.write(record.tobytes())
    writer.close()
    finish(tmp_path, CodesInfo)
    damaged = f"{shard.name} is damaged: it holds the {message}"
    if place == 0:
        with pytest.raises(InputError, match=damaged):
            open_codes(tmp_path)
        return
    source = open_codes(tmp_path)
    with pytest.raises(InputError, match=damaged):
        source[5]
    with pytest.raises(InputError, match=damaged):
        next(batches(source, DataConfig(source="codes"), batch_size=10, seed=0))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_what_cannot_be_read_is_not_to_be_deleted(tmp_path, monkeypatch, number):
    write_all(tmp_path)

    def fail(*arguments):
        raise RuntimeError(f"open() failed: {os.strerror(number)}")

    monkeypatch.setattr(ArrayRecordDataSource, "__getitem__", fail)
    with pytest.raises(InputError, match=rf"{shard_name(0)} cannot be read: open\(\) failed") as caught:
        open_codes(tmp_path)
    assert "delete" not in str(caught.value)


def test_a_damaged_shard_is_not_sealed(tmp_path):
    write_all(tmp_path)
    shard = tmp_path / shard_name(2)
    for content in (b"half", shard.read_bytes()[:-1]):
        shard.write_bytes(content)
        with pytest.raises(InputError, match=shard.name):
            finish(tmp_path, CodesInfo)
    writer = ArrayRecordWriter(str(shard), "group_size:1")
    writer.write(b"of something else")
    writer.close()
    with pytest.raises(InputError, match=f"{shard.name} is damaged: its records are of other codes"):
        finish(tmp_path, CodesInfo)


def test_codes_of_no_image(tmp_path):
    info = dataclasses.replace(INFO, images=1, shard_size=1)
    begin(tmp_path, info)
    write_shard(tmp_path, info, 0, CODES[:0], LABELS[:0])
    finish(tmp_path, CodesInfo)
    with pytest.raises(InputError, match="no codes"):
        open_codes(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        begin(tmp_path / "file" / "codes", INFO)


class Bucket(MemoryFileSystem):
    """In place of gcsfs: objects in memory, by names like /bucket/folder/object."""

    protocol, store, pseudo_dirs = "gs", {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")


class BucketServer(BaseHTTPRequestHandler):
    """What ArrayRecord asks Google's storage for: ranges of the objects of Bucket."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        bucket, name = re.match(r"/storage/v1/b/(.+)/o/(.+)\?alt=media", self.path).groups()
        content = Bucket.store[f"/{bucket}/{unquote(name)}"].getvalue()
        start, end = re.match(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
        part = slice(int(start), int(end) + 1 if end else None) if start else slice(-min(int(end), len(content)), None)
        start, end, _ = part.indices(len(content))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # it reads no further than it needs
            self.wfile.write(content[part])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def bucket(monkeypatch):
    systems = {"gcs": Bucket(), "file": LocalFileSystem()}
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", systems.get)
    with ThreadingHTTPServer(("localhost", 0), BucketServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://localhost:{server.server_port}")
        yield "gs://bucket"
        server.shutdown()
    Bucket.store.clear()


def test_codes_in_a_bucket(bucket):
    begin(f"{bucket}/codes", INFO)
    write_shard(f"{bucket}/codes", INFO, 1, CODES[4:8], LABELS[4:8])
    assert missing_shards(f"{bucket}/codes", INFO) == [0, 2]
    write_all(f"{bucket}/codes")
    assert sorted(Bucket.store) == [f"/bucket/codes/{name}" for name in ("codes.json", *map(shard_name, range(3)))]
    source = open_source(DataConfig(source="codes", path=bucket, split="codes", verify=True))
    np.testing.assert_array_equal(np.stack([source[i]["codes"] for i in range(10)]), CODES)
    shard = Bucket.store[f"/bucket/codes/{shard_name(2)}"]
    shard.truncate(shard.getbuffer().nbytes - 1)
    with pytest.raises(InputError, match=f"gs://bucket/codes/{shard_name(2)} is damaged"):
        open_codes(f"{bucket}/codes")
    with pytest.raises(InputError, match="gs://bucket/other holds no codes"):
        open_codes(f"{bucket}/other")


def test_a_bucket_without_what_it_takes(monkeypatch):
    def refuse(name):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", refuse)
    with pytest.raises(InputError, match=r'install gcsfs.*pip install "\.\[gcs\]"'):
        open_codes("gs://bucket/codes")


def test_fingerprint():
    a, b = jnp.arange(6.0).reshape(2, 3), jnp.bfloat16(1.5)
    value = fingerprint({"x": {"a": a, "b": b}, "y": a})
    assert len(value) == 64
    assert fingerprint({"y": np.asarray(a), "x": {"b": b, "a": a}}) == value
    for other in (
        {"x": {"a": a, "b": b}, "y": a.at[1, 1].set(9)},
        {"x": {"a": a, "b": b}, "y": a.T},
        {"x": {"a": a, "b": b}, "y": a.reshape(3, 2)},
        {"x": {"a": a, "b": b}, "y": a.astype(int)},
        {"x": {"a": a, "c": b}, "y": a},
    ):
        assert fingerprint(other) != value
