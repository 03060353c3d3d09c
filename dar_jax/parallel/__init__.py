"""The device mesh, shardings, and batches over devices and hosts."""

from dar_jax.parallel.batches import (
    batch_parts,
    batch_sharding,
    batch_shares,
    check_batch,
    full_batch,
    global_batch,
    to_host,
)
from dar_jax.parallel.mesh import AXES, BATCH, MOST_PARTS, arrange, make_mesh
from dar_jax.parallel.sharding import RULES, Rules, fit, path_name, placed, put, replicated, shardings

__all__ = [
    "AXES",
    "BATCH",
    "MOST_PARTS",
    "RULES",
    "Rules",
    "arrange",
    "batch_parts",
    "batch_sharding",
    "batch_shares",
    "check_batch",
    "fit",
    "full_batch",
    "global_batch",
    "make_mesh",
    "path_name",
    "placed",
    "put",
    "replicated",
    "shardings",
    "to_host",
]
