"""Lossless speculation (`--speculate W` of the library) with other guesses: a small network's, or those of masks.

Source:   Jacobi decoding with fixed noise (MC-SJD, arXiv 2510.24211) and drafter-invariant speculation (arXiv 2408.07978).
Command:  dar-jax sample runs/digits --experiment experiments/variants/speculative.py --labels 3 --seeds 1,2 --out samples
          (any transformer's run will do; nothing is trained; the same as --speculate 8). With a small network that drafts:
          dar-jax train experiments/variants/speculative.py:draft --tokenizer runs/digits/tokenizer --workdir runs/draft
          dar-jax sample runs/digits --experiment experiments/variants/speculative.py:small --labels 3 --seeds 1,2 --out samples
Differs:  in how tokens are found (`Method.predict`), see dar_jax/sampling/speculate.py.
Time:     the drafter trains in half a minute on two CPU cores.
Result:   10.4 of 16 passes for the digits (guidance 2), the same tokens; 6.5 with the drafter. See docs/variants.md.

Guesses are the draws of the last pass (`jacobi`), or another transformer (`small`), with the same noise, makes them, or masks
behind the window draw those after it (`masks`, with a network that has them, see block_diffusion.py). Tokens of a reference,
given as `prefix` beyond `num_given`, are the first guesses.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from dar_jax.experiment import Experiment
from dar_jax.models.attention import causal_mask
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.settings import Method
from dar_jax.sampling.speculate import speculation


def drafter(networks, params):
    """The networks and parameters with the small transformer in place of the large one."""
    small = dataclasses.replace(networks, transformer=networks.others["draft"])
    return small, dataclasses.replace(params, transformer=params.others["draft"])


def masked(masks, bound, x, slots, span):
    """The last `masks` slots are a block, which the others do not see; of the tokens in them only the first is known."""
    count = x.shape[1]
    from_block = np.arange(count) - (count - masks)  # 0 at its first slot
    in_block = (from_block >= 0)[:, None] & (jnp.arange(span) < (slots + count)[:, None, None])
    return bound.masked(x, from_block > 0), causal_mask(count, span, slots) | in_block


config = dataclasses.replace(TRANSFORMER, name="speculative", data=DIGITS)
experiment = Experiment(config, method=Method(predict=speculation(8)))
small = Experiment(config, method=Method(predict=speculation(8, drafter=drafter)), others={"draft": "runs/draft"})
masks = Experiment(config, method=Method(predict=speculation(8, room=8, adapt=functools.partial(masked, 8))))
draft = Experiment(dataclasses.replace(config, name="draft", model=dataclasses.replace(config.model, layers=1)))
