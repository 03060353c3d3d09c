"""The sampler (paper sections 3.3 and 3.4): groups of tokens are predicted, and each finished group drives denoising.

One pure function, `advance`, carries a `SamplerState` on by one group: the transformer predicts its Q tokens, the token
decoder turns them into condition tokens, and the solver takes the denoising steps they allow. `generate` scans it over all
groups in one jit; `stream` calls it group by group and yields a preview each time.

Everything of sample i follows from its own seed and label: the same (seed, label, settings) give the same tokens in any
batch and on any number of devices.

Shapes: B batch, T tokens, G groups, Q = T / G tokens per group, S denoising steps, R pixels along a side while denoising,
H W pixels of the result, C channels, D width, E code dimension.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax import flow, llama
from dar_jax.config import SamplingConfig, TokenizerConfig
from dar_jax.errors import InputError
from dar_jax.layers import Array, Cache, resize_bicubic
from dar_jax.llama import Llama
from dar_jax.sampling.logits import draw, guide, linear_guidance
from dar_jax.tokenizer import token_decoder
from dar_jax.tokenizer.tokenizer import Tokenizer

GuidanceSchedule = Callable[[int, float, float], Array | np.ndarray]  # (T, first, last) -> scale of each token [T]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of both stages; `llama` is None where codes are given. Their parameters go beside them as a dict
    {"tokenizer": ..., "llama": ...}."""

    tokenizer: Tokenizer
    llama: Llama | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "temperature", "top_k", "top_p", "start_step"],
    meta_fields=["solver", "num_steps", "num_groups"],
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """What `SamplingConfig` means for given networks. Arrays may change without a new compilation.

    scales [T] guidance of each token (None: no guidance at all); temperature (None: greedy); top_k, top_p (None: off);
    start_step: first denoising step; solver, num_steps S, and num_groups, after which sampling stops.
    """

    scales: Array | None
    temperature: Array | None
    top_k: Array | None
    top_p: Array | None
    start_step: Array
    solver: str
    num_steps: int
    num_groups: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Where sampling stands after `group` groups. All arrays keep their shapes from the first group to the last."""

    group: Array  # int32 scalar, finished groups
    labels: Array  # [B] int32
    keys: Array  # [B] PRNG keys
    tokens: Array  # [B, T] int32; those not yet predicted are 0 or given
    num_given: Array  # [B] int32, how many first tokens are given instead of predicted
    llama_cache: Cache  # guided: rows 2i and 2i + 1 are sample i with its label and with the null class
    decoder_cache: Cache
    condition: Array  # [B, T, D] float32 condition tokens, zero where not yet known
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
        scales=jnp.asarray(scales) if np.any(scales > 1) else None,
        temperature=jnp.float32(config.temperature) if config.temperature > 0 else None,
        top_k=jnp.int32(config.top_k) if config.top_k > 0 else None,
        top_p=jnp.float32(config.top_p) if config.top_p < 1 else None,
        start_step=jnp.int32(config.start_step),
        solver=config.solver,
        num_steps=num_steps,
        num_groups=num_groups,
    )


def sample_keys(seeds: Array) -> Array:
    """One key per sample: [B] integers -> [B] PRNG keys."""
    return jax.vmap(jax.random.key)(seeds)


def initial_noise(keys: Array, tokenizer: TokenizerConfig) -> Array:
    """Standard normal [B, R, R, C] float32, image i from key i."""
    shape = (tokenizer.resolution, tokenizer.resolution, tokenizer.channels)
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


def begin(
    networks: Networks,
    settings: Settings,
    labels: Array,
    seeds: Array,
    prefix: Array | None = None,
    num_given: Array | None = None,
    image: Array | None = None,
) -> SamplerState:
    """The state before the first group.

    Args:
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
    x, preview = _start(networks, settings, initial_noise(keys, config), image)
    rows = batch if settings.scales is None else 2 * batch
    return SamplerState(
        group=jnp.int32(0),
        labels=jnp.asarray(labels, jnp.int32),
        keys=keys,
        tokens=tokens,
        num_given=num_given,
        llama_cache=llama.empty_cache(networks.llama.config, rows, networks.llama.dtype),
        decoder_cache=token_decoder.empty_cache(config, batch, networks.tokenizer.dtype),
        condition=jnp.zeros((batch, config.num_tokens, config.decoder_width), jnp.float32),
        x=x,
        velocity=jnp.zeros_like(x),
        preview=preview,
    )


def advance(networks: Networks, params: dict, settings: Settings, state: SamplerState) -> SamplerState:
    """Carries the state on by one group: Q tokens, their condition tokens, and the denoising steps these allow."""
    config = networks.tokenizer.config
    tokens, llama_cache = _predict(networks.llama, params["llama"], settings, state, config.tokens_per_group)
    first = state.group * config.tokens_per_group
    apply = functools.partial(networks.tokenizer.apply, {"params": params["tokenizer"]})
    codes = jax.lax.dynamic_slice_in_dim(tokens, first, config.tokens_per_group, axis=1)
    new, decoder_cache = apply(apply(codes, method="lookup"), state.decoder_cache, first, method="condition_step")
    condition = jax.lax.dynamic_update_slice_in_dim(state.condition, new, first, axis=1)

    # One step a group in the paper's setting; other step counts and group sizes leave several, or none, to a group.
    ready = jnp.asarray(flow.steps_ready(settings.num_steps, config))
    lower = jnp.maximum(ready[state.group], settings.start_step)
    step = functools.partial(_denoise, networks.tokenizer, params["tokenizer"], settings, condition)
    solver = (state.x, state.velocity, state.preview)
    x, velocity, preview = jax.lax.fori_loop(lower, ready[state.group + 1], step, solver)
    return dataclasses.replace(
        state,
        group=state.group + 1,
        tokens=tokens,
        llama_cache=llama_cache,
        decoder_cache=decoder_cache,
        condition=condition,
        x=x,
        velocity=velocity,
        preview=preview,
    )


@functools.partial(jax.jit, static_argnames=("networks", "previews"))
def generate(
    networks: Networks,
    params: dict,
    settings: Settings,
    labels: Array,
    seeds: Array,
    prefix: Array | None = None,
    num_given: Array | None = None,
    image: Array | None = None,
    previews: bool = False,
) -> Samples:
    """Whole images in one compiled function. Arguments as of `begin`; `previews` keeps the preview after every group."""

    def body(state: SamplerState, _) -> tuple[SamplerState, Array | None]:
        state = advance(networks, params, settings, state)
        return state, _finish(networks, state.preview) if previews else None

    state = begin(networks, settings, labels, seeds, prefix, num_given, image)
    state, all_previews = jax.lax.scan(body, state, length=settings.num_groups)
    length = settings.num_groups * networks.tokenizer.config.tokens_per_group
    return Samples(state.tokens[:, :length], _finish(networks, state.preview), all_previews)


_begin = jax.jit(begin, static_argnums=0)
_advance = jax.jit(advance, static_argnums=0, donate_argnums=3)


def stream(
    networks: Networks,
    params: dict,
    settings: Settings,
    labels: Array,
    seeds: Array,
    prefix: Array | None = None,
    num_given: Array | None = None,
    image: Array | None = None,
) -> Iterator[Samples]:
    """Yields `Samples` as each group ends: the tokens so far and the preview; the last one is what `generate` returns.

    Arguments as of `begin`. The next group is dispatched before the one before is handed out, so that a caller who looks
    at a preview does not keep the device waiting.
    """
    state = _begin(networks, settings, labels, seeds, prefix, num_given, image)
    waiting = None
    for group in range(settings.num_groups):
        state = _advance(networks, params, settings, state)
        length = (group + 1) * networks.tokenizer.config.tokens_per_group
        if waiting is not None:
            yield waiting
        waiting = _snapshot(networks, state, length)
    yield waiting


@functools.partial(jax.jit, static_argnums=(0, 2))
def _snapshot(networks: Networks, state: SamplerState, length: int) -> Samples:
    return Samples(state.tokens[:, :length], _finish(networks, state.preview), None)


@functools.partial(jax.jit, static_argnames=("networks", "previews"))
def decode(
    networks: Networks,
    params: dict,
    settings: Settings,
    values: Array,
    noise: Array,
    image: Array | None = None,
    previews: bool = False,
) -> Samples:
    """Images of given tokens, without the transformer.

    Args:
      values: [B, T, E] float32, what the quantizer returns, or the codebook's rows of given codes (`lookup_codes`).
      noise: [B, R, R, C] standard normal, of `initial_noise` say.
      image: [B, R, R, C] float32 in [-1, 1] to start from at `settings.start_step` (default: noise).
      previews: whether to keep the preview after every denoising step (from `start_step` 0 on).

    Returns: Samples without tokens.
    """
    config, tokenizer = networks.tokenizer.config, params["tokenizer"]
    condition = networks.tokenizer.apply({"params": tokenizer}, values, method="condition")
    x, preview = _start(networks, settings, noise, image)
    step = functools.partial(_denoise, networks.tokenizer, tokenizer, settings, condition)
    count = flow.steps_ready(settings.num_steps, config)[settings.num_groups]
    solver = (x, jnp.zeros_like(x), preview)

    def body(solver, index):
        # A step before the first one leaves everything as it is; the count of steps stays static for the scan.
        solver = jax.lax.cond(index >= settings.start_step, step, lambda _, s: s, index, solver)
        return solver, _finish(networks, solver[2]) if previews else None

    (_, _, preview), all_previews = jax.lax.scan(body, solver, jnp.arange(count))
    return Samples(jnp.zeros((len(values), 0), jnp.int32), _finish(networks, preview), all_previews)


@functools.partial(jax.jit, static_argnums=0)
def lookup_codes(networks: Networks, params: dict, codes: Array) -> Array:
    """codes [B, n] int32 -> the codebook's rows [B, n, E] float32."""
    return networks.tokenizer.apply({"params": params["tokenizer"]}, codes, method="lookup")


def _predict(model: Llama, params: dict, settings: Settings, state: SamplerState, count: int) -> tuple[Array, Cache]:
    """Predicts the `count` tokens of the next group. Returns all tokens [B, T] and the cache."""
    batch = len(state.labels)
    guided = settings.scales is not None
    labels = state.labels
    if guided:  # interleaved, so that on several devices both rows of a sample stay where the sample is
        labels = jnp.stack([labels, jnp.full_like(labels, model.config.num_classes)], axis=1).reshape(-1)

    def body(carry: tuple[Array, Cache], offset: Array) -> tuple[tuple[Array, Cache], None]:
        tokens, cache = carry
        position = state.group * count + offset
        previous = jnp.take(tokens, jnp.maximum(position - 1, 0), axis=1)
        inputs = jnp.repeat(previous, 2) if guided else previous
        logits, cache = model.apply({"params": params}, labels, inputs, cache, position, method="step")
        if guided:
            pairs = logits.reshape(batch, 2, -1)
            logits = guide(pairs[:, 0], pairs[:, 1], settings.scales[position])
        keys = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, 1), position))(state.keys)
        drawn = draw(logits, keys, settings.temperature, settings.top_k, settings.top_p)
        token = jnp.where(position < state.num_given, jnp.take(tokens, position, axis=1), drawn)
        return (jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], position, axis=1), cache), None

    (tokens, cache), _ = jax.lax.scan(body, (state.tokens, state.llama_cache), jnp.arange(count))
    return tokens, cache


def _start(networks: Networks, settings: Settings, noise: Array, image: Array | None) -> tuple[Array, Array]:
    """The ODE's state at the first step [B, R, R, C], and the preview to show before any step was taken."""
    velocity = networks.tokenizer.config.velocity
    if image is None:
        return noise, jnp.zeros_like(noise)
    t = jnp.asarray(flow.schedule(settings.num_steps, velocity.time_shift))[settings.start_step]
    return flow.interpolate(noise, velocity.data_std * image, t), image


def _denoise(
    model: Tokenizer, params: dict, settings: Settings, condition: Array, index: Array, solver: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Denoising step `index`: (x, last velocity, preview) -> the same after it."""
    config = model.config
    x, previous, _ = solver
    times = jnp.asarray(flow.schedule(settings.num_steps, config.velocity.time_shift))
    start = jnp.asarray(flow.step_starts(settings.num_steps, config))[index]
    t = times[index]
    tokens = jax.lax.dynamic_slice_in_dim(condition, start, config.tokens_per_step, axis=1)
    velocity, _ = model.apply({"params": params}, x, jnp.full(len(x), t), tokens, method="velocity")
    step = functools.partial(
        flow.solver_step, x, velocity, previous, first=index == settings.start_step, solver=settings.solver
    )
    return step(step_size=times[index + 1] - t), velocity, step(step_size=1 - t) / config.velocity.data_std


def _finish(networks: Networks, images: Array) -> Array:
    """[B, R, R, C] -> [B, H, W, C]: resized down where the tokenizer's config asks for it."""
    size = networks.tokenizer.config.output_resolution
    if size is None or images.shape[1] <= size:
        return images
    return resize_bicubic(images, size, size)
