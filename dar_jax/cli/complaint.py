"""What is wrong with a command line that tyro refuses, in one line; tyro itself prints it in a box."""

import collections
import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dar_jax.cli.options import Flag


def complaint(command: Any, default: Any, arguments: Sequence[str], prog: str) -> str:
    """What is wrong with the arguments of a command: the first thing from the left, or else what is missing.

    default: the command with the values of what is not given, None without.
    """
    options = {name: spec for name, spec, _ in _options(command, default)}
    missing = [name for name, _, required in _options(command, default) if required]
    places = [name for name in options if not name.startswith("--")]
    words = collections.deque(arguments)
    while words:
        word = words.popleft()
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name, values = name.replace("_", "-"), [value] if equals else []
            if name not in options:
                similar = difflib.get_close_matches(name, options, 1)
                return f"there is no option {name}" + (f"; did you mean {similar[0]}?" if similar else "")
        elif places:
            name, values = places.pop(0), [word]
        else:
            return f"{prog} takes no further argument {word!r}"
        spec = options[name]
        counts = spec.nargs if isinstance(spec.nargs, tuple) else (spec.nargs,)
        most = math.inf if "*" in counts else max(counts)
        while words and len(values) < most and not words[0].startswith("--"):
            values.append(words.popleft())
        if not values and 0 < most < math.inf:
            return f"{name} lacks its value, {spec.metavar}"
        if (most < math.inf and len(values) not in counts) or not _can_read(spec, values):
            return f"{name} takes {spec.metavar}, not {' '.join(values)!r}"
        missing = [other for other in missing if other != name]
    texts = [f"{name} {options[name].metavar}" if name.startswith("--") else name for name in missing]
    return f"Missing from {prog}: {', '.join(texts)}" if missing else f"{prog} cannot be read"


def _options(command: Any, default: Any, prefix: str = "--") -> Iterator[tuple[str, PrimitiveConstructorSpec, bool]]:
    """The options of a command and of the dataclasses in it: name (--train.steps, or CHECKPOINT if positional), how tyro reads
    the values, and True if required."""
    kind = get_origin(command) or command
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if isinstance(bare, TypeVar):  # the settings, as in Train[TokenizerTraining]
            (bare,) = get_args(command)
        value = getattr(default, field.name, None)
        if dataclasses.is_dataclass(bare):
            yield from _options(bare, value, prefix if field.name == "config" else f"{prefix}{field.name}.")
            continue
        if get_origin(bare) is dict:  # a fork's own settings
            for name, each in (value or {}).items():
                spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(type(each), set()))
                yield f"{prefix}{field.name}.{name}".replace("_", "-"), spec, False
            continue
        positional = tyro.conf.Positional in getattr(hint, "__metadata__", ())
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))
        if hint == Flag:
            spec = dataclasses.replace(spec, nargs=0, metavar="no value", choices=None, instance_from_str=bool)
        name = field.name.upper() if positional else (prefix + field.name).replace("_", "-")
        yield name, spec, field.default is field.default_factory is dataclasses.MISSING


def _can_read(spec: PrimitiveConstructorSpec, values: list[str]) -> bool:
    if spec.choices and not set(values) <= set(spec.choices):
        return False
    try:
        spec.instance_from_str(values)
    except (ValueError, TypeError):
        return False
    return True
