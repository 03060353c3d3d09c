"""Processes of this machine as the hosts of one training job, to be stopped, killed and started again.

    python tests/many_hosts.py --kills 10

trains a small experiment undisturbed, then once more while killing one of its two hosts again and again, each time at a random
moment, and starting the job anew; it ends with 0 if both runs have the same loss curve and the same parameters, bit for bit.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jaxlib
import numpy as np

RATES = ("images_per_second", "tokens_per_second", "mfu")  # what is logged of the time, not of the training
ROOT = Path(__file__).parents[1]
CACHE = os.environ.get("DAR_JAX_TEST_CACHE", f"{tempfile.gettempdir()}/dar_jax-test-cache-{os.getuid()}")
STAND_IN = ROOT / "tests" / "stand_in.py"
# Compiling takes longer than running here; level 0 halves it and changes no number beyond rounding. And with fewer cores than
# devices, collectives that run side by side can wait for each other for ever; on a loaded machine one can take longer than
# the 40 seconds after which XLA ends the process.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false"
FLAGS += " --xla_cpu_collective_call_terminate_timeout_seconds=300 --xla_cpu_collective_timeout_seconds=300"
# Halves it again; only where they are known to be known, because a process ends at an unknown flag.
FASTER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
FASTER = FASTER if jaxlib.__version__.startswith("0.10.") else ""
COMMAND = "import sys; from dar_jax.cli.main import main; sys.exit(main())"


class Job:
    """`dar-jax ...`, or other code, on `hosts` processes of `devices` simulated devices; none of them outlives its context."""

    def __init__(
        self,
        *arguments: object,
        hosts: int = 2,
        devices: int = 4,
        heartbeat: int = 20,
        start: int = 60,
        code: str = COMMAND,
        **environment: str,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory()
        self.processes = []
        for host in range(hosts):
            flags = f"--xla_force_host_platform_device_count={devices} {FLAGS} {FASTER}"
            place = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": CACHE, "PYTHONPATH": str(ROOT)}
            if hosts > 1:
                names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
                place |= dict(zip(names, (f"localhost:{port}", str(hosts), str(host))))
            timeouts = ["--heartbeat-timeout", str(heartbeat), "--start-timeout", str(start)]
            command = [sys.executable, "-c", code, *map(str, arguments), *timeouts]
            with open(self._file(host, "stdout"), "w") as out, open(self._file(host, "stderr"), "w") as err:
                everything = {**os.environ, **place, **environment}
                self.processes.append(subprocess.Popen(command, env=everything, stdout=out, stderr=err))

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()

    def send(self, host: int, number: signal.Signals) -> None:
        self.processes[host].send_signal(number)

    def finish(self, seconds: float = 180) -> list[int]:
        """Waits for all of them and returns their exit codes."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def stdout(self, host: int) -> str:
        """What a host has printed, lines of the CPU's collectives included."""
        return self._file(host, "stdout").read_text()

    def stderr(self, host: int) -> str:
        return self._file(host, "stderr").read_text()

    def _file(self, host: int, name: str) -> Path:
        return Path(self.folder.name) / f"{host}.{name}"


def steps_logged(workdir: Path) -> int:
    """The number of whole lines in a run's record."""
    path = workdir / "logs" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(job: Job, condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Waits until the condition holds; false if the job ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not job.running():
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(job.stdout(0) + job.stderr(0))
        time.sleep(0.01)
    return True


def options(workdir: Path, steps: int) -> list[object]:
    """A run of the stand-in that logs every step and may be resumed."""
    settings = ["--train.steps", steps, "--train.log-every", 1, "--train.checkpoint-every", 4]
    return ["train", STAND_IN, "--workdir", workdir, "--resume", *settings]


def curve(workdir: Path) -> list[dict[str, float]]:
    """What was logged at every step, without what a clock said."""
    from dar_jax.training.logs import read_records

    return [{name: value for name, value in record.items() if name not in RATES} for record in read_records(workdir)]


def run_with_kills(workdir: Path, steps: int, kills: int, rng: np.random.Generator, heartbeat: int, say=lambda text: None):
    """Trains to the last step although one of two hosts is killed, or stopped without a word, `kills` times.

    The moments are random: within the run, or (every third) at any time after the start. Raises AssertionError if the other
    host goes on for longer than three times the heartbeat's time.
    """
    done = 0
    for number in range(1000):
        with Job(*options(workdir, steps), heartbeat=heartbeat, start=2 * heartbeat) as job:
            if done == kills:
                codes = job.finish()
                assert codes == [0, 0], (codes, job.stderr(0), job.stderr(1))
                return
            if number % 3 == 2:
                time.sleep(rng.uniform(0, 5))
            else:
                wanted = int((done + rng.uniform(0.5, 1)) * steps / (kills + 1))
                wait_for(job, lambda wanted=wanted: steps_logged(workdir) >= wanted)
                time.sleep(rng.uniform(0, 0.5))
            if not job.running():
                codes = job.finish()
                assert codes == [0, 0], (codes, job.stderr(0), job.stderr(1))
                raise AssertionError("the run was over before all kills; make it longer")
            victim, how = int(rng.integers(2)), signal.SIGKILL if rng.random() < 0.8 else signal.SIGSTOP
            step = steps_logged(workdir)
            job.send(victim, how)
            began = time.monotonic()
            code = job.processes[1 - victim].wait(3 * heartbeat)
            assert code not in (0, 2), (code, job.stderr(1 - victim))
            done += 1
            reason = job.stderr(1 - victim).strip().splitlines()
            said = next((line for line in reason if "dar-jax: host" in line or "another task died" in line), reason[-1:])
            say(
                f"{done:3}: {how.name} of host {victim} after {step} logged steps; the other ended with {code} "
                f"{time.monotonic() - began:.1f} s later: {str(said)[:150]}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--heartbeat", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder) / "calm", Path(folder) / "killed"
        began = time.monotonic()
        with Job(*options(calm, given.steps)) as job:
            assert job.finish() == [0, 0], job.stderr(0)
        print(f"undisturbed: {given.steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        rng = np.random.default_rng(given.seed)
        run_with_kills(killed, given.steps, given.kills, rng, given.heartbeat, lambda text: print(text, flush=True))
        same = curve(calm) == curve(killed) and same_parameters(calm, killed)
        print(
            f"killed {given.kills} times: {'the same' if same else 'ANOTHER'} curve and parameters, {len(curve(killed))} steps"
        )
        return 0 if same else 1


def same_parameters(first: Path, second: Path) -> bool:
    import jax
    import stand_in

    from dar_jax.training import checkpoint

    trees = [jax.device_get(checkpoint.load(workdir, stand_in.experiment, "params").params) for workdir in (first, second)]
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, *trees)))


if __name__ == "__main__":
    sys.exit(main())
