"""Settings survive JSON, and what does not fit is refused by name."""

import dataclasses
import json
import math
import typing

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dar_jax.cli.main import COMMANDS
from dar_jax.config import (
    STAGES,
    DataConfig,
    Range,
    TokenizerConfig,
    TokenizerTraining,
    TrainConfig,
    TransformerConfig,
    TransformerTraining,
    from_dict,
    to_dict,
    validate,
)
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment


@pytest.mark.parametrize("config", [TokenizerTraining(name="x"), TransformerTraining(tokenizer="somewhere")])
def test_json_round_trip(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    validate(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "other"}, "stage"),
        ({"spare": 1}, "unknown names: .spare"),
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
        (TokenizerTraining(train=TrainConfig(batch_size=10, accumulate=4)), "accumulate"),
        (TokenizerTraining(train=TrainConfig(steps=TrainConfig())), "train.steps should be int"),
        (TokenizerTraining(model=TransformerConfig()), "model should be a table of settings"),
        (TokenizerTraining(train=TrainConfig(profile=(4, 3))), "train.profile is 4 3"),
        (TokenizerTraining(train=TrainConfig(profile=(4, 9), steps=8)), "train.profile is 4 9"),
        (TokenizerTraining(data=DataConfig(image_size=128)), "128 pixels"),
        (TokenizerTraining(data=DataConfig(channels=2)), "channels"),
        (TokenizerTraining(data=DataConfig(source="codes")), "codes"),
        (TransformerTraining(model=TransformerConfig(heads=3)), "multiple of model.heads"),
        (TransformerTraining(model=TransformerConfig(kv_heads=5)), "kv_heads"),
        (TransformerTraining(model=TransformerConfig(heads=1024)), "the size of a head, is 1"),
        (TokenizerTraining(data=DataConfig(crop_fraction=(0.9, 0.8))), "crop_fraction is 0.9 0.8"),
    ],
)
def test_contradictions(config, message):
    with pytest.raises(InputError, match=message):
        validate(config)


@pytest.mark.parametrize(
    "change",
    [{"encoder_patch_size": 15}, {"num_groups": 7}, {"num_tokens": 2048}, {"queries_per_step": 300}, {"head_size": 50},
     {"sampling_resolution": 300}, {"sampling_resolution": 4096}],
)  # fmt: skip
def test_sizes_that_do_not_fit(change):
    with pytest.raises(InputError, match="tokenizer: "):
        validate(TokenizerTraining(model=dataclasses.replace(TokenizerConfig(), **change)))


def numbers(kind, path=(), limits=None):
    """The path, type and Range (or None) of every number in a type hint."""
    if dataclasses.is_dataclass(kind):
        for name, each in typing.get_type_hints(kind, include_extras=True).items():
            yield from numbers(each, (*path, name))
    elif typing.get_origin(kind) is typing.Annotated:
        inner, *metadata = typing.get_args(kind)
        yield from numbers(inner, path, next((each for each in metadata if isinstance(each, Range)), limits))
    elif kind in (int, float):
        yield path, kind, limits
    elif typing.get_origin(kind) is not typing.Literal:
        for each in typing.get_args(kind):
            yield from numbers(each, path, limits)


NUMBERS = [(stage, *number) for stage, cls in STAGES.items() for number in numbers(cls)]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", [*STAGES.values(), *COMMANDS.values()])
def test_no_number_is_without_a_range(kind):
    assert [".".join(path) for path, _, limits in numbers(kind) if limits is None] == []


def replaced(stage, path, value):
    """The default settings of a stage as JSON, but one."""
    table = values = to_dict(STAGES[stage]())
    for name in path[:-1]:
        table = table[name]
    old = table[path[-1]]
    table[path[-1]] = [value] * len(old) if isinstance(old, tuple) and not isinstance(value, list) else value
    return values


def outside(kind, limits):
    """Values that a number should not have."""
    low, high = limits.low, limits.high
    wrong = [st.sampled_from([math.nan, math.inf, -math.inf, "1", True, [], {}, 10**400, -(10**5000)])]
    wrong += [st.integers(max_value=math.ceil(low) - 1), st.integers(min_value=math.floor(high) + 1)]
    if kind is float:
        wrong += [st.floats(max_value=low, exclude_max=True), st.floats(min_value=high, exclude_min=True)]
    return st.one_of(wrong).filter(lambda value: not limits.also or value != limits.also[0])


@given(st.data(), st.sampled_from(NUMBERS))
@settings(max_examples=200, deadline=None)
def test_numbers_out_of_range_are_refused_by_name(data, number):
    stage, path, kind, limits = number
    value = data.draw(outside(kind, limits))
    assume(path != ("fork",) or value != {})  # a dictionary of numbers
    with pytest.raises(InputError) as refused:
        from_dict(replaced(stage, path, value))
    assert str(refused.value).startswith(".".join(path) + " ") and "\n" not in str(refused.value)


@given(st.data(), st.sampled_from(NUMBERS))
@settings(max_examples=100, deadline=None)
def test_numbers_in_range_are_only_refused_beside_others(data, number):
    stage, path, kind, limits = number
    draw = st.integers if kind is int else st.floats
    value = data.draw(st.sampled_from([limits.low, limits.high]) | draw(limits.low, limits.high))
    try:
        config = from_dict(replaced(stage, path, kind(value)))
    except InputError as error:
        assert "should be between" not in str(error)
    else:
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@given(st.sampled_from(sorted(STAGES)), st.data(), JSON)
@settings(max_examples=100, deadline=None)
def test_json_of_any_form_is_taken_or_refused(stage, data, value):
    table = values = to_dict(STAGES[stage]())
    name = data.draw(st.sampled_from(sorted(table)))
    while isinstance(table[name], dict) and table[name] and data.draw(st.booleans()):
        table = table[name]
        name = data.draw(st.sampled_from(sorted(table)))
    table[name] = value
    for each in (values, value):
        try:
            validate(from_dict(each))
        except InputError as error:
            assert len(str(error)) < 500


def test_nested_without_end():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for name in ("stage", "name", "model"):
        with pytest.raises(InputError):
            from_dict(to_dict(TokenizerTraining()) | {name: nested})


def test_settings_of_a_fork_are_those_of_its_file():
    experiment = Experiment(TokenizerTraining(fork={"rate": 0.5, "name": "a"}))
    assert experiment.with_config(TokenizerTraining(fork={"rate": 1.0})).config.fork == {"rate": 1.0, "name": "a"}
    with pytest.raises(InputError, match="fork.rates is no setting of this experiment, which has rate, name"):
        experiment.with_config(TokenizerTraining(fork={"rates": 1.0}))
    with pytest.raises(InputError, match="fork should be a table"):
        from_dict(to_dict(TokenizerTraining()) | {"fork": {"rate": [1]}})


def test_an_experiment_is_checked_as_it_is_made():
    with pytest.raises(InputError, match="train.seed is 4294967296, it should be between 0 and 4294967295"):
        Experiment(TokenizerTraining(train=TrainConfig(seed=2**32)))
