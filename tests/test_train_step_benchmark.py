"""The benchmark of the training step, `experiments/benchmarks/train_step.py`, on a transformer of one layer."""

import json
import sys
from pathlib import Path

import jax
import pytest
import train_step as benchmark

from dar_jax.config import TRANSFORMER_SIZES
from dar_jax.errors import InputError


def test_rows_are_measured_and_their_rates_follow(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(TRANSFORMER_SIZES, "tiny", {"layers": 1, "heads": 2, "width": 16})
    monkeypatch.setattr(benchmark, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "attempt", lambda function, *arguments: function(*arguments))
    file = tmp_path / "found.json"
    settings = {"models": ("tiny",), "batch_sizes": (8,), "remats": ("none", "full"), "dtype": "float32", "peak_flops": 1e9}
    benchmark.main(benchmark.Options(**settings, steps=1, repeats=1, json=file))
    rows = json.loads(file.read_text())["rows"]
    assert [row["remat"] for row in rows] == ["none", "full"]
    for row in rows:
        found = row["measured"]
        # three times the forward pass: a layer with its gated MLP of width 256, attention over 256 tokens, and the output
        layer = 2 * 16 * (4 * 16 + 3 * 256) + 4 * 16 * 256
        assert found["model_flops"] == pytest.approx(3 * 8 * 256 * (layer + 2 * 16 * 16384), rel=0.01)
        assert found["devices"] == len(jax.devices()) == 8 and found["peak_gib"] > 0
        assert row["tokens/s"] == pytest.approx(8 * 256 / found["step_seconds"]) == 256 * row["images/s"]
        assert row["MFU"] == f"{found['model_flops'] / (found['step_seconds'] * 8e9):.1%}"
    assert "MFU" in capsys.readouterr().out


def test_beside_the_release(monkeypatch, tmp_path):
    """Transformers only, each with the time that its worker says; what has no room for itself has no ratio."""
    found = {"step_seconds": 2.0, "model_flops": 1e12, "devices": 1, "tokens_per_image": 256}
    times = {"B": {**found, "peak_gib": 1.0, "compile_seconds": 1.0}}
    asked = []
    monkeypatch.setattr(benchmark, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "attempt", lambda _, options, model, *rest: times.get(model, {"note": "out of memory"}))
    monkeypatch.setattr(benchmark, "release_seconds", lambda *arguments: asked.append(arguments[2:5]) or 3.0)
    settings = {"models": ("tokenizer", "B", "L"), "batch_sizes": (8,), "dtype": "float32", "peak_flops": 1e12}
    file = tmp_path / "found.json"
    with pytest.raises(InputError, match="belong together"):
        benchmark.main(benchmark.Options(**settings, release=tmp_path))
    benchmark.main(benchmark.Options(**settings, release=tmp_path, release_python=Path(sys.executable), json=file))
    rows = json.loads(file.read_text())["rows"]
    assert asked == [("train", "B", 8)] and [row["model"] for row in rows] == ["B", "L"]
    assert rows[0]["release/ours"] == 1.5 and rows[1]["note"] == "out of memory" and "release/ours" not in rows[1]
