"""tpu_scripts/sky.yaml: its fields, SkyPilot's own reading of it where that is installed, and its scripts with stand-ins."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
TASK = yaml.safe_load((ROOT / "tpu_scripts" / "sky.yaml").read_text())
# The fields that SkyPilot's documentation describes, as far as they are used, and their types.
FIELDS = {"name": str, "resources": dict, "num_nodes": int, "workdir": str, "envs": dict, "setup": str, "run": str}
RESOURCES = {"infra": str, "accelerators": str, "use_spot": bool, "job_recovery": dict}

SAY = f"""#!{sys.executable} -SE
import json, os, sys
with open(os.environ["HOME"] + "/calls", "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def program(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SAY)
    path.chmod(0o755)


def script(name: str, home: Path, **env: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
    """Runs `setup` or `run` as a host does; what it called of the stand-ins."""
    env = {"HOME": str(home), "PATH": f"{home / 'bin'}:{os.environ['PATH']}", **env}
    done = subprocess.run(["bash", "-c", TASK[name]], cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)
    calls = (home / "calls").read_text().splitlines() if (home / "calls").exists() else []
    return done, [json.loads(line) for line in calls]


def test_fields():
    assert {name: type(value) for name, value in TASK.items()} == FIELDS
    assert {name: type(value) for name, value in TASK["resources"].items()} == RESOURCES
    assert TASK["resources"]["use_spot"] and TASK["envs"] == {"TRAIN": None}


def test_skypilot_reads_it():
    sky = pytest.importorskip("sky")
    with pytest.raises(ValueError, match="TRAIN"):
        sky.Task.from_yaml_config(dict(TASK))
    task = sky.Task.from_yaml_config(dict(TASK), env_overrides=[("TRAIN", "experiment.py --workdir gs://bucket/run")])
    task.validate()
    (resources,) = task.resources
    assert resources.use_spot and list(resources.accelerators) == ["tpu-v6e-8"] and str(resources.cloud) == "GCP"
    assert resources.job_recovery["max_restarts_on_errors"] == 2


def test_setup_installs_once(tmp_path):
    for name in ("bin/python3", "dar_jax_uv/bin/uv"):
        program(tmp_path / name)
    done, calls = script("setup", tmp_path)
    assert done.returncode != 0 and [call[0] for call in calls] == ["python3", "uv"]  # this uv makes no environment
    assert calls[0][-2:] == [str(tmp_path / "dar_jax_uv"), "uv"] and calls[1][-1] == str(tmp_path / "dar_jax_venv")
    program(tmp_path / "dar_jax_venv/bin/pip")
    done, calls = script("setup", tmp_path)
    assert done.returncode == 0 and calls[2:] == [["pip", "install", "--quiet", ".[tpu,gcs]"]]


@pytest.mark.parametrize("workdir", [["--workdir", "gs://bucket/a run"], ["--workdir=gs://bucket/run"]])
def test_run_resumes_with_the_arguments_given(tmp_path, workdir):
    program(tmp_path / "dar_jax_venv/bin/dar-jax")
    train = "experiments/mine.py " + " ".join(f"'{word}'" for word in workdir) + ' --name "it\'s * mine"'
    done, calls = script("run", tmp_path, TRAIN=train)
    assert done.returncode == 0, done.stderr
    assert calls == [["dar-jax", "train", "experiments/mine.py", *workdir, "--name", "it's * mine", "--resume"]]


def test_run_needs_a_bucket(tmp_path):
    done, calls = script("run", tmp_path, TRAIN="experiments/mine.py --workdir runs/mine")
    assert done.returncode == 2 and not calls and "--workdir gs://BUCKET/FOLDER is missing" in done.stderr
