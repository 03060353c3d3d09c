"""The decoder tuned through its own unrolled steps, so that two steps do what four did; the codes stay as they are.

Source:   MMD-DDM (arXiv 2301.07969) unrolls a sampler and compares features of its images with those of real ones; FlowMo's
          second stage (arXiv 2503.11056) does so with images and their reconstructions in pairs.
Command:  dar-jax train experiments/variants/few_steps.py --init-from runs/digits/tokenizer --workdir runs/two_steps
          dar-jax reconstruct runs/two_steps --images photos --out decoded
          A transformer of the base's codes draws with it if the folder takes the place of its RUN/tokenizer.
Differs:  from the digits' tokenizer in the loss, what is trained (velocity network, token decoder), tokens of a step (T / S).
Time:     1.5 minutes on two CPU cores (600 images/s); each step unrolls the decoder.
Result:   two steps are level with the base's four (19.80 and 19.83 dB, distance 0.448 and 0.449; three seeds), with the flow
          loss alone nearly so. See docs/variants.md.

The loss is of the images that S steps from noise make: their distance to the originals, and the maximum mean discrepancy (MMD)
of their features, in a small classifier that is trained first, from those of other originals; and the flow loss of images.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from dar_jax.config import OptimizerConfig, TokenizerLossConfig
from dar_jax.data.sources import open_source
from dar_jax.data.transforms import center_crop
from dar_jax.experiment import Experiment
from dar_jax.models import flow
from dar_jax.models.pixels import to_float
from dar_jax.parallel import path_name
from dar_jax.quickstart import TOKENIZER
from dar_jax.sampling.observe import pool
from dar_jax.sampling.solvers import Velocity, adams2
from dar_jax.training.optimizer import make_optimizer

RULES = ((r"reader/.*", P()),)
TUNED = ("velocity/", "token_decoder/")  # beginnings of the names of what is trained
MOST_IMAGES, HIDDEN, READER_STEPS = 10_000, 128, 1000  # of the classifier


def unrolled(model, params, values, noise, last=0):
    """The images [B, H, W, C] in [-1, 1] that the steps make of values [B, T, E]; gradients of `last` steps, 0: of all."""
    config = model.config
    steps = flow.schedule(flow.uniform_times(config.num_denoising_steps, config), config, model.path)
    condition = model.apply({"params": params}, values, method="condition")
    velocity = jax.checkpoint(lambda x, t, tokens: model.apply({"params": params}, x, t, tokens, method="velocity")[0])
    x, carry = noise, adams2.init(noise)
    for number, (start, t, t_next) in enumerate(zip(steps.starts, steps.times, steps.times[1:])):
        if number == config.num_denoising_steps - last:
            x, carry = jax.lax.stop_gradient((x, carry))
        tokens = condition[:, start : start + config.tokens_per_step]
        field = Velocity(lambda x, t, tokens=tokens: velocity(x, jnp.float32(t)[None], tokens), model.path.data)
        x, preview, carry = adams2.step(field, x, carry, t, t_next, None)
    return preview / config.velocity.data_std


def mmd(a, b, degree=3):
    """The unbiased squared MMD of features a [m, F] and b [n, F], with the kernel (<x, y> / F + 1)^degree."""

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** degree

    def within(x):
        values = kernel(x, x)
        return (values.sum() - jnp.trace(values)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def features(reader, images):
    """The last hidden layer and the logits of the classifier, together of mean square 1: [B, F]."""
    hidden = jax.nn.relu(images.reshape(len(images), -1) @ reader["in"]["kernel"])
    both = jnp.concatenate([hidden, hidden @ reader["out"]["kernel"]], axis=1)
    return both * jax.lax.rsqrt(jnp.square(both).mean(axis=1, keepdims=True) + 1e-6)


def frozen(config):
    """The classifier, with one hidden layer."""
    source = open_source(config.data)
    elements = [source[index] for index in range(min(len(source), MOST_IMAGES))]
    images = to_float(jnp.stack([center_crop(each["image"], config.data.image_size) for each in elements]))
    labels = jnp.array([each["label"] for each in elements])
    keys, sizes = jax.random.split(jax.random.key(0), 3), (images[0].size, HIDDEN, len(source.class_names))
    draw = lambda key, rows, columns: {"kernel": jax.random.normal(key, (rows, columns)) / rows**0.5}  # noqa: E731
    reader, adam = {"in": draw(keys[0], *sizes[:2]), "out": draw(keys[1], *sizes[1:])}, optax.adam(3e-3)

    def error(reader, rows):
        logits = features(reader, images[rows])[:, HIDDEN:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(state, key):
        updates, moments = adam.update(jax.grad(error)(state[0], jax.random.randint(key, (100,), 0, len(images))), state[1])
        return (optax.apply_updates(state[0], updates), moments), None

    return {"reader": jax.lax.scan(step, (reader, adam.init(reader)), jax.random.split(keys[2], READER_STEPS))[0][0]}


def loss(config, model):
    sizes, weights, std = config.model, config.fork, config.model.velocity.data_std
    starts = flow.schedule(flow.uniform_times(sizes.num_denoising_steps, sizes), sizes, model.path).starts

    def loss_fn(params, batch, key, frozen, step):
        images, half = batch["image"], len(batch["image"]) // 2
        noise_key, time_key, flow_key = jax.random.split(key, 3)
        apply = functools.partial(model.apply, {"params": params})
        values = jax.lax.stop_gradient(apply(apply(images, method="encode"), method="quantize").values)
        drawn = unrolled(model, params, values, jax.random.normal(noise_key, images.shape))
        error, reader = drawn - images, frozen["reader"]
        paired = jnp.square(pool(error, images.shape[1] // 2)).mean() + 0.1 * jnp.abs(error).mean()
        unpaired = mmd(features(reader, drawn[:half]), features(reader, images[half:]))

        times = jax.random.uniform(time_key, (len(images),))  # each with the tokens of its step
        first = jnp.asarray(starts)[jnp.floor(times * sizes.num_denoising_steps).astype(int)]
        places = first[:, None] + jnp.arange(sizes.tokens_per_step)
        tokens = jnp.take_along_axis(apply(values, method="condition"), places[..., None], axis=1)
        noise, t = jax.random.normal(flow_key, images.shape), model.path.shift(times, sizes.velocity.time_shift)
        x = model.path.at(noise, std * images, t)
        matching = jnp.square(model.path.data(x, apply(x, t, tokens, method="velocity")[0], t) / std - images).mean()
        terms = {"paired": weights["paired"] * paired, "mmd": weights["mmd"] * unpaired, "flow": weights["flow"] * matching}
        return sum(terms.values()), terms

    return loss_fn


def optimizer(config, steps):
    """The library's, for what is tuned; the encoder and the quantizer, and so the codes, stay."""

    def kept(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not path_name(path).startswith(TUNED), params)

    return optax.chain(make_optimizer(config, steps), optax.masked(optax.set_to_zero(), kept))


def tuned(steps):
    """The experiment with so many steps."""
    queries = TOKENIZER.model.num_tokens // steps
    config = dataclasses.replace(
        TOKENIZER,
        name=f"{steps}_steps",
        model=dataclasses.replace(TOKENIZER.model, num_denoising_steps=steps, queries_per_step=queries),
        loss=TokenizerLossConfig(),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=50, ema_decay=0.99),
        train=dataclasses.replace(TOKENIZER.train, steps=500),
        fork={"paired": 0.5, "mmd": 0.1, "flow": 1.0},
    )
    return Experiment(config, loss=loss, optimizer=optimizer, frozen=frozen, rules=RULES, reads=("optimizer.",))


one, experiment, four = tuned(1), tuned(2), tuned(4)
