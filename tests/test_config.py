"""Settings survive JSON, and what does not fit is refused by name."""

import dataclasses
import json

import pytest

from dar_jax.config import (
    DataConfig,
    LlamaConfig,
    TokenizerConfig,
    TokenizerTraining,
    TrainConfig,
    TransformerTraining,
    from_dict,
    to_dict,
    validate,
)
from dar_jax.errors import InputError


@pytest.mark.parametrize("config", [TokenizerTraining(name="x"), TransformerTraining(tokenizer="somewhere")])
def test_json_round_trip(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    validate(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "other"}, "stage"),
        ({"spare": 1}, "unknown names: spare"),
        ({"train": {"steps": "many"}}, "train.steps should be int"),
        ({"train": {"dtype": "float16"}}, "train.dtype"),
        ({"model": 3}, "table of settings"),
        ({"data": {"crop_fraction": [1.0]}}, "crop_fraction"),
        ({"train": {"steps": True}}, "train.steps should be int"),
    ],
)
def test_malformed_settings(change, message):
    with pytest.raises(InputError, match=message):
        from_dict(to_dict(TokenizerTraining()) | change)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TokenizerTraining(train=TrainConfig(steps=0)), "train.steps"),
        (TokenizerTraining(train=TrainConfig(batch_size=10, accumulate=4)), "accumulate"),
        (TokenizerTraining(train=TrainConfig(profile=(0, 3))), "train.profile is 0 3"),
        (TokenizerTraining(train=TrainConfig(profile=(4, 3))), "train.profile is 4 3"),
        (TokenizerTraining(train=TrainConfig(profile=(4, 9), steps=8)), "train.profile is 4 9"),
        (TokenizerTraining(train=TrainConfig(peak_flops=0.0)), "train.peak_flops"),
        (TokenizerTraining(data=DataConfig(image_size=128)), "128 pixels"),
        (TokenizerTraining(data=DataConfig(channels=2)), "channels"),
        (TokenizerTraining(data=DataConfig(source="codes")), "codes"),
        (TransformerTraining(model=LlamaConfig(heads=3)), "multiple of model.heads"),
        (TransformerTraining(model=LlamaConfig(kv_heads=5)), "kv_heads"),
    ],
)
def test_contradictions(config, message):
    with pytest.raises(InputError, match=message):
        validate(config)


@pytest.mark.parametrize(
    "change",
    [{"encoder_patch_size": 15}, {"num_groups": 7}, {"num_tokens": 2048}, {"queries_per_step": 300}, {"head_size": 50},
     {"sampling_resolution": 300}],
)  # fmt: skip
def test_sizes_that_do_not_fit(change):
    with pytest.raises(InputError, match="tokenizer: "):
        validate(TokenizerTraining(model=dataclasses.replace(TokenizerConfig(), **change)))
