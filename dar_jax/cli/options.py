"""Options that several commands share, and small checks."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dar_jax.config import (
    Batch,
    CfgInterval,
    DataConfig,
    DenoisingSteps,
    Devices,
    Guidance,
    MeshConfig,
    Range,
    SamplingConfig,
    Seed,
    Share,
    Solvers,
    Steps,
    Temperature,
    TokenizerConfig,
    Tokens,
    TopK,
    Window,
)
from dar_jax.console import printable
from dar_jax.errors import InputError


def _list_of(kind: Callable[[str], Any], metavar: str) -> PrimitiveConstructorSpec:
    """One argument that holds values separated by commas."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda arguments: tuple(kind(item.strip()) for item in arguments[0].split(",")),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def _scales(text: str) -> tuple[float, float]:
    scales = [float(part) for part in text.split(":")]
    first, last = scales if len(scales) > 1 else scales * 2
    return first, last


T = TypeVar("T")
Settings = TypeVar("Settings")

Words = Annotated[tuple[T, ...], _list_of(str, "A,B")]
Ints = Annotated[tuple[T, ...], _list_of(int, "N,N")]
Floats = Annotated[tuple[T, ...], _list_of(float, "A[,B]")]
Scales = Annotated[tuple[tuple[Guidance, Guidance], ...], _list_of(_scales, "FIRST:LAST,...")]
Number = Annotated[int, Range(1, 10**7)]  # of images or samples
Token = Annotated[int, Range(0, 2**24 - 1)]
Length = Annotated[int, Range(0, 16384)]  # of a prefix
FirstStep = Annotated[int, Range(1, 999)]
Particles = Annotated[int, Range(1, 4096)]
Tries = Annotated[int, Range(0, 100)]
Figure = Annotated[float, Range(1e-3, 1e9)]  # of a chip
Mesh = Ints[Devices]
Place = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
OfRun = Annotated[T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(default: of the checkpoint's run)")]
Optional = Annotated[T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(optional)")]


@dataclass(frozen=True)
class Listed:
    """Stands for settings that depend on the file or checkpoint, as long as none is given."""


@dataclass(frozen=True, kw_only=True)
class OnCheckpoint:
    """Options of a command that uses the weights of a run."""

    checkpoint: Place  # a run's folder, of a tokenizer or a transformer, or one of its checkpoints/STEP
    experiment: Optional[str] = None  # the run's experiment file, if that replaced the model, the source or parts of sampling
    weights: Literal["ema", "params"] = "ema"  # the moving average, or the weights of the last step
    mesh: Optional[Mesh] = None  # devices along data, fsdp and tensor; else along tensor as in the run, the rest along data
    batch_size: Batch = 64  # images at a time

    @functools.cached_property
    def replaced(self) -> Any:
        """The experiment of the run, None where no file was given."""
        from dar_jax.experiment import load_experiment

        return None if self.experiment is None else load_experiment(self.experiment)

    def load_sampler(self, mesh: Any = None, decoder_mesh: Any = None) -> Any:
        """Both stages of a transformer's run, on `--mesh` unless another is given."""
        from dar_jax.inference.trained import load_sampler

        return load_sampler(self.checkpoint, self.replaced, self.weights, mesh or make_mesh(self.mesh), decoder_mesh)

    def load_tokenizer(self, mesh: Any = None) -> Any:
        """The tokenizer of a run of either stage, on `--mesh` unless another is given."""
        from dar_jax.inference.trained import load_tokenizer

        return load_tokenizer(self.checkpoint, self.replaced, self.weights, mesh or make_mesh(self.mesh))

    def check_sampling(self, sampling: SamplingConfig, tokenizer: TokenizerConfig) -> None:
        """Raises InputError where the settings do not fit the tokenizer, or the experiment's parts make one void."""
        from dar_jax.sampling.settings import Method, make_settings

        make_settings(sampling, tokenizer, self.replaced.method if self.replaced else Method())


@dataclass(frozen=True, kw_only=True)
class OnTransformer(OnCheckpoint):
    """The same for a command that needs a transformer."""

    checkpoint: Place  # a transformer's run folder, or one of its checkpoints/STEP


@dataclass(frozen=True, kw_only=True)
class Conditioned(OnTransformer):
    """The same for a command that draws samples for an experiment's own condition."""

    condition_file: Optional[str] = None  # NPZ file of arrays that the condition reads beside the label, rows in turn

    def read_given(self) -> dict[str, Any]:
        """The arrays of that file. Raises InputError where it cannot be read or is not for the experiment's condition."""
        from dar_jax.inference.samples import check_given, read_given
        from dar_jax.sampling.settings import label_of

        given = read_given(self.condition_file)
        check_given(given, self.replaced.condition if self.replaced else label_of)
        return given


@dataclass(frozen=True, kw_only=True)
class OnData(OnCheckpoint, Generic[Settings]):
    """Options of a command that reads a data set; what is not given is as `default_data` has it."""

    checkpoint: Place  # a run's folder, of a tokenizer or a transformer, or one of its checkpoints/STEP; comes first
    data: Annotated[Settings, tyro.conf.FlagConversionOff]

    @staticmethod
    def run_of(checkpoint: str) -> Any:
        """The `Info` of the run whose data are the default: the tokenizer's."""
        from dar_jax.training.checkpoint import inspect

        return inspect(checkpoint).tokenizer

    @classmethod
    def default_data(cls, checkpoint: str) -> DataConfig:
        """The data of that run, in the split to evaluate on."""
        from dar_jax.data.sources import held_out

        return held_out(cls.run_of(checkpoint).config.data)

    def open_source(self) -> Any:
        """The data, opened as the run's experiment does it. Raises InputError where it cannot, or an option would be void."""
        from dar_jax.data.sources import open_source
        from dar_jax.inference.trained import tokenizer_part

        if self.data.held_out_split is not None:
            raise InputError("data.held_out_split is for training; give data.split")
        info = self.run_of(self.checkpoint)
        part = tokenizer_part(self.replaced) if info.is_tokenizer else self.replaced
        own, usual = part and part.source, info.config.data
        if not own and "source" in info.hooks and (self.data.source, self.data.path) == (usual.source, usual.path):
            raise InputError(f"the run in {info.workdir} has a source of its own; give its --experiment FILE, or other data")
        return open_source(self.data, own)

    @classmethod
    def with_defaults(cls, checkpoint: str) -> tuple[Any, Any]:
        """The type to parse and the values of what is not given."""
        return cls[DataConfig], defaults(cls, checkpoint=checkpoint, data=cls.default_data(checkpoint))


@dataclass(frozen=True, kw_only=True)
class OnExperiment(Generic[Settings]):
    """Options of a command that takes an experiment file, and all its settings."""

    experiment: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="EXPERIMENT")]  # its file; comes first
    config: Annotated[Settings, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]

    @classmethod
    def with_defaults(cls, experiment: str) -> tuple[Any, Any]:
        """The type to parse and the values of what is not given."""
        from dar_jax.experiment import load_experiment

        config = load_experiment(experiment).config
        return cls[type(config)], defaults(cls, experiment=experiment, config=config)

    def load(self) -> Any:
        """The experiment with the settings given."""
        from dar_jax.experiment import load_experiment

        return load_experiment(self.experiment).with_config(self.config)


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """How images are denoised; what is not given is as the checkpoint's run has it."""

    solver: OfRun[Solvers] = None  # of the denoising steps
    steps: OfRun[Steps] = None  # when they are: uniform as in the paper, or 3, 5, 6 or 8 late ones
    num_denoising_steps: OfRun[DenoisingSteps] = None  # how many uniform steps

    def denoising(self, of_run: SamplingConfig) -> SamplingConfig:
        """The run's settings with those given, of which `steps` and `num_denoising_steps` replace each other."""
        names = ("solver", "steps", "num_denoising_steps")
        options = given({name: getattr(self, name) for name in names})
        if "steps" in options or "num_denoising_steps" in options:
            of_run = dataclasses.replace(of_run, steps="uniform", num_denoising_steps=None)
        return dataclasses.replace(of_run, **options)


@dataclass(frozen=True, kw_only=True)
class Decoding(Denoising, OnCheckpoint):
    """Options of a command that encodes and decodes images."""

    seed: Seed = 0  # image i is denoised from the noise of seed + i

    def sampling(self, info: Any) -> SamplingConfig:
        """The run's settings with the solver and the steps given. Raises InputError where they do not fit the tokenizer."""
        of_run = self.denoising(SamplingConfig() if info.is_tokenizer else info.config.sampling)
        sampling = SamplingConfig(solver=of_run.solver, steps=of_run.steps, num_denoising_steps=of_run.num_denoising_steps)
        self.check_sampling(sampling, info.tokenizer.config.model)
        return sampling


@dataclass(frozen=True, kw_only=True)
class Sampling(Denoising, OnTransformer):
    """Options of a command that samples; what is not given is as the checkpoint's run has it."""

    guidance: OfRun[Floats[Guidance]] = None  # classifier-free guidance scale, of the first and the last token; 1: none
    cfg_interval: OfRun[CfgInterval] = None  # N >= 0: tokens with an index above N + 1 are not guided
    temperature: OfRun[Temperature] = None  # 0: always the most probable token
    top_k: OfRun[TopK] = None  # draw from the K most probable tokens only; 0: off
    top_p: OfRun[Share] = None  # draw from the most probable tokens that hold this share only; 1: off
    speculate: OfRun[Window] = None  # W guesses a pass, of which the right ones are kept: the same images, fewer passes; 0: off
    groups: OfRun[Tokens] = None  # stop after so many groups of tokens, with their preview

    def sampling(self, of_run: SamplingConfig) -> SamplingConfig:
        """The run's settings with those that were given."""
        if self.guidance is not None and len(self.guidance) > 2:
            raise InputError(f"guidance is one scale or two, of the first and the last token, not {len(self.guidance)}")
        options = {field.name: getattr(self, field.name, None) for field in dataclasses.fields(of_run)}
        options |= {"num_groups": self.groups, "guidance": self.guidance and (self.guidance[0], self.guidance[-1])}
        return self.denoising(dataclasses.replace(of_run, **given(options)))


@dataclass(frozen=True, kw_only=True)
class Inception(OnCheckpoint):
    """Options of a command that compares Inception's features of images."""

    inception: Optional[str] = None  # file of the Inception network; else looked for as docs/weights.md says
    resize: Literal["tensorflow1", "half_pixel"] = "tensorflow1"  # how images are resized to 299 x 299; ADM: tensorflow1

    def open_extractor(self, mesh: Any) -> Any:
        """The Inception network. Raises InputError where its weights are missing."""
        from dar_jax.evaluation.extractor import open_extractor

        return open_extractor(self.inception, self.resize, self.batch_size, mesh)


def defaults(command: type, **values: Any) -> Any:
    """A command with these values, and without those that have to be given."""
    required = [field.name for field in dataclasses.fields(command) if field.default is dataclasses.MISSING]
    return command(**dict.fromkeys(required, tyro.MISSING) | values)


def fail(what: object, code: int) -> int:
    """Prints what is wrong and returns the exit code; one host of many ends here, so that the others do not wait for it."""
    line = printable(" ".join(str(what).split()))
    if (hosts := many_hosts()) is not None:
        hosts.leave(f"{hosts.name()}: {line}", code)
    print(f"dar-jax: {line}", file=sys.stderr)
    return code


def script(main: Callable[..., None]) -> None:
    """Calls the main function of a file with its arguments from the command line, as tyro reads them; what it refuses is one
    line, exit code 2."""
    try:
        tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(main))
    except InputError as error:
        sys.exit(fail(error, 2))


def many_hosts() -> Any:
    """The module `hosts` where this process is one of several hosts, else None."""
    hosts = sys.modules.get("dar_jax.parallel.hosts")
    return hosts if hosts is not None and hosts.many() else None


def first() -> bool:
    """True on the process that prints and writes shared files: the only one, or the first of several hosts."""
    return (hosts := many_hosts()) is None or hosts.first()


def check_writable(*paths: str | None, folder: bool = False) -> None:
    """Raises InputError where the process that writes cannot write to these files (None: not asked for), or folders."""
    from dar_jax import files

    check = files.check_writable if folder else files.check_file_writable
    for path in paths:
        if path is not None and first():
            check(path)


def write_json(path: str | None, values: Any) -> None:
    """Writes a JSON file, once, where one was asked for."""
    from dar_jax import files

    if path is not None and first():
        files.write_json(path, values)


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def make_mesh(sizes: tuple[int, ...] | None, devices: Sequence[Any] | None = None) -> Any:
    """The mesh of these sizes; without any, all `devices` along data, or None where those are not given either."""
    from dar_jax import parallel

    if sizes is not None and len(sizes) != 3:
        raise InputError(f"a mesh has three sizes, of data, fsdp and tensor, not {len(sizes)}")
    return None if sizes is None and devices is None else parallel.make_mesh(MeshConfig(*sizes or ()), devices)
