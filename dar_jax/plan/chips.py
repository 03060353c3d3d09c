"""The TPUs that can be planned for, and the names of their topologies."""

import re
from dataclasses import dataclass

from dar_jax.errors import InputError
from dar_jax.training.flops import PEAKS


@dataclass(frozen=True)
class Chip:
    """What one chip has.

    peak: bfloat16 floating-point operations/s. memory: bytes that a program may use. memory_bandwidth: bytes/s. ici_bandwidth:
    bytes/s that it can send over all its links at once. axes: dimensions of its topologies. example: one of them. config: what
    libtpu calls a chip that programs see as one device.
    """

    peak: float
    memory: float
    memory_bandwidth: float
    ici_bandwidth: float
    axes: int
    example: str
    config: str


GIB = 2**30
# Google Cloud's pages on the versions, docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (read in 2026). The interconnect is
# half of what they give for both directions together; the memory is the part that libtpu's compiler gives to a program.
CHIPS = {
    "v4": Chip(PEAKS["TPU v4"], 30.75 * GIB, 1200e9, 300e9, 3, "v4:4x4x4", "megacore"),
    "v5e": Chip(PEAKS["TPU v5 lite"], 15.75 * GIB, 819e9, 200e9, 2, "v5e:8x8", "default"),
    "v5p": Chip(PEAKS["TPU v5"], 95.74 * GIB, 2765e9, 600e9, 3, "v5p:4x4x4", "megacore"),
    "v6e": Chip(PEAKS["TPU v6 lite"], 31.25 * GIB, 1638e9, 400e9, 2, "v6e:8x8", "default"),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:8x8. Raises InputError for a name of another form."""
    examples = ", ".join(chip.example for chip in CHIPS.values())
    parts = re.fullmatch(r"(\w+):([1-9][0-9]{0,2}(?:x[1-9][0-9]{0,2})*)", topology)
    if not parts or parts[1] not in CHIPS or parts[2].count("x") + 1 != CHIPS[parts[1]].axes:
        raise InputError(f"there is no topology {topology!r}; they are named like {examples}")
    return CHIPS[parts[1]]
