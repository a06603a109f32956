"""The rules of the house that a tool can check: import names, file sizes, the layer links."""

import ast
import importlib.util
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from statistics import median

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = (
    "kernels",
    "adapters",
    "engines",
    "training",
    "server",
    "client",
    "examples",
    "benchmarks",
    "tests",
    "deploy",
)


def _files() -> list[Path]:
    return sorted(path for folder in SOURCES for path in (PROJECT / folder).rglob("*.py"))


def test_bare_kernels_is_not_ours() -> None:
    # transformers and diffusers probe for a package of that name and import what they find.
    spec = importlib.util.find_spec("kernels")
    assert spec is None or "kernels" in packages_distributions()


@pytest.mark.parametrize("folder", ["kernels", "adapters", "engines", "training", "server", "client", "proto"])
def test_top_folders_have_no_init(folder: str) -> None:
    assert not (PROJECT / folder / "__init__.py").exists()


def test_import_names_resolve_from_anywhere(tmp_path: Path) -> None:
    imports = "import hueshift.v1.generation_pb2, hueshift.adapters.errors, hueshift.models.embedded as m"
    code = f"{imports}; print(m.EMBEDDED_MODEL.is_dir())"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "True"


def test_file_sizes() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _files()}
    long = {str(path.relative_to(PROJECT)): count for path, count in lines.items() if count > 400}
    assert not long, f"over 400 lines, split by duty: {long}"
    assert median(lines.values()) <= 150


def test_function_sizes() -> None:
    long: list[str] = []
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > 60:
                    long.append(f"{path.relative_to(PROJECT)}:{node.lineno} {node.name} {size}")
    assert not long, f"functions over 60 lines: {long}"


def test_no_loose_ends() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "Not" + "ImplementedError")
    found = [
        f"{path.relative_to(PROJECT)}:{number}"
        for path in _files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert not found
