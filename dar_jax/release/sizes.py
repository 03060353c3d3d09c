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


def tokenizer_config(release: Mapping[str, Any], image_size: int) -> TokenizerConfig:
    """The sizes of a tokenizer from the release's own configuration (its YAML or a checkpoint's `config`).

    Args: release, a mapping with keys such as `encoder_patch_size` and `diff_decoder`; image_size, which it does not name.
    Raises: InputError where a key is missing or the sizes are none.
    """
    try:
        core, output = release["diff_decoder"], release.get("output_resolution", 0)
        if not isinstance(core, Mapping):
            raise InputError("the release's configuration has no sizes in 'diff_decoder'")
        velocity = VelocityConfig(
            width=core["dim"],
            layers=core["depth"],
            patch_size=core["patch_size"],
            data_std=core.get("data_std", 1.0),
            time_shift=core.get("time_shift", 1.0),
            share_time_encoding=core.get("share_time_encoding", False),
            mlp_head=core.get("mlp_head", False),
            repa_layer=core.get("repa_layer", 8),
        )
        return TokenizerConfig(
            image_size=image_size,
            channels=core["in_dim"],
            encoder_patch_size=release["encoder_patch_size"],
            encoder_layers=release["num_encoder_layers"],
            encoder_width=release["encoder_dim"],
            decoder_layers=release["num_decoder_layers"],
            decoder_width=release["decoder_dim"],
            num_tokens=release["num_all_queries"],
            num_groups=release["num_query_groups"],
            queries_per_step=release.get("queries_per_step"),
            num_denoising_steps=release["num_denoising_steps"],
            query_low_rank=release.get("query_low_rank", True),
            vq_enable=release.get("vq_enable", True),
            codebook_size=release["vq_codebook_size"],
            code_dim=release["vq_dim"],
            sampling_resolution=release.get("sampling_resolution", 256),
            output_resolution=None if type(output) is int and output == 0 else output,
            rope_theta=release.get("rope_base_len", 10000.0),
            velocity=velocity,
        )
    except KeyError as error:
        raise InputError(f"the release's configuration has no {error}") from None


def release_config(config: TokenizerConfig) -> dict[str, Any]:
    """The inverse of `tokenizer_config`: what the release wants to be told of a tokenizer."""
    velocity = config.velocity
    return {
        "encoder_patch_size": config.encoder_patch_size,
        "num_encoder_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "query_low_rank": config.query_low_rank,
        "encoder_dim": config.encoder_width,
        "decoder_dim": config.decoder_width,
        "vq_dim": config.code_dim,
        "vq_codebook_size": config.codebook_size,
        "num_denoising_steps": config.num_denoising_steps,
        "num_query_groups": config.num_groups,
        "num_all_queries": config.num_tokens,
        "queries_per_step": config.tokens_per_step,
        "vq_enable": config.vq_enable,
        "sampling_resolution": config.resolution,
        "output_resolution": config.output_resolution or 0,
        "rope_base_len": config.rope_theta,
        "diff_decoder": {
            "in_dim": config.channels,
            "out_dim": config.channels,
            "dim": velocity.width,
            "cond_dim": config.decoder_width,
            "patch_size": velocity.patch_size,
            "depth": velocity.layers,
            "data_std": velocity.data_std,
            "time_shift": velocity.time_shift,
            "mlp_head": velocity.mlp_head,
            "share_time_encoding": velocity.share_time_encoding,
            "repa_layer": 8 if velocity.repa_layer is None else velocity.repa_layer,
        },
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
    """What the shapes of the release's tensors say about a tokenizer, in the form of `release_config`.

    How tokens are grouped, the number of steps and the scale of pixels cannot be seen in them; they are the paper's.
    """
    paper = release_config(TokenizerConfig())
    patchify, codes = shape_of(tensors, "patchify.weight", 4), shape_of(tensors, "quant_in_conv.weight")
    vq_enable = "quantize.embedding.weight" in tensors
    patches = shape_of(tensors, "diff_decoder.net.conv_in.weight")
    core = paper["diff_decoder"] | {
        "in_dim": patchify[1],
        "out_dim": patchify[1],
        "dim": patches[0],
        "cond_dim": shape_of(tensors, "diff_decoder.net.cond_mlp.weight")[1],
        "patch_size": math.isqrt(patches[1] // patchify[1]),
        "depth": _layers(tensors, r"diff_decoder\.net\.blocks\.(\d+)\."),
        "mlp_head": "diff_decoder.net.linear_out.linear.weight" in tensors,
        "share_time_encoding": "diff_decoder.net.time_embed.mlp.0.weight" in tensors,
    }
    return paper | {
        "encoder_patch_size": patchify[2],
        "num_encoder_layers": _layers(tensors, r"encoder_layers\.(\d+)\."),
        "num_decoder_layers": _layers(tensors, r"decoder_layers\.(\d+)\."),
        "query_low_rank": "query_linear.weight" in tensors,
        "encoder_dim": patchify[0],
        "decoder_dim": shape_of(tensors, "quant_out_conv.weight")[0],
        "vq_dim": codes[0],
        "vq_codebook_size": shape_of(tensors, "quantize.embedding.weight")[0] if vq_enable else paper["vq_codebook_size"],
        "vq_enable": vq_enable,
        "diff_decoder": core,
    }


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
    kv_heads, rest = divmod(fused - width, 2 * width // heads)
    if rest or kv_heads < 1:
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
    """How many layers there are: as many as different numbers in the names, however large these are."""
    numbers = {match[1] for name in tensors if (match := re.match(pattern, name))}
    for number in map(str, range(len(numbers))):
        if number not in numbers:
            raise InputError(f"layer {number} is missing, where {len(numbers)} layers have names")
    return len(numbers)
