"""Numbers of the PyTorch release, reproduced in float32 on a CPU. `pytest --golden=DIR` runs the cases of another folder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dar_jax.config import SamplingConfig, TokenizerLossConfig
from dar_jax.sampling.logits import filter_logits
from dar_jax.sampling.sampler import decode, generate
from dar_jax.sampling.settings import Networks, make_settings
from dar_jax.training.losses import cross_entropy, tokenizer_terms
from dar_jax.weights.table import to_release

GREEDY = {
    "greedy": SamplingConfig(guidance=(1.0, 1.0)),
    "greedy_cfg4": SamplingConfig(guidance=(4.0, 4.0)),
    "greedy_cfg_1.2_8": SamplingConfig(guidance=(1.2, 8.0)),
    "greedy_cfg4_interval": SamplingConfig(guidance=(4.0, 4.0)),
}


OF_TRAINING = {"fm_loss", "vq_loss", "commit_loss", "predicted_image", "grad_norms"}


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def test_tokenizer_inference(tokenizer_case):
    case = tokenizer_case
    model, params, _ = case.tokenizer()
    config, batch, size = model.config, case.info["batch"], case.info["image_size"]
    apply = functools.partial(model.apply, {"params": params})
    images = nhwc(case.rules.smooth_images(case.seed, "images", batch, size))

    quantized = apply(apply(images, method="encode"), method="quantize")
    if config.vq_enable:
        case.check("codes", quantized.codes, atol=0)
    case.check("quantized", quantized.values.transpose(0, 2, 1)[:, :, None])
    condition = apply(quantized.values, method="condition")
    case.check("cond", condition)

    if {"velocity", "repa_features"} & set(case.expected):
        x = nhwc(case.rules.noise(case.seed, "xt", (batch, 3, size, size)))
        times = jnp.linspace(0.05, 0.95, batch)
        with_repa = "repa_features" in case.expected
        velocity, repa = apply(x, times, condition[:, : config.tokens_per_step], with_repa, method="velocity")
        case.check("velocity", nchw(velocity))
        if with_repa:
            case.check("repa_features", repa[..., : case.info["repa_channels"]])

    noise = nhwc(case.rules.noise(case.seed, "x0", (batch, 3, config.resolution, config.resolution)))
    networks = Networks(model)
    for name, solver in (("decoded", "adams2"), ("decoded_euler", "euler")):
        if name not in case.expected:
            continue
        settings = make_settings(SamplingConfig(solver=solver), config)
        seeds = jnp.arange(len(noise))
        samples = decode(networks, {"tokenizer": params}, settings, quantized.values, seeds, noise=noise, previews=True)
        case.check(name, nchw(samples.images))
        if solver == "adams2":
            for step in range(1, config.num_denoising_steps):
                case.check(f"preview_{step}", nchw(samples.previews[step - 1]))
    assert set(case.expected) - OF_TRAINING - {"train_time_steps"} <= case.compared


def test_tokenizer_training(tokenizer_case):
    case = tokenizer_case
    if "train_time_steps" not in case.expected:
        pytest.skip("the case stores no training step")
    model, params, entries = case.tokenizer()
    shape = (case.info["batch"], 3, case.info["image_size"], case.info["image_size"])
    images = nhwc(case.rules.smooth_images(case.seed, "images", shape[0], shape[2]))
    noise = nhwc(case.rules.noise(case.seed, "train_noise", shape))

    def loss(params):
        output = model.apply({"params": params}, images, jnp.asarray(case.expected["train_time_steps"]), noise)
        terms = tokenizer_terms(model, params, output, TokenizerLossConfig())
        return sum(terms.values()), (terms, output.image)

    if "grad_norms" in case.expected:
        gradients, (terms, image) = jax.jit(jax.grad(loss, has_aux=True))(params)
        case.check_gradients(to_release(entries, gradients))
    else:
        _, (terms, image) = jax.jit(loss)(params)
    case.check_relative("fm_loss", terms["flow"])
    if model.config.vq_enable:
        case.check_relative("vq_loss", terms["codebook"])
        case.check_relative("commit_loss", terms["commitment"])
    case.check("predicted_image", nchw(image))
    assert set(case.expected) & OF_TRAINING <= case.compared


def test_llama_training(ar_case):
    case = ar_case
    model, params, entries = case.llama()
    labels, tokens = (jnp.asarray(case.expected[name]) for name in ("labels", "tokens"))
    case.check("logits", jax.jit(model.apply)({"params": params}, labels, tokens))

    def loss(params):
        return cross_entropy(model.apply({"params": params}, labels, tokens), tokens)[0]

    case.check_relative("loss", jax.jit(loss)(params))
    if "grad_norms" in case.expected:
        case.check_gradients(to_release(entries, jax.jit(jax.grad(loss))(params)))
    assert set(case.expected) & {"logits", "loss", "grad_norms"} <= case.compared


@pytest.mark.parametrize("setting", GREEDY)
def test_llama_greedy(ar_case, setting, tiny_tokenizer):
    case = ar_case
    if setting not in case.expected:
        pytest.skip("the case does not store this setting")
    model, params, _ = case.llama()
    labels = jnp.asarray(case.expected["labels"])
    length = model.config.num_tokens
    interval = length // 2 if setting.endswith("interval") else -1
    sampling = dataclasses.replace(GREEDY[setting], cfg_interval=interval, temperature=0.0)
    tokenizer, tokenizer_params = tiny_tokenizer(num_tokens=length, codebook_size=model.config.vocab_size)
    samples = generate(
        Networks(tokenizer, model),
        {"tokenizer": tokenizer_params, "transformer": params},
        make_settings(sampling, tokenizer.config),
        labels,
        jnp.arange(len(labels)),
    )
    np.testing.assert_array_equal(samples.tokens, case.expected[setting])


def test_filter(filter_case):
    logits = jnp.asarray(filter_case.expected["logits"])
    for name, kept in filter_case.expected.items():
        if not name.startswith("kept"):
            continue
        top_k, top_p = int(name.split("_")[3]), float(name.split("_")[6])
        filtered = filter_logits(logits, top_k or None, top_p if top_p < 1 else None)
        np.testing.assert_array_equal(filtered > -jnp.inf, kept, err_msg=name)
