"""Parameters as the sampler reads them, and where they are."""

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
from jax import Array
from jax.sharding import Mesh

from dar_jax.models.blocks import unstack
from dar_jax.parallel import batch_sharding, shardings

if TYPE_CHECKING:
    from dar_jax.sampling.settings import Networks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """Parameters of a network that runs piece by piece: one tree for each layer of its blocks, and all the others."""

    rest: Any
    layers: tuple[Any, ...]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["decoder", "transformer", "others"], meta_fields=["decoder_mesh"]
)
@dataclasses.dataclass(frozen=True)
class SamplerParams:
    """Parameters as the sampler reads them, see `prepare` and `separate`."""

    decoder: Unstacked  # the tokenizer without its encoder; the layers are the token decoder's
    transformer: Unstacked | None  # None where codes are given
    others: dict[str, Unstacked] = dataclasses.field(default_factory=dict)  # an experiment's further networks by name
    decoder_mesh: Mesh | None = None  # None: the decoder is where the transformer is

    def on_decoder(self) -> contextlib.AbstractContextManager:
        """Enters the decoder's mesh, if it has one of its own."""
        return contextlib.nullcontext() if self.decoder_mesh is None else jax.set_mesh(self.decoder_mesh)

    def to_decoder(self, batch: Any) -> Any:
        """A tree of arrays with the batch first, on the decoder's mesh."""
        return batch if self.decoder_mesh is None else jax.device_put(batch, batch_sharding(self.decoder_mesh))


# Leaves of the parameters that are matrix products' operands or rows looked up in the compute dtype.
MATRICES = ("kernel", "output", "class_table", "token_table")


@functools.partial(jax.jit, static_argnums=0)
def prepare(networks: "Networks", params: dict) -> SamplerParams:
    """Parameters {"tokenizer": ..., "transformer": ..., "others": {name: ...}} as the sampler reads them.

    The matrices (see `MATRICES`) get the dtype in which they are multiplied, so that no token converts them again; stacks of
    blocks become one tree for each layer.
    """
    tokenizer = {name: part for name, part in params["tokenizer"].items() if name != "encoder"}
    dtype = networks.tokenizer.dtype
    decoder = unstacked(tokenizer.pop("token_decoder"), dtype)
    tokenizer |= {"token_decoder": decoder.rest, "velocity": _cast(tokenizer["velocity"], dtype)}
    return SamplerParams(
        Unstacked(tokenizer, decoder.layers),
        None if networks.transformer is None else unstacked(params["transformer"], networks.transformer.dtype),
        {name: unstacked(params["others"][name], model.dtype) for name, model in networks.others.items()},
    )


def unstacked(params: dict, dtype: Any) -> Unstacked:
    """The parameters of a network with the matrices in this dtype and its stack `blocks`, if it has one, as layers."""
    params = _cast(params, dtype)
    blocks = params.pop("blocks", None)
    return Unstacked(params, () if blocks is None else unstack(blocks, len(jax.tree.leaves(blocks)[0])))


def _cast(tree: dict, dtype: Any) -> dict:
    def leaf(path: tuple, x: Array) -> Array:
        return x.astype(dtype) if path[-1].key in MATRICES else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def separate(params: SamplerParams, mesh: Mesh) -> SamplerParams:
    """The same with the decoder on a mesh of its own: there a group is denoised while the next one is predicted.

    The meshes are of one process; a batch is sharded over the devices of either.
    """
    decoder = jax.device_put(params.decoder, shardings(params.decoder, mesh))
    return dataclasses.replace(params, decoder=decoder, decoder_mesh=mesh)
