"""The house rules that can be read off the source: which way imports go, and how long things may become."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND_LINES = ("train", "enjoy", "evaluate", "benchmark", "export")
# A module imports from the rows below its own, and from its own folder.
STOREYS = (
    (*COMMAND_LINES, "tools"),
    ("trainer", "evaluation"),
    ("auxiliary",),
    ("buffer",),
    ("run",),
    ("memory",),
    ("worker", "model"),
    ("transformer", "recurrence"),
    ("utils",),
    ("kernels", "environments"),
)
FLOOR = {room: number for number, storey in enumerate(reversed(STOREYS)) for room in storey}
# Heavy and rarely needed, so that they may be imported where they are needed.
LATE_PACKAGES = {"matplotlib", "pygame", "imageio", "tensorboard", "minigrid", "memory_gym", "popgym"}
# These keep --help quick, so they may import anything late.
# The processes of environments import the worker, and do without PyTorch.
LATE_IMPORTERS = {*(f"{name}.py" for name in COMMAND_LINES), "run/cli.py", "worker.py", "tools/play_onnx.py"}
CARD = ("trainer", "auxiliary", "model", "transformer", "recurrence", "buffer", "memory", "worker", "utils")
MOST_LINES = {"the card": 2950, "trainer.py": 420, ast.ClassDef: 330, ast.FunctionDef: 50}

PATHS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", *(f"{room}/**/*.py" for room in FLOOR))
    for path in ROOT.glob(pattern)
)
SOURCES = {path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in PATHS}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}


def room_of(path: str) -> str:
    """Return the top-level module or folder that a file belongs to."""
    return path.split("/")[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> list[tuple[int, str]]:
    """Return line and dotted name of everything that is imported anywhere below a node."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # What follows `import` may be a module or a name in one: the room is the same.
            found.append((node.lineno, "." * node.level + (node.module or "")))
    return found


def test_every_file_has_a_place():
    """Otherwise the other tests would pass over it."""
    outside = {".venv", ".ci-venv", "tests"}
    files = {path.relative_to(ROOT) for path in ROOT.rglob("*.py")}
    files = {path for path in files if path.parts[0] not in outside and not path.parts[0].startswith(".")}
    assert files == set(PATHS)
    assert {room_of(path) for path in SOURCES} == set(FLOOR)


@pytest.mark.parametrize("path", SOURCES)
def test_imports_go_one_way(path):
    """Those for types alone as well: a type that lies above is in the wrong room."""
    room = room_of(path)
    for line, name in imported_modules(TREES[path]):
        target = name.split(".")[0]
        below = FLOOR.get(target, -1) < FLOOR[room] or target == room and "/" in path
        assert below and not name.startswith("."), f"{path}:{line} imports {name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in LATE_IMPORTERS])
def test_no_import_hides_in_a_function(path):
    functions = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef)]
    late = [found for node in functions for found in imported_modules(node)]
    assert {name.split(".")[0] for _, name in late} <= LATE_PACKAGES, late


@pytest.mark.parametrize("path", SOURCES)
def test_classes_and_functions_are_of_readable_length(path):
    for node in ast.walk(TREES[path]):
        if type(node) in MOST_LINES:
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES[type(node)], f"{path}:{node.lineno} {node.name} has {lines} lines"


def test_the_card_is_short():
    """What a reader has to read to know the algorithm."""
    lines = {f"{name}.py": len(SOURCES[f"{name}.py"].splitlines()) for name in CARD}
    assert lines["trainer.py"] <= MOST_LINES["trainer.py"]
    assert sum(lines.values()) <= MOST_LINES["the card"], lines


def test_kernels_know_nothing_but_arrays():
    """Nor does anything of reinforcement learning reach them by way of a package."""
    known = {"kernels", "numpy", "torch", *sys.stdlib_module_names}
    kernels = [tree for path, tree in TREES.items() if room_of(path) == "kernels"]
    assert {name.split(".")[0] for tree in kernels for _, name in imported_modules(tree)} <= known
