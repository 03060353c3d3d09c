"""What a sampling run is: the networks, and what `SamplingConfig` means for them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dar_jax.config import SamplingConfig, TokenizerConfig, checked
from dar_jax.errors import InputError
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.sampling.logits import linear_guidance

GuidanceSchedule = Callable[[int, float, float], Array | np.ndarray]  # (T, first, last) -> scale of each token [T]


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of both stages; `llama` is None where codes are given. Their parameters go beside them as a dict
    {"tokenizer": ..., "llama": ...}."""

    tokenizer: Tokenizer
    llama: Llama | None = None


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
