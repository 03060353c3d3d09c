"""Checkpoints: exact, whole or not at all, and one clear line for every way in which they can be unfit."""

import dataclasses
import errno
import json
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_in

from dar_jax import parallel
from dar_jax.cli.main import main
from dar_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.training import checkpoint, integrity
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.resume import class_numbers, require_same_run
from dar_jax.training.state import abstract_state, init_state

OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
PLAIN = Experiment(stand_in.config, model=stand_in.Model)
NAMES = stand_in.Source.class_names


def init_params(width=8):
    return stand_in.Model(None).init(jax.random.key(width), jnp.zeros((1, width, 8, 1)))["params"]


def state_on(*sizes, step=0):
    mesh = parallel.make_mesh(MeshConfig(*sizes))
    state = init_state(init_params, OPTIMIZER, mesh)
    rows = jax.device_put(jnp.arange(32.0), state.params["in"]["bias"].sharding)
    ema = {**state.ema, "in": {**state.ema["in"], "bias": rows}}  # so that EMA and parameters differ
    return dataclasses.replace(state, ema=ema, step=jnp.int32(step))


def write(workdir, state, experiment=PLAIN, steps=(5,), **settings):
    with checkpoint.open_checkpoints(workdir, TrainConfig(**settings)) as checkpoints:
        saving = None
        for step in steps:
            saving = checkpoint.save(checkpoints, dataclasses.replace(state, step=jnp.int32(step)), experiment, NAMES, saving)
        saving.result()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A WORKDIR with one checkpoint, of step 5, written from a mesh of 2 x 2 x 2."""
    folder = tmp_path_factory.mktemp("run")
    write(folder, state_on(2, 2, 2))
    return folder


def test_restore_is_exact_on_another_mesh(written):
    expected = state_on(2, 2, 2, step=5)
    target = abstract_state(init_params, OPTIMIZER, parallel.make_mesh(MeshConfig(1, 8, 1)))
    found = checkpoint.restore(written, target)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    jax.tree.map(lambda leaf, wanted: (leaf.sharding, wanted.sharding), found, target)
    assert found.params["in"]["kernel"].sharding == target.params["in"]["kernel"].sharding
    assert found.opt_state[1][0].nu["out"]["kernel"].sharding.shard_shape((32, 64)) == (32, 8)


def test_load_reads_the_ema_and_nothing_else(written, tmp_path):
    shutil.copytree(written, tmp_path / "run")
    for part in ("params", "opt_state"):
        for file in (tmp_path / "run/checkpoints/5" / part).rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    loaded = checkpoint.load(tmp_path / "run", PLAIN)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(state_on(2, 2, 2).ema))
    path = tmp_path / "run/checkpoints/5"
    assert loaded.info == checkpoint.Info(path, tmp_path / "run", 5, stand_in.config, NAMES, ("model",))
    assert len(loaded.params["in"]["bias"].devices()) == 1

    by_step = checkpoint.load(written / "checkpoints/5", PLAIN, weights="params", mesh=parallel.make_mesh(MeshConfig(1, 4, 2)))
    jax.tree.map(np.testing.assert_array_equal, by_step.params, jax.device_get(state_on(2, 2, 2).params))
    assert by_step.params["in"]["kernel"].sharding.shard_shape((64, 32)) == (16, 16) and by_step.info.workdir == written


def test_keeps_the_newest_and_every_so_many(tmp_path):
    """Whatever else lies beside them."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/.DS_Store").touch()
    write(tmp_path, state_on(8, 1, 1), steps=range(1, 8), keep_checkpoints=2, keep_every=4)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").glob("[!.]*")) == [4, 6, 7]
    assert checkpoint.latest_step(tmp_path) == 7


def test_weights_alone(written, tmp_path):
    loaded = checkpoint.load(written, PLAIN)
    for scale in (3, 1):  # the second replaces the first
        params = jax.tree.map(lambda leaf, scale=scale: scale * leaf, loaded.params)
        checkpoint.save_for_inference(tmp_path, stand_in.config, params, 5, NAMES)
    again = checkpoint.load(tmp_path, PLAIN)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert again.info.config == stand_in.config and again.info.step == 5
    state = checkpoint.restore(tmp_path, abstract_state(init_params, OPTIMIZER, parallel.make_mesh(MeshConfig())))
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.ema), (loaded.params, loaded.params))
    assert state.opt_state is None and state.step == 5
    grown = lambda: {**init_params(), "discriminator": {"bias": jnp.zeros(1)}}  # noqa: E731
    with pytest.raises(InputError, match="another experiment, its ema differ"):  # which has nothing to start that from
        checkpoint.restore(tmp_path, abstract_state(grown, OPTIMIZER, parallel.make_mesh(MeshConfig())))
    with pytest.raises(InputError, match="holds no params"):
        checkpoint.load(tmp_path, PLAIN, weights="params")


def test_half_written_is_not_there(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "checkpoints/5", tmp_path / "checkpoints/9.orbax-checkpoint-tmp")
    assert checkpoint.latest_step(tmp_path) == 5 and checkpoint.load(tmp_path, PLAIN).info.step == 5
    checkpoint.open_checkpoints(tmp_path, TrainConfig()).close()
    assert checkpoint.latest_step(tmp_path) == 5 and checkpoint.load(tmp_path, PLAIN).info.step == 5


def test_steps_are_listed_without_what_is_in_them(golden, tmp_path):
    shutil.copytree(golden / "old_checkpoint", tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, lambda about: [about])
    assert checkpoint.steps(tmp_path) == [1]


def test_of_another_experiment(written):
    mesh = parallel.make_mesh(MeshConfig())
    with pytest.raises(
        InputError, match=r"another experiment, its params differ: in/kernel \(64, 32\) there, \(128, 32\) here"
    ):
        checkpoint.restore(written, abstract_state(lambda: init_params(16), OPTIMIZER, mesh))

    def more_params():
        return {**init_params(), "bias": jnp.zeros(1)}

    with pytest.raises(InputError, match=r"differ: bias missing there, \(1,\) here"):
        checkpoint.restore(written, abstract_state(more_params, OPTIMIZER, mesh))


@pytest.mark.parametrize("keep", [0, 0.5, None])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "files.json", "ema/manifest.ocdbt", "largest"])
def test_damaged(written, tmp_path, name, keep, capfd):
    """Files emptied, cut in half and removed: one line, and nothing from Orbax around it."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints/5"
    data = [path for path in (folder / "ema").rglob("*") if path.is_file()]
    file = max(data, key=lambda path: path.stat().st_size) if name == "largest" else folder / name
    if keep is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    for read in (
        lambda: checkpoint.load(tmp_path, PLAIN),
        lambda: checkpoint.restore(tmp_path, abstract_state(init_params, OPTIMIZER, parallel.make_mesh(MeshConfig()))),
    ):
        with pytest.raises(InputError, match="checkpoints/5 is damaged") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("entry", [{"/dev/zero": [None, 5]}, {"x": []}, {"x": "y"}, {"x": [True, 5]}, []], ids=str)
def test_sizes_that_are_none(written, tmp_path, entry):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/5/files.json").write_text(json.dumps({"ema": entry}))
    with pytest.raises(InputError, match="checkpoints/5 is damaged"):
        checkpoint.load(tmp_path, PLAIN)


def test_sums_are_those_of_when_it_was_written(written, tmp_path):
    """A later checkpoint gives none to an earlier one that has lost them."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints/5/files.json").unlink()
    write(tmp_path, state_on(8, 1, 1), steps=(6,))
    assert not (tmp_path / "checkpoints/5/files.json").exists() and (tmp_path / "checkpoints/6/files.json").exists()


def test_a_changed_bit_in_any_file_is_damage(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints/5"
    files = [path for path in (folder / "ema").rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        whole = file.read_bytes()
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(InputError, match=f"5 is damaged; .*{file.relative_to(folder)} is not what was written"):
            checkpoint.load(tmp_path, PLAIN)
        file.write_bytes(whole)
    metadata = folder / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace('"stand-in"', '"stand-io"'))
    with pytest.raises(InputError, match="5 is damaged; .*_CHECKPOINT_METADATA is not what was written"):
        checkpoint.inspect(tmp_path)


def test_what_cannot_be_read_is_not_to_be_deleted(written, monkeypatch):
    def fail(path):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(integrity, "checksum_of_file", fail)
    with pytest.raises(InputError, match="5 cannot be read: .*Too many open files") as caught:
        checkpoint.load(written, PLAIN)
    assert "delete" not in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint.ocp, "metadata", lambda *_, **__: SimpleNamespace(metadata=None))  # as Orbax where it cannot
    with pytest.raises(InputError, match="5 cannot be read: .*ema could not be opened"):
        checkpoint.load(written, PLAIN)
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="cannot be read: no permission"):
        checkpoint.load(written, PLAIN)


def rewrite(run, change):
    """Changes what a checkpoint of step 1 says of itself, as an old version would have written it."""
    metadata = run / "checkpoints/1/_CHECKPOINT_METADATA"
    values = json.loads(metadata.read_text())
    values["custom_metadata"] = change(values["custom_metadata"])
    metadata.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: [about], "is damaged"),
        (lambda about: about | {"class_names": list(range(10))}, "class_names are no list of texts"),
        (lambda about: about | {"class_names": "0123456789"}, "class_names are no list of texts"),
        (lambda about: about | {"hooks": {"model": 1}}, "hooks are no list of texts"),
        (lambda about: about | {"config": ["x" * 10**6]}, "is of another version"),
        (lambda about: about | {"config": about["config"] | {"name": ["x" * 10**6]}}, "name should be text"),
        (lambda about: about | {"format": "1"}, "its format is '1'"),
        (lambda about: about | {"format": 2}, "was written by a newer dar_jax .*; update dar_jax"),
        (lambda about: about | {"class_names": ["a"]}, "names 1 classes, but its model.num_classes is 10"),
        (lambda about: edited(about, layers=3), r"not those of its weights: .*blocks/.* \(1, .* there, \(3, .* here"),
        (lambda about: edited(about, width=12), r"not those of its weights"),
        (lambda about: edited(about, width=9), r"model.width 9 should be a multiple of model.heads"),
    ],
)
def test_what_a_checkpoint_says_is_checked(golden, tmp_path, change, message):
    shutil.copytree(golden / "old_checkpoint", tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def edited(about, **model):
    config = about["config"]
    return about | {"config": config | {"model": config["model"] | model}}


def test_a_checkpoint_of_format_0_is_used(golden, tmp_path):
    assert main(["sample", str(golden / "old_checkpoint"), "--labels", "3", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.rglob("*.png"))
    data = DataConfig(source="codes", path=str(golden / "old_codes"))
    assert [element["label"] for element in open_source(data)] == list(range(10))


@pytest.mark.parametrize("name", ["²", str(2**31), "9" * 200, "05"])
def test_folders_named_by_no_step(written, tmp_path, name):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "checkpoints/5", tmp_path / "checkpoints" / name)
    for path in (tmp_path, tmp_path / "checkpoints" / name):
        with pytest.raises(InputError, match="is named by no step"):
            checkpoint.inspect(path)


def test_a_run_in_a_folder_named_like_a_step(written, tmp_path):
    run = tmp_path / "checkpoints/1"
    run.mkdir(parents=True)
    with pytest.raises(InputError, match="checkpoints/1 holds no checkpoint"):
        checkpoint.inspect(run)
    shutil.copytree(written, run, dirs_exist_ok=True)
    assert checkpoint.inspect(run).step == 5 and checkpoint.inspect(run).workdir == run


def test_a_resumed_run_is_the_same_run(golden):
    before = checkpoint.inspect(golden / "old_checkpoint")

    def lines(names=before.class_names, **changes):
        config = before.config
        for name, values in changes.items():
            config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
        return require_same_run(before, Experiment(config), names)

    assert lines() == []
    said = lines(train={"steps": 9, "batch_size": 4, "log_every": 1}, model={"mlp_dropout": 0.0})
    assert "differs from the checkpoint: train.log_every: 50 -> 1" in said and len(said) == 4
    assert "differs from the checkpoint: train.batch_size: 1024 -> 4 (changes what is learnt from here on)" in said
    with pytest.raises(InputError, match=r"its model differs: model.rope_theta 10000.0 there, 5.0 here"):
        lines(model={"rope_theta": 5.0})
    with pytest.raises(InputError, match="of the other stage"):
        require_same_run(before, PLAIN, before.class_names)
    with pytest.raises(InputError, match="does not know: zzz"):
        lines([*before.class_names[:-1], "zzz"])
    with pytest.raises(InputError, match="trained with other classes: 0 there, 9 here"):
        lines(before.class_names[::-1])
    with pytest.raises(InputError, match="trained with other classes: 10 there"):
        lines(before.class_names[:-1])


def test_classes_are_found_by_name():
    assert class_numbers(["b", "c"], ["a", "b", "c"]) == [1, 2]
    assert class_numbers(["x", "y"], ["0", "1"]) == [0, 1]  # an imported file names none
    assert class_numbers(["crane", "crane"], ["crane", "crane"]) == [0, 1]
    with pytest.raises(InputError, match="does not know: zzz; it knows 0, 1, 2"):
        class_numbers(["0", "1", "zzz"], ["0", "1", "2"])
    with pytest.raises(InputError, match="the same name: crane"):
        class_numbers(["crane"], ["crane", "crane"])


def test_not_there(tmp_path):
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no checkpoint")):
        with pytest.raises(InputError, match=message):
            checkpoint.load(path)
    assert checkpoint.latest_step(tmp_path) is None
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to"):
        checkpoint.open_checkpoints(tmp_path / "file" / "run", TrainConfig())


def test_a_replaced_model_is_needed_again(tmp_path):
    write(tmp_path, state_on(8, 1, 1), stand_in.experiment)
    assert checkpoint.inspect(tmp_path).hooks == ("model", "loss", "source")
    with pytest.raises(InputError, match="trained with its own model; pass --experiment FILE"):
        checkpoint.load(tmp_path)
    other = stand_in.experiment.with_config(dataclasses.replace(stand_in.config, name="other"))
    loaded = checkpoint.load(tmp_path, other)
    assert isinstance(loaded.experiment.build_model(), stand_in.Model)
    assert loaded.experiment.config == stand_in.config
