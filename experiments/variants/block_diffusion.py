"""One set of weights that predicts tokens one by one and, by masks, many at a time, and drafts for itself.

Source:   SDAR makes a trained transformer a block-diffusion model by short further training; here the stream of known tokens
          stays causal, as in TiDAR (arXiv 2511.08923), so that it is still the transformer that it was.
Command:  dar-jax train experiments/variants/block_diffusion.py --tokenizer runs/digits/tokenizer --init-from runs/digits \
              --workdir runs/blocks
          dar-jax sample runs/blocks --experiment experiments/variants/block_diffusion.py --labels 3 --seeds 1,2 --out samples
Differs:  from the digits' transformer of the quickstart in the model, the loss, steps, learning rate and how tokens are found.
Time:     70 seconds on two CPU cores, compilation included.
Result:   9.5 of 16 passes for digits, 15.7 of 64 for Fashion-MNIST, for 2.3 bits an image (3 trainings). See docs/variants.md.

Beside the T slots of the transformer there are T masked ones, in blocks. Slot j of a block holds token j - 1 where it is known,
else the vector `mask`; it sees the known tokens before the block and the whole block, and predicts token j. No known slot sees
a masked one. How tokens are found: `experiment` as in speculative.py, where masks behind the guesses of a window, in the same
pass, draft the next ones, so that the tokens are those of `ar`, one by one; a group as a block: see unmasking.py and energy.py.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dar_jax.errors import require
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.models.attention import causal_mask
from dar_jax.models.transformer import Llama
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.predict import Prediction, grown, token_by_token
from dar_jax.training.losses import cross_entropy, drop_condition

LOWEST_RATE = 0.05  # of masking, whose inverse is a weight of the loss


class TwoStreams(Llama):
    largest: int = 8  # block

    def setup(self):
        super().setup()
        self.mask = self.param("mask", nn.initializers.normal(0.02), (self.config.width,))

    def masked(self, x, unknown):
        """Slots [B, n, D] with those that hold an unknown token, bool [B, n] or [n], masked."""
        return jnp.where(unknown[..., None], self.mask.astype(self.dtype), x)

    def streams(self, condition, tokens, hidden, starts, dropout_key=None):
        """The logits [B, T, V] of the known stream, and those of the masked one with these tokens hidden, bool [B, T], in
        blocks; starts: [T], the first place of each place's block."""
        x = jnp.concatenate([self.prefix(condition), self.embed(tokens[:, :-1])], axis=1)
        places, length = jnp.arange(tokens.shape[1]), x.shape[1]
        before = length - len(places)
        masked = self.masked(x[:, before:], jnp.roll(hidden, 1, axis=1) & (places != starts))
        known = jnp.pad(causal_mask(length, length)[0], ((0, 0), (0, len(places))))
        block = [jnp.arange(length) < before + starts[:, None], starts == starts[:, None]]
        mask = jnp.concatenate([known, jnp.concatenate(block, axis=1)])[None]
        positions = jnp.concatenate([jnp.arange(length), before + places])
        logits = self.run(jnp.concatenate([x, masked], axis=1), mask, positions, dropout_key)
        return logits[:, before:length], logits[:, length:]


def losses(model, params, condition, codes, starts, key, dropout_key=None):
    """The mean cross entropy of next tokens, its metrics, and that of hidden ones, over the rate at which its block hides them:
    a token's, averaged over all orders in which those of the block may become known."""
    rate_key, hidden_key = jax.random.split(key)
    rates = jax.random.uniform(rate_key, codes.shape, minval=LOWEST_RATE)[:, starts]
    hidden = jax.random.uniform(hidden_key, codes.shape) < rates
    known, masked = model.apply({"params": params}, condition, codes, hidden, starts, dropout_key, method="streams")
    each = optax.softmax_cross_entropy_with_integer_labels(masked, codes)
    return *cross_entropy(known, codes), (each * hidden / rates).mean()


def loss(config, model):
    """Next tokens and hidden ones, in blocks of 1, 2, 4, .. tokens; half of the batches begin with a shorter block."""

    def loss_fn(params, batch, key, frozen, step):
        drop_key, dropout_key, mask_key, *keys = jax.random.split(key, 6)
        condition, codes = drop_condition(model, batch["condition"], drop_key), batch["codes"]
        size = 2 ** jax.random.randint(keys[0], (), 0, model.largest.bit_length())
        offset = jax.random.randint(keys[1], (), 0, size) * jax.random.bernoulli(keys[2])
        starts = jnp.maximum((jnp.arange(codes.shape[1]) + size - offset) // size * size - size + offset, 0)
        known, metrics, hidden = losses(model, params, condition, codes, starts, mask_key, dropout_key)
        return known + hidden, metrics | {"hidden": hidden}

    return loss_fn


class State(NamedTuple):
    base: Prediction
    log_q: Any  # [B, T], log of the probability with which a token was drawn; NaN where one by one, or given

    tokens = property(lambda self: self.base.tokens)
    calls = property(lambda self: self.base.calls)


def begin(*arguments):
    base = token_by_token.begin(*arguments)
    return State(base, jnp.full(base.tokens.shape, jnp.nan))


def in_group(networks, settings, base, group, room):
    """What the passes over a group begin with: its places [Q]; the condition's last slot and the caches, which have room for so
    many tokens, without the rows of the null condition where guidance has ended; which places, bool [B, Q], are not given."""
    per_group, largest = networks.tokenizer.config.tokens_per_group, networks.transformer.largest
    require(per_group <= largest, f"a group has {per_group} tokens, the transformer's largest block {largest}")
    places = group * per_group + np.arange(per_group)
    halved = places[0] >= settings.guided and len(base.last_slot) > len(base.tokens)
    caches = grown(base.caches, max(base.before + room, base.caches[0].keys.shape[2]), halved)
    return places, base.last_slot[::2] if halved else base.last_slot, caches, places >= base.num_given[:, None]


def masked_pass(networks, params, base, last_slot, tokens, caches, first, places, still_open):
    """One pass over the places from `first` to those of a block, whose open ones, bool [B, Q], are masked: logits [rows, Q, V]
    of the block and the caches, in which the slots before it are those of known tokens."""
    model, covered = networks.transformer.bind({"params": params.transformer.rest}), np.arange(first, places[-1] + 1)
    rows, span = len(last_slot) // len(tokens), np.arange(caches[0].keys.shape[2]) - base.before
    x = jnp.repeat(tokens[:, np.maximum(covered - 1, 0)], rows, axis=0)
    x = jnp.where((covered == 0)[:, None], last_slot, model.embed(x))
    unknown = jnp.pad(still_open[:, :-1], ((0, 0), (places[0] + 1 - first, 0)))  # slot j holds token j - 1
    seen = (span <= covered[:, None]) | ((covered >= places[0])[:, None] & (span <= places[-1]))
    x = model.masked(x, jnp.repeat(unknown, rows, axis=0))
    logits, caches = model.extend(params.transformer.layers, x, caches, base.before + first, seen[None])
    return logits[:, -len(places) :], caches


def group_of(find, first_too, networks, params, settings, state, group):
    """A group's tokens by `find`, whose arguments follow; those of the first one by one unless `first_too`."""
    if group * networks.tokenizer.config.tokens_per_group < state.base.done:
        return state
    state = State(dataclasses.replace(state.base, done=0), state.log_q)
    if group or first_too:
        return find(networks, params, settings, state, group)
    return State(token_by_token.group(networks, params, settings, state.base, group), state.log_q)


def two_streams(config, dtype, remat):
    largest, tokens = config.fork["largest_block"], config.model.num_tokens
    fits = 0 < largest <= tokens and largest & (largest - 1) == 0
    require(fits, f"fork.largest_block is {largest}, it should be a power of 2 of at most {tokens}")
    return TwoStreams(config.model, dtype, remat, largest=largest)


speculative = load_experiment(f"{Path(__file__).with_name('speculative.py')}:masks")
optimizer = dataclasses.replace(TRANSFORMER.optimizer, learning_rate=TRANSFORMER.optimizer.learning_rate / 4)
parts = {"fork": {"largest_block": 8}, "optimizer": optimizer, "train": dataclasses.replace(TRANSFORMER.train, steps=300)}
ar = Experiment(dataclasses.replace(TRANSFORMER, name="block_diffusion", data=DIGITS, **parts), model=two_streams, loss=loss)
experiment = dataclasses.replace(ar, method=speculative.method)
