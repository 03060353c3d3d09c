"""Text as the condition: the characters of a class's name, one slot each, then a slot of its own.

With names in words a new one can be asked for too, as any int32 [B, N] array. `--fork.max-characters` is a setting of this
file alone. Parts: condition, model (`prefix`, `null`), config.fork.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from dar_jax.experiment import Experiment
from dar_jax.models.transformer import Llama
from dar_jax.quickstart import DIGITS, TRANSFORMER

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LONGEST = max(map(len, NAMES))


def characters(text):
    """The bytes of a name and zeros up to the longest: int32 [N]."""
    return np.frombuffer(text.encode().ljust(LONGEST, b"\0"), np.uint8)[:LONGEST].astype(np.int32)


def condition(batch):
    return jnp.asarray(np.stack([characters(name) for name in NAMES]))[batch["label"]]


class TextLlama(Llama):
    max_characters: int = LONGEST

    def setup(self):
        super().setup()
        self.letters = self.param("letter_table", nn.initializers.normal(0.02), (256, self.config.width))

    def prefix(self, condition):
        text = condition[:, : self.max_characters]
        start = jnp.full((len(text),), self.config.num_classes)  # the class table's last row
        return jnp.concatenate([self.letters.astype(self.dtype)[text], super().prefix(start)], axis=1)

    def null(self, condition):
        return jnp.zeros_like(condition)


experiment = Experiment(
    dataclasses.replace(TRANSFORMER, name="text", data=DIGITS, fork={"max_characters": LONGEST}),
    model=lambda config, dtype, remat: TextLlama(config.model, dtype, remat, max_characters=config.fork["max_characters"]),
    condition=condition,
    rules=((r"letter_table", P(None, "fsdp")),),
)
