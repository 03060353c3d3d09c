"""One table of names for each frozen feature network, read in both directions like those in `release.names`.

The tables have the names of the PyTorch files that most projects use. `canonical_lpips` and `canonical_inception` rename the
tensors of files that have other names for them.
"""

import re
from collections.abc import Mapping

import numpy as np

from dar_jax.errors import InputError
from dar_jax.features.dinov2 import Dinov2Config
from dar_jax.features.inception import BLOCKS, convolution_names
from dar_jax.features.vgg_lpips import STAGES
from dar_jax.weights.table import CONVOLUTION, FUSED_HEADS, SAME, Entry, Layout, linear, matrix, norm, prefixed

Tensors = Mapping[str, np.ndarray]

# Tensors of the files that the networks do not need, as regular expressions of whole names.
LPIPS_UNUSED = r"classifier\..*|scaling_layer\.(shift|scale)"  # of VGG16, and constants
DINOV2_UNUSED = r"mask_token"  # stands for hidden patches in training
INCEPTION_UNUSED = r"fc\.bias|.*\.num_batches_tracked"  # the inception score is computed without the bias


# One axis of size 1 before ours there.
LEADING = Layout(lambda tensors, shape: tensors[0].reshape(shape), lambda array: [array[None]])
# All query heads, then all keys, then all values there; grouped by head here: [N, 3, K].
FUSED_BIAS = Layout(
    lambda tensors, shape: tensors[0].reshape(shape[1], shape[0], shape[2]).swapaxes(0, 1),
    lambda array: [array.swapaxes(0, 1).reshape(-1)],
)


# --- LPIPS ---------------------------------------------------------------------------------------------------------------


def _vgg_layers() -> list[tuple[int, int, int]]:
    """(stage, convolution within it, both from 1, and layer in torchvision's VGG16) of the 13 convolutions."""
    layers, layer = [], 0
    for stage, (count, _) in enumerate(STAGES, 1):
        layers += [(stage, index, layer + 2 * (index - 1)) for index in range(1, count + 1)]  # a ReLU follows each
        layer += 2 * count + 1  # and a pool follows the stage
    return layers


def lpips_entries() -> list[Entry]:
    """The table for `Lpips`, in the names of the PyTorch package: `net.slice1.0.weight`, `lin0.model.1.weight`."""
    table = []
    for stage, index, layer in _vgg_layers():
        theirs, ours = f"net.slice{stage}.{layer}", f"vgg/conv{stage}_{index}"
        table += [(f"{theirs}.weight", f"{ours}/kernel", CONVOLUTION), (f"{theirs}.bias", f"{ours}/bias", SAME)]
    table += [(f"lin{i}.model.1.weight", f"head{i + 1}", matrix(ones=2)) for i in range(len(STAGES))]
    return prefixed("", "", table)


def canonical_lpips(tensors: Tensors) -> dict[str, np.ndarray]:
    """LPIPS tensors in the names of `lpips_entries`, whatever the file they come from.

    Known are these names themselves; torchvision's VGG16 (`features.0.weight`), to which the heads of another file were added;
    and the Linen names of the JAX port (`VGG16_0.Conv_0.kernel`, `NetLinLayer_0.Conv_0.kernel`, kernels [rows, columns, in,
    out]). Names that are none of these stay as they are.
    """
    names = {f"NetLinLayer_{i}.Conv_0.kernel": f"lin{i}.model.1.weight" for i in range(len(STAGES))}
    for number, (stage, _, layer) in enumerate(_vgg_layers()):
        for leaf, linen_leaf in (("weight", "kernel"), ("bias", "bias")):
            name = f"net.slice{stage}.{layer}.{leaf}"
            names |= {f"features.{layer}.{leaf}": name, f"VGG16_0.Conv_{number}.{linen_leaf}": name}
    canonical = {}
    for name, tensor in tensors.items():
        if name in names and name.endswith(".kernel"):
            if tensor.ndim != 4:
                raise InputError(f"{name} has the shape {tensor.shape}, a convolution takes four axes")
            tensor = tensor.transpose(3, 2, 0, 1)
        canonical[names.get(name, name)] = tensor
    return canonical


# --- DINOv2 --------------------------------------------------------------------------------------------------------------


def dinov2_entries(config: Dinov2Config) -> list[Entry]:
    """The table for `Dinov2` of these sizes, in the names of its release: `blocks.0.attn.qkv.weight`."""
    table = [
        ("cls_token", "class_token", LEADING),
        ("pos_embed", "position_table", LEADING),
        ("patch_embed.proj.weight", "patchify/kernel", CONVOLUTION),
        ("patch_embed.proj.bias", "patchify/bias", SAME),
        *norm("norm", "norm"),
    ]
    block = [
        *norm("norm1", "norm1"),
        ("attn.qkv.weight", "attention/qkv/kernel", FUSED_HEADS),
        ("attn.qkv.bias", "attention/qkv/bias", FUSED_BIAS),
        *linear("attn.proj", "attention/out", inputs=2),
        ("ls1.gamma", "gate1", SAME),
        *norm("norm2", "norm2"),
        *linear("mlp.fc1", "mlp/in"),
        *linear("mlp.fc2", "mlp/out"),
        ("ls2.gamma", "gate2", SAME),
    ]
    return prefixed("", "", table) + prefixed("blocks.{i}.", "blocks/", block, config.layers)


# --- Inception -----------------------------------------------------------------------------------------------------------


def inception_entries(classifier: bool) -> list[Entry]:
    """The table for `Inception`, in the names of pytorch-fid and torch-fidelity: `Mixed_5b.branch1x1.conv.weight`."""
    table = []
    for ours in convolution_names():
        theirs = ours.replace("/", ".")
        table += [
            (f"{theirs}.conv.weight", f"{ours}/kernel", CONVOLUTION),
            *norm(f"{theirs}.bn", ours),
            (f"{theirs}.bn.running_mean", f"{ours}/mean", SAME),
            (f"{theirs}.bn.running_var", f"{ours}/var", SAME),
        ]
    return prefixed("", "", table + (linear("fc", "fc", bias=False) if classifier else []))


def _tensorflow_names() -> dict[str, str]:
    """The names of convolutions in TensorFlow's graph, and those of `inception_entries`."""

    def numbered(name: str, index: int) -> str:
        return name if index == 0 else f"{name}_{index}"

    names, blocks = {}, list(BLOCKS)
    towers: dict[str, list[str]] = {block: [] for block in blocks}  # branches that are not a single convolution
    for path in convolution_names():
        block, _, name = path.rpartition("/")
        branch, index, half = re.fullmatch(r"(\w+?)(?:_(\d)([ab]?))?", name).groups()
        if not block:
            theirs = numbered("conv", len(names))
        elif index is None and branch != "branch_pool":
            theirs = f"{numbered('mixed', blocks.index(block))}.conv"
        else:
            if branch not in towers[block]:
                towers[block].append(branch)
            tower = numbered("tower", towers[block].index(branch))
            convolution = numbered("mixed_conv", "ab".index(half)) if half else numbered("conv", int(index or 1) - 1)
            join = "_" if block in ("Mixed_7b", "Mixed_7c") else "."
            theirs = f"{numbered('mixed', blocks.index(block))}.{tower}{join}{convolution}"
        names[theirs] = path.replace("/", ".")
    return names


_TENSORFLOW_LEAVES = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}


def canonical_inception(tensors: Tensors) -> dict[str, np.ndarray]:
    """Inception tensors in the names of `inception_entries`, whatever the file they come from.

    Known are these names themselves, and those of TensorFlow's graph as a TorchScript archive has them
    (`net.layers.mixed_10.tower_2_conv.weight`, also `beta`, `mean` and `var`). Batch norms have no scale there; it is one here.
    Names that are none of these stay as they are.
    """
    names, canonical = _tensorflow_names(), {}
    for name, tensor in tensors.items():
        convolution, _, leaf = name.removeprefix("net.layers.").rpartition(".")
        if convolution in names and leaf in _TENSORFLOW_LEAVES:
            name = f"{names[convolution]}.{_TENSORFLOW_LEAVES[leaf]}"
            if leaf == "beta":
                canonical[f"{names[convolution]}.bn.weight"] = np.ones_like(tensor)
        canonical[name] = tensor
    return canonical
