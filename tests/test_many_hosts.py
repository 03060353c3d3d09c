"""Training on several real processes: the same as on one, whatever happens to them and wherever it goes on."""

import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from many_hosts import Job, curve, options, run_with_kills, same_parameters, wait_for

from dar_jax.quickstart import DIGITS
from dar_jax.training import checkpoint

STEPS = 60


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """An undisturbed run on two hosts."""
    folder = tmp_path_factory.mktemp("calm")
    with Job(*options(folder, STEPS)) as job:
        assert job.finish() == [0, 0], job.stderr(0)
        assert f"step {STEPS}/{STEPS}" in job.stdout(0) and "8 devices (data 8" in job.stdout(0)
        assert "step" not in job.stdout(1) and "stand-in" not in job.stdout(1)  # only the first host prints
    return folder


def test_killed_and_started_again_it_ends_with_the_same_bits(calm, tmp_path):
    """`python tests/many_hosts.py --kills 10` does it more often."""
    run_with_kills(tmp_path, STEPS, kills=2, rng=np.random.default_rng(16), heartbeat=8)
    assert curve(tmp_path) == curve(calm) and len(curve(calm)) == STEPS
    assert same_parameters(tmp_path, calm)


def test_stopped_on_one_host_it_goes_on_with_any_number(calm, tmp_path):
    """SIGTERM and Ctrl-C of one host stop all of them after a checkpoint. Sums over another number of hosts or devices are made
    in another order, which changes the last bits."""

    def stop(host, number, **machines):
        before = checkpoint.latest_step(tmp_path) or 0
        with Job(*options(tmp_path, STEPS), **machines) as job:
            wait_for(job, lambda: job.stdout(0).count("\nstep ") >= 3)
            job.send(host, number)
            codes = job.finish()
            assert "which is saved; go on with --resume" in job.stdout(0), job.stderr(0)
            assert before + 3 <= checkpoint.latest_step(tmp_path) < STEPS
            return codes

    assert stop(1, signal.SIGTERM) == [0, 0]
    assert stop(0, signal.SIGINT) == [130, 0]
    assert stop(0, signal.SIGTERM, hosts=1, devices=8) == [0]
    with Job(*options(tmp_path, STEPS), hosts=1, devices=1) as job:
        assert job.finish() == [0], job.stderr(0)
    found, expected = curve(tmp_path), curve(calm)
    for name in ("step", "codebook_usage"):  # of the labels, which tell the batches apart
        assert [record[name] for record in found] == [record[name] for record in expected]
    np.testing.assert_allclose([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)


@pytest.fixture(scope="module")
def codes(tiny_run, tmp_path_factory):
    """The stored codes of the digits."""
    from dar_jax.data.sources import open_source
    from dar_jax.inference.tokenize import tokenize
    from dar_jax.inference.trained import load_tokenizer

    folder = tmp_path_factory.mktemp("codes")
    tokenize(load_tokenizer(tiny_run), open_source(DIGITS), DIGITS, folder, batch_size=256)
    return folder


def test_two_hosts_learn_what_one_learns(tiny_run, codes, tmp_path):
    """From codes that are fixed: those that a training step computes change where a latent lies between two of them. Pictures,
    and metrics on held-out images, are made with the help of every host."""
    sizes = ("--model.vocab-size", 64, "--model.layers", 2, "--model.width", 32, "--sampling.guidance", 2, 2)
    data = ("--tokenizer", tiny_run / "tokenizer", "--data.path", codes, "--train.batch-size", 16)
    command = ("train", Path(__file__).parents[1] / "experiments/digits_ar.py", *sizes, *data, "--train.steps", 20)
    evaluate, cut = ("--train.evaluate-every", 20), ("--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2)
    runs = {
        "one": ({"hosts": 1, "devices": 1}, evaluate),
        "two": ({"hosts": 2, "devices": 4}, (*evaluate, "--train.sample-every", 20, *cut)),
        "across": ({"hosts": 2, "devices": 2}, ("--mesh.data", 1, "--mesh.tensor", 4)),  # both need every row of the batch
    }
    for name, (machines, settings) in runs.items():
        with Job(*command, "--workdir", tmp_path / name, "--train.log-every", 1, *settings, **machines) as job:
            assert set(job.finish()) == {0}, job.stderr(0)
    assert b"samples" in next((tmp_path / "two" / "logs").glob("events.*")).read_bytes()  # the picture's name
    expected = curve(tmp_path / "one")
    assert len(expected) == 21 and "eval_bits_per_token" in expected[-1]
    for name, wanted in (("two", expected), ("across", [record for record in expected if "loss" in record])):
        for found, other in zip(curve(tmp_path / name), wanted, strict=True):
            assert found.keys() == other.keys()
            exact = {key for key in other if "accuracy" not in key}  # which counts tokens, and two may be equally probable
            assert {key: found[key] for key in exact} == pytest.approx({key: other[key] for key in exact}, rel=1e-5), name


def test_rows_and_folders(tmp_path):
    """What the hosts tell each other, each for itself."""
    code = "import test_many_hosts; test_many_hosts.on_each_host()"
    with Job(tmp_path, code=code, PYTHONPATH=f"{Path(__file__).parents[1]}:{Path(__file__).parent}") as job:
        assert job.finish() == [0, 0], job.stderr(0) + job.stderr(1)
        found = [json.loads(job.stdout(host).splitlines()[-1]) for host in range(2)]
    assert not list(tmp_path.rglob("hosts-*"))
    assert found[0]["parts"] == [[[0], 2], [[0, 2], 4], [[0, 2, 4, 6], 8], [[0], 1], [[0], 1]]
    assert found[1]["parts"] == [[[1], 2], [[1, 3], 4], [[1, 3, 5, 7], 8], [[0], 1], [[0], 1]]
    for host in range(2):
        assert found[host]["rows"] == [True] * 5
        assert found[host]["of_first"] == 5 and "not the same folder on all hosts" in found[host]["unshared"]


def on_each_host():
    """Runs on both hosts of `test_rows_and_folders`; prints what it finds as JSON."""
    from jax.sharding import AxisType, Mesh

    from dar_jax import parallel
    from dar_jax.errors import InputError
    from dar_jax.parallel import hosts

    hosts.join()
    number, folder = jax.process_index(), Path(sys.argv[1])
    found = {"parts": [], "rows": []}
    batch = np.arange(16 * 3).reshape(16, 3)
    orders = [  # of the devices, 0 .. 3 of which are this host's or the other's; a TPU slice may have any
        ([0, 1, 2, 3, 4, 5, 6, 7], (8, 1, 1)),
        ([0, 1, 4, 5, 2, 3, 6, 7], (8, 1, 1)),
        ([0, 4, 1, 5, 2, 6, 3, 7], (2, 4, 1)),
        ([0, 4, 1, 5, 2, 6, 3, 7], (4, 1, 2)),
        ([0, 1, 2, 3, 4, 5, 6, 7], (1, 1, 8)),
    ]
    for order, sizes in orders:
        devices = np.array(jax.devices())[order].reshape(sizes)
        mesh = Mesh(devices, parallel.AXES, axis_types=(AxisType.Auto,) * 3)
        own, parts = parallel.batch_parts(mesh)
        size = len(batch) // parts
        rows = np.concatenate([batch[part * size : (part + 1) * size] for part in own])
        whole = parallel.global_batch(rows, mesh)
        right = [np.array_equal(shard.data, batch[shard.index]) for shard in whole.addressable_shards]
        found["parts"].append([own, parts])
        found["rows"].append(all(right) and whole.shape == batch.shape)
    found["of_first"] = hosts.broadcast_from_first(5 + number)
    checkpoint.require_shared(folder)
    try:
        checkpoint.require_shared(folder / str(number))
    except InputError as error:
        found["unshared"] = str(error)
    print(json.dumps(found))
