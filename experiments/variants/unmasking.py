"""A group as a block of masks: a rule says which of its places are drawn in each pass.

Source:   ASS (arXiv 2509.23924), EB-Sampler (arXiv 2505.24857), AdaBlock (arXiv 2509.26432), thresholds of confidence (SDAR).
Command:  dar-jax sample runs/blocks --experiment experiments/variants/unmasking.py --labels 3 --seeds 1,2 --out samples
          (a run of block_diffusion.py; nothing more is trained)
Differs:  from block_diffusion.py in how tokens are found.
Result:   7 of 16 passes for the digits, 34 bits an image from the base; 10, 24 bits (three trainings). See docs/variants.md.

The first group is found one by one, by the known stream; each further one begins as masks. The first pass over it also writes
the keys of the group before, now known. A rule looks at the distributions that tokens would be drawn from, guided and with the
temperature, never at what was drawn: keeping what came out probable would lower the temperature in secret. So the probability
of the tokens is known (`State.log_q`). Samples that need fewer passes wait for the others of the batch. The experiments:
`experiment` takes one pass for a group; `left_two` two places a pass; `random_two` any two; `ascend` 1, 2, 4, .. places, the
surest first; `entropies` the surest, as long as their entropies, less the largest, sum to 1 bit; `sure` all with a token of
probability 0.9; `sums` from the left, as long as the entropies sum to 2 bits; `groups` is `ascend` in the first group too.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from dar_jax.experiment import load_experiment
from dar_jax.sampling.predict import Predictor, draw_each, guide_each, log_probabilities
from dar_jax.sampling.settings import Method

base_experiment = load_experiment(f"{Path(__file__).with_name('block_diffusion.py')}:ar")
from experiment_block_diffusion import State, begin, group_of, in_group, masked_pass  # noqa: E402, the file just loaded


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def reveal(rule, networks, params, settings, state, group):
    """Draws the places of a group in the passes of a rule, (log probabilities [B, Q, V], open [B, Q], pass, keys [B]) -> bool
    [B, Q], of which at least one place is open. It does not see what is drawn."""
    base, per_group = state.base, networks.tokenizer.config.tokens_per_group
    places, last_slot, caches, not_given = in_group(networks, settings, base, group, (group + 1) * per_group)
    keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 4), group))(base.keys)

    def one_pass(first, carry):
        tokens, caches, log_q, still_open, calls, number = carry
        start = networks, params, base, last_slot
        logits, caches = masked_pass(*start, tokens, caches, first, places, still_open)
        logits = guide_each(settings, logits, len(tokens), places)
        each = log_probabilities(settings, logits)
        chosen = still_open & rule(each, still_open, number, keys)
        drawn = draw_each(networks, settings, logits, base.keys, places, tokens)
        log_drawn = jnp.take_along_axis(each, drawn[..., None], axis=-1)[..., 0]
        tokens = tokens.at[:, places].set(jnp.where(chosen, drawn, tokens[:, places]))
        log_q = log_q.at[:, places].set(jnp.where(chosen, log_drawn, log_q[:, places]))
        calls += still_open.any(axis=1) | (number == 0)
        return tokens, caches, log_q, still_open & ~chosen, calls, number + 1

    before = max(places[0] - per_group, 0)  # the first pass also writes the keys of the group before, now known
    carry = one_pass(before, (base.tokens, caches, state.log_q, not_given, base.calls, 0))
    carry = jax.lax.while_loop(lambda carry: carry[3].any(), functools.partial(one_pass, places[0]), carry)
    tokens, caches, log_q, _, calls, _ = carry
    return State(dataclasses.replace(base, tokens=tokens, caches=caches, last_slot=last_slot, calls=calls), log_q)


def every(each, still_open, number, keys):
    return still_open


def left(count):
    return lambda each, still_open, number, keys: still_open & (jnp.cumsum(still_open, axis=1) <= count)


def shuffled(count):
    def rule(each, still_open, number, keys):
        scores = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number), still_open.shape[1:]))(keys)
        return lowest(scores, still_open, count)

    return rule


def ascending(each, still_open, number, keys):
    count, rest = 2**number, still_open.sum(axis=1, keepdims=True)
    return lowest(entropy(each), still_open, jnp.where(rest < 2 * count, rest, count))


def bounded(bound):
    def rule(each, still_open, number, keys):
        bits = jnp.where(still_open, entropy(each), 0)
        order = jnp.argsort(jnp.where(still_open, bits, jnp.inf), axis=1)
        ahead = jnp.cumsum(jnp.take_along_axis(bits, order, axis=1), axis=1) - jnp.take_along_axis(bits, order, axis=1)
        return jnp.take_along_axis(ahead <= bound, jnp.argsort(order, axis=1), axis=1)

    return rule


def confident(least):
    def rule(each, still_open, number, keys):
        surest = each.max(axis=-1)
        return (surest >= jnp.log(least)) | lowest(-surest, still_open, 1)

    return rule


def adaptive(bound):
    def rule(each, still_open, number, keys):
        bits = jnp.cumsum(jnp.where(still_open, entropy(each), 0), axis=1)
        return (bits <= bound) | (jnp.cumsum(still_open, axis=1) == 1)

    return rule


def lowest(scores, still_open, count):
    """The `count` open places with the lowest scores [B, Q]; count: a scalar or [B, 1]."""
    return still_open & (jnp.argsort(jnp.argsort(jnp.where(still_open, scores, jnp.inf), axis=1), axis=1) < count)


def entropy(each):
    """In bits, of log probabilities [B, Q, V]: [B, Q]."""
    return -jnp.sum(jnp.exp(each) * jnp.where(each > -jnp.inf, each, 0), axis=-1) / jnp.log(2)


def by(rule, first_too=False):
    """The experiment of a rule; first_too: in the first group too."""
    predict = Predictor(begin, functools.partial(group_of, functools.partial(reveal, rule), first_too))
    return dataclasses.replace(base_experiment, method=Method(predict=predict))


experiment, groups = by(every), by(ascending, first_too=True)
left_two, random_two, ascend = by(left(2)), by(shuffled(2)), by(ascending)
entropies, sure, sums = by(bounded(1.0)), by(confident(0.9)), by(adaptive(2.0))
