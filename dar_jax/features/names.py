"""One table of names for each frozen feature network, read in both directions like those in `names`.

The tables are in the names of the PyTorch files that most projects use. Files that call the same tensors otherwise are first
brought to these names by `canonical_lpips` and `canonical_inception`.
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

# Tensors that the files hold and the networks have no use for, as regular expressions of whole names.
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
    """Stage, convolution within it (both from 1), and layer in torchvision's VGG16, for the 13 convolutions."""
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
    layers = _vgg_layers()
    stages = {layer: stage for stage, _, layer in layers}

    def renamed(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
        if (match := re.fullmatch(r"features\.(\d{1,3})\.(weight|bias)", name)) and int(match[1]) in stages:
            return f"net.slice{stages[int(match[1])]}.{match[1]}.{match[2]}", tensor
        if (match := re.fullmatch(r"VGG16_0\.Conv_(\d{1,3})\.(kernel|bias)", name)) and int(match[1]) < len(layers):
            stage, _, layer = layers[int(match[1])]
            prefix = f"net.slice{stage}.{layer}"
            return (f"{prefix}.weight", _kernel(name, tensor)) if match[2] == "kernel" else (f"{prefix}.bias", tensor)
        if match := re.fullmatch(r"NetLinLayer_(\d+)\.Conv_0\.kernel", name):
            return f"lin{match[1]}.model.1.weight", _kernel(name, tensor)
        return name, tensor

    return dict(renamed(*item) for item in tensors.items())


def _kernel(name: str, tensor: np.ndarray) -> np.ndarray:
    if tensor.ndim != 4:
        raise InputError(f"{name} has the shape {tensor.shape}, a convolution takes four axes")
    return tensor.transpose(3, 2, 0, 1)


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
        ("attn.proj.weight", "attention/out/kernel", matrix(inputs=2)),
        ("attn.proj.bias", "attention/out/bias", SAME),
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
    """What the graph of TensorFlow calls each convolution, and what `inception_entries` does."""

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
