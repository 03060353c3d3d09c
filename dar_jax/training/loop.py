"""A whole training run, of either stage: data, steps, logs, checkpoints, resuming and stopping."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dar_jax import parallel
from dar_jax.config import TokenizerTraining, validate
from dar_jax.data.pipeline import batches
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.files import check_writable
from dar_jax.parallel import hosts
from dar_jax.training import checkpoint
from dar_jax.training.lock import only_run
from dar_jax.training.logs import Log
from dar_jax.training.meter import Reader, Window, work_of_step
from dar_jax.training.profile import Profile
from dar_jax.training.stages import Stage, tokenizer_stage, transformer_stage
from dar_jax.training.start import Start, start_from
from dar_jax.training.state import Params, abstract_state, init_state, with_new_optimizer
from dar_jax.training.step import make_train_step

# (stage, EMA parameters, batch on the devices) -> pictures by name, uint8 [H, W, 3]
Pictures = Callable[[Stage, Params, Mapping[str, jax.Array]], dict[str, np.ndarray]]
Evaluate = Callable[[Stage, Params], dict[str, float]]  # (stage, EMA parameters) -> scalars by name


@dataclass(frozen=True)
class Summary:
    """How a run ended: steps done, the signal that stopped it before its last step, and the last values logged.

    Of several hosts that stop together, those that got no signal themselves name SIGTERM.
    """

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
) -> Summary:
    """Runs an experiment in WORKDIR, from the beginning or from its last checkpoint, to its last step.

    SIGTERM, SIGHUP, Ctrl-C and a console whose pipe is closed end the run after the step at hand, with a checkpoint. Step k
    depends on the settings and on k only, so a resumed run ends with the very parameters of an uninterrupted one. Every one of
    several hosts (see `hosts`) has to call this, with a WORKDIR that they share; only the first prints and logs. If one of them
    is lost, the others end.

    Args:
      pictures: makes what is logged every `sample_every` steps; called on every host.
      start: gives weights to begin with, as far as they fit; called where there is no checkpoint to resume from.
      evaluate: makes what is logged every `evaluate_every` steps, just after a checkpoint; called on every host. If it has a
        method `open`, that is called with the stage before the first step: it raises InputError where something is missing, and
        returns notes to print. What fails later, here or in `pictures`, is logged and does not end the run of a single host.

    Raises InputError where the settings, the data or WORKDIR are unfit, or another run is in WORKDIR; TrainingDiverged where
    training is.
    """
    config = experiment.config
    validate(config)
    if config.train.sample_every and pictures is None:
        raise InputError("train.sample_every is set, but this run was given nothing that makes pictures; set it to 0")
    if config.train.evaluate_every and evaluate is None:
        raise InputError("train.evaluate_every is set, but this run was given nothing that evaluates; set it to 0")
    folder = checkpoint.absolute(workdir)
    check_writable(folder)
    checkpoint.require_shared(folder)
    with only_run(folder):
        return _train(experiment, folder, resume, pictures, start, evaluate)


def _train(experiment: Experiment, folder: epath.Path, resume: bool, pictures, start, evaluate) -> Summary:
    config = experiment.config
    found = hosts.of_first(checkpoint.latest_step(folder))
    if found is not None and not resume:
        raise InputError(f"{folder} already holds a run (step {found}); pass --resume or choose another folder")
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(config.train.batch_size, config.train.accumulate, mesh)
    before = None if found is None else checkpoint.inspect(folder / "checkpoints" / str(found))
    weights = start() if start is not None and found is None else None

    with hosts.ending_together(), jax.set_mesh(mesh):
        if isinstance(config, TokenizerTraining):
            stage = tokenizer_stage(experiment, mesh)
        else:
            stage = transformer_stage(experiment, folder, mesh, before)
        optimizer = stage.described.make_optimizer()
        abstract = abstract_state(stage.described.init_params, optimizer, mesh, experiment.rules)
        notes = checkpoint.require_same_run(before, stage.experiment, stage.class_names) if before else []
        if found is not None:
            state = checkpoint.restore(folder / "checkpoints" / str(found), abstract)
            if state.opt_state is None:
                state = with_new_optimizer(state, optimizer, abstract)
                notes.append("the checkpoint holds no optimizer, a new one starts here")
            if start is not None:
                notes.append("the weights to start from are not read again")
            if found >= config.train.steps:
                notes.append("nothing is left to do; to go on, raise train.steps")
        else:
            state = init_state(stage.described.init_params, optimizer, mesh, experiment.rules)
            if weights is not None:
                state, notes = start_from(weights, state)
        if config.train.evaluate_every and hasattr(evaluate, "open"):
            notes += evaluate.open(stage)
        train_step = make_train_step(stage.described.loss_fn, optimizer, config, abstract, mesh)
        with (
            Log(folder, config.train.steps, found or 0, active=hosts.first()) as log,
            Profile(config.train.profile, folder, log) as profile,
            checkpoint.open_checkpoints(folder, config.train) as checkpoints,
            _stop_signals(log) as asked_to_stop,
            hosts.ending_together(),  # once more, before a checkpoint that is being written waits for a lost host
        ):
            log.say("\n".join([_opening(stage, state.params, mesh, found, resume), *notes]))
            return _run(stage, state, train_step, mesh, log, profile, checkpoints, asked_to_stop, pictures, evaluate)


def _run(
    stage: Stage, state, train_step, mesh: Mesh, log: Log, profile: Profile, checkpoints, asked_to_stop, pictures, evaluate
) -> Summary:
    train = stage.experiment.config.train
    step, stopping = int(state.step), None
    reader, window = Reader(train.steps, log, checkpoints), Window()
    with contextlib.closing(_device_batches(stage, mesh, start_step=step)) as data:
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
            window = window.add(metrics)
            full = step % train.log_every == 0 or last
            reader.push(step, metrics, window if full else None)
            window = Window() if full else window
            if profile.ends(step):
                with reader.pause(step):
                    profile.stop(state)
            evaluates = train.evaluate_every and step % train.evaluate_every == 0
            if step % train.checkpoint_every == 0 or last or evaluates:
                reader.drain()
                checkpoint.save(checkpoints, state, stage.experiment, stage.class_names)
            if train.sample_every and step % train.sample_every == 0:
                with reader.pause(step), _logged_failure(log, step, "no pictures"):
                    log.pictures(step, pictures(stage, state.ema, batch))
            if evaluates:
                with reader.pause(step), _logged_failure(log, step, "not evaluated"):
                    log.record(step, evaluate(stage, state.ema), None)
    checkpoints.wait()
    if step < train.steps:
        log.say(f"stopped at step {step}, which is saved; go on with --resume")
    return Summary(step, stopping if step < train.steps else None, reader.record)


@contextlib.contextmanager
def _logged_failure(log: Log, step: int, outcome: str) -> Iterator[None]:
    """Around what training can do without: one line where it fails. Of many hosts the others may be waiting, and all end."""
    try:
        yield
    except Exception as error:
        if hosts.many():
            raise
        reason = " ".join(str(error).split())[:300]
        log.say(f"step {step}: {outcome} ({reason if isinstance(error, InputError) else f'{type(error).__name__}: {reason}'})")


def _device_batches(stage: Stage, mesh: Mesh, start_step: int) -> Iterator[dict[str, jax.Array]]:
    """Batches as global arrays, of which every host reads the rows that its devices hold."""
    config = stage.experiment.config
    settings = {"batch_size": config.train.batch_size, "seed": config.train.seed, "start_step": start_step}
    own, parts = parallel.batch_parts(mesh)
    with contextlib.ExitStack() as open_parts:
        readers = [batches(stage.source, config.data, **settings, host=part, hosts=parts) for part in own]
        for reader in readers:
            open_parts.enter_context(contextlib.closing(reader))
        for read in zip(*readers):
            rows = read[0] if len(read) == 1 else {name: np.concatenate([part[name] for part in read]) for name in read[0]}
            yield parallel.global_batch(rows, mesh)


@contextlib.contextmanager
def _stop_signals(log: Log) -> Iterator[Callable[[int], signal.Signals | None]]:
    """Yields `asked(step)`: the signal because of which the run should end after that step, if there was one. A second Ctrl-C
    ends it at once.

    Of several hosts each may get SIGTERM at another step, or none; JAX, which catches it (see `hosts.join`), makes them agree
    on one step. What else asks one of them to stop is handed over as SIGTERM.

    A console that nobody reads any more counts as SIGPIPE; a SIGHUP that is ignored (nohup) stays so.
    """
    many = hosts.many()
    got: list[signal.Signals] = []

    def handle(number: int, frame: Any) -> None:
        got.append(signal.Signals(number))
        if caught:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # print is not safe here
            os.write(2, b"\nstopping after this step, with a checkpoint (Ctrl-C again: at once)\n")
        if many:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(step: int) -> signal.Signals | None:
        if log.reader_gone and not got:
            handle(signal.SIGPIPE, None)
        if many and not multihost_utils.reached_preemption_sync_point(step):
            return None
        return got[0] if got else signal.SIGTERM if many else None

    caught = [signal.SIGINT] if many else [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        caught = []  # Python lets no other thread handle signals
    before = {number: signal.signal(number, handle) for number in caught}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _opening(stage: Stage, params: Params, mesh: Mesh, found: int | None, resume: bool) -> str:
    config = stage.experiment.config
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    if found is not None:
        where = f"from step {found}"
    else:
        where = "from the beginning" + (" (no checkpoint to resume from)" if resume else "")
    return f"{config.name}: {count:,} parameters, {config.train.steps} steps {where}, {mesh.size} devices ({sizes})"
