"""A training run of either stage: data, steps, logs, checkpoints, resuming and stopping."""

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from etils import epath

from dar_jax import parallel
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.files import check_writable
from dar_jax.parallel import hosts
from dar_jax.training import checkpoint
from dar_jax.training.lock import only_run
from dar_jax.training.logs import Log
from dar_jax.training.meter import Reader, work_of_step
from dar_jax.training.profile import Profile
from dar_jax.training.stages import Stage, device_batches, keep_tokenizer, open_stage
from dar_jax.training.start import Start, first_state, opening
from dar_jax.training.state import Params, abstract_state
from dar_jax.training.step import make_train_step
from dar_jax.training.stopping import stop_signals
from dar_jax.training.track import Kind, open_tracker

# (stage, EMA parameters, batch on the devices) -> pictures by name, uint8 [H, W, 3]
Pictures = Callable[[Stage, Params, Mapping[str, jax.Array]], dict[str, np.ndarray]]
Evaluate = Callable[[Stage, Params], dict[str, float]]  # (stage, EMA parameters) -> scalars by name


@dataclass(frozen=True)
class Summary:
    """How a run ended: steps done, the signal that stopped it before its last step (SIGTERM on hosts that stop because another
    one got a signal), and the last values logged."""

    step: int
    stopped_by: signal.Signals | None
    metrics: dict[str, float]


def train(
    experiment: Experiment,
    workdir: str | os.PathLike,
    resume: bool = False,
    pictures: Pictures | None = None,
    start: Callable[[], Start] | None = None,
    evaluate: Evaluate | None = None,
    track: Kind | None = None,
) -> Summary:
    """Runs an experiment in WORKDIR, from the beginning or from its last checkpoint, to its last step.

    SIGTERM, SIGHUP, Ctrl-C and a console whose pipe is closed end the run after the step at hand, with a checkpoint. Step k
    depends on the settings and on k only, so a resumed run ends with the very parameters of an uninterrupted one. With several
    hosts (see `hosts`) all of them call this, with a WORKDIR that they share; only the first prints and logs. If one of them is
    lost, the others end.

    Args:
      pictures: for the log every `sample_every` steps; called on every host.
      start: gives weights to begin with, as far as they fit; called where there is no checkpoint to resume from.
      evaluate: scalars for the log every `evaluate_every` steps, just after a checkpoint; called on every host. If it has a
        method `open`, that is called with the stage before the first step: it raises InputError where something is missing, and
        returns notes to print. Later failures, here or in `pictures`, are logged and do not end the run of a single host.
      track: a tracker that is sent the log too, see `track.Tracker`.

    Raises InputError where the settings, the data or WORKDIR are unfit, or another run is in WORKDIR; TrainingDiverged where
    training is.
    """
    for setting, made_by in (("sample_every", pictures), ("evaluate_every", evaluate)):
        if getattr(experiment.config.train, setting) and made_by is None:
            raise InputError(f"train.{setting} is set, but this run was given nothing that does it; set it to 0")
    folder = checkpoint.absolute(workdir)
    check_writable(folder)
    checkpoint.require_shared(folder)
    with only_run(folder):
        return _train(experiment, folder, resume, pictures, start, evaluate, track)


def _train(experiment: Experiment, folder: epath.Path, resume: bool, pictures, start, evaluate, track) -> Summary:
    config = experiment.config
    step = hosts.broadcast_from_first(checkpoint.latest_step(folder))
    if step is not None and not resume:
        raise InputError(f"{folder} already holds a run (step {step}); pass --resume or choose another folder")
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    before = None if step is None else checkpoint.inspect(folder / "checkpoints" / str(step))
    weights = start() if start and before is None else None
    with hosts.ending_together(), jax.set_mesh(mesh):
        stage = open_stage(experiment, folder, mesh, before)
        optimizer = stage.make_optimizer()
        abstract = abstract_state(stage.init_params, optimizer, mesh, experiment.rules)
        state, notes = first_state(stage, optimizer, abstract, mesh, before, weights)
        notes += ["the weights to start from are not read again"] * bool(start and before)
        if config.train.evaluate_every and hasattr(evaluate, "open"):
            notes += evaluate.open(stage)
        keep_tokenizer(stage, folder)
        train_step = make_train_step(stage.loss_fn, optimizer, config, abstract, mesh, stage.schedule)
        with (
            Log(folder, config.train.steps, step or 0, hosts.first(), tracker=open_tracker(track, folder, config, step)) as log,
            Profile(config.train.profile, folder, log) as profile,
            checkpoint.open_checkpoints(folder, config.train) as checkpoints,
            stop_signals(log) as asked_to_stop,
            hosts.ending_together(),  # once more, before a checkpoint that is being written waits for a lost host
        ):
            log.say("\n".join([opening(stage, state.params, mesh, step, resume), *notes]))
            return _run(stage, state, train_step, mesh, log, profile, checkpoints, asked_to_stop, pictures, evaluate)


def _run(stage, state, train_step, mesh, log: Log, profile: Profile, checkpoints, asked_to_stop, pictures, evaluate) -> Summary:
    train = stage.experiment.config.train
    step, stopping, saving = int(state.step), None, None
    reader = Reader(train.steps, log, checkpoints)
    with contextlib.closing(device_batches(stage, mesh, start_step=step)) as data:
        while step < train.steps and stopping is None:
            if profile.begins(step + 1):
                with reader.pause(step):
                    profile.start(state)
            batch = next(data)
            if reader.work is None:
                reader.work = work_of_step(stage, mesh, train_step, state, batch)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                # Returns at once: the device works while the host goes on, to bring the next batches to the device.
                state, metrics = train_step(state, batch, stage.frozen)
            step += 1
            stopping = asked_to_stop(step)
            last = stopping is not None or step == train.steps
            reader.push(step, metrics, full=step % train.log_every == 0 or last)
            if profile.ends(step):
                with reader.pause(step):
                    profile.stop(state)
            evaluates = train.evaluate_every and step % train.evaluate_every == 0
            if step % train.checkpoint_every == 0 or last or evaluates:
                reader.drain()
                saving = checkpoint.save(checkpoints, state, stage.experiment, stage.class_names, saving)
            if train.sample_every and step % train.sample_every == 0:
                with reader.pause(step), log.failures(step, "no pictures"):
                    log.pictures(step, pictures(stage, state.ema, batch))
            if evaluates:
                with reader.pause(step), log.failures(step, "not evaluated"):
                    log.record(step, evaluate(stage, state.ema), None)
    if saving:
        saving.result()
    if step < train.steps:
        log.say(f"stopped at step {step}, which is saved; go on with --resume")
    return Summary(step, stopping if step < train.steps else None, reader.record)
