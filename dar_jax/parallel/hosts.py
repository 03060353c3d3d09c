"""Many hosts as one job: how they find each other, which one prints, and how all of them end when one does.

Every host runs the same command, on the same checkpoints and data; JAX makes one mesh of the devices of all. One process is a
"host" here, however many of them share a machine.

A host that dies stops the others within about `HEARTBEAT_TIMEOUT` seconds: JAX ends those that wait for a silent one, and a
computation that fails because of it ends its host at once. Nobody goes on alone; the job is started again, with
--resume.
"""

import contextlib
import importlib.util
import os
import re
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dar_jax.errors import InputError

HEARTBEAT_TIMEOUT = 60  # seconds without a sign of life after which a host counts as dead
START_TIMEOUT = 300  # seconds that hosts wait for each other at the start
PATIENCE = 15  # seconds after which a host says that it is waiting
LOST = 3  # exit code of a host whose computation failed because another host is gone


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
    start_timeout: int = START_TIMEOUT,
    preemptible: bool = True,
) -> None:
    """Makes this process one host of a job, if it is to be one; has to be called before JAX looks for devices.

    The hosts are found by these arguments, else by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else by
    what SLURM (tasks of one `srun`), Open MPI or Cloud TPU says. On a single machine without any of these, nothing is done.
    Where the other hosts do not come, JAX ends this process with its own message.

    Args:
      coordinator_address: host:port of process 0, where it will listen; process_id: 0 .. num_processes - 1.
      heartbeat_timeout: seconds after which a silent host counts as dead.
      start_timeout: seconds to wait for the other hosts.
      preemptible: SIGTERM makes `multihost_utils.reached_preemption_sync_point` true, which training asks, instead of ending
        the process.

    Raises InputError where the settings contradict each other, or are too few to find the other hosts.
    """
    settings = _settings(coordinator_address, num_processes, process_id)
    if settings is None or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", preemptible)
    timeouts = {"heartbeat_timeout_seconds": heartbeat_timeout, "initialization_timeout": start_timeout}
    text = f"dar-jax: waiting for the other hosts, {start_timeout} seconds at most; is each of them started?"
    notice = threading.Timer(PATIENCE, lambda: print(text, file=sys.stderr, flush=True))
    notice.start()
    try:
        jax.distributed.initialize(**settings, **timeouts)
    except ValueError as error:
        line = " ".join(str(error).split())
        raise InputError(
            f"the other hosts cannot be found: {line} Say --coordinator-address, --num-processes and --process-id, or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error
    finally:
        notice.cancel()


def many() -> bool:
    """True where this process is one host of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """True on the process that prints and writes shared files."""
    return not many() or jax.process_index() == 0


def name() -> str:
    """`host 3 of 16`, counted from 0."""
    return f"host {jax.process_index()} of {jax.process_count()}"


def broadcast_from_first(value: int | None) -> int | None:
    """The first host's value, a number from 0 on or None, on all of them."""
    if not many():
        return value
    number = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
    return None if number < 0 else number


def all_agree(holds: bool) -> bool:
    """True where it holds on all hosts."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(holds)))) if many() else holds


def wait(what: str) -> None:
    """Returns once all hosts have come here."""
    if many():
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once, instead of raising, where a computation of all hosts fails.

    An exception would close a checkpoint that is being written, for instance, and so wait for hosts that are gone.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not many():
            raise
        line = " ".join(str(error).split())
        leave(f"{name()} stops: another one is gone, or computing with it failed; resume all of them ({line[:200]})", LOST)


def leave(message: str | None, code: int) -> NoReturn:
    """Ends this process, one of many hosts, now; an ordinary exit would wait for the others, who may be waiting for us.

    Args: message, a line for stderr; None: the traceback of the current exception.
    """
    if first():
        time.sleep(1)  # all may have failed alike; without this host the others would end before they can say so
    if message is None:
        traceback.print_exc()
    else:
        print(f"dar-jax: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _settings(address: str | None, count: int | None, number: int | None) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None where there is a single host."""
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES") if count is None else count
    number = _number("JAX_PROCESS_ID") if number is None else number
    settings = {"coordinator_address": address, "num_processes": count, "process_id": number}
    settings = {key: value for key, value in settings.items() if value is not None}
    if len(settings) == 3:
        if not re.fullmatch(r".+:\d+", address) or not 0 <= number < count:
            raise InputError(
                f"process {number} of {count} with the coordinator {address} makes no sense; give HOST:PORT, 0 .. N-1"
            )
        return {**settings, "cluster_detection_method": "deactivate"}  # which would show each process of SLURM one device only
    if settings or _slurm_tasks() > 1 or (_number("OMPI_COMM_WORLD_SIZE") or 1) > 1 or _tpu_hosts() > 1:
        return {**settings, **_local_devices()}
    return None


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdigit():
        raise InputError(f"{variable} is {text!r}, it should be a whole number")
    return int(text)


def _slurm_tasks() -> int:
    """The number of tasks of the `srun` that started this process; outside of one, 1."""
    return (_number("SLURM_NTASKS") or 1) if "SLURM_STEP_NODELIST" in os.environ else 1


def _local_devices() -> dict[str, Any]:
    """All GPUs of a node, where SLURM runs one task on each node: JAX would take the first one only. Nothing where
    JAX_LOCAL_DEVICE_IDS is set, which an argument would override."""
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return {}
    tasks, gpus = _slurm_tasks(), _number("SLURM_GPUS_ON_NODE")
    return {"local_device_ids": list(range(gpus))} if gpus and tasks > 1 and tasks == _number("SLURM_NNODES") else {}


def _tpu_hosts() -> int:
    """The number of hosts of the TPU slice, or slices, of this machine; 1 where it has no TPU."""
    if not _has_tpu():
        return 1
    names = os.environ.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    slices = os.environ.get("MEGASCALE_NUM_SLICES") or "".join(
        re.findall(r"MEGASCALE_NUM_SLICES: '(\d+)'", _metadata("tpu-env"))
    )
    return len(names.split(",")) * int(slices or 1)


def _has_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return "tpu" in platforms and bool(chips) and importlib.util.find_spec("libtpu") is not None


def _metadata(key: str) -> str:
    """Google Cloud's metadata of this machine; empty elsewhere."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    address = f"http://{server}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()
    return ""
