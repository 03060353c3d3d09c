"""Denoising with fresh noise: two samplers with the base's marginals, if its velocity is right.

Source:   Stochastic Interpolants (arXiv 2303.08797) and SiT (arXiv 2401.08740): any ODE dx = v dt has a family of SDEs with the
          same marginals. The ancestral one is DDIM's (arXiv 2010.02502) on the straight path.
Command:  dar-jax sample runs/digits --experiment experiments/variants/stochastic.py --labels 3 --seeds 1,2 --out samples
          (or :half, :whole, :ancestral_half, :ancestral_whole; --num-denoising-steps 32 brings it near its limit)
Differs:  in the solver (`Method.solver`).
Time:     nothing is trained; as long as the base with the same number of steps.
Result:   digits, three seeds, 8 steps: no gain. SDE 18.88 dB, distance 0.606, `half` 18.42, 0.655; `ancestral_half` 18.99,
          0.599; Euler 18.97, 0.596. See docs/variants.md.

On the straight path x = t z1 + (1 - t) z0 the score is (t v - x) / (1 - t), the estimate of the noise z0 is x - t v.

euler_maruyama(e): dx = (v + e (t v - x)) dt + sqrt(2 e (1 - t)) dW, that is diffusion e (1 - t). ancestral(eta): goes to the
estimate of the image and back to the next time, with noise there of which DDIM's share is new, times eta. The last step of
both is the ODE's. With 0 they are Euler's. A sample's noise comes from its own key.
Paths other than the straight one: tests/forks/cosine_path.py.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dar_jax.experiment import Experiment
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.settings import Method
from dar_jax.sampling.solvers import Solver


def fresh(keys, x, t_next):
    """Standard normal noise of each sample's own, none in the last step."""
    return jnp.where(t_next < 1, jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys), 0)


def euler_maruyama(e):
    def step(velocity, x, carry, t, t_next, keys):
        v, length = velocity(x, t), t_next - t
        drift = v + jnp.where(t_next < 1, e, 0) * (t * v - x)
        moved = x + length * drift + jnp.sqrt(2 * e * (1 - t) * length) * fresh(keys, x, t_next)
        return moved, velocity.data(x, v, t), carry

    return Solver(lambda x: None, step)


def ancestral(eta):
    def step(velocity, x, carry, t, t_next, keys):
        v = velocity(x, t)
        kept = t * (1 - t_next) / ((1 - t) * t_next)
        share = eta * jnp.sqrt(1 - kept**2)
        change = (jnp.sqrt(1 - share**2) - 1) * (x - t * v) + share * fresh(keys, x, t_next)
        return x + (t_next - t) * v + (1 - t_next) * change, velocity.data(x, v, t), carry

    return Solver(lambda x: None, step)


def of(solver):
    return Experiment(dataclasses.replace(TRANSFORMER, name="stochastic", data=DIGITS), method=Method(solver=solver))


experiment = of(euler_maruyama(0.1))
half = of(euler_maruyama(0.5))
whole = of(euler_maruyama(1.0))
ancestral_half = of(ancestral(0.5))
ancestral_whole = of(ancestral(1.0))
