"""A second condition beside the class: a map of edges, four slots before the class's. Without a map it is empty.

The source adds the key "edges" to its elements. Parts: source, condition, model (`prefix` of n > 1 slots, `null`), rules.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from dar_jax.data.sources import DigitsSource
from dar_jax.experiment import Experiment
from dar_jax.models.transformer import Llama
from dar_jax.quickstart import DIGITS, TRANSFORMER

SIDE = 8


def edges_of(image):
    """How much each pixel of uint8 [8, 8, 1] differs from its right and lower neighbours: float32 [8, 8] in [0, 1]."""
    pixels = np.pad(image[..., 0].astype(np.float32) / 255, ((0, 1), (0, 1)), mode="edge")
    return np.maximum(abs(np.diff(pixels, axis=0))[:, :-1], abs(np.diff(pixels, axis=1))[:-1])


class WithEdges(DigitsSource):
    def __getitem__(self, index):
        element = super().__getitem__(index)
        return {**element, "edges": edges_of(element["image"])}


def condition(batch):
    label = batch["label"]
    return {"label": label, "edges": batch.get("edges", jnp.zeros((len(label), SIDE, SIDE)))}


class EdgeLlama(Llama):
    def setup(self):
        super().setup()
        self.edge_in = nn.Dense(self.config.width, dtype=self.dtype)

    def prefix(self, condition):
        edges = condition["edges"].reshape(-1, 2, SIDE // 2, 2, SIDE // 2).swapaxes(2, 3).reshape(-1, 4, SIDE * SIDE // 4)
        return jnp.concatenate([self.edge_in(edges), super().prefix(condition["label"])], axis=1)

    def null(self, condition):
        return {"label": super().null(condition["label"]), "edges": jnp.zeros_like(condition["edges"])}


experiment = Experiment(
    dataclasses.replace(TRANSFORMER, name="control", data=DIGITS),
    model=lambda config, dtype, remat: EdgeLlama(config.model, dtype, remat),
    source=lambda data: WithEdges(data.split, data.channels),
    condition=condition,
    rules=((r"edge_in/kernel", P(None, "fsdp")),),
)
