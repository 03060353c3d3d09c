import dataclasses
import json
import os
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import DataConfig
from dar_jax.data import codes
from dar_jax.data.codes import CodesInfo, fingerprint, finish, missing_shards, open_codes, write_shard
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


def write_all(folder, info=INFO):
    for shard in missing_shards(folder, info):
        part = list(info.elements(shard))
        write_shard(folder, shard, CODES[part], LABELS[part])
    finish(folder)


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


def test_codes_of_a_large_codebook(tmp_path):
    info = dataclasses.replace(INFO, images=1, shard_size=1, codebook_size=100_000)
    large = np.full((1, 2, 3), 99_999)
    missing_shards(tmp_path, info)
    write_shard(tmp_path, 0, large, [1])
    finish(tmp_path)
    np.testing.assert_array_equal(open_codes(tmp_path)[0]["codes"], large[0])


def test_unreadable_images_are_left_out(tmp_path):
    missing_shards(tmp_path, INFO)
    write_shard(tmp_path, 0, CODES[:0], LABELS[:0])
    write_shard(tmp_path, 1, CODES[5:8], LABELS[5:8])
    write_shard(tmp_path, 2, CODES[8:], LABELS[8:])
    finish(tmp_path)
    source = open_codes(tmp_path)
    assert [source[i]["codes"][0, 0] for i in range(len(source))] == [30, 36, 42, 48, 4]


def test_interrupted_writing_goes_on_at_the_first_missing_shard(tmp_path, monkeypatch):
    assert missing_shards(tmp_path, INFO) == [0, 1, 2]
    write_shard(tmp_path, 0, CODES[:4], LABELS[:4])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(file, records, **options):
            file.write(b"half")
            raise KeyboardInterrupt

        patch.setattr(np, "save", interrupt)
        write_shard(tmp_path, 1, CODES[4:8], LABELS[4:8])
    assert sorted(os.listdir(tmp_path)) == ["codes.json", "shard-00000.npy"]
    (tmp_path / "shard-00001.npy.0123.tmp").write_text("left behind by a killed process")
    with pytest.raises(InputError, match="not complete"):
        open_codes(tmp_path)
    with pytest.raises(InputError, match="shard-00001.npy is missing"):
        finish(tmp_path)
    before = (tmp_path / "shard-00000.npy").stat().st_mtime_ns
    assert missing_shards(tmp_path, INFO) == [1, 2]
    write_all(tmp_path)
    assert (tmp_path / "shard-00000.npy").stat().st_mtime_ns == before
    assert len(open_codes(tmp_path)) == 10
    assert sorted(os.listdir(tmp_path)) == ["codes.json", *(f"shard-0000{i}.npy" for i in range(3))]
    assert missing_shards(tmp_path, INFO) == []


@pytest.mark.parametrize("change", [{"tokenizer": "beef"}, {"data": "other images"}, {"images": 11}, {"shard_size": 5}])
def test_codes_of_something_else_are_not_mixed_in(tmp_path, change):
    missing_shards(tmp_path, INFO)
    with pytest.raises(InputError, match=f"another {next(iter(change))}"):
        missing_shards(tmp_path, dataclasses.replace(INFO, **change))


def test_codes_that_do_not_fit(tmp_path):
    missing_shards(tmp_path, INFO)
    for shard, part, labels in [
        (0, CODES[:5], LABELS[:5]),
        (2, CODES[:3], LABELS[:3]),
        (3, CODES[:1], LABELS[:1]),
        (0, CODES[:4, :1], LABELS[:4]),
        (0, CODES[:4], LABELS[:3]),
        (0, CODES[:4] + 40, LABELS[:4]),
        (0, CODES[:4] - 1, LABELS[:4]),
    ]:
        with pytest.raises(ValueError):
            write_shard(tmp_path, shard, part, labels)
    assert missing_shards(tmp_path, INFO) == [0, 1, 2]


def test_damage_is_found(tmp_path):
    write_all(tmp_path)
    shard, manifest = tmp_path / "shard-00001.npy", tmp_path / "codes.json"
    whole, values = shard.read_bytes(), json.loads(manifest.read_text())
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        shard.write_bytes(content)
        with pytest.raises(InputError, match="shard-00001.npy"):
            open_codes(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match="shard-00001.npy is missing"):
        open_codes(tmp_path)
    shard.write_bytes(whole)
    for change in ({"version": codes.VERSION + 1}, {"tokens": "many"}, {"crops": 0}, {"shards": []}, {"shards": [{}] * 3}):
        manifest.write_text(json.dumps(values | change))
        with pytest.raises(InputError, match="codes.json"):
            open_codes(tmp_path)
    for text in (json.dumps(values)[:-5], "[]"):
        manifest.write_text(text)
        with pytest.raises(InputError, match="codes.json"):
            open_codes(tmp_path)
    manifest.unlink()
    with pytest.raises(InputError, match="without codes.json"):
        missing_shards(tmp_path, INFO)


def test_a_damaged_shard_is_not_sealed(tmp_path):
    write_all(tmp_path)
    shard = tmp_path / "shard-00002.npy"
    for content in (b"half", shard.read_bytes()[:-1]):
        shard.write_bytes(content)
        with pytest.raises(InputError, match="shard-00002.npy"):
            finish(tmp_path)
    np.save(shard, np.zeros((4, 3)))
    with pytest.raises(InputError, match="shard-00002.npy"):
        finish(tmp_path)


def test_codes_of_no_image(tmp_path):
    info = dataclasses.replace(INFO, images=1, shard_size=1)
    missing_shards(tmp_path, info)
    write_shard(tmp_path, 0, CODES[:0], LABELS[:0])
    finish(tmp_path)
    with pytest.raises(InputError, match="no codes"):
        open_codes(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        missing_shards(tmp_path / "file" / "codes", INFO)


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
