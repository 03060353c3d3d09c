"""Sizes of the release's networks: by its configuration, by shapes, and back."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_cases import Case

from dar_jax.config import TRANSFORMER_SIZES, TokenizerConfig, TransformerConfig
from dar_jax.errors import InputError
from dar_jax.release.sizes import release_config, tokenizer_config, tokenizer_shapes, transformer_config

STRUCTURE = {"encoder_patch_size", "num_encoder_layers", "num_decoder_layers", "query_low_rank", "encoder_dim", "decoder_dim",
             "vq_dim", "vq_enable"}  # fmt: skip
CORE = {"in_dim", "out_dim", "dim", "cond_dim", "patch_size", "depth", "mlp_head", "share_time_encoding"}


def tensors_of(case):
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in case.info["parameters"].items()}


@pytest.mark.parametrize("name", ["tokenizer_tiny", "tokenizer_continuous", "tokenizer_full_rank_query_shared_time"])
def test_shapes_say_what_the_configuration_says(pytestconfig, name):
    case = Case.load(pytestconfig.rootpath / "tests" / "golden", name)
    config = tokenizer_config(case.info["config"], case.info["image_size"])
    told, seen = release_config(config), tokenizer_shapes(tensors_of(case))
    assert {key: seen[key] for key in STRUCTURE} == {key: told[key] for key in STRUCTURE}
    assert {key: seen["diff_decoder"][key] for key in CORE} == {key: told["diff_decoder"][key] for key in CORE}
    if config.vq_enable:
        assert seen["vq_codebook_size"] == told["vq_codebook_size"]
    written = dataclasses.replace(config, queries_per_step=config.tokens_per_step, sampling_resolution=config.resolution)
    assert tokenizer_config(told, config.image_size) == written


def test_the_paper_is_the_default():
    config = tokenizer_config(release_config(TokenizerConfig()), 256)
    assert config == dataclasses.replace(TokenizerConfig(), queries_per_step=32, sampling_resolution=256)


def test_a_configuration_that_lacks_something_is_refused():
    config = release_config(TokenizerConfig())
    del config["num_query_groups"]
    with pytest.raises(InputError, match="num_query_groups"):
        tokenizer_config(config, 64)


def llama_tensors(layers, width, rows, vocabulary=64, classes=10):
    shapes = {"cls_embedding.embedding_table.weight": (classes + 1, width), "tok_embeddings.weight": (vocabulary, width)}
    shapes |= {f"layers.{layer}.attention.wqkv.weight": (rows, width) for layer in range(layers)}
    shapes |= {"layers.0.feed_forward.w1.weight": (TransformerConfig(width=width).mlp_width, width)}
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def test_llama_sizes():
    for size in TRANSFORMER_SIZES.values():  # also those whose heads are not 64 wide
        found = transformer_config(llama_tensors(size["layers"], size["width"], 3 * size["width"]), 256)
        assert found == TransformerConfig(**size, num_tokens=256, vocab_size=64, num_classes=10)
    grouped = transformer_config(llama_tensors(2, 256, 256 + 2 * 128), 16)
    assert (grouped.heads, grouped.kv_heads) == (4, 2)
    assert transformer_config(llama_tensors(2, 256, 3 * 256), 16, heads=8).heads == 8
    with pytest.raises(InputError, match="do not fit 4 heads of 64"):
        transformer_config(llama_tensors(2, 256, 256 + 2 * 100), 16)
    with pytest.raises(InputError, match="layer 0 is missing"):
        transformer_config({name: x for name, x in llama_tensors(2, 256, 768).items() if "layers.0" not in name}, 16)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.integers(-3, 10**30).map(str), st.text("0123456789\u0663\u00b2-", max_size=5), st.just("9" * 5000)))
)
def test_there_are_no_more_layers_than_tensors(numbers):
    """Numbers of layers in names, of whatever size and script, are refused unless they count from 0."""
    tensors = llama_tensors(2, 256, 768)
    tensors |= {f"layers.{number}.attention.wo.weight": tensors["layers.0.attention.wqkv.weight"] for number in numbers}
    try:
        assert transformer_config(tensors, 16).layers <= len(tensors)
    except InputError as error:
        assert "is missing, where" in str(error)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_tensors_of_any_shape_give_sizes_or_a_line(data):
    tensors = tensors_of(Case.load(Path(__file__).parent / "golden", "tokenizer_tiny"))
    for name in data.draw(st.lists(st.sampled_from(sorted(name for name in tensors if ".0." not in name)), max_size=3)):
        if data.draw(st.booleans()):
            tensors.pop(name, None)
        else:
            tensors[name] = np.zeros(data.draw(st.lists(st.integers(0, 3), max_size=4)), np.float32)
    with contextlib.suppress(InputError):
        seen = tokenizer_shapes(tensors)
        assert seen["num_encoder_layers"] <= len(tensors)
