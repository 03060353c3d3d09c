"""How the hosts of a job are found, without starting any."""

import http.server
import os
import threading

import jax
import pytest

from dar_jax.cli import main as cli
from dar_jax.errors import InputError
from dar_jax.parallel import hosts

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
TRIPLE = {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1, "cluster_detection_method": "deactivate"}


@pytest.fixture
def asked(monkeypatch):
    """What `jax.distributed.initialize` is called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    for name in os.environ:
        if name.startswith(("JAX_COORD", "JAX_NUM_P", "JAX_PROCESS", "SLURM", "OMPI", "TPU_WORKER", "MEGASCALE")):
            monkeypatch.delenv(name)
    before = jax.config.jax_enable_preemption_service
    yield calls
    jax.config.update("jax_enable_preemption_service", before)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (EXPLICIT, TRIPLE),
        ({**SLURM, "SLURM_NTASKS": "2"}, {}),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        # one task a node, which is to have all of the node's GPUs; and one task for each GPU, which JAX sees to
        ({**SLURM, "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}, {"local_device_ids": [0, 1, 2, 3]}),
        ({**SLURM, "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}, {}),
        ({**SLURM, "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "JAX_LOCAL_DEVICE_IDS": "1"}, {}),
        ({**SLURM, "SLURM_NTASKS": "2", **EXPLICIT}, TRIPLE),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None),  # a batch script, not a task of srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_hosts_are_found_by_the_environment(asked, monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.join(heartbeat_timeout=9)
    timeouts = {"heartbeat_timeout_seconds": 9, "initialization_timeout": hosts.START_TIMEOUT}
    assert asked == ([] if expected is None else [{**expected, **timeouts}])
    if expected is not None:  # which training relies on, from Python too
        assert jax.config.jax_enable_preemption_service


@pytest.mark.parametrize(
    "answers, environment, found",
    [
        ({"worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}, {}, True),
        ({"worker-network-endpoints": "a:0:10.0.0.1"}, {}, False),
        ({"worker-network-endpoints": "a:0:10.0.0.1", "tpu-env": "X: '1'\nMEGASCALE_NUM_SLICES: '2'\n"}, {}, True),
        ({}, {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({}, {"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({}, {}, False),
    ],
)
def test_hosts_of_a_tpu_slice(asked, monkeypatch, answers, environment, found):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.rpartition("/")[2]
            known = key in answers and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers.get(key, "").encode())

        def log_message(self, *_):
            pass

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    with http.server.ThreadingHTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_port}")
        hosts.join()
        server.shutdown()
    assert len(asked) == found


def test_options_come_before_the_environment(asked, monkeypatch):
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    line = "train file.py --process-id 0 --mesh.data -1 --coordinator-address b:2 --workdir w --heartbeat-timeout 5"
    assert cli.join_hosts([*line.split(), "--num-processes", "3"]) == [
        "train",
        "file.py",
        "--mesh.data",
        "-1",
        "--workdir",
        "w",
    ]
    [settings] = asked
    names = ("coordinator_address", "num_processes", "process_id", "heartbeat_timeout_seconds")
    assert [settings[name] for name in names] == ["b:2", 3, 0, 5]
    assert jax.config.jax_enable_preemption_service  # only training answers SIGTERM
    cli.join_hosts(["evaluate", "samples.npz"])
    assert len(asked) == 2 and not jax.config.jax_enable_preemption_service
    for others in ("info runs/digits", "train --help", ""):
        assert cli.join_hosts(others.split()) == others.split()
    assert len(asked) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"coordinator_address": "a:1", "num_processes": 2, "process_id": 2}, "process 2 of 2 .* makes no sense"),
        ({"coordinator_address": "a", "num_processes": 2, "process_id": 0}, "HOST:PORT"),
    ],
)
def test_what_makes_no_sense_is_refused(asked, options, message):
    with pytest.raises(InputError, match=message):
        hosts.join(**options)
    assert not asked


def test_too_little_is_said(asked, monkeypatch):
    def refuse(**_):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(InputError, match="cannot be found: Number of processes must be defined. Say --coordinator-address"):
        hosts.join(coordinator_address="a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two'"):
        hosts.join()
    with pytest.raises(InputError, match="invalid int value: 'two'"):
        cli.join_hosts(["train", "file.py", "--num-processes", "two"])
