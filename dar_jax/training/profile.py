"""A `jax.profiler` trace over some steps of a run, where TensorBoard looks for it."""

import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from dar_jax.training.logs import Log


class Profile:
    """Traces the steps from the first to the last of `steps`, counted from 1 as in the log, on this host; None: nothing.

    A run that resumes amid these steps traces the remaining ones, and one that ends there keeps its trace. A context manager.
    The files are in WORKDIR/logs/plugins/profile/steps_FIRST_to_LAST, one for each host.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: str | os.PathLike, log: Log):
        self._first, self._last = steps or (1, 0)
        self._name, self._log = f"steps_{self._first}_to_{self._last}", log
        self._folder = epath.Path(workdir) / "logs" / "plugins" / "profile" / self._name
        self._local: tempfile.TemporaryDirectory | None = None  # of the trace that is going on

    def begins(self, step: int) -> bool:
        """True where the trace starts before this step."""
        return self._local is None and self._first <= step <= self._last

    def ends(self, step: int) -> bool:
        """True where the trace ends after this step."""
        return self._local is not None and step == self._last

    def start(self, state: Any) -> None:
        """Begins to trace once the devices are done with what `state` needs."""
        jax.block_until_ready(state)
        self._local = tempfile.TemporaryDirectory()
        options = jax.profiler.ProfileOptions()
        options.session_id = self._name  # else every host would name its folder by the time on its clock
        jax.profiler.start_trace(self._local.name, profiler_options=options)

    def stop(self, state: Any) -> None:
        """Writes the trace once the devices are done with what `state` needs."""
        jax.block_until_ready(state)
        with self._local as local:
            self._local = None
            jax.profiler.stop_trace()
            self._folder.mkdir(parents=True, exist_ok=True)
            for file in Path(local, "plugins", "profile", self._name).iterdir():
                (self._folder / file.name).write_bytes(file.read_bytes())  # the profiler itself cannot write to buckets
        self._log.say(f"wrote the profile {self._folder} (for TensorBoard to show it: pip install xprof)")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._local is not None:
            self.stop(None)
