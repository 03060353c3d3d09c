"""What a step does and how fast, and metrics read behind the devices, so that they do not wait for the host."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Work:
    """What one step does on all devices.

    least_seconds: what its matrix products would take at the devices' bfloat16 peak; None where this is not known.
    """

    images: int
    tokens: int
    least_seconds: float | None

    def rates(self, steps: int, seconds: float) -> dict[str, float]:
        """What goes to the log when so many steps have taken so long.

        `mfu`, model FLOPs utilisation, is that of the whole step: of the frozen networks' operations as well, not of what is
        computed again. It is a share of the bfloat16 peak in float32, too.
        """
        found = {"images_per_second": steps * self.images / seconds, "tokens_per_second": steps * self.tokens / seconds}
        return found if self.least_seconds is None else found | {"mfu": steps * self.least_seconds / seconds}


def work_of_step(stage: Stage, mesh: Mesh, train_step: Any, state: Any, batch: Mapping[str, jax.Array]) -> Work:
    config = stage.experiment.config
    images, tokens = config.train.batch_size, config.train.batch_size * config.model.num_tokens
    peak = config.train.peak_flops or PEAKS.get(mesh.devices.flat[0].device_kind)  # of CPUs nobody says it
    if peak is None:
        return Work(images, tokens, None)
    traced = train_step.trace(state, batch, stage.frozen)  # costs nothing: the first step does not trace again
    return Work(images, tokens, model_flops(traced) / (mesh.size * peak))


@dataclass(frozen=True)
class Window:
    """The metrics summed over the steps since the last log, on the devices."""

    steps: int = 0
    sums: Metrics | None = None

    def add(self, metrics: Metrics) -> "Window":
        summed = {name: value for name, value in metrics.items() if name not in ("finite", "learning_rate")}
        return Window(self.steps + 1, summed if self.sums is None else _add(self.sums, summed))

    def scalars(self) -> dict[str, float]:
        """Means over the steps; of the codes, the share in use (`codebook_usage`) and the number never used (`dead_codes`)."""
        sums = jax.device_get(self.sums)
        values = {"loss": 0.0}  # comes first
        for name, total in sums.items():
            if name == "code_counts":
                values |= {"codebook_usage": float(np.mean(total > 0)), "dead_codes": float(np.sum(total == 0))}
            else:
                values[name] = float(total) if is_count(total) else float(total) / self.steps
        return values


_add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))


class Reader:
    """Reads metrics `LOOK_AHEAD` steps late, so that the device does not wait for the host; stops where they are not finite."""

    def __init__(self, steps: int, log: Log, checkpoints):
        self.steps, self.log, self.checkpoints = steps, log, checkpoints
        self.work: Work | None = None  # of a step, before the first of them is read
        self.record: dict[str, float] = {}
        self._pending: deque[tuple[int, Metrics, Window | None]] = deque()
        self._clock: tuple[int, float] | None = None  # a step and when it was done; starts after the compilation

    def push(self, step: int, metrics: Metrics, window: Window | None) -> None:
        self._pending.append((step, metrics, window))
        while len(self._pending) > LOOK_AHEAD:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        while self._pending:
            self._read(*self._pending.popleft())

    @contextlib.contextmanager
    def pause(self, step: int) -> Iterator[None]:
        """For what is no training: begins when the metrics up to `step` are read, and is left out of the rates."""
        self.drain()
        yield
        if self._clock is not None:
            self._clock = (step, time.perf_counter())

    def _read(self, step: int, metrics: Metrics, window: Window | None) -> None:
        if not metrics["finite"]:
            raise TrainingDiverged(self._farewell(step))
        if self._clock is None:
            self._clock = (step, time.perf_counter())
        if window is None:
            return
        self.record = window.scalars() | {"learning_rate": float(metrics["learning_rate"])}
        steps, seconds = step - self._clock[0], time.perf_counter() - self._clock[1]
        seconds_left = None
        if steps:
            self.record |= self.work.rates(steps, seconds)
            seconds_left = (self.steps - step) * seconds / steps
        self._clock = (step, time.perf_counter())
        self.log.record(step, self.record, seconds_left)

    def _farewell(self, step: int) -> str:
        saved = self.checkpoints.latest
        kept = f"the last checkpoint is of step {saved.step}" if saved else "there is no checkpoint yet"
        return f"training diverged: loss, gradient or parameters are not finite at step {step}; {kept}"
