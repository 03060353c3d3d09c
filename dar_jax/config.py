"""Every setting of the project as frozen dataclasses of plain data.

Nothing here imports JAX. The defaults are the paper's (arXiv 2505.23660) and the released files'; an experiment file changes
what it needs with keyword arguments or `dataclasses.replace`, and the command line overrides single fields by their path
(`--optimizer.learning-rate 3e-4`). A field never holds a function: parts to replace are handed over by `experiment.Experiment`.
Every number has its range, in the type of its field; `checked` applies them to whatever becomes a setting.
"""

import dataclasses
import reprlib
import types
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dar_jax.errors import InputError, require


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, both ends included; `also` is one more, with what it means."""

    low: float
    high: float
    also: tuple[float, str] | None = None

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high or (self.also is not None and value == self.also[0])

    def __str__(self) -> str:
        return f"between {self.low} and {self.high}" + (f", or {self.also[0]} ({self.also[1]})" if self.also else "")


FINITE = Range(-1.7e308, 1.7e308)
MOST_TEXT = 4096  # characters of a setting
MOST_PATCHES = 16384  # of one image
INT32 = 2**31 - 1
PLAIN = (bool, int, float, str)  # what a fork's own settings may be

Count = Annotated[int, Range(1, INT32)]  # of steps or images
Step = Annotated[int, Range(0, INT32)]  # or 0: never
Seed = Annotated[int, Range(0, 2**32 - 1)]
Batch = Annotated[int, Range(1, 2**20)]
Pixels = Annotated[int, Range(1, 4096)]  # along a side
Layers = Annotated[int, Range(1, 1024)]
Width = Annotated[int, Range(1, 65536)]
Heads = Annotated[int, Range(1, 1024)]
Tokens = Annotated[int, Range(1, 16384)]
Codes = Annotated[int, Range(1, 2**24)]
DenoisingSteps = Annotated[int, Range(1, 1000)]
Devices = Annotated[int, Range(1, 2**20, also=(-1, "what the others leave"))]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 0.999999)]  # a share below 1
Weight = Annotated[float, Range(0, 1e6)]
Power = Annotated[float, Range(0, 10)]
Positive = Annotated[float, Range(1e-6, 1e6)]
RopeBase = Annotated[float, Range(1, 1e9)]
LearningRate = Annotated[float, Range(0, 1000)]
Guidance = Annotated[float, Range(0, 1000)]
CfgInterval = Annotated[int, Range(-1, 16384)]
Temperature = Annotated[float, Range(1e-6, 1000, also=(0, "greedy"))]
TopK = Annotated[int, Range(0, INT32)]
Window = Annotated[int, Range(0, 2**24)]
Own = dict[str, bool | Annotated[int, FINITE] | Annotated[float, FINITE] | str]  # settings of a fork's own, by name
CropFraction = Annotated[float, Range(0.1, 1)]


@dataclass(frozen=True)
class VelocityConfig:
    """The velocity network of the diffusion decoder (paper section 3.2)."""

    width: Width = 768
    layers: Layers = 12
    head_size: Width = 64
    patch_size: Pixels = 8
    data_std: Positive = 0.6  # pixels in [-1, 1] are multiplied by this before diffusion
    time_shift: Positive = 2.0  # t' = t / (t + time_shift (1 - t))
    share_time_encoding: bool = False  # one time embedding for all blocks instead of one per block
    mlp_head: bool = False  # a final adaLN layer on the shared time embedding; needs share_time_encoding
    repa_layer: Annotated[int, Range(0, 1024)] | None = 8  # the input of this block feeds the REPA head; None: no head
    repa_hidden: Width = 2048
    repa_width: Width = 768  # feature size of the frozen network that REPA aligns with
    repa_grid: Pixels = 16  # the tapped map is average-pooled to this grid (when it is larger)

    @property
    def has_repa(self) -> bool:
        """True where the REPA features can be computed; not by a head beyond the last block, as small test files have."""
        return self.repa_layer is not None and self.repa_layer < self.layers


@dataclass(frozen=True)
class TokenizerConfig:
    """Images <-> codes <-> condition tokens -> velocity. The defaults are the released size: 307,444,672 parameters."""

    image_size: Pixels = 256
    channels: Annotated[int, Range(1, 64)] = 3
    encoder_patch_size: Pixels = 16
    encoder_layers: Layers = 8
    encoder_width: Width = 768
    decoder_layers: Layers = 8
    decoder_width: Width = 768
    head_size: Width = 64
    num_tokens: Tokens = 256  # T
    num_groups: Tokens = 8  # G
    queries_per_step: Tokens | None = None  # condition tokens of one denoising step; None: num_tokens / num_groups
    num_denoising_steps: DenoisingSteps = 8  # S
    query_low_rank: bool = True  # queries = linear(table of rank 8) instead of a full table
    query_rank: Width = 8
    max_tokens: Tokens = 1024  # rows of the query and position tables
    vq_enable: bool = True  # False: the bottleneck only normalises (a continuous tokenizer)
    codebook_size: Codes = 16384
    code_dim: Width = 8
    sampling_resolution: Pixels | None = None  # pixels are denoised at this size if it is larger than image_size
    output_resolution: Pixels | None = None  # decoded images larger than this are resized down (bicubic)
    rope_theta: RopeBase = 10000.0
    init_std: Weight | None = 0.02  # of the blocks' matrices; None: 1 / sqrt(fan in), which small widths need
    gate_init: Annotated[float, Range(-1e6, 1e6)] = 0.0  # of the blocks' residual gates
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

    @property
    def output_side(self) -> int:
        """Side of decoded images."""
        return min(self.output_resolution or self.resolution, self.resolution)


@dataclass(frozen=True)
class TransformerConfig:
    """The autoregressive transformer (paper section 3.3). The default is size L: 342,910,976 parameters."""

    layers: Layers = 24
    heads: Heads = 16
    kv_heads: Heads | None = None  # fewer than heads: grouped-query attention; None: as many as heads
    width: Width = 1024
    num_tokens: Tokens = 256
    vocab_size: Codes = 16384
    num_classes: Annotated[int, Range(1, 10**6)] = 1000  # the class table has one more row, the null class of guidance
    mlp_multiple: Annotated[int, Range(1, 2**20)] = 256  # the SwiGLU size, 8/3 of the width, is rounded up to a multiple of it
    rope_theta: RopeBase = 10000.0
    norm_eps: Annotated[float, Range(1e-12, 1)] = 1e-5
    init_std: Weight | None = 0.02  # None: 1 / sqrt(fan in), which small widths need
    token_dropout: Decay = 0.1
    attention_dropout: Decay = 0.1  # on the attention's output projection
    mlp_dropout: Decay = 0.1
    class_dropout: Share = 0.1  # labels replaced by the null class in training

    @property
    def mlp_width(self) -> int:
        hidden = int(2 * 4 * self.width / 3)
        return -(-hidden // self.mlp_multiple) * self.mlp_multiple


TRANSFORMER_SIZES: dict[str, dict[str, int]] = {
    "B": {"layers": 12, "heads": 12, "width": 768},
    "L": {"layers": 24, "heads": 16, "width": 1024},
    "XL": {"layers": 36, "heads": 20, "width": 1280},
    "XXL": {"layers": 48, "heads": 24, "width": 1536},
    "XXXL": {"layers": 48, "heads": 40, "width": 2560},
    "1B": {"layers": 22, "heads": 32, "width": 2048},
    "3B": {"layers": 24, "heads": 32, "width": 3200},
    "7B": {"layers": 32, "heads": 32, "width": 4096},
}


# Times of denoising steps before the shift, by name: few near the noise, where the tokens alone say what the image is.
LATE_STEPS: dict[str, tuple[float, ...]] = {
    "late3": (0, 5 / 8, 7 / 8),
    "late5": (0, 3 / 8, 5 / 8, 3 / 4, 7 / 8),
    "late6": (0, 3 / 8, 5 / 8, 3 / 4, 55 / 64, 61 / 64),
    "late8": (0, 1 / 4, 1 / 2, 5 / 8, 23 / 32, 25 / 32, 55 / 64, 61 / 64),
}
Solvers = Literal["adams2", "euler"]
Steps = Literal["uniform", "late3", "late5", "late6", "late8"]


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn and denoised (paper section 3.4). The defaults are the paper's for size L."""

    guidance: tuple[Guidance, Guidance] = (1.1, 8.0)  # classifier-free guidance scale of the first and of the last token
    cfg_interval: CfgInterval = -1  # n >= 0: tokens with an index above n + 1 are not guided
    temperature: Temperature = 1.0  # 0: greedy
    top_k: TopK = 0  # 0: off
    top_p: Share = 1.0  # 1: off
    speculate: Window = 0  # W guesses a pass, of which the right ones are kept: the same tokens in fewer passes; 0: off
    solver: Solvers = "adams2"
    steps: Steps = "uniform"  # times of the denoising steps: i / S, as in the paper, or of `LATE_STEPS`
    num_denoising_steps: DenoisingSteps | None = None  # S of uniform steps; None: the tokenizer's
    num_groups: Tokens | None = None  # stop after so many groups (a preview); None: all
    start_step: Annotated[int, Range(0, 999)] = 0  # start from a given image at this denoising step (0: from noise)


@dataclass(frozen=True)
class DataConfig:
    """Where images (or stored codes) come from and how they are cropped."""

    source: Literal["digits", "folder", "cifar10", "idx", "packed", "tar", "tfds", "codes"] = "folder"
    path: str | None = None  # the folder, perhaps hf://...; of TFDS its data_dir, None: TFDS's own; unused by the digits
    dataset: str | None = None  # of TFDS, such as imagenet2012 or imagenet2012:5.1.0; of idx: which of the MNIST family
    split: str = "train"  # TFDS also takes parts of one, such as train[:10000]
    held_out_split: str | None = None  # to evaluate on; None: test, val of folders, packed and tar, validation of TFDS
    labels: str | None = None  # file of lines "IMAGE CLASS", or CSV: IMAGE,CLASS; for a split without class folders
    verify: bool = False  # compare every file of stored codes and packed images with its SHA-256 first
    image_size: Pixels = 256
    channels: Annotated[int, Range(1, 3)] = 3  # 1: grey, 3: RGB
    crop: Literal["random", "center", "ten_crop", "none"] = "random"  # ADM random or centre crop, one of ten crops, as it is
    crop_fraction: tuple[CropFraction, CropFraction] = (0.8, 1.0)  # of the random crop
    ten_crop_scale: Annotated[float, Range(1, 4)] = 1.1  # ten crops are taken from a centre crop of this times image_size
    flip: bool = True  # mirror half of the images
    workers: Annotated[int, Range(0, 1024)] = 0  # worker processes; 0: threads of this process


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, clipping, the learning-rate schedule and the moving average of the weights."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: of the matrices in blocks; everything else is left to AdamW
    learning_rate: LearningRate = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up
    warmup_steps: Step = 0
    decay_start: Step = 0  # step at which linear or cosine decay starts; it ends at the last training step
    final_learning_rate: LearningRate = 0.0
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    weight_decay: Weight = 0.0  # on tensors of two or more dimensions only
    clip_norm: Positive | None = 1.0  # of the global gradient norm
    ema_decay: Decay = 0.999  # 0: the moving average is the weights themselves


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of the tokenizer's loss terms (paper section 3.2). A term of weight 0 costs nothing.

    LPIPS and REPA need frozen networks, whose files not everyone has; the paper's weight of both is 0.5.
    """

    flow: Weight = 1.0
    flow_power: Power = 0.0  # images weigh (1 - t')^power, with mean 1; 0: the paper's, error of velocities; 2: of images
    final_flow_power: Power | None = None  # where the power ends, having changed linearly over the run; None: where it starts
    codebook: Weight = 1.0
    commitment: Weight = 0.25
    entropy: Weight = 0.0
    entropy_temperature: Positive = 0.01
    lpips: Weight = 0.0  # LPIPS with VGG16 of the predicted image
    repa: Weight = 0.0  # 1 - cosine between the REPA head and the patch tokens of DINOv2
    lpips_weights: str | None = None  # file or folder; None: looked for by name
    dinov2_weights: str | None = None  # file; None: looked for by name


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One of them, or data and fsdp, may be -1: whatever the others leave.

    By default all devices share the batch and each holds the complete state; where that leaves no room for activations,
    `data=-1, fsdp=-1` shards the state over some of them. See `parallel`.
    """

    data: Devices = -1  # batch
    fsdp: Devices = 1  # batch, and parameters along their width
    tensor: Devices = 1  # heads and hidden units


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision, logging and checkpoints of one training run."""

    steps: Count = 210_000
    batch_size: Batch = 1024  # of all devices together
    accumulate: Batch = 1  # the batch is processed in so many parts
    seed: Seed = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on accelerators, float32 on CPU
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again; dots: all but matrix products
    log_every: Count = 50
    checkpoint_every: Count = 5000
    keep_checkpoints: Count = 2
    keep_every: Count | None = None  # checkpoints at multiples of this step stay for ever
    sample_every: Step = 0  # a grid of samples (or reconstructions) in the log every so many steps; 0: never
    evaluate_every: Step = 0  # metrics on held-out images in the log every so many steps; 0: never
    evaluate_images: Count = 256  # on so many of them
    profile: tuple[Count, Count] | None = None  # a profiler trace of these steps, first and last, in the folder of the logs
    peak_flops: Annotated[float, Range(1, 1e21)] | None = None  # bfloat16 operations/s of a device, for MFU; None: by its kind


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
    fork: Own = field(default_factory=dict, hash=False)  # settings of a fork's own, by name


@dataclass(frozen=True)
class TransformerTraining:
    """Stage 2: everything that defines a run of the autoregressive transformer."""

    name: str = "ar"
    model: TransformerConfig = field(default_factory=TransformerConfig)
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
    fork: Own = field(default_factory=dict, hash=False)  # settings of a fork's own, by name


RETIRED = ("gan", "gan_start_step", "gan_width", "gan_halvings")  # settings that checkpoints may still have
STAGES = {"tokenizer": TokenizerTraining, "transformer": TransformerTraining}


def to_dict(config: TokenizerTraining | TransformerTraining) -> dict[str, Any]:
    """The settings of a run as JSON-able data, with the key `stage` naming its class."""
    stage = next(name for name, cls in STAGES.items() if isinstance(config, cls))
    return {"stage": stage, **dataclasses.asdict(config)}


def from_dict(values: Any) -> TokenizerTraining | TransformerTraining:
    """The inverse of `to_dict`. Raises InputError for whatever else, in one line, and for what `validate` refuses."""
    stage = values.get("stage") if isinstance(values, dict) else None
    if not isinstance(stage, str) or stage not in STAGES:
        raise InputError(f"the settings name no known stage (one of {', '.join(STAGES)})")
    values = {name: value for name, value in values.items() if name != "stage"}
    if isinstance(values.get("loss"), dict):  # of format 0 and 1
        values["loss"] = {name: value for name, value in values["loss"].items() if name not in RETIRED}
    config = checked(STAGES[stage], values)
    validate(config)
    return config


def checked(kind: Any, value: Any, name: str = "", limits: Range = FINITE) -> Any:
    """Converts a value, perhaps of JSON, to the type of a hint, such as `Annotated[int, Range(1, 9)] | None` or a dataclass.

    Numbers are finite and within their `Range`. Tables become dataclasses, lists tuples, whole numbers floats where these are
    expected; dataclasses are looked at field by field.

    Raises InputError, for any value at all, in one line with the setting's `name`.
    """
    if isinstance(kind, typing.TypeVar):  # stands for any dataclass
        kind = type(value)
    if dataclasses.is_dataclass(kind):
        return _checked_fields(kind, value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        limits = next((each for each in kind.__metadata__ if isinstance(each, Range)), limits)
        return checked(arguments[0], value, name, limits)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return checked(next(each for each in arguments if each is not type(None)), value, name, limits)
    if origin is tuple:
        expected = f"{len(arguments)} values"
        if isinstance(value, (list, tuple)):
            kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
            if len(kinds) == len(value):
                return tuple(checked(each, item, name, limits) for each, item in zip(kinds, value))
    elif origin is dict:
        expected = "a table of names with a bool, int, float or str each"
        if isinstance(value, dict) and all(type(item) in PLAIN for item in value.values()):
            return {checked(str, each, name): checked(type(item), item, f"{name}.{each}") for each, item in value.items()}
    elif origin is Literal:
        expected = f"one of {', '.join(arguments)}"
        if isinstance(value, str) and value in arguments:
            return value
    elif kind is str:
        expected = f"text of at most {MOST_TEXT} characters"
        if isinstance(value, str) and len(value) <= MOST_TEXT and "\0" not in value:
            return value
    elif kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool):
        if value in limits:
            return kind(value)
        raise InputError(f"{name} is {_shown(value)}, it should be {limits}")
    else:
        expected = kind.__name__
        if type(value) is kind:
            return value
    raise InputError(f"{name} should be {expected}, not {_shown(value)}")


def _checked_fields(kind: Any, value: Any, name: str) -> Any:
    """`checked` for a dataclass, or a table of its fields."""
    if isinstance(value, kind):
        kind, value = type(value), {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if not isinstance(value, dict):
        raise InputError(f"{name or 'this'} should be a table of settings, not {_shown(value)}")
    kinds = typing.get_type_hints(kind, include_extras=True)
    if unknown := [each for each in value if each not in kinds]:
        raise InputError(f"{name or 'the table of settings'} has unknown names: {', '.join(map(_shown, unknown[:3]))}")
    needed = [each.name for each in dataclasses.fields(kind) if each.default is each.default_factory is dataclasses.MISSING]
    if lacking := [each for each in needed if each not in value]:
        raise InputError(f"{name or 'the table of settings'} lacks {', '.join(lacking)}")
    return kind(**{each: checked(kinds[each], item, f"{name}.{each}".lstrip(".")) for each, item in value.items()})


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # of a number with thousands of digits
        return "a number of very many digits"


def validate(config: TokenizerTraining | TransformerTraining) -> None:
    """Raises InputError, in one line, where settings are out of range or contradict each other."""
    checked(type(config), config)
    train, data = config.train, config.data
    require(
        train.batch_size % train.accumulate == 0,
        f"train.batch_size {train.batch_size} should be a multiple of train.accumulate {train.accumulate}",
    )
    first, last = train.profile or (1, 1)
    require(
        first <= last <= train.steps,
        f"train.profile is {first} {last}, it should be a first and a last step between 1 and train.steps {train.steps}",
    )
    least, greatest = data.crop_fraction
    require(least <= greatest, f"data.crop_fraction is {least} {greatest}, it should be rising")
    require(data.channels in (1, 3), f"data.channels is {data.channels}, it should be 1 (grey) or 3 (RGB)")
    if isinstance(config, TokenizerTraining):
        tokenizer = config.model
        validate_tokenizer(tokenizer)
        require(
            (data.image_size, data.channels) == (tokenizer.image_size, tokenizer.channels),
            f"data gives {data.image_size} pixels and {data.channels} channels, "
            f"the model takes {tokenizer.image_size} and {tokenizer.channels}",
        )
        require(data.source != "codes", "a tokenizer is trained on images, data.source is codes")
        layer, layers = tokenizer.velocity.repa_layer, tokenizer.velocity.layers
        require(
            config.loss.repa == 0 or tokenizer.velocity.has_repa,
            f"loss.repa needs the REPA head, but velocity.repa_layer is {layer} in a network of {layers} layers",
        )
    else:
        model = config.model
        require(model.width % model.heads == 0, f"model.width {model.width} should be a multiple of model.heads {model.heads}")
        size, kv_heads = model.width // model.heads, model.kv_heads or model.heads
        require(size % 2 == 0, f"model.width / model.heads, the size of a head, is {size}, it should be even (RoPE)")
        require(model.heads % kv_heads == 0, f"model.heads {model.heads} should be a multiple of model.kv_heads {kv_heads}")
        start = config.sampling.start_step
        require(start == 0, f"sampling.start_step is {start}, but a run's samples have no image to start from; leave it at 0")


def validate_tokenizer(model: TokenizerConfig) -> None:
    """Raises InputError where the sizes of a tokenizer are out of range or do not fit together."""
    checked(TokenizerConfig, model, "tokenizer")
    velocity = model.velocity
    patches = max(model.image_size // model.encoder_patch_size, model.resolution // velocity.patch_size) ** 2
    checks = (
        (patches <= MOST_PATCHES, f"an image has {patches} patches, there should be at most {MOST_PATCHES}"),
        (model.image_size % model.encoder_patch_size == 0, "image_size should be a multiple of encoder_patch_size"),
        (model.resolution % velocity.patch_size == 0, "the denoised size should be a multiple of velocity.patch_size"),
        (model.num_tokens % model.num_groups == 0, "num_tokens should be a multiple of num_groups"),
        (model.num_tokens <= model.max_tokens, "num_tokens should not exceed max_tokens"),
        (model.tokens_per_step <= model.num_tokens, "queries_per_step should not exceed num_tokens"),
        (model.encoder_width % model.head_size == 0, "encoder_width should be a multiple of head_size"),
        (model.decoder_width % model.head_size == 0, "decoder_width should be a multiple of head_size"),
        (velocity.width % velocity.head_size == 0, "velocity.width should be a multiple of velocity.head_size"),
        (model.head_size % 4 == 0 and velocity.head_size % 4 == 0, "head sizes should be multiples of 4 (2-D RoPE)"),
        (velocity.share_time_encoding or not velocity.mlp_head, "velocity.mlp_head needs share_time_encoding"),
    )
    for holds, message in checks:
        require(holds, f"tokenizer: {message}")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting by its path, such as `model.velocity.width`."""
    settings: dict[str, Any] = {}
    for each in dataclasses.fields(config):
        name, value = prefix + each.name, getattr(config, each.name)
        settings |= flat(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value}
    return settings
