"""The command `dar-jax`. Every sub-command is a dataclass of its options with a short `run` over the library.

Exit codes: 0 done, or training stopped by SIGTERM, SIGHUP or a closed pipe with a checkpoint; 1 training diverged; 2 something
the user gave is wrong or a disk is full, in one line; 3 (or 134, from JAX itself) another host is gone; 130 interrupted; 141
nobody reads the output.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import logging
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, get_type_hints

import tyro

from dar_jax import __version__
from dar_jax.cli.complaint import complaint
from dar_jax.cli.evaluate import Evaluate, EvaluateAr, EvaluateTokenizer, Sweep
from dar_jax.cli.options import Listed, fail, first, given, many_hosts
from dar_jax.cli.pack import Pack
from dar_jax.cli.release import Export, Import
from dar_jax.cli.serve import Serve
from dar_jax.cli.train import Plan, Quickstart, Train
from dar_jax.cli.use import Edit, Generate, Info, Reconstruct, Sample, Tokenize
from dar_jax.config import Range, checked
from dar_jax.console import PrintableMessages, columns, prepare_streams
from dar_jax.errors import InputError
from dar_jax.memory import keep_freed_memory

# Whatever imports JAX is imported where it is needed, so that --help and mistyped commands answer at once.


COMMANDS = {
    "quickstart": Quickstart,
    "train": Train,
    "sample": Sample,
    "edit": Edit,
    "serve": Serve,
    "generate": Generate,
    "reconstruct": Reconstruct,
    "pack": Pack,
    "tokenize": Tokenize,
    "evaluate": Evaluate,
    "evaluate-tokenizer": EvaluateTokenizer,
    "evaluate-ar": EvaluateAr,
    "sweep": Sweep,
    "plan": Plan,
    "info": Info,
    "import": Import,
    "export": Export,
}

MANY_HOSTS = ("train", "generate", "pack", "tokenize", "evaluate", "evaluate-tokenizer", "evaluate-ar", "sweep")
Seconds = Annotated[int, Range(1, 10**6)]
HOST_NUMBERS = {
    "num_processes": Annotated[int, Range(1, 10**6)],
    "process_id": Annotated[int, Range(0, 10**6)],
    "heartbeat_timeout": Seconds,
    "start_timeout": Seconds,
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: that of the process) and returns the exit code. `--help` raises SystemExit, as ever."""
    prepare_streams()
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableMessages())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("dar_jax").setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where there is no home folder for its cache
    for name in ("absl", "asyncio"):  # Orbax reports there what it raises besides
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"orbax\.")
    warnings.filterwarnings("ignore", message="coroutine 'async_serialize_from_host", category=RuntimeWarning)
    sys.unraisablehook = _hide_abandoned_writes
    code = 128 + signal.SIGPIPE
    try:
        try:
            code = _run(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:  # of stdout; what is left in it would be tried again at the end of the process
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            code = fail(_disk_full(error) or error, 2)
        elif (hosts := many_hosts()) is not None:
            hosts.leave(f"{hosts.name()}: nobody reads the output", code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    keep_freed_memory()
    try:
        arguments = join_hosts(sys.argv[1:] if arguments is None else list(arguments))
        command = parse(arguments)
        if command is None:
            return 0
        use_compilation_cache()
        with _only_first_prints():
            return command.run() or 0
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout):
            raise
        wrong_platform = isinstance(error, RuntimeError) and "initialize backend" in str(error)  # in JAX_PLATFORMS
        if (full := _disk_full(error)) or wrong_platform or isinstance(error, (InputError, OSError)):
            return fail(full or error, 2)
        if (hosts := many_hosts()) is not None:
            hosts.leave(None, 1)
        raise


def join_hosts(arguments: list[str]) -> list[str]:
    """Takes the options for many hosts out of a command line and joins the hosts, if there are several, see `hosts.join`.

    That comes before the rest is looked at, because an experiment file or a checkpoint may make JAX look for its devices.
    """
    if not arguments or arguments[0] not in MANY_HOSTS or "-h" in arguments or "--help" in arguments:
        return arguments
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--coordinator-address")
    for name in HOST_NUMBERS:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    options = given(vars(options))
    for name, kind in HOST_NUMBERS.items():
        if name in options:
            checked(kind, options[name], name)
    from dar_jax.parallel import hosts

    hosts.join(**options, preemptible=arguments[0] == "train")
    return others


def parse(arguments: Sequence[str]) -> Any:
    """The command that a command line asks for, or None where it only asked for an overview, which is printed.

    Raises InputError, in one line, where it is wrong.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return None
    name, *rest = arguments
    if name == "--version":
        print(f"dar-jax {__version__}")
        return None
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {similar[0]}?" if similar else f"commands are {', '.join(COMMANDS)}"
        raise InputError(f"there is no command {name!r}; {hint}")
    command, default, prog = COMMANDS[name], None, f"dar-jax {name}"
    help_wanted = any(argument in ("-h", "--help") for argument in rest)
    if hasattr(command, "with_defaults"):
        if rest and not rest[0].startswith("-"):
            command, default = command.with_defaults(rest[0])
        elif help_wanted:
            command = command[Listed]
        else:
            place = dataclasses.fields(command)[0].name.upper()
            raise InputError(f"Missing from {prog}: {place}, which comes first (see {prog} --help)")
    return _parse(command, default, ["--help"] if help_wanted else rest, prog)


def overview() -> str:
    """What `dar-jax --help` prints."""
    commands = columns([(f"  {name}", command.__doc__.splitlines()[0]) for name, command in COMMANDS.items()])
    return f"""usage: dar-jax COMMAND ...

D-AR, diffusion via autoregressive models: images as tokens whose order is a denoising schedule.

{commands}

`dar-jax COMMAND --help` explains a command, `dar-jax --version` prints the version.

Wherever a checkpoint, a file of weights or a data folder is named, hf://OWNER/NAME[/PATH][@REVISION] is one on the
Hugging Face Hub (pip install ".[hub]", docs/weights.md).

Many hosts: run the same command on each. On Cloud TPU, under SLURM's srun and Open MPI they find each other;
elsewhere give --coordinator-address HOST:PORT --num-processes N --process-id 0 .. N-1, or set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. They wait for each other --start-timeout (300)
seconds, and end when one is silent for --heartbeat-timeout (60) seconds. This is for {", ".join(MANY_HOSTS)}.

Example: dar-jax quickstart --workdir runs/digits"""


def use_compilation_cache() -> None:
    """Keeps compiled functions in ~/.cache/dar_jax, or where JAX_COMPILATION_CACHE_DIR says: a second run starts fast."""
    import jax

    from dar_jax.files import user_cache

    folder = user_cache()
    if jax.config.jax_compilation_cache_dir is not None or folder is None:
        return
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _parse(command: Any, default: Any, arguments: Sequence[str], prog: str) -> Any:
    """tyro's parsing, with errors in one line, and ranges."""
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro draws boxes there
            parsed = tyro.cli(command, prog=prog, args=arguments, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise InputError(f"{complaint(command, default, arguments, prog)} (see {prog} --help)") from None
    kinds = get_type_hints(type(parsed), include_extras=True)
    for name, value in vars(parsed).items():
        checked(kinds[name], value, "" if name == "config" else name)  # as in --train.steps, without the field's own name
    return parsed


def _hide_abandoned_writes(unraisable: Any) -> None:
    """Where one write of a checkpoint fails, which is raised, TensorStore's threads report each of those that end later."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _is_unread(stream: Any) -> bool:
    """True for a pipe that is closed at its other end."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _disk_full(error: BaseException | None, depth: int = 0) -> str | None:
    """What an exception says of a full disk, in itself or in those that led to it; None where it is something else."""
    if error is None or depth > 20:
        return None
    for text in map(os.strerror, FULL):
        if text in str(error):
            path = re.search(r"(?<![^\s\"'\[])/[^\s\"'\]:]+", str(error))
            return f"cannot write{f' {path[0]}' if path else ''}: {text}; make room, then give the command again"
    causes = [*getattr(error, "exceptions", ()), error.__cause__, error.__context__]
    return next((full for cause in causes if (full := _disk_full(cause, depth + 1)) is not None), None)


@contextlib.contextmanager
def _only_first_prints() -> Iterator[None]:
    """With many hosts, all but the first print only what goes wrong."""
    if first():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
