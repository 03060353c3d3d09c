"""One transformer for every degree of parallelism: blocks of 1, 2, 4, .. tokens, each predicted in one pass.

Source:   VAR (arXiv 2404.02905) predicts all tokens of a scale at once; here a block lies within a group, and its size is drawn
          anew for every training batch, smaller for earlier groups.
Command:  dar-jax train experiments/variants/any_block.py --tokenizer runs/digits/tokenizer --workdir runs/any_block
          dar-jax sample runs/any_block --experiment experiments/variants/any_block.py --labels 3 --seeds 1,2 --out samples
          dar-jax evaluate-ar runs/any_block --experiment experiments/variants/any_block.py:halves --out bits
          (a tokenizer with 32 tokens in 4 groups: --model.num-tokens 32 --fork.tokens-per-group 8)
Differs:  from the digits' transformer of the quickstart in the model, the loss and how tokens are found.
Time:     that of the base, 75 seconds on two CPU cores.
Result:   7 of 16 passes for 0.11 bits more a held-out token than one by one (digits), 15 of 64 for 0.24 (Fashion-MNIST),
          three trainings each. See docs/variants.md.

Slot i of a block of b tokens holds token i - b, one block and not one token before (the condition where there is none), plus a
vector for the size of the block, and sees its own block and all before it. Tokens of one block are drawn independently. Blocks
may not shrink from one to the next, or a token would never be an input. Blocks of 1 are the base, with the base's parameters.
Which schedule is used is the model's: `ones` 16 passes for the digits, `halves` 10, `experiment` 7 (the first group one by
one), `groups` 4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from dar_jax.errors import require
from dar_jax.experiment import Experiment
from dar_jax.models.transformer import Llama
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.predict import Predictor, draw_each, grown, token_by_token, with_null
from dar_jax.sampling.settings import Method
from dar_jax.training.losses import cross_entropy, drop_condition

RULES = ((r"shift_table", PartitionSpec(None, "fsdp")),)


class AnyBlock(Llama):
    group: int = 4  # Q, tokens of a group
    first: int = 1  # size of the blocks of the first group, a power of 2
    later: int = 4  # of the other groups

    def setup(self):
        super().setup()
        self.shifts = self.param("shift_table", nn.initializers.zeros, (self.group.bit_length() - 1, self.config.width))

    @nn.nowrap
    def sizes(self):
        """The size of the block of every token, int [T]."""
        groups = self.config.num_tokens // self.group
        return np.repeat([self.first] + [self.later] * (groups - 1), self.group)

    def inputs(self, x, size):
        """Slots [B, n, D] of blocks of `size`, an integer or [n], marked with it; blocks of 1 have no mark."""
        level = jnp.round(jnp.log2(jnp.asarray(size))).astype(int)
        marks = jnp.pad(self.shifts.astype(self.dtype), ((1, 0), (0, 0)))
        return jnp.where((level > 0)[..., None], x + marks[level], x)

    def __call__(self, condition, tokens, dropout_key=None, sizes=None):
        """As of `Llama`; sizes: [T] of the blocks, those of the schedule by default."""
        sizes = jnp.asarray(self.sizes() if sizes is None else sizes)
        places = jnp.arange(tokens.shape[1])
        earlier = self.embed(tokens)[:, jnp.maximum(places - sizes, 0)]
        x = jnp.where((places < sizes)[:, None], self.prefix(condition), earlier)
        block = places // sizes * sizes  # its first token, because sizes never fall and divide Q
        return self.run(self.inputs(x, sizes), (block <= block[:, None])[None], places, dropout_key)


def loss(config, model):
    """Next blocks: a quarter of the batches one by one, the others with a size for each group, none below the one before."""
    levels, groups = model.group.bit_length(), model.config.num_tokens // model.group

    def loss_fn(params, batch, key, frozen, step):
        drop_key, dropout_key, size_key, base_key = jax.random.split(key, 4)
        level = jnp.sort(jax.random.randint(size_key, (groups,), 0, levels)) * jax.random.bernoulli(base_key, 0.75)
        sizes = jnp.repeat(2**level, model.group, total_repeat_length=groups * model.group)
        condition = drop_condition(model, batch["condition"], drop_key)
        logits = model.apply({"params": params}, condition, batch["codes"], dropout_key, sizes)
        return cross_entropy(logits, batch["codes"])

    return loss_fn


def begin(networks, params, settings, condition, seeds, prefix=None, num_given=None):
    state = token_by_token.begin(networks, params, settings, condition, seeds)
    if prefix is None:
        return state
    given = jnp.full(len(seeds), prefix.shape[1]) if num_given is None else jnp.asarray(num_given)
    return dataclasses.replace(state, tokens=state.tokens.at[:, : prefix.shape[1]].set(prefix), num_given=given)


@functools.partial(jax.jit, static_argnums=(0, 4))
def predict(networks, params, settings, state, group):
    """The blocks of a group, one pass each."""
    model, per_group = networks.transformer, networks.tokenizer.config.tokens_per_group
    require(per_group == model.group, f"the tokenizer has {per_group} tokens a group, the transformer {model.group}")
    first, end = group * per_group, (group + 1) * per_group
    size = int(model.sizes()[first])
    bound, guided = model.bind({"params": params.transformer.rest}), first < settings.guided
    condition = with_null(bound, state.condition) if guided else state.condition
    slots = bound.prefix(condition)

    def block(carry, start):
        tokens, caches = carry
        places = start + jnp.arange(size)
        earlier = bound.embed(jnp.repeat(tokens[:, jnp.maximum(places - size, 0)], 2 if guided else 1, axis=0))
        x = bound.inputs(jnp.where((places < size)[:, None], slots, earlier), size)
        seen = jnp.broadcast_to(jnp.arange(end) < start + size, (1, size, end))
        logits, caches = bound.extend(params.transformer.layers, x, caches, start, seen)
        new = draw_each(networks, settings, logits, state.keys, places, tokens)
        new = jnp.where(places < state.num_given[:, None], tokens[:, places], new)
        return (tokens.at[:, places].set(new), caches), None

    caches = grown(state.caches, end, halved=not guided and len(state.caches[0].keys) > len(state.tokens))
    (tokens, caches), _ = jax.lax.scan(block, (state.tokens, caches), jnp.arange(first, end, size))
    return dataclasses.replace(state, tokens=tokens, caches=caches, calls=state.calls + per_group // size)


def blocks(first, later):
    """The experiment with blocks of `first` tokens in the first group and `later` in the others, which divide Q; 0: all Q."""

    def model(config, dtype, remat):
        group = config.fork["tokens_per_group"]
        require(
            group >= max(first, later, 1) and group & (group - 1) == 0 and config.model.num_tokens % group == 0,
            f"fork.tokens_per_group is {group}, it should be a power of 2 from {max(later, 1)} on that divides the tokens",
        )
        return AnyBlock(config.model, dtype, remat, group=group, first=first or group, later=later or group)

    config = dataclasses.replace(TRANSFORMER, name="any_block", data=DIGITS, fork={"tokens_per_group": 4})
    method = Method(predict=Predictor(begin, predict))
    return Experiment(config, model=model, loss=loss, method=method, rules=RULES)


ones, halves, experiment, groups = blocks(1, 1), blocks(1, 2), blocks(1, 0), blocks(0, 0)
