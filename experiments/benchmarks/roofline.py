"""What fewer passes of the transformer would gain: seconds an image by arithmetic, guided, in bfloat16.

Command:  python experiments/benchmarks/roofline.py --models L,XL --batch-sizes 1,8,64 --device H100
Result:   a table. Nothing is measured: a pass takes the larger of two times, reading every matrix and the filled cache from
          memory, and its products at the device's peak; the denoising steps take their products at 40 % of the peak.

A window of W guesses is W slots a pass, of which `--rate` tokens become final; blocks are the first group one by one and every
other group in one pass.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from common import print_table, run

from dar_jax.cli.options import Ints, Words
from dar_jax.config import TRANSFORMER_SIZES, TokenizerConfig, TransformerConfig
from dar_jax.errors import InputError
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.training.flops import count_flops

DEVICES = {  # operations/s in bfloat16, bytes/s
    "A100": (312e12, 2.04e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "v5e": (197e12, 819e9),
    "v6e": (918e12, 1638e9),
}
TOKENIZER = TokenizerConfig()
DECODER_RATE = 0.4  # of the peak, while denoising


@dataclass(frozen=True)
class Options:
    """Compute what fewer passes would gain."""

    models: Words[str] = ("L", "XL")  # sizes of the transformer
    batch_sizes: Ints[int] = (1, 8, 64)
    device: str = "H100"  # one of A100, H100, H200, v5e, v6e
    window: int = 8  # guesses of a pass
    rate: float = 1.54  # tokens that become final in a pass: 16 / 10.4 on the digits


def main(options: Options) -> None:
    if options.device not in DEVICES:
        raise InputError(f"the device is {options.device!r}, it should be one of {', '.join(DEVICES)}")
    tokens, group = TOKENIZER.num_tokens, TOKENIZER.tokens_per_group
    methods = {  # passes and their slots
        "one by one": [(tokens, 1)],
        f"window of {options.window}": [(tokens / options.rate, options.window)],
        "blocks": [(group, 1), (TOKENIZER.num_groups - 1, group)],
    }
    rows = []
    for model in options.models:
        for batch in options.batch_sizes:
            denoising = batch * denoising_flops() / (DECODER_RATE * DEVICES[options.device][0])
            base = denoising + prediction_seconds(model, batch, methods["one by one"], options.device)
            for method, passes in methods.items():
                predicting = prediction_seconds(model, batch, passes, options.device)
                row = {"model": model, "batch": batch, "method": method, "passes": round(sum(count for count, _ in passes))}
                row |= {"ms, tokens": 1e3 * predicting, "ms, in all": 1e3 * (predicting + denoising)}
                row |= {"images/s": batch / (predicting + denoising), "times as fast": base / (predicting + denoising)}
                rows.append(row)
    print_table(rows)


def prediction_seconds(model: str, batch: int, passes: list[tuple[float, int]], device: str) -> float:
    """Of all passes (how many, slots of each), two rows a sample."""
    config, (peak, bandwidth) = TransformerConfig(**TRANSFORMER_SIZES[model]), DEVICES[device]
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), jnp.zeros(1, int), jnp.zeros((1, config.num_tokens), int))
    numbers = sum(leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(shapes) if "table" not in str(path[-1]))
    entry = 2 * 2 * config.layers * (config.kv_heads or config.heads) * config.width // config.heads  # bytes of a slot
    cache = 2 * batch * entry * config.num_tokens / 2  # on average, in a pass
    return sum(
        count * max((2 * numbers + cache) / bandwidth, 2 * numbers * 2 * batch * slots / peak) for count, slots in passes
    )


def denoising_flops() -> float:
    """Of all denoising steps of an image."""
    model, size = Tokenizer(TOKENIZER), TOKENIZER.image_size
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, TOKENIZER.channels)))
    x, condition = (
        jnp.zeros((1, size, size, TOKENIZER.channels)),
        jnp.zeros((1, TOKENIZER.tokens_per_step, TOKENIZER.decoder_width)),
    )
    step = lambda params: model.apply(params, x, jnp.zeros(1), condition, method="velocity")  # noqa: E731
    return TOKENIZER.num_denoising_steps * count_flops(step, params)


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Options, description=__doc__)))
