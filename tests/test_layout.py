"""The shape of the code: who may import whom, and the two files that a reader opens first."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dar_jax"
LAYERS = [  # from the bottom up; a room may import those of its own line and of the lines above it
    "errors",
    "files config console memory",
    "weights parallel data",
    "models features",
    "sampling",
    "experiment",
    "training",
    "inference plan release",
    "evaluation serve",
    "quickstart",
    "cli __main__ __init__",
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms.split()}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(tree: ast.Module) -> set[str]:
    """The modules of the package that a file imports, within functions too, but not for type hints alone."""
    hints = [node for node in ast.walk(tree) if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    skipped = {id(node) for block in hints for node in ast.walk(block)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").split(".")[0] == "dar_jax":
            submodules = [f"{node.module}.{name.name}" for name in node.names] if node.module == "dar_jax" else [node.module]
            found |= {module for module in submodules if module != "dar_jax.__version__"}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_runs_up(file):
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    higher = [module for module in imports(ast.parse(file.read_text())) if HEIGHT[room(module)] > HEIGHT[own]]
    assert not higher


def test_the_sampler_opens_with_advance():
    functions = [
        node for node in ast.parse((PACKAGE / "sampling/sampler.py").read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert functions[0].name == "advance" and functions[0].end_lineno - functions[0].lineno < 25


def test_the_loop_is_short():
    assert len((PACKAGE / "training/loop.py").read_text().splitlines()) <= 150
