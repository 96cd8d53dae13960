"""Imports go one way, and the rooms that must work without Ray or torch do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nesa_ray

ROOT = Path(nesa_ray.__file__).resolve().parent
# Each room may import itself and those named here.
MAY_IMPORT = {
    "errors": set(),
    "fields": {"errors"},
    "version": set(),
    "garbage": set(),
    "products": set(),
    "graph": {"errors", "fields", "garbage", "products"},
    "cluster": {"errors", "fields", "garbage", "products"},
    "planning": {"errors", "fields", "graph", "cluster"},
    "runtime": {"errors", "fields", "garbage", "products", "graph", "cluster", "planning"},
    "training": {"errors", "fields", "graph", "cluster", "planning", "runtime"},
    "serving": {"errors", "fields", "garbage", "graph", "cluster", "planning", "runtime"},
    "report": {"errors", "graph", "cluster", "planning"},
}


def imports(file: Path) -> set[str]:
    """The nesa_ray modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nesa_ray."):
            found.add(str(node.module).removeprefix("nesa_ray."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("nesa_ray.") for a in node.names if a.name.startswith("nesa_ray.")}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    here = room(".".join(file.relative_to(ROOT).with_suffix("").parts))
    if here in ("__init__", "cli", "demo"):
        return
    allowed = MAY_IMPORT[here]
    for module in imports(file):
        fits = room(module) == here or room(module) in allowed or module in allowed
        assert fits, f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("nesa_ray.planning.partition", ("ray", "torch")),
        ("nesa_ray.planning.schedule", ("ray", "torch")),
        ("nesa_ray.graph.graph", ("ray", "torch")),
        ("nesa_ray.cluster.topology", ("ray", "torch")),
        ("nesa_ray.graph.split", ("ray",)),
        ("nesa_ray.runtime.executor", ("ray",)),
        ("nesa_ray.runtime.local", ("ray",)),
        ("nesa_ray.runtime.zero", ("ray",)),
    ],
)
def test_importable_without(module: str, without: tuple[str, ...]) -> None:
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in without)
    subprocess.run([sys.executable, "-c", f"import sys; {block}; import {module}"], check=True, timeout=60)


def test_public_names_are_sorted_and_there() -> None:
    names = [n for n in nesa_ray.__all__ if n != "__version__"]
    assert names == sorted(names)
    for name in nesa_ray.__all__:
        assert getattr(nesa_ray, name) is not None
