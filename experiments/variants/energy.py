"""Groups drawn independently, weighed by the transformer that reads them one token after the other.

Source:   EDLM (energy-based diffusion language models); the energy is log q - log p of a group, by the masked and by the known
          stream.
Command:  dar-jax sample runs/blocks --experiment experiments/variants/energy.py --labels 3 --seeds 1,2 --out samples
          (a run of block_diffusion.py; nothing more is trained)
Differs:  from block_diffusion.py in how tokens are found.
Result:   10 of 16 passes for the digits, at most 16 bits an image from the base (three trainings). See docs/variants.md.

The first group is found one by one. For each further one R candidates (here 8) are drawn from the masked stream, all places
independently; one more pass reads them all, each in slots of its own beside the same caches, and one is drawn with weights
p / q. Its keys are those of that pass, so a group takes two passes. The larger R, the closer its distribution to p: at most
-E log mean(p / q) away in Kullback-Leibler divergence, which `State.log_q` counts as if it were exact. The first candidate has
the noise of one by one. The experiments are `two`, `four`, `experiment` (8) and `sixteen` candidates.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.experiment import load_experiment
from dar_jax.sampling.predict import Predictor, draw_each, guide_each, log_probabilities
from dar_jax.sampling.settings import Method

base_experiment = load_experiment(f"{Path(__file__).with_name('block_diffusion.py')}:ar")
from experiment_block_diffusion import State, begin, group_of, in_group, masked_pass  # noqa: E402, the file just loaded


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def weigh(count, networks, params, settings, state, group):
    """The tokens of a group, one of `count` candidates."""
    base, batch, size = state.base, len(state.tokens), networks.tokenizer.config.tokens_per_group
    places, last_slot, caches, not_given = in_group(networks, settings, base, group, (group + count) * size)
    logits, caches = masked_pass(networks, params, base, last_slot, base.tokens, caches, places[0], places, not_given)
    logits = guide_each(settings, logits, batch, places)
    keys = jnp.stack([base.keys, *(jax.vmap(candidate_key, (0, None))(base.keys, number) for number in range(1, count))])
    drawn = jax.vmap(lambda keys: draw_each(networks, settings, logits, keys, places, base.tokens))(keys)  # [R, B, Q]
    drawn = jnp.where(not_given, drawn, base.tokens[:, places]).swapaxes(0, 1)  # [B, R, Q]
    log_q = chosen_of(log_probabilities(settings, logits)[:, None], drawn)

    logits, caches = read(networks, params, base, last_slot, caches, places, drawn)
    logits = guide_each(settings, logits, batch, np.tile(places, count))
    each = log_probabilities(settings, logits)
    log_p = chosen_of(each.reshape(batch, count, size, -1), drawn)
    log_w = jnp.sum((log_p - log_q) * not_given[:, None], axis=-1)  # [B, R]
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, 5), group), (count,)))(base.keys)
    choice = jnp.argmax(log_w + noise, axis=1)[:, None]

    tokens = jnp.take_along_axis(drawn, choice[..., None], axis=1)[:, 0]
    log_mean = (jax.nn.logsumexp(log_w, axis=1) - np.log(count))[:, None] / not_given.sum(axis=1, keepdims=True)
    log_q = jnp.take_along_axis(log_p, choice[..., None], axis=1)[:, 0] - log_mean
    log_q = state.log_q.at[:, places].set(jnp.where(not_given, log_q, jnp.nan))
    slots = base.before + places[0] + jnp.repeat(choice, len(last_slot) // batch, axis=0) * size + np.arange(size)

    def keep(leaf):
        """The slots up to this group's, of which these are the chosen candidate's."""
        own = jnp.take_along_axis(leaf, slots[:, None, :, None], axis=2)
        return leaf[:, :, : base.before + places[-1] + 1].at[:, :, base.before + places].set(own)

    new = {"tokens": base.tokens.at[:, places].set(tokens), "caches": jax.tree.map(keep, caches), "last_slot": last_slot}
    return State(dataclasses.replace(base, calls=base.calls + 2, **new), log_q)


def read(networks, params, base, last_slot, caches, places, drawn):
    """One pass of the known stream over candidates [B, R, Q], which do not see one another: logits [rows, R Q, V], caches."""
    model, (batch, count, size) = networks.transformer.bind({"params": params.transformer.rest}), drawn.shape
    before = jnp.broadcast_to(base.tokens[:, None, max(places[0] - 1, 0), None], (batch, count, 1))
    previous = jnp.concatenate([before, drawn[..., :-1]], axis=-1).reshape(batch, -1)
    x = model.embed(jnp.repeat(previous, len(last_slot) // batch, axis=0))
    x = jnp.where((np.tile(places, count) == 0)[:, None], last_slot, x)
    first, slot = base.before + places[0], np.arange(caches[0].keys.shape[2])
    own, theirs = np.arange(count * size)[:, None], slot - first
    seen = (theirs < 0) | ((theirs // size == own // size) & (theirs <= own))
    rotary = base.before + np.tile(places, count)
    return model.extend(params.transformer.layers, x, caches, first, jnp.asarray(seen)[None], rotary)


def candidate_key(key, number):
    return jax.random.fold_in(jax.random.fold_in(key, 3), number)


def chosen_of(each, tokens):
    """Log probabilities [.., Q] of tokens, of all of them [.., Q, V]."""
    return jnp.take_along_axis(each, tokens[..., None], axis=-1)[..., 0]


def candidates(count, first_too=False):
    """The experiment with so many candidates for each group; first_too: for the first one too."""
    predict = Predictor(begin, functools.partial(group_of, functools.partial(weigh, count), first_too))
    return dataclasses.replace(base_experiment, method=Method(predict=predict))


two, four, experiment, sixteen = candidates(2), candidates(4), candidates(8), candidates(16)
