"""Every setting of the project as frozen dataclasses of plain data.

Nothing here imports JAX. The defaults are the paper's (arXiv 2505.23660) and the released files'; an experiment file changes
what it needs with keyword arguments or `dataclasses.replace`, and the command line overrides single fields by their path
(`--optimizer.learning-rate 3e-4`). A field never holds a function: parts to replace are handed over by `training.Experiment`.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from dar_jax.errors import InputError


@dataclass(frozen=True)
class VelocityConfig:
    """The velocity network of the diffusion decoder (paper section 3.2)."""

    width: int = 768
    layers: int = 12
    head_size: int = 64
    patch_size: int = 8
    data_std: float = 0.6  # pixels in [-1, 1] are multiplied by this before diffusion
    time_shift: float = 2.0  # t' = t / (t + time_shift (1 - t))
    share_time_encoding: bool = False  # one time embedding for all blocks instead of one per block
    mlp_head: bool = False  # a final adaLN layer on the shared time embedding; needs share_time_encoding
    repa_layer: int | None = 8  # the input of this block feeds the REPA head; None: no head
    repa_hidden: int = 2048
    repa_width: int = 768  # feature size of the frozen network that REPA aligns with
    repa_grid: int = 16  # the tapped map is average-pooled to this grid (when it is larger)

    @property
    def has_repa(self) -> bool:
        """Whether the REPA features can be computed; a head beyond the last block, as small test files have, cannot."""
        return self.repa_layer is not None and self.repa_layer < self.layers


@dataclass(frozen=True)
class TokenizerConfig:
    """Images <-> codes <-> condition tokens -> velocity. The defaults are the released size: 307,444,672 parameters."""

    image_size: int = 256
    channels: int = 3
    encoder_patch_size: int = 16
    encoder_layers: int = 8
    encoder_width: int = 768
    decoder_layers: int = 8
    decoder_width: int = 768
    head_size: int = 64
    num_tokens: int = 256  # T
    num_groups: int = 8  # G
    queries_per_step: int | None = None  # condition tokens of one denoising step; None: num_tokens / num_groups
    num_denoising_steps: int = 8  # S
    query_low_rank: bool = True  # queries = linear(table of rank 8) instead of a full table
    query_rank: int = 8
    max_tokens: int = 1024  # rows of the query and position tables
    vq_enable: bool = True  # False: the bottleneck only normalises (a continuous tokenizer)
    codebook_size: int = 16384
    code_dim: int = 8
    sampling_resolution: int | None = None  # pixels are denoised at this size if it is larger than image_size
    output_resolution: int | None = None  # decoded images larger than this are resized down (bicubic)
    rope_theta: float = 10000.0
    init_std: float | None = 0.02  # of the blocks' matrices; None: 1 / sqrt(fan in), which small widths need
    gate_init: float = 0.0  # of the blocks' residual gates
    velocity: VelocityConfig = field(default_factory=VelocityConfig)

    @property
    def tokens_per_group(self) -> int:
        return self.num_tokens // self.num_groups

    @property
    def tokens_per_step(self) -> int:
        return self.queries_per_step or self.tokens_per_group

    @property
    def resolution(self) -> int:
        """Side of the square the pixels are denoised at."""
        return max(self.sampling_resolution or 0, self.image_size)


@dataclass(frozen=True)
class LlamaConfig:
    """The autoregressive transformer (paper section 3.3). The default is size L: 342,910,976 parameters."""

    layers: int = 24
    heads: int = 16
    kv_heads: int | None = None  # fewer than heads: grouped-query attention; None: as many as heads
    width: int = 1024
    num_tokens: int = 256
    vocab_size: int = 16384
    num_classes: int = 1000  # the class table has one more row, the null class of guidance
    mlp_multiple: int = 256  # the SwiGLU hidden size, 8/3 of the width, is rounded up to a multiple of this
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float | None = 0.02  # None: 1 / sqrt(fan in), which small widths need
    token_dropout: float = 0.1
    attention_dropout: float = 0.1  # on the attention's output projection
    mlp_dropout: float = 0.1
    class_dropout: float = 0.1  # labels replaced by the null class in training

    @property
    def mlp_width(self) -> int:
        hidden = int(2 * 4 * self.width / 3)
        return -(-hidden // self.mlp_multiple) * self.mlp_multiple


LLAMA_SIZES: dict[str, dict[str, int]] = {
    "B": {"layers": 12, "heads": 12, "width": 768},
    "L": {"layers": 24, "heads": 16, "width": 1024},
    "XL": {"layers": 36, "heads": 20, "width": 1280},
    "XXL": {"layers": 48, "heads": 24, "width": 1536},
    "XXXL": {"layers": 48, "heads": 40, "width": 2560},
    "1B": {"layers": 22, "heads": 32, "width": 2048},
    "3B": {"layers": 24, "heads": 32, "width": 3200},
    "7B": {"layers": 32, "heads": 32, "width": 4096},
}


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn and denoised (paper section 3.4). The defaults are the paper's for size L."""

    guidance: tuple[float, float] = (1.1, 8.0)  # classifier-free guidance scale of the first and of the last token
    cfg_interval: int = -1  # n >= 0: tokens with an index above n + 1 are not guided
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    solver: Literal["adams2", "euler"] = "adams2"
    num_denoising_steps: int | None = None  # None: the tokenizer's
    num_groups: int | None = None  # stop after so many groups (a preview); None: all
    start_step: int = 0  # start from a given image at this denoising step (0: from noise)


@dataclass(frozen=True)
class DataConfig:
    """Where images (or stored codes) come from and how they are cropped."""

    source: Literal["digits", "folder", "cifar10", "tfds", "codes"] = "folder"
    path: str | None = None  # the folder; of TFDS its data_dir, None: TFDS's own; unused by the embedded digits
    dataset: str | None = None  # of TFDS: name, configuration and version, such as imagenet2012 or imagenet2012:5.1.0
    split: str = "train"  # TFDS also takes parts of one, such as train[:10000]
    held_out_split: str | None = None  # to evaluate on; None: test, of folders val, of TFDS validation, of codes split
    labels: str | None = None  # file of lines "IMAGE CLASS" or "IMAGE,CLASS", for a split without class folders
    verify: bool = False  # compare every file of stored codes with its SHA-256 first
    image_size: int = 256
    channels: int = 3  # 1: grey, 3: RGB
    crop: Literal["random", "center", "ten_crop"] = "random"  # ADM random crop, ADM centre crop, one of ten crops
    crop_fraction: tuple[float, float] = (0.8, 1.0)  # of the random crop
    ten_crop_scale: float = 1.1  # ten crops are cut from a centre crop of this times image_size
    flip: bool = True  # mirror half of the images
    workers: int = 0  # worker processes; 0: threads of this process


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, clipping, the learning-rate schedule and the moving average of the weights."""

    learning_rate: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup_steps: int = 0
    decay_start: int = 0  # step at which linear or cosine decay starts; it ends at the last training step
    final_learning_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0  # on tensors of two or more dimensions only
    clip_norm: float | None = 1.0  # of the global gradient norm
    ema_decay: float = 0.999  # 0: the moving average is the weights themselves


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the tokenizer's loss terms (paper section 3.2). A term of weight 0 costs nothing.

    LPIPS and REPA need frozen networks, whose files not everyone has; the paper's weight of both is 0.5.
    """

    flow: float = 1.0
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_temperature: float = 0.01
    lpips: float = 0.0  # LPIPS with VGG16 of the predicted image
    repa: float = 0.0  # 1 - cosine between the REPA head and the patch tokens of DINOv2
    gan: float = 0.0  # non-saturating loss against a PatchGAN discriminator, which learns beside the tokenizer
    gan_start_step: int = 20_000  # nothing of the two before
    gan_width: int = 128  # channels of the discriminator's first layer
    gan_halvings: int = 3  # its convolutions of stride 2; a logit sees 70 pixels with 3, 34 with 2, 16 with 1
    lpips_weights: str | None = None  # file or folder; None: looked for by name
    dinov2_weights: str | None = None  # file; None: looked for by name


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One of them, or data and fsdp, may be -1: whatever the others leave.

    By default all devices share the batch and each holds the whole state; for models that leave no room for activations then,
    `data=-1, fsdp=-1` cuts the state over some of them. See `parallel`.
    """

    data: int = -1  # batch
    fsdp: int = 1  # batch, and parameters cut along their width
    tensor: int = 1  # heads and hidden units


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision, logging and checkpoints of one training run."""

    steps: int = 210_000
    batch_size: int = 1024  # of all devices together
    accumulate: int = 1  # the batch is processed in so many parts
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on accelerators, float32 on CPU
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again; dots: all but matrix products
    log_every: int = 50
    checkpoint_every: int = 5000
    keep_checkpoints: int = 2
    keep_every: int | None = None  # checkpoints at multiples of this step stay for ever
    sample_every: int = 0  # a grid of samples (or reconstructions) in the log every so many steps; 0: never
    evaluate_every: int = 0  # metrics on held-out images in the log every so many steps; 0: never
    evaluate_images: int = 256  # on so many of them
    profile: tuple[int, int] | None = None  # a profiler trace of these steps, first and last, in the folder of the logs
    peak_flops: float | None = None  # bfloat16 operations/s of one device, for the MFU in the log; None: by its kind, if known


@dataclass(frozen=True)
class TokenizerTraining:
    """Stage 1: everything that defines a tokenizer run."""

    name: str = "tokenizer"
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(warmup_steps=500))
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class TransformerTraining:
    """Stage 2: everything that defines a run of the autoregressive transformer."""

    name: str = "ar"
    model: LlamaConfig = field(default_factory=LlamaConfig)
    tokenizer: str | None = None  # a tokenizer's checkpoint; it is copied into the run's folder, so that the run is complete
    data: DataConfig = field(default_factory=lambda: DataConfig(crop="ten_crop", flip=False))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=4e-4, schedule="linear", decay_start=300_000, final_learning_rate=1e-5, weight_decay=0.05
        )
    )
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=360_000))
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)


STAGES = {"tokenizer": TokenizerTraining, "transformer": TransformerTraining}


def to_dict(config: TokenizerTraining | TransformerTraining) -> dict[str, Any]:
    """The settings of a run as JSON-able data, with the key `stage` naming its class."""
    stage = next(name for name, cls in STAGES.items() if isinstance(config, cls))
    return {"stage": stage, **dataclasses.asdict(config)}


def from_dict(values: dict[str, Any]) -> TokenizerTraining | TransformerTraining:
    """The inverse of `to_dict`. Raises InputError on unknown names and on values of the wrong type."""
    if not isinstance(values, dict) or values.get("stage") not in STAGES:
        raise InputError(f"the settings name no known stage (one of {', '.join(STAGES)})")
    return _build(STAGES[values["stage"]], {k: v for k, v in values.items() if k != "stage"}, "settings")


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where} should be a table of settings, not {values!r}")
    kinds = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise InputError(f"{where} has unknown names: {', '.join(unknown)}")
    return cls(**{name: _convert(kinds[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value))
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise InputError(f"{where} should be {getattr(kind, '__name__', kind)}, not {value!r}")


def validate(config: TokenizerTraining | TransformerTraining) -> None:
    """Raises InputError, in one line, where settings contradict each other."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(message)

    train, data, optimizer = config.train, config.data, config.optimizer
    require(train.steps > 0, f"train.steps is {train.steps}, it should be at least 1")
    require(train.batch_size > 0, f"train.batch_size is {train.batch_size}, it should be at least 1")
    require(
        train.accumulate > 0 and train.batch_size % train.accumulate == 0,
        f"train.batch_size {train.batch_size} should be a multiple of train.accumulate {train.accumulate}",
    )
    for name in ("log_every", "checkpoint_every", "keep_checkpoints", "evaluate_images"):
        require(getattr(train, name) > 0, f"train.{name} is {getattr(train, name)}, it should be at least 1")
    if train.profile is not None:
        first, last = train.profile
        require(
            1 <= first <= last <= train.steps,
            f"train.profile is {first} {last}, it should be a first and a last step between 1 and train.steps {train.steps}",
        )
    require(train.peak_flops is None or train.peak_flops > 0, f"train.peak_flops is {train.peak_flops}, it should be above 0")
    require(0 <= optimizer.ema_decay < 1, f"optimizer.ema_decay is {optimizer.ema_decay}, it should be in [0, 1)")
    require(data.channels in (1, 3), f"data.channels is {data.channels}, it should be 1 (grey) or 3 (RGB)")
    if isinstance(config, TokenizerTraining):
        validate_tokenizer(config.model)
        require(
            (data.image_size, data.channels) == (config.model.image_size, config.model.channels),
            f"data gives {data.image_size} pixels and {data.channels} channels, "
            f"the model takes {config.model.image_size} and {config.model.channels}",
        )
        require(data.source != "codes", "a tokenizer is trained on images, data.source is codes")
        require(
            config.loss.repa == 0 or config.model.velocity.has_repa,
            f"loss.repa needs the REPA head, but velocity.repa_layer is {config.model.velocity.repa_layer} "
            f"in a network of {config.model.velocity.layers} layers",
        )
        loss = config.loss
        require(
            loss.gan == 0 or (loss.gan_width > 0 and loss.gan_width % 16 == 0),
            f"loss.gan_width is {loss.gan_width}, it should be a multiple of 16",
        )
        require(
            loss.gan == 0 or (loss.gan_halvings > 0 and config.model.image_size >> loss.gan_halvings >= 3),
            f"loss.gan_halvings is {loss.gan_halvings}, it should be at least 1 and leave 3 pixels or more "
            f"of {config.model.image_size}",
        )
    else:
        model = config.model
        require(model.width % model.heads == 0, f"model.width {model.width} should be a multiple of model.heads {model.heads}")
        kv_heads = model.kv_heads or model.heads
        require(model.heads % kv_heads == 0, f"model.heads {model.heads} should be a multiple of model.kv_heads {kv_heads}")
        require(model.num_classes > 0, f"model.num_classes is {model.num_classes}, it should be at least 1")


def validate_tokenizer(model: TokenizerConfig) -> None:
    """Raises InputError where the sizes of a tokenizer do not fit together."""
    checks = [
        (model.image_size % model.encoder_patch_size == 0, "image_size should be a multiple of encoder_patch_size"),
        (model.resolution % model.velocity.patch_size == 0, "the denoised size should be a multiple of velocity.patch_size"),
        (model.num_tokens % model.num_groups == 0, "num_tokens should be a multiple of num_groups"),
        (model.num_tokens <= model.max_tokens, "num_tokens should not exceed max_tokens"),
        (0 < model.tokens_per_step <= model.num_tokens, "queries_per_step should be between 1 and num_tokens"),
        (model.encoder_width % model.head_size == 0, "encoder_width should be a multiple of head_size"),
        (model.decoder_width % model.head_size == 0, "decoder_width should be a multiple of head_size"),
        (model.velocity.width % model.velocity.head_size == 0, "velocity.width should be a multiple of velocity.head_size"),
        (model.head_size % 4 == 0 and model.velocity.head_size % 4 == 0, "head sizes should be multiples of 4 (2-D RoPE)"),
        (model.velocity.share_time_encoding or not model.velocity.mlp_head, "velocity.mlp_head needs share_time_encoding"),
    ]
    for holds, message in checks:
        if not holds:
            raise InputError(f"tokenizer: {message}")
