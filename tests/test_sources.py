import contextlib
import csv
import io
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from dar_jax.config import DataConfig
from dar_jax.data import images
from dar_jax.data.images import read_image
from dar_jax.data.labels import read_labels
from dar_jax.data.sources import CIFAR10_CLASSES, describe, held_out, open_source
from dar_jax.errors import InputError


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path, **options)


def grey(value, size=(4, 4)):
    return np.full(size, value, np.uint8)


def folder(path, **options):
    return open_source(DataConfig(source="folder", path=str(path), image_size=4, **options))


def first_pixels(path, channels=3):
    """The first row of the one image in a folder."""
    return folder(path, channels=channels)[0]["image"][0].tolist()


def test_digits_are_all_there_once():
    train, test = (open_source(DataConfig(source="digits", split=split, channels=1)) for split in ("train", "test"))
    assert (len(train), len(test)) == (1500, 297)
    elements = [source[i] for source in (train, test) for i in range(len(source))]
    pixels, labels = load_digits(return_X_y=True)
    expected = sorted((np.rint(x * 255 / 16).astype(np.uint8).tobytes(), y) for x, y in zip(pixels, labels))
    assert sorted((e["image"].tobytes(), e["label"]) for e in elements) == expected
    shares = np.bincount([test[i]["label"] for i in range(297)]) / np.bincount(labels)
    np.testing.assert_allclose(shares, 297 / 1797, atol=0.01)
    assert train.class_names == tuple("0123456789")


def test_digits_in_colour_and_of_no_such_split():
    image = open_source(DataConfig(source="digits"))[3]["image"]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    with pytest.raises(InputError, match="val"):
        open_source(DataConfig(source="digits", split="val"))


def test_folder_classes_order_and_split(tmp_path):
    write(tmp_path / "train" / "dog" / "b.PNG", grey(1))
    write(tmp_path / "train" / "dog" / "a" / "z.webp", grey(2), lossless=True)
    write(tmp_path / "train" / "cat" / "c.Jpeg", grey(3))
    write(tmp_path / "train" / "dog" / ".hidden.png", grey(4))
    write(tmp_path / "train" / "dog" / "a" / ".thumbnails" / "z.png", grey(4))
    write(tmp_path / "elsewhere" / "d.png", grey(6))
    (tmp_path / "train" / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "dog" / "a" / "up").symlink_to(tmp_path / "train" / "dog")
    (tmp_path / "train" / "cow").mkdir()
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    write(tmp_path / "val" / "cat" / "a.png", grey(5))
    source = folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert describe(source) == f"4 images of 2 classes: cat, dog (images in {tmp_path}/train: 4 in 2 classes)"
    source.class_names = ("c\x1bat", "d\nog")
    assert describe(source).startswith("4 images of 2 classes: c\\x1bat, d\\nog (")
    elements = [source[i] for i in range(len(source))]
    assert [(e["image"][0, 0, 0], e["label"]) for e in elements] == [(3, 0), (2, 1), (1, 1), (6, 1)]
    assert folder(tmp_path, split="val")[0]["image"][0, 0, 0] == 5
    with pytest.raises(InputError, match="train and val but no test"):
        folder(tmp_path, split="test")


def test_folder_without_classes_is_one_class(tmp_path):
    write(tmp_path / "pets" / "a.png", grey(1, (3, 5)))
    (tmp_path / "pets" / "empty").mkdir()
    source = folder(tmp_path / "pets")
    assert source.class_names == ("pets",)
    assert source[0]["image"].shape == (3, 5, 3)


def test_cmyk(tmp_path):
    write(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)), quality=100)
    np.testing.assert_allclose(first_pixels(tmp_path)[0], [0, 255, 255], atol=3)


def test_a_png_that_is_called_jpeg(tmp_path):
    write(tmp_path / "a.JPEG", grey(77), format="png")
    assert first_pixels(tmp_path, channels=1) == [[77]] * 4


def test_transparent_palette_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    write(tmp_path / "a.png", image, transparency=1)
    assert first_pixels(tmp_path) == [[255, 0, 0], [255, 255, 255]]
    assert first_pixels(tmp_path, channels=1) == [[76], [255]]


def test_plain_palette(tmp_path):
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    write(tmp_path / "a.png", image)
    assert first_pixels(tmp_path) == [[10, 20, 30]]


def test_alpha_lies_on_white(tmp_path):
    write(tmp_path / "a.png", np.array([[[0, 0, 0, 128], [9, 8, 7, 255], [9, 8, 7, 0]]], np.uint8))
    assert first_pixels(tmp_path) == [[127, 127, 127], [9, 8, 7], [255, 255, 255]]


def test_sixteen_bit_grey_is_rounded(tmp_path):
    write(tmp_path / "a.png", np.array([[0, 128, 129, 25700, 65535]], np.uint16))
    assert first_pixels(tmp_path, channels=1) == [[0], [0], [1], [100], [255]]
    assert first_pixels(tmp_path)[3] == [100, 100, 100]


def test_unreadable_files_are_named_once_counted_and_skipped(tmp_path, caplog):
    write(tmp_path / "a" / "0.png", grey(7))
    write(tmp_path / "a" / "1.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    truncated = (tmp_path / "a" / "1.jpg").read_bytes()
    (tmp_path / "a" / "1.jpg").write_bytes(truncated[: len(truncated) // 2])
    (tmp_path / "a" / "2.png").write_text("this is no picture")
    write(tmp_path / "b" / "3.png", grey(8))
    source = folder(tmp_path)
    for _ in range(2):
        assert [(source[i]["image"][0, 0, 0], source[i]["label"]) for i in range(4)] == [(7, 0), (8, 1), (8, 1), (8, 1)]
    assert [source.read(i) is None for i in range(4)] == [False, True, True, False]
    assert source.unreadable == 2
    names = [record.getMessage().split()[3] for record in caplog.records]
    assert names == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/a/2.png"]
    assert {(record.name, record.levelname) for record in caplog.records} == {("dar_jax.data", "WARNING")}
    assert len(pickle.loads(pickle.dumps(source))) == 4


def test_reading_goes_on_at_the_beginning(tmp_path):
    write(tmp_path / "0.png", grey(7))
    (tmp_path / "1.png").write_text("this is no picture")
    assert folder(tmp_path)[1]["image"][0, 0, 0] == 7
    (tmp_path / "0.png").write_text("nor is this")
    with pytest.raises(InputError, match="none of the 2 images"):
        folder(tmp_path)[1]


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1900)
    write(tmp_path / "0.png", grey(1, (60, 40)))
    write(tmp_path / "1.png", grey(2, (80, 1)))  # 5 x 400 pixels once its smaller side is image_size
    write(tmp_path / "2.png", grey(3, (60, 1)))
    source = folder(tmp_path)
    assert [source.read(i) is None for i in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    "files,message",
    [
        (["1.png", "a/0.png"], r"holds images \(1\) and folders with images \(a\)"),
        (["1.png", "previews/deep/0.png"], r"holds images \(1\) and folders with images \(previews\)"),
        (["1.png", "train/a/0.png"], "holds images and the split train"),
        (["train/0.png", "bus/0.png"], "train may be a class like bus beside it, or the split train"),
        ([".a/0.png", ".0.png", "a/0.txt"], "holds no images"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path, files, message):
    for file in files:
        write(tmp_path / file, grey(7), format="png")
    with pytest.raises(InputError, match=message):
        folder(tmp_path)


def write_flat_split(path, labels, train=("n01", "n02", "n03")):
    """Three validation images of the values 1, 2, 3 beside folders of training images, and a file of their classes."""
    for name in train:
        write(path / "data" / "train" / name / "0.JPEG", grey(9))
    for number in (1, 2, 3):
        write(path / "data" / "val" / f"val_{number}.JPEG", grey(number))
    (path / "labels").write_text(labels)
    return DataConfig(path=str(path / "data"), labels=str(path / "labels"), image_size=4)


@pytest.mark.parametrize(
    "labels",
    [
        "ImageId,PredictionString\nval_3,n01 5 6 7 8 \nval_1,n03 1 2 3 4 n03 5 6 7 8 \nval_2,n01 1 2 3 4 \n",  # Kaggle's file
        "val_1.JPEG n03\nval_2.JPEG\tn01\nval_3.JPEG n01\nval_4.JPEG n99\n\n",
        '\ufefffile;class\r\n"val_1.JPEG";"n03"\r\nval/val_2.JPEG; n01\r\n./data/val/val_3;n01;an owl, asleep\r\n',
        "val\\val_1.JPEG\tn03\nval_2\tn01\nval_2.JPEG\tn01\nval_3\tn01",
    ],
)
def test_labels_of_a_split_without_class_folders(tmp_path, labels):
    config = write_flat_split(tmp_path, labels)
    source = open_source(held_out(config))
    assert source.class_names == open_source(config).class_names == ("n01", "n02", "n03")
    elements = [source[i] for i in range(len(source))]
    assert [(e["image"][0, 0, 0], e["label"]) for e in elements] == [(2, 0), (3, 0), (1, 2)]
    shutil.rmtree(tmp_path / "data" / "train")
    assert open_source(held_out(config)).class_names == ("n01", "n03")


@pytest.mark.parametrize(
    "labels,message",
    [
        ("val_1 n01\nval_3 n01\n", "labels names no class for 1 of 3 images, such as .*val_2.JPEG"),
        ("val_1 n01\nval_2\nval_3 n01\n", "labels, line 2: an image and its class should be there"),
        ("val_1,n01\nval_2,\nval_3,n01\n", "labels, line 2: an image and its class should be there"),
        ("val_1 n01\nval_2 n07\nval_3 n01\n", "line 2: val_2 has the class n07, which training has not"),
        ("val_1,n01\nval_2,n01\nval_1.JPEG,n02\n", "line 3: val_1.JPEG has the class n02, but n01 in line 1"),
        (
            "val_1 n01\ntrain/val_2 n01\nval_3 n01\n",
            "1 of 3 images, such as .*val_2.JPEG; no image goes by line 2: train/val_2",
        ),
        ('val_1,"n01\nval_2,n01\n', "labels cannot be read: unexpected end of data"),
        ("val_1,n01\n,\n/,n01\n.,n01", "labels names no class for 2 of 3 images"),
        (b"\xff\xfe", "labels cannot be read"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels, message):
    config = write_flat_split(tmp_path, "")
    (tmp_path / "labels").write_bytes(labels if isinstance(labels, bytes) else labels.encode())
    with pytest.raises(InputError, match=message):
        open_source(held_out(config))
    (tmp_path / "labels").unlink()
    with pytest.raises(InputError, match="labels cannot be read"):
        open_source(held_out(config))


def test_class_names_of_several_words(tmp_path):
    for number in (0, 1, 2):
        write(tmp_path / "images" / f"im {number}.png", grey(number))
    labels = tmp_path / "labels.csv"
    labels.write_text('im 0.png,sea lion\nim 1.png,"horse, ""sea"""\nim 2.png,sea lion\n')
    assert folder(tmp_path / "images", labels=str(labels)).class_names == ('horse, "sea"', "sea lion")
    labels.write_text("im 0.png lion\nim 1.png horse\nim 2.png lion\n")
    assert folder(tmp_path / "images", labels=str(labels)).class_names == ("horse", "lion")


@settings(max_examples=60, deadline=None)
@given(content=st.text(st.sampled_from('ab .,;\t"\n\r/\0\ufeff'), max_size=40).map(str.encode) | st.binary(max_size=40))
def test_a_file_of_labels_of_any_content_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "labels of any content"
    write(path / "images" / "a.png", grey(0))
    (path / "labels").write_bytes(content)
    with contextlib.suppress(InputError):
        assert all(image and name for _, image, name in read_labels(path / "labels"))
    with contextlib.suppress(InputError):
        assert len(folder(path / "images", labels=str(path / "labels"))) == 1


NAME = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(NAME, NAME), min_size=1, max_size=5), delimiter=st.sampled_from(",;\t"))
def test_what_csv_writes_is_read(tmp_path_factory, rows, delimiter):
    path = tmp_path_factory.getbasetemp() / "labels.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assume(not set("".join(rows[0])) & set(",;\t") - {delimiter} and ("ImageId", "PredictionString") not in rows)
    assert [row for _, *row in read_labels(path)] == [list(row) for row in rows]


@pytest.mark.parametrize("kind", ["pipe", "folder", "too long"])
def test_labels_that_are_no_file(tmp_path, monkeypatch, kind):
    write(tmp_path / "images" / "a.png", grey(0))
    labels = tmp_path / "labels"
    if kind == "pipe":
        os.mkfifo(labels)
    elif kind == "folder":
        labels.mkdir()
    else:
        monkeypatch.setattr("dar_jax.data.labels.MAX_LABELS", 5)
        labels.write_text("a.png x")
    with pytest.raises(InputError, match="cannot be read"):
        folder(tmp_path / "images", labels=str(labels))


def jpeg(pixels, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "jpeg", quality=95)
    return file


@pytest.fixture(scope="module")
def small_birds(tmp_path_factory):
    """The folder of a TFDS data set, and the images that it holds: 2 is a PNG, 3 no picture, 4 CMYK, 5 has no label."""
    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    files = [jpeg(pixels[i], "CMYK" if i == 4 else "RGB") for i in range(6)]
    files[3] = io.BytesIO(b"this is no picture")
    files[2] = io.BytesIO()
    Image.fromarray(pixels[2]).save(files[2], "png")

    class SmallBirds(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            image, label = tfds.features.Image(encoding_format="jpeg"), tfds.features.ClassLabel(names=["tit", "jay", "owl"])
            features = tfds.features.FeaturesDict({"label": label, "image": image, "file_name": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, download):
            return {"train": self._generate_examples(5), "validation": self._generate_examples(6)}

        def _generate_examples(self, count):
            for i in range(count):
                files[i].seek(0)
                yield i, {"image": files[i], "label": -1 if i == 5 else i % 3, "file_name": f"{i}.JPEG"}

    folder = tmp_path_factory.mktemp("tfds")
    SmallBirds(data_dir=folder, file_format="array_record", version="1.2.0").download_and_prepare()
    return folder, [read_image(files[i], 3, 8) for i in (0, 1, 2, 4)]


def birds(small_birds, **changes):
    return DataConfig(**{"source": "tfds", "dataset": "small_birds", "path": str(small_birds[0]), "image_size": 8, **changes})


def test_tfds(small_birds, caplog):
    """Class names from the data set, images of every mode, the broken one counted and left out."""
    config = birds(small_birds)
    source = pickle.loads(pickle.dumps(open_source(config)))
    assert (len(source), source.class_names) == (5, ("tit", "jay", "owl"))
    assert source.description == "small_birds/1.2.0 train of TFDS: 5 images in 3 classes"
    read = [element for i in range(5) if (element := source.read(i)) is not None]
    order = np.argsort([np.argmin([np.abs(e["image"] - image.astype(int)).sum() for image in small_birds[1]]) for e in read])
    for place, image, label in zip(order, small_birds[1], (0, 1, 2, 1), strict=True):  # TFDS has an order of its own
        np.testing.assert_array_equal(read[place]["image"], image)
        assert read[place]["label"] == label
    (record,) = caplog.records
    assert "of small_birds/1.2.0 train cannot be read: it is no PNG, JPEG or WebP" in record.getMessage()
    assert source.unreadable == 1
    held = open_source(held_out(config))
    assert (len(held), sum(held.read(i) is None for i in range(6))) == (6, 2) and "it has no label" in caplog.text
    assert len(open_source(birds(small_birds, split="validation[:50%]", dataset="small_birds:1.2.0"))) == 3
    assert open_source(birds(small_birds, channels=1))[0]["image"].shape == (12, 10, 1)
    assert held_out(birds(small_birds, held_out_split="test")).split == "test"


def test_tfds_that_cannot_be_read(small_birds, tmp_path, monkeypatch):
    for changes, message in (
        ({"dataset": None}, "data.dataset is not given"),
        ({"split": "test"}, "cannot read test of small_birds in .*Unknown split"),
        ({"split": "train[:"}, "Error parsing split"),
        ({"dataset": "small_birds:3.0.0"}, "small_birds:3.0.0 in .*not prepared yet.*tfds build small_birds:3.0.0"),
        ({"dataset": "no birds?"}, "cannot read train of no birds"),
        ({"path": str(tmp_path)}, f"small_birds in {tmp_path}: .*tfds build small_birds .* --data_dir={tmp_path}"),
        ({"dataset": "mnist", "path": str(tmp_path)}, "it is not there .*tfds build mnist --file_format=array_record"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            open_source(birds(small_birds, **changes))
        assert "\n" not in str(raised.value)
    info = shutil.copytree(small_birds[0], tmp_path / "copy") / "small_birds" / "1.2.0" / "features.json"
    about = info.with_name("dataset_info.json")
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"file format FileFormat.TFRECORD is not supported \(not prepared yet"):
        open_source(birds(small_birds, path=str(tmp_path / "copy"), dataset="small_birds:1.2.0"))
    about.write_text(about.read_text().replace("tfrecord", "array_record"))
    features = json.loads(info.read_text())
    features["featuresDict"]["features"]["label"] = features["featuresDict"]["features"]["file_name"]
    info.write_text(json.dumps(features))
    with pytest.raises(InputError, match="no set of images with classes; it holds file_name, image, label"):
        open_source(birds(small_birds, path=str(tmp_path / "copy"), dataset="small_birds:1.2.0"))
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(InputError, match=r'pip install "\.\[tfds\]"'):
        open_source(birds(small_birds))


def write_cifar10(path, rows=3):
    """Files whose record r of file f has label f + r and the pixel (row, column) (r, f, 10 row + column mod 256)."""
    path.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]):
        planes = np.zeros((rows, 3, 32, 32), np.uint8)
        planes[:, 0] = np.arange(rows)[:, None, None]
        planes[:, 1] = number
        planes[:, 2] = 10 * np.arange(32)[:, None] + np.arange(32)
        labels = number + np.arange(rows, dtype=np.uint8)
        (path / name).write_bytes(np.concatenate([labels[:, None], planes.reshape(rows, -1)], axis=1).tobytes())


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, inside):
    write_cifar10(tmp_path / inside)
    source = pickle.loads(pickle.dumps(open_source(DataConfig(source="cifar10", path=str(tmp_path)))))
    assert len(source) == 15 and source.class_names == CIFAR10_CLASSES
    element = source[7]
    assert element["image"].shape == (32, 32, 3) and element["image"].dtype == np.uint8
    assert element["image"][4, 5].tolist() == [1, 2, 45] and element["label"] == 3
    test = open_source(DataConfig(source="cifar10", path=str(tmp_path), split="test", channels=1))
    assert len(test) == 3 and test[0]["label"] == 5 and test[0]["image"].shape == (32, 32, 1)


def test_cifar10_class_names_from_its_file(tmp_path):
    write_cifar10(tmp_path)
    (tmp_path / "batches.meta.txt").write_text("\n".join("klmnopqrst") + "\n\n")
    assert open_source(DataConfig(source="cifar10", path=str(tmp_path))).class_names == tuple("klmnopqrst")


def test_damaged_cifar10(tmp_path):
    config = DataConfig(source="cifar10", path=str(tmp_path))
    write_cifar10(tmp_path)
    file = tmp_path / "data_batch_2.bin"
    whole = file.read_bytes()
    for content in (whole[:-1], b"", b"\x0a" + whole[1:]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="data_batch_2.bin"):
            open_source(config)
    file.unlink()
    with pytest.raises(InputError, match="data_batch_2.bin is missing"):
        open_source(config)


@pytest.mark.parametrize("source", ["folder", "cifar10", "codes"])
def test_paths_that_cannot_be_read(tmp_path, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path in (None, tmp_path / "absent", tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(InputError, match="data.path is not given" if path is None else path.name):
            open_source(DataConfig(source=source, path=path and str(path)))


def test_only_codes_and_tfds_are_read_from_a_bucket():
    with pytest.raises(InputError, match="gs://bucket/images is in a bucket"):
        open_source(DataConfig(source="folder", path="gs://bucket/images"))


class Own:
    """A source of an experiment's own that gives `element`."""

    class_names, description = ("a", "b"), "of my own"

    def __init__(self, element):
        self.element = element

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.element


ELEMENT = {"image": np.zeros((4, 4, 1), np.uint8), "label": 1}


@pytest.mark.parametrize(
    ("message", "element"),
    [
        (r"uint8 \[4, 4\]", ELEMENT | {"image": np.zeros((4, 4), np.uint8)}),
        (r"uint8 \[4, 4, 3\], they should be uint8 \[H, W, 1\]", ELEMENT | {"image": np.zeros((4, 4, 3), np.uint8)}),
        (r"float64 \[4, 4, 1\]", ELEMENT | {"image": np.zeros((4, 4, 1))}),
        ("as 'label'", ELEMENT | {"label": "b"}),
        ("as 'label'", ELEMENT | {"label": 1.0}),
        ("as 'file'", ELEMENT | {"file": "a.npy"}),
        ("its elements should be", {"image": ELEMENT["image"]}),
        ("gives tuple", (ELEMENT["image"], 1)),
    ],
)
def test_elements_of_a_source_of_ones_own_that_do_not_fit(message, element):
    config = DataConfig(channels=1)
    assert open_source(config, lambda data: Own(ELEMENT))[0] is ELEMENT
    with pytest.raises(InputError, match=message):
        open_source(config, lambda data: Own(element))


@pytest.mark.parametrize("part", ["class_names", "description", "__len__"])
def test_a_source_of_ones_own_without_a_part(part):
    parts = {name: value for name, value in vars(Own).items() if name != part and name != "__dict__"}
    with pytest.raises(InputError, match=f"the source Own has no {part}"):
        open_source(DataConfig(channels=1), lambda data: type("Own", (), parts)(ELEMENT))
