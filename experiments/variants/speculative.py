"""Lossless speculation with common noise: the very tokens of one by one, for every seed, in fewer passes of the transformer.

Source:   Jacobi decoding with fixed noise (MC-SJD, arXiv 2510.24211) and drafter-invariant speculation (arXiv 2408.07978).
Command:  dar-jax sample runs/digits --experiment experiments/variants/speculative.py --labels 3 --seeds 1,2
          (any transformer's run will do; nothing is trained). With a small network that drafts:
          dar-jax train experiments/variants/speculative.py:draft --tokenizer runs/digits/tokenizer --workdir runs/draft
          dar-jax sample runs/digits --experiment experiments/variants/speculative.py:small --labels 3 --seeds 1,2
Differs:  in how tokens are found (`Method.predict`).
Time:     the drafter trains in half a minute on two CPU cores.
Result:   9.6 of 16 passes for the digits (guidance 2), the same tokens; 8.6 with the drafter. See docs/variants.md.

A token is the argmax of logits plus noise that belongs to its seed and position. W guesses are scored in one pass, each drawn
again with its own noise: draws are right up to and including the first that differs from its guess, because only right tokens
came before it. The other draws are the next guesses (`jacobi`), or another transformer (`small`), with the same noise, makes
them, or masks behind the window draw those after it (`masks`, with a network that has them, see block_diffusion.py). Tokens of
a reference, given as `prefix` beyond `num_given`, are the first guesses. Windows cross the borders of groups; a group waits for
the slowest sample of the batch, while the others go on.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.experiment import Experiment
from dar_jax.models.attention import causal_mask
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.predict import Prediction, Predictor, draw_each, grown, token_by_token
from dar_jax.sampling.settings import Method


class State(NamedTuple):
    base: Prediction  # its caches have room for a window beyond the last token
    draft: Prediction | None
    tokens: Any  # [B, T + W] int32, first final ones, then guesses
    final: Any  # [B] int32, how many are final
    calls: Any  # [B] int32, passes that each sample has needed


def drafter(networks, params):
    """The networks and parameters with the small transformer in place of the large one."""
    small = dataclasses.replace(networks, transformer=networks.others["draft"])
    return small, dataclasses.replace(params, transformer=params.others["draft"])


def begin(window, small, masks, networks, params, *arguments):
    room = window + masks

    def begin_with_room(networks, params):
        start = token_by_token.begin(networks, params, *arguments)
        return dataclasses.replace(start, caches=grown(start.caches, start.before + start.tokens.shape[1] + room))

    base = begin_with_room(networks, params)
    draft = begin_with_room(*drafter(networks, params)) if small else None
    final = jnp.full(len(base.tokens), base.done, jnp.int32)
    return State(base, draft, jnp.pad(base.tokens, ((0, 0), (0, room))), final, jnp.zeros_like(final))


def draw(networks, params, settings, state, caches, tokens, places, masks=0):
    """The tokens at consecutive places [B, n] of each row, drawn in one pass given those before: [B, n], and the caches. The
    last `masks` places are a block, which the others do not see; of the tokens in its slots only the first is known."""
    bound = networks.transformer.bind({"params": params.transformer.rest})
    rows = len(state.last_slot) // len(tokens)  # 2 while guided
    previous = jnp.repeat(jnp.take_along_axis(tokens, jnp.maximum(places - 1, 0), axis=1), rows, axis=0)
    x = jnp.where(jnp.repeat(places, rows, axis=0)[..., None] == 0, state.last_slot, bound.embed(previous))
    slots = state.before + jnp.repeat(places[:, 0], rows)
    count, span, mask = places.shape[1], caches[0].keys.shape[2], None
    if masks:
        from_block = np.arange(count) - (count - masks)  # 0 at its first slot
        x = bound.masked(x, from_block > 0)
        in_block = (from_block >= 0)[:, None] & (jnp.arange(span) < (slots + count)[:, None, None])
        mask = causal_mask(count, span, slots) | in_block
    logits, caches = bound.extend(params.transformer.layers, x, caches, slots, mask)
    tokens_drawn = draw_each(networks, settings, logits, state.keys, places, tokens)
    given = places < state.num_given[:, None]
    return jnp.where(given, jnp.take_along_axis(tokens, places, axis=1), tokens_drawn), caches


def put(tokens, places, new):
    return jax.vmap(lambda row, place, values: row.at[place].set(values))(tokens, places, new)


def unguided(state):
    """The state without the rows of the null condition."""
    caches = grown(state.caches, state.caches[0].keys.shape[2], halved=True)
    return dataclasses.replace(state, caches=caches, last_slot=state.last_slot[::2])


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 7))
def predict(window, small, masks, networks, params, settings, state, group):
    per_group = networks.tokenizer.config.tokens_per_group
    end, total = (group + 1) * per_group, settings.num_groups * per_group
    base, draft = state.base, state.draft
    if group * per_group >= settings.guided and len(base.last_slot) > len(state.tokens):
        base, draft = unguided(base), draft and unguided(draft)

    def draft_window(tokens, caches, final):
        def step(carry, offset):
            tokens, caches = carry
            places = final[:, None] + offset
            new, caches = draw(*drafter(networks, params), settings, draft, caches, tokens, places)
            return (put(tokens, places, new), caches), None

        return jax.lax.scan(step, (tokens, caches), jnp.arange(window))[0]

    def one_pass(carry):
        caches, draft_caches, tokens, final, calls = carry
        if small:
            tokens, draft_caches = draft_window(tokens, draft_caches, final)
        places = final[:, None] + jnp.arange(window + masks)
        new, caches = draw(networks, params, settings, base, caches, tokens, places, masks)
        same = (new == jnp.take_along_axis(tokens, places, axis=1))[:, : window - 1]
        right = 1 + jnp.cumprod(same, axis=1).sum(axis=1)  # the first that differs is right too
        final_then = jnp.minimum(final + right, tokens.shape[1] - window - masks)
        return caches, draft_caches, put(tokens, places, new), final_then, calls + (final < total)

    start = (base.caches, draft and draft.caches, state.tokens, state.final, state.calls)
    caches, draft_caches, *rest = jax.lax.while_loop(lambda carry: jnp.any(carry[3] < end), one_pass, start)
    draft = draft and dataclasses.replace(draft, caches=draft_caches)
    return State(dataclasses.replace(base, caches=caches), draft, *rest)


def speculation(window, small=False, masks=0):
    """How tokens are found with `window` guesses a pass, at most the number of tokens, and a block of `masks` behind them."""
    drafts = window, small, masks
    return Method(predict=Predictor(functools.partial(begin, *drafts), functools.partial(predict, *drafts)))


config = dataclasses.replace(TRANSFORMER, name="speculative", data=DIGITS)
experiment = Experiment(config, method=speculation(8))
small = Experiment(config, method=speculation(8, small=True), others={"draft": "runs/draft"})
masks = Experiment(config, method=speculation(8, masks=8))
draft = Experiment(dataclasses.replace(config, name="draft", model=dataclasses.replace(config.model, layers=1)))
