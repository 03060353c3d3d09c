"""Where the denoising steps go: how many evaluations of the velocity network each group of tokens gets.

Source:   DiSA (diffusion step annealing) gives later tokens fewer steps; FlowMo (arXiv 2503.11056) crowds its sampler's steps
          at the clean end. In D-AR all tokens share one ODE, so the question is when its steps are.
Command:  python experiments/variants/steps.py runs/digits --evaluations 3 4     (which allocations are worth their steps)
          dar-jax sample runs/digits --experiment experiments/variants/steps.py --labels 3 --seeds 1,2 --out samples
          What was worth it belongs to the library: `--steps late3` and others.
Differs:  in the times of the denoising steps (`Method.times`).
Time:     nothing is trained; see docs/variants.md for that of a search.
Result:   digits, three seeds: late3 (3 evaluations) has 18.71 dB and a distance of 0.586, the base (4) 19.27 dB and 0.625;
          late6 18.14 dB and 0.549. After 3,000 steps of training only late6 is better: 0.387, base 0.449. See docs/variants.md.

An allocation (n_0, .., n_G-1) says how many steps read each group's condition tokens. Group g owns the times within 1/2G of
g/G; the first group those up to 1/2G, the last one those from (2G - 3)/2G on. n times lie at the centres of n equal parts of
it, but for the first time of all, 0, and a single one of a later group, g/G; so all ones are the paper's times. A group
without a step has no new preview; its codes still reach the image, through the causal token decoder. Only the last group needs
a step, or its codes would never be read.
"""

import dataclasses
import functools
import itertools

import numpy as np

from dar_jax.cli.options import script
from dar_jax.config import SamplingConfig
from dar_jax.console import columns
from dar_jax.errors import require
from dar_jax.evaluation.metrics import pixel_distance
from dar_jax.experiment import Experiment
from dar_jax.inference.reconstruct import images_of, reconstruct
from dar_jax.inference.trained import load_tokenizer
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.settings import Method, make_settings
from dar_jax.sampling.solvers import variable_adams2

EXHAUSTIVE = 4  # groups, up to which a search tries all allocations


def allocated_times(counts, num_steps, config):
    """Times before the shift, float32 [sum of counts], for `Method.times`. Raises ValueError for counts that do not fit."""
    groups = config.num_groups
    if len(counts) != groups or min(counts) < 0 or not counts[0] or not counts[-1]:
        raise ValueError(f"an allocation to {groups} groups is as many counts, of which first and last are not 0, not {counts}")
    edges = [0, *((2 * group + 1) / (2 * groups) for group in range(groups - 1)), 1]
    times = []
    for group, (count, start, end) in enumerate(zip(counts, edges, edges[1:])):
        centres = start + (end - start) * (np.arange(count) + 0.5) / max(count, 1)
        times += [group / groups] if count == 1 else [*centres]
    return np.asarray([0, *times[1:]], np.float32)


def allocation(*counts):
    """The method with so many steps for each group, and a solver of second order for them."""
    return Method(times=functools.partial(allocated_times, counts))


def allocations(evaluations, groups):
    """All ways to give the first group a step or more, the last one too, and the others any number."""
    bars = itertools.combinations(range(evaluations + groups - 3), groups - 1)
    for chosen in bars:
        edges = (-1, *chosen, evaluations + groups - 3)
        counts = [end - start - 1 for start, end in zip(edges, edges[1:])]
        yield (counts[0] + 1, *counts[1:-1], counts[-1] + 1)


def descent(measure, counts):
    """From an allocation on, moves one step at a time to the group where it brings the distance down most."""
    best = measure(counts)
    while True:
        moves = []
        for source, target in itertools.permutations(range(len(counts)), 2):
            moved = list(best[-1])
            moved[source] -= 1
            moved[target] += 1
            if min(moved) >= 0 and moved[0] and moved[-1]:
                moves.append(measure(tuple(moved)))
        better = min(moves, key=lambda row: row[2])
        if better[2] >= best[2]:
            return
        best = better


def front(rows):
    """Those rows (evaluations, PSNR, distance, allocation) that no other one matches with no more evaluations."""
    beaten = lambda a, b: b[:3] != a[:3] and b[0] <= a[0] and b[1] >= a[1] and b[2] <= a[2]  # noqa: E731
    return [row for row in rows if not any(beaten(row, other) for other in rows)]


def main(run: str, evaluations: tuple[int, ...] = (2, 3, 4, 5), images: int = 300, noises: int = 3):
    """Decode held-out images with allocations of so many evaluations, and show those that no other one beats in both PSNR and
    the Fréchet distance of the pixels (small images only). Beyond 4 groups the search moves one step at a time."""
    require(min(evaluations) >= 2, "the fewest evaluations are 2: one in the first group and one in the last")
    trained = load_tokenizer(run)
    originals, _ = images_of(trained, images)
    groups, settings, rows = trained.config.num_groups, make_settings(SamplingConfig(), trained.config), {}

    def measure(counts):
        """(evaluations, PSNR, distance, allocation), means over the noises."""
        if counts not in rows:
            times = tuple(map(float, allocated_times(counts, None, trained.config)))
            chosen, figures = dataclasses.replace(settings, times=times, solver=variable_adams2), []
            for noise in range(noises):
                result = reconstruct(trained, originals, np.arange(len(originals)) + 10_000 * noise, chosen)
                figures.append((result.psnr.mean(), pixel_distance(originals, result.images)))
            rows[counts] = (sum(counts), *np.mean(figures, axis=0), counts)
        return rows[counts]

    for count in evaluations:
        if groups <= EXHAUSTIVE:
            for counts in allocations(count, groups):
                measure(counts)
        else:
            descent(measure, (1, *[0] * (groups - 2), count - 1))
    found = sorted(front(rows.values()), key=lambda row: (row[0], -row[1]))
    cells = [(str(n), f"{psnr:.2f}", f"{distance:.3f}", " ".join(map(str, counts))) for n, psnr, distance, counts in found]
    print(f"{len(rows)} allocations tried, {noises} noises for each of {len(originals)} images")
    print(columns([("evaluations", "PSNR", "distance", "steps of each group"), *cells], ">>>"))


config = dataclasses.replace(TRANSFORMER, name="steps", data=DIGITS)
experiment = Experiment(config, method=allocation(1, 0, 0, 2))  # of 4 groups, as the digits have
falling = Experiment(config, method=allocation(2, 2, 1, 1))  # DiSA's direction

if __name__ == "__main__":
    script(main)
