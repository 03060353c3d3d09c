"""The sampler (paper sections 3.3 and 3.4): groups of tokens are predicted, and each finished group drives denoising.

`generate` runs `advance` over all groups; `stream` yields a preview after each. Both consist of the same compiled pieces, which
the host dispatches without waiting: predicting (one for each length of the cache, so that attention reads only what is
filled), conditioning, one solver step. They are pure, so an outer `jax.jit` over `generate` makes one program of them. With a
mesh of its own for the decoder (see `prepare.separate`) a group is denoised on some devices while the others predict the next.

Everything of sample i follows from its own seed and condition: the same (seed, label, settings) give the same tokens in any
batch and on any number of devices.

Shapes: B batch, T tokens, G groups, Q = T / G tokens per group, S denoising steps, R pixels along a side while denoising,
H W pixels of the result, C channels, E code dimension.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.models.flow import Step
from dar_jax.sampling.denoise import Decoding, begin_decoding, condition, condition_values, denoise, finish, schedule
from dar_jax.sampling.predict import Predictor
from dar_jax.sampling.prepare import SamplerParams, prepare
from dar_jax.sampling.settings import Networks, Settings
from dar_jax.sampling.speculate import speculation


def advance(networks: Networks, params: SamplerParams, settings: Settings, state: "SamplerState") -> "SamplerState":
    """One group: its tokens, their condition tokens, and the denoising steps that these allow."""
    model, group = networks.tokenizer, state.group
    prediction = predictor(networks, settings).group(networks, params, settings, state.prediction, group)
    with params.on_decoder():
        tokens = params.to_decoder(prediction.tokens)
        first = group * model.config.tokens_per_group
        decoding = condition(model, params.decoder, tokens, state.decoding, first)
        for step in steps_of_group(networks, settings, group):
            decoding = denoise(networks, params.decoder, settings.solver, decoding, step)
    return SamplerState(group + 1, prediction, decoding)


def predictor(networks: Networks, settings: Settings) -> Predictor:
    """What finds the tokens: the method's, or with guesses."""
    return speculation(settings.speculate) if settings.speculate else networks.method.predict


def steps_of_group(networks: Networks, settings: Settings, group: int) -> list[Step]:
    """The denoising steps that the tokens of a group allow: one in the paper's setting, elsewhere several or none."""
    plan = schedule(networks.tokenizer, settings.times)
    return plan.steps[max(plan.ready[group], settings.start_step) : plan.ready[group + 1]]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["prediction", "decoding"], meta_fields=["group"])
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """The state of sampling after `group` groups. `prediction` is the predictor's state, which has `tokens` [B, T]."""

    group: int
    prediction: Any
    decoding: Decoding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """tokens [B, n] int32 of the finished groups, images [B, H, W, C] float32 in about [-1, 1], and, where asked for, the
    previews [groups or steps, B, H, W, C] whose last one is the image. calls [B] int32: the passes of the transformer."""

    tokens: Array
    images: Array
    previews: Array | None = None
    calls: Array | None = None


def begin(
    networks: Networks,
    params: SamplerParams,
    settings: Settings,
    condition: Any,
    seeds: Array,
    prefix: Array | None = None,
    num_given: np.ndarray | None = None,
    image: Array | None = None,
    observed: Any = None,
    noise_seeds: Array | None = None,
) -> SamplerState:
    """The state before the first group.

    Args:
      params: of `prepare`.
      condition: what the transformer is conditioned on, a tree of arrays with the batch first; labels [B] int32 by default.
      seeds: [B] integers in [0, 2**32).
      prefix: [B, k] int32 tokens to start from, k up to T (layout control: those of a reference image).
      num_given: int32 [B] on the host, how many of the prefix's tokens hold for each sample (default: all k).
      image: [B, R, R, C] float32 in [-1, 1] to start from at `settings.start_step` (default: noise).
      observed: what `Method.steer` is given, a tree of arrays with the batch first.
      noise_seeds: [B], of the noise and of the solver's randomness, while the tokens follow from `seeds` (default: those).
    """
    prediction = predictor(networks, settings).begin(networks, params, settings, condition, seeds, prefix, num_given)
    with params.on_decoder():
        noise_seeds = seeds if noise_seeds is None else noise_seeds
        noise_seeds, image, observed = params.to_decoder((noise_seeds, image, observed))
        t = schedule(networks.tokenizer, settings.times).times[settings.start_step]
        decoding = begin_decoding(networks, settings.solver, noise_seeds, image, observed, t=t)
    return SamplerState(0, prediction, decoding)


def generate(
    networks: Networks,
    params: dict | SamplerParams,
    settings: Settings,
    condition: Any,
    seeds: Array,
    *,
    previews: bool = False,
    **options: Any,
) -> Samples:
    """Complete images.

    Args:
      params: {"tokenizer": ..., "transformer": ...}, or the result of `prepare`, which saves doing it in every call.
      previews: keep the preview after every group too.
      options: `prefix`, `num_given`, `image`, `observed` and `noise_seeds` of `begin`, as the arguments before.
    """
    params, shown = _prepared(networks, params), []
    for state in _groups(networks, params, settings, condition, seeds, **options):
        if previews:
            shown.append(snapshot(networks, params, state).images)
    samples = snapshot(networks, params, state)
    with params.on_decoder():
        return dataclasses.replace(samples, previews=jnp.stack(shown) if previews else None)


def stream(
    networks: Networks, params: dict | SamplerParams, settings: Settings, condition: Any, seeds: Array, **options: Any
) -> Iterator[Samples]:
    """Yields `Samples` as each group ends: the tokens so far and the preview; the last one is what `generate` returns.

    Arguments as of `generate`. The next group is dispatched before the one before is handed out, so that a caller who looks
    at a preview does not keep the device waiting.
    """
    params, waiting = _prepared(networks, params), None
    for state in _groups(networks, params, settings, condition, seeds, **options):
        if waiting is not None:
            yield waiting
        waiting = snapshot(networks, params, state)
    yield waiting


def decode(
    networks: Networks,
    params: dict | SamplerParams,
    settings: Settings,
    values: Array,
    seeds: Array,
    image: Array | None = None,
    observed: Any = None,
    noise: Array | None = None,
    previews: bool = False,
) -> Samples:
    """Images of given tokens, without the transformer.

    Args:
      params: as of `generate`; the transformer's are not read.
      values: [B, T, E] float32, the quantizer's, also of codes (`lookup_codes`).
      seeds: [B] integers, of all that is random.
      image, observed: as of `begin`.
      noise: [B, R, R, C] to start from in place of that of the seeds.
      previews: keep the preview after every denoising step too (from `start_step` 0 on).

    Returns: Samples without tokens.
    """
    params, model, shown = _prepared(networks, params), networks.tokenizer, []
    with params.on_decoder():
        values, seeds, image, observed, noise = params.to_decoder((values, seeds, image, observed, noise))
        plan = schedule(model, settings.times)
        t = plan.times[settings.start_step]
        decoding = begin_decoding(networks, settings.solver, seeds, image, observed, noise, t)
        decoding = condition_values(model, params.decoder, values, decoding, jnp.int32(0))
        for step in plan.steps[: plan.ready[settings.num_groups]]:
            if step.index >= settings.start_step:
                decoding = denoise(networks, params.decoder, settings.solver, decoding, step)
            if previews:
                shown.append(finish(model, decoding.preview))
        tokens = jnp.zeros((len(values), 0), jnp.int32)
        return Samples(tokens, finish(model, decoding.preview), jnp.stack(shown) if previews else None)


def regroup(states: Sequence[SamplerState], rows: Array | np.ndarray) -> SamplerState:
    """Samples of several states after the same group as one state, to go on together, or some of them alone.

    Args: rows [n] integers, which samples, counted over all states in turn; they may repeat.

    Raises ValueError for states of different forms, see `form`.
    """
    if len({form(state) for state in states}) != 1:
        raise ValueError("the states differ in more than their samples")
    return jax.device_put(_regroup(tuple(states), np.asarray(rows)), jax.tree.map(lambda leaf: leaf.sharding, states[0]))


def form(state: SamplerState) -> tuple[Any, ...]:
    """All of a state but its samples and their number: the structure, with the group, and the shapes. For `regroup`."""
    batch, leaves = len(state.prediction.tokens), jax.tree.leaves(state)
    return jax.tree.structure(state), *((leaf.shape[0] / batch, leaf.shape[1:], leaf.dtype) for leaf in leaves)


@functools.partial(jax.jit, static_argnums=0)
def lookup_codes(networks: Networks, params: dict, codes: Array) -> Array:
    """codes [B, n] int32 -> their values [B, n, E] float32."""
    return networks.tokenizer.apply({"params": params["tokenizer"]}, codes, method="lookup")


def _groups(
    networks: Networks, params: SamplerParams, settings: Settings, *start: Any, **options: Any
) -> Iterator[SamplerState]:
    """The state after each group; arguments as of `begin`."""
    state = begin(networks, params, settings, *start, **options)
    for _ in range(settings.num_groups):
        state = advance(networks, params, settings, state)
        yield state


def _prepared(networks: Networks, params: dict | SamplerParams) -> SamplerParams:
    return params if isinstance(params, SamplerParams) else prepare(networks, params)


def snapshot(networks: Networks, params: SamplerParams, state: SamplerState) -> Samples:
    """The tokens so far and the preview."""
    tokens = state.prediction.tokens[:, : state.group * networks.tokenizer.config.tokens_per_group]
    with params.on_decoder():
        return Samples(tokens, finish(networks.tokenizer, state.decoding.preview), calls=state.prediction.calls)


@jax.jit
def _regroup(states: tuple[SamplerState, ...], rows: Array) -> SamplerState:
    batches = [len(state.prediction.tokens) for state in states]

    def chosen(*leaves: Array) -> Array:  # [B, ...], or [2B, ...] where a sample has two rows of a guided cache
        each = leaves[0].shape[0] // batches[0]
        samples = [leaf.reshape(batch, each, *leaf.shape[1:]) for leaf, batch in zip(leaves, batches)]
        together = jnp.concatenate(samples)[rows]
        return together.reshape(len(rows) * each, *together.shape[2:])

    return jax.tree.map(chosen, *states)
