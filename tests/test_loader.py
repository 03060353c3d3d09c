"""The loader's benchmark, `experiments/benchmarks/loader.py`, for a moment."""

import json
from pathlib import Path

import loader
import pytest

from dar_jax.experiment import load_experiment

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return loader.write_images(tmp_path_factory.mktemp("made") / "images", 4)


def test_it_says_what_is_fed(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "STORED", 256)
    monkeypatch.setattr(loader, "BATCH", 2)
    monkeypatch.setattr(loader, "MACHINES", {"slow": loader.Machine(2e12, 4), "fast": loader.Machine(1e21, 4)})
    monkeypatch.setattr(loader, "needs", lambda: {"recipe": loader.Need(1e12, 0.5, "stored codes")})
    loader.main(images, workers=0, seconds=0.01, json=str(tmp_path / "report.json"))
    report, lines = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out.splitlines()
    assert all(reading["images_per_second_and_core"] > 0 for reading in report["readings"].values())
    rows = [(row["machine"], row["images_per_second"], row["fed"]) for row in report["recipes"]]
    assert rows == [("slow", 1, True), ("fast", 5e8, False)]
    assert report["recipes"][0]["cores_needed"] == 1
    assert [line.split()[-3] for line in lines[-2:]] == ["yes", "NO"]


def test_operations_of_the_published_size():
    """A step of training takes three passes; sampling with guidance takes two, published as 0.36 TFLOP an image for size L."""
    flops = loader.step_flops(load_experiment(EXPERIMENTS / "imagenet256_ar.py:l"))
    assert flops == pytest.approx(0.36e12 / 2 * 3, rel=0.05)


def test_images_are_as_large_as_those_of_imagenet(images):
    files = list(Path(images).iterdir())
    assert 90_000 < sum(file.stat().st_size for file in files) / 4 < 130_000
