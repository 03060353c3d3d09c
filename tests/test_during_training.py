"""Metrics in the log of a training run, of both stages."""

import dataclasses

import numpy as np
import pytest
from test_sweep import make_extractor

from dar_jax.config import DataConfig, TrainConfig, TransformerConfig, TransformerTraining
from dar_jax.data.sources import DigitsSource
from dar_jax.errors import InputError
from dar_jax.evaluation import during_training
from dar_jax.evaluation.during_training import Evaluation
from dar_jax.evaluation.tokenizer import evaluate_tokenizer
from dar_jax.experiment import Experiment
from dar_jax.inference.trained import load_sampler, load_tokenizer
from dar_jax.parallel.batches import to_host
from dar_jax.quickstart import TOKENIZER
from dar_jax.training.logs import read_records
from dar_jax.training.loop import train

SETTINGS = TrainConfig(steps=2, batch_size=8, evaluate_every=1, evaluate_images=12, checkpoint_every=2)


@pytest.fixture
def networks(monkeypatch):
    """A stand-in for Inception; no weights of LPIPS."""
    opened = []
    monkeypatch.setattr(during_training, "open_extractor", lambda **_: opened.append("inception") or make_extractor())
    monkeypatch.setattr(during_training, "open_lpips", lambda: opened.append("lpips"))
    return opened


def test_a_tokenizer_is_measured_on_held_out_images(networks, tmp_path):
    velocity = dataclasses.replace(TOKENIZER.model.velocity, width=16, layers=1)
    model = dataclasses.replace(TOKENIZER.model, encoder_layers=1, encoder_width=16, decoder_width=16, velocity=velocity)
    config = dataclasses.replace(TOKENIZER, model=model, train=SETTINGS)
    train(Experiment(config), tmp_path, evaluate=Evaluation())
    first, last = (record for record in read_records(tmp_path) if "eval_psnr" in record)
    data = dataclasses.replace(config.data, split="test")
    source = during_training.open_source(data)
    report = evaluate_tokenizer(load_tokenizer(tmp_path), source, data, make_extractor(), batch_size=16, num_images=12)
    for name in ("psnr", "rfid", "codebook_usage"):
        np.testing.assert_allclose(last[f"eval_{name}"], report[name], rtol=1e-5, err_msg=name)
    assert first["step"] == 1 and last["step"] == 2 and networks == ["inception", "lpips"]  # opened once


def test_what_is_missing_is_said_before_the_first_step(networks, tiny_run, tmp_path):
    digits = DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False)
    model = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=16, vocab_size=64, num_classes=10)
    config = TransformerTraining(model=model, tokenizer=str(tiny_run / "tokenizer"), data=digits, train=SETTINGS)

    class Fewer(DigitsSource):
        class_names = tuple("012345678")

    def fewer(data):
        return (DigitsSource if data.split == "train" else Fewer)(data.split, 1)

    with pytest.raises(InputError, match=r"evaluate on have other classes than those to train on \(9\)"):
        train(Experiment(config, source=fewer), tmp_path / "run", evaluate=Evaluation())
    assert not list(tmp_path.iterdir()) or not (tmp_path / "run/checkpoints").exists()


def test_without_a_split_the_images_are_those_of_training(networks, tmp_path, capsys):
    velocity = dataclasses.replace(TOKENIZER.model.velocity, width=16, layers=1)
    model = dataclasses.replace(TOKENIZER.model, encoder_layers=1, encoder_width=16, decoder_width=16, velocity=velocity)
    settings = dataclasses.replace(SETTINGS, steps=1)
    config = dataclasses.replace(TOKENIZER, model=model, train=settings)
    train(Experiment(config, source=lambda data: DigitsSource("train", 1)), tmp_path, evaluate=Evaluation())
    assert capsys.readouterr().out.count("eval_ figures are of the training images") == 1


def test_a_transformer_is_measured_by_bits_and_samples(networks, tiny_run, tmp_path):
    data = DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False)
    model = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=16, vocab_size=64, num_classes=10)
    config = TransformerTraining(model=model, tokenizer=str(tiny_run / "tokenizer"), data=data, train=SETTINGS)
    train(Experiment(config), tmp_path, evaluate=Evaluation())
    records = [record for record in read_records(tmp_path) if "eval_fid" in record]
    trained = load_sampler(tmp_path)
    test = dataclasses.replace(data, split="test")
    report = during_training.evaluate_transformer(trained, during_training.open_source(test), test, 16, 12)
    np.testing.assert_allclose(records[-1]["eval_bits_per_token"], report["bits_per_token"], rtol=1e-5)
    assert len(records) == 2 and records[-1]["eval_fid"] > 0


def test_a_condition_of_its_own_is_that_of_the_batch(networks, tiny_run, tmp_path, monkeypatch):
    class Turned(DigitsSource):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "turn": np.int32(index % 10)}

    def drawn(trained, labels, *arguments, given):
        seen.append((labels, given["turn"]))
        return during_training_sample(trained, labels, *arguments, given=given)

    def pictures(stage, ema, batch):
        shown.append(during_training.log_pictures(stage, ema, batch))
        batches.append((to_host(batch["label"]), to_host(batch["turn"])))
        return shown[-1]

    seen, shown, batches, during_training_sample = [], [], [], during_training.sample
    monkeypatch.setattr(during_training, "sample", drawn)
    data = DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False)
    model = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=16, vocab_size=64, num_classes=10)
    settings = TrainConfig(steps=1, batch_size=8, sample_every=1)
    config = TransformerTraining(model=model, tokenizer=str(tiny_run / "tokenizer"), data=data, train=settings)
    fork = Experiment(
        config,
        source=lambda data: Turned(data.split, 1),
        condition=lambda batch: (batch["label"] + batch.get("turn", 0)) % 10,
    )
    train(fork, tmp_path, pictures=pictures)
    assert shown[0]["samples"].ndim == 3
    np.testing.assert_array_equal(seen, batches)
