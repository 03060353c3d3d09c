"""One table of names: the PyTorch release's tensors and our parameters, read in both directions.

An entry says which tensor(s) of the release make one parameter of ours and how they are laid out there. `{i}` in their
names counts layers; ours are stacked along a leading axis.
"""

from dar_jax.config import TokenizerConfig, TransformerConfig
from dar_jax.weights.table import CONVOLUTION, FLAT, FUSED_HEADS, PAIR, SAME, Entry, linear, matrix, norm, prefixed


def _attention(theirs: str, ours: str) -> list[tuple]:
    table = []
    for name in "qkv":
        table += [
            (f"{theirs}.{name}.weight", f"{ours}/{name}/kernel", matrix()),
            (f"{theirs}.{name}.bias", f"{ours}/{name}/bias", FLAT),
        ]
    table += [
        (f"{theirs}.proj.weight", f"{ours}/out/kernel", matrix(inputs=2)),
        (f"{theirs}.proj.bias", f"{ours}/out/bias", SAME),
    ]
    return table + norm(f"{theirs}.q_norm", f"{ours}/q_norm") + norm(f"{theirs}.k_norm", f"{ours}/k_norm")


_MLP = linear("mlp.fc1", "mlp/in") + linear("mlp.fc2", "mlp/out")
_BLOCK = (
    [("gate1", "gate1", SAME), ("gate2", "gate2", SAME)]
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
        ("patchify.weight", "encoder/patchify/kernel", CONVOLUTION),
        ("patchify.bias", "encoder/patchify/bias", SAME),
        ("query_embedding.weight", "encoder/query_table", SAME),
        *linear("quant_in_conv", "encoder/to_code", ones=2, bias=False),
        *linear("quant_out_conv", "token_decoder/from_code", ones=2, bias=False),
        ("decoder_embedding.weight", "token_decoder/position_table", SAME),
    ]
    if config.query_low_rank:
        table += linear("query_linear", "encoder/query_linear")
    if config.vq_enable:
        table += [("quantize.embedding.weight", "quantizer/codebook", SAME)]
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


def transformer_entries(config: TransformerConfig) -> list[Entry]:
    """The table for an autoregressive transformer of these sizes."""
    block = [
        ("attention.wqkv.weight", "attention/qkv/kernel", FUSED_HEADS),
        ("attention.wo.weight", "attention/out/kernel", matrix(inputs=2)),
        (("feed_forward.w1.weight", "feed_forward.w3.weight"), "mlp/gate_up/kernel", PAIR),
        ("feed_forward.w2.weight", "mlp/down/kernel", matrix()),
        ("attention_norm.weight", "attention_norm/scale", SAME),
        ("ffn_norm.weight", "mlp_norm/scale", SAME),
    ]
    table = [
        ("cls_embedding.embedding_table.weight", "class_table", SAME),
        ("tok_embeddings.weight", "token_table", SAME),
        ("norm.weight", "norm/scale", SAME),
        ("output.weight", "output", matrix()),
    ]
    return prefixed("", "", table) + prefixed("layers.{i}.", "blocks/", block, config.layers)
