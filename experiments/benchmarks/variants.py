"""How many passes ways of finding tokens need, what they cost in quality, how fast they are: the tables of docs/variants.md.

Command:  python experiments/benchmarks/variants.py runs/digits --others experiments/variants/speculative.py \
              experiments/variants/any_block.py=runs/any_block --json variants.json
Options:  --num 2000 --batch-sizes 1,8,64 --guidance 2 2 --repeats 3
          FILE[:NAME] samples from the base's run with another method, FILE[:NAME]=RUN or =RUN from another run
Result:   a table, and the same as JSON. All rows have the same labels and seeds, and the base's tokenizer. Of
          several trainings: `tables.py variants_0.json,variants_1.json`.

passes: of the transformer, the mean over the samples; most: the most that one takes; same: share of tokens equal to the base's;
bits: of a held-out token, unguided, with the tokens' own factorisation; divergence: mean of log2 q(z) - log2 p(z) in bits an
image over the samples z, q being the distribution that they are drawn from (or a bound, see energy.py) and p the base's, both
guided (0: exact);
accuracy: share of samples read as their class; diversity: the mean distance of two samples of a class over that of two real
images; distance: Fréchet distance to the training images. Who reads, and of what the distance is, stands in `reader.py`.
"""

import dataclasses
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import best, machine_name, print_table, run, write_report
from reader import Reader, make_reader

from dar_jax.cli.options import Ints
from dar_jax.config import SamplingConfig
from dar_jax.experiment import load_experiment
from dar_jax.inference.reconstruct import encode
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import Trained, load_sampler
from dar_jax.models.transformer import score
from dar_jax.sampling.logits import guide
from dar_jax.sampling.predict import log_probabilities
from dar_jax.sampling.settings import make_settings


@dataclass(frozen=True)
class Options:
    """Compare ways of finding tokens with one by one."""

    run: tyro.conf.Positional[Path]  # the base: a transformer's run
    others: tuple[str, ...] = ()  # FILE[:NAME], FILE[:NAME]=RUN or =RUN
    guidance: tuple[float, float] = (2.0, 2.0)
    num: int = 2000  # samples
    held_out: int = 1000  # images at most, for their bits
    batch_sizes: Ints[int] = (1, 8, 64)
    repeats: int = 3  # timed runs, of which the fastest counts
    json: Path | None = None  # also write everything to this file


def main(options: Options) -> None:
    command = " ".join(["python", *sys.argv])
    print(f"{machine_name()}, {date.today()}\n{command}\n")
    base = load_sampler(options.run)
    reader = make_reader(base.info.tokenizer.config.data, options.run)
    accuracy = reader.accuracy(reader.held_out, reader.held_out_labels)
    distance = reader.distance(reader.held_out[: options.num], reader.images)
    print(f"held-out images: accuracy {accuracy:.1%}, distance {distance:.3g}\n")
    rows, tokens = [], None
    for name in ("", *options.others):
        file, _, run = name.partition("=")
        trained = load_sampler(run or options.run, load_experiment(file) if file else None)
        row, tokens = row_of(options, reader, base, trained, tokens)
        method = Path(file).stem + file.partition(".py")[2] if file else Path(run).name or "one by one"
        rows.append({"method": method, **row})
        jax.clear_caches()  # on a CPU each program takes mappings of memory, of which a process has only so many
    print_table(rows)
    write_report(options.json, rows, command, machine=machine_name())


def row_of(
    options: Options, reader: Reader, base: Trained, trained: Trained, expected: np.ndarray | None
) -> tuple[dict, np.ndarray]:
    """The figures of one method, and the base's tokens, which are the first method's."""
    sampling = dataclasses.replace(trained.info.config.sampling, guidance=options.guidance)
    labels, seeds = np.arange(options.num) % len(base.class_names), np.arange(options.num)
    drawn = list(sample(trained, labels, seeds, sampling, batch_size=100))
    tokens, images = (np.concatenate([getattr(batch, name) for batch in drawn]) for name in ("tokens", "images"))
    expected = tokens if expected is None else expected
    calls = np.concatenate([batch.calls for batch in drawn])
    codes = encode(base, reader.held_out[: options.held_out], 100)
    exact = np.array_equal(tokens, expected)
    divergence = 0.0
    if not exact:
        drawn = log2_drawn(trained, labels, seeds, tokens, sampling)
        divergence = np.mean(drawn - log2_of(base, labels, tokens, sampling))
    row = {
        "passes": float(calls.mean()),
        "most": float(calls.max()),
        "same, %": 100 * float(np.mean(tokens == expected)),
        "bits": float(bits_of(trained, reader.held_out_labels[: options.held_out], codes).mean()),
        "divergence": float(divergence),
        "accuracy, %": 100 * reader.accuracy(images, labels),
        "diversity": reader.diversity(images, labels),
        "distance": reader.distance(images, reader.images),
    }
    for size in options.batch_sizes:
        once = lambda size=size: [batch.images for batch in sample(trained, labels[:size], seeds[:size], sampling, size)]  # noqa: E731
        row[f"images/s, batch {size}"] = size / best(once, repeats=options.repeats)
    return row, expected


def bits_of(trained: Trained, labels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Bits of each code [N, T]."""
    with jax.set_mesh(trained.mesh):
        return np.asarray(score(trained.networks.transformer, trained.params["transformer"], labels.astype(np.int32), codes)[0])


def log2_of(
    trained: Trained, labels: np.ndarray, tokens: np.ndarray, sampling: SamplingConfig, bias: np.ndarray | float = 0
) -> np.ndarray:
    """log2 of the guided probability of images' tokens [N, T] under the factorisation of a model, with a bias [T, V] added to
    the logits: [N]."""
    return log2_of_each(trained, labels, tokens, sampling, bias).sum(axis=1)


def log2_of_each(
    trained: Trained, labels: np.ndarray, tokens: np.ndarray, sampling: SamplingConfig, bias: np.ndarray | float = 0
) -> np.ndarray:
    """As `log2_of`, of each token [N, T]."""
    model, params = trained.networks.transformer, {"params": trained.params["transformer"]}
    settings = make_settings(sampling, trained.config, trained.networks.method)

    @jax.jit
    def log_probability(labels, tokens):
        logits, null = (model.apply(params, condition, tokens) for condition in (labels, model.null(labels)))
        logits = guide(logits, null, settings.scales[:, None]) + bias
        return jnp.take_along_axis(log_probabilities(settings, logits), tokens[..., None], axis=-1)[..., 0] / jnp.log(2.0)

    with jax.set_mesh(trained.mesh):
        return np.asarray(log_probability(jnp.asarray(labels, jnp.int32), jnp.asarray(tokens)))


def log2_drawn(
    trained: Trained, labels: np.ndarray, seeds: np.ndarray, tokens: np.ndarray, sampling: SamplingConfig, size: int = 100
) -> np.ndarray:
    """log2 of the probability with which tokens [N, T] were drawn from these seeds: `log_q` [N, T] of a predictor's
    state, and by the model's own factorisation where that is NaN, or missing: [N]."""
    method, own, drawn = trained.networks.method, log2_of_each(trained, labels, tokens, sampling), []
    arguments = trained.networks, trained.sampler_params, make_settings(sampling, trained.config, method)
    with jax.set_mesh(trained.mesh):
        for start in range(0, len(seeds), size):
            rows = slice(start, start + size)
            condition = trained.networks.condition({"label": jnp.asarray(labels[rows], jnp.int32)})
            state = method.predict.begin(*arguments, condition, jnp.asarray(seeds[rows], jnp.uint32))
            if not hasattr(state, "log_q"):
                return own.sum(axis=1)
            for group in range(trained.config.num_groups):
                state = method.predict.group(*arguments, state, group)
            drawn.append(np.asarray(state.log_q) / np.log(2))
    return np.where(np.isnan(np.concatenate(drawn)), own, np.concatenate(drawn)).sum(axis=1)


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options)))
