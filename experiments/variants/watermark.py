"""Whose image is this? A keyed half of the codes is favoured in every draw; or, without any change, the seed's own noise tells.

Source:   Lexical Bias Watermarking (arXiv 2506.01011), with colours of clusters (arXiv 2508.06656), so that a code that comes
          back as a similar one keeps its colour; the noise is the Gumbel watermark known from text.
Command:  WATERMARK_KEY=7 dar-jax sample runs/digits --experiment experiments/variants/watermark.py --labels 3 --seeds 1 \
              --out samples          (any transformer's run; nothing is trained. :weak, :strong: a bias of 1 or 4 in place of 2)
          WATERMARK_KEY=7 python experiments/variants/watermark.py runs/digits samples/*_seed*.png      (--seeds 1,2: by noise)
Differs:  in the draw of a token (`Method.draw`), which takes no longer; the detector needs the tokenizer alone.
Result:   found in the codes of ten digits with a bias of 2 (79 %), in fifty decoded ones with 4 and --others (75 %; 70 % of
          Fashion-MNIST's), JPEG or not; a shift by one pixel removes it. See docs/variants.md.

A colour belongs to key, position and cluster of codes and is a fair coin: over keys, the greens of an image that they had no
part in are binomial. Several images share coins: each is worth as much as it was tossed for more often than in other images
(--others), which is exact too. The code drawn from a seed at a position has large noise there; without a link -log(1 - u) of
its rank u is exponential, the sum over n codes Gamma(n, 1).

What it cannot do: stop anyone who wants to remove it (decoding with another tokenizer is enough), survive what changes most
codes, name a person (the noise names a seed), or prove that an image is real. One small image says little.
"""

import dataclasses
import functools
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import gamma

from dar_jax.cli.options import Ints
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.inference.reconstruct import encode, open_image
from dar_jax.inference.trained import load_tokenizer
from dar_jax.models.quantizer import normalize, similarity
from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.sampling.logits import draw_token, token_keys
from dar_jax.sampling.predict import Predictor, token_by_token
from dar_jax.sampling.sampler import lookup_codes
from dar_jax.sampling.settings import Method, Settings

KEY, CODES = int(os.environ.get("WATERMARK_KEY", "2025")), 8  # codes of a cluster, on average


@functools.partial(jax.jit, static_argnums=0)
def clusters_of(networks, params):
    """The cluster of every code, by ten rounds of k-means on the values that they are decoded from: int [V]."""
    rows = normalize(lookup_codes(networks, params, jnp.arange(networks.tokenizer.config.codebook_size)))
    centres = rows[: len(rows) // CODES]
    for _ in range(10):
        nearest = jnp.argmax(similarity(rows, centres), axis=-1)
        centres = normalize(jax.ops.segment_sum(rows, nearest, len(centres)))
    return nearest


@functools.partial(jax.jit, static_argnums=2)
def colours(key, positions, count):
    """Which of `count` clusters are green at these positions [n]: bool [n, count]."""
    keys = jax.vmap(lambda position: jax.random.fold_in(jax.random.key(key), position))(positions)
    return jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (count,)))(keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Marked:  # the settings, and the clusters, which the draw finds beside them
    settings: Settings
    clusters: jax.Array

    def __getattr__(self, name):
        return getattr(self.settings, name)


def group(networks, params, settings, state, group):
    clusters = clusters_of(networks, {"tokenizer": params.decoder.rest})
    own = Marked(settings, clusters if params.decoder_mesh is None else np.asarray(clusters))
    return token_by_token.group(networks, params, own, state, group)


def draw(bias, logits, keys, position, tokens, settings):
    green = colours(KEY, jnp.broadcast_to(position, keys.shape), logits.shape[1] // CODES)
    green = jnp.take_along_axis(green, jnp.broadcast_to(settings.clusters, logits.shape), axis=1)
    return draw_token(logits + bias * green, keys, position, tokens, settings)


def tosses(codes, clusters):
    """How often the coin of each position and cluster is tossed for codes [N, T]: int [T, clusters]."""
    return np.stack([np.bincount(column, minlength=len(clusters) // CODES) for column in np.asarray(clusters)[codes].T])


def p_value(codes, clusters, key=KEY, natural=0.0):
    """The probability that a key chosen at random agrees with the codes [N, T] of some images as much as this one: that green
    clusters are more frequent than in other images, `natural` [T, clusters] for each, and red ones less."""
    worth = tosses(codes, clusters) - np.rint(len(codes) * natural).astype(int)
    green = np.asarray(colours(key, np.arange(len(worth)), worth.shape[1]))
    chances = np.ones(1)  # of each degree of agreement
    for each in np.abs(worth[worth != 0]):
        chances = (np.pad(chances, (each, 0)) + np.pad(chances, (0, each))) / 2
    return chances[np.abs(worth)[green == (worth > 0)].sum() :].sum()


@functools.partial(jax.jit, static_argnums=2)
def surprise(codes, seeds, size):
    """-log(1 - u) of each code [N, T] for the noise of these seeds [N]: exponential where they had no part in it."""

    keys, places = jnp.repeat(jax.vmap(jax.random.key)(seeds), codes.shape[1]), jnp.tile(jnp.arange(codes.shape[1]), len(codes))
    noise = jax.vmap(lambda key, code: jax.random.gumbel(key, (size,))[code])(token_keys(keys, places), codes.reshape(-1))
    return -jnp.log(-jnp.expm1(-jnp.exp(-noise))).reshape(codes.shape)


def seed_p_value(codes, seeds, size):
    """For the codes [N, T] of each image, the probability that the noise of a random seed is as large as that of its own."""
    return gamma.sf(np.asarray(surprise(codes, seeds, size), np.float64).sum(axis=1), codes.shape[1])


def detect(
    run: tyro.conf.Positional[str],
    images: tyro.conf.Positional[tuple[Path, ...]],
    others: tuple[Path, ...] = (),  # unmarked images of the same kind
    seeds: Ints[int] = (),
    first: int | None = None,  # so many codes count; of decoded images the first ones survive best
):
    """Prints p-values of images, for the key WATERMARK_KEY or for the noise of seeds."""
    trained = load_tokenizer(run)
    config, clusters = trained.config, clusters_of(trained.networks, trained.params)
    pictures = np.stack([open_image(file, config, config.image_size) for file in (*images, *others)])
    codes, usual = np.split(encode(trained, pictures)[:, :first], [len(images)])
    for file, row in zip(images, codes):
        tries = [seed_p_value(row[None], np.array([seed], np.uint32), config.codebook_size)[0] for seed in seeds]
        p = min(1, len(tries) * min(tries)) if tries else p_value(row[None], clusters)
        print(f"{file}: p = {p:.2g}")
    if not seeds:
        natural = tosses(usual, clusters) / len(usual) if others else 0.0
        print(f"all {len(codes)} together: p = {p_value(codes, clusters, natural=natural):.2g}")


def marked(bias):
    method = Method(draw=functools.partial(draw, bias), predict=Predictor(token_by_token.begin, group))
    return Experiment(dataclasses.replace(TRANSFORMER, name="watermark", data=DIGITS), method=method)


experiment, weak, strong = marked(2.0), marked(1.0), marked(4.0)
if __name__ == "__main__":
    try:
        tyro.cli(detect)
    except InputError as error:
        print(f"watermark.py: {error}", file=sys.stderr)
        sys.exit(2)
