"""Floating-point operations of a function's matrix products, counted from its traced program, and the peak rates of devices.

The count follows the model by itself: every product in it is counted, in loops once per iteration. Only matrix products and
convolutions count, as is usual for model FLOPs utilisation (MFU), and causal attention counts in full, as it is computed. The
only hand-written kernel that counts is cuDNN's attention, as the same attention without a kernel; the body of a `shard_map`
counts as that of one device.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core

from dar_jax.models.attention import PERMUTATION

# Dense bfloat16 operations/s of one device, by `jax.Device.device_kind`. TPUs: Google Cloud's pages on the versions,
# docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, of which a chip is two devices. NVIDIA: the data sheets of the
# products, nvidia.com/data-center; where they only give the rate with sparsity, half of it.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU7x": 2307e12 / 2,
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312e12),
    "NVIDIA A40": 149.7e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181.05e12,
    "NVIDIA L40S": 362.05e12,
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 1979e12 / 2),
    "NVIDIA H100 NVL": 1671e12 / 2,
    "NVIDIA H100 PCIe": 1513e12 / 2,
    "NVIDIA B200": 4500e12 / 2,
    "NVIDIA GB200": 5000e12 / 2,
}
# By the name of the primitive: the products of attention without a kernel. The scores that the backward pass computes again are
# not among them.
FUSED_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}
REMATERIALIZED = "rematted_computation"  # how `jax.checkpoint` names what it computes again


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution.

    flops: of all its turns together. sizes: rows, columns and summed terms of one product. dtypes: of the two sides.
    precision: "default", "high" or "highest". name: where in the model, as the name stack has it.
    """

    flops: float
    sizes: tuple[int, int, int]
    dtypes: tuple[str, str]
    precision: str
    name: str

    @property
    def again(self) -> bool:
        """True for a product that the backward pass computes a second time (`jax.checkpoint`)."""
        return REMATERIALIZED in self.name


def count_flops(function: Callable, *arguments: Any) -> float:
    """Floating-point operations of `function(*arguments)`, on all devices together; a multiplication and its addition are two.

    A loop whose number of turns is only known when it runs counts once; of several branches, the one that takes most. What
    rematerialisation computes again counts again, other than in `model_flops`.

    Args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
    """
    return sum(product.flops for product in matrix_products(jax.make_jaxpr(function)(*arguments)))


def model_flops(traced: jax.stages.Traced) -> float:
    """Floating-point operations of a traced function (`jax.jit(f).trace(...)`), on all devices together, as MFU is about them:
    what rematerialisation computes again does not count again."""
    return sum(product.flops for product in matrix_products(traced.jaxpr) if not product.again)


def matrix_products(jaxpr: core.ClosedJaxpr) -> list[Product]:
    """Every matrix product of a traced function (`jax.make_jaxpr(f)(...)`, `jax.jit(f).trace(...).jaxpr`)."""
    return list(_products(jaxpr.jaxpr, 1.0, ""))


def window_taps(
    size: int, window: int, out: int, stride: int = 1, pad: int = 0, base_dilation: int = 1, window_dilation: int = 1
) -> int:
    """How often, along one dimension of a convolution, a window's element meets an element of the input, not its padding.

    Args: size, window and out are the lengths of input, window and output; pad, the padding at the low end.
    """
    index = np.arange(out)[:, None] * stride + np.arange(window) * window_dilation - pad
    return int(np.sum((index >= 0) & (index < (size - 1) * base_dilation + 1) & (index % base_dilation == 0)))


def _products(jaxpr: core.Jaxpr, times: float, outer: str) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        name = "/".join(filter(None, (outer, str(equation.source_info.name_stack))))
        kind, inside = equation.primitive.name, core.jaxprs_in_params(equation.params)
        if PERMUTATION in name:
            continue
        if kind in ("dot_general", "conv_general_dilated"):
            flops, sizes = (_dot if kind == "dot_general" else _convolution)(equation)
            dtypes = tuple(str(side.aval.dtype) for side in equation.invars[:2])
            yield Product(times * flops, sizes, dtypes, _precision(equation.params["precision"]), name)
        elif kind in FUSED_ATTENTION:
            query, key = (side.aval for side in equation.invars[:2])  # [B, T, N, K], [B, S, M, K]
            flops, sizes = 2.0 * query.size * key.shape[1], (query.shape[1], key.shape[1], query.shape[3])
            yield Product(times * FUSED_ATTENTION[kind] * flops, sizes, (str(query.dtype), str(key.dtype)), "default", name)
        elif kind == "cond":
            branches = [list(_products(branch, times, name)) for branch in inside]
            yield from max(branches, key=lambda products: sum(product.flops for product in products))
        else:
            turns = equation.params["length"] if kind == "scan" else 1
            for jaxpr_inside in inside:
                yield from _products(jaxpr_inside, times * turns, name)


def _dot(equation: core.JaxprEqn) -> tuple[float, tuple[int, int, int]]:
    (summed, other_summed), (batch, other_batch) = equation.params["dimension_numbers"]
    left, right = (side.aval.shape for side in equation.invars)
    rows, columns = _rest(left, (*summed, *batch)), _rest(right, (*other_summed, *other_batch))
    terms, batches = math.prod(left[i] for i in summed), math.prod(left[i] for i in batch)
    return 2.0 * batches * rows * columns * terms, (rows, columns, terms)


def _convolution(equation: core.JaxprEqn) -> tuple[float, tuple[int, int, int]]:
    parameters, (image, kernel), out = equation.params, (x.aval.shape for x in equation.invars), equation.outvars[0].aval.shape
    axes = parameters["dimension_numbers"]
    taps = math.prod(
        window_taps(image[i], kernel[k], out[o], stride, low, base, window)
        for i, k, o, stride, (low, _), base, window in zip(
            axes.lhs_spec[2:],
            axes.rhs_spec[2:],
            axes.out_spec[2:],
            parameters["window_strides"],
            parameters["padding"],
            parameters["lhs_dilation"],
            parameters["rhs_dilation"],
        )
    )
    images, channels, terms = out[axes.out_spec[0]], out[axes.out_spec[1]], kernel[axes.rhs_spec[1]]
    window = math.prod(kernel[i] for i in axes.rhs_spec[2:])
    rows = images * math.prod(out[i] for i in axes.out_spec[2:])
    return 2.0 * images * channels * terms * taps, (rows, channels, terms * window)


def _rest(shape: Sequence[int], without: Sequence[int]) -> int:
    return math.prod(size for i, size in enumerate(shape) if i not in without)


def _precision(precision: Any) -> str:
    first = precision[0] if isinstance(precision, tuple) else precision
    name = "DEFAULT" if first is None else getattr(first, "name", str(first))
    algorithms = {"BF16_BF16_F32_X3": "high", "BF16_BF16_F32_X6": "highest", "F32_F32_F32": "highest"}
    return algorithms.get(name, name.lower() if name in ("HIGH", "HIGHEST") else "default")
