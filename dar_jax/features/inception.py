"""The Inception network of FID: the graph that TensorFlow's authors published on 2015-12-05, in the names of its PyTorch ports.

It is not the Inception-v3 of the paper (Szegedy et al. 2015): average pools leave the padding out of the mean, the last
block pools by maximum, and there are 1008 classes. Everything is float32, and products are taken at the highest precision.
Shapes: B batch, H W pixels.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dar_jax.models.pixels import resize_bilinear

SIZE = 299  # pixels of a side
CLASSES = 1008
SPATIAL = 7  # channels of the sFID features
EPSILON = 1e-3  # of the batch norms
HIGHEST = jax.lax.Precision.HIGHEST


# --- the architecture as a table ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution without bias, batch norm, ReLU. The name is that of the parameters."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Chains of steps that all start from the same map; their results are concatenated."""

    chains: tuple[tuple["Step", ...], ...]


Step = Conv | Parallel | Callable[[Array], Array]

average = functools.partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
maximum = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
halve = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


def _chain(name: str, *convolutions: tuple) -> tuple[Conv, ...]:
    return tuple(Conv(f"{name}_{index}", *sizes) for index, sizes in enumerate(convolutions, 1))


def _block35(pool_width: int) -> Parallel:  # of maps of 35 x 35
    return Parallel((
        (Conv("branch1x1", 64),),
        _chain("branch5x5", (48,), (64, (5, 5))),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
        (average, Conv("branch_pool", pool_width)),
    ))  # fmt: skip


def _block17(width: int) -> Parallel:
    rows, columns = (7, 1), (1, 7)
    return Parallel((
        (Conv("branch1x1", 192),),
        _chain("branch7x7", (width,), (width, columns), (192, rows)),
        _chain("branch7x7dbl", (width,), (width, rows), (width, columns), (width, rows), (192, columns)),
        (average, Conv("branch_pool", 192)),
    ))  # fmt: skip


def _block8(pool: Callable[[Array], Array]) -> Parallel:
    def both(name: str) -> Parallel:
        return Parallel(((Conv(f"{name}a", 384, (1, 3)),), (Conv(f"{name}b", 384, (3, 1)),)))

    return Parallel((
        (Conv("branch1x1", 320),),
        (*_chain("branch3x3", (384,)), both("branch3x3_2")),
        (*_chain("branch3x3dbl", (448,), (384, (3, 3))), both("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    ))  # fmt: skip


STEM: tuple[Step, ...] = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    halve,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    halve,
)
BLOCKS: dict[str, Parallel] = {
    "Mixed_5b": _block35(32),
    "Mixed_5c": _block35(64),
    "Mixed_5d": _block35(64),
    "Mixed_6a": Parallel((
        (Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2, "VALID")),
        (halve,),
    )),
    "Mixed_6b": _block17(128),
    "Mixed_6c": _block17(160),
    "Mixed_6d": _block17(160),
    "Mixed_6e": _block17(192),
    "Mixed_7a": Parallel((
        _chain("branch3x3", (192,), (320, (3, 3), 2, "VALID")),
        _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2, "VALID")),
        (halve,),
    )),
    "Mixed_7b": _block8(average),
    "Mixed_7c": _block8(maximum),
}  # fmt: skip


def convolution_names() -> list[str]:
    """The paths of all convolutions, `Conv2d_1a_3x3` and `Mixed_5b/branch1x1` say, in the order of the graph."""

    def names(step: Step) -> Iterator[str]:
        if isinstance(step, Conv):
            yield step.name
        elif isinstance(step, Parallel):
            for chain in step.chains:
                for each in chain:
                    yield from names(each)

    blocks = [f"{block}/{name}" for block, layout in BLOCKS.items() for name in names(layout)]
    return [name for step in STEM for name in names(step)] + blocks


# --- the network -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InceptionFeatures:
    """The features that the metrics are computed from."""

    pool: Array  # [B, 2048]: FID, precision and recall
    spatial: Array  # [B, 17, 17, 7]: sFID, the first channels of the 1 x 1 branch of Mixed_6d
    logits: Array | None  # [B, 1008], without the bias: inception score


class Inception(nn.Module):
    """The network. Without `classifier` it ends at the pooled features.

    `resize`: the convention by which images are resized to 299 x 299, that of the published graph ("tensorflow1") or about the
    centres of pixels.
    """

    classifier: bool
    resize: Literal["tensorflow1", "half_pixel"] = "tensorflow1"

    @nn.compact
    def __call__(self, images: Array) -> InceptionFeatures:
        """Images [B, H, W, 3] of any size, uint8 or floats in 0..255 -> features, float32."""
        x = (resize_bilinear(images.astype(jnp.float32), SIZE, SIZE, self.resize) - 128) / 128
        x = functools.reduce(_apply, STEM, x)  # [B, 35, 35, 192]
        for name, layout in BLOCKS.items():
            x = Block(layout, name=name)(x)
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL]
        pool = x.mean(axis=(1, 2))
        classify = nn.Dense(CLASSES, use_bias=False, precision=HIGHEST, name="fc") if self.classifier else None
        return InceptionFeatures(pool, spatial, classify(pool) if classify else None)


class Block(nn.Module):
    """Parallel branches, under a name of their own."""

    layout: Parallel

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _apply(x, self.layout)


class ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU. The norm's statistics are parameters here, and folded into the kernel."""

    layout: Conv

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layout = self.layout
        shape = (*layout.kernel, x.shape[-1], layout.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        inits = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        scale, bias, mean, var = (self.param(name, init, (layout.width,)) for name, init in inits.items())
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        strides, axes = (layout.stride,) * 2, ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel * factor, strides, layout.padding, dimension_numbers=axes, precision=HIGHEST)
        return nn.relu(x + (bias - mean * factor))


def _apply(x: Array, step: Step) -> Array:
    if isinstance(step, Conv):
        return ConvNorm(step, name=step.name)(x)
    if isinstance(step, Parallel):
        return jnp.concatenate([functools.reduce(_apply, chain, x) for chain in step.chains], axis=-1)
    return step(x)
