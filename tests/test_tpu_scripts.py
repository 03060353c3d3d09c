"""The scripts for TPU slices and for SLURM, with stand-ins for gcloud and its workers, and for SLURM's commands."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
STUB = Path(__file__).with_name("stub_gcloud.py")
WHERE = ["--project=p-1", "--zone=us-east5-b", "--quiet"]
TPUS = ["compute", "tpus"]
LIST = [*TPUS, "queued-resources", "list", "--filter=name~/dar$", "--format=value(state.state)", *WHERE]
DESCRIBE = [*TPUS, "tpu-vm", "describe", "dar", "--format=value(state)", *WHERE]
CREATE = [*TPUS, "queued-resources", "create", "dar", "--node-id=dar", "--accelerator-type=v6e-8"]
CREATE += ["--runtime-version=v2-alpha-tpuv6e", *WHERE]
DELETE = [*TPUS, "queued-resources", "delete", "dar", "--force", *WHERE]
TRAIN = ["experiments/mine.py", "--workdir", "gs://bucket/run"]
ODD = ["two words", "it's", '"quoted"', "$HOME `id` $(id)", "two\nlines\n", "*", "back\\slash", "", "-n", "é %s ; & | > #"]

UNTIL_IT_RUNS = ["ACTIVE until runs-worker-0", "ACTIVE until runs-worker-1"]  # the stub's words

pytestmark = pytest.mark.skipif(not shutil.which("flock"), reason="stands in for Linux machines, and needs their flock")


class Cloud:
    """A clone of a small repository with the scripts, and a cloud of its own; runs a script and tells what gcloud was asked."""

    def __init__(self, folder: Path):
        self.folder, self.clone = folder, folder / "clone"
        shutil.copytree(ROOT / "tpu_scripts", self.clone / "tpu_scripts")
        for name in ("setup.cfg", "gone.py", "experiments/mine.py", "runs/checkpoint"):
            (self.clone / name).parent.mkdir(exist_ok=True)
            (self.clone / name).write_text(name)
        (self.clone / ".gitignore").write_text("/runs/\n/build/\n")
        subprocess.run(["git", "init", "--quiet", self.clone], check=True)
        subprocess.run(["git", "-C", self.clone, "add", "setup.cfg", "gone.py", ".gitignore"], check=True)
        (self.clone / "gone.py").unlink()
        self.bin = self.program("bin", "gcloud").parent
        for name in ("python3", "pip", "dar-jax"):
            self.program("worker-bin", name)
        self.env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "CLOUD": str(folder), "POLL": "0", "TYPE": "v6e-8"}
        self.env |= {"PROJECT": "p-1", "ZONE": "us-east5-b", "NAME": "dar", "HOME": str(folder)}
        self.answer(lives=[["ACTIVE"]], states=[], codes=[0] * 10)

    def program(self, place: str, name: str) -> Path:
        path = self.folder / place / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable} -SE\n{STUB.read_text()}")
        path.chmod(0o755)
        return path

    def answer(self, **files):
        for name, value in files.items():
            (self.folder / name).write_text(json.dumps(value))

    def __call__(self, script: str, *arguments: str, **settings: str | None) -> subprocess.CompletedProcess:
        env = {name: value for name, value in (self.env | settings).items() if value is not None}
        command = [self.clone / "tpu_scripts" / script, *arguments]
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[list[str]]:
        """What gcloud was asked since the last time."""
        path = self.folder / "calls"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        path.unlink(missing_ok=True)
        return calls

    def runs(self, worker: int = 0) -> list[list[str]]:
        """Of every dar-jax started on a worker: its folder and its arguments."""
        path = self.folder / f"runs-worker-{worker}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def path(self, name: str, worker: int = 0) -> Path:
        return self.folder / f"worker-{worker}" / name

    def is_idle(self) -> bool:
        locks = [self.path("dar_jax_run/lock", worker) for worker in (0, 1)]
        return all(subprocess.run(["flock", "--nonblock", lock, "true"]).returncode == 0 for lock in locks)

    def wait_for(self, condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    if cloud.path("dar_jax_run").exists():
        subprocess.run([cloud.bin / "gcloud", *DELETE], env=cloud.env, check=True)


@pytest.fixture
def slice_(cloud):
    """A slice that is ready and set up."""
    assert cloud("create.sh").returncode == cloud("setup.sh").returncode == 0
    cloud.calls()
    return cloud


def verbs(calls):
    """The calls that change something, in a word each."""
    words = [call[3] if call[3] != "ssh" else call[-4].rsplit("\n}; ", 1)[1].split()[0] for call in calls]
    return [word for word in words if word not in ("list", "describe", "run_state")]


def test_create_asks_for_a_slice_and_waits(cloud):
    cloud.answer(lives=[["WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"]])
    done = cloud("create.sh")
    assert done.returncode == 0 and cloud.calls() == [LIST, CREATE, LIST, LIST, LIST, LIST, DESCRIBE]
    assert [line.split(": ")[1] for line in done.stdout.splitlines()] == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ready"]
    assert cloud("create.sh").returncode == 0 and cloud.calls() == [LIST, DESCRIBE, LIST, DESCRIBE]  # it is there


def test_create_ends_where_no_slice_will_come(cloud):
    cloud.answer(lives=[["WAITING_FOR_RESOURCES", "FAILED"]])
    done = cloud("create.sh")
    assert done.returncode == 1 and "dar is FAILED: delete.sh, then" in done.stderr


def test_create_takes_its_settings(cloud):
    def flags(**settings):
        (command,) = cloud("create.sh", "--dry-run", **settings).stdout.splitlines()
        return [argument for argument in shlex.split(command)[5:] if argument not in WHERE]

    assert flags() == CREATE[4:-3]
    assert flags(SPOT="1", CREATE_FLAGS="--network=n --reserved")[4:] == ["--network=n", "--reserved", "--spot"]
    runtimes = {"v5p-128": "v2-alpha-tpuv5", "v5litepod-64": "v2-alpha-tpuv5-lite", "v4-32": "tpu-ubuntu2204-base"}
    for kind, runtime in runtimes.items():
        assert flags(TYPE=kind)[2:] == [f"--accelerator-type={kind}", f"--runtime-version={runtime}"]
    assert flags(TYPE="v5e-64") == flags(TYPE="v5litepod-64")
    assert flags(RUNTIME="mine")[3] == flags(RUNTIME="mine", TYPE="v9-8")[3] == "--runtime-version=mine"


def test_setup_copies_what_git_does_not_ignore(cloud):
    cloud("create.sh")
    cloud.calls()
    done = cloud("setup.sh")
    assert done.returncode == 0, done.stderr
    archive = str(cloud.clone / "build" / "dar.tar.gz")
    scp, ssh = cloud.calls()
    assert scp == [*TPUS, "tpu-vm", "scp", archive, "dar:dar_jax.tar.gz", "--worker=all", *WHERE]
    assert ssh[:5] == [*TPUS, "tpu-vm", "ssh", "dar", "--worker=all"][:5] and ssh[5] == "--worker=all" and ssh[-3:] == WHERE
    for worker in (0, 1):
        copy = cloud.path("dar_jax", worker)
        files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
        assert {name for name in files if not name.startswith("tpu_scripts/")} == {
            ".gitignore",
            "setup.cfg",
            "experiments/mine.py",
        }
        assert cloud.path("dar_jax_venv/bin/dar-jax", worker).exists()
    (cloud.clone / "setup.cfg").write_text("new")
    assert cloud("setup.sh").returncode == 0 and cloud.path("dar_jax/setup.cfg").read_text() == "new"


def test_setup_clones(cloud):
    cloud("create.sh")
    cloud.calls()
    subprocess.run(
        ["git", "-C", cloud.clone, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "1"], check=True
    )
    done = cloud("setup.sh", SOURCE=f"file://{cloud.clone}")
    assert done.returncode == 0 and verbs(cloud.calls()) == ["install_package"], done.stderr
    assert cloud.path("dar_jax/gone.py", 1).exists() and cloud.path("dar_jax_venv/bin/dar-jax", 1).exists()


def test_run_passes_every_argument_unchanged(slice_):
    done = slice_("run.sh", *TRAIN, *ODD)
    assert done.returncode == 0 and verbs(slice_.calls()) == ["start"], done.stderr
    slice_.wait_for(slice_.is_idle)
    for worker in (0, 1):
        assert slice_.runs(worker) == [[str(slice_.path("dar_jax", worker)), "train", *TRAIN, *ODD, "--resume"]]
        assert slice_.path("dar_jax_run/exit", worker).read_text() == "0\n"


def test_run_starts_nothing_as_long_as_one_worker_runs(slice_):
    slice_.answer(codes=[None, 0])
    assert slice_("run.sh", *TRAIN).returncode == 0  # at once, although training takes its time
    slice_.wait_for(lambda: slice_.runs(0) and slice_.runs(1))
    again = slice_("run.sh", *TRAIN)
    assert again.returncode == 2 and again.stderr == "run.sh: a run is going on in dar: logs.sh shows it, stop.sh ends it\n"
    os.kill(int(slice_.path("dar_jax_run/pid", 1).read_text()), signal.SIGKILL)
    assert slice_("run.sh", *TRAIN).returncode == 2
    assert len(slice_.runs(0)) == len(slice_.runs(1)) == 1


def test_a_run_that_was_stopped_has_no_exit_code_and_can_go_on(slice_):
    slice_.answer(codes=[None, 3])
    slice_("run.sh", *TRAIN)
    slice_.wait_for(lambda: slice_.runs(0) and slice_.runs(1))
    assert slice_("stop.sh").returncode == 0
    slice_.wait_for(slice_.is_idle)
    assert not slice_.path("dar_jax_run/exit", 0).exists() and not slice_.path("dar_jax_run/exit", 1).exists()
    assert slice_("stop.sh").returncode == 0  # nothing to stop
    assert slice_("run.sh", *TRAIN).returncode == 0
    slice_.wait_for(slice_.is_idle)
    assert slice_.path("dar_jax_run/exit").read_text() == "3\n"
    assert slice_.path("dar_jax_run/log").read_text() == "training\ntraining\n"


def test_run_needs_what_setup_brings(cloud):
    cloud("create.sh")
    done = cloud("run.sh", *TRAIN)
    assert done.returncode == 2 and "no dar-jax or no experiments/mine.py here: setup.sh" in done.stderr


def test_logs_follow_a_run_to_its_end(slice_):
    assert "no run was started here: run.sh" in slice_("logs.sh").stderr
    slice_("run.sh", *TRAIN)
    slice_.wait_for(slice_.path("dar_jax_run/pid", 1).exists)
    slice_.calls()
    assert slice_("logs.sh").stdout.count("training") == 1 and slice_("logs.sh", "all").stdout.count("training") == 2
    assert [call[5] for call in slice_.calls()] == ["--worker=0", "--worker=all"]


def test_delete(slice_):
    assert slice_("delete.sh").returncode == 0 and slice_.calls() == [DELETE]


def test_watch_resumes_on_another_slice_and_ends_with_the_training(cloud):
    first = ["WAITING_FOR_RESOURCES", "ACTIVE", *UNTIL_IT_RUNS, "SUSPENDING", "SUSPENDED"]
    cloud.answer(lives=[first, ["FAILED"], ["PREEMPTED"], ["ACTIVE"]], codes=[None, 0, 0])
    done = cloud("watch.sh", *TRAIN, *ODD)
    assert done.returncode == 0 and "dar: training has ended" in done.stdout, done.stderr
    start = ["create", "scp", "install_package", "start"]
    assert verbs(cloud.calls()) == [*start, "delete", "create", "delete", "create", "delete", *start]
    assert cloud.runs() == [[str(cloud.path("dar_jax")), "train", *TRAIN, *ODD, "--resume"]] * 2
    assert cloud("watch.sh", *TRAIN, *ODD).returncode == 0 and verbs(cloud.calls()) == []  # begun again: nothing to do
    assert cloud("watch.sh", *TRAIN).returncode == 0 and verbs(cloud.calls()) == start[1:]  # but another run is to be done


@pytest.mark.parametrize("codes, code", [([1, 1, 1], 1), ([134, 2], 2), ([134, 1, 0], 0)])
def test_watch_tries_a_failing_run_again_unless_it_is_in_vain(cloud, codes, code):
    cloud.answer(codes=codes)
    done = cloud("watch.sh", *TRAIN)
    assert done.returncode == code and len(cloud.runs()) == len(codes)
    assert ("gave up" in done.stderr) == (code != 0)


def test_watch_keeps_the_code_as_it_was(cloud):
    cloud.answer(lives=[[*UNTIL_IT_RUNS, "ACTIVE until clone/edited", "SUSPENDED"], ["ACTIVE"]], codes=[None, 0])
    script = cloud.clone / "tpu_scripts" / "watch.sh"
    watch = subprocess.Popen([script, *TRAIN], env=cloud.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cloud.wait_for(lambda: cloud.runs(1))
    for name in ("setup.cfg", "edited"):
        (cloud.clone / name).write_text("edited meanwhile")
    assert watch.wait(60) == 0 and len(cloud.runs()) == 2
    assert cloud.path("dar_jax/setup.cfg").read_text() == "setup.cfg"


DRY_RUNS = {
    "create.sh": ["create"],
    "setup.sh": ["scp", "install_package"],
    "run.sh": ["start"],
    "watch.sh": ["delete", "create", "scp", "install_package", "start"],
    "logs.sh": ["follow"],
    "stop.sh": ["stop"],
    "delete.sh": ["delete"],
}


@pytest.mark.parametrize("script", DRY_RUNS)
def test_dry_run_prints_what_a_shell_takes_and_does_nothing(slice_, script):
    training = [*TRAIN, *ODD] if script in ("run.sh", "watch.sh") else []
    printed = slice_(script, "--dry-run", *training)
    assert printed.returncode == 0 and slice_.calls() == []
    slice_.answer(lives=[["ACTIVE"]])
    if script == "create.sh":
        slice_("delete.sh")
    slice_.calls()
    done = subprocess.run(["bash", "-c", printed.stdout], env=slice_.env, stderr=subprocess.PIPE, text=True)
    assert verbs(slice_.calls()) == DRY_RUNS[script], done.stderr
    if training:
        slice_.wait_for(slice_.runs)
        assert slice_.runs() == [[str(slice_.path("dar_jax")), "train", *training, "--resume"]]


@pytest.mark.parametrize(
    "script, arguments, settings, message",
    [
        *[(script, [], {"PROJECT": None}, "PROJECT is not set") for script in DRY_RUNS],
        ("delete.sh", [], {"ZONE": None}, "ZONE is not set"),
        ("delete.sh", [], {"NAME": ""}, "NAME is not set"),
        ("create.sh", [], {"TYPE": None}, "TYPE is not set"),
        ("create.sh", [], {"TYPE": "v9-8"}, "no RUNTIME is known for TYPE v9-8"),
        ("create.sh", [], {"SPOT": "yes"}, "SPOT is yes; set it to 1"),
        ("create.sh", ["v6e-8"], {}, "takes no arguments, and got v6e-8"),
        ("create.sh", ["--spot"], {}, "there is no option --spot here"),
        ("create.sh", [], {"PATH": "tools"}, "gcloud is not installed"),
        ("setup.sh", [], {"SOURCE": "no.tar.gz"}, "SOURCE no.tar.gz is neither a git URL nor an archive"),
        ("run.sh", [], {}, "which experiment?"),
        ("run.sh", ["experiments/mine.py", "--workdir", "runs/ar"], {}, "--workdir gs://BUCKET/FOLDER is missing"),
        ("watch.sh", ["experiments/mine.py"], {}, "--workdir gs://BUCKET/FOLDER is missing"),
        ("watch.sh", TRAIN, {"TYPE": None}, "TYPE is not set"),
        ("logs.sh", ["last"], {}, "takes one worker, a number or all"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(cloud, script, arguments, settings, message):
    (cloud.folder / "tools").mkdir()
    for tool in ("bash", "dirname"):
        (cloud.folder / "tools" / tool).symlink_to(shutil.which(tool))
    done = cloud(script, *arguments, **settings)
    assert done.returncode == 2 and cloud.calls() == []
    assert message in done.stderr and done.stderr.count("\n") == 1


def recorder(folder: Path, name: str, then: str = "") -> None:
    """A program that keeps its arguments in the file `name`, then runs a line of bash."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" >>"$LOG/{name}"\n{then}\n')
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
    """run(*arguments, **settings) -> Popen of slurm.sh, and recorded(name) -> the arguments of one of SLURM's commands."""
    for name, then in {"sbatch": "", "srun": "", "scancel": 'touch "$LOG/asked"', "scontrol": "", "dar-jax": ""}.items():
        recorder(tmp_path / "bin", name, then)

    def run(*arguments, **settings):
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "LOG": str(tmp_path)} | settings
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([ROOT / "tpu_scripts" / "slurm.sh", *arguments], env=env, **pipes)

    def recorded(name):
        path = tmp_path / name
        return path.read_text().split("\0")[:-1] if path.exists() else None

    return run, recorded, tmp_path


SLURM_TRAIN = ["experiments/mine.py", "--workdir", "runs/mine", *ODD]
ON_NODES = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}
SRUN = ["--ntasks-per-node=1", "--gpus-per-node=4", "--kill-on-bad-exit=1", "--cpus-per-task=32"]
SRUN += ["dar-jax", "train", *SLURM_TRAIN, "--resume"]


def test_slurm_submits_itself(slurm):
    run, recorded, _ = slurm
    process = run(*SLURM_TRAIN, NODES="2", GPUS="4", CPUS="32")
    assert process.wait() == 0, process.stderr.read()
    *options, script = recorded("sbatch")[: -len(SLURM_TRAIN) - 1]
    assert script == str(ROOT / "tpu_scripts" / "slurm.sh")
    assert recorded("sbatch")[-len(SLURM_TRAIN) - 1 :] == ["--here", *SLURM_TRAIN]
    expected = ["--job-name=mine", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=32", "--requeue"]
    assert options == [*expected, "--signal=B:USR1@300", "--output=%x-%j.log", "--open-mode=append"]


def test_slurm_starts_a_process_on_each_node_and_ends_with_its_code(slurm):
    run, recorded, folder = slurm
    recorder(folder / "bin", "srun", "exit 3")
    process = run("--here", *SLURM_TRAIN, **ON_NODES)
    assert process.wait() == 3 and recorded("srun") == SRUN and recorded("scontrol") is None


def test_slurm_saves_and_queues_again_when_time_is_nearly_up(slurm):
    run, recorded, folder = slurm
    recorder(folder / "bin", "srun", 'until [[ -e $LOG/asked ]]; do sleep 0.01; done; sleep 0.1; echo saved >"$LOG/saved"')
    process = run("--here", *SLURM_TRAIN, **ON_NODES)
    while recorded("srun") is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    process.wait(20)
    assert recorded("scancel") == ["--signal=TERM", "7"] and recorded("scontrol") == ["requeue", "7"]
    assert (folder / "saved").exists()


def test_slurm_dry_run(slurm):
    run, recorded, _ = slurm
    for arguments, settings, name in ([[], {"GPUS": "4", "CPUS": "32"}, "sbatch"], [["--here"], ON_NODES, "srun"]):
        printed, _ = run("--dry-run", *arguments, *SLURM_TRAIN, **settings).communicate()
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {printed}"], stdout=subprocess.PIPE, text=True).stdout.split(
            "\0"
        )
        last = [*SLURM_TRAIN, "--resume"] if name == "srun" else SLURM_TRAIN
        assert words[0] == name and words[-len(last) - 1 : -1] == last and recorded(name) is None


@pytest.mark.parametrize(
    "arguments, settings, message",
    [
        ([], {}, "which experiment, and where to?"),
        (SLURM_TRAIN, {"CPUS": "8"}, "GPUS or CPUS is not set"),
        (["--here", *SLURM_TRAIN], {}, "there is no allocation with GPUS here"),
        (["--now", *SLURM_TRAIN], {}, "there is no option --now here"),
        (SLURM_TRAIN, {"CPUS": "8", "GPUS": "1", "PATH": "/bin:/usr/bin"}, "there is no dar-jax on the PATH"),
    ],
)
def test_slurm_errors(slurm, arguments, settings, message):
    run, recorded, _ = slurm
    process = run(*arguments, **settings)
    assert message.lower() in process.communicate()[1].lower() and process.returncode == 2 and recorded("sbatch") is None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_strict_and_explain_themselves(script):
    text = script.read_text()
    assert len(text.splitlines()) < 60
    if script.name != "common.sh":
        assert "\nset -euo pipefail\n" in text and os.access(script, os.X_OK)
        done = subprocess.run([script, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"usage: {script.name}" in done.stdout and "set -euo" not in done.stdout


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, *SCRIPTS], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
