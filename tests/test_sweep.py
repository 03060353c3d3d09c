"""Sweeps: every combination, the same samples as without a sweep, one compilation, previews for free."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_fid import from_array, stand_in

from dar_jax import parallel
from dar_jax.cli.main import main
from dar_jax.config import MeshConfig, SamplingConfig
from dar_jax.errors import InputError
from dar_jax.evaluation import extractor as extractors
from dar_jax.evaluation import sweep as sweeps
from dar_jax.evaluation.extractor import Extractor, Network
from dar_jax.evaluation.fid import evaluate
from dar_jax.evaluation.sweep import share_compilation, sweep, variants
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import load_sampler
from dar_jax.sampling.settings import make_settings

CONFIGS = [
    SamplingConfig(guidance=(1.0, 1.0)),
    SamplingConfig(guidance=(1.0, 4.0), top_k=5),
    SamplingConfig(guidance=(2.0, 2.0), top_p=0.9, temperature=0.7),
]


def make_extractor():
    params = jax.random.normal(jax.random.key(0), (800, 19)) / 8
    return Extractor(stand_in, params, parallel.make_mesh(MeshConfig()), 16, Network("stand-in.pt", "00ff", "tensorflow1"))


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load_sampler(tiny_run)


@pytest.fixture
def reference(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "reference.npz", images)
    return str(tmp_path / "reference.npz")


def test_every_combination():
    guidance = [{"guidance": (1, 1)}, {"guidance": (1, 8)}]
    steps = [{"steps": "uniform", "num_denoising_steps": 2}, {"steps": "late3", "num_denoising_steps": None}]
    found = variants(SamplingConfig(top_p=0.5, num_denoising_steps=4), guidance, [], steps)
    assert [(each.guidance, each.steps, each.num_denoising_steps, each.top_p) for each in found] == [
        (scales, *denoising, 0.5) for scales in [(1, 1), (1, 8)] for denoising in [("uniform", 2), ("late3", None)]
    ]


def test_one_compilation_gives_the_samples_of_each_setting(trained, caplog):
    labels, seeds = np.arange(8) % 10, np.arange(8)
    made = [make_settings(config, trained.config, trained.networks.method) for config in CONFIGS]
    shared = share_compilation(made, 64)
    jax.clear_caches()
    with jax.log_compiles():
        tokens, compiled = [], []
        for each in shared:
            caplog.clear()
            tokens.append(next(sample(trained, labels, seeds, each, 8)).tokens)
            compiled.append(sum("Compiling jit(_predict)" in record.getMessage() for record in caplog.records))
    assert compiled == [4, 0, 0]  # once for each group
    for config, found in zip(CONFIGS, tokens):
        np.testing.assert_array_equal(found, next(sample(trained, labels, seeds, config, 8)).tokens)


def test_rows_are_those_of_single_evaluations(trained, reference, monkeypatch):
    passes = []

    def counted(*arguments, **options):
        for batch in sample(*arguments, **options):
            passes.append(batch.calls.max())
            yield batch

    monkeypatch.setattr(sweeps, "sample", counted)
    extractor = make_extractor()
    configs = [*CONFIGS[:2], dataclasses.replace(CONFIGS[0], steps="late3")]
    rows = sweep(trained, extractor, reference, configs, groups=(2, 4), num_samples=21, batch_size=16)
    assert [(*row["guidance"], row["num_denoising_steps"], row["groups"], row["tokens"]) for row in rows] == [
        (1, 1, 4, 2, 8), (1, 1, 4, 4, 16), (1, 4, 4, 2, 8), (1, 4, 4, 4, 16), (1, 1, 3, 2, 8), (1, 1, 3, 4, 16)]  # fmt: skip
    assert passes[7::8] == [16, 16, 1]  # the same tokens are not drawn again
    labels, seeds = np.arange(21) % 10, np.arange(21)
    for row, config in zip(rows[1::2], configs):
        drawn = np.concatenate([part.images for part in sample(trained, labels, seeds, config, 16)])
        report = evaluate(from_array(drawn, "samples"), reference, extractor)
        for name in ("fid", "sfid", "precision", "recall", "inception_score"):
            np.testing.assert_allclose(row[name], report[name], rtol=1e-6, err_msg=name)
    with pytest.raises(InputError, match="groups are"):
        sweep(trained, extractor, reference, CONFIGS, groups=(5,))
    with pytest.raises(InputError, match=f"seeds {2**32 - 9} .. {2**32} are not all between 0 and"):
        sweep(trained, extractor, reference, CONFIGS, num_samples=10, seed=2**32 - 9)


def test_the_command(tiny_run, reference, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extractors, "open_extractor", lambda *arguments: make_extractor())
    command = ["sweep", str(tiny_run), "--reference", reference, "--out", str(tmp_path / "out"), "--num", "12"]
    assert main([*command, "--steps", "late3", "--num-denoising-steps", "2", "--groups", "2,4", "--batch-size", "16"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["rows"]) == 4 and report["samples"] == 12
    assert "late3" in capsys.readouterr().out and Image.open(tmp_path / "out/fid.png").size[0] > 500
    assert main([*command, "--guidance", "1:2:3"]) == 2
    assert "--guidance takes FIRST:LAST,..., not '" in capsys.readouterr().err
    assert main([*command, "--steps", "uniform,late4"]) == 2
    assert "steps should be one of uniform, late3" in capsys.readouterr().err


def test_evaluate_commands(tiny_run, reference, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extractors, "open_extractor", lambda *arguments: make_extractor())
    kept = str(tmp_path / "kept.npz")
    assert (
        main(["evaluate", reference, "--reference", reference, "--json", str(tmp_path / "a.json"), "--save-statistics", kept])
        == 0
    )
    report = json.loads((tmp_path / "a.json").read_text())
    assert abs(report["fid"]) < 1e-6 and report["precision"] == 1.0
    assert main(["evaluate", reference, "--reference", kept]) == 0
    assert "as kept in" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "none.npz"), "--reference", kept]) == 2
    assert main(["evaluate", reference]) == main(["evaluate", reference, "--save-statistics", kept, "--json", kept]) == 2
    assert "give a --reference to compare with, or --save-statistics alone" in capsys.readouterr().err
    assert main(["evaluate", reference, "--save-statistics", kept, "--num-images", "12"]) == 0
    assert main(["evaluate", reference, "--reference", kept]) == 0
    assert "12 images" in capsys.readouterr().out

    assert (
        main(
            ["evaluate-tokenizer", str(tiny_run), "--num-images", "19", "--batch-size", "8", "--json", str(tmp_path / "b.json")]
        )
        == 0
    )
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["images"] == 19 and report["rfid"] > 0 and 0 < report["codebook_usage"] <= 1
    assert set(report["left_out"]) == {"ssim", "lpips"}  # of 8 pixels


@pytest.mark.usefixtures("narrow_vgg")
def test_what_evaluate_tokenizer_measures(tiny_tokenizer, tmp_path):
    from dar_jax.config import DataConfig, TokenizerTraining
    from dar_jax.evaluation.metrics import Moments, frechet_distance, pooled_pixels, ssim
    from dar_jax.evaluation.tokenizer import LpipsWeights, evaluate_tokenizer
    from dar_jax.features.vgg_lpips import Lpips
    from dar_jax.inference.reconstruct import reconstruct
    from dar_jax.inference.trained import load_tokenizer
    from dar_jax.models.pixels import psnr
    from dar_jax.training.checkpoint import save_for_inference

    class Noise:
        class_names, description = ("a",), "noise"
        images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 1), np.uint8)

        def __len__(self):
            return 5

        def __getitem__(self, index):
            return {"image": self.images[index], "label": 0}

    tokenizer, params = tiny_tokenizer(image_size=16)
    data = DataConfig(source="digits", image_size=16, channels=1, crop="center")
    save_for_inference(tmp_path, TokenizerTraining(model=tokenizer.config, data=data), params, 1, ("a",))
    trained = load_tokenizer(tmp_path)
    example = jnp.zeros((1, 16, 16, 3))
    lpips = jax.jit(Lpips().init)(jax.random.key(0), example, example)["params"]
    extractor = make_extractor()
    report = evaluate_tokenizer(trained, Noise(), data, extractor, LpipsWeights(lpips, "random"), batch_size=8, seed=3)
    decoded = reconstruct(trained, Noise.images, np.arange(3, 8)).images
    np.testing.assert_allclose(report["psnr"], psnr(Noise.images, decoded).mean())
    assert abs(report["psnr"] - report["psnr_without_noise"]) > 1e-3
    features = [np.asarray(pooled_pixels(x), np.float64) for x in (Noise.images, decoded)]
    moments = [Moments(x.mean(0), np.cov(x, rowvar=False), 5) for x in features]
    np.testing.assert_allclose(report["pixel_distance"], frechet_distance(*moments).value, rtol=1e-6)
    assert 0 <= report["bits_per_image"] == 16 * report["entropy_at_position"] <= 16 * np.log2(5)
    np.testing.assert_allclose(report["ssim"], np.mean(ssim(Noise.images, decoded)), rtol=1e-5)
    pair = [np.repeat(x, 3, axis=-1) / 127.5 - 1 for x in (Noise.images, decoded)]
    np.testing.assert_allclose(report["lpips"], np.mean(Lpips().apply({"params": lpips}, *pair)), rtol=1e-4)
    measured = evaluate(from_array(decoded, "decoded"), from_array(Noise.images, "noise"), extractor)
    np.testing.assert_allclose((report["rfid"], report["rsfid"]), (measured["fid"], measured["sfid"]), rtol=1e-6)
    with pytest.raises(InputError, match="seeds -1 .. "):
        evaluate_tokenizer(trained, Noise(), data, seed=-1)
    left_out = evaluate_tokenizer(trained, Noise(), data, batch_size=8)["left_out"]
    assert set(left_out) == {"lpips", "rfid", "rsfid"}
