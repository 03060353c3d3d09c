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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dar_jax import flow, llama
from dar_jax.config import SamplingConfig, TokenizerConfig, checked
from dar_jax.errors import InputError
from dar_jax.layers import Array, Cache, constrain, resize_bicubic, unstack
from dar_jax.llama import Llama
from dar_jax.parallel import batch_sharding, shardings
from dar_jax.sampling.logits import draw, guide, linear_guidance
from dar_jax.tokenizer import token_decoder
from dar_jax.tokenizer.tokenizer import Tokenizer
from dar_jax.tokenizer.velocity import embed_times

GuidanceSchedule = Callable[[int, float, float], Array | np.ndarray]  # (T, first, last) -> scale of each token [T]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of both stages; `llama` is None where codes are given. Their parameters go beside them as a dict
    {"tokenizer": ..., "llama": ...}."""

    tokenizer: Tokenizer
    llama: Llama | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unstacked:
    """Parameters of a network that runs piece by piece: one tree for each layer of its blocks, and all the others."""

    rest: Any
    layers: tuple[Any, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["decoder", "llama"], meta_fields=["decoder_mesh"])
@dataclasses.dataclass(frozen=True)
class SamplerParams:
    """Parameters as the sampler reads them, see `prepare` and `separate`."""

    decoder: Unstacked  # the tokenizer without its encoder; the layers are the token decoder's
    llama: Unstacked | None  # None where codes are given
    decoder_mesh: Mesh | None = None  # None: the decoder is where the transformer is


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "temperature", "top_k", "top_p"],
    meta_fields=["guided", "solver", "num_steps", "start_step", "num_groups"],
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """What `SamplingConfig` means for given networks. Arrays may change without a new compilation.

    scales [T] guidance of each token, of which none after the first `guided` exceeds 1, so that these need no unguided row;
    temperature (None: greedy); top_k, top_p (None: off); solver; num_steps S; start_step, the first denoising step; num_groups,
    after which sampling stops.
    """

    scales: Array
    guided: int
    temperature: Array | None
    top_k: Array | None
    top_p: Array | None
    solver: str
    num_steps: int
    start_step: int
    num_groups: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """How far the transformer is. Its caches grow with the groups."""

    labels: Array  # [B] int32
    keys: Array  # [B] PRNG keys
    tokens: Array  # [B, T] int32; those not yet predicted are 0 or given
    num_given: Array  # [B] int32, how many first tokens are given instead of predicted
    caches: tuple[Cache, ...]  # guided: rows 2i and 2i + 1 are sample i with its label and with the null class


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoding:
    """How far the decoder is."""

    caches: tuple[Cache, ...]
    condition: Array  # [B, T, D] float32 condition tokens, zero where not yet known
    time_table: Array | None  # [S, L, 1, D], of `embed_times`
    x: Array  # [B, R, R, C] float32, the ODE's state
    velocity: Array  # [B, R, R, C] float32, of the last step
    preview: Array  # [B, R, R, C] float32 in [-1, 1], the jump estimate of the last step; after the last group, the image


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


def make_settings(config: SamplingConfig, tokenizer: TokenizerConfig, guidance: GuidanceSchedule = linear_guidance) -> Settings:
    """Checks a `SamplingConfig` against the tokenizer and makes the sampler's settings of it.

    Raises: InputError for values out of range.
    """
    checked(SamplingConfig, config)
    num_steps = config.num_denoising_steps or tokenizer.num_denoising_steps
    num_groups = config.num_groups or tokenizer.num_groups
    checks = [
        (num_groups <= tokenizer.num_groups, f"num_groups is {num_groups}, it should be 1 .. {tokenizer.num_groups}"),
        (config.start_step < num_steps, f"start_step is {config.start_step}, it should be 0 .. {num_steps - 1}"),
    ]
    for holds, message in checks:
        if not holds:
            raise InputError(message)
    scales = np.asarray(guidance(tokenizer.num_tokens, *config.guidance), np.float32)
    if config.cfg_interval >= 0:
        scales = np.where(np.arange(tokenizer.num_tokens) > config.cfg_interval + 1, 1, scales).astype(np.float32)
    return Settings(
        scales=jnp.asarray(scales),
        guided=int(np.max(np.nonzero(scales > 1)[0], initial=-1)) + 1,
        temperature=jnp.float32(config.temperature) if config.temperature > 0 else None,
        top_k=jnp.int32(config.top_k) if config.top_k > 0 else None,
        top_p=jnp.float32(config.top_p) if config.top_p < 1 else None,
        solver=config.solver,
        num_steps=num_steps,
        start_step=config.start_step,
        num_groups=num_groups,
    )


# Leaves of the parameters that are matrix products' operands or rows looked up in the compute dtype.
MATRICES = ("kernel", "output", "class_table", "token_table")


@functools.partial(jax.jit, static_argnums=0)
def prepare(networks: Networks, params: dict) -> SamplerParams:
    """Parameters {"tokenizer": ..., "llama": ...} as the sampler reads them.

    The matrices (see `MATRICES`) get the dtype in which they are multiplied, so that no token converts them again.
    """

    def cast(tree: Any, dtype: jnp.dtype) -> Any:
        def leaf(path: tuple, x: Array) -> Array:
            return x.astype(dtype) if path[-1].key in MATRICES else x

        return jax.tree_util.tree_map_with_path(leaf, tree)

    def take_apart(tree: dict, layers: int) -> tuple[dict, tuple[Any, ...]]:
        rest = {name: value for name, value in tree.items() if name != "blocks"}
        return rest, unstack(tree["blocks"], layers)

    model, llama_params = networks.tokenizer, None
    tokenizer = {name: value for name, value in params["tokenizer"].items() if name != "encoder"}
    tokenizer |= {name: cast(tokenizer[name], model.dtype) for name in ("token_decoder", "velocity")}
    tokenizer["token_decoder"], layers = take_apart(tokenizer["token_decoder"], model.config.decoder_layers)
    if networks.llama is not None:
        matrices = cast(params["llama"], networks.llama.dtype)
        llama_params = Unstacked(*take_apart(matrices, networks.llama.config.layers))
    return SamplerParams(Unstacked(tokenizer, layers), llama_params)


def separate(params: SamplerParams, mesh: Mesh) -> SamplerParams:
    """The same with the decoder on a mesh of its own: there a group is denoised while the next one is predicted.

    The meshes are of one process; a batch is cut over the devices of either.
    """
    decoder = jax.device_put(params.decoder, shardings(params.decoder, mesh))
    return dataclasses.replace(params, decoder=decoder, decoder_mesh=mesh)


def sample_keys(seeds: Array) -> Array:
    """One key per sample: [B] integers -> [B] PRNG keys."""
    return jax.vmap(jax.random.key)(seeds)


@functools.partial(jax.jit, static_argnums=1)
def initial_noise(seeds: Array, tokenizer: TokenizerConfig) -> Array:
    """Standard normal [B, R, R, C] float32, image i from seed i alone."""
    shape = (tokenizer.resolution, tokenizer.resolution, tokenizer.channels)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(sample_keys(seeds))


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
    prediction = _begin_prediction(networks.llama, settings, labels, seeds, prefix, num_given)
    with _on(params.decoder_mesh):
        seeds, image = _moved((seeds, image), params.decoder_mesh)
        noise = initial_noise(seeds, networks.tokenizer.config)
        decoding = _begin_decoding(networks.tokenizer, params.decoder, settings, noise, image)
    return SamplerState(0, prediction, decoding)


def advance(networks: Networks, params: SamplerParams, settings: Settings, state: SamplerState) -> SamplerState:
    """Carries the state on by one group: Q tokens, their condition tokens, and the denoising steps these allow."""
    config = networks.tokenizer.config
    prediction = predict_group(networks, params, settings, state)
    with _on(params.decoder_mesh):
        tokens = _moved(prediction.tokens, params.decoder_mesh)
        decoding = _condition(networks.tokenizer, params.decoder, tokens, state.decoding, state.group * config.tokens_per_group)
        # One step a group in the paper's setting; other step counts and group sizes leave several, or none, to a group.
        ready = flow.steps_ready(settings.num_steps, config)
        for index in range(max(ready[state.group], settings.start_step), ready[state.group + 1]):
            decoding = _denoise(networks.tokenizer, params.decoder, settings, decoding, jnp.int32(index))
    return SamplerState(state.group + 1, prediction, decoding)


def predict_group(networks: Networks, params: SamplerParams, settings: Settings, state: SamplerState) -> Prediction:
    """Predicts the tokens of the next group."""
    config, prediction = networks.tokenizer.config, state.prediction
    first, last = state.group * config.tokens_per_group, (state.group + 1) * config.tokens_per_group
    for start, stop in _spans(first, last, settings.guided):
        sizes = stop - start, _window(config, stop), start < settings.guided
        prediction = _predict(networks.llama, *sizes, params.llama, settings, prediction, jnp.int32(start))
    return prediction


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
        decoding = _begin_decoding(model, params.decoder, settings, noise, image, values)
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

WINDOWS = 8  # lengths of the cache, at most, each of which is compiled


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


def _spans(first: int, last: int, guided: int) -> list[tuple[int, int]]:
    """The tokens of a group, cut where guidance ends."""
    return [(first, guided), (guided, last)] if first < guided < last else [(first, last)]


def _window(config: TokenizerConfig, stop: int) -> int:
    """Length of the cache for tokens before `stop`: that of the groups so far, rounded up where there are many groups."""
    unit = max(config.tokens_per_group, -(-config.num_tokens // WINDOWS))
    return min(-(-stop // unit) * unit, config.num_tokens)


@functools.partial(jax.jit, static_argnums=0)
def _begin_prediction(
    model: Llama, settings: Settings, labels: Array, seeds: Array, prefix: Array | None, num_given: Array | None
) -> Prediction:
    """Before the first token; arguments as of `begin`."""
    batch = len(labels)
    tokens = jnp.zeros((batch, model.config.num_tokens), jnp.int32)
    if prefix is None:
        num_given = jnp.zeros(batch, jnp.int32)
    else:
        tokens = tokens.at[:, : prefix.shape[1]].set(prefix)
        num_given = jnp.full(batch, prefix.shape[1], jnp.int32) if num_given is None else num_given
    caches = llama.empty_caches(model.config, 2 * batch if settings.guided else batch, 0, model.dtype)
    return Prediction(jnp.asarray(labels, jnp.int32), sample_keys(seeds), tokens, num_given, caches)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _predict(
    model: Llama,
    count: int,
    window: int,
    guided: bool,
    params: Unstacked,
    settings: Settings,
    state: Prediction,
    start: Array,
) -> Prediction:
    """Predicts `count` tokens from `start` on with caches of length `window`."""
    batch, labels = len(state.labels), state.labels
    if guided:  # interleaved, so that on several devices both rows of a sample stay where the sample is
        labels = jnp.stack([labels, jnp.full_like(labels, model.config.num_classes)], axis=1).reshape(-1)

    def fit(leaf: Array) -> Array:
        if len(leaf) > len(labels):  # guidance has ended
            leaf = leaf.reshape(batch, 2, *leaf.shape[1:])[:, 0]
        return constrain(jnp.pad(leaf, ((0, 0), (0, 0), (0, window - leaf.shape[2]), (0, 0))), "cache")

    def body(carry: tuple[Array, tuple[Cache, ...]], offset: Array) -> tuple[tuple[Array, tuple[Cache, ...]], None]:
        tokens, caches = carry
        position = start + offset
        previous = jnp.take(tokens, jnp.maximum(position - 1, 0), axis=1)
        inputs = jnp.repeat(previous, 2) if guided else previous
        step = functools.partial(model.apply, {"params": params.rest}, method="step")
        logits, caches = step(params.layers, labels, inputs, caches, position)
        if guided:
            pairs = logits.reshape(batch, 2, -1)
            logits = guide(pairs[:, 0], pairs[:, 1], settings.scales[position])
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), position))(state.keys)
        drawn = draw(logits, keys, settings.temperature, settings.top_k, settings.top_p)
        token = jnp.where(position < state.num_given, jnp.take(tokens, position, axis=1), drawn)
        return (jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1), caches), None

    carry = (state.tokens, jax.tree.map(fit, state.caches))
    (tokens, caches), _ = jax.lax.scan(body, carry, jnp.arange(count))
    return dataclasses.replace(state, tokens=tokens, caches=caches)


@functools.partial(jax.jit, static_argnums=0)
def _begin_decoding(
    model: Tokenizer, params: Unstacked, settings: Settings, noise: Array, image: Array | None, values: Array | None = None
) -> Decoding:
    """Before the first denoising step; with the condition tokens of all `values`, if they are given."""
    config, batch = model.config, len(noise)
    times = flow.schedule(settings.num_steps, config.velocity.time_shift)
    if image is None:
        x, preview = noise, jnp.zeros_like(noise)
    else:
        x, preview = flow.interpolate(noise, config.velocity.data_std * image, jnp.float32(times[settings.start_step])), image
    caches = token_decoder.empty_caches(config, batch, model.dtype)
    decoding = Decoding(
        caches=jax.tree.map(lambda leaf: constrain(leaf, "cache"), caches),
        condition=constrain(jnp.zeros((batch, config.num_tokens, config.decoder_width), jnp.float32), "stream"),
        time_table=embed_times(config, model.dtype, params.rest["velocity"], times[:-1]),
        x=constrain(x, "images"),
        velocity=constrain(jnp.zeros_like(x), "images"),
        preview=constrain(preview, "images"),
    )
    return decoding if values is None else _extend(model, params, values, decoding, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0)
def _condition(model: Tokenizer, params: Unstacked, tokens: Array, decoding: Decoding, first: Array) -> Decoding:
    """Adds the condition tokens of the group whose first token is `first`."""
    codes = jax.lax.dynamic_slice_in_dim(tokens, first, model.config.tokens_per_group, axis=1)
    values = model.apply({"params": params.rest}, codes, method="lookup")
    return _extend(model, params, values, decoding, first)


def _extend(model: Tokenizer, params: Unstacked, values: Array, decoding: Decoding, first: Array) -> Decoding:
    """Adds the condition tokens of values [B, n, E], the first of which is token `first`."""
    apply = functools.partial(model.apply, {"params": params.rest}, method="condition_step")
    new, caches = apply(params.layers, values, decoding.caches, first)
    condition = jax.lax.dynamic_update_slice_in_dim(decoding.condition, new, first, axis=1)
    return dataclasses.replace(decoding, caches=caches, condition=constrain(condition, "stream"))


@functools.partial(jax.jit, static_argnums=0)
def _denoise(model: Tokenizer, params: Unstacked, settings: Settings, decoding: Decoding, index: Array) -> Decoding:
    """Denoising step `index`."""
    config = model.config
    times = jnp.asarray(flow.schedule(settings.num_steps, config.velocity.time_shift))
    start = jnp.asarray(flow.step_starts(settings.num_steps, config))[index]
    t = times[index]
    tokens = jax.lax.dynamic_slice_in_dim(decoding.condition, start, config.tokens_per_step, axis=1)
    table = None if decoding.time_table is None else decoding.time_table[index]
    apply = functools.partial(model.apply, {"params": params.rest}, method="velocity")
    velocity, _ = apply(decoding.x, t[None], tokens, time_table=table)
    first = index == settings.start_step
    step = functools.partial(flow.solver_step, decoding.x, velocity, decoding.velocity, first=first, solver=settings.solver)
    x, preview = step(step_size=times[index + 1] - t), step(step_size=1 - t) / config.velocity.data_std
    new = {name: constrain(value, "images") for name, value in (("x", x), ("velocity", velocity), ("preview", preview))}
    return dataclasses.replace(decoding, **new)


@functools.partial(jax.jit, static_argnums=0)
def _finish(model: Tokenizer, images: Array) -> Array:
    """[B, R, R, C] -> [B, H, W, C]: resized down where the tokenizer's config asks for it."""
    size = model.config.output_resolution
    if size is None or images.shape[1] <= size:
        return images
    return resize_bicubic(images, size, size)
