"""Metrics beside torch-fidelity and pytorch-fid, on the same images and weights: pip install ".[test,peers]"."""

import functools

import numpy as np
import pytest
from parity_cases import Case
from PIL import Image

from dar_jax.evaluation.extractor import open_extractor
from dar_jax.evaluation.fid import evaluate
from dar_jax.evaluation.images import open_images
from dar_jax.evaluation.statistics import collect
from dar_jax.weights import torch_file

COUNT = 48


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """Random ones that keep the size of what passes through, so that images are as different in the end as they are."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("weights") / "weights.pth"

    def tensor(name, shape):
        if name.endswith(("running_var", "bn.weight")):
            return np.ones(shape, np.float32)
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1
        return np.asarray(scale * rng.normal(size=shape), np.float32)

    shapes = Case.load(golden, "inception_fid").info["parameters"]
    torch_file.write(path, {name: tensor(name, shape) for name, shape in shapes.items()})
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Samples and reference, in sizes of which one is made smaller and the other larger."""
    rng, folders = np.random.default_rng(0), []
    for name, size, low in (("samples", 400, 0), ("reference", 64, 20)):
        folders.append(tmp_path_factory.mktemp(name))
        for index in range(COUNT):
            coarse = Image.fromarray(rng.integers(low, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(folders[-1] / f"{index:02}.png")
    return tuple(map(str, folders))


def test_torch_fidelity(weights, folders):
    peer = pytest.importorskip("torch_fidelity")
    samples, reference = folders
    expected = peer.calculate_metrics(
        input1=samples,
        input2=reference,
        fid=True,
        isc=True,
        prc=True,
        isc_splits=1,
        cuda=False,
        cache=False,
        verbose=False,
        batch_size=8,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
    )
    report = evaluate(samples, reference, open_extractor(weights))
    assert report["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=5e-3)
    assert report["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    for name in ("precision", "recall"):
        assert abs(report[name] - expected[name]) <= 1.5 / COUNT  # an image may lie on the border


def test_pytorch_fid(weights, folders, monkeypatch):
    """The moments, because it adds something to the diagonal of singular covariances, as those of few images are. Its pixels go
    from -1 to 1, where TensorFlow's network takes (x - 128) / 128."""
    inception, fid_score = (pytest.importorskip(f"pytorch_fid.{name}") for name in ("inception", "fid_score"))
    read = functools.partial(pytest.importorskip("torch").load, weights, weights_only=True)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: read())
    network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    extractor = open_extractor(weights, "half_pixel")
    for folder in folders:
        mean, covariance = fid_score.compute_statistics_of_path(folder, network, 8, 2048, "cpu", num_workers=0)
        found = collect(extractor, open_images(folder), keep=0).pool
        assert np.linalg.norm(found.mean - mean) < 5e-3 * np.linalg.norm(mean)
        assert np.linalg.norm(found.covariance - covariance) < 2e-2 * np.linalg.norm(covariance)
