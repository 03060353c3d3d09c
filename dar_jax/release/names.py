"""One table of names: the PyTorch release's tensors and our parameters, read in both directions.

An entry names the tensor(s) of the release that make one parameter of ours, and their layout. `{i}` in their names counts
layers; ours are stacked along a leading axis.
"""

from dar_jax.config import TokenizerConfig, TransformerConfig
from dar_jax.weights.table import CONVOLUTION, FUSED_HEADS, PAIR, SAME, Entry, linear, matrix, norm, prefixed


def _attention(theirs: str, ours: str) -> list[tuple]:
    heads = [row for name in "qkv" for row in linear(f"{theirs}.{name}", f"{ours}/{name}")]
    out = linear(f"{theirs}.proj", f"{ours}/out", inputs=2)
    return heads + out + norm(f"{theirs}.q_norm", f"{ours}/q_norm") + norm(f"{theirs}.k_norm", f"{ours}/k_norm")


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
        *linear("attention.wo", "attention/out", inputs=2, bias=False),
        (("feed_forward.w1.weight", "feed_forward.w3.weight"), "mlp/gate_up/kernel", PAIR),
        *linear("feed_forward.w2", "mlp/down", bias=False),
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
