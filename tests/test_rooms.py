"""The rooms of the package: who may import whom, and that nobody imports in a circle.

Imports are read from the source, those under ``TYPE_CHECKING`` and inside functions included. One is excepted:
``ops.py`` imports the kernels inside the functions that need them, so that the core imports without triton.
"""

import ast
import tomllib
from functools import cache

import pytest
from conftest import ROOT

PACKAGE = ROOT / "qwen3core"
TOOLS = (
    "training",
    "evaluation",
    "explaining",
    "export",
    "laboratory",
    "profiling",
    "serving",
    "commands",
    "corpora",
    "weights.synthesize",
    "weights.merge",
    "weights.tiny_recipe",
    "kernels.gallery",
)
"""Rooms that import the core, and that no core file imports."""


def sources() -> dict[str, str]:
    """Source by module name below the package (``weights.find``); the empty name is the package itself."""
    found = {}
    for folder, name in ((PACKAGE, ""), (ROOT / "kernels", "kernels"), (ROOT / "weights", "weights")):
        for path in sorted(folder.rglob("*.py")):
            parts = [*name.split("."), *path.relative_to(folder).with_suffix("").parts]
            module = ".".join(part for part in parts if part and part != "__init__")
            assert module not in found  # the package's links to kernels/ and weights/ are not followed
            found[module] = path.read_text("utf-8")
    return found


@cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(module: str, source: str, modules: set[str]) -> set[str]:
    """Modules of the package that a module imports, by name below the package."""
    package = module if is_package(module, modules) else module.rpartition(".")[0]
    names: set[str] = set()
    for node in import_statements(source):
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("qwen3core.") for alias in node.names if "qwen3core." in alias.name}
            continue
        base = node.module or ""
        if node.level:
            parents = package.split(".") if package else []
            base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
        elif base.partition(".")[0] == "qwen3core":
            base = base.partition(".")[2]
        else:
            continue
        for alias in node.names:  # a module of that name, else a name of the module
            inner = f"{base}.{alias.name}" if base else alias.name
            names.add(inner if inner in modules else base)
    return {name for name in names if name in modules and name != module}


def is_package(module: str, modules: set[str]) -> bool:
    return module == "" or any(other.startswith(f"{module}.") for other in modules)


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    edges = {module: imports(module, source, set(sources)) for module, source in sources.items()}
    edges["ops"] = {name for name in edges["ops"] if not name.startswith("kernels.")}
    return edges


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty where there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(edges[module]):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


def in_tools(module: str) -> bool:
    return any(module == tool or module.startswith(f"{tool}.") for tool in TOOLS)


def core_that_imports_tools(edges: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in sorted(others)
        if in_tools(other) and not in_tools(module) and module != "__main__"
    ]


def test_every_room_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    folders = {module.rpartition(".")[0] for module in sources() if "." in module}
    assert set(listed) == {"qwen3core", *(f"qwen3core.{folder}" for folder in folders)}


def test_no_module_imports_itself_in_a_circle():
    edges = graph(sources())
    assert len(edges) > 30
    assert {"weights.tensors", "weights.precision"} <= edges["weights.build"]
    assert "reference" in edges["model"]
    assert "training.cached_gradients" in edges["training.loop"]
    assert cycle(edges) == []


def test_no_core_file_imports_a_tool():
    edges = graph(sources())
    assert all(any(module == tool or module.startswith(f"{tool}.") for module in edges) for tool in TOOLS)
    assert core_that_imports_tools(edges) == []


@pytest.mark.parametrize(
    ("module", "planted", "found"),
    [
        ("config", "from .model import Qwen3Model", ["config", "model"]),
        ("batch", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .model import Qwen3Model", ["batch"]),
        ("weights.tensors", "def late():\n    from qwen3core.weights.build import open_model", ["weights.tensors"]),
        ("training.losses", "from . import loop", ["training.losses", "training.loop"]),
        ("commands.files", "import qwen3core.commands.run", ["commands.files", "commands.run"]),
    ],
)
def test_a_planted_circle_is_found(module, planted, found):
    changed = sources()
    changed[module] += f"\n{planted}\n"
    circle = cycle(graph(changed))
    assert circle[0] == circle[-1]
    assert set(found) <= set(circle)


@pytest.mark.parametrize(
    ("module", "planted", "found"),
    [
        ("embedder", "from .training import train", "embedder imports training"),
        ("parity", "if 0:\n    from qwen3core import evaluation", "parity imports evaluation"),
        ("weights.find", "from .synthesize import LAYOUTS", "weights.find imports weights.synthesize"),
        ("kernels.launch", "import qwen3core.commands.files", "kernels.launch imports commands.files"),
    ],
)
def test_a_planted_tool_is_found(module, planted, found):
    changed = sources()
    changed[module] += f"\n{planted}\n"
    assert core_that_imports_tools(graph(changed)) == [found]
