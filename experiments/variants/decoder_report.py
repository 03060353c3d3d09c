"""What the pixel decoder and its tokens do: a dozen measurements of a checkpoint, as report.json, groups.png and times.png.

Source:   questions of the paper's reviewers; docs/variants.md says what each figure is, and has those of the digits.
Command:  python experiments/variants/decoder_report.py runs/digits report
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.cli.options import script
from dar_jax.config import SamplingConfig
from dar_jax.evaluation.metrics import code_statistics, energy_distance, pixel_distance
from dar_jax.experiment import load_experiment
from dar_jax.files import write_json
from dar_jax.inference import pictures
from dar_jax.inference.model import load
from dar_jax.inference.reconstruct import images_of, quantize
from dar_jax.inference.samples import sample
from dar_jax.models import flow
from dar_jax.models.pixels import psnr, to_float, to_uint8
from dar_jax.models.transformer import score
from dar_jax.sampling.denoise import begin_decoding, condition_values, denoise, schedule
from dar_jax.sampling.settings import make_settings
from dar_jax.sampling.solvers import euler

TIMES = (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)  # before the shift
PROBES, NOISES, EXACT = 8, 12, 1024  # of the Jacobian, of the gradients; pixels up to which all singular values are computed


def asymmetry(field, x, key):
    """|J r - J^T r|^2 / 2 |J r|^2 of the Jacobian of a field [B, ...] -> [B, ...] at x, r normal: 0 for a gradient."""
    r = jax.random.normal(key, (PROBES, *x.shape))
    forward = jax.vmap(lambda r: jax.jvp(field, (x,), (r,))[1])(r)
    (backward,) = jax.vmap(jax.vjp(field, x)[1])(r)
    return jnp.sum((forward - backward) ** 2) / (2 * jnp.sum(forward**2))


def effective_rank(field, x, key):
    """exp of the entropy of the singular values of the Jacobian, mean over the batch; in 16 directions beyond `EXACT`."""
    size = x[0].size
    basis = jnp.eye(size) if size <= EXACT else jnp.linalg.qr(jax.random.normal(key, (size, 16)))[0].T
    columns = jax.lax.map(lambda r: jax.jvp(field, (x,), (jnp.broadcast_to(r.reshape(x[0].shape), x.shape),))[1], basis)
    values = jnp.linalg.svd(columns.reshape(len(basis), len(x), -1).swapaxes(0, 1), compute_uv=False)
    return jnp.exp(jax.scipy.special.entr(values / values.sum(axis=-1, keepdims=True)).sum(axis=-1)).mean()


def decoded(trained, values, seeds, edit=lambda tokens: tokens, solver=None, steps=None):
    """The previews [S, N, H, W, C] of values [N, T, E], with the condition tokens [N, T, D] that `edit` makes of theirs."""
    networks, params, previews = trained.networks, trained.sampler_params.decoder, []
    settings = make_settings(SamplingConfig(num_denoising_steps=steps), trained.config)
    decoding = begin_decoding(networks, solver or settings.solver, seeds)
    decoding = condition_values(networks.tokenizer, params, values, decoding, jnp.int32(0))
    decoding = dataclasses.replace(decoding, condition=edit(decoding.condition))
    for step in schedule(networks.tokenizer, settings.times).steps:
        decoding = denoise(networks, params, solver or settings.solver, decoding, step)
        previews.append(np.clip(decoding.preview, -1, 1))
    return np.stack(previews)


def at_time(model, params, images, values, key, t):
    """Figures of the velocity field at one time, t before the shift."""
    shifted, std = model.path.shift(t, model.config.velocity.time_shift), model.config.velocity.data_std
    start, data = flow.group_start(t, model.config), std * images

    def field(values, x, present=1.0):
        tokens = model.apply(params, values, method="condition") * present
        tokens = jax.lax.dynamic_slice_in_dim(tokens, start, model.config.tokens_per_step, axis=1)
        return model.apply(params, x, jnp.reshape(shifted, 1), tokens, method="velocity")[0]

    def errors(values, key, present=1.0):
        noise = jax.random.normal(key, data.shape)
        x = model.path.at(noise, data, shifted)
        v = field(values, x, present)
        pairs = (v, model.path.velocity(noise, data, shifted)), (model.path.data(x, v, shifted), data)
        return [jnp.square(a - b).mean() / std**2 for a, b in pairs]

    gradient = jax.grad(lambda values, key: errors(values, key)[0] * len(images))
    draws = jax.lax.map(lambda key: gradient(values, key), jax.random.split(key, NOISES))  # [K, N, T, E]
    size = lambda x: jnp.sqrt(jnp.square(x).sum((-1, -2))).mean()  # noqa: E731
    few, x = values[:32], model.path.at(jax.random.normal(key, data[:32].shape), data[:32], shifted)
    return {
        "errors": [errors(values, key), errors(jnp.roll(values, 1, 0), key), errors(values, key, 0)],  # right, swapped, absent
        "gradient": [size(draws.mean(0)), size(draws - draws.mean(0))],
        "asymmetry": asymmetry(lambda x: field(few, x), x, key),
        "rank": effective_rank(lambda x: model.path.data(x, field(few, x), shifted), x, key),
    }


def measure(trained, images, labels):
    """All figures, by name; qualities are [PSNR, Fréchet distance of the pixels]."""
    config, networks, params = trained.config, trained.networks, trained.params
    quantized, seeds, groups = quantize(networks, params, images), jnp.arange(len(images)), range(config.num_groups)
    originals, values, size = to_float(images), quantized.values, config.tokens_per_group
    group, within = np.divmod(np.arange(config.num_tokens), size)
    half = np.minimum(group, (config.num_groups - 1) // 2) * size + within
    swap = lambda x, g: jnp.where((group == g)[:, None], jnp.roll(x, 1, axis=0), x)  # noqa: E731
    show = lambda shown: [psnr(images, to_uint8(shown)).mean(), pixel_distance(images, to_uint8(shown))]  # noqa: E731
    final = lambda values, seeds=seeds, *edit, **how: decoded(trained, values, seeds, *edit, **how)[-1]  # noqa: E731
    previews, again = decoded(trained, values, seeds), final(values, seeds + 10_000)
    others = {"4 S steps": final(values, steps=4 * config.num_denoising_steps), "Euler": final(values, solver=euler)}
    others["SDE"] = final(values, solver=load_experiment(Path(__file__).with_name("stochastic.py")).method.solver)
    figures = {
        "base": show(previews[-1]),
        "codes of a group swapped": [show(final(swap(values, g))) for g in groups],
        "condition of a group swapped": [show(final(values, seeds, lambda x, g=g: swap(x, g))) for g in groups],
        "first half of the condition": show(final(values, seeds, lambda x: x[:, half])),
        "preview error": np.square(previews - originals).mean((1, 2, 3, 4)),
        "spread": np.square(previews[-1] - again).mean() / np.square(again - originals).mean(),
        "energy distance": {name: energy_distance(previews[-1], each) for name, each in others.items()},
    }
    codes = None if quantized.codes is None else np.asarray(quantized.codes)
    if codes is not None:
        counts = np.stack([np.bincount(column, minlength=config.codebook_size) for column in codes.T])
        figures["bits of a code"] = vars(code_statistics(counts))
        figures["codes used"] = np.count_nonzero(counts, axis=1)
    if networks.transformer is not None:
        figures["bits of a code after others"] = score(networks.transformer, params["transformer"], labels, codes)[0].mean(0)
        known = [codes[:, : count * size] for count in range(config.num_groups + 1)]
        drawn = [next(sample(trained, labels, seeds, trained.info.config.sampling, len(labels), prefix=each)) for each in known]
        figures["first groups known"] = [show(to_float(each.images)) for each in drawn]
    at, weights = jax.jit(at_time, static_argnums=0), {"params": params["tokenizer"]}
    rows = [at(networks.tokenizer, weights, originals, values, jax.random.key(0), jnp.float32(t)) for t in TIMES]
    return figures | {"t": TIMES} | jax.tree.map(lambda *row: np.stack(row), *rows)


def main(run: str, out: Path, images: int = 300):
    """Measure the pixel decoder of RUN, a tokenizer's or for everything a transformer's, on held-out images; write to OUT."""
    trained = load(run).trained
    originals, labels = images_of(trained, images)
    count = len(originals) // trained.full_batch(1) * trained.full_batch(1)  # the devices share them
    with jax.set_mesh(trained.mesh):
        figures = measure(trained, originals[:count], labels[:count])
    write_json(out / "report.json", jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), figures))
    with pictures.plot(out / "groups.png") as axes:
        axes.set(xlabel="group, or number of groups known", ylabel="PSNR (dB)")
        for name in ("codes of a group swapped", "condition of a group swapped", "first groups known"):
            axes.plot([quality[0] for quality in figures.get(name, ())], "o-", label=name)
    with pictures.plot(out / "times.png") as axes:
        axes.set(xlabel="time before the shift, 0 noise and 1 image", ylim=(1e-5, 10))
        lines = [*np.array(figures["errors"])[:, 0], figures["errors"][0][1], *figures["gradient"], figures["asymmetry"]]
        names = ["flow loss", "with tokens swapped", "without tokens", "error of the image", "gradient at the codes"]
        axes.semilogy(TIMES, np.transpose(lines), label=[*names, "its spread", "asymmetry of the Jacobian"])


if __name__ == "__main__":
    script(main)
