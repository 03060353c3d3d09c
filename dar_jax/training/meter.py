"""The work of a step and its speed, and metrics read behind the devices, so that they do not wait for the host."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dar_jax.training.flops import PEAKS, model_flops
from dar_jax.training.logs import Log
from dar_jax.training.stages import Stage
from dar_jax.training.step import Metrics, is_count

LOOK_AHEAD = 2  # steps the host may be ahead of the device; a step's metrics are read only when later ones are queued


class TrainingDiverged(Exception):
    """Loss, gradient or parameters became infinite or not a number. The message names the step and the last good checkpoint."""


def work_of_step(stage: Stage, mesh: Mesh, train_step: Any, state: Any, batch: Mapping[str, jax.Array]) -> dict[str, float]:
    """The work of one step on all devices, under the name that its rate per second has in the log.

    `mfu`, model FLOPs utilisation, is the seconds that its matrix products, frozen networks included, would take at the
    bfloat16 peak, also where they are float32; what is computed again does not count. Missing where the peak is not known.
    """
    train = stage.experiment.config.train
    tokens = train.batch_size * stage.experiment.config.model.num_tokens
    work = {"images_per_second": train.batch_size, "tokens_per_second": tokens}
    if peak := train.peak_flops or PEAKS.get(mesh.devices.flat[0].device_kind):  # no data sheet gives it for CPUs
        traced = train_step.trace(state, batch, stage.frozen)  # costs nothing: the first step does not trace again
        work["mfu"] = model_flops(traced) / (mesh.size * peak)
    return work


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


def means(steps: int, sums: Metrics) -> dict[str, float]:
    """Metrics summed over some steps as means; of the codes, the share in use (`codebook_usage`) and the number never used
    (`dead_codes`)."""
    values = {"loss": 0.0}  # comes first
    for name, total in jax.device_get(sums).items():
        if name == "code_counts":
            values |= {"codebook_usage": float(np.mean(total > 0)), "dead_codes": float(np.sum(total == 0))}
        else:
            values[name] = float(total) if is_count(total) else float(total) / steps
    return values


class Reader:
    """Reads metrics `LOOK_AHEAD` steps late, so that the device does not wait for the host; stops where they are not finite."""

    def __init__(self, steps: int, log: Log, checkpoints):
        self.steps, self.log, self.checkpoints = steps, log, checkpoints
        self.work: dict[str, float] | None = None  # of a step, before the first of them is read
        self.record: dict[str, float] = {}
        self._count, self._sums = 0, None  # the steps since the last record, and their metrics summed on the devices
        self._pending: deque[tuple[int, Metrics, tuple[int, Metrics] | None]] = deque()
        self._clock: tuple[int, float] | None = None  # a step and when it was done; starts after the compilation

    def push(self, step: int, metrics: Metrics, full: bool) -> None:
        """Queues the metrics of a step; `full`: with it a record is complete."""
        summed = {name: value for name, value in metrics.items() if name not in ("finite", "learning_rate")}
        self._count, self._sums = self._count + 1, summed if self._sums is None else _add(self._sums, summed)
        self._pending.append((step, metrics, (self._count, self._sums) if full else None))
        if full:
            self._count, self._sums = 0, None
        self.drain(LOOK_AHEAD)

    def drain(self, most: int = 0) -> None:
        """Reads metrics until those of at most so many steps are queued."""
        while len(self._pending) > most:
            self._read(*self._pending.popleft())

    @contextlib.contextmanager
    def pause(self, step: int) -> Iterator[None]:
        """For work other than training: begins when the metrics up to `step` are read, and does not count in the rates."""
        self.drain()
        yield
        if self._clock is not None:
            self._clock = (step, time.perf_counter())

    def _read(self, step: int, metrics: Metrics, record: tuple[int, Metrics] | None) -> None:
        if not metrics["finite"]:
            last = self.checkpoints.latest
            kept = f"the last checkpoint is of step {last.step}" if last else "there is no checkpoint yet"
            raise TrainingDiverged(f"training diverged: loss, gradient or parameters are not finite at step {step}; {kept}")
        if self._clock is None:
            self._clock = (step, time.perf_counter())
        if record is None:
            return
        self.record = means(*record)
        if "learning_rate" in metrics:
            self.record["learning_rate"] = float(metrics["learning_rate"])
        steps, seconds = step - self._clock[0], time.perf_counter() - self._clock[1]
        seconds_left = None
        if steps:
            self.record |= {name: steps * amount / seconds for name, amount in self.work.items()}
            seconds_left = (self.steps - step) * seconds / steps
        self._clock = (step, time.perf_counter())
        self.log.record(step, self.record, seconds_left)
