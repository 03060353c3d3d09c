"""Whole runs: logs, resuming after any end, stopping, and what is refused at the start."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stand_in
from many_hosts import RATES

from dar_jax.config import MeshConfig, TransformerConfig, TransformerTraining
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment, load_experiment
from dar_jax.training import checkpoint
from dar_jax.training.lock import only_run
from dar_jax.training.logs import read_records
from dar_jax.training.loop import train
from dar_jax.training.meter import TrainingDiverged
from dar_jax.training.optimizer import learning_rate

TRAIN = """
import dataclasses, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored, and training respects that
from dar_jax.experiment import load_experiment
from dar_jax.training.loop import train
experiment = load_experiment(sys.argv[1])
source = type(experiment.source(None))(float(sys.argv[4]))
settings = dataclasses.replace(experiment.config.train, steps=int(sys.argv[5]), checkpoint_every=3)
config = dataclasses.replace(experiment.config, train=settings)
experiment = dataclasses.replace(experiment, config=config, source=lambda data: source)
print(train(experiment, sys.argv[2], resume=sys.argv[3] == "resume"))
"""


def start(workdir, resume="new", seconds=0.0, steps=30):
    """Trains the stand-in in another process, on one device; reading an image takes `seconds`."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(stand_in.__file__).parents[1])}
    command = [sys.executable, "-c", TRAIN, stand_in.__file__, str(workdir), resume, str(seconds), str(steps)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def saved(workdir):
    """Step, parameters and EMA of the newest checkpoint."""
    params, ema = (checkpoint.load(workdir, stand_in.experiment, weights) for weights in ("params", "ema"))
    return ema.info.step, jax.device_get({"params": params.params, "ema": ema.params})


def with_train(experiment=stand_in.experiment, mesh=None, **changes):
    config = dataclasses.replace(experiment.config, train=dataclasses.replace(experiment.config.train, **changes))
    return experiment.with_config(dataclasses.replace(config, mesh=mesh or MeshConfig()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    code, out = finish(start(folder))
    assert code == 0, out
    return folder


def test_killed_anywhere_a_run_resumes_to_the_same_bits(uninterrupted, tmp_path):
    process = start(tmp_path, seconds=0.03)
    wait_for(lambda: list(tmp_path.glob("checkpoints/3*")))  # perhaps still being written
    time.sleep(np.random.default_rng().uniform(0, 1))
    process.kill()
    finish(process)
    killed_at = checkpoint.latest_step(tmp_path)
    assert killed_at is None or killed_at < 30
    code, out = finish(start(tmp_path, "resume"))
    assert code == 0, out
    (step, found), (last, expected) = saved(tmp_path), saved(uninterrupted)
    assert step == last == 30
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    records = [[{k: v for k, v in r.items() if k not in RATES} for r in read_records(w)] for w in (tmp_path, uninterrupted)]
    assert [r["step"] for r in records[0]] == [r["step"] for r in records[1]] == list(range(2, 31, 2))
    assert records[0][-1] == records[1][-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_leaves(tmp_path, number):
    process = start(tmp_path, seconds=0.03, steps=1000)
    wait_for(lambda: list(tmp_path.glob("checkpoints/3")))
    process.send_signal(number)
    code, out = finish(process)
    assert code == 0, out
    step = checkpoint.latest_step(tmp_path)
    assert 3 < step < 1000 and f"stopped_by={number!r}" in out
    assert f"stopped at step {step}, which is saved; go on with --resume" in out


def test_no_thread_of_a_checkpoint_stays(tmp_path):
    train(with_train(steps=4, checkpoint_every=1), tmp_path)
    assert not [thread for thread in threading.enumerate() if "_run_loop" in thread.name]


def test_what_evaluates_is_logged_at_its_steps(tmp_path):
    def evaluate(stage, params):
        return {"eval_mean": float(jax.tree.leaves(params)[0].mean())}

    train(with_train(evaluate_every=3), tmp_path, evaluate=evaluate)
    assert [record["step"] for record in read_records(tmp_path) if "eval_mean" in record] == [3, 6]
    with pytest.raises(InputError, match="evaluate_every"):
        train(with_train(evaluate_every=3), tmp_path / "other")


def test_a_closed_pipe_stops_it_like_sigterm(tmp_path):
    process = start(tmp_path, seconds=0.01, steps=1000)
    process.stdout.readline()
    process.stdout.close()
    process.wait(timeout=120)
    assert 0 < checkpoint.latest_step(tmp_path) < 1000 and not (tmp_path / "run.lock").exists()


def test_what_fails_beside_training_is_logged_after_a_checkpoint(tmp_path, capsys):
    saved_before = []

    def evaluate(stage, params):
        wait_for(lambda: (tmp_path / "checkpoints/3").exists())
        saved_before.append(checkpoint.latest_step(tmp_path))
        raise InputError("no weights\nthere")

    def pictures(stage, params, batch):
        raise MemoryError("too large")

    experiment = with_train(steps=4, checkpoint_every=100, evaluate_every=3, sample_every=3)
    assert train(experiment, tmp_path, pictures=pictures, evaluate=evaluate).step == 4
    out = capsys.readouterr().out
    assert "step 3: not evaluated (no weights there)\n" in out and "step 3: no pictures (MemoryError: too large)\n" in out
    assert saved_before == [3]


def test_what_an_evaluation_needs_is_opened_before_the_first_step(tmp_path):
    class Evaluation:
        def open(self, stage):
            raise InputError(f"no images for {stage.class_names[0]}")

    with pytest.raises(InputError, match="no images for 0"):
        train(with_train(evaluate_every=3), tmp_path / "run", evaluate=Evaluation())
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path):
    with only_run(checkpoint.absolute(tmp_path)), pytest.raises(InputError, match="in use by another run"):
        train(with_train(), tmp_path, resume=True)


def test_weights_alone_are_trained_on_from_their_step(uninterrupted, tmp_path):
    source = checkpoint.load(uninterrupted, stand_in.experiment)
    experiment = with_train(steps=20, log_every=1)
    checkpoint.save_for_inference(tmp_path, experiment.config, source.params, 16, source.info.class_names)
    summary = train(experiment, tmp_path, resume=True)
    records = read_records(tmp_path)
    assert (summary.step, [record["step"] for record in records]) == (20, [17, 18, 19, 20])
    rates = learning_rate(experiment.config.optimizer, 20)
    np.testing.assert_allclose([record["learning_rate"] for record in records], [rates(step) for step in range(16, 20)])
    parts = [jax.device_get(checkpoint.load(tmp_path, stand_in.experiment, part).params) for part in ("params", "ema")]
    moved = [np.abs(new - old).max() for new, old in zip(jax.tree.leaves(parts[0]), jax.tree.leaves(source.params))]
    assert 0 < max(moved) < 4 * rates(16)  # the rate of this step and no more: Adam moves by at most the rate


def test_resume_on_another_mesh(tmp_path):
    whole = train(with_train(mesh=MeshConfig(8, 1, 1)), tmp_path / "whole")
    # The schedule looks at the last step, so the first half is a run of 8 steps that is cut short.
    train(with_train(mesh=MeshConfig(8, 1, 1), keep_checkpoints=4), tmp_path / "parts")
    for step in (6, 8):
        (tmp_path / f"parts/checkpoints/{step}").rename(tmp_path / f"{step}")
    parts = train(with_train(mesh=MeshConfig(2, 2, 2)), tmp_path / "parts", resume=True)
    assert whole.step == parts.step == 8 and parts.stopped_by is None
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    found, expected = (saved(tmp_path / name)[1]["params"] for name in ("parts", "whole"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert train(with_train(), tmp_path / "parts", resume=True).step == 8  # nothing is left to do
    assert train(with_train(steps=10), tmp_path / "parts", resume=True).step == 10


def test_logs(tmp_path, capsys):
    drawn = []

    def pictures(stage, params, batch):
        drawn.append((batch["image"].shape, params["in"]["bias"].shape))
        return {"noise": np.zeros((4, 4, 3), np.uint8)}

    summary = train(with_train(sample_every=4), tmp_path, resume=True, pictures=pictures)
    records = [json.loads(line) for line in (tmp_path / "logs/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    assert records[-1]["loss"] == summary.metrics["loss"] < records[0]["loss"]
    # the stand-in counts the 16 labels of two batches, 10 kinds at most, as if they were codes
    assert all(r["codebook_usage"] == 1 - r["dead_codes"] / 16 and 6 <= r["dead_codes"] < 12 for r in records)
    assert records[-1]["images_per_second"] > 0 and records[-1]["learning_rate"] == 0
    assert all(r["tokens_per_second"] == pytest.approx(4 * r["images_per_second"]) for r in records[1:])
    assert not any("mfu" in r for r in records)  # a CPU's peak is not known
    assert drawn == [((8, 8, 8, 1), (32,))] * 2
    assert list((tmp_path / "logs").glob("events.*"))
    out = capsys.readouterr().out
    assert "from the beginning (no checkpoint to resume from), 8 devices" in out and "step 8/8" in out and "loss" in out
    assert "64 images of 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 (noise)" in out


def test_mfu_is_the_models_operations_by_time_and_peak(tmp_path):
    train(with_train(peak_flops=1e9), tmp_path)
    # two layers of the stand-in on 64 pixels, in the forward pass, for the weights, and the second for its inputs
    flops = 8 * (3 + 2) * 2 * 64 * 32
    records = read_records(tmp_path)
    assert [set(RATES) <= set(record) for record in records] == [True] * 4
    for record in records:
        assert record["mfu"] == pytest.approx(record["images_per_second"] / 8 * flops / (8 * 1e9), rel=1e-6)


def traced_steps(workdir):
    """Numbers of the steps in a run's profiles, by folder."""
    found = {}
    for path in workdir.glob("logs/plugins/profile/*/*.xplane.pb"):
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
        found[path.parent.name] = sorted({value for event in events for name, value in event.stats if name == "step_num"})
    return found


def test_profile_holds_the_steps_that_were_asked_for(tmp_path, capsys):
    train(with_train(), tmp_path)
    assert not (tmp_path / "logs/plugins").exists()
    train(with_train(steps=12, profile=(10, 11)), tmp_path, resume=True)
    assert traced_steps(tmp_path) == {"steps_10_to_11": [10, 11]}
    assert f"wrote the profile {tmp_path}/logs/plugins/profile/steps_10_to_11" in capsys.readouterr().out
    train(with_train(steps=14, profile=(10, 12)), tmp_path, resume=True)  # past its end
    train(with_train(steps=16, profile=(12, 15)), tmp_path, resume=True)  # amid it
    assert traced_steps(tmp_path) == {"steps_10_to_11": [10, 11], "steps_12_to_15": [15]}


def test_profile_is_written_where_a_run_ends_amid_it(tmp_path):
    def evaluate(stage, params):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(with_train(profile=(2, 6), evaluate_every=4), tmp_path, evaluate=evaluate)
    assert traced_steps(tmp_path) == {"steps_2_to_6": [2, 3, 4]}


def test_diverging_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    def loss(config, model):
        def loss_fn(params, batch, key, frozen, step):
            value, metrics = stand_in.loss(config, model)(params, batch, key, frozen, step)
            return jnp.where(step == 4, jnp.nan, value), metrics

        return loss_fn

    with pytest.raises(TrainingDiverged, match="not finite at step 5; the last checkpoint is of step 4"):
        train(dataclasses.replace(with_train(), loss=loss), tmp_path)
    assert checkpoint.latest_step(tmp_path) == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(tmp_path)[1]))


def test_what_a_last_step_makes_not_finite_is_not_saved(tmp_path):
    steep = lambda config, steps: optax.sgd(1e38)  # noqa: E731
    experiment = dataclasses.replace(with_train(steps=1), optimizer=steep, reads=("optimizer.",))
    with pytest.raises(TrainingDiverged, match="not finite at step 1; there is no checkpoint yet"):
        train(experiment, tmp_path)
    assert checkpoint.latest_step(tmp_path) is None


@pytest.fixture
def tokenizer(tmp_path):
    train(with_train(steps=2), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def transformer(tokenizer, **changes):
    sizes = {"layers": 1, "heads": 2, "width": 16, "num_tokens": 4, "vocab_size": 16, "num_classes": 10, "mlp_multiple": 16}
    config = TransformerTraining(
        model=TransformerConfig(**{**sizes, **changes}),
        tokenizer=str(tokenizer),
        data=stand_in.DATA,
        train=dataclasses.replace(stand_in.config.train, steps=4),
    )
    return Experiment(config, source=lambda data: stand_in.Source(), tokenizer=stand_in.experiment)


def test_transformer_learns_its_tokenizers_codes(tokenizer, tmp_path):
    seen = {}

    def loss(config, model):
        def loss_fn(params, batch, key, frozen, step):
            value = jnp.square(model.apply({"params": params}, batch["condition"], batch["codes"])).mean()
            return value, {"sum": jnp.sum(batch["codes"]), "labels": jnp.sum(batch["condition"])}

        return loss_fn

    def pictures(stage, params, batch):
        images = np.asarray(batch["image"], np.float32) / 127.5 - 1
        model, weights = stage.tokenizer.experiment.build_model(), stage.tokenizer.params
        seen["sum"] = int(model.apply({"params": weights}, images, method="codes").sum())
        seen["labels"] = int(batch["label"].sum())
        return {}

    experiment = dataclasses.replace(transformer(tokenizer), loss=loss)
    summary = train(with_train(experiment, steps=1, sample_every=1), tmp_path / "run", pictures=pictures)
    assert summary.metrics["sum"] == seen["sum"] > 0 and summary.metrics["labels"] == seen["labels"]


def test_transformers_folder_is_complete(tokenizer, tmp_path):
    train(with_train(transformer(tokenizer), steps=2), tmp_path / "run")
    copied = checkpoint.load(tmp_path / "run/tokenizer", stand_in.experiment)
    original = checkpoint.load(tokenizer, stand_in.experiment)
    jax.tree.map(np.testing.assert_array_equal, copied.params, original.params)
    assert (copied.info.config, copied.info.hooks) == (original.info.config, original.info.hooks)
    tokenizer.rename(tmp_path / "elsewhere")
    assert train(transformer(tokenizer), tmp_path / "run", resume=True).step == 4


def test_refused(tokenizer, tmp_path):
    unfit = [
        (with_train(), tokenizer, r"already holds a run \(step 2\); pass --resume or choose another folder"),
        (with_train(batch_size=12), tmp_path / "a", "batch_size 12 in 1 parts cannot be spread over data x fsdp = 8"),
        (with_train(batch_size=8, accumulate=2), tmp_path / "a", "make it a multiple of 16"),
        (with_train(sample_every=2), tmp_path / "a", "sample_every"),
        (
            transformer(tokenizer, vocab_size=32),
            tmp_path / "a",
            "model.vocab_size is 32, but the tokenizer's codebook_size is 16",
        ),
        (transformer(tokenizer, num_tokens=8), tmp_path / "a", "model.num_tokens is 8, but the tokenizer's num_tokens is 4"),
        (transformer(tokenizer, num_classes=9), tmp_path / "a", "number of classes of the data is 10"),
        (dataclasses.replace(transformer(tokenizer), tokenizer=None), tmp_path / "a", "trained with its own model"),
        (transformer(tmp_path / "no"), tmp_path / "a", "does not exist"),
    ]
    for experiment, workdir, message in unfit:
        with pytest.raises(InputError, match=message):
            train(experiment, workdir)
        assert workdir == tokenizer or not list(workdir.glob("*"))  # nothing half-written
    wider = dataclasses.replace(with_train(), model=lambda config, dtype, remat: Wider(config))
    with pytest.raises(InputError, match="another experiment, its params differ: in/bias"):
        train(wider, tokenizer, resume=True)


class Wider(stand_in.Model):
    @stand_in.nn.compact
    def __call__(self, images):
        x = images.reshape(len(images), -1)
        hidden = stand_in.nn.Dense(48, name="in")(x)
        return stand_in.nn.Dense(x.shape[-1], name="out")(hidden).reshape(images.shape)


def test_experiment_files(tmp_path):
    assert load_experiment(stand_in.__file__).config == stand_in.config
    for name, text, message in (
        ("missing.py", None, "no experiment file"),
        ("empty.py", "x = 1", "defines no `experiment`"),
        ("broken.py", "def f(:\n", "cannot be run: SyntaxError"),
        ("raises.py", "import no_such_module", "cannot be run: ModuleNotFoundError: No module named 'no_such_module'"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message) as caught:
            load_experiment(tmp_path / name)
        assert "\n" not in str(caught.value)
