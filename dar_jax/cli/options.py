"""Options that several commands share, and small checks."""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from dar_jax.config import (
    CfgInterval,
    DenoisingSteps,
    Devices,
    Guidance,
    MeshConfig,
    Range,
    SamplingConfig,
    Share,
    Temperature,
    TokenizerConfig,
    Tokens,
    TopK,
    checked,
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


T = TypeVar("T")


Words = Annotated[tuple[str, ...], _list_of(str, "A,B")]


Ints = Annotated[tuple[T, ...], _list_of(int, "N,N")]


Floats = Annotated[tuple[T, ...], _list_of(float, "A[,B]")]


Number = Annotated[int, Range(1, 10**7)]  # of images or samples


Token = Annotated[int, Range(0, 2**24 - 1)]


Length = Annotated[int, Range(0, 16384)]  # of a prefix


FirstStep = Annotated[int, Range(1, 999)]


Tries = Annotated[int, Range(0, 100)]


Figure = Annotated[float, Range(1e-3, 1e9)]  # of a chip


Mesh = Ints[Devices]


Place = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]


Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


OfRun = Annotated[T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(default: of the checkpoint's run)")]


Optional = Annotated[T | None, tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="(optional)")]


Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Listed:
    """Stands for settings that depend on the file or checkpoint, as long as none is given."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How samples are drawn; what is not given is as the checkpoint's run has it."""

    guidance: OfRun[Floats[Guidance]] = None  # classifier-free guidance scale, of the first and the last token; 1: none
    cfg_interval: OfRun[CfgInterval] = None  # N >= 0: tokens with an index above N + 1 are not guided
    temperature: OfRun[Temperature] = None  # 0: always the most probable token
    top_k: OfRun[TopK] = None  # draw from the K most probable tokens only; 0: off
    top_p: OfRun[Share] = None  # draw from the most probable tokens that hold this share only; 1: off
    solver: OfRun[Literal["adams2", "euler"]] = None  # of the denoising steps
    num_denoising_steps: OfRun[DenoisingSteps] = None  # steps from noise to image
    groups: OfRun[Tokens] = None  # stop after so many groups of tokens, with their preview

    def sampling(self, of_run: SamplingConfig, **others: Any) -> SamplingConfig:
        """The run's settings with what was given, here or by `others`."""
        names = ("cfg_interval", "temperature", "top_k", "top_p", "solver", "num_denoising_steps")
        given = {name: getattr(self, name) for name in names}
        given |= {"guidance": _two(self.guidance), "num_groups": self.groups}
        return dataclasses.replace(of_run, **_given(given | others))


def _fail(what: object, code: int) -> int:
    """Says what is wrong; a host of many ends here, so that the others do not wait for it."""
    if (hosts := _many_hosts()) is not None:
        hosts.leave(f"{hosts.name()}: " + printable(" ".join(str(what).split())), code)
    return _say(what, code)


def _first() -> bool:
    """Whether this process prints, and writes what is written once: it is alone, or the first of several hosts."""
    return (hosts := _many_hosts()) is None or hosts.first()


def _many_hosts() -> Any:
    """The module `hosts` where this process is one of several hosts, else None."""
    hosts = sys.modules.get("dar_jax.parallel.hosts")
    return hosts if hosts is not None and hosts.many() else None


def _say(what: object, code: int) -> int:
    print("dar-jax: " + printable(" ".join(str(what).split())), file=sys.stderr)
    return code


def _check_folder(path: str) -> None:
    """Raises InputError where the process that writes cannot write to a folder."""
    from dar_jax.files import check_writable

    if _first():
        check_writable(path)


def _check_file(path: str | None) -> None:
    """The same for a file that may have been asked for."""
    from dar_jax.files import check_file_writable

    if path is not None and _first():
        check_file_writable(path)


def _write_json(path: str | None, values: Any) -> None:
    """Writes a file that may have been asked for, once."""
    from dar_jax.files import write_json

    if path is not None and _first():
        write_json(path, values)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _two(guidance: tuple[float, ...] | None) -> tuple[float, float] | None:
    if guidance is not None and len(guidance) > 2:
        raise InputError(f"guidance is one scale or two, of the first and the last token, not {len(guidance)}")
    return guidance and (guidance[0], guidance[-1])


def _pair(text: str) -> tuple[float, float]:
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise InputError(f"guidance {text!r} is not two scales, of the first and the last token, such as 1.1:8")
    return checked(tuple[Guidance, Guidance], (numbers[0], numbers[-1]), "guidance")


def _mesh(sizes: tuple[int, ...] | None, devices: Sequence[Any] | None = None) -> Any:
    """The mesh of these sizes; without any, all `devices` along data, or None where those are not given either."""
    from dar_jax.parallel import make_mesh

    if sizes is not None and len(sizes) != 3:
        raise InputError(f"a mesh has three sizes, of data, fsdp and tensor, not {len(sizes)}")
    return None if sizes is None and devices is None else make_mesh(MeshConfig(*sizes or ()), devices)


def _two_meshes(sizes: tuple[int, ...] | None, decoder_sizes: tuple[int, ...] | None, of_run: MeshConfig) -> tuple[Any, Any]:
    """The mesh of these sizes (default: as `run_mesh`), and that of the last devices where the decoder has sizes of its own."""
    import jax

    from dar_jax.inference.trained import run_mesh

    if decoder_sizes is None:
        return _mesh(sizes), None
    count, devices = math.prod(decoder_sizes), jax.devices()
    if min(decoder_sizes) < 1 or count >= len(devices) or jax.process_count() > 1:
        raise InputError(
            f"a decoder mesh takes some of the devices of one host, not {' x '.join(map(str, decoder_sizes))} of "
            f"{len(devices)} on {jax.process_count()}"
        )
    others = devices[:-count]
    return _mesh(sizes, others) if sizes else run_mesh(of_run, others), _mesh(decoder_sizes, devices[-count:])


def _check_sampling(sampling: SamplingConfig, tokenizer: TokenizerConfig, experiment: Any) -> None:
    """Raises InputError where the settings do not fit the tokenizer, or an experiment's parts make one void."""
    from dar_jax.sampling.settings import Method, make_settings

    make_settings(sampling, tokenizer, experiment.method if experiment else Method())


def _experiment(path: str | None) -> Any:
    from dar_jax.experiment import load_experiment

    return None if path is None else load_experiment(path)
