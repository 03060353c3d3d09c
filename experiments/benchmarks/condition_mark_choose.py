"""How well a map is kept, a watermark is found, an early choice pays and other codes do: figures of docs/variants.md.

Command:  python experiments/benchmarks/condition_mark_choose.py control runs/digits \
              experiments/variants/control.py=runs/c0,runs/c1
          python experiments/benchmarks/condition_mark_choose.py watermark runs/digits
          python experiments/benchmarks/condition_mark_choose.py choice runs/digits,runs/d1
          python experiments/benchmarks/condition_mark_choose.py codes runs/digits,runs/d1 \
              experiments/variants/binary_tokenizer.py:transformer=runs/s0,runs/s1
Options:  --json FILE --guidance 2 (not choice) --num 2000 (watermark: 500; control: --maps-given 297)
          several runs of one row are trainings of different seeds
Result:   tables, and the same as JSON. All rows of a table have the same labels and seeds. Where a row has several runs, a
          figure is the mean, and behind +- the standard deviation between the runs.

accuracy, diversity, distance: as in variants.py. map error: mean absolute difference of the map of a sample and that of the
image whose map was given, pixels in [0, 1]; edges F1: of edge pixels, with one pixel of tolerance; among: the mean distance of
two samples of one map over that of two real images of a class. A watermark is found where the p-value of an image, or of a pool
of images, is 0.001 or less; kept: share of codes, or of their colours, that come back after decoding and encoding. bits: of a
code of held-out images.
"""

import dataclasses
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from common import machine_name, print_table, run, write_report
from PIL import Image
from reader import Reader, make_reader
from scipy.stats import binom
from variants import bits_of, log2_of

from dar_jax.experiment import Experiment, load_experiment
from dar_jax.inference.reconstruct import encode
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import Trained, load_sampler
from dar_jax.models.pixels import to_float
from dar_jax.quickstart import spread

VARIANTS = Path(__file__).parents[1] / "variants"
BATCH, SEEDS_OF_A_MAP = 100, 4


def variant(name: str) -> tuple[Experiment, object]:
    """An experiment of a variant, FILE[:NAME] without its folder and ending, and its module."""
    file, colon, value = name.partition(":")
    experiment = load_experiment(f"{VARIANTS / file}.py{colon}{value}")
    return experiment, sys.modules[f"experiment_{file}"]


def draw(trained: Trained, labels: np.ndarray, seeds: np.ndarray, guidance: float, **given) -> tuple[np.ndarray, ...]:
    """tokens [N, T], images uint8 [N, H, W, C] and passes [N]."""
    sampling = dataclasses.replace(trained.info.config.sampling, guidance=(guidance, guidance))
    drawn = list(sample(trained, labels, seeds, sampling, batch_size=BATCH, **given))
    return tuple(np.concatenate([getattr(batch, name) for batch in drawn]) for name in ("tokens", "images", "calls"))


def reader_of(run: str | Path) -> Reader:
    return make_reader(load_sampler(run).info.tokenizer.config.data, Path(run))


def quality(reader: Reader, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "accuracy %": 100 * reader.accuracy(images, labels),
        "diversity": reader.diversity(images, labels),
        "distance": reader.distance(images, reader.images),
    }


def over_runs(folders: str, experiment: Experiment | None, row: Callable[[Trained], dict]) -> dict:
    """The figures of one row, over the runs of a list FOLDER,FOLDER."""
    rows = [row(load_sampler(folder, experiment)) for folder in folders.split(",")]
    if len(rows) == 1:
        return rows[0]
    mean, deviation = (
        {name: f([row[name] for row in rows]) for name in rows[0]} for f in (np.mean, lambda x: np.std(x, ddof=1))
    )
    return {name: f"{mean[name]:.3g} +- {deviation[name]:.2g}" for name in mean}


def report(rows: Sequence[dict], json: Path | None) -> None:
    print_table(rows)
    write_report(json, rows, " ".join(["python", *sys.argv]), machine=machine_name())


def choice(runs: tyro.conf.Positional[str], /, num: int = 2000, json: Path | None = None) -> None:
    """Best of several beginnings without guidance, beside the base with and without; RUN,RUN: trainings of the base."""
    labels, seeds, first = np.arange(num) % 10, np.arange(num), runs.split(",")[0]
    reader, names = reader_of(first), ["two", "experiment", "eight", "likelihood", "typical"]
    if load_sampler(first).info.tokenizer.config.data.source == "digits":
        names.append("preview")  # which reads digits

    def figures(guidance: float, trained: Trained) -> dict[str, float]:
        _, images, calls = draw(trained, labels, seeds, guidance)
        return {"passes": float(calls.mean()), **quality(reader, images, labels)}

    rows = []
    for name, guidance in (*((None, scale) for scale in (1, 1.25, 1.5, 2)), *((name, 1) for name in names)):
        experiment = variant(f"early_choice:{name}")[0] if name else None
        rows.append({"method": name or f"base, guidance {guidance}", **over_runs(runs, experiment, partial(figures, guidance))})
    report(rows, json)


ATTACKS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "decoded": lambda image: image,
    "JPEG 90": lambda image: jpeg(image, 90),
    "JPEG 50": lambda image: jpeg(image, 50),
    "2 x and back": lambda image: image.resize((2 * image.width, 2 * image.height), 3).resize(image.size, 3),
    "3/4 and back": lambda image: image.resize((3 * image.width // 4, 3 * image.height // 4), 3).resize(image.size, 3),
    "moved by 1 pixel": lambda image: image.transform(image.size, Image.Transform.AFFINE, (1, 0, -1, 0, 1, 0)),
}


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def attacked(images: np.ndarray, attack: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    grey = images.shape[-1] == 1
    return np.stack([np.asarray(attack(Image.fromarray(x[..., 0] if grey else x))).reshape(x.shape) for x in images])


def watermark(
    run: tyro.conf.Positional[Path],
    /,
    num: int = 500,
    keys: int = 4,
    nulls: int = 10_000,
    guidance: float = 2,
    json: Path | None = None,
) -> None:
    """False positives over `nulls` images of the base, and how often `num` images marked with each of some keys are found."""
    base, (_, module), reader = load_sampler(run), variant("watermark"), reader_of(run)
    clusters = np.asarray(module.clusters_of(base.networks, base.params))
    size, length = len(clusters), base.config.num_tokens
    positions, count = np.arange(length), size // module.CODES

    def greens(codes: np.ndarray, key: int) -> np.ndarray:
        return np.asarray(module.colours(key, positions, count))[positions, clusters[codes]]

    def single(codes: np.ndarray, key: int) -> np.ndarray:  # p-values of each image, as of `module.p_value`
        return binom.sf(greens(codes, key).sum(axis=1) - 1, length, 0.5)

    def pools(codes: np.ndarray, images: int, natural: np.ndarray, key: int) -> np.ndarray:
        return np.array([module.p_value(pool, clusters, key, natural) for pool in np.split(codes, len(codes) // images)])

    labels, seeds = np.arange(nulls) % 10, np.arange(nulls)
    plain, plain_images, _ = draw(base, labels, seeds, guidance)
    again, rows = encode(base, plain_images, BATCH), []
    known = {"tokens": plain, "decoded": again}
    natural = {name: module.tosses(codes[nulls // 2 :], clusters) / (nulls - nulls // 2) for name, codes in known.items()}
    for what, codes in known.items():
        each_key = np.stack([single(codes, key) for key in range(200)])
        seen = module.seed_p_value(codes, (seeds + 10**6).astype(np.uint32), size)
        ten = np.concatenate([pools(codes[:1000], 10, natural[what], key) for key in range(20)])
        for level in (0.05, 0.01, 0.001):
            allowed = binom.sf(binom.isf(level, length, 0.5), length, 0.5)  # by whole numbers of greens
            each = np.mean(each_key <= level, axis=1)
            row = {
                "unmarked": what,
                "level": level,
                "by whole greens": allowed,
                "200 keys": each.mean(),
                "worst key": each.max(),
            }
            rows.append(row | {"pools of 10, 20 keys": np.mean(ten <= level), "wrong seeds": np.mean(seen <= level)})
    report(rows, json and json.with_suffix(".null.json"))

    labels, seeds, rows = labels[:num], seeds[:num], []
    own = module.seed_p_value(plain[:num], seeds.astype(np.uint32), size)
    print(f"\nseed's noise, from tokens: median p {np.median(own):.2g}, found {np.mean(own <= 1e-3):.1%}", end="; decoded: ")
    for first in (4, length):
        p = module.seed_p_value(again[:num, :first], seeds.astype(np.uint32), size)
        print(f"first {first} codes, median p {np.median(p):.2g}, found {np.mean(p <= 1e-3):.1%}", end="; ")
    terms = np.asarray(module.surprise(jnp.asarray(again[:num]), jnp.asarray(seeds, jnp.uint32), size)).mean(axis=0)
    print("by position", " ".join(f"{term:.2f}" for term in terms))
    print("codes kept by position", " ".join(f"{share:.2f}" for share in np.mean(again == plain, axis=0)), "\n")
    sampling = dataclasses.replace(base.info.config.sampling, guidance=(guidance, guidance))
    for name, bias in ((None, 0.0), ("weak", 1.0), ("experiment", 2.0), ("strong", 4.0)):
        found, all_images, divergence, kept = {}, [], [], []
        for key in range(1, keys + 1):
            os.environ["WATERMARK_KEY"] = str(key)  # which the file reads
            trained = load_sampler(run, name and variant(f"watermark:{name}")[0])
            tokens, images, _ = draw(trained, labels, seeds, guidance)
            green = bias * np.asarray(module.colours(key, positions, count))[:, clusters]  # [T, V]
            divergence.append(log2_of(base, labels, tokens, sampling, green) - log2_of(base, labels, tokens, sampling))
            codes = {name: encode(trained, attacked(images, change), BATCH) for name, change in ATTACKS.items()}
            kept.append([tokens == codes["decoded"], greens(tokens, key) == greens(codes["decoded"], key)])
            all_images.append(images)
            for what, each in {"tokens": tokens, **codes}.items():
                usual = natural["tokens" if what == "tokens" else "decoded"]
                for pool in (1, 10, 50):
                    p = single(each, key) if pool == 1 else pools(each, pool, usual, key)
                    found.setdefault(f"{what}, {pool}", []).append(np.mean(p <= 1e-3))
        row = {"bias": bias, "divergence": float(np.mean(divergence))}
        row |= quality(reader, np.concatenate(all_images), np.tile(labels, keys))
        row |= {
            "codes kept": float(np.mean([each[0] for each in kept])),
            "colours kept": float(np.mean([each[1] for each in kept])),
        }
        rows.append(row | {name: float(np.mean(shares)) for name, shares in found.items()})
    report([{"": name} | {f"bias {row['bias']:g}": row[name] for row in rows} for name in rows[0] if name != "bias"], json)


def control(
    run: tyro.conf.Positional[str],
    others: tyro.conf.Positional[tuple[str, ...]],
    /,
    guidance: float = 2,
    maps_given: int = 297,
    json: Path | None = None,
) -> None:
    """How well maps of held-out images are kept, under their own label and another, beside what the base can do."""
    reader, (_, module) = reader_of(run.split(",")[0]), variant("control")
    held_out = reader.held_out[:maps_given], reader.held_out_labels[:maps_given]
    references, own = (np.repeat(part, SEEDS_OF_A_MAP, axis=0) for part in held_out)
    seeds, cell = np.arange(len(own)), references.shape[1] // 4
    wrong = (own + 1 + seeds % 9) % 10

    def maps(images: np.ndarray, kind: str) -> np.ndarray:
        return np.asarray(module.MAPS[kind](to_float(jnp.asarray(images)), cell))

    def kept(images: np.ndarray) -> dict[str, float]:
        near = lambda edges: jax.lax.reduce_window(edges, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")  # noqa: E731
        theirs, ours = maps(references, "edges"), maps(images, "edges")
        precision = np.sum(ours * near(theirs)) / max(1, ours.sum())
        recall = np.sum(theirs * near(ours)) / max(1, theirs.sum())
        error = np.abs(maps(images, "pooled") - maps(references, "pooled")).mean() / 2
        return {"map error": float(error), "edges F1": float(2 * precision * recall / (precision + recall))}

    def figures(trained: Trained, given: dict) -> dict:
        row = {}
        for label, labels in (("own", own), ("other", wrong)):
            _, images, _ = draw(trained, labels, seeds, guidance, **given)
            row |= {f"{label}: {name}": value for name, value in (kept(images) | quality(reader, images, labels)).items()}
            row[f"{label}: among"] = spread(images, seeds // SEEDS_OF_A_MAP) / spread(reader.images, reader.labels)
        return row

    def begun(share: float, trained: Trained) -> dict:
        codes = encode(trained, references, BATCH)
        return figures(trained, {"prefix": codes[:, : int(share * codes.shape[1])]})

    rows = [{"method": "base, no map", **over_runs(run, None, lambda trained: figures(trained, {}))}]
    for share in (0.25, 0.5):
        rows.append({"method": f"base, {share:.0%} of the codes", **over_runs(run, None, partial(begun, share))})
    for other in others:
        file, _, folders = other.partition("=")
        row = over_runs(folders, load_experiment(file), lambda trained: figures(trained, {"given": {"image": references}}))
        rows.append({"method": file.removeprefix("experiments/variants/"), **row})
    report(rows, json)


def codes(
    runs: tyro.conf.Positional[tuple[str, ...]], /, num: int = 2000, guidance: float = 2, json: Path | None = None
) -> None:
    """Transformers over tokenizers that `recipes.py` compares: RUN,RUN of the base, FILE:NAME=RUN,RUN of variants."""
    labels, seeds, reader = np.arange(num) % 10, np.arange(num), reader_of(runs[0].rpartition("=")[2].split(",")[0])
    held_out, held_out_labels = reader.held_out[:1000], reader.held_out_labels[:1000]

    def figures(trained: Trained) -> dict[str, float]:
        _, images, _ = draw(trained, labels, seeds, guidance)
        bits = bits_of(trained, held_out_labels, encode(trained, held_out, BATCH)).mean()
        return {"bits": float(bits), **quality(reader, images, labels)}

    rows = []
    for each in runs:
        file, _, folders = each.rpartition("=")
        experiment = load_experiment(file) if file else None
        name = file.removeprefix("experiments/variants/") or "codebook (base)"
        rows.append({"method": name, **over_runs(folders, experiment, figures)})
    report(rows, json)


if __name__ == "__main__":
    commands = {function.__name__: function for function in (choice, watermark, control, codes)}
    run(lambda: tyro.extras.subcommand_cli_from_dict(commands))
