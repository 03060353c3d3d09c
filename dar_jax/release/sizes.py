"""The sizes of the networks in the release's files: from its own configuration, and from the shapes of the tensors."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dar_jax.config import TRANSFORMER_SIZES, TokenizerConfig, TransformerConfig, VelocityConfig
from dar_jax.errors import InputError

HEAD_SIZE = 64  # of every network of the release but its text models


# By names in the release's configuration: the fields of `TokenizerConfig` and `VelocityConfig`, and the release's defaults.
TOKENIZER_FIELDS: dict[str, tuple] = {
    "encoder_patch_size": ("encoder_patch_size",),
    "num_encoder_layers": ("encoder_layers",),
    "num_decoder_layers": ("decoder_layers",),
    "query_low_rank": ("query_low_rank", True),
    "encoder_dim": ("encoder_width",),
    "decoder_dim": ("decoder_width",),
    "vq_dim": ("code_dim",),
    "vq_codebook_size": ("codebook_size",),
    "num_denoising_steps": ("num_denoising_steps",),
    "num_query_groups": ("num_groups",),
    "num_all_queries": ("num_tokens",),
    "queries_per_step": ("queries_per_step", None),
    "vq_enable": ("vq_enable", True),
    "sampling_resolution": ("sampling_resolution", 256),
    "output_resolution": ("output_resolution", 0),
    "rope_base_len": ("rope_theta", 10000.0),
}
VELOCITY_FIELDS: dict[str, tuple] = {
    "dim": ("width",),
    "patch_size": ("patch_size",),
    "depth": ("layers",),
    "data_std": ("data_std", 1.0),
    "time_shift": ("time_shift", 1.0),
    "mlp_head": ("mlp_head", False),
    "share_time_encoding": ("share_time_encoding", False),
    "repa_layer": ("repa_layer", 8),
}


def tokenizer_config(release: Mapping[str, Any], image_size: int) -> TokenizerConfig:
    """The sizes of a tokenizer from the release's own configuration (its YAML or a checkpoint's `config`).

    Args: release, a mapping with keys such as `encoder_patch_size` and `diff_decoder`; image_size, which it does not name.
    Raises: InputError where a key is missing or the sizes are none.
    """
    try:
        core = release["diff_decoder"]
        if not isinstance(core, Mapping):
            raise InputError("the release's configuration has no sizes in 'diff_decoder'")
        fields, velocity = (
            {field: table.get(name, *default) if default else table[name] for name, (field, *default) in names.items()}
            for table, names in ((release, TOKENIZER_FIELDS), (core, VELOCITY_FIELDS))
        )
        if type(fields["output_resolution"]) is int and fields["output_resolution"] == 0:
            fields["output_resolution"] = None
        return TokenizerConfig(image_size=image_size, channels=core["in_dim"], velocity=VelocityConfig(**velocity), **fields)
    except KeyError as error:
        raise InputError(f"the release's configuration has no {error}") from None


def release_config(config: TokenizerConfig) -> dict[str, Any]:
    """The inverse of `tokenizer_config`: the release's configuration of a tokenizer."""
    core = {name: getattr(config.velocity, field) for name, (field, *_) in VELOCITY_FIELDS.items()}
    core |= {"in_dim": config.channels, "out_dim": config.channels, "cond_dim": config.decoder_width}
    core["repa_layer"] = 8 if core["repa_layer"] is None else core["repa_layer"]
    return {name: getattr(config, field) for name, (field, *_) in TOKENIZER_FIELDS.items()} | {
        "queries_per_step": config.tokens_per_step,
        "sampling_resolution": config.resolution,
        "output_resolution": config.output_resolution or 0,
        "diff_decoder": core,
    }


def beyond_release(config: TokenizerConfig) -> list[str]:
    """Sizes of a tokenizer that the release's code has as constants, where they differ: it cannot build such a model."""
    velocity = config.velocity
    constants = {
        "channels": (config.channels, 3),
        "head size": (config.head_size, HEAD_SIZE),
        "head size of the velocity network": (velocity.head_size, HEAD_SIZE),
        "rows of the tables of positions": (config.max_tokens, 1024),
    }
    if config.query_low_rank:
        constants["rank of the queries"] = (config.query_rank, 8)
    if velocity.repa_layer is not None:
        constants |= {"REPA hidden size": (velocity.repa_hidden, 2048), "REPA features": (velocity.repa_width, 768)}
    return [f"{name} {size} (there {constant})" for name, (size, constant) in constants.items() if size != constant]


def tokenizer_shapes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The sizes of a tokenizer that the shapes of the release's tensors show, in the form of `release_config`.

    Raises InputError where the shapes are not those of such a tokenizer.
    """
    patchify, codes = shape_of(tensors, "patchify.weight", 4), shape_of(tensors, "quant_in_conv.weight")
    patches = shape_of(tensors, "diff_decoder.net.conv_in.weight")
    core = {
        "in_dim": patchify[1],
        "out_dim": patchify[1],
        "dim": patches[0],
        "cond_dim": shape_of(tensors, "diff_decoder.net.cond_mlp.weight")[1],
        "patch_size": math.isqrt(patches[1] // patchify[1]),
        "depth": _layers(tensors, r"diff_decoder\.net\.blocks\.(\d+)\."),
        "mlp_head": "diff_decoder.net.linear_out.linear.weight" in tensors,
        "share_time_encoding": "diff_decoder.net.time_embed.mlp.0.weight" in tensors,
    }
    sizes = {
        "encoder_patch_size": patchify[2],
        "num_encoder_layers": _layers(tensors, r"encoder_layers\.(\d+)\."),
        "num_decoder_layers": _layers(tensors, r"decoder_layers\.(\d+)\."),
        "query_low_rank": "query_linear.weight" in tensors,
        "encoder_dim": patchify[0],
        "decoder_dim": shape_of(tensors, "quant_out_conv.weight")[0],
        "vq_dim": codes[0],
        "vq_enable": "quantize.embedding.weight" in tensors,
        "diff_decoder": core,
    }
    if sizes["vq_enable"]:
        sizes["vq_codebook_size"] = shape_of(tensors, "quantize.embedding.weight")[0]
    return sizes


def transformer_config(tensors: Mapping[str, np.ndarray], num_tokens: int, heads: int | None = None) -> TransformerConfig:
    """The sizes of an autoregressive transformer from the shapes of the release's tensors.

    Args:
      num_tokens: tokens of an image, which leave no trace in the weights.
      heads: of the attention; None: those of the known sizes, else heads of 64, which the image models of any size have.

    Raises: InputError where the shapes are not those of such a transformer.
    """
    (classes, width), (vocabulary, _) = (
        shape_of(tensors, name, 2) for name in ("cls_embedding.embedding_table.weight", "tok_embeddings.weight")
    )
    layers = _layers(tensors, r"layers\.(\d+)\.")
    fused = shape_of(tensors, "layers.0.attention.wqkv.weight", 2)[0]
    known = [size["heads"] for size in TRANSFORMER_SIZES.values() if (size["layers"], size["width"]) == (layers, width)]
    if heads is None:
        heads = known[0] if known else width // HEAD_SIZE
    if heads < 1 or width % heads:
        raise InputError(f"the width {width} is not that of {heads} heads; pass the right number of heads")
    kv_heads, remainder = divmod(fused - width, 2 * width // heads)
    if remainder or kv_heads < 1:
        raise InputError(f"{fused} rows of queries, keys and values do not fit {heads} heads of {width // heads}")
    config = TransformerConfig(
        layers=layers,
        heads=heads,
        kv_heads=None if kv_heads == heads else kv_heads,
        width=width,
        num_tokens=num_tokens,
        vocab_size=vocabulary,
        num_classes=classes - 1,
    )
    hidden = shape_of(tensors, "layers.0.feed_forward.w1.weight", 2)[0]
    return config if config.mlp_width == hidden else dataclasses.replace(config, mlp_multiple=hidden)


def shape_of(tensors: Mapping[str, np.ndarray], name: str, rank: int | None = None) -> tuple[int, ...]:
    """The shape of a tensor. Raises InputError where it is missing, or is none of `rank` axes (None: two or more)."""
    if name not in tensors:
        raise InputError(f"the tensor {name} is missing")
    shape = tensors[name].shape
    if len(shape) != (rank or len(shape)) or 0 in shape or len(shape) < 2:
        raise InputError(f"{name} has the shape {shape}, which is no matrix of this network")
    return shape


def _layers(tensors: Mapping[str, np.ndarray], pattern: str) -> int:
    """The number of layers: that of different numbers in the names, however large these are."""
    numbers = {match[1] for name in tensors if (match := re.match(pattern, name))}
    for number in map(str, range(len(numbers))):
        if number not in numbers:
            raise InputError(f"layer {number} is missing, where {len(numbers)} layers have names")
    return len(numbers)
