"""The best of several beginnings: a sample's first groups are drawn N times, one is chosen, and only that one goes on.

Source:   HEX (arXiv 2510.05040) lets a language model decode one prompt along many paths and takes the majority's answer.
          Images have no answers that could be equal; what is left is to judge several paths, here after the first group.
Command:  dar-jax sample runs/digits --experiment experiments/variants/early_choice.py --guidance 1 --labels 3 --seeds 1,2 \
              --out samples          (any transformer's run; nothing is trained). :likelihood, :typical, :preview choose else.
Differs:  in how a sample begins (`Method.predict`).
Time:     with N candidates for n of G groups (N n + G - n) / G of the transformer's work, and one pass that scores them.
Result:   more variety than guidance of that accuracy: digits by likelihood (99.2 %, three trainings; evidence is level),
          Fashion-MNIST by evidence (90.4 %, three trainings, at 0.7 of guidance's cost). See docs/variants.md.

Candidate 0 is the base's own beginning, candidate r has keys of its own, also for what follows. Scores: `evidence`, how much
likelier the tokens are with the class than without; `likelihood`, their probability (HEX found it worse than chance);
`typical`, how near their surprise is to what is expected; `preview`, by a function of the preview image, here a linear reader
of digits. The first preview is handed out only after the choice. `calls` counts the passes of all candidates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.errors import require
from dar_jax.experiment import Experiment
from dar_jax.models.pixels import to_float
from dar_jax.quickstart import DIGITS, TRANSFORMER, digits
from dar_jax.sampling.denoise import begin_decoding
from dar_jax.sampling.predict import Predictor, token_by_token, with_null
from dar_jax.sampling.sampler import SamplerState, advance
from dar_jax.sampling.settings import Method


class Choice(NamedTuple):
    candidates: int
    groups: int
    score: Callable  # (networks, params, settings, state after these groups, groups, seeds) -> [rows], the best has the most
    passes: int = 1  # of the transformer that the score takes


def candidate_keys(seeds, count):
    """The keys of `count` candidates of each seed, in turn: [B count]."""

    def of_seed(seed):
        own = jax.random.key(seed)
        others = jax.vmap(lambda number: jax.random.fold_in(jax.random.fold_in(own, 3), number))(jnp.arange(1, count))
        return jnp.concatenate([own[None], others])

    return jax.vmap(of_seed)(seeds).reshape(-1)


@functools.partial(jax.jit, static_argnums=2)
def take(state, rows, total):
    """Some samples of a state of `total` samples; a guided one has two rows in each cache."""

    def leaf(x):
        each = len(x) // total
        return x.reshape(total, each, *x.shape[1:])[rows].reshape(len(rows) * each, *x.shape[1:])

    return jax.tree.map(leaf, state)


def begin(choice, networks, params, settings, condition, seeds, prefix=None, num_given=None):
    """A state of `token_by_token` in which the first groups are done."""
    count, batch = choice.candidates, len(seeds)
    groups = min(choice.groups, settings.num_groups)

    def each(tree):
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), tree)

    of_rows = each(settings) if settings.scales.ndim == 2 else settings  # settings of each sample
    given = None if num_given is None else np.repeat(num_given, count)
    state = token_by_token.begin(networks, params, of_rows, each(condition), each(seeds), each(prefix), given)
    state = dataclasses.replace(state, keys=candidate_keys(seeds, count))
    for group in range(groups):
        state = token_by_token.group(networks, params, of_rows, state, group)
    scores = choice.score(networks, params, of_rows, state, groups, each(seeds)).reshape(batch, count)
    best = jnp.argmax(scores, axis=1) + count * jnp.arange(batch)  # the first of equal ones
    done = max(state.done, groups * networks.tokenizer.config.tokens_per_group)
    calls = count * (state.calls + choice.passes)
    return dataclasses.replace(take(dataclasses.replace(state, calls=calls), best, batch * count), done=done)


@functools.partial(jax.jit, static_argnums=(0, 3))
def log_probabilities(networks, params, state, count):
    """The log-probability of the first tokens with the condition and without, and its expected value: two arrays [rows, 2]."""
    bound = networks.transformer.bind({"params": params.transformer.rest})
    tokens = jnp.repeat(state.tokens[:, :count], 2, axis=0)
    x = jnp.concatenate([bound.prefix(with_null(bound, state.condition)), bound.embed(tokens[:, :-1])], axis=1)
    logits, _ = bound.extend(params.transformer.layers, x, bound.empty_caches(len(x), x.shape[1]), jnp.int32(0))
    each = jax.nn.log_softmax(logits[:, -count:])
    expected = jnp.sum(jnp.exp(each) * each, axis=(1, 2))
    of_tokens = jnp.take_along_axis(each, tokens[..., None], axis=-1).sum(axis=(1, 2))
    return of_tokens.reshape(-1, 2), expected.reshape(-1, 2)


def by_tokens(score):
    """`score` of the two arrays of `log_probabilities`."""
    return lambda networks, params, settings, state, groups, seeds: score(
        *log_probabilities(networks, params, state, groups * networks.tokenizer.config.tokens_per_group)
    )


evidence = by_tokens(lambda found, expected: found[:, 0] - found[:, 1])
likelihood = by_tokens(lambda found, expected: found[:, 0])
typical = by_tokens(lambda found, expected: -jnp.abs(found[:, 0] - expected[:, 0]))
already_drawn = Predictor(token_by_token.begin, lambda networks, params, settings, state, group: state)


def by_preview(judge):
    """`judge` of the previews [rows, H, W, C] in about [-1, 1] and the condition, after the first groups: [rows]."""

    def score(networks, params, settings, state, groups, seeds):
        require(params.decoder_mesh is None, "previews are judged where tokens are predicted; leave out --decoder-mesh")
        networks = dataclasses.replace(networks, method=dataclasses.replace(networks.method, predict=already_drawn))
        now = SamplerState(0, state, begin_decoding(networks, settings.solver, seeds))
        for _ in range(groups):
            now = advance(networks, params, settings, now)
        return judge(now.decoding.preview, state.condition)

    return score


@functools.cache
def reader():
    """A linear classifier of the real digits: weights [10, 64] and biases [10]."""
    from sklearn.linear_model import LogisticRegression

    images, labels = digits("train")
    fitted = LogisticRegression(max_iter=1000).fit(np.asarray(to_float(images)).reshape(len(images), -1), labels)
    return fitted.coef_, fitted.intercept_


def read_digit(images, labels):
    weights, biases = reader()
    logits = images.reshape(len(images), -1) @ weights.T + biases
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]


def best_of(candidates, groups, score, passes=1):
    choice = Choice(candidates, groups, score, passes)
    method = Method(predict=Predictor(functools.partial(begin, choice), token_by_token.group))
    return Experiment(dataclasses.replace(TRANSFORMER, name="early_choice", data=DIGITS), method=method)


experiment, two, eight = (best_of(count, 1, evidence) for count in (4, 2, 8))
preview, likelihood, typical = best_of(4, 1, by_preview(read_digit), 0), best_of(4, 1, likelihood), best_of(4, 1, typical)
