"""All Q tokens of a group in one pass: G passes an image instead of T, at the price of drawing them independently.

Slot i holds token i - Q (the condition in the first group) plus a learned vector of its place in the group; a slot sees its
own group and those before it. Parts: model (with its own `__call__`), method.predict.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from dar_jax.experiment import Experiment
from dar_jax.models.transformer import Llama
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.predict import Predictor, begin_prediction, draw_each, grown, with_null
from dar_jax.sampling.settings import Method


class GroupLlama(Llama):
    group: int = 4  # Q

    def setup(self):
        super().setup()
        self.places = self.param("query_table", nn.initializers.normal(0.02), (self.group, self.config.width))

    def inputs(self, x):
        """Slots [B, n Q, D] with their places in the group; one slot stands for a whole group."""
        return x + jnp.tile(self.places.astype(self.dtype), (max(x.shape[1] // self.group, 1), 1))

    def __call__(self, condition, tokens, dropout_key=None):
        x = jnp.repeat(self.prefix(condition), self.group, axis=1)
        x = self.inputs(jnp.concatenate([x, self.embed(tokens[:, : -self.group])], axis=1))
        group = jnp.arange(tokens.shape[1]) // self.group
        return self.run(x, (group <= group[:, None])[None], jnp.arange(len(group)), dropout_key)


@functools.partial(jax.jit, static_argnums=(0, 4))
def predict(networks, params, settings, state, group):
    model, size = networks.transformer, networks.tokenizer.config.tokens_per_group
    places, length = group * size + jnp.arange(size), (group + 1) * size
    bound, rows = model.bind({"params": params.transformer.rest}), 2 if settings.guided else 1
    previous = jnp.repeat(state.tokens[:, length - 2 * size : length - size], rows, axis=0)
    condition = with_null(bound, state.condition) if settings.guided else state.condition
    x = bound.inputs(bound.embed(previous) if group else bound.prefix(condition))
    caches = state.caches if group else jax.tree.map(lambda cache: cache[:, :, :0], state.caches)
    mask = jnp.ones((1, size, length), bool)
    logits, caches = bound.extend(params.transformer.layers, x, grown(caches, length), jnp.int32(group * size), mask)
    drawn = draw_each(networks, settings, logits, state.keys, places, state.tokens)
    drawn = jnp.where(places < state.num_given[:, None], state.tokens[:, places], drawn)
    return dataclasses.replace(state, tokens=state.tokens.at[:, places].set(drawn), caches=caches, calls=state.calls + 1)


experiment = Experiment(
    dataclasses.replace(TRANSFORMER, name="group_parallel", data=DIGITS),
    model=lambda config, dtype, remat: GroupLlama(config.model, dtype, remat),
    method=Method(predict=Predictor(begin_prediction, predict)),
)
