"""How fast `dar-jax serve` is beside single samples, and what a long load leaves behind.

Starts the server on a free port and sends streams from this process: at 1, 8 and 64 at a time, requests/s and the seconds to
the first preview; then as many single `sample` calls of one image; then 2,000 requests, of which a fifth goes away after the
first preview, with the server's memory before and after.

Example: python experiments/benchmarks/serve.py runs/digits --json serve.json
"""

import asyncio
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import tyro
from common import machine_name, print_table, run, write_report

import dar_jax

GENERATIONS = "/v1/images/generations"


async def stream(client: httpx.AsyncClient, seed: int, cancel: bool = False) -> float:
    """Draws one image; returns the seconds to the first preview. `cancel`: goes away then."""
    body, began, first = {"prompt": str(seed % 10), "seed": seed, "stream": True}, time.perf_counter(), None
    while True:
        async with client.stream("POST", GENERATIONS, json=body) as answer:
            if answer.status_code == 429:
                await answer.aread()
                await asyncio.sleep(0.05)
                continue
            last = ""
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    first, last = first or time.perf_counter() - began, line
                    if cancel:
                        return first
        assert "completed" in last, last[:200]
        return first


async def load(url: str, count: int, at_once: int, cancelled: float = 0) -> list[float]:
    """`count` streams, `at_once` at a time, of which a share is cancelled; the seconds to each first preview."""
    numbers = iter(range(count))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def worker() -> list[float]:
            return [await stream(client, number, number % 100 < 100 * cancelled) for number in numbers]

        return [each for part in await asyncio.gather(*(worker() for _ in range(at_once))) for each in part]


def memory(process: int) -> float:
    """MiB of the resident memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def measure(url: str, process: int, checkpoint: str, requests: int) -> list[dict[str, Any]]:
    rows, model = [], dar_jax.load(checkpoint, batch_size=1)
    for at_once in (1, 8, 64):
        asyncio.run(load(url, 200, at_once))  # compiles
        count = 300
        began = time.perf_counter()
        first = asyncio.run(load(url, count, at_once))
        rate = count / (time.perf_counter() - began)
        row = {"what": "streams", "at once": at_once, "requests/s": rate}
        rows.append(row | {"first preview s, median": float(np.median(first)), "95 %": float(np.quantile(first, 0.95))})
    model.sample([3], [0])
    began = time.perf_counter()
    for number in range(64):
        model.sample([number % 10], [number])
    rows.append({"what": "single samples", "at once": 1, "requests/s": 64 / (time.perf_counter() - began)})
    asyncio.run(load(url, requests // 5, 64, 0.2))
    before, began = memory(process), time.perf_counter()
    asyncio.run(load(url, requests, 64, 0.2))
    row = {
        "what": f"{requests} requests, 20 % cancelled",
        "at once": 64,
        "requests/s": requests / (time.perf_counter() - began),
    }
    time.sleep(1)
    health = httpx.get(f"{url}/health").json()
    rows.append(row | {"MiB before": before, "MiB after": memory(process), "rows left": health["running"] + health["waiting"]})
    return rows


@dataclass(frozen=True)
class Options:
    """How fast `dar-jax serve` is, beside single samples."""

    checkpoint: tyro.conf.Positional[str]
    requests: int = 2000  # of the long load
    json: Path | None = None  # also write the rows to this file

    def run(self) -> None:
        command = [sys.executable, "-m", "dar_jax", "serve", self.checkpoint, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                url = process.stdout.readline().split()[0].rstrip("/")
                while httpx.get(f"{url}/health", timeout=60).status_code != 200:
                    time.sleep(0.5)
                rows = measure(url, process.pid, self.checkpoint, self.requests)
            finally:
                process.terminate()
        for row in rows:
            print_table([row])
        write_report(self.json, rows, " ".join(sys.argv), machine=machine_name())


if __name__ == "__main__":
    run(tyro.cli(Options).run)
