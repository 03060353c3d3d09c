"""Checkpoints: exact, whole or not at all, and one clear line for every way in which they can be unfit."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stand_in

from dar_jax import parallel
from dar_jax.config import MeshConfig, OptimizerConfig, TrainConfig
from dar_jax.errors import InputError
from dar_jax.training import checkpoint
from dar_jax.training.experiment import Experiment
from dar_jax.training.state import abstract_state, init_state, make_optimizer

OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
PLAIN = Experiment(stand_in.config)
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
        for step in steps:
            checkpoint.save(checkpoints, dataclasses.replace(state, step=jnp.int32(step)), experiment, NAMES)


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
    loaded = checkpoint.load(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, jax.device_get(state_on(2, 2, 2).ema))
    assert (loaded.config, loaded.step, loaded.class_names, loaded.hooks) == (stand_in.config, 5, NAMES, ())
    assert loaded.workdir == tmp_path / "run" and len(loaded.params["in"]["bias"].devices()) == 1

    by_step = checkpoint.load(written / "checkpoints/5", weights="params", mesh=parallel.make_mesh(MeshConfig(1, 4, 2)))
    jax.tree.map(np.testing.assert_array_equal, by_step.params, jax.device_get(state_on(2, 2, 2).params))
    assert by_step.params["in"]["kernel"].sharding.shard_shape((64, 32)) == (16, 16) and by_step.workdir == written


def test_keeps_the_newest_and_every_so_many(tmp_path):
    write(tmp_path, state_on(8, 1, 1), steps=range(1, 8), keep_checkpoints=2, keep_every=4)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]
    assert checkpoint.latest_step(tmp_path) == 7


def test_weights_alone(written, tmp_path):
    loaded = checkpoint.load(written)
    for scale in (3, 1):  # the second replaces the first
        params = jax.tree.map(lambda leaf, scale=scale: scale * leaf, loaded.params)
        checkpoint.save_for_inference(tmp_path, loaded.config, params, loaded.step, loaded.class_names)
    again = checkpoint.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    assert again.config == loaded.config and again.step == 5
    state = checkpoint.restore(tmp_path, abstract_state(init_params, OPTIMIZER, parallel.make_mesh(MeshConfig())))
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.ema), (loaded.params, loaded.params))
    assert state.opt_state is None and state.step == 5
    grown = lambda: {**init_params(), "discriminator": {"bias": jnp.zeros(1)}}  # noqa: E731
    with pytest.raises(InputError, match="another experiment, its ema differ"):  # which has nothing to start that from
        checkpoint.restore(tmp_path, abstract_state(grown, OPTIMIZER, parallel.make_mesh(MeshConfig())))
    with pytest.raises(InputError, match="holds no params"):
        checkpoint.load(tmp_path, weights="params")


def test_half_written_is_not_there(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "checkpoints/5", tmp_path / "checkpoints/9.orbax-checkpoint-tmp")
    assert checkpoint.latest_step(tmp_path) == 5 and checkpoint.load(tmp_path).step == 5
    checkpoint.open_checkpoints(tmp_path, TrainConfig()).close()
    assert checkpoint.latest_step(tmp_path) == 5 and checkpoint.load(tmp_path).step == 5


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
        lambda: checkpoint.load(tmp_path),
        lambda: checkpoint.restore(tmp_path, abstract_state(init_params, OPTIMIZER, parallel.make_mesh(MeshConfig()))),
    ):
        with pytest.raises(InputError, match="checkpoints/5 is damaged") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that Orbax gives up half-way
def test_damage_inside_a_file(written, tmp_path):
    """Same size, other bytes: TensorStore's checksums find it."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "checkpoints/5/ema/manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    with pytest.raises(InputError, match="checkpoints/5 is damaged"):
        checkpoint.load(tmp_path)


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
