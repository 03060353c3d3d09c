"""Which noise denoising starts from: less of it, one for all images, or that which leads to a given image.

Source:   "Optimal boundary conditions" for diffusion ODEs (arXiv 2305.15357): a start that is good for some conditions is good
          for others. Inversion of the ODE is DDIM's (arXiv 2010.02502).
Command:  dar-jax sample runs/digits --experiment experiments/variants/noise.py --labels 3 --seeds 1,2 --out samples
          python experiments/variants/noise.py runs/digits --candidates 64 --images 256      (chooses a start for :shared)
          dar-jax sample runs/digits --experiment experiments/variants/noise.py:shared --labels 3 --seeds 1,2 --out samples
Differs:  in the noise (`Method.noise`).
Time:     nothing is trained; a choice among 64 decodes 64 times as many images.
Result:   digits, three seeds: 0.7 of the noise has 19.47 dB and a distance of 0.607, base 19.27 and 0.625; with --steps late3
          19.16 and 0.581; none 19.58 and 0.605, but 0.3 points of accuracy less. `shared` (one training): 0.2 dB more, but a
          distance of 0.764, base 0.655. CIFAR-10, one training: 1.7 dB more, but rFID 244, base 123; `more` has 1.1 dB less
          and a distance of 12.0, base 16.5. See docs/variants.md.

`experiment` scales the noise by 0.7, `more` by 1.1, `none` by 0: then all seeds of the same tokens give the same image, and a
network that was trained briefly fails, since it never saw such an input; 0.5 to 1 is safe on the digits. `shared` starts every
image from the one in `FILE`, so that different seeds have different tokens, but no other details.

`inverted` goes the ODE back from an image with the image's own tokens. Decoded from there, the tokens give the image almost
exactly, and edited tokens an edited image that keeps what they do not say.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.cli.options import script
from dar_jax.config import SamplingConfig
from dar_jax.errors import require
from dar_jax.evaluation.tokenizer import open_lpips
from dar_jax.experiment import Experiment
from dar_jax.features.vgg_lpips import Lpips
from dar_jax.files import replacing
from dar_jax.inference.reconstruct import at_image_size, images_of, quantize
from dar_jax.inference.trained import load_tokenizer
from dar_jax.models.pixels import to_float
from dar_jax.parallel.batches import over_batches, row_slices, split_rows
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.denoise import begin_decoding, condition_values, denoise, schedule
from dar_jax.sampling.sampler import decode
from dar_jax.sampling.settings import Method, make_settings, normal_noise
from dar_jax.sampling.solvers import Solver

FILE = Path("runs/noise.npy")  # the start that `shared` takes
CORRECTIONS = 2  # of each step back


def scaled_noise(scale, keys, shape):
    return scale * normal_noise(keys, shape)


def shared_noise(file, keys, shape):
    """The noise of a file for all. Raises InputError where there is none, or it is of another shape."""
    require(Path(file).is_file(), f"there is no {file}; python experiments/variants/noise.py RUN --out {file} makes it")
    noise = np.load(file)
    require(noise.shape == tuple(shape), f"{file} is noise of {list(noise.shape)}, but these images are {list(shape)}")
    return jnp.broadcast_to(jnp.asarray(noise), (len(keys), *shape))


def back_step(velocity, x, carry, t, t_next, keys):
    """Euler's step from t to t_next, undone: finds the z with z + (t_next - t) v(z, t) = x."""
    z = x - (t_next - t) * velocity(x, t)
    for _ in range(CORRECTIONS):
        z = x - (t_next - t) * velocity(z, t)
    return z, velocity.data(z, velocity(z, t), t), carry


back = Solver(lambda x: None, back_step)


def inverted(networks, params, values, data, times):
    """The start [B, R, R, C] from which Euler's steps at these times lead values [B, T, E] to scaled images [B, R, R, C]."""
    decoding = begin_decoding(networks, back, jnp.zeros(len(data), jnp.uint32), noise=data)
    decoding = condition_values(networks.tokenizer, params, values, decoding, jnp.int32(0))
    for step in reversed(schedule(networks.tokenizer, times).steps):
        decoding = denoise(networks, params, back, decoding, step)
    return decoding.x


def main(
    run: str,
    candidates: int = 64,
    images: int = 256,
    by: Literal["psnr", "lpips"] = "psnr",
    lpips: str | None = None,
    out: Path = FILE,
):
    """Choose, among random candidates, the noise from which images of the training of RUN are decoded best, for `shared`."""
    trained = load_tokenizer(run)
    trained = trained.with_tokenizer(at_image_size(trained.config))
    networks, settings = trained.networks, make_settings(SamplingConfig(), trained.config)
    originals, _ = images_of(trained, images, training=True)
    seeds, size = np.arange(candidates), trained.full_batch(64)
    starts = np.asarray(normal_noise(jax.vmap(jax.random.key)(seeds), networks.tokenizer.noise_shape))
    weights = open_lpips(lpips).params if by == "lpips" else None

    def loss(images, noise):
        """Of each image decoded from its noise: -PSNR, or LPIPS."""
        values = quantize(networks, trained.params, images).values
        decoded = decode(networks, trained.sampler_params, settings, values, jnp.zeros(len(images), jnp.uint32), noise=noise)
        pair = to_float(images), jnp.clip(decoded.images, -1, 1)
        if weights is None:
            return 10 * jnp.log10(jnp.square(pair[0] - pair[1]).mean(axis=(1, 2, 3)) / 4)
        colours = (jnp.broadcast_to(each, (*each.shape[:3], 3)) for each in pair)
        return Lpips().apply({"params": weights}, *colours)

    losses = []
    for noise in starts:
        rows = row_slices(0, len(originals), size)
        batches = split_rows(rows, originals, np.broadcast_to(noise, (len(originals), *noise.shape)))
        losses.append(np.concatenate([part for _, part in over_batches(loss, batches, size, trained.mesh)]).mean())
    best, sign = int(np.argmin(losses)), -1 if by == "psnr" else 1
    with replacing(out) as temporary, open(temporary, "wb") as file:
        np.save(file, starts[best])
    print(f"{by}: best of {len(losses)} {sign * losses[best]:.3f}, mean {sign * np.mean(losses):.3f}; {out}")


config = dataclasses.replace(TRANSFORMER, name="noise", data=DIGITS)
experiment = Experiment(config, method=Method(noise=functools.partial(scaled_noise, 0.7)))
more = Experiment(config, method=Method(noise=functools.partial(scaled_noise, 1.1)))
none = Experiment(config, method=Method(noise=functools.partial(scaled_noise, 0.0)))
shared = Experiment(config, method=Method(noise=functools.partial(shared_noise, FILE)))

if __name__ == "__main__":
    script(main)
