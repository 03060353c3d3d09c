"""Sampling and reconstructing with checkpoints that are read from disk; the weights are random."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import DataConfig, MeshConfig, SamplingConfig, TokenizerTraining, TransformerTraining
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.inference.model import Model
from dar_jax.inference.reconstruct import encode, reconstruct
from dar_jax.inference.samples import class_number, make_request, pair, sample
from dar_jax.inference.trained import inspect_transformer, load_sampler, load_tokenizer, run_mesh
from dar_jax.models.pixels import psnr, to_uint8
from dar_jax.parallel import make_mesh
from dar_jax.sampling.settings import Method
from dar_jax.training.checkpoint import inspect, save_for_inference

NAMES = tuple("0123456789")
DIGITS = DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False)
SAMPLING = SamplingConfig(guidance=(1.5, 3.0))
LABELS, SEEDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2]


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load_sampler(tiny_run)


@pytest.fixture(scope="module")
def digits():
    source = open_source(DIGITS)
    return np.stack([source[index]["image"] for index in range(11)])


def draw(trained, labels=LABELS, seeds=SEEDS, sampling=SAMPLING, batch_size=16, **given):
    """Tokens [N, ...] and images [groups yielded, N, H, W, C] of all batches."""
    parts = list(sample(trained, labels, seeds, sampling, batch_size, **given))
    groups = sorted({part.groups for part in parts})
    images = np.stack([np.concatenate([part.images for part in parts if part.groups == group]) for group in groups])
    return np.concatenate([part.tokens for part in parts if part.groups == groups[-1]]), images


@pytest.fixture(scope="module")
def drawn(trained):
    return draw(trained)


def test_samples_do_not_depend_on_the_batch(trained, drawn):
    tokens, images = draw(trained, batch_size=8)  # two batches, the second of 3 and padded
    np.testing.assert_array_equal(tokens, drawn[0])
    assert np.abs(images.astype(int) - drawn[1]).max() <= 1  # float32 sums of another order
    np.testing.assert_array_equal(tokens[1], tokens[3])  # label 1, seed 9 twice
    assert len(np.unique(tokens, axis=0)) == 10


def test_a_decoder_mesh_changes_no_image(tiny_run, trained, drawn, digits):
    mesh, other = make_mesh(MeshConfig(), jax.devices()[:2]), make_mesh(MeshConfig(), jax.devices()[2:5])
    apart = load_sampler(tiny_run, mesh=mesh, decoder_mesh=other)
    tokens, images = draw(apart, batch_size=7)  # 12 at a time, so that either mesh can share them
    np.testing.assert_array_equal(tokens, drawn[0])
    assert np.abs(images.astype(int) - drawn[1]).max() <= 1
    found, whole = (reconstruct(each, digits, np.arange(11), batch_size=7) for each in (apart, trained))
    np.testing.assert_array_equal(found.codes, whole.codes)
    assert np.abs(found.images.astype(int) - whole.images).max() <= 1


def test_previews_end_with_the_sample(trained, drawn):
    tokens, images = draw(trained, previews=True)
    np.testing.assert_array_equal(tokens, drawn[0])
    assert len(images) == 4
    assert np.abs(images[-1].astype(int) - drawn[1][0]).max() <= 1
    assert all(np.abs(images[-1].astype(int) - images[group]).max() > 8 for group in range(3))


def test_sampling_stops_after_some_groups(trained, drawn):
    tokens, images = draw(trained, sampling=dataclasses.replace(SAMPLING, num_groups=2))
    np.testing.assert_array_equal(tokens, drawn[0][:, :8])
    assert images.shape[1:] == (11, 8, 8, 1)


def test_prefix_of_each_sample(trained, drawn):
    prefix = np.arange(11 * 5).reshape(11, 5) % 64
    tokens, _ = draw(trained, prefix=prefix)
    np.testing.assert_array_equal(tokens[:, :5], prefix)
    assert (tokens[:, 5:] != drawn[0][:, 5:]).any()


def test_start_image_shows_through(trained):
    """Random weights change little in the last steps, so the image that these start from can be recognised."""
    image = np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((4, 4), np.uint8))[..., None]
    starts = dataclasses.replace(SAMPLING, start_step=3)
    _, one = draw(trained, sampling=starts, image=image)
    _, other = draw(trained, sampling=starts, image=255 - image)
    assert (one[0].astype(float) - other[0])[:, image[..., 0] > 0].mean() > 20


def test_guidance_of_an_experiment_is_used(tiny_run):
    experiment = Experiment(TransformerTraining(), method=Method(guidance=lambda tokens, first, last: np.ones(tokens)))
    tokens, _ = draw(load_sampler(tiny_run, experiment))
    unguided, _ = draw(load_sampler(tiny_run), sampling=dataclasses.replace(SAMPLING, guidance=(1.0, 1.0)))
    np.testing.assert_array_equal(tokens, unguided)
    assert (tokens != draw(load_sampler(tiny_run))[0]).any()


def test_a_draw_gives_integers(tiny_run):
    method = Method(draw=lambda logits, *_: logits.argmax(-1).astype(jnp.float32))
    fork = load_sampler(tiny_run, Experiment(inspect(tiny_run).config, method=method))
    with pytest.raises(InputError, match=r"method.draw gives float32 .*, it should give int32"):
        list(sample(fork, [1, 2], [1, 2], SamplingConfig(guidance=(1.0, 1.0))))


def test_higher_resolution(tiny_run, trained):
    request = make_request(inspect(tiny_run), ["3"], [1], SAMPLING, resolution=16, output_resolution=12)
    tokens, images = draw(trained.with_tokenizer(request.tokenizer), [3], [1], batch_size=8)
    np.testing.assert_array_equal(tokens, draw(trained, [3], [1], batch_size=8)[0])
    assert images.shape[1:] == (1, 12, 12, 1)


def test_request(tiny_run):
    found = inspect_transformer(tiny_run)
    request = make_request(found, ["3", "7"], [1], SAMPLING, prefix_tokens=[5, 6, 7], prefix_length=2)
    assert (request.labels, request.seeds) == ((3, 7), (1, 1))
    np.testing.assert_array_equal(request.prefix, [5, 6])


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("prefix length is 17, it should be 0 .. 16", {"prefix_image": "a.png", "prefix_length": 17}),
        ("prefix length is 3, it should be 0 .. 2", {"prefix_tokens": [1, 2], "prefix_length": 3}),
        ("prefix length is 20, it should be 0 .. 16", {"prefix_tokens": [1] * 20}),
        ("a prefix image needs a prefix length", {"prefix_image": "a.png"}),
        ("a prefix length needs", {"prefix_length": 3}),
        ("not from both", {"prefix_image": "a.png", "prefix_tokens": [1], "prefix_length": 1}),
        ("prefix token 64 is out of range, tokens are 0 .. 63", {"prefix_tokens": [1, 64]}),
        ("there is no image a.png", {"prefix_image": "a.png", "prefix_length": 3}),
        ("start_step is 0", {"start_image": "a.png"}),
        ("resolution 4 is below", {"resolution": 4}),
        ("multiple of velocity.patch_size", {"resolution": 17}),
        ("output resolution 9 should be 1 .. 8", {"output_resolution": 9}),
    ],
)
def test_request_that_does_not_fit(tiny_run, message, given):
    with pytest.raises(InputError, match=message):
        make_request(inspect(tiny_run), ["3"], [1], SAMPLING, **given)


def test_start_step_without_an_image(tiny_run):
    with pytest.raises(InputError, match="start_step is 2"):
        make_request(inspect(tiny_run), ["3"], [1], SamplingConfig(start_step=2))


def test_start_step_in_the_settings_of_a_run(trained):
    with pytest.raises(InputError, match="start_step is 1: an image"):
        next(sample(trained, [3], [1], SamplingConfig(start_step=1)))


def test_labels_of_a_model_are_numbers_or_names(trained):
    model = Model(dataclasses.replace(trained, class_names=tuple("1023456789")))
    image = model.sample([1], [5])
    np.testing.assert_array_equal(image, model.sample(["0"], [5]))
    assert (image != model.sample(["1"], [5])).any()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda model: model.sample([]), "no labels"),
        (lambda model: model.sample([3], prefix=[99_999]), "0 .. 63"),
        (lambda model: model.sample([3], prefix=[0.5]), "integers"),
        (lambda model: model.sample([3], prefix=[1] * 17), "k up to 16"),
        (lambda model: model.sample([3], prefix=np.ones((2, 3), int)), "k up to 16"),
        (lambda model: model.decode(np.zeros((3, 16), int), [1, 2]), "do not pair up"),
        (lambda model: model.decode(np.zeros((1, 16), int), [1, 2]), "1 images and 2 seeds"),
        (lambda model: model.decode(np.zeros((3, 16), int), [-1, 0, 1]), "seed -1 is out of range"),
        (lambda model: model.decode(np.zeros((3, 16))), "codes are float64"),
        (lambda model: model.decode(np.zeros((3, 16), int), temperature=0.5), "temperature is no setting of decoding"),
        (lambda model: model.encode([]), "the tokenizer takes"),
        (lambda model: model.encode([[1, 2]]), "the tokenizer takes"),
    ],
)
def test_what_a_model_refuses(trained, call, word):
    with pytest.raises(InputError, match=word):
        call(Model(trained))


def test_class_number():
    names = ("10", "cat", "2")
    assert [class_number(label, names) for label in ("cat", "2", "10", "1")] == [1, 2, 0, 1]
    with pytest.raises(InputError, match="did you mean cat"):
        class_number("cta", names)
    for label in ("3", "-1"):
        with pytest.raises(InputError, match=f"label {label} is out of range, classes are 0 .. 2"):
            class_number(label, names)


def test_pair():
    assert pair([3], [1, 2]) == ((3, 3), (1, 2))
    assert pair([3, 4], [1]) == ((3, 4), (1, 1))
    assert pair([3, 4], [1, 2]) == ((3, 4), (1, 2))
    with pytest.raises(InputError, match="2 labels and 3 seeds"):
        pair([3, 4], [1, 2, 3])
    with pytest.raises(InputError, match="seed -1"):
        pair([3], [-1])


def test_kinds_of_checkpoints(tiny_run):
    assert inspect(tiny_run).config.name == "tiny" and inspect(tiny_run / "tokenizer").is_tokenizer
    with pytest.raises(InputError, match="holds a tokenizer"):
        inspect_transformer(tiny_run / "tokenizer")
    assert load_tokenizer(tiny_run).config == load_tokenizer(tiny_run / "tokenizer").config


def test_a_tokenizer_that_does_not_fit_the_transformer(tiny_run, tiny_tokenizer, tmp_path):
    shutil.copytree(tiny_run, tmp_path, dirs_exist_ok=True)
    for sizes, message in (
        ({"num_tokens": 8}, "num_tokens is 16, but the tokenizer's num_tokens is 8"),
        ({"codebook_size": 32}, "vocab_size"),
    ):
        tokenizer, params = tiny_tokenizer(**sizes)
        save_for_inference(tmp_path / "tokenizer", TokenizerTraining(model=tokenizer.config, data=DIGITS), params, 1, NAMES)
        with pytest.raises(InputError, match=message):
            load_sampler(tmp_path)


def test_mesh_of_a_run_on_other_devices():
    assert run_mesh(MeshConfig(data=2, fsdp=2, tensor=2)).shape == {"data": 4, "fsdp": 1, "tensor": 2}
    assert run_mesh(MeshConfig(tensor=64)).shape == {"data": 8, "fsdp": 1, "tensor": 1}
    assert run_mesh(MeshConfig(data=1, tensor=-1)).shape == {"data": 1, "fsdp": 1, "tensor": 8}


def test_reconstruct(trained, digits):
    """The codes are the tokenizer's, the images those of the sampler with all tokens given, and the PSNR is the formula's."""
    result = reconstruct(trained, digits, np.arange(11), batch_size=8)
    network, params = trained.networks.tokenizer, jax.device_get(trained.params["tokenizer"])
    expected = jax.jit(lambda images: network.apply({"params": params}, images, method="codes"))(digits / 127.5 - 1)
    np.testing.assert_array_equal(result.codes, expected)
    np.testing.assert_array_equal(encode(trained, digits, batch_size=16), expected)
    tokens, images = draw(trained, [0] * 11, np.arange(11), prefix=result.codes)
    np.testing.assert_array_equal(tokens, result.codes)
    assert np.abs(images[0].astype(int) - result.images).max() <= 1
    error = np.mean((digits[2].astype(float) - result.images[2]) ** 2)
    assert result.psnr[2] == pytest.approx(20 * np.log10(255 / np.sqrt(error)))


def test_psnr():
    """An error of d everywhere is 20 log10(255 / d) dB, the same as a peak of 2 over an error of 2 d / 255 in [-1, 1]."""
    image = np.full((1, 4, 4, 1), 100, np.uint8)
    assert psnr(image, image + np.uint8(51))[0] == pytest.approx(20 * np.log10(5))
    assert psnr(image, image - np.uint8(51))[0] == pytest.approx(20 * np.log10(5))  # no wrap-around of uint8
    assert psnr(image, image)[0] > 140


def test_to_float_and_to_uint8_are_inverse():
    from dar_jax.models.pixels import to_float

    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_float(jnp.asarray(pixels))), pixels)
