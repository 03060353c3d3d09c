"""The process of a tracker, which `track.Tracker` starts as `python -m dar_jax.training.tracker_process wandb|trackio`.

Imports nothing but the tracker's package and Pillow, so that it starts fast and touches no accelerator.
"""

import base64
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from PIL import Image

PATIENCE = 30  # seconds that the end of a run waits for the tracker

Write = Callable[[int, dict[str, Any]], None]  # (step, values or images by name)


def main(kind: str) -> None:
    """Reads a run and then its records from the standard input, one JSON object a line, and gives them to the tracker."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the run, whose end is the end of the input
        signal.signal(number, signal.SIG_IGN)
    lines = iter(sys.stdin.buffer)
    write, as_image, finish = {"wandb": open_wandb, "trackio": open_trackio}[kind](json.loads(next(lines)))
    for line in lines:
        record = json.loads(line)
        values = record.get("values", {})
        for name, png in record.get("pictures", {}).items():
            values[name] = as_image(Image.open(io.BytesIO(base64.b64decode(png))))
        write(record["step"], values)
    end = threading.Timer(PATIENCE, os._exit, (1,))
    end.daemon = True
    end.start()
    finish()


def open_wandb(run: dict[str, Any]) -> tuple[Write, Callable, Callable]:
    """Weights & Biases, set up by its own environment variables (WANDB_MODE, WANDB_PROJECT, WANDB_DIR ...)."""
    import wandb

    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "dar_jax"),
        id=run["id"],
        name=run["name"],
        resume="allow",
        config=run["settings"],
        allow_val_change=True,
        dir=os.environ.get("WANDB_DIR", run["folder"]),
        settings=wandb.Settings(console="off"),
    )
    opened.define_metric("*", step_metric="step")  # its own steps never go back, those of a resumed run do
    return (lambda step, values: opened.log({"step": step, **values})), wandb.Image, opened.finish


def open_trackio(run: dict[str, Any]) -> tuple[Write, Callable, Callable]:
    """Trackio, set up by its own environment variables (TRACKIO_DIR, TRACKIO_SPACE_ID ...) and TRACKIO_PROJECT."""
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", "dar_jax")
    trackio.init(project=project, name=f"{run['name']}-{run['id']}", resume="allow", config=run["settings"])
    return (lambda step, values: trackio.log(values, step=step)), trackio.Image, trackio.finish


if __name__ == "__main__":
    main(sys.argv[1])
