"""Another solver, and other times: Heun's method (two evaluations a step), and steps that crowd near the noise.

`experiment` replaces method.solver; FILE:early also method.times, so that the first group has several steps and a later one
none, each step made in two parts by `substeps`.
"""

import dataclasses

import numpy as np

from dar_jax.experiment import Experiment
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.settings import Method
from dar_jax.sampling.solvers import Solver, euler, substeps


def heun_step(velocity, x, carry, t, t_next, keys):
    first = velocity(x, t)
    second = velocity(x + (t_next - t) * first, t_next)
    mean = (first + second) / 2
    return x + (t_next - t) * mean, velocity.data(x, mean, t), carry


def early_times(steps, config):
    """t = (i / S)^2."""
    return (np.arange(steps, dtype=np.float32) / steps) ** 2


config = dataclasses.replace(TRANSFORMER, name="heun", data=DIGITS)
heun = Solver(lambda x: None, heun_step)
experiment = Experiment(config, method=Method(solver=heun))
early = Experiment(config, method=Method(solver=substeps(euler, 2), times=early_times))
