"""A stand-in for `gcloud`, and for what a worker runs: two workers are two folders, and ssh is bash in them.

Called by the name `gcloud`, it appends its arguments to $CLOUD/calls as a line of JSON and answers from $CLOUD/lives: every
slice made lives the next of these lists of states, one a question, and stays in the last; a state "ACTIVE until FILE" holds as
long as there is no $CLOUD/FILE, and "PREEMPTED" is that of the node, not of the queued resource. By other names it is a program
of a worker.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])
WORKERS = [CLOUD / "worker-0", CLOUD / "worker-1"]


def gcloud(arguments):
    with open(CLOUD / "calls", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    flags = dict(argument.split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    verb = arguments[3]
    if verb == "list":
        states = json.loads((CLOUD / "states").read_text()) or [""]
        state, _, file = states[0].partition(" until ")
        if len(states) > 1 and (CLOUD / file).exists():  # $CLOUD itself, where no file is named
            (CLOUD / "states").write_text(json.dumps(states[1:]))
        print("ACTIVE" if state == "PREEMPTED" else state)
    elif verb == "describe":
        print("PREEMPTED" if json.loads((CLOUD / "states").read_text())[0] == "PREEMPTED" else "READY")
    elif verb == "create":
        first, *others = json.loads((CLOUD / "lives").read_text())
        (CLOUD / "states").write_text(json.dumps(first))
        (CLOUD / "lives").write_text(json.dumps(others))
        for worker in WORKERS:
            worker.mkdir()
    elif verb == "delete":
        (CLOUD / "states").write_text("[]")
        remove_workers()
    elif verb == "scp":
        for worker in WORKERS:
            shutil.copy(arguments[4], worker / arguments[5].split(":")[1])
    else:
        chosen = WORKERS if flags["--worker"] == "all" else [WORKERS[int(flags["--worker"])]]
        codes = [ssh(worker, flags["--command"]) for worker in chosen]
        return max(codes)
    return 0


def ssh(worker, command):
    environment = os.environ | {"HOME": str(worker), "PATH": f"{CLOUD / 'worker-bin'}:{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", command], cwd=worker, env=environment).returncode


def remove_workers():
    """Ends what runs there, as the end of a machine does, and its disk."""
    for worker in WORKERS:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.killpg(int((worker / "dar_jax_run" / "pid").read_text()), signal.SIGKILL)
        shutil.rmtree(worker, ignore_errors=True)


def python3(arguments):
    """`-m pip install uv` does nothing, `-m uv venv FOLDER` makes a folder with pip."""
    if arguments[1] == "uv":
        folder = Path(arguments[-1]) / "bin"
        folder.mkdir(parents=True)
        shutil.copy(CLOUD / "worker-bin" / "pip", folder)


def pip(arguments):
    assert Path(arguments[-1].removesuffix("[tpu,gcs]"), "setup.cfg").exists()
    shutil.copy(CLOUD / "worker-bin" / "dar-jax", "dar_jax_venv/bin")


def dar_jax(arguments):
    """Keeps its arguments, and ends with the next code of $CLOUD/codes, or, where that is null, only by SIGTERM, with 0."""
    code = json.loads((CLOUD / "codes").read_text())[count_runs()]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with open(CLOUD / f"runs-{Path.home().name}", "a") as runs:
        runs.write(json.dumps([os.getcwd(), *arguments]) + "\n")
    print("training", flush=True)
    while code is None:
        time.sleep(0.01)
    return code


def count_runs():
    with suppress(FileNotFoundError):
        return len((CLOUD / f"runs-{Path.home().name}").read_text().splitlines())
    return 0


if __name__ == "__main__":
    programs = {"gcloud": gcloud, "python3": python3, "pip": pip, "dar-jax": dar_jax}
    sys.exit(programs[Path(sys.argv[0]).name](sys.argv[1:]))
