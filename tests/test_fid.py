"""Images in, report out: what is read and refused, features on one and on many devices, and the figures with their reasons."""

import dataclasses
import io
import json
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity_cases import Case
from PIL import Image
from test_metrics import inception_score, moments

from dar_jax import parallel
from dar_jax.config import DataConfig, MeshConfig
from dar_jax.errors import InputError
from dar_jax.evaluation import fid as evaluation
from dar_jax.evaluation.extractor import Extractor, Network, open_extractor
from dar_jax.evaluation.fid import compare, evaluate, table
from dar_jax.evaluation.images import Images, data_source, from_npz, from_source, open_images, subset
from dar_jax.evaluation.metrics import frechet_distance, precision_recall
from dar_jax.evaluation.statistics import collect, load, save
from dar_jax.features.inception import InceptionFeatures
from dar_jax.inference import npz
from dar_jax.weights import torch_file


def from_array(images, source):
    return Images(source, len(images), images.shape[1:], lambda: iter([images]))


def random_images(count, seed=0, size=8, channels=3):
    """Random colours with random noise, so that features differ more between images than within."""
    random = np.random.default_rng(seed)
    return (random.integers(0, 128, (count, 1, 1, channels)) + random.integers(0, 128, (count, size, size, channels))).astype(
        np.uint8
    )


def stand_in(params, images):
    """A network of 6 pooled and 8 spatial features and 5 classes."""
    x = images.astype(jnp.float32).reshape(len(images), -1) / 255
    size = x.shape[1]
    pool = jnp.tanh(x @ params[:size, :6])
    return InceptionFeatures(pool, (x @ params[:size, 6:14]).reshape(-1, 2, 2, 2), 9 * pool @ params[:6, 14:])


@pytest.fixture
def extractor():
    mesh = parallel.make_mesh(MeshConfig())
    params = jax.random.normal(jax.random.key(0), (300, 19)) / 8
    return Extractor(stand_in, params, mesh, 16, Network("stand-in.pt", "00ff", "tensorflow1"))


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


# --- images ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, monkeypatch, save):
    images = random_images(21)
    save(tmp_path / "samples.npz", images, np.arange(21))
    monkeypatch.setattr(npz, "CHUNK", 4 * images[0].nbytes + 1)
    found = open_images(tmp_path / "samples.npz")
    assert (found.count, found.shape) == (21, (8, 8, 3))
    for _ in range(2):  # as often as wanted
        chunks = list(found.chunks())
        assert [len(chunk) for chunk in chunks] == [4, 4, 4, 4, 4, 1]
        np.testing.assert_array_equal(np.concatenate(chunks), images)


def member(header, data=b"", name="arr_0.npy", version=1):
    """An NPZ file with one array of any header and content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little") + header + data)
    return file.getvalue()


def describe(shape, dtype="'|u1'", order="False"):
    return f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


class Trap:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def pickled():
    file = io.BytesIO()
    np.savez(file, np.array([Trap()], object))
    return file.getvalue()


def squeezed():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("arr_0.npy", bytes(192))
    return file.getvalue()


def corrupted():
    file = io.BytesIO()
    np.savez(file, random_images(5))
    data = bytearray(file.getvalue())
    data[600] ^= 1  # a pixel
    return bytes(data)


HOSTILE = {
    "pickled": (pickled(), r"arr_0 in \S+ holds Python objects"),
    "records": (member(describe("(1, 1, 1, 3)", "[('a', '|u1')]"), bytes(3)), "holds Python objects or records"),
    "claims too much": (member(describe("(10000000, 256, 256, 3)"), bytes(192)), "it claims uint8 .10000000, .* holds 192"),
    "claims too little": (member(describe("(1, 8, 8, 3)"), bytes(193)), "damaged: it claims"),
    "claims less than nothing": (member(describe("(-1, 8, -8, 3)"), bytes(192)), "damaged: it claims"),
    "claims nothing": (member(describe("(0, 8, 8, 3)")), "damaged: it claims"),
    "by columns": (member(describe("(1, 8, 8, 3)", order="True"), bytes(192)), "stored by columns"),
    "code for a header": (member(b"__import__('os').getpid()\n"), "cannot be read as NPZ"),
    "nested header": (member(b"(" * 5000), "cannot be read as NPZ"),
    "unclosed header": (member(b"{'descr': '|u1"), "cannot be read as NPZ"),
    "other header": (member(b"{}\n"), "cannot be read as NPZ"),
    "other version": (member(describe("(1, 8, 8, 3)"), bytes(192), version=2), r"of the npy format \(2, 0\)"),
    "huge images": (member(describe("(1, 20000, 20000, 1)")), "damaged: it claims"),
    "no array": (member(describe("(1, 8, 8, 3)"), bytes(192), "images.npy"), "holds no array arr_0; it holds images.npy"),
    "another compression": (squeezed(), "is not compressed as NumPy does it"),
    "text": (b"hello", "cannot be read as NPZ"),
    "cut off": (pickled()[:-30], "cannot be read as NPZ"),
    "corrupted": (corrupted(), "cannot be read as NPZ: Bad CRC"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    contents, message = HOSTILE[name]
    (tmp_path / "file.npz").write_bytes(contents)
    with pytest.raises(InputError, match=message) as refused:
        list(open_images(tmp_path / "file.npz").chunks())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("array", [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.uint8)])
def test_arrays_that_are_no_images_are_refused(tmp_path, array):
    with pytest.raises(InputError, match=r"arr_0 in \S+ is \w+ \(.*\); images are uint8 \(N, height, width, 1 or 3\)"):
        from_npz(write(tmp_path / "file.npz", arr_0=array))


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="none.npz does not exist"):
        open_images(tmp_path / "none.npz")


def test_a_folder_of_images(tmp_path, caplog):
    images = random_images(70)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    (tmp_path / "33.png").write_bytes(b"no image")
    found = open_images(tmp_path)
    assert (found.count, found.shape) == (70, (8, 8, 3))
    np.testing.assert_array_equal(np.concatenate(list(found.chunks())), np.delete(images, 33, axis=0))
    Image.fromarray(images[0, :6]).save(tmp_path / "40.png")
    with pytest.raises(InputError, match="one size, but there are 8 x 8 and 8 x 6 pixels; give the data source with"):
        list(open_images(tmp_path).chunks())
    cropped = open_images(DataConfig(path=str(tmp_path), image_size=6))
    assert {chunk.shape[1:] for chunk in cropped.chunks()} == {cropped.shape} == {(6, 6, 3)}


def test_data_sources_by_name(tmp_path):
    digits = open_images("digits/test")
    assert (digits.count, digits.shape) == (297, (8, 8, 1))
    assert data_source("cifar10/train:some/folder") == DataConfig("cifar10", path="some/folder", image_size=32)
    assert data_source("tfds/validation/64:imagenet2012").dataset == "imagenet2012"
    assert data_source("idx/test:mnist") == DataConfig("idx", path="mnist", split="test", image_size=28, channels=1)
    assert data_source("samples/folder") is None
    assert data_source("tfds/train[:10]/64:mnist").split == "train[:10]"
    with pytest.raises(InputError, match="such as folder/val/256$"):
        open_images("folder/val")
    with pytest.raises(InputError, match="folder/val:photos lacks the size in pixels to crop the images to"):
        open_images("folder/val:photos")


def test_stored_codes_are_refused():
    class Codes:
        description = "codes"

        def __getitem__(self, index):
            return {"codes": np.zeros((1, 4), np.int32), "label": 0}

    with pytest.raises(InputError, match="these are codes, not images"):
        from_source(Codes())


def test_subset():
    numbers = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    images = Images("numbers", 100, (1, 1, 1), lambda: iter(np.split(numbers, [3, 50])))
    few = subset(images, 20)
    values = np.concatenate(list(few.chunks())).ravel()
    assert few.count == 20 == len(set(values)) and few.source == "numbers; 20 of 100 drawn at random"
    assert np.all(np.diff(values.astype(int)) > 0) and len(set(values % 10)) > 5
    np.testing.assert_array_equal(values, np.concatenate(list(few.chunks())).ravel())
    assert subset(images, 100) is images
    with pytest.raises(InputError, match="numbers has 100 images, 101 of them cannot be taken"):
        subset(images, 101)


def test_a_subset_of_a_source_is_all_that_is_read():
    class Counting:
        class_names, description, asked = ("a",), "counted", []

        def __len__(self):
            return 100

        def __getitem__(self, index):
            self.asked.append(index)
            return {"image": np.full((1, 1, 1), index, np.uint8), "label": 0}

    source = Counting()
    values = np.concatenate(list(subset(from_source(source, 1), 20).chunks())).ravel()
    assert len(values) == 20 and set(source.asked) == {0, *values.tolist()}


# --- features --------------------------------------------------------------------------------------------------------------


def test_features_do_not_depend_on_devices_or_batches(extractor):
    images = random_images(37)
    one = dataclasses.replace(extractor, mesh=parallel.make_mesh(MeshConfig(), jax.devices()[:1]), batch_size=37)
    odd = dataclasses.replace(extractor, batch_size=13)  # rounded up to 16, for eight devices
    expected = next(one([images]))
    for chunks in ([images], np.split(images, [1, 1, 20, 36])):
        batches = list(odd(chunks))
        assert [len(batch.pool) for batch in batches] == [16, 16, 5]
        for name in ("pool", "spatial", "logits"):
            found = np.concatenate([getattr(batch, name) for batch in batches])
            np.testing.assert_allclose(found, getattr(expected, name), atol=1e-6)
    assert not list(odd([]))


def test_batches_are_cut_over_all_devices_and_traced_once(extractor):
    traces = []

    def features(params, images):
        traces.append(images.shape)
        return stand_in(params, images)

    pools = list(dataclasses.replace(extractor, features=features)(np.split(random_images(50, channels=1), [7])))
    assert traces == [(16, 8, 8, 3)] and sum(len(batch.pool) for batch in pools) == 50
    compiled = jax.jit(stand_in).lower(
        extractor.params, jax.ShapeDtypeStruct((16, 8, 8, 3), np.uint8, sharding=parallel.batch_sharding(extractor.mesh))
    )
    assert "f32[2,6]" in compiled.compile().as_text()  # two rows on each of eight


def test_a_batch_is_handled_while_the_next_one_runs(extractor):
    read = []

    def chunks():
        for number in range(4):
            read.append(number)
            yield random_images(16, number)

    counts = [len(read) for _ in extractor(chunks())]
    assert counts == [2, 3, 4, 4]  # one ahead, and no more


def test_grey_images(extractor):
    grey = random_images(16, channels=1)
    pools = [next(extractor([images])).pool for images in (grey, np.repeat(grey, 3, axis=-1))]
    np.testing.assert_array_equal(*pools)


def test_statistics_are_those_of_all_features(extractor):
    images = random_images(50)
    seen = []
    statistics = collect(extractor, from_array(images, "noise"), keep=20, progress=seen.append)
    features = next(dataclasses.replace(extractor, batch_size=56)([images]))
    for found, expected in ((statistics.pool, features.pool), (statistics.spatial, features.spatial.reshape(50, -1))):
        np.testing.assert_allclose(found.mean, expected.mean(axis=0, dtype=np.float64), atol=1e-6)
        np.testing.assert_allclose(found.covariance, np.cov(expected, rowvar=False), atol=1e-6)
    assert statistics.score.mean == pytest.approx(inception_score(features.logits).mean, rel=1e-5)
    assert seen == [16, 16, 16, 2] and statistics.pool.count == 50
    kept = [np.abs(features.pool - row).max(axis=1).argmin() for row in statistics.features]
    assert len(set(kept)) == 20 and kept == sorted(kept) and kept != list(range(20))


def test_files_of_statistics(extractor, tmp_path):
    statistics = collect(extractor, from_array(random_images(20), "noise"), keep=20)
    save(tmp_path / "reference.npz", statistics)
    loaded = load(tmp_path / "reference.npz")
    np.testing.assert_array_equal(loaded.pool.covariance, statistics.pool.covariance)
    np.testing.assert_array_equal(loaded.spatial.mean, statistics.spatial.mean)
    np.testing.assert_array_equal(loaded.features, statistics.features)
    assert loaded.source == f"noise, as kept in {tmp_path / 'reference.npz'}"
    for name in ("score", "shape", "unreadable", "network"):
        assert getattr(loaded, name) == getattr(statistics, name)
    assert loaded.pool.count == 20


MEAN, COVARIANCE = np.zeros(6), np.eye(6)
ABOUT = {"count": 20, "score": [2.0, 0.1], "source": "noise", "shape": [8, 8, 3], "unreadable": 0, "network": None}


def about(**changes):
    text = json.dumps({**ABOUT, **changes}).encode()
    return {"mu": MEAN, "sigma": COVARIANCE, "about": np.frombuffer(text, np.uint8)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": MEAN, "sigma": np.eye(5)}, r"mu float64 \(6,\) and sigma float64 \(5, 5\); a mean and a covariance"),
        ({"mu": MEAN}, "holds no array sigma"),
        ({"mu": np.zeros((6, 1)), "sigma": COVARIANCE}, "a mean and a covariance"),
        ({"mu": np.zeros(6, int), "sigma": COVARIANCE}, "a mean and a covariance"),
        ({"mu": MEAN, "sigma": COVARIANCE * np.nan}, "sigma in .* not finite"),
        ({"mu": MEAN, "sigma": COVARIANCE * 1e308}, r"sigma in .* not finite, or beyond 1e\+09"),
        ({"mu": MEAN - np.inf, "sigma": COVARIANCE}, "mu in .* not finite, or beyond"),
        ({"mu": MEAN, "sigma": -COVARIANCE}, "sigma in .* is no covariance: it is asymmetric, or has negative eigenvalues"),
        ({"mu": MEAN, "sigma": COVARIANCE - 0.5}, "sigma in .* is no covariance"),
        ({"mu": MEAN, "sigma": np.tri(6)}, "sigma in .* is no covariance"),
        ({"mu": np.zeros(5000), "sigma": np.zeros((5000, 5000), np.float16)}, r"are floats \(D,\) and \(D, D\), D at most"),
        (about(count=1), "not what dar-jax writes"),
        (about(score=[np.nan, 1.0]), "not what dar-jax writes"),
        (about(unreadable=np.inf), "not what dar-jax writes"),
        (about() | {"about": np.full(60_000, ord("["), np.uint8)}, "not what dar-jax writes"),
        ({"mu": MEAN, "sigma": COVARIANCE, "mu_s": MEAN}, "holds no array sigma_s"),
        ({"mu": MEAN, "sigma": COVARIANCE, "features": np.zeros((3, 5), np.float32)}, "features in .* should be float32"),
        ({"mu": MEAN, "sigma": COVARIANCE, "about": np.frombuffer(b"[1]", np.uint8)}, "not what dar-jax writes"),
        ({"mu": MEAN, "sigma": COVARIANCE, "about": np.zeros(3)}, "not what dar-jax writes"),
    ],
)
def test_files_that_are_no_statistics_are_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        load(write(tmp_path / "file.npz", **arrays))


def test_statistics_of_any_precision_are_read(tmp_path):
    covariance = np.cov(np.random.default_rng(0).normal(size=(40, 60)), rowvar=False)  # of fewer images than features
    for dtype in (np.float64, np.float32, np.float16):
        path = write(tmp_path / "file.npz", mu=np.zeros(60), sigma=covariance.astype(dtype))
        assert load(path).pool.root.shape[1] == 60
    np.testing.assert_array_equal(load(write(path, **about(count=None))).pool.covariance, COVARIANCE)
    assert load(write(path, mu=MEAN, sigma=0 * COVARIANCE)).pool.root.shape == (0, 6)


def test_a_small_file_that_claims_much_is_not_inflated(tmp_path):
    np.savez_compressed(tmp_path / "file.npz", mu=MEAN, sigma=COVARIANCE, features=np.zeros((3_000_000, 6), np.float32))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"features in \S+ claims 72,000,000 bytes, but has only \S+ in the file"):
        load(tmp_path / "file.npz")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([2**31, 2**63, 10**30]))
HEADERS = st.builds(
    lambda descr, order, shape: describe(tuple(shape), repr(descr), repr(order)),
    st.sampled_from(
        ["<f8", "<f4", "<f2", ">f8", "<f16", "|u1", "<i8", "|O", "<U0", "|V8", "nonsense", ("<f8", (6,)), [("a", "<f8")]]
    ),
    st.sampled_from([False, True, None]),
    st.lists(NUMBERS, max_size=3),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=HEADERS,
    size=st.integers(0, 600),
    name=st.sampled_from(["mu", "sigma", "mu_s", "features", "about"]),
    flips=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), max_size=2),
)
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(tmp_path, header, size, name, flips):
    """An NPZ file of statistics, one of whose arrays has any header and length, with up to two bytes changed anywhere."""
    file, arrays = io.BytesIO(), about(count=9) | {"mu_s": MEAN, "sigma_s": COVARIANCE}
    np.savez_compressed(file, **{key: array for key, array in arrays.items() if key != name})
    with zipfile.ZipFile(file, "a") as archive, zipfile.ZipFile(io.BytesIO(member(header, bytes(size)))) as other:
        archive.writestr(f"{name}.npy", other.read("arr_0.npy"))
    data = bytearray(file.getvalue())
    for place, change in flips:
        data[place % len(data)] ^= change
    (tmp_path / "file.npz").write_bytes(data)
    tracemalloc.start()
    try:
        statistics = load(tmp_path / "file.npz")
        assert np.isfinite(frechet_distance(statistics.pool, statistics.pool).value)
    except InputError as error:
        assert "\n" not in str(error)
    finally:
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


# --- reports ---------------------------------------------------------------------------------------------------------------


def features_of(extractor, images):
    return np.concatenate([batch.pool for batch in extractor([images])])


def test_evaluate(extractor, tmp_path, capsys):
    images, others = random_images(60), random_images(50, 1) // 2
    samples, reference = write(tmp_path / "samples.npz", arr_0=others), write(tmp_path / "reference.npz", arr_0=images)
    report = evaluate(samples, reference, extractor)
    real, fake = features_of(extractor, images), features_of(extractor, others)
    assert report["fid"] == pytest.approx(frechet_distance(moments(fake), moments(real)).value, rel=1e-4)
    assert (report["precision"], report["recall"]) == precision_recall(real, fake)
    assert report["inception_score"] > 1 and report["sfid"] > 0 and not report["left_out"]
    about = {"source": str(reference), "images": 60, "size": [8, 8, 3], "unreadable": 0, "precision_recall_images": 60}
    assert report["reference"] == about and report["samples"]["images"] == 50
    assert report["weights"] == {"path": "stand-in.pt", "sha256": "00ff"} and report["resize"] == "tensorflow1"
    (note,) = report["notes"]
    assert note.startswith("FID and sFID of fewer than 10,000 images (50 in the samples, 60 in the reference) are biased")
    assert json.loads(json.dumps(report)) == report
    text = table(report)
    for name in ("fid", "sfid", "inception_score", "precision", "recall"):
        assert f"{report[name]:.4f}" in text
    assert all(part in text for part in (str(reference), "60 images, 8 x 8 pixels", "stand-in.pt", "00ff", note))
    assert "samples 50/50" in capsys.readouterr().out
    same = evaluate(samples, samples, extractor)
    assert same["fid"] < 1e-9 and same["precision"] == same["recall"] == 1


def test_a_part_of_the_images(extractor):
    images = from_array(random_images(60), "noise")
    report = evaluate(images, images, extractor, num_images=20, reference_images=30)
    assert (report["samples"]["images"], report["reference"]["images"]) == (20, 30)
    assert report["samples"]["source"] == "noise; 20 of 60 drawn at random"
    with pytest.raises(InputError, match="noise has moments of all its images, 20 of them cannot be taken"):
        evaluate(collect(extractor, images, 60), images, extractor, num_images=20)


def test_adm_reference_files(extractor, tmp_path, monkeypatch):
    """Moments of all of a data set beside some of its images, which are for precision and recall."""
    images, shown = random_images(60), random_images(30, 1)
    statistics = collect(extractor, from_array(images, "noise"), 60)
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.covariance, "arr_0": shown}
    arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.covariance}
    path = write(tmp_path / "VIRTUAL.npz", **arrays)
    samples = from_array(random_images(40, 2), "samples")
    report = evaluate(samples, path, extractor)
    whole = evaluate(samples, statistics, extractor)
    assert (report["fid"], report["sfid"]) == (whole["fid"], whole["sfid"])
    real, fake = features_of(extractor, shown), features_of(extractor, random_images(40, 2))
    assert (report["precision"], report["recall"]) == precision_recall(real, fake)
    assert report["reference"]["images"] is None and report["reference"]["precision_recall_images"] == 30
    assert "VIRTUAL.npz (SHA-256 " in report["reference"]["source"] and "number of images is not said" in table(report)
    assert any("does not say how they were computed" in note for note in report["notes"])
    monkeypatch.setattr(evaluation, "REFERENCE_FEATURES", 10)
    assert evaluate(samples, path, extractor)["reference"]["precision_recall_images"] == 10


def test_what_cannot_be_computed_is_left_out_with_a_reason(extractor, tmp_path):
    def headless(params, images):
        return dataclasses.replace(stand_in(params, images), logits=None)

    statistics = collect(extractor, from_array(random_images(60), "noise"), 60)
    path = write(tmp_path / "moments.npz", mu=statistics.pool.mean, sigma=statistics.pool.covariance)
    report = evaluate(from_array(random_images(40), "s"), path, dataclasses.replace(extractor, features=headless))
    assert set(report) & {"fid", "sfid", "inception_score", "precision", "recall"} == {"fid"}
    assert report["left_out"] == {
        "sfid": "the reference came without moments of spatial features (mu_s, sigma_s)",
        "inception_score": "it needs the network's classifier, which stand-in.pt lacks; "
        "weights-inception-2015-12-05-6726825d.pth and pt_inception-2015-12-05-6726825d.pth have it",
        "precision": "the reference came as moments only, without images",
        "recall": "the reference came as moments only, without images",
    }
    assert "left out sFID: the reference came without" in " ".join(table(report).split())
    few = evaluate(from_array(random_images(3), "s"), statistics, extractor)
    assert few["left_out"] == dict.fromkeys(("precision", "recall"), "they need more than 3 images on both sides")
    assert any("singular" in note and "FID, samples: rank 2 of 6" in note for note in few["notes"])


def test_what_does_not_fit_together(extractor):
    a = collect(extractor, from_array(random_images(20), "a"), 20)
    b = dataclasses.replace(a, network=dataclasses.replace(a.network, resize="half_pixel"))
    with pytest.raises(InputError, match="samples were resized as tensorflow1 and the reference as half_pixel"):
        compare(a, b)
    with pytest.raises(InputError, match="20 features|6 features and the reference has 8"):
        compare(a, dataclasses.replace(a, pool=a.spatial))
    other = dataclasses.replace(a, network=dataclasses.replace(a.network, sha256="beef"), shape=(16, 16, 3), unreadable=2)
    notes = "\n".join(compare(a, other)["notes"])
    assert "another file of weights (SHA-256 beef)" in notes and "2 images of the reference could not be read" in notes
    assert "8 x 8 x 3 (height, width, channels), the reference is 16 x 16 x 3" in notes


def test_too_few_images(extractor, tmp_path):
    with pytest.raises(InputError, match="at least 2 images, there are 1"):
        collect(extractor, from_array(random_images(1), "one"), 1)
    with pytest.raises(InputError, match="none of the 3 images of nothing can be read"):
        collect(extractor, Images("nothing", 3, (8, 8, 3), lambda: iter([])), 1)
    with pytest.raises(InputError, match="none.npz does not exist"):  # before the reference is looked at
        evaluate(tmp_path / "none.npz", Images("trap", 3, (8, 8, 3), lambda: pytest.fail("was read")), extractor)


# --- the network -----------------------------------------------------------------------------------------------------------


def test_the_real_network_from_its_file(golden, tmp_path):
    case = Case.load(golden, "inception_fid")
    torch_file.write(tmp_path / "weights.pth", case.inception())
    smooth = case.rules.smooth_images(case.seed, "images", case.info["batch"], case.info["image_size"])
    images = np.floor(127.5 * (smooth + 1)).astype(np.uint8).transpose(0, 2, 3, 1)
    extractor = open_extractor(tmp_path / "weights.pth", batch_size=case.info["batch"])
    statistics = collect(extractor, from_array(images, "smooth"), keep=len(images))
    case.check("pool", statistics.features)
    assert statistics.spatial.mean.shape == (2023,) and statistics.score.mean >= 1
    np.testing.assert_allclose(statistics.pool.mean, case.expected["pool"].mean(axis=0), atol=2e-4)
    assert statistics.network.weights == str(tmp_path / "weights.pth") and len(statistics.network.sha256) == 64
