"""The sampler (paper sections 3.3 and 3.4): groups of tokens are predicted, and each finished group drives denoising.

One function, `advance`, carries a `SamplerState` on by one group: the transformer predicts its Q tokens, the token decoder
turns them into condition tokens, and the solver takes the denoising steps they allow. `generate` runs it over all groups;
`stream` yields a preview after each. Both consist of the same compiled pieces, which the host dispatches without waiting:
predicting (one for each length of the cache, so that attention reads only what is filled), conditioning, one solver step.
They are pure, so an outer `jax.jit` over `generate` makes one program of them.

Everything of sample i follows from its own seed and label: the same (seed, label, settings) give the same tokens in any
batch and on any number of devices.

Shapes: B batch, T tokens, G groups, Q = T / G tokens per group, S denoising steps, R pixels along a side while denoising,
H W pixels of the result, C channels, D width, E code dimension, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax import flow, llama
from dar_jax.config import SamplingConfig, TokenizerConfig
from dar_jax.errors import InputError
from dar_jax.layers import Array, Cache, constrain, resize_bicubic, unstack
from dar_jax.llama import Llama
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
class SamplerParams:
    """Parameters as the sampler reads them, see `prepare`: `tokenizer` without its encoder, `llama` (None where codes are
    given), and one tree for each layer of the two networks that run piece by piece."""

    tokenizer: Any
    decoder_layers: tuple[Any, ...]
    llama: Any
    llama_layers: tuple[Any, ...]


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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "labels", "keys", "tokens", "num_given", "llama_caches", "decoder_caches",
        "condition", "time_table", "x", "velocity", "preview",
    ],
    meta_fields=["group"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Where sampling stands after `group` groups. The transformer's caches grow with the groups."""

    group: int  # finished groups
    labels: Array  # [B] int32
    keys: Array  # [B] PRNG keys
    tokens: Array  # [B, T] int32; those not yet predicted are 0 or given
    num_given: Array  # [B] int32, how many first tokens are given instead of predicted
    llama_caches: tuple[Cache, ...]  # guided: rows 2i and 2i + 1 are sample i with its label and with the null class
    decoder_caches: tuple[Cache, ...]
    condition: Array  # [B, T, D] float32 condition tokens, zero where not yet known
    time_table: Array | None  # [S, L, 1, D], of `embed_times`
    x: Array  # [B, R, R, C] float32, the ODE's state
    velocity: Array  # [B, R, R, C] float32, of the last step
    preview: Array  # [B, R, R, C] float32 in [-1, 1], the jump estimate of the last step; after the last group, the image


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
    num_steps = config.num_denoising_steps or tokenizer.num_denoising_steps
    num_groups = tokenizer.num_groups if config.num_groups is None else config.num_groups
    checks = [
        (num_steps > 0, f"the number of denoising steps is {num_steps}, it should be at least 1"),
        (0 < num_groups <= tokenizer.num_groups, f"num_groups is {num_groups}, it should be 1 .. {tokenizer.num_groups}"),
        (0 <= config.start_step < num_steps, f"start_step is {config.start_step}, it should be 0 .. {num_steps - 1}"),
        (config.temperature >= 0, f"temperature is {config.temperature}, it should be 0 (greedy) or more"),
        (config.top_k >= 0, f"top_k is {config.top_k}, it should be 0 (off) or more"),
        (0 <= config.top_p <= 1, f"top_p is {config.top_p}, it should be between 0 and 1 (off)"),
        (min(config.guidance) >= 0, f"guidance is {config.guidance}, it should not be negative"),
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

    model, llama_params, llama_layers = networks.tokenizer, None, ()
    tokenizer = {name: value for name, value in params["tokenizer"].items() if name != "encoder"}
    tokenizer |= {name: cast(tokenizer[name], model.dtype) for name in ("token_decoder", "velocity")}
    tokenizer["token_decoder"], decoder_layers = take_apart(tokenizer["token_decoder"], model.config.decoder_layers)
    if networks.llama is not None:
        matrices = cast(params["llama"], networks.llama.dtype)
        llama_params, llama_layers = take_apart(matrices, networks.llama.config.layers)
    return SamplerParams(tokenizer, decoder_layers, llama_params, llama_layers)


def sample_keys(seeds: Array) -> Array:
    """One key per sample: [B] integers -> [B] PRNG keys."""
    return jax.vmap(jax.random.key)(seeds)


def initial_noise(keys: Array, tokenizer: TokenizerConfig) -> Array:
    """Standard normal [B, R, R, C] float32, image i from key i."""
    shape = (tokenizer.resolution, tokenizer.resolution, tokenizer.channels)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


@functools.partial(jax.jit, static_argnums=0)
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
    config, batch = networks.tokenizer.config, len(labels)
    keys = sample_keys(seeds)
    tokens = jnp.zeros((batch, config.num_tokens), jnp.int32)
    if prefix is None:
        num_given = jnp.zeros(batch, jnp.int32)
    else:
        tokens = tokens.at[:, : prefix.shape[1]].set(prefix)
        num_given = jnp.full(batch, prefix.shape[1], jnp.int32) if num_given is None else num_given
    x, preview, time_table = _start(networks, params, settings, initial_noise(keys, config), image)
    rows = 2 * batch if settings.guided else batch
    decoder_caches = token_decoder.empty_caches(config, batch, networks.tokenizer.dtype)
    return SamplerState(
        group=0,
        labels=jnp.asarray(labels, jnp.int32),
        keys=keys,
        tokens=tokens,
        num_given=num_given,
        llama_caches=llama.empty_caches(networks.llama.config, rows, 0, networks.llama.dtype),
        decoder_caches=jax.tree.map(lambda leaf: constrain(leaf, "cache"), decoder_caches),
        condition=constrain(jnp.zeros((batch, config.num_tokens, config.decoder_width), jnp.float32), "stream"),
        time_table=time_table,
        x=x,
        velocity=constrain(jnp.zeros_like(x), "images"),
        preview=preview,
    )


def advance(networks: Networks, params: SamplerParams, settings: Settings, state: SamplerState) -> SamplerState:
    """Carries the state on by one group: Q tokens, their condition tokens, and the denoising steps these allow."""
    config = networks.tokenizer.config
    tokens, caches = predict_group(networks, params, settings, state)
    first = state.group * config.tokens_per_group
    condition, decoder_caches = _condition(networks.tokenizer, params, tokens, state.condition, state.decoder_caches, first)

    # One step a group in the paper's setting; other step counts and group sizes leave several, or none, to a group.
    ready = flow.steps_ready(settings.num_steps, config)
    solver = (state.x, state.velocity, state.preview)
    for index in range(max(ready[state.group], settings.start_step), ready[state.group + 1]):
        solver = _denoise(networks.tokenizer, params, settings, condition, state.time_table, jnp.int32(index), solver)
    x, velocity, preview = solver
    return dataclasses.replace(
        state,
        group=state.group + 1,
        tokens=tokens,
        llama_caches=caches,
        decoder_caches=decoder_caches,
        condition=condition,
        x=x,
        velocity=velocity,
        preview=preview,
    )


def predict_group(
    networks: Networks, params: SamplerParams, settings: Settings, state: SamplerState
) -> tuple[Array, tuple[Cache, ...]]:
    """Predicts the tokens of the next group. Returns all tokens [B, T] and the transformer's caches."""
    config = networks.tokenizer.config
    first, last = state.group * config.tokens_per_group, (state.group + 1) * config.tokens_per_group
    tokens, caches = state.tokens, state.llama_caches
    for start, stop in _spans(first, last, settings.guided):
        so_far = dataclasses.replace(state, tokens=tokens, llama_caches=caches)
        sizes = stop - start, _window(config, stop), start < settings.guided
        tokens, caches = _predict(networks.llama, *sizes, params, settings, so_far, jnp.int32(start))
    return tokens, caches


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
    *_, (state, all_previews) = _groups(networks, params, settings, labels, seeds, prefix, num_given, image, previews)
    return dataclasses.replace(_snapshot(networks, state), previews=jnp.stack(all_previews) if previews else None)


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
    waiting = None
    for state, _ in _groups(networks, params, settings, labels, seeds, prefix, num_given, image, False):
        if waiting is not None:
            yield waiting
        waiting = _snapshot(networks, state)
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
    params = _prepared(networks, params)
    condition, x, preview, time_table = _begin_decoding(networks, params, settings, values, noise, image)
    solver, all_previews = (x, jnp.zeros_like(x), preview), []
    for index in range(flow.steps_ready(settings.num_steps, networks.tokenizer.config)[settings.num_groups]):
        if index >= settings.start_step:
            solver = _denoise(networks.tokenizer, params, settings, condition, time_table, jnp.int32(index), solver)
        if previews:
            all_previews.append(_finish(networks, solver[2]))
    tokens = jnp.zeros((len(values), 0), jnp.int32)
    return Samples(tokens, _finish(networks, solver[2]), jnp.stack(all_previews) if previews else None)


@functools.partial(jax.jit, static_argnums=0)
def lookup_codes(networks: Networks, params: dict, codes: Array) -> Array:
    """codes [B, n] int32 -> the codebook's rows [B, n, E] float32."""
    return networks.tokenizer.apply({"params": params["tokenizer"]}, codes, method="lookup")


# --- the pieces ------------------------------------------------------------------------------------------------------------

WINDOWS = 8  # lengths of the cache, at most, each of which is compiled


def _groups(
    networks, params, settings, labels, seeds, prefix, num_given, image, previews
) -> Iterator[tuple[SamplerState, list[Array]]]:
    """The state after each group, and the previews so far where they are asked for."""
    params, all_previews = _prepared(networks, params), []
    state = begin(networks, params, settings, labels, seeds, prefix, num_given, image)
    for _ in range(settings.num_groups):
        state = advance(networks, params, settings, state)
        if previews:
            all_previews.append(_finish(networks, state.preview))
        yield state, all_previews


def _prepared(networks: Networks, params: dict | SamplerParams) -> SamplerParams:
    return params if isinstance(params, SamplerParams) else prepare(networks, params)


def _snapshot(networks: Networks, state: SamplerState) -> Samples:
    length = state.group * networks.tokenizer.config.tokens_per_group
    return Samples(state.tokens[:, :length], _finish(networks, state.preview), None)


def _spans(first: int, last: int, guided: int) -> list[tuple[int, int]]:
    """The tokens of a group, cut where guidance ends."""
    return [(first, guided), (guided, last)] if first < guided < last else [(first, last)]


def _window(config: TokenizerConfig, stop: int) -> int:
    """Length of the cache for tokens before `stop`: that of the groups so far, rounded up where there are many groups."""
    unit = max(config.tokens_per_group, -(-config.num_tokens // WINDOWS))
    return min(-(-stop // unit) * unit, config.num_tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _predict(
    model: Llama,
    count: int,
    window: int,
    guided: bool,
    params: SamplerParams,
    settings: Settings,
    state: SamplerState,
    start: Array,
) -> tuple[Array, tuple[Cache, ...]]:
    """Predicts `count` tokens from `start` on with caches of length `window`. Returns all tokens [B, T] and the caches."""
    batch = len(state.labels)
    labels = state.labels
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
        step = functools.partial(model.apply, {"params": params.llama}, method="step")
        logits, caches = step(params.llama_layers, labels, inputs, caches, position)
        if guided:
            pairs = logits.reshape(batch, 2, -1)
            logits = guide(pairs[:, 0], pairs[:, 1], settings.scales[position])
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), position))(state.keys)
        drawn = draw(logits, keys, settings.temperature, settings.top_k, settings.top_p)
        token = jnp.where(position < state.num_given, jnp.take(tokens, position, axis=1), drawn)
        return (jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1), caches), None

    carry = (state.tokens, jax.tree.map(fit, state.llama_caches))
    return jax.lax.scan(body, carry, jnp.arange(count))[0]


@functools.partial(jax.jit, static_argnums=0)
def _condition(
    model: Tokenizer, params: SamplerParams, tokens: Array, condition: Array, caches: tuple[Cache, ...], first: Array
) -> tuple[Array, tuple[Cache, ...]]:
    """Adds the condition tokens of the group whose first token is `first`."""
    apply = functools.partial(model.apply, {"params": params.tokenizer})
    codes = jax.lax.dynamic_slice_in_dim(tokens, first, model.config.tokens_per_group, axis=1)
    values = apply(codes, method="lookup")
    new, caches = apply(params.decoder_layers, values, caches, first, method="condition_step")
    return constrain(jax.lax.dynamic_update_slice_in_dim(condition, new, first, axis=1), "stream"), caches


@functools.partial(jax.jit, static_argnums=0)
def _begin_decoding(
    networks: Networks, params: SamplerParams, settings: Settings, values: Array, noise: Array, image: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """The condition tokens [B, T, D] of all values, and what `_start` gives."""
    config, dtype = networks.tokenizer.config, networks.tokenizer.dtype
    caches = token_decoder.empty_caches(config, len(values), dtype)
    apply = functools.partial(networks.tokenizer.apply, {"params": params.tokenizer}, method="condition_step")
    condition, _ = apply(params.decoder_layers, values, caches, jnp.int32(0))
    return condition, *_start(networks, params, settings, noise, image)


def _start(
    networks: Networks, params: SamplerParams, settings: Settings, noise: Array, image: Array | None
) -> tuple[Array, Array, Array | None]:
    """The ODE's state at the first step [B, R, R, C], the preview to show before any step was taken, and the time table."""
    config, dtype = networks.tokenizer.config, networks.tokenizer.dtype
    times = flow.schedule(settings.num_steps, config.velocity.time_shift)
    table = embed_times(config, dtype, params.tokenizer["velocity"], times[:-1])
    if image is None:
        x, preview = noise, jnp.zeros_like(noise)
    else:
        x, preview = flow.interpolate(noise, config.velocity.data_std * image, jnp.float32(times[settings.start_step])), image
    return constrain(x, "images"), constrain(preview, "images"), table


@functools.partial(jax.jit, static_argnums=0)
def _denoise(
    model: Tokenizer,
    params: SamplerParams,
    settings: Settings,
    condition: Array,
    time_table: Array | None,
    index: Array,
    solver: tuple[Array, Array, Array],
) -> tuple[Array, Array, Array]:
    """Denoising step `index`: (x, last velocity, preview) -> the same after it."""
    config = model.config
    x, previous, _ = solver
    times = jnp.asarray(flow.schedule(settings.num_steps, config.velocity.time_shift))
    start = jnp.asarray(flow.step_starts(settings.num_steps, config))[index]
    t = times[index]
    tokens = jax.lax.dynamic_slice_in_dim(condition, start, config.tokens_per_step, axis=1)
    table = None if time_table is None else time_table[index]
    apply = functools.partial(model.apply, {"params": params.tokenizer}, method="velocity")
    velocity, _ = apply(x, t[None], tokens, time_table=table)
    step = functools.partial(
        flow.solver_step, x, velocity, previous, first=index == settings.start_step, solver=settings.solver
    )
    new = step(step_size=times[index + 1] - t), velocity, step(step_size=1 - t) / config.velocity.data_std
    return tuple(constrain(part, "images") for part in new)


@functools.partial(jax.jit, static_argnums=0)
def _finish(networks: Networks, images: Array) -> Array:
    """[B, R, R, C] -> [B, H, W, C]: resized down where the tokenizer's config asks for it."""
    size = networks.tokenizer.config.output_resolution
    if size is None or images.shape[1] <= size:
        return images
    return resize_bicubic(images, size, size)
