"""When a run is asked to stop: by a signal, or because nobody reads its console any more."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import multihost_utils

from dar_jax.parallel import hosts
from dar_jax.training.logs import Log


@contextlib.contextmanager
def stop_signals(log: Log) -> Iterator[Callable[[int], signal.Signals | None]]:
    """Yields `asked(step)`: the signal because of which the run should end after that step, if there was one. A second Ctrl-C
    ends it at once.

    Several hosts may get SIGTERM at different steps, or only some of them; JAX, which catches it (see `hosts.join`), makes them
    agree on one step. Any other signal that one of them gets is passed on as SIGTERM.

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
