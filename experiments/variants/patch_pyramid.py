"""Patches of twice the side in the first groups, where there is hardly an image yet: fewer operations of the decoder.

Source:   Pyramidal Patchification Flow (PPFlow, ICLR 2026), which keeps the resolution and shares the blocks of its stages;
          the idea of cheap early stages is E-CAR's (arXiv 2412.14170), predicting the image there is JiT's (arXiv 2511.13720).
Command:  dar-jax train experiments/variants/patch_pyramid.py --workdir runs/pyramid
          dar-jax reconstruct runs/pyramid --experiment experiments/variants/patch_pyramid.py --images photos --out decoded
          (settings of its own: --fork.coarse-groups, how many groups have large patches; --fork.flow-power,
          in place of --loss.flow-power)
Differs:  from the digits' tokenizer of the quickstart in the velocity network and in how times are drawn (`Tokenizer`).
Time:     that of the base; a coarse step takes 40 % of the operations of a fine one at this size, 23 % at the paper's.
Result:   worse on the digits: distance 1.1, the base's 0.63, at equal steps (two seeds). See docs/variants.md.

A coarse step sees a quarter of the pixel tokens. Only the first and the last layer belong to a stage; a vector tells the blocks
which one it is, and coarse patches are rotated as the centres of their four fine ones, so that positions agree. Coarse steps
predict the image, which many numbers a patch do not hinder; fine ones the velocity. In training the first half of each batch
is coarse and the second fine, with weights that undo it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from dar_jax.config import TokenizerConfig
from dar_jax.errors import require
from dar_jax.experiment import Experiment
from dar_jax.models.attention import rope_1d
from dar_jax.models.blocks import stack
from dar_jax.models.flow import Path, over_batch, shift_time
from dar_jax.models.layers import DType, default_init, layer_norm
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.velocity import TwoLayers, VelocityBlock, modulate, time_features, zero_dense
from dar_jax.quickstart import TOKENIZER


def boundary(config, groups):
    """The time, before the shift, at which so many groups end."""
    return max(0.0, (groups - 0.5) / config.num_groups)


def centred_rope(side, times, head_size, theta):
    """Rotary angles of patches of `times` x `times` fine ones, `side` of them along a side, at their centres."""
    places = np.divmod(np.arange(side * side), side)
    parts = [rope_1d(times * place + (times - 1) / 2, head_size // 2, theta) for place in places]
    return tuple(jnp.concatenate(pair, axis=-1) for pair in zip(*parts))


class Pyramid(nn.Module):
    """As `VelocityNetwork`, with coarse patches up to the time at which the first `groups` groups end."""

    config: TokenizerConfig
    dtype: DType
    remat: str
    groups: int = 2

    def setup(self):
        config, dtype = self.config.velocity, self.dtype
        dense = functools.partial(nn.Dense, dtype=dtype, kernel_init=default_init)
        zero = functools.partial(nn.Dense, dtype=dtype, kernel_init=nn.initializers.zeros)
        if config.share_time_encoding:
            self.time_embedding = TwoLayers(self.config.init_std, dtype)
        self.condition_in, self.coarse_in, self.patch_in = (dense(config.width) for _ in range(3))
        self.blocks = stack(VelocityBlock, config.layers, self.remat, shared=3)(config, self.config.init_std, dtype)
        self.coarse_out, self.patch_out = (zero(size**2 * self.config.channels) for size in self.patch_sizes)
        self.norm = layer_norm(False)
        self.stage = self.param("stage", nn.initializers.zeros, (config.width,))
        self.head_modulation = zero_dense((2, config.width), dtype, None) if config.mlp_head else None

    @property
    def patch_sizes(self):
        return 2 * self.config.velocity.patch_size, self.config.velocity.patch_size

    def __call__(self, x, t, condition, return_repa=False):
        """As of `VelocityNetwork`. The time of all ([1]) sets the stage; of times [B] the first half are coarse."""
        if self.is_initializing():
            return self.at_stage(True, x, t, condition) + self.at_stage(False, x, t, condition), None
        if len(t) > 1:
            half = len(t) // 2
            first = self.at_stage(True, x[:half], t[:half], condition[:half])
            return jnp.concatenate([first, self.at_stage(False, x[half:], t[half:], condition[half:])]), None
        last = shift_time(boundary(self.config, self.groups), self.config.velocity.time_shift)
        stages = (lambda self, *rest: self.at_stage(True, *rest), lambda self, *rest: self.at_stage(False, *rest))
        return nn.cond(t[0] < last, *stages, self, x, t, condition), None

    def at_stage(self, coarse, x, t, condition):
        """The velocity [B, H, W, C] with patches of one size."""
        config, dtype, p = self.config.velocity, self.dtype, self.patch_sizes[0 if coarse else 1]
        batch, height, width, channels = x.shape
        h, w = height // p, width // p
        time = time_features(t, config.width).astype(dtype)
        if config.share_time_encoding:
            time = self.time_embedding(time)
        condition = self.norm(self.condition_in(condition)).astype(dtype)
        patches = x.reshape(batch, h, p, w, p, channels).transpose(0, 1, 3, 5, 2, 4).reshape(batch, h * w, -1)
        tokens = self.coarse_in(patches) + self.stage.astype(dtype) if coarse else self.patch_in(patches)
        rope = centred_rope(h, 2 if coarse else 1, config.head_size, self.config.rope_theta)
        (tokens, _), _ = self.blocks((tokens, None), jnp.arange(config.layers), time, condition, rope)
        tokens = self.norm(tokens).astype(dtype)
        if self.head_modulation is not None:
            shift, scale = jnp.moveaxis(self.head_modulation(nn.silu(time)), -2, 0)
            tokens = modulate(tokens, shift[:, None], scale[:, None])
        out = (self.coarse_out if coarse else self.patch_out)(tokens).astype(jnp.float32)
        out = out.reshape(batch, h, w, channels, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(x.shape)
        return (out - x) / over_batch(1 - t, x) if coarse else out


def model(config, dtype, remat):
    sizes, groups = config.model, config.fork["coarse_groups"]
    require(0 < groups < sizes.num_groups, f"fork.coarse_groups is {groups}, it should be 1 .. {sizes.num_groups - 1}")
    require(sizes.velocity.repa_layer is None, "this decoder has no REPA head; set model.velocity.repa_layer to none")
    require(sizes.resolution % (2 * sizes.velocity.patch_size) == 0, "two patches should divide the image")
    path = halves(boundary(sizes, groups), sizes.velocity.time_shift, config.fork["flow_power"])
    return Tokenizer(sizes, dtype, remat, velocity_network=network(groups), path=path)


@functools.cache
def network(groups):
    return functools.partial(Pyramid, groups=groups)


@functools.cache
def halves(end, shift, power):
    """The path whose times are drawn before `end` for the first half of a batch, and after it for the second."""
    mean = np.mean((1 - shift_time((np.arange(10_000) + 0.5) / 10_000, shift)) ** power)

    def draw(key, shape):
        u = jax.random.uniform(key, shape)
        return jnp.where(jnp.arange(shape[0]) < shape[0] // 2, end * u, end + (1 - end) * u)

    def weight(t):  # of equally many coarse and fine images, as of times drawn uniformly; power: as of `loss.flow_power`
        return jnp.where(t < shift_time(end, shift), 2 * end, 2 * (1 - end)) * (1 - t) ** power / mean

    return Path(draw=draw, weight=weight)


loss = dataclasses.replace(TOKENIZER.loss, flow_power=0.0)  # the path weighs times
config = dataclasses.replace(TOKENIZER, name="patch_pyramid", loss=loss, fork={"coarse_groups": 2, "flow_power": 2.0})
rules = ((r"coarse_in/kernel", P(None, "fsdp")), (r"coarse_out/kernel", P("fsdp", None)), (r"stage", P()))
experiment = Experiment(config, model=model, rules=rules)
