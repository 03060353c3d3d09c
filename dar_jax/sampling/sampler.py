"""The sampler (paper sections 3.3 and 3.4): groups of tokens are predicted, and each finished group drives denoising.

One function, `advance`, carries a `SamplerState` on by one group: the transformer predicts its Q tokens, the token decoder
turns them into condition tokens, and the solver takes the denoising steps they allow. `generate` runs it over all groups;
`stream` yields a preview after each. Both consist of the same compiled pieces, which the host dispatches without waiting:
predicting (one for each length of the cache, so that attention reads only what is filled), conditioning, one solver step.
They are pure, so an outer `jax.jit` over `generate` makes one program of them. With a mesh of its own for the decoder (see
`separate`) a group is denoised on some devices while the others predict the next one.

Everything of sample i follows from its own seed and label: the same (seed, label, settings) give the same tokens in any
batch and on any number of devices.

Shapes: B batch, T tokens, G groups, Q = T / G tokens per group, S denoising steps, R pixels along a side while denoising,
H W pixels of the result, C channels, D width, E code dimension, L layers.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from dar_jax.models import flow
from dar_jax.parallel import batch_sharding
from dar_jax.sampling.denoise import Decoding, _condition, _denoise, _finish, begin_decoding, initial_noise
from dar_jax.sampling.predict import Prediction, begin_prediction, predict_group
from dar_jax.sampling.prepare import SamplerParams, prepare
from dar_jax.sampling.settings import Networks, Settings


@functools.partial(jax.tree_util.register_dataclass, data_fields=["prediction", "decoding"], meta_fields=["group"])
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Where sampling stands after `group` groups."""

    group: int
    prediction: Prediction
    decoding: Decoding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """tokens [B, n] int32 of the finished groups, images [B, H, W, C] float32 in about [-1, 1], and, where asked for, the
    previews [groups or steps, B, H, W, C] whose last one is the image."""

    tokens: Array
    images: Array
    previews: Array | None


def begin(
    networks: Networks,
    params: SamplerParams,
    settings: Settings,
    labels: Array,
    seeds: Array,
    prefix: Array | None = None,
    num_given: Array | None = None,
    image: Array | None = None,
) -> SamplerState:
    """The state before the first group.

    Args:
      params: of `prepare`.
      labels, seeds: [B] integers.
      prefix: [B, n] int32 tokens to start from, n up to T (layout control: those of a reference image).
      num_given: [B] int32, how many of the prefix's tokens hold for each sample (default: all n).
      image: [B, R, R, C] float32 in [-1, 1] to start from at `settings.start_step` (default: noise).
    """
    prediction = begin_prediction(networks.llama, settings, labels, seeds, prefix, num_given)
    with _on(params.decoder_mesh):
        seeds, image = _moved((seeds, image), params.decoder_mesh)
        noise = initial_noise(seeds, networks.tokenizer.config)
        decoding = begin_decoding(networks.tokenizer, params.decoder, settings, noise, image)
    return SamplerState(0, prediction, decoding)


def advance(networks: Networks, params: SamplerParams, settings: Settings, state: SamplerState) -> SamplerState:
    """Carries the state on by one group: Q tokens, their condition tokens, and the denoising steps these allow."""
    config = networks.tokenizer.config
    prediction = predict_group(networks, params, settings, state.prediction, state.group)
    with _on(params.decoder_mesh):
        tokens = _moved(prediction.tokens, params.decoder_mesh)
        decoding = _condition(networks.tokenizer, params.decoder, tokens, state.decoding, state.group * config.tokens_per_group)
        # One step a group in the paper's setting; other step counts and group sizes leave several, or none, to a group.
        ready = flow.steps_ready(settings.num_steps, config)
        for index in range(max(ready[state.group], settings.start_step), ready[state.group + 1]):
            decoding = _denoise(networks.tokenizer, params.decoder, settings, decoding, jnp.int32(index))
    return SamplerState(state.group + 1, prediction, decoding)


def generate(
    networks: Networks,
    params: dict | SamplerParams,
    settings: Settings,
    labels: Array,
    seeds: Array,
    prefix: Array | None = None,
    num_given: Array | None = None,
    image: Array | None = None,
    previews: bool = False,
) -> Samples:
    """Whole images.

    Args:
      params: {"tokenizer": ..., "llama": ...}, or what `prepare` made of them, which saves doing it in every call.
      previews: whether to keep the preview after every group.
      The others are those of `begin`.
    """
    params, shown = _prepared(networks, params), []
    for state in _groups(networks, params, settings, labels, seeds, prefix, num_given, image):
        if previews:
            shown.append(_snapshot(networks, params, state).images)
    samples = _snapshot(networks, params, state)
    with _on(params.decoder_mesh):
        return dataclasses.replace(samples, previews=jnp.stack(shown) if previews else None)


def stream(
    networks: Networks,
    params: dict | SamplerParams,
    settings: Settings,
    labels: Array,
    seeds: Array,
    prefix: Array | None = None,
    num_given: Array | None = None,
    image: Array | None = None,
) -> Iterator[Samples]:
    """Yields `Samples` as each group ends: the tokens so far and the preview; the last one is what `generate` returns.

    Arguments as of `generate`. The next group is dispatched before the one before is handed out, so that a caller who looks
    at a preview does not keep the device waiting.
    """
    params, waiting = _prepared(networks, params), None
    for state in _groups(networks, params, settings, labels, seeds, prefix, num_given, image):
        if waiting is not None:
            yield waiting
        waiting = _snapshot(networks, params, state)
    yield waiting


def decode(
    networks: Networks,
    params: dict | SamplerParams,
    settings: Settings,
    values: Array,
    noise: Array,
    image: Array | None = None,
    previews: bool = False,
) -> Samples:
    """Images of given tokens, without the transformer.

    Args:
      params: as of `generate`; `llama` is not read.
      values: [B, T, E] float32, what the quantizer returns, or the codebook's rows of given codes (`lookup_codes`).
      noise: [B, R, R, C] standard normal, of `initial_noise` say.
      image: [B, R, R, C] float32 in [-1, 1] to start from at `settings.start_step` (default: noise).
      previews: whether to keep the preview after every denoising step (from `start_step` 0 on).

    Returns: Samples without tokens.
    """
    params, model, shown = _prepared(networks, params), networks.tokenizer, []
    with _on(params.decoder_mesh):
        values, noise, image = _moved((values, noise, image), params.decoder_mesh)
        decoding = begin_decoding(model, params.decoder, settings, noise, image, values)
        for index in range(flow.steps_ready(settings.num_steps, model.config)[settings.num_groups]):
            if index >= settings.start_step:
                decoding = _denoise(model, params.decoder, settings, decoding, jnp.int32(index))
            if previews:
                shown.append(_finish(model, decoding.preview))
        tokens = jnp.zeros((len(values), 0), jnp.int32)
        return Samples(tokens, _finish(model, decoding.preview), jnp.stack(shown) if previews else None)


@functools.partial(jax.jit, static_argnums=0)
def lookup_codes(networks: Networks, params: dict, codes: Array) -> Array:
    """codes [B, n] int32 -> the codebook's rows [B, n, E] float32."""
    return networks.tokenizer.apply({"params": params["tokenizer"]}, codes, method="lookup")


# --- the pieces ------------------------------------------------------------------------------------------------------------


def _groups(networks, params, settings, labels, seeds, prefix, num_given, image) -> Iterator[SamplerState]:
    """The state after each group."""
    state = begin(networks, params, settings, labels, seeds, prefix, num_given, image)
    for _ in range(settings.num_groups):
        state = advance(networks, params, settings, state)
        yield state


def _prepared(networks: Networks, params: dict | SamplerParams) -> SamplerParams:
    return params if isinstance(params, SamplerParams) else prepare(networks, params)


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Enters the mesh, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _moved(batch: Any, mesh: Mesh | None) -> Any:
    """A batch, or a tree of them, on the mesh, if there is one."""
    return batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))


def _snapshot(networks: Networks, params: SamplerParams, state: SamplerState) -> Samples:
    tokens = state.prediction.tokens[:, : state.group * networks.tokenizer.config.tokens_per_group]
    with _on(params.decoder_mesh):
        return Samples(tokens, _finish(networks.tokenizer, state.decoding.preview), None)
