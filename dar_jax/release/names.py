"""One table of names: the PyTorch release's tensors and our parameters, read in both directions.

An entry says which tensor(s) of the release make one parameter of ours and how they are laid out there. `{i}` in their
names counts layers; ours are stacked along a leading axis.
"""

import dataclasses
from typing import Protocol

import numpy as np

from dar_jax.config import LlamaConfig, TokenizerConfig


class Layout(Protocol):
    """How one parameter is stored by the release. `shape` is ours, without the axis of layers."""

    def to_ours(self, tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray: ...

    def to_theirs(self, array: np.ndarray) -> list[np.ndarray]: ...


class Same:
    """The same axes."""

    def to_ours(self, tensors, shape):
        return tensors[0]

    def to_theirs(self, array):
        return [array]


class Flat:
    """One axis there, one or several here (biases of heads)."""

    def to_ours(self, tensors, shape):
        return tensors[0].reshape(shape)

    def to_theirs(self, array):
        return [array.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """[out, in] there, [in..., out...] here; `inputs` is how many of our axes are inputs, `ones` how many axes of size 1
    theirs has at the end (1x1 convolutions)."""

    inputs: int = 1
    ones: int = 0

    def to_ours(self, tensors, shape):
        return tensors[0].reshape(tensors[0].shape[:2]).T.reshape(shape)

    def to_theirs(self, array):
        matrix = array.reshape(int(np.prod(array.shape[: self.inputs])), -1).T
        return [matrix.reshape(matrix.shape + (1,) * self.ones)]


class Convolution:
    """[out, in, rows, columns] there, [rows, columns, in, out] here."""

    def to_ours(self, tensors, shape):
        return tensors[0].transpose(2, 3, 1, 0)

    def to_theirs(self, array):
        return [array.transpose(3, 2, 0, 1)]


class FusedHeads:
    """All query heads, then all keys, then all values there; grouped by key/value head here: [D, M, R + 2, K]."""

    def to_ours(self, tensors, shape):
        width, kv_heads, rows, size = shape
        q, k, v = np.split(tensors[0].T, [(rows - 2) * kv_heads * size, (rows - 1) * kv_heads * size], axis=1)
        parts = [q.reshape(width, kv_heads, rows - 2, size), *(x.reshape(width, kv_heads, 1, size) for x in (k, v))]
        return np.concatenate(parts, axis=2)

    def to_theirs(self, array):
        parts = [array[:, :, :-2], array[:, :, -2], array[:, :, -1]]
        return [np.concatenate([x.reshape(len(array), -1) for x in parts], axis=1).T]


class Pair:
    """Two matrices [out, in] there, one [in, 2, out] here."""

    def to_ours(self, tensors, shape):
        return np.stack([x.T for x in tensors], axis=1)

    def to_theirs(self, array):
        return [array[:, 0].T, array[:, 1].T]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Their name(s), the path of our parameter, and the layout. `layers` counts the copies that `{i}` runs over."""

    theirs: tuple[str, ...]
    ours: str
    layout: Layout
    layers: int | None = None


def prefixed(theirs: str, ours: str, table: list[tuple], layers: int | None = None) -> list[Entry]:
    """Entries from rows (their name or names, our path, layout), with what stands before the names on each side."""

    def names(name):
        return tuple(theirs + n for n in ((name,) if isinstance(name, str) else name))

    return [Entry(names(name), ours + path, layout, layers) for name, path, layout in table]


def linear(theirs: str, ours: str, ones: int = 0, bias: bool = True) -> list[tuple]:
    """The rows of a linear, which is a 1x1 convolution there if `ones` is 2."""
    weight = [(f"{theirs}.weight", f"{ours}/kernel", Matrix(ones=ones))]
    return weight + ([(f"{theirs}.bias", f"{ours}/bias", Flat())] if bias else [])


def norm(theirs: str, ours: str) -> list[tuple]:
    """The rows of an affine norm."""
    return [(f"{theirs}.weight", f"{ours}/scale", Same()), (f"{theirs}.bias", f"{ours}/bias", Same())]


def _attention(theirs: str, ours: str) -> list[tuple]:
    table = []
    for name in "qkv":
        table += [
            (f"{theirs}.{name}.weight", f"{ours}/{name}/kernel", Matrix()),
            (f"{theirs}.{name}.bias", f"{ours}/{name}/bias", Flat()),
        ]
    table += [
        (f"{theirs}.proj.weight", f"{ours}/out/kernel", Matrix(inputs=2)),
        (f"{theirs}.proj.bias", f"{ours}/out/bias", Same()),
    ]
    return table + norm(f"{theirs}.q_norm", f"{ours}/q_norm") + norm(f"{theirs}.k_norm", f"{ours}/k_norm")


_MLP = linear("mlp.fc1", "mlp/in") + linear("mlp.fc2", "mlp/out")
_BLOCK = (
    [("gate1", "gate1", Same()), ("gate2", "gate2", Same())]
    + _attention("attention", "attention")
    + _MLP
    + norm("norm1", "norm1")
    + norm("norm2", "norm2")
)
_TIME = linear("time_embed.mlp.0", "time_embedding/in") + linear("time_embed.mlp.2", "time_embedding/out")
_VELOCITY_BLOCK = (
    _attention("attention", "attention")
    + _attention("cross_attn", "cross_attention")
    + _MLP
    + linear("adaLN_modulation.1", "modulation")
    + linear("cond_embed.0", "condition_embedding/in")
    + linear("cond_embed.2", "condition_embedding/out")
)


def tokenizer_entries(config: TokenizerConfig) -> list[Entry]:
    """The table for a tokenizer of these sizes and options."""
    velocity = config.velocity
    table = [
        ("patchify.weight", "encoder/patchify/kernel", Convolution()),
        ("patchify.bias", "encoder/patchify/bias", Same()),
        ("query_embedding.weight", "encoder/query_table", Same()),
        *linear("quant_in_conv", "encoder/to_code", ones=2, bias=False),
        *linear("quant_out_conv", "token_decoder/from_code", ones=2, bias=False),
        ("decoder_embedding.weight", "token_decoder/position_table", Same()),
    ]
    if config.query_low_rank:
        table += linear("query_linear", "encoder/query_linear")
    if config.vq_enable:
        table += [("quantize.embedding.weight", "quantizer/codebook", Same())]
    entries = prefixed("", "", table)
    entries += prefixed("encoder_layers.{i}.", "encoder/blocks/", _BLOCK, config.encoder_layers)
    entries += prefixed("decoder_layers.{i}.", "token_decoder/blocks/", _BLOCK, config.decoder_layers)

    net = [*linear("cond_mlp", "condition_in"), *linear("conv_in", "patch_in", ones=2)]
    if velocity.mlp_head:
        net += linear("linear_out.linear", "patch_out")
        net += linear("linear_out.adaLN_modulation.1", "head_modulation")
    else:
        net += linear("conv_out", "patch_out", ones=2)
    if velocity.share_time_encoding:
        net += _TIME
    if velocity.repa_layer is not None:
        for index in range(3):
            net += linear(f"repa_out.{2 * index}", f"repa/linear{index}")
    entries += prefixed("diff_decoder.net.", "velocity/", net)
    block = _VELOCITY_BLOCK + ([] if velocity.share_time_encoding else _TIME)
    return entries + prefixed("diff_decoder.net.blocks.{i}.", "velocity/blocks/", block, velocity.layers)


def llama_entries(config: LlamaConfig) -> list[Entry]:
    """The table for an autoregressive transformer of these sizes."""
    block = [
        ("attention.wqkv.weight", "attention/qkv/kernel", FusedHeads()),
        ("attention.wo.weight", "attention/out/kernel", Matrix(inputs=2)),
        (("feed_forward.w1.weight", "feed_forward.w3.weight"), "mlp/gate_up/kernel", Pair()),
        ("feed_forward.w2.weight", "mlp/down/kernel", Matrix()),
        ("attention_norm.weight", "attention_norm/scale", Same()),
        ("ffn_norm.weight", "mlp_norm/scale", Same()),
    ]
    table = [
        ("cls_embedding.embedding_table.weight", "class_table", Same()),
        ("tok_embeddings.weight", "token_table", Same()),
        ("norm.weight", "norm/scale", Same()),
        ("output.weight", "output", Matrix()),
    ]
    return prefixed("", "", table) + prefixed("layers.{i}.", "blocks/", block, config.layers)
