"""Images that are not files of their own: tars, zip archives, Parquet and idx files, well-formed, damaged and hostile."""

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as arrow
import pytest
from PIL import Image
from pyarrow import parquet

from dar_jax.config import DataConfig
from dar_jax.data import archives
from dar_jax.data import idx as idx_files
from dar_jax.data.archives import ParquetSource, TarSource, ZipSource, archive_files
from dar_jax.data.idx import FASHION
from dar_jax.data.pipeline import batches
from dar_jax.data.sources import held_out, open_source
from dar_jax.errors import InputError

FASHION_FILES = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))  # Debian's dataset-fashion-mnist
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)


def idx(array, *shape):
    """An idx file of bytes, whose header says another shape where one is given."""
    shape = shape or array.shape
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(
    folder, labels=(3, 1, 4, 1, 5, 9), prefix="", names=("train", "t10k"), pack=gzip.compress, end=".gz", pixels=PIXELS
):
    folder.mkdir(exist_ok=True)
    for name, images in zip(names, (pixels, pixels[::-1])):
        (folder / f"{prefix}{name}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
        (folder / f"{prefix}{name}-labels-idx1-ubyte{end}").write_bytes(pack(idx(np.array(labels))))
    return DataConfig(source="idx", path=str(folder), image_size=28, channels=1, crop="none", flip=False)


@pytest.mark.parametrize(("pack", "end"), [(gzip.compress, ".gz"), (bytes, "")])
def test_idx(tmp_path, pack, end):
    config = write_idx(tmp_path / "idx", pack=pack, end=end)
    source = pickle.loads(pickle.dumps(open_source(config)))
    assert (len(source), source.class_names) == (6, tuple("0123456789"))
    assert source.description == f"mnist in {tmp_path}/idx, train: 6 images in 10 classes"
    for index, label in enumerate((3, 1, 4, 1, 5, 9)):
        np.testing.assert_array_equal(source[index]["image"], PIXELS[index][..., None])
        assert source[index]["label"] == label
    np.testing.assert_array_equal(open_source(held_out(config))[0]["image"], PIXELS[5][..., None])
    colour = open_source(DataConfig(source="idx", path=config.path))[2]["image"]
    assert colour.shape == (28, 28, 3) and (colour == PIXELS[2][..., None]).all()
    assert next(batches(source, config, batch_size=6, seed=0))["image"].shape == (6, 28, 28, 1)


def test_names_with_a_dot(tmp_path):
    config = write_idx(tmp_path / "idx")
    for file in (tmp_path / "idx").iterdir():
        file.rename(file.with_name(file.name.replace("-idx", ".idx")))
    assert len(open_source(config)) == 6


def test_letters_stand_upright_and_count_from_0(tmp_path):
    config = write_idx(tmp_path / "idx", (1, 2, 26, 1, 1, 1), "emnist-letters-", ("train", "test"))
    source = open_source(config)
    assert [source[index]["label"] for index in range(3)] == [0, 1, 25]
    assert source.class_names[0] + source.class_names[25] == "az"
    np.testing.assert_array_equal(source[4]["image"], PIXELS[4].T[..., None])
    assert len(open_source(held_out(config))) == 6


def test_which_of_the_family(tmp_path, monkeypatch):
    config = write_idx(tmp_path / "idx")
    assert open_source(DataConfig(source="idx", path=config.path, dataset="kmnist")).class_names[1] == "ki"
    labels = gzip.decompress((tmp_path / "idx" / "train-labels-idx1-ubyte.gz").read_bytes())
    monkeypatch.setattr(idx_files, "FASHION_LABELS", {hashlib.sha256(labels).hexdigest()})
    assert open_source(config).class_names == FASHION
    with pytest.raises(InputError, match="data.dataset is cifar10, .*mnist, fashion-mnist, kmnist, emnist-letters"):
        open_source(DataConfig(source="idx", path=config.path, dataset="cifar10"))
    with pytest.raises(InputError, match="data.split is val, idx files have train and test"):
        open_source(DataConfig(source="idx", path=config.path, split="val"))


@pytest.mark.skipif(not FASHION_FILES.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
@pytest.mark.parametrize(("split", "count"), [("train", 60_000), ("test", 10_000)])
def test_the_real_fashion_mnist(split, count):
    source = open_source(DataConfig(source="idx", path=str(FASHION_FILES), split=split, channels=1))
    assert (len(source), source.class_names) == (count, FASHION)
    labels = [source[index]["label"] for index in range(count)]
    assert set(np.bincount(labels)) == {count // 10}
    assert labels[:4] == {"train": [9, 0, 0, 3], "test": [9, 2, 1, 1]}[split]


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (IMAGES, None, "idx holds no train-images-idx3-ubyte.gz"),
        (IMAGES, b"no gzip", f"{IMAGES} is damaged: Not a gzipped file"),
        (IMAGES, gzip.compress(idx(PIXELS), mtime=0)[:-100], f"{IMAGES} is damaged: Compressed file ended"),
        (IMAGES, gzip.compress(b"\0\0\x08", mtime=0), f"{IMAGES} is damaged: it is no idx file of bytes in 3 dimensions"),
        (IMAGES, gzip.compress(idx(PIXELS[0]), mtime=0), f"{IMAGES} is damaged: it is no idx file of bytes in 3 dimensions"),
        (
            IMAGES,
            gzip.compress(idx(PIXELS, 7, 28, 28), mtime=0),
            f"{IMAGES} is damaged: it does not end after the 7 x 28 x 28 bytes",
        ),
        (
            IMAGES,
            gzip.compress(idx(PIXELS, 5, 28, 28), mtime=0),
            f"{IMAGES} is damaged: it does not end after the 5 x 28 x 28 bytes",
        ),
        (
            IMAGES,
            gzip.compress(idx(PIXELS, 2**32 - 1, 2**32 - 1, 2**32 - 1), mtime=0),
            f"{IMAGES} is damaged: it says that it holds 4294",
        ),
        (IMAGES, gzip.compress(idx(PIXELS, 0, 28, 28), mtime=0), f"{IMAGES} is damaged: it says that it holds 0 x 28"),
        (LABELS, gzip.compress(idx(np.arange(5)), mtime=0), "idx has 6 images and 5 labels of train; copy its files again"),
        (LABELS, gzip.compress(idx(np.arange(5, 11)), mtime=0), "idx holds labels from 5 to 10, mnist has 10 classes"),
    ],
)
def test_damaged_idx(tmp_path, file, content, message):
    config = write_idx(tmp_path / "idx")
    (tmp_path / "idx" / file).unlink()
    if content is not None:
        (tmp_path / "idx" / file).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        open_source(config)
    assert "\n" not in str(raised.value)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dar_jax" / "tars"


def png(value):
    """A grey image of this value."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "png")
    return file.getvalue()


def values(source):
    """Of each element the value of its pixels and its label; None where it cannot be read."""
    found = [source.read(index) for index in range(len(source))]
    return [element and (int(element["image"][0, 0, 0]), element["label"]) for element in found]


def write_tar(path, members, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key, value, label):
    return [(f"{key}.png", png(value)), (f"{key}.cls", str(label).encode())]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar(tmp_path, cache, form, monkeypatch):
    """Two tars of a split, with labels in .cls and .json, long names, other members and other splits."""
    monkeypatch.setattr(archives, "WORTH_KEEPING", 0)
    long = "n" * 90 if form == tarfile.USTAR_FORMAT else "ö" * 150
    described = [("a/3.json", json.dumps({"label": 0, "height": 4}).encode()), ("a/3.JPG", png(3)), ("a/3.txt", b"a thing")]
    first = write_tar(tmp_path / "tars" / "set-train-0.tar", [*sample("1", 1, 2), *sample(f"{long}/2", 2, "1\n")], format=form)
    write_tar(
        tmp_path / "tars" / "set-train-1.tar", [("README", b"?"), *described, *sample("1", 4, 2), ("5.cls", b"1")], format=form
    )
    write_tar(tmp_path / "tars" / "set-validation-0.tar", sample("1", 9, 0), format=form)
    config = DataConfig(source="tar", path=str(tmp_path / "tars"), channels=1, image_size=4)
    source = open_source(config)
    assert values(source) == [(1, 2), (2, 1), (3, 0), (4, 2)] and source.class_names == ("0", "1", "2")
    assert [source.key(index) for index in range(4)] == ["1", f"{long}/2", "a/3", "1"]
    assert source.name(1) == f"{long}/2 of {first}"
    assert values(open_source(held_out(config))) == [(9, 0)]
    assert values(pickle.loads(pickle.dumps(source))) == values(source)
    (tmp_path / "tars" / "class_names.txt").write_text("cat\n dog\n\ncow, brown")
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_members", None)  # the list of members is in the cache
        named = open_source(config)
    assert values(named) == values(source) and named.class_names == ("cat", "dog", "cow, brown")
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    assert values(open_source(config)) == values(source)
    os.utime(first)
    write_tar(first, sample("7", 7, 0))
    assert values(open_source(config))[0] == (7, 0)


def test_which_archives_are_of_a_split(tmp_path):
    def files(path, split="train"):
        return [str(file.relative_to(tmp_path)) for file in archive_files(tmp_path / path, split, ".tar")]

    for name in (
        "a/train/x-val.tar",
        "b/1.tar",
        "b/.2.tar",
        "c/data/Set_Train.tar",
        "c/data/set_val.tar",
        "c/data/training.tar",
    ):
        write_tar(tmp_path / name, [])
    assert files("a") == ["a/train/x-val.tar"] and files("a", "val") == [] and files("b", "val") == ["b/1.tar"]
    assert files("c") == ["c/data/Set_Train.tar"] and files("c", "validation") == ["c/data/set_val.tar"]
    assert files("b/1.tar", "val") == ["b/1.tar"]
    with pytest.raises(InputError, match="c has train and val but no test"):
        files("c", "test")


def test_what_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "train-%03d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write({"__key__": f"{number:04d}", "png": png(number), "cls": number % 3, "json": {"number": number}})
    source = TarSource(tmp_path, "train", 3, 1)
    assert len(source.files) == 3 and values(source) == [(number, number % 3) for number in range(5)]


def test_samples_that_are_skipped(tmp_path, caplog):
    members = sample("good", 1, 1) + [("no label.png", png(2)), ("word.png", png(3)), ("word.cls", b"cat")]
    members += [("list.png", png(3)), ("list.json", b'{"label": [1]}'), ("deep.png", png(3)), ("deep.json", b"[" * 10**5)]
    members += [*sample("negative", 3, -1), *sample("large", 3, 10**9), *sample("no image", 3, 0)[1:], ("text.jpg", b"text")]
    members += [
        ("text.cls", b"0"),
        *sample("good", 4, 0),
        *sample("twice", 5, 0),
        *sample("twice", 6, 0),
        *sample("../up", 7, 0),
    ]
    members += [*sample("/root", 8, 0), *sample("a/../../up", 8, 0), *sample("last", 9, 0)]
    source = TarSource(write_tar(tmp_path / "1.tar", members), "train", 3, 1)
    assert [value for value in values(source) if value] == [(1, 1), (5, 0), (9, 0)]
    assert source.unreadable == len(source) - 3 == len(caplog.records) == 12
    for message in [
        "the image no label of .*1.tar cannot be read: it has no label",
        "the image word of",
        "the image list of",
        "the image deep of",
        "the image large of",
        "the image text of .*1.tar cannot be read: it is no PNG, JPEG or WebP",
        "the image good of .* its key is there twice",
        "the image twice of .* its key is there twice",
        r"the image \.\./up of .* its name leads out of the archive",
        "the image /root of .* leads out",
    ]:
        assert re.search(message, caplog.text), message
    assert not (tmp_path / "up.png").exists() and not (tmp_path.parent / "up.png").exists()


def test_a_label_beyond_the_named_classes(tmp_path, caplog):
    (tmp_path / "class_names.txt").write_text("cat\ndog\n")
    source = TarSource(write_tar(tmp_path / "1.tar", [*sample("a", 1, 1), *sample("b", 2, 2)]), "train", 3, 1)
    assert values(source) == [(1, 1), None] and "its label is 2, of 2 classes" in caplog.text
    (tmp_path / "class_names.txt").write_text("\n")
    with pytest.raises(InputError, match="class_names.txt cannot be read: it names 0 classes"):
        TarSource(tmp_path, "train", 3, 1)


def other_header(content, start, size):
    """A tar whose header at `start` says another size, with the right checksum."""
    head = bytearray(content[start : start + 512])
    head[124:136] = size
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return content[:start] + bytes(head) + content[start + 512 :]


def whole_tar(tmp_path):
    return write_tar(tmp_path / "whole.tar", [*sample("a", 1, 0), *sample("b", 2, 0)], format=tarfile.USTAR_FORMAT).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar: tar[:3700], "unexpected end of data"),
        (lambda tar: tar[:2100], "it is no tar from byte 2,048 on"),
        (lambda tar: tar[:2048] + b"garbage" * 100, "it is no tar from byte 2,048 on"),
        (lambda tar: b"garbage" * 1000, "damaged, truncated or compressed"),
        (lambda tar: b"", "empty file"),
        (lambda tar: gzip.compress(tar), "damaged, truncated or compressed.* decompress it"),
        (lambda tar: other_header(tar, 2048, b"77777777777\0"), "unexpected end of data"),
        (lambda tar: other_header(tar, 2048, b"\xff" * 11 + b"\x00"), "damaged, truncated or compressed"),
        (lambda tar: other_header(tar, 2048, b"\x80" + b"\x7f" * 11), "damaged, truncated or compressed"),
        (lambda tar: other_header(tar[:1536] + tar[2048:], 1024, b"\xff" * 12), "damaged"),  # a label of -1 bytes
        (lambda tar: tar[:2048] + long_header(b"x") + tar[2048:], "it has a header of 8,589,934,592 bytes"),
        (lambda tar: tar[:2048] + long_header(b"L") + tar[2048:], "it has a header of 8,589,934,592 bytes"),
    ],
)
def test_damaged_tars(tmp_path, change, message):
    path = tmp_path / "1.tar"
    path.write_bytes(change(whole_tar(tmp_path)))
    with pytest.raises(InputError, match=f"1.tar is damaged, truncated or compressed.*{message}|{message}") as raised:
        TarSource(path, "train", 3, 1)
    assert "\n" not in str(raised.value) and "1.tar" in str(raised.value)


def long_header(kind):
    """The header of a long name that says it has 8 GB."""
    info = tarfile.TarInfo("long")
    info.type = kind
    return other_header(info.tobuf(tarfile.USTAR_FORMAT), 0, b"77777777777\0")


def test_a_tar_without_its_end_and_one_without_images(tmp_path, caplog):
    path = tmp_path / "1.tar"
    path.write_bytes(whole_tar(tmp_path)[:4096])
    assert values(TarSource(path, "train", 3, 1)) == [(1, 0), (2, 0)]
    assert "1.tar lacks the end mark of tars; is it complete?" in caplog.text
    with pytest.raises(InputError, match="2.tar holds no images with a label each: KEY.jpg and KEY.cls, or KEY.json"):
        TarSource(write_tar(tmp_path / "2.tar", [("a.tar", b"1")]), "train", 3, 1)
    with pytest.raises(InputError, match="holds no tars"):
        (tmp_path / "empty").mkdir()
        open_source(DataConfig(source="tar", path=str(tmp_path / "empty")))


def test_a_tar_that_changes_while_it_is_read(tmp_path, caplog):
    path = write_tar(tmp_path / "1.tar", [*sample("a", 1, 0), *sample("b", 2, 0)])
    source = TarSource(path, "train", 3, 1)
    path.write_bytes(path.read_bytes()[:2100])
    assert values(source) == [(1, 0), None] and "its tar has changed" in caplog.text


def write_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


KAGGLE = [
    ("LOC_val_solution.csv", b"ImageId,PredictionString\nv1,n02 1 2 3 4\nv2,n01 1 2 3 4\n"),
    ("ILSVRC/Annotations/CLS-LOC/train/n01/1.xml", b"<annotation/>"),
    ("ILSVRC/Data/CLS-LOC/train/n02/2.JPEG", png(2)),
    ("ILSVRC/Data/CLS-LOC/train/n01/1.JPEG", png(1)),
    ("ILSVRC/Data/CLS-LOC/val/v1.JPEG", png(3)),
    ("ILSVRC/Data/CLS-LOC/val/v2.JPEG", png(4)),
    ("ILSVRC/Data/CLS-LOC/val/.v3.JPEG", png(4)),
    ("__MACOSX/ILSVRC/Data/CLS-LOC/val/v2.JPEG", png(5)),
    ("ILSVRC/Data/CLS-LOC/test/t1.JPEG", png(6)),
]


def test_the_zip_of_kaggle(tmp_path):
    path = write_zip(tmp_path / "imagenet.zip", KAGGLE, compression=zipfile.ZIP_DEFLATED)
    labels = tmp_path / "labels.csv"
    labels.write_bytes(KAGGLE[0][1])
    source = ZipSource(path, "train", 3, 1)
    assert (source.class_names, values(source)) == (("n01", "n02"), [(1, 0), (2, 1)])
    assert source.key(1) == "n02/2.JPEG"
    validation = ZipSource(path, "val", 3, 1, str(labels))
    assert (validation.class_names, values(validation)) == (("n01", "n02"), [(4, 0), (3, 1)])
    with pytest.raises(InputError, match="v2.JPEG|names no class for 1 of 1 images"):
        ZipSource(path, "test", 3, 1, str(labels))


def test_zips_of_other_folders(tmp_path):
    images = [("a/dog/1.png", png(1)), ("a/cat/x/2.png", png(2))]
    source = ZipSource(write_zip(tmp_path / "1.zip", images), "train", 3, 1)
    assert (source.class_names, values(source)) == (("cat", "dog"), [(2, 0), (1, 1)])
    assert source.key(0) == "cat/x/2.png"
    flat = ZipSource(write_zip(tmp_path / "2.zip", [("1.png", png(1)), ("2.png", png(2))]), "train", 3, 1)
    assert (flat.class_names, values(flat)) == (("2",), [(1, 0), (2, 0)])
    for members, message in [
        ([], "3.zip holds no images"),
        (images + [("a/3.png", png(1))], r"3.zip holds images \(1\) and folders with images \(cat, dog\) in a"),
        ([("a/val/c/1.png", png(1))], "3.zip has val but no train"),
        ([("a/train/c/1.png", png(1)), ("b/train/c/1.png", png(1))], "3.zip has several folders train: a/train and b/train"),
    ]:
        with pytest.raises(InputError, match=message):
            ZipSource(write_zip(tmp_path / "3.zip", members), "train", 3, 1)


def test_hostile_zips(tmp_path, caplog, monkeypatch):
    """Names that lead outside, the same name twice, sizes that are not true, bombs, wrong checksums, encrypted members."""
    monkeypatch.setattr("dar_jax.data.images.MAX_BYTES", 10_000)
    members = [(f"a/{number}.png", png(number) + b"\0" * 100) for number in range(6)] + [("a/6.png", b"\0" * 10**7)]
    members += [
        ("!.txt", b"?"),
        ("../up/1.png", png(7)),
        ("/absolute/1.png", png(7)),
        ("..\\up\\1.png", png(7)),
        ("a/0.png", png(8)),
    ]
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write_zip(tmp_path / "1.zip", members, compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    place = archive.start_dir
    for info in infos:  # the directory at the end
        number = info.filename.removeprefix("a/").removesuffix(".png")
        if number == "1":
            content[place + 24 : place + 28] = struct.pack("<I", 10)
        if number == "2":
            content[place + 24 : place + 28] = struct.pack("<I", 9_999)
        if number == "3":
            content[place + 16 : place + 20] = b"\0\0\0\0"
        if number == "4":
            content[place + 8] |= 1
        place += 46 + len(info.filename)
    path.write_bytes(content.replace(b"!.txt", b"\0.txt"))  # a name that is empty
    source = ZipSource(path, "train", 3, 1)
    assert [value and value[0] for value in values(source)] == [0, None, 2, None, None, 5, None]
    for message in [
        r"1 images of .*1.zip are there twice, such as a/0.png",
        r"3 images of .*1.zip have names that lead out of it, such as \.\./up/1.png",
        "the image a/1.png of .*1.zip cannot be read: Bad CRC-32",
        "the image a/3.png of .* Bad CRC-32",
        "the image a/4.png of .* encrypted",
        "the image a/6.png of .* it has 10,000,000 bytes, 10,000 are the most",
    ]:
        assert re.search(message, caplog.text), message
    bomb = write_zip(tmp_path / "2.zip", [("a/1.png", b"\0" * 10**7)], compression=zipfile.ZIP_BZIP2)
    content = bytearray(bomb.read_bytes())
    place = content.rindex(b"PK\1\2")
    content[place + 24 : place + 28] = struct.pack("<I", 100)  # what the directory says
    bomb.write_bytes(content)
    assert values(ZipSource(bomb, "train", 3, 1)) == [None] and "compressed in an unusual way" in caplog.text
    for content in (b"", b"no zip", path.read_bytes()[:-10]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="1.zip cannot be read: .*copy it again"):
            ZipSource(path, "train", 3, 1)


HUB = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


def write_parquet(path, rows, metadata=HUB, kind="int64", group=3, names=("image", "label"), plain=False):
    """The layout of the Hub's image data sets, of rows of bytes, path and label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = arrow.array([row[0] if plain else {"bytes": row[0], "path": row[1]} for row in rows])
    table = arrow.table(dict(zip(names, (images, arrow.array([row[2] for row in rows], kind)))))
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), path, row_group_size=group)
    return path


ROWS = [(png(number), f"n/{number}.JPEG", number % 2) for number in range(8)]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_parquet(tmp_path, monkeypatch, plain, batch):
    monkeypatch.setattr(archives, "BATCH", batch)
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:7], plain=plain)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[7:], plain=plain)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS[3:4], plain=plain)
    source = ParquetSource(tmp_path, "train", 3, 1)
    assert source.class_names == ("cat", "dog")
    assert values(source) == [(number, number % 2) for number in range(8)]
    for index in (4, 5, 2, 7, 0, 6):
        assert source[index]["image"][0, 0, 0] == index
        assert source.key(index) == (source.name(index) if plain else f"n/{index}.JPEG")
    assert source.name(4) == f"row 4 of {tmp_path}/data/train-00000-of-00002.parquet" and source.name(7).startswith("row 0 of")
    assert values(ParquetSource(tmp_path, "val", 3, 1)) == [(3, 1)]


def test_parquet_of_other_makers(tmp_path):
    source = ParquetSource(write_parquet(tmp_path / "1.parquet", ROWS, {}, "uint8", names=("jpg", "cls")), "train", 3, 1)
    assert source.class_names == ("0", "1") and values(source)[5] == (5, 1)
    (tmp_path / "class_names.txt").write_text("ant\nbee\ncow")
    for metadata in ({}, [], {"info": {"features": {"label": {"names": [1, 2]}}}}):
        named = ParquetSource(write_parquet(tmp_path / "1.parquet", ROWS, metadata), "train", 3, 1)
        assert named.class_names == ("ant", "bee", "cow")


def test_rows_that_are_skipped(tmp_path, caplog):
    """No label, one that is no class, no bytes, no image; the same path twice is no damage, rows are known by their number."""
    rows = [ROWS[0], (png(1), "b", None), (png(2), "c", -1), (png(3), "d", 2), (None, "e", 0), (b"text", None, 0), ROWS[0]]
    source = ParquetSource(write_parquet(tmp_path / "1.parquet", rows), "train", 3, 1)
    assert values(source) == [(0, 0), None, None, None, None, None, (0, 0)] and source.unreadable == 5
    for row, reason in enumerate(
        ["it has no label"] * 2 + ["its label is 2, of 2 classes", "it has no bytes", "it is no PNG"], 1
    ):
        assert f"the image row {row} of {tmp_path}/1.parquet cannot be read: {reason}" in caplog.text


def test_a_damaged_row_group(tmp_path, caplog):
    path = write_parquet(tmp_path / "1.parquet", [(content * 9, path, label) for content, path, label in ROWS])
    content = bytearray(path.read_bytes())
    with parquet.ParquetFile(path) as opened:
        column = opened.metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    source = ParquetSource(path, "train", 3, 1)
    assert [value and value[0] for value in values(source)] == [0, 1, 2, None, None, None, 6, 7]
    assert "the image row 3 of" in caplog.text and "is damaged" in caplog.text
    assert "the image row 5 of" in caplog.text and "its row group is damaged" in caplog.text


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda path: write_parquet(path, ROWS, names=("picture", "label")),
            "no column image or .* of bytes; it has picture",
        ),
        (
            lambda path: write_parquet(path, ROWS, names=("image", "class")),
            "no column label or labels or cls of numbers; it",
        ),
        (
            lambda path: write_parquet(path, [(*row[:2], "cat") for row in ROWS], kind="string"),
            "no column label .* of numbers",
        ),
        (lambda path: write_parquet(path, [("text", "", 0)], plain=True), "no column image .* of bytes"),
        (lambda path: write_parquet(path, []), "no column image|hold no rows"),
        (lambda path: path.write_bytes(write_parquet(path, ROWS).read_bytes()[:-20]), "is damaged, or no Parquet file"),
        (lambda path: path.write_bytes(b"no Parquet"), "is damaged, or no Parquet file"),
        (lambda path: path.write_bytes(b""), "is damaged, or no Parquet file"),
    ],
)
def test_parquet_that_cannot_be_read(tmp_path, write, message):
    write(tmp_path / "1.parquet")
    with pytest.raises(InputError, match=f"1.parquet.*{message}") as raised:
        ParquetSource(tmp_path, "train", 3, 1)
    assert "\n" not in str(raised.value)


def test_more_rows_than_fit(tmp_path, monkeypatch):
    write_parquet(tmp_path / "1.parquet", ROWS)
    monkeypatch.setattr(archives, "MAX_ROWS", 7)
    with pytest.raises(InputError, match="1.parquet says that there are 8 rows, which is too many for its size"):
        ParquetSource(tmp_path, "train", 3, 1)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r'pip install "\.\[pack\]"'):
        ParquetSource(tmp_path, "train", 3, 1)
    with pytest.raises(InputError, match="holds no Parquet files"):
        monkeypatch.undo()
        ParquetSource(tmp_path, "train", 3, 1)


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    sources = {
        "gzip.open": lambda: open_source(write_idx(tmp_path / "idx")),
        "tarfile.open": lambda: TarSource(tar, "train", 3, 1),
        "pyarrow.parquet.ParquetFile": lambda: ParquetSource(rows, "train", 3, 1),
    }
    tar, rows = write_tar(tmp_path / "1.tar", sample("a", 0, 0)), write_parquet(tmp_path / "1.parquet", ROWS)
    for function, read in sources.items():
        for number in (errno.EACCES, errno.EMFILE, errno.EIO):
            with monkeypatch.context() as patch:
                patch.setattr(function, Mock(side_effect=OSError(number, os.strerror(number))))
                with pytest.raises(InputError, match=f"cannot be read: .*{os.strerror(number)}$"):
                    read()
