"""Packing data sets, and the same batches from all doors."""

import dataclasses
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pytest
import stand_in
from PIL import Image
from pyarrow import parquet

from dar_jax.cli import main as cli
from dar_jax.config import DataConfig
from dar_jax.data import packed, shards
from dar_jax.data.packed import HEAD, PackedInfo, open_packed, pack
from dar_jax.data.pipeline import batches, epoch
from dar_jax.data.shards import finish
from dar_jax.data.sources import FolderSource, open_source
from dar_jax.data.transforms import center_crop
from dar_jax.errors import InputError
from dar_jax.training.logs import read_records
from dar_jax.training.loop import train

ROOT = Path(__file__).parent.parent
NAMES = ("ant", "bee", "cow")
DATA = DataConfig(image_size=8, channels=1, crop="ten_crop", ten_crop_scale=1.5, flip=True)


def encode(pixels, form="jpeg", mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **({"lossless": True} if form == "webp" else {}))
    return file.getvalue()


def members(split="train", count=13):
    """Names and bytes of images in the order of a folder, of every kind; the fifth of the training images is none."""
    rng = np.random.default_rng(len(split))
    kinds = [("jpeg", "RGB"), ("jpeg", "CMYK"), ("png", "RGBA"), ("webp", "RGB"), ("png", "L")]
    found = []
    for number in range(count):
        form, mode = kinds[number % 5]
        content = encode(rng.integers(0, 256, rng.integers(9, 40, 2).tolist() + [3], np.uint8), form, mode)
        content = b"this is no picture" if split == "train" and number == 5 else content
        found.append((f"{NAMES[number * 3 // count]}/image {number:02d}.{form}", content))
    return found


def write_folder(path, files):
    for name, content in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, with train and val."""
    path = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        write_folder(path / split, members(split))
    return path


def run(*arguments):
    """`dar-jax pack`, in shards of four images."""
    return cli.main(["pack", *map(str, arguments), "--shard-size", "4"])


def contents(path):
    return {file.name: file.read_bytes() for file in path.glob("shard-*")}


def three_batches(**changes):
    config = dataclasses.replace(DATA, **changes)
    data = batches(open_source(config), config, batch_size=5, seed=3)
    return [next(data) for _ in range(3)]


def require_equal(some, others):
    for batch, other in zip(some, others, strict=True):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(value, other[name])


@pytest.fixture(scope="module")
def without_the_damaged(tmp_path_factory):
    """What the doors should give: the folder without the file that is no image."""
    path = tmp_path_factory.mktemp("good")
    write_folder(path / "train", [member for number, member in enumerate(members()) if number != 5])
    return path


def test_a_folder(folder, without_the_damaged, tmp_path, capsys, caplog):
    assert run(folder, "--out", tmp_path / "packed" / "train") == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/packed/train: 12 images of 3 classes in 4 files\nleft out: 1 of 13, which could not be read" in out
    assert "stored as the original bytes" in out
    assert f"skipped: the image {folder}/train/bee/image 05.jpeg cannot be read: it is no PNG, JPEG or WebP" in caplog.text
    source = pickle.loads(pickle.dumps(open_packed(tmp_path / "packed", "train", verify=True)))
    assert source.class_names == NAMES and len(source) == 12
    expected = [(name, content) for number, (name, content) in enumerate(members()) if number != 5]
    assert [(source.key(index), source.encoded(index)[0].read()) for index in range(12)] == expected
    assert run(folder, "--split", "val", "--out", tmp_path / "packed" / "val") == 0
    for workers in (0, 1):
        given = {"source": "packed", "path": str(tmp_path / "packed"), "workers": workers}
        require_equal(three_batches(**given), three_batches(path=str(without_the_damaged)))
    require_equal(three_batches(**given, split="val"), three_batches(path=str(folder), split="val"))
    with pytest.raises(InputError, match="train holds the split train, not test; give train as data.split or"):
        open_packed(tmp_path / "packed" / "train", "test")


def as_parquet(files, path):
    """As the Hub has ImageNet: a struct of bytes and path, the label, class names in the metadata."""
    images = [{"bytes": content, "path": os.path.basename(name)} for name, content in files]
    table = arrow.table({"image": images, "label": [NAMES.index(name.split("/")[0]) for name, _ in files]})
    names = {"info": {"features": {"label": {"names": NAMES}}}}
    for number, start in enumerate(range(0, len(files), 7)):
        part = table.slice(start, 7).replace_schema_metadata({"huggingface": json.dumps(names)})
        parquet.write_table(part, path / f"train-{number:05d}-of-00002.parquet", row_group_size=3)
    return path


def as_tars(files, path):
    """As webdataset writes them."""
    (path / "class_names.txt").write_text("\n".join(NAMES))
    for number, start in enumerate(range(0, len(files), 7)):
        with tarfile.open(path / f"set-train-{number:06d}.tar", "w") as tar:
            for place, (name, content) in enumerate(files[start : start + 7], start):
                label = str(NAMES.index(name.split("/")[0])).encode()
                for end, data in [("cls", label), ("json", b'{"a": 1}'), (name.rpartition(".")[2], content)]:
                    info = tarfile.TarInfo(f"{place:09d}.{end}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def as_zip(files, path):
    """As Kaggle has ImageNet."""
    with zipfile.ZipFile(path / "imagenet.zip", "w") as archive:
        for name, content in files:
            archive.writestr(f"ILSVRC/Data/CLS-LOC/train/{name}", content)
        archive.writestr("ILSVRC/Data/CLS-LOC/val/1.JPEG", files[0][1])
    return path / "imagenet.zip"


def as_folder(files, path):
    write_folder(path / "train", files)
    return path


def losses(path, workdir, source):
    """The log of three steps of training."""
    data = dataclasses.replace(DATA, source=source, path=str(path), crop="center")
    settings = dataclasses.replace(stand_in.config.train, steps=3, log_every=1)
    config = dataclasses.replace(stand_in.config, data=data, train=settings)
    train(dataclasses.replace(stand_in.experiment, config=config, source=open_source), workdir)
    logged = [record["loss"] for record in read_records(workdir) if "loss" in record]
    assert len(logged) == 3
    return logged


@pytest.mark.parametrize("door", [as_folder, as_parquet, as_tars, as_zip])
def test_the_same_from_every_door(door, without_the_damaged, tmp_path, capsys):
    """A data set in each form, packed: the same shards but for the names, batches and losses as from the folder."""
    (tmp_path / "form").mkdir()
    path, out = door(members(), tmp_path / "form"), tmp_path / "packed"
    assert run(path, "--out", out) == 0
    assert "12 images of 3 classes in 4 files\nleft out: 1 of 13" in capsys.readouterr().out
    assert open_packed(out, "train").class_names == NAMES
    expected = three_batches(path=str(without_the_damaged))
    require_equal(three_batches(source="packed", path=str(out)), expected)
    assert losses(out, tmp_path / "run", "packed") == losses(without_the_damaged, tmp_path / "other", "folder")


def test_tars_are_trained_on_as_they_are(without_the_damaged, tmp_path):
    path = as_tars([member for number, member in enumerate(members()) if number != 5], tmp_path)
    for workers in (0, 1):
        require_equal(
            three_batches(source="tar", path=str(path), workers=workers), three_batches(path=str(without_the_damaged))
        )
    assert losses(path, tmp_path / "run", "tar") == losses(without_the_damaged, tmp_path / "other", "folder")


def test_larger_images_are_scaled_and_say_so(folder, tmp_path, capsys):
    assert run(folder, "--out", tmp_path, "--min-side", 16) == 0
    said = "the original bytes, or scaled to a smaller side of 16 pixels, as JPEG of quality 95, where those are fewer"
    assert f"stored as {said}" in capsys.readouterr().out
    assert json.loads((tmp_path / "packed.json").read_text())["encoding"] == said
    source, originals = open_packed(tmp_path, "train"), FolderSource(folder, "train", 3, 16)
    keys = [source.key(index) for index in range(len(source))]
    scaled = 0
    for index in range(len(originals)):
        if (element := originals.read(index)) is None:
            continue
        image, original = source[keys.index(originals.key(index))]["image"], element["image"]
        if image.shape == original.shape:
            np.testing.assert_array_equal(image, original)
        else:
            scaled += 1
            assert min(image.shape[:2]) == 16 < min(original.shape[:2])
            assert np.abs(center_crop(image, 16).astype(int) - center_crop(original, 16)).mean() < 6
        assert len(source.encoded(keys.index(originals.key(index)))[0].read()) <= len(dict(members())[originals.key(index)])
    assert 0 < scaled < 12


KILLED = """
import os, random, signal, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from dar_jax.data import packed
from dar_jax.data.sources import FolderSource

source, out, rng = FolderSource(Path(sys.argv[1]), "train", 3, 1), sys.argv[2], random.Random(0)
original, left, kills = packed._prepared, 0, 0

def prepared(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

packed._prepared = prepared
while True:
    left = rng.randrange(6)
    if (child := os.fork()) == 0:  # nothing has started a thread yet
        packed.pack(source, out, "train", 4)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    kills += 1
print(kills)
"""


def test_killed_again_and_again(folder, tmp_path):
    """The same shards as undisturbed, whichever image the process was at when it was killed."""
    command = [sys.executable, "-c", KILLED, folder, tmp_path / "killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    pack(FolderSource(folder, "train", 3, 1), tmp_path / "undisturbed", "train", 4)
    assert int(result.stdout.split()[-1]) >= 5
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert (tmp_path / "killed" / "packed.json").read_bytes() == (tmp_path / "undisturbed" / "packed.json").read_bytes()
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_hosts_share_the_work(folder, tmp_path, monkeypatch):
    """Two hosts one after the other: the first of them writes what the second has not begun, and nothing twice."""
    source = FolderSource(folder, "train", 3, 1)
    pack(source, tmp_path / "one", "train", 4)
    written = []
    write = shards.write_records
    monkeypatch.setattr(
        packed, "write_records", lambda out, shard, records: (written.append(shard), write(out, shard, records))
    )
    monkeypatch.setattr("jax.process_count", lambda: 2)
    shards.begin(tmp_path / "two", open_packed(tmp_path / "one", "train").records.info)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr(random, "Random", lambda seed: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "two", "train", 4)
    assert written == [1, 3]
    monkeypatch.undo()
    pack(source, tmp_path / "two", "train", 4)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_another_data_set_is_not_mixed_in(folder, tmp_path, capsys):
    assert run(folder, "--out", tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert run(folder, "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before
    for options, message in [(["--min-side", 8], "encoding: "), (["--split", "val"], "source.contents: ")]:
        assert run(folder, "--out", tmp_path / "out", *options) == 2
        assert f"out was begun with something else, {message}" in capsys.readouterr().err
    assert cli.main(["pack", str(folder), "--out", str(tmp_path / "out"), "--shard-size", "5"]) == 2
    assert "shard_size: 4 there, 5 here; delete it" in capsys.readouterr().err


def test_damaged_records_are_skipped_and_the_folder_is_checked(folder, tmp_path, caplog):
    pack(FolderSource(folder, "val", 3, 1), tmp_path, "val", 4)
    shard = tmp_path / "shard-00001.array_record"
    whole, image = shard.read_bytes(), members("val")[5][1]
    place = whole.index(image) + len(image) - 1
    shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    source = open_packed(tmp_path, "val")
    assert [source.read(index) is None for index in range(13)] == [index == 5 for index in range(13)]
    assert "skipped: " in caplog.text and "shard-00001.array_record is damaged" in caplog.text
    config = dataclasses.replace(DATA, source="packed", path=str(tmp_path), split="val", crop="center")
    assert sum(batch["valid"].sum() for batch in epoch(open_source(config), config, batch_size=5)) == 12
    with pytest.raises(InputError, match="shard-00001.array_record is damaged: it is not what was written"):
        open_source(dataclasses.replace(config, verify=True))
    shard.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="shard-00001.array_record is damaged: .* pack again, which writes only"):
        open_source(config)


def test_records_of_something_else(folder, tmp_path):
    info = PackedInfo(1, 1, NAMES, "train", packed.ORIGINAL, "an image")
    for record, message in [
        (b"short", "its records are of other packed images"),
        (HEAD.pack(0, 2**32 - 1) + b"key", "its records are of other packed images"),
        (HEAD.pack(3, 1) + b"k" + members()[0][1], "it holds the label 3, labels are 0 .. 2"),
        (HEAD.pack(-1, 1) + b"k" + members()[0][1], "it holds the label -1"),
    ]:
        out = tmp_path / str(hash(record))
        shards.begin(out, info)
        shards.write_records(out, 0, [record])
        with pytest.raises(InputError, match=message):
            finish(out, PackedInfo)
            open_packed(out, "train").encoded(0)


def test_nothing_can_be_read(tmp_path, capsys):
    write_folder(tmp_path / "images", [("a/1.png", b"no picture"), ("b/2.png", b"")])
    assert run(tmp_path / "images", "--out", tmp_path / "out") == 2
    assert "none of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "absent does not exist"),
        ("empty", "empty holds no images"),
        ("file.txt", "file.txt is no folder and no archive"),
    ],
)
def test_sources_that_are_none(tmp_path, capsys, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    assert run(tmp_path / source, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
