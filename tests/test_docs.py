"""The README, the pages of docs/ and the heads of experiment files name what exists: links, modules, commands, files."""

import ast
import functools
import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tyro

from dar_jax.cli.main import COMMANDS, parse
from dar_jax.errors import InputError
from dar_jax.quickstart import DIGITS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"python (experiments/\w+/\w+\.py)( [^`\n]*)")
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py")) + sorted((ROOT / "experiments" / "variants").glob("*.py"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_names_of_files(page):
    for path in re.findall(r"\b((?:dar_jax|experiments|tests|tpu_scripts)/[\w/]+\.(?:py|sh))", page.read_text()):
        assert (ROOT / path).exists(), path


def commands(page: Path) -> list[tuple[str, bool]]:
    """The command lines of a page; True: complete ones, from a block of shell, and False: those within a sentence. Of an
    experiment file, those of its docstring, all complete; what is in brackets behind one is not of it."""
    text = page.read_text()
    if page.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(text)) or "").replace("\\\n", " ").splitlines()
        found = [re.match(r"(?:\w+:)?\s*(?:\w+=\S+ )?(dar-jax .*)", line) for line in lines]
        return [(re.sub(r"\s{2,}\(.*", "", each[1]), True) for each in found if each]
    blocks = "".join(block for language, block in FENCE.findall(text) if language == "sh").replace("\\\n", " ")
    lines = [(line, True) for line in blocks.splitlines() if line.startswith("dar-jax ")]
    sentences = re.sub(r"\s+", " ", FENCE.sub("", text))
    return lines + [(line, False) for line in re.findall(r"`(dar-jax [^`]*)`", sentences)]


@pytest.mark.parametrize("page", PAGES + EXPERIMENTS, ids=lambda page: page.stem)
def test_commands(page, monkeypatch):
    config = SimpleNamespace(data=DIGITS)
    run = SimpleNamespace(config=config, tokenizer=SimpleNamespace(config=config))
    for name in ("inference.trained.inspect_transformer", "training.checkpoint.inspect"):  # some options are those of a run
        monkeypatch.setattr(f"dar_jax.{name}", lambda path: run)
    monkeypatch.chdir(ROOT)
    for line, complete in commands(page):
        name, *rest = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
        stand_in = {"my_experiment.py": "experiments/digits_ar.py"}
        rest = [stand_in.get(word, word) for word in rest]
        assert name in COMMANDS or name.isupper(), line
        if not rest or name.isupper() or "EXPERIMENT" in rest or "FILE" in rest or "FILE:NAME" in rest:
            continue
        try:
            parse([name, *rest])
        except InputError as error:
            assert not complete and re.search("missing|required", str(error), re.IGNORECASE), f"{line}: {error}"


def programs():
    """(FILE, arguments) of every program in experiments/ that a page or the head of a file calls."""
    for page in PAGES + sorted((ROOT / "experiments").rglob("*.py")):
        text = page.read_text()
        text = (ast.get_docstring(ast.parse(text)) or "") if page.suffix == ".py" else text
        for file, rest in PROGRAM.findall(text.replace("\\\n", " ")):
            rest = re.sub(r"\s{2,}\(.*", "", rest)
            if not re.search(r"[A-Z]{3}/|\[", rest):  # but for patterns
                yield pytest.param(file, rest, id=f"{page.stem}: {file}{rest}"[:70])


class Understood(Exception):
    """In place of what a program does."""


@pytest.mark.parametrize(("file", "arguments"), list(programs()))
def test_programs(file, arguments, monkeypatch):
    def only_read(what):
        def stand_in(*_, **__):
            raise Understood

        return what if isinstance(what, type) else functools.wraps(what)(stand_in)

    def cli(what, real=tyro.cli, **options):
        real(only_read(what), **options)
        raise Understood

    def choose(functions, real=tyro.extras.subcommand_cli_from_dict):
        real({name: only_read(function) for name, function in functions.items()})

    monkeypatch.setattr(tyro, "cli", cli)
    monkeypatch.setattr(tyro.extras, "subcommand_cli_from_dict", choose)
    monkeypatch.setattr(sys, "argv", [file, *shlex.split(arguments, comments=True)])
    monkeypatch.syspath_prepend((ROOT / file).parent)
    with pytest.raises(Understood):
        runpy.run_path(str(ROOT / file), run_name="__main__")
