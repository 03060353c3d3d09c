"""What an experiment's parts become in a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax import parallel
from dar_jax.config import DataConfig, MeshConfig, VelocityConfig
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.features.names import lpips_entries
from dar_jax.features.vgg_lpips import Lpips
from dar_jax.quickstart import TOKENIZER
from dar_jax.training import checkpoint, stages
from dar_jax.training.loop import train
from dar_jax.training.losses import tokenizer_loss
from dar_jax.training.stages import keep_tokenizer, open_stage
from dar_jax.weights import torch_file
from dar_jax.weights.table import to_release


def test_further_terms_join_the_loss_of_a_run(tmp_path):
    """They get the images and the REPA features of a model that has their head; they are logged and summed up."""
    velocity = VelocityConfig(width=32, layers=2, head_size=16, patch_size=4, repa_layer=1, repa_hidden=8, repa_width=12)
    model = dataclasses.replace(TOKENIZER.model, encoder_layers=1, encoder_width=32, decoder_width=32, velocity=velocity)

    def terms(params, images, output, frozen, step):
        assert output.repa.shape == (3, 4, 12)
        return {"brightness": jnp.abs(images.mean() - output.image.mean()), "repa": jnp.square(output.repa).mean()}

    mesh = parallel.make_mesh(MeshConfig())
    loss = lambda config, model: tokenizer_loss(config, model, [terms])  # noqa: E731
    experiment = Experiment(dataclasses.replace(TOKENIZER, model=model), loss=loss, reads=("loss.",))  # the library's is in it
    stage = open_stage(experiment, tmp_path, mesh, None)
    batch = {"image": np.stack([stage.source[i]["image"] for i in range(3)]), "label": np.arange(3)}
    loss, metrics = jax.jit(stage.loss_fn)(stage.init_params(), batch, jax.random.key(0), {}, 0)
    parts = ("flow", "codebook", "commitment", "entropy", "brightness", "repa")
    assert all(metrics[name] != 0 for name in parts)
    np.testing.assert_allclose(loss, sum(metrics[name] for name in parts), rtol=1e-5)


def with_lpips(tmp_path, **changes):
    """Settings of a small run whose loss has LPIPS with random weights in a file."""
    rgb = jnp.zeros((1, 16, 16, 3))
    params = jax.device_get(jax.jit(Lpips().init)(jax.random.key(1), rgb, rgb)["params"])
    torch_file.write(tmp_path / "lpips.pt", to_release(lpips_entries(), params))
    velocity = VelocityConfig(width=32, layers=1, head_size=16, patch_size=4, repa_layer=None)
    sizes = {"image_size": 16, "encoder_layers": 1, "encoder_width": 32, "decoder_width": 32, "velocity": velocity}
    loss = dataclasses.replace(TOKENIZER.loss, lpips=0.5, lpips_weights=str(tmp_path / "lpips.pt"), **changes)
    data = DataConfig(source="digits", image_size=16, channels=1, crop="center")
    settings = dataclasses.replace(TOKENIZER.train, steps=2, batch_size=8, log_every=1)
    model = dataclasses.replace(TOKENIZER.model, **sizes)
    optimizer = dataclasses.replace(TOKENIZER.optimizer, name="adamw")
    return dataclasses.replace(TOKENIZER, model=model, loss=loss, data=data, train=settings, optimizer=optimizer)


def test_images_that_are_not_cropped_have_the_size_of_the_model(tmp_path):
    class Small:
        class_names, description = ("a",), "small"

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return {"image": np.zeros((4, 4, 1), np.uint8), "label": 0}

    config = dataclasses.replace(TOKENIZER, data=dataclasses.replace(TOKENIZER.data, crop="none"))
    with pytest.raises(InputError, match=r"the images are \[4, 4, 1\], the tokenizer takes \[8, 8, 1\]"):
        open_stage(Experiment(config, source=lambda data: Small()), tmp_path, parallel.make_mesh(MeshConfig()), None)


@pytest.mark.usefixtures("narrow_vgg")
def test_lpips_takes_part_in_training_on_any_mesh(tmp_path):
    config = with_lpips(tmp_path)
    losses = {}
    for sizes in ((8, 1, 1), (2, 2, 2)):
        summary = train(Experiment(dataclasses.replace(config, mesh=MeshConfig(*sizes))), tmp_path / str(sizes))
        losses[sizes] = summary.metrics
        assert summary.metrics["lpips"] > 0
    np.testing.assert_allclose(losses[8, 1, 1]["lpips"], losses[2, 2, 2]["lpips"], rtol=1e-5)
    np.testing.assert_allclose(losses[8, 1, 1]["loss"], losses[2, 2, 2]["loss"], rtol=1e-5)


@pytest.mark.usefixtures("narrow_vgg")
def test_networks_are_opened_only_for_terms_with_a_weight(tmp_path, monkeypatch):
    config = with_lpips(tmp_path, repa=0.5)
    mesh = parallel.make_mesh(MeshConfig())
    with pytest.raises(InputError, match="loss.repa needs the REPA head"):
        train(Experiment(config), tmp_path / "run")
    missing = dataclasses.replace(config, loss=dataclasses.replace(config.loss, repa=0.0, lpips_weights="nowhere"))
    with pytest.raises(InputError, match="nowhere"):
        open_stage(Experiment(missing), tmp_path, mesh, None)

    def refuse(*arguments):
        raise AssertionError("opened")

    monkeypatch.setattr(stages, "resolve", refuse)
    off = dataclasses.replace(config, loss=dataclasses.replace(config.loss, repa=0.0, lpips=0.0))
    assert open_stage(Experiment(off), tmp_path, mesh, None).frozen == {}
    small = dataclasses.replace(
        config, model=TOKENIZER.model, data=TOKENIZER.data, loss=dataclasses.replace(config.loss, repa=0.0)
    )
    with pytest.raises(InputError, match="at least 16 pixels"):
        open_stage(Experiment(small), tmp_path, mesh, None)


def test_a_resumed_run_keeps_its_tokenizer(tiny_run, tiny_tokenizer, tmp_path):
    before = checkpoint.inspect(tiny_run)
    mesh = parallel.make_mesh(MeshConfig())

    def resumed(tokenizer):
        experiment = Experiment(dataclasses.replace(before.config, tokenizer=tokenizer))
        return open_stage(experiment, before.workdir, mesh, before).experiment.config.tokenizer

    assert resumed(None) is None
    assert resumed(str(tiny_run / "tokenizer")) == str(tiny_run / "tokenizer")  # the same weights
    with pytest.raises(InputError, match="nowhere does not exist"):
        resumed("nowhere")
    own = checkpoint.load(tiny_run / "tokenizer")
    other = jax.tree.map(lambda leaf: leaf + 1, own.params)
    checkpoint.save_for_inference(tmp_path, own.info.config, other, 1, own.info.class_names)
    with pytest.raises(InputError, match="has another tokenizer than"):
        resumed(str(tmp_path))


def test_a_new_run_takes_no_other_tokenizer_for_its_own(tiny_run, tmp_path):
    """An earlier run that ended before its first checkpoint may have left one of a later step, which would be read."""
    info, mesh = checkpoint.inspect(tiny_run), parallel.make_mesh(MeshConfig())
    config = dataclasses.replace(info.config, tokenizer=str(tiny_run / "tokenizer"))
    workdir = checkpoint.absolute(tmp_path)
    stage = open_stage(Experiment(config), workdir, mesh, None)
    assert not list(tmp_path.iterdir())  # nothing is left behind where the run is refused later
    keep_tokenizer(stage, workdir)
    keep_tokenizer(stage, workdir)
    assert checkpoint.latest_step(tmp_path / "tokenizer") == 1
    own = stage.tokenizer
    checkpoint.save_for_inference(tmp_path / "tokenizer", own.info.config, own.params, 2, own.info.class_names)
    with pytest.raises(InputError, match="holds a tokenizer of step 2 already, .* is of step 1; delete"):
        keep_tokenizer(stage, workdir)
