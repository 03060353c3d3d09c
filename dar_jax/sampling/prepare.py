"""Parameters as the sampler reads them, and where they are."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from dar_jax.models.blocks import unstack
from dar_jax.parallel import shardings
from dar_jax.sampling.settings import Networks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """Parameters of a network that runs piece by piece: one tree for each layer of its blocks, and all the others."""

    rest: Any
    layers: tuple[Any, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["decoder", "llama"], meta_fields=["decoder_mesh"])
@dataclasses.dataclass(frozen=True)
class SamplerParams:
    """Parameters as the sampler reads them, see `prepare` and `separate`."""

    decoder: Unstacked  # the tokenizer without its encoder; the layers are the token decoder's
    llama: Unstacked | None  # None where codes are given
    decoder_mesh: Mesh | None = None  # None: the decoder is where the transformer is


# Leaves of the parameters that are matrix products' operands or rows looked up in the compute dtype.
MATRICES = ("kernel", "output", "class_table", "token_table")


@functools.partial(jax.jit, static_argnums=0)
def prepare(networks: Networks, params: dict) -> SamplerParams:
    """Parameters {"tokenizer": ..., "llama": ...} as the sampler reads them.

    The matrices (see `MATRICES`) get the dtype in which they are multiplied, so that no token converts them again.
    """

    def cast(tree: Any, dtype: jnp.dtype) -> Any:
        def leaf(path: tuple, x: Array) -> Array:
            return x.astype(dtype) if path[-1].key in MATRICES else x

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def take_apart(tree: dict, layers: int) -> tuple[dict, tuple[Any, ...]]:
        rest = {name: value for name, value in tree.items() if name != "blocks"}
        return rest, unstack(tree["blocks"], layers)

    model, llama_params = networks.tokenizer, None
    tokenizer = {name: value for name, value in params["tokenizer"].items() if name != "encoder"}
    tokenizer |= {name: cast(tokenizer[name], model.dtype) for name in ("token_decoder", "velocity")}
    tokenizer["token_decoder"], layers = take_apart(tokenizer["token_decoder"], model.config.decoder_layers)
    if networks.llama is not None:
        matrices = cast(params["llama"], networks.llama.dtype)
        llama_params = Unstacked(*take_apart(matrices, networks.llama.config.layers))
    return SamplerParams(Unstacked(tokenizer, layers), llama_params)


def separate(params: SamplerParams, mesh: Mesh) -> SamplerParams:
    """The same with the decoder on a mesh of its own: there a group is denoised while the next one is predicted.

    The meshes are of one process; a batch is cut over the devices of either.
    """
    decoder = jax.device_put(params.decoder, shardings(params.decoder, mesh))
    return dataclasses.replace(params, decoder=decoder, decoder_mesh=mesh)
