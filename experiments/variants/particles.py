"""Images that agree with anything that can be computed from them: particles whose previews are judged after every group.

Source:   Particle filters for language models (arXiv 2306.03081), and TSDiff's likelihood of an observation given a sampler's
          own estimate (arXiv 2307.11494). Here the estimate is the preview, which exists after every group of tokens.
Command:  python experiments/variants/particles.py runs/digits particles --observe profiles
          (any transformer's run will do; nothing is trained)
Differs:  from `dar-jax edit`, which has the same particles (`sampling.particles`), in what is known of an image: no pixels.
Time:     as many samples as there are particles.
Result:   from the profiles alone 70 % of 60 digits are read right with 16 particles, 75 % with 64. See docs/variants.md.

`profiles`: the mean of each row and of each column is known, as from two X-ray images, and not the class. `reader`: nothing
but the class is known, and not to the transformer: a support-vector classifier looks at the previews. Any function of previews
on the host will do, `likelihood(previews [B, K, H, W, C]) -> [B, K]`; no gradient is asked of it.
"""

from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from dar_jax.cli.options import script
from dar_jax.inference import pictures
from dar_jax.inference.trained import load_sampler
from dar_jax.models.pixels import to_float, to_uint8
from dar_jax.parallel.batches import over_batches, row_slices, split_rows
from dar_jax.quickstart import classifier, digits
from dar_jax.sampling.particles import chosen_particle, random_classes
from dar_jax.sampling.sampler import snapshot
from dar_jax.sampling.settings import make_settings

SURE = 4.0  # log likelihood of an image that the classifier reads as its class


def profiles(images):
    """The means of rows and columns: [..., H, W, C] -> [..., H + W]."""
    return np.concatenate([np.mean(images, axis=axis)[..., 0] for axis in (-2, -3)], axis=-1)


def likelihood_of_profiles(wanted):
    """Independent normal errors of unknown variance, as of `log_likelihood`."""

    def likelihood(previews):
        square = np.square(profiles(np.asarray(previews)) - wanted[:, None]).mean(axis=-1)
        return -wanted.shape[-1] / 2 * np.log(square + 1e-5)

    return likelihood


def likelihood_of_reader(classify, labels):
    def likelihood(previews):
        images = to_uint8(np.asarray(previews))
        read = classify(images.reshape(-1, *images.shape[2:])).reshape(images.shape[:2])
        return SURE * (read == labels[:, None])

    return likelihood


def draw(trained, likelihood_of, wanted, seeds, count, batch_size=1024):
    """Images uint8 [N, H, W, C] with `count` particles each, whose classes are their own; and these classes int [N]."""
    networks, params = trained.networks, trained.sampler_params
    settings = make_settings(trained.info.config.sampling, trained.config, networks.method)
    classes = np.asarray(random_classes(seeds, count, len(trained.class_names)))

    def one_batch(wanted, classes, seeds):
        condition = networks.condition({"label": classes.reshape(-1)})
        counts = [count] * settings.num_groups
        arguments = networks, params, settings, condition, np.asarray(seeds), counts
        particles = chosen_particle(*arguments, likelihood_of(np.asarray(wanted)))
        return snapshot(networks, params, particles.state).images, jnp.asarray(particles.origins)

    size = trained.full_batch(max(1, batch_size // count))
    batches = split_rows(row_slices(0, len(seeds), size), wanted, classes, seeds)
    images, origins = zip(*(result for _, result in over_batches(one_batch, batches, size, trained.mesh)))
    return to_uint8(np.concatenate(images)), np.take_along_axis(classes, np.concatenate(origins), axis=1)[:, 0]


def main(
    run: str,  # of a transformer on the digits
    out: Path,  # the folder for pictures
    observe: Literal["profiles", "reader"] = "profiles",
    num: int = 60,  # digits
    particles: tuple[int, ...] = (1, 4, 16, 64),  # one column each
):
    """Draw digits from what is known of held-out ones."""
    trained = load_sampler(run)
    originals, labels = (part[:num] for part in digits("test"))
    classify, seeds = classifier(*digits("train")), np.arange(len(labels), dtype=np.uint32)
    wanted, likelihood_of = profiles(to_float(originals)), likelihood_of_profiles
    if observe == "reader":
        wanted, likelihood_of = labels, lambda labels: likelihood_of_reader(classify, labels)
    columns = [originals]
    for count in particles:
        images, classes = draw(trained, likelihood_of, wanted, seeds, count)
        error = np.sqrt(np.square(profiles(to_float(images)) - profiles(to_float(originals))).mean())
        read, drawn = np.mean(classify(images) == labels), np.mean(classes == labels)
        print(f"{count:4d} particles: error of the profiles {error:.3f}, read as the class {read:.1%}, drawn as it {drawn:.1%}")
        columns.append(images)
    names = ["given", *(f"{count} particles" for count in particles)]
    picture = pictures.grid(np.stack(columns, axis=1)[:10], [str(label) for label in labels[:10]], names)
    pictures.save_png(out / f"{observe}.png", picture)


if __name__ == "__main__":
    script(main)
