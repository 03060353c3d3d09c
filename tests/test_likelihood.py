"""Bits per token: by hand, position by position, whatever the batch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dar_jax.cli.main import main
from dar_jax.config import SamplingConfig
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError
from dar_jax.evaluation.likelihood import evaluate_transformer, score
from dar_jax.inference.model import Model
from dar_jax.inference.reconstruct import encode
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import load_sampler
from dar_jax.training.checkpoint import save_for_inference


@pytest.fixture(scope="module")
def digits(tiny_run):
    data = dataclasses.replace(load_sampler(tiny_run).info.config.data, split="test")
    return open_source(data), data


def test_bits_are_those_of_the_chain_rule(tiny_run, digits):
    trained = load_sampler(tiny_run)
    source, data = digits
    report = evaluate_transformer(trained, source, data, batch_size=8, num_images=11)  # the last batch is padded
    images = np.stack([source[index]["image"] for index in range(11)])
    labels = np.array([source[index]["label"] for index in range(11)])
    codes = encode(trained, images)
    model, params = trained.networks.transformer, jax.device_get(trained.params["transformer"])
    for suffix, given in (("", labels), ("_without_class", np.full(11, 10))):
        logits = np.asarray(model.apply({"params": params}, jnp.asarray(given), codes), np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        bits = -np.log2(np.take_along_axis(probabilities, codes[..., None], -1)[..., 0])
        np.testing.assert_allclose(report[f"bits_of_each_position{suffix}"], bits.mean(0), rtol=1e-4)
        np.testing.assert_allclose(report[f"bits_per_token{suffix}"], bits.mean(), rtol=1e-4)
        right = logits.argmax(-1) == codes
        np.testing.assert_allclose(report[f"accuracy_of_each_position{suffix}"], right.mean(0))
    assert report["images"] == 11 and report["bits_per_token"] != report["bits_per_token_without_class"]


def test_classes_are_those_of_the_same_name(tiny_run, digits):
    trained = load_sampler(tiny_run)
    source, data = digits

    class Renumbered:
        class_names, description = tuple("8901234567"), "renumbered"

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return source[index] | {"label": (source[index]["label"] + 2) % 10}

    report, expected = (evaluate_transformer(trained, each, data, 8, 8) for each in (Renumbered(), source))
    assert report["bits_per_token"] == expected["bits_per_token"]


def test_a_condition_sees_images_as_in_training(tiny_run, digits):
    """float32 in [-1, 1], in evaluation, in scoring and in sampling."""
    source, data = digits
    seen = []

    def condition(batch):
        seen.append(batch["image"].dtype)
        return batch["label"] + jnp.int32(jnp.round(batch["image"].min()) + 1)  # + 0, as each image has its black

    trained = load_sampler(tiny_run)
    fork = dataclasses.replace(trained, networks=dataclasses.replace(trained.networks, condition=condition))
    assert evaluate_transformer(fork, source, data, 8, 8) == evaluate_transformer(trained, source, data, 8, 8)
    images, labels = np.stack([source[index]["image"] for index in range(8)]), [source[index]["label"] for index in range(8)]
    np.testing.assert_array_equal(Model(fork).score(images, labels), Model(trained).score(images, labels))
    drawn = [
        next(iter(sample(each, labels, range(8), SamplingConfig(), **shown))).tokens
        for each, shown in ((fork, {"given": {"image": images}}), (trained, {}))
    ]
    np.testing.assert_array_equal(*drawn)
    assert set(seen) == {jnp.dtype("float32")}


def test_no_code_sees_itself(tiny_run):
    trained = load_sampler(tiny_run)
    codes, labels = jnp.zeros((1, 16), jnp.int32), jnp.zeros(1, jnp.int32)
    before, _ = score(trained.networks.transformer, trained.params["transformer"], labels, codes)
    after, _ = score(trained.networks.transformer, trained.params["transformer"], labels, codes.at[0, 9].set(5))
    np.testing.assert_array_equal(before[0, :9], after[0, :9])
    assert (before[0, 9:] != after[0, 9:]).any()


def test_the_command_writes_report_and_plot(tiny_run, tmp_path, capsys):
    arguments = ["evaluate-ar", str(tiny_run), "--out", str(tmp_path / "out"), "--num-images", "9", "--batch-size", "8"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert f"{report['bits_per_token']:.4f} bits per token" in capsys.readouterr().out
    assert report["images"] == 9 and "test" in report["data"]
    assert Image.open(tmp_path / "out/positions.png").size[0] > 500


def test_codes_of_another_tokenizer_are_refused(tiny_run, golden, tmp_path, capsys):
    codes = ["--data.source", "codes", "--data.path", str(golden / "old_codes")]
    assert main(["evaluate-ar", str(tiny_run), "--out", str(tmp_path / "out"), *codes]) == 2
    assert "were made by another tokenizer" in capsys.readouterr().err


def test_unfit_data_are_refused(tiny_run, digits, tmp_path):
    trained = load_sampler(tiny_run)
    source, data = digits

    class Other:
        class_names, description = ("a", "b"), "others"

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return source[index]

    with pytest.raises(InputError, match="classes that the run does not know: a, b"):
        evaluate_transformer(trained, Other(), data)
    save_for_inference(tmp_path, trained.info.tokenizer.config, trained.params["tokenizer"], 1, source.class_names)
    assert main(["evaluate-ar", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
