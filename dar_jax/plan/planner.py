"""`dar-jax plan`: from an experiment and a topology to a `Plan`, and the search for a better batch and remat."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

from dar_jax import parallel
from dar_jax.experiment import Experiment
from dar_jax.inference.trained import run_mesh
from dar_jax.plan import hlo, jobs, report
from dar_jax.plan.chips import Chip, chip_of
from dar_jax.plan.compiler import cache_folder, compile_for, open_topology, without_jax_cache
from dar_jax.training.flops import matrix_products, model_flops

log = logging.getLogger("dar_jax.plan")

REMATS = ("none", "dots", "full")  # from the one that computes least again to the one that keeps least


@without_jax_cache()
def plan(
    experiment: Experiment,
    topology: str,
    batch_size: int | None = None,
    sampling: bool = False,
    search: int = 0,
    figures: dict[str, float] | None = None,
) -> report.Plan:
    """Compiles the training step, or the sampler, for a topology and says what it takes.

    Args:
      batch_size: of all chips together (default: `train.batch_size`).
      search: at most so many further compilations, for the largest batch and the least remat that fit.
      figures: fields of `Chip` to replace.

    Raises InputError where libtpu is missing and where experiment, topology and batch do not go together.
    """
    chip = dataclasses.replace(chip_of(topology), **(figures or {}))
    config = experiment.config

    @functools.cache
    def plan_of(batch_size: int, remat: str) -> report.Plan:
        train = dataclasses.replace(config.train, batch_size=batch_size, remat=remat)
        tried.append(make_plan(experiment.with_config(dataclasses.replace(config, train=train)), topology, chip, sampling))
        return tried[-1]

    tried: list[report.Plan] = []
    size = batch_size or config.train.batch_size
    remat, remats = ("none", ("none",)) if sampling else (config.train.remat, REMATS)  # the sampler computes nothing again
    first = plan_of(size, remat)
    if search < 1:
        return first
    smallest = first.mesh["data"] * first.mesh["fsdp"] * first.accumulate
    best = find_best(lambda *choice: plan_of(*choice).fits, size, remat, remats, smallest, search)
    suggestion = report.suggestion(best, (size, remat))
    return dataclasses.replace(first, tried=[report.attempt(each) for each in tried], suggestion=suggestion)


def find_best(
    fits: Callable[[int, str], bool], batch_size: int, remat: str, remats: tuple[str, ...], smallest: int, limit: int
) -> tuple[int, str] | None:
    """The least remat that fits at this batch size, and the largest batch, doubling, that fits with it.

    Where no remat fits, the batch is halved, with the strongest one. `fits` is asked of the given choice, and of at most
    `limit` others.

    Args: remats, from the weakest to the strongest; smallest, the least possible batch, of which every other is a multiple.

    Returns: the best choice known to fit when the search ends, None where there is none.
    """
    known = {(batch_size, remat): fits(batch_size, remat)}

    def ask(*choice: Any) -> bool | None:
        if choice not in known and len(known) <= limit:
            known[choice] = fits(*choice)
        return known.get(choice)

    # What does not fit with some remat does not with a weaker one either.
    candidates = remats if known[batch_size, remat] else remats[remats.index(remat) + 1 :]
    best = next((other for other in candidates if ask(batch_size, other)), None)
    if best is None:
        while batch_size % (2 * smallest) == 0:
            batch_size //= 2
            if ask(batch_size, remats[-1]):
                return batch_size, remats[-1]
        return None
    while ask(2 * batch_size, best):
        batch_size *= 2
    return batch_size, best


def make_plan(experiment: Experiment, topology: str, chip: Chip, sampling: bool) -> report.Plan:
    """One compilation, or none where its result is known already, and all figures of it."""
    config, train = experiment.config, experiment.config.train
    mesh = (run_mesh if sampling else parallel.make_mesh)(config.mesh, open_topology(topology))

    def starting() -> None:
        what = "the sampler" if sampling else f"the training step with remat {train.remat}"
        log.info("compiling %s for %s, batch %d; of a large model this takes minutes", what, topology, train.batch_size)

    job = (jobs.sampling_job if sampling else jobs.training_job)(experiment, mesh)
    products = matrix_products(job.traced.jaxpr)
    with jax.set_mesh(mesh):
        program = compile_for(job.traced.lower(), topology, cache_folder(), starting)
    plan = report.Plan(
        experiment=config.name,
        sampling=sampling,
        topology=topology,
        chips=mesh.size,
        mesh=dict(mesh.shape),
        batch_size=train.batch_size,
        accumulate=1 if sampling else train.accumulate,
        remat=train.remat,
        fits=program.hlo is not None and program.needed <= chip.memory,
        memory={**job.memory, "temporaries": program.temporaries, "total": program.needed, "limit": chip.memory},
        model_flops=model_flops(job.traced),
        flops=sum(product.flops for product in products),
        notes=[*job.notes, *report.notes_on_products(products), *program.warnings],
    )
    if program.hlo is None:
        return plan
    computations = hlo.parse(program.hlo)
    times = hlo.executions(computations)
    collectives = hlo.collectives(computations, times, mesh.size)
    compiled_flops = mesh.size * hlo.matrix_flops(computations, times)
    in_kernels = max(0.0, plan.flops - compiled_flops) if hlo.has_kernels(computations) else 0.0
    seconds = report.roofline(
        chip,
        hlo.matrix_flops(computations, times, passes=True) + in_kernels / mesh.size,
        hlo.hbm_bytes(computations, times),
        sum(row.bytes for row in collectives),
    )
    notes = report.notes_on_program(
        job.memory, program.arguments, compiled_flops / plan.flops, collectives, job.parameters, mesh.shape["fsdp"]
    )
    return dataclasses.replace(
        plan,
        compiled_flops=compiled_flops + in_kernels,
        kernel_flops=in_kernels,
        collectives=collectives,
        seconds=seconds,
        mfu=plan.model_flops / (mesh.size * chip.peak * seconds["step"]),
        recipe=None if sampling else report.recipe(train, config.model.num_tokens, seconds["step"], mesh.size),
        notes=[*plan.notes, *notes],
    )
