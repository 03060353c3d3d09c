"""The device mesh, shardings, and batches over devices and hosts."""

from dar_jax.parallel.batches import batch_parts, batch_sharding, check_batch, global_batch
from dar_jax.parallel.mesh import AXES, BATCH, arrange, make_mesh
from dar_jax.parallel.sharding import RULES, Rules, path_name, placed, put, replicated, shardings

__all__ = [
    "AXES",
    "BATCH",
    "RULES",
    "Rules",
    "arrange",
    "batch_parts",
    "batch_sharding",
    "check_batch",
    "global_batch",
    "make_mesh",
    "path_name",
    "placed",
    "put",
    "replicated",
    "shardings",
]
