"""The networks of sampling, the replaceable parts of the method, and the settings, checked and as arrays.

Shapes: B batch, T tokens, V vocabulary, S denoising steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict
from jax import Array

from dar_jax.config import LATE_STEPS, SamplingConfig, TokenizerConfig, checked
from dar_jax.errors import InputError, require
from dar_jax.models import flow
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.sampling import solvers
from dar_jax.sampling.logits import draw_token, linear_guidance
from dar_jax.sampling.predict import Predictor, token_by_token
from dar_jax.sampling.solvers import Solver

Condition = Callable[[Mapping[str, Any]], Any]  # an experiment's, of a batch


def normal_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal [B, *shape] float32, sample i from its own key [B] alone."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), shape))(keys)


@dataclasses.dataclass(frozen=True)
class Method:
    """The parts of sampling that an experiment may replace: plain functions, static under jit. See docs/forking.md.

    guidance: (T, first, last) -> the scale of every token [T].
    draw: (logits [B, V], keys [B], position, tokens [B, T], settings) -> tokens [B] int32; `position` is a scalar or [B].
    predict: a `Predictor` of the tokens of a group.
    solver: a `Solver` of the denoising steps; None: the one that the setting `solver` names.
    times: (S, tokenizer config) -> times of the steps before the shift, float32 [S], rising from 0; the group of each follows.
    steer: (velocity, x, t', observation) -> velocity at x, where `velocity(x, t')` is the network's; None: nothing is observed.
    noise: (keys [B], shape) -> what denoising starts from, [B, *shape] float32.

    Whatever is random comes from a sample's own key, `fold_in(key, purpose)`: 0 noise, 1 tokens, 2 solver; others from 3 on.
    """

    guidance: Callable[[int, float, float], Array | np.ndarray] = linear_guidance
    draw: Callable[..., Array] = draw_token
    predict: Predictor = token_by_token
    solver: Solver | None = None
    times: Callable[[int, TokenizerConfig], np.ndarray] = flow.uniform_times
    steer: Callable[[Callable, Array, Array, Any], Array] | None = None
    noise: Callable[[Array, tuple[int, ...]], Array] = normal_noise

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the parts that are not the library's."""
        return tuple(f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not f.default)


def label_of(batch: Mapping[str, Any]) -> Any:
    """The default condition: the class of each image, int32 [B]."""
    return batch["label"]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of both stages and how they are sampled from; static under jit.

    `transformer` is None where codes are given. `condition` is the experiment's, which callers of the sampler apply to
    {"label": int32 [B]}, or that and "image". `others` are an experiment's further networks by name. Their parameters go
    beside them as a dict {"tokenizer": ..., "transformer": ..., "others": {name: ...}}.
    """

    tokenizer: Tokenizer
    transformer: Llama | None = None
    method: Method = Method()
    condition: Condition = label_of
    others: Mapping[str, nn.Module] = FrozenDict()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "temperature", "top_k", "top_p"],
    meta_fields=["guided", "speculate", "solver", "times", "start_step", "num_groups"],
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """A `SamplingConfig` as the sampler reads it. Arrays may change without a new compilation, and each may have the batch
    first, [B, T] and [B], see `per_sample`.

    scales [T] guidance of each token, of which none after the first `guided` exceeds 1, so that these need no unguided row;
    temperature (None: greedy); top_k, top_p (None: off); speculate, guesses a pass (0: off); solver; times of the S denoising
    steps, before the shift; start_step, the first of these steps; num_groups, after which sampling stops.
    """

    scales: Array
    guided: int
    temperature: Array | None
    top_k: Array | None
    top_p: Array | None
    speculate: int
    solver: Solver
    times: tuple[float, ...]
    start_step: int
    num_groups: int


def per_sample(settings: Sequence[Settings]) -> Settings:
    """Settings of B samples, each with its own scales, temperature, top-k and top-p: NumPy arrays [B, ...].

    Raises ValueError where they differ in what is static, or in which of the arrays they have.
    """
    if len(set(map(jax.tree.structure, settings))) != 1:
        raise ValueError("settings of one batch differ in what is static, or in which arrays they have")
    return jax.tree.map(lambda *rows: np.stack(rows), *settings)


def make_settings(config: SamplingConfig, tokenizer: TokenizerConfig, method: Method = Method()) -> Settings:  # noqa: B008
    """Checks a `SamplingConfig` against the tokenizer and converts it to the sampler's settings.

    Raises: InputError for values out of range, and for settings that a replaced part of the method makes void.
    """
    checked(SamplingConfig, config)
    num_groups = config.num_groups or tokenizer.num_groups
    require(num_groups <= tokenizer.num_groups, f"num_groups is {num_groups}, it should be 1 .. {tokenizer.num_groups}")
    times = denoising_times(config, tokenizer, method)
    require(config.start_step < len(times), f"start_step is {config.start_step}, it should be 0 .. {len(times) - 1}")
    require(
        method.solver is None or config.solver == SamplingConfig.solver,
        f"solver is {config.solver}, but the experiment replaces the solver; leave it at {SamplingConfig.solver}",
    )
    require(
        config.speculate <= tokenizer.num_tokens,
        f"speculate is {config.speculate}, but an image has {tokenizer.num_tokens} tokens; give at most so many guesses a pass",
    )
    require(
        not config.speculate or "predict" not in method.replaced,
        f"speculate is {config.speculate}, but the experiment replaces how tokens are found; leave it at 0",
    )
    scales = np.asarray(method.guidance(tokenizer.num_tokens, *config.guidance), np.float32)
    if config.cfg_interval >= 0:
        scales = np.where(np.arange(tokenizer.num_tokens) > config.cfg_interval + 1, 1, scales).astype(np.float32)
    equal_steps = config.steps == "uniform" and method.times is flow.uniform_times
    return Settings(
        scales=jnp.asarray(scales),
        guided=int(np.max(np.nonzero(scales > 1)[0], initial=-1)) + 1,
        temperature=jnp.float32(config.temperature) if config.temperature > 0 else None,
        top_k=jnp.int32(config.top_k) if config.top_k > 0 else None,
        top_p=jnp.float32(config.top_p) if config.top_p < 1 else None,
        speculate=config.speculate,
        solver=method.solver or solvers.by_name(config.solver, equal_steps),
        times=times,
        start_step=config.start_step,
        num_groups=num_groups,
    )


def denoising_times(config: SamplingConfig, tokenizer: TokenizerConfig, method: Method) -> tuple[float, ...]:
    """Times of the denoising steps, before the shift. Raises InputError for steps that do not fit the rest."""
    count = config.num_denoising_steps
    if config.steps != "uniform":
        what = f"steps is {config.steps}"
        require(count is None, f"{what}, which says how many there are; leave num_denoising_steps away, not {count}")
        require("times" not in method.replaced, f"{what}, but the experiment replaces the times; leave it at uniform")
        late = LATE_STEPS[config.steps]
        last = flow.schedule(np.asarray(late), tokenizer).starts[-1] + tokenizer.tokens_per_step
        require(
            last == tokenizer.num_tokens,
            f"{what}, whose last step is before the last of {tokenizer.num_groups} groups, which would never be decoded",
        )
        return late
    try:
        times = method.times(count or tokenizer.num_denoising_steps, tokenizer)
        flow.schedule(times, tokenizer)
    except ValueError as error:
        raise InputError(str(error)) from error
    require(count in (None, len(times)), f"num_denoising_steps is {count}, but the experiment takes {len(times)} steps")
    return tuple(map(float, times))
