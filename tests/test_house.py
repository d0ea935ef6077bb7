"""The house rules that a machine can hold: who imports whom, sizes, docstrings, pins, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("hwmodels", "sim", "runtime", "experiments", "notebooks")
PACKAGES = LAYERS[:3]
TORCH_WORLD = {"torch", "transformers", "safetensors", "tokenizers", "accelerate", "huggingface_hub"}
MAX_FUNCTION_LINES, MAX_FILE_LINES = 60, 400


def sources(*folders: str) -> list[Path]:
    """Python files of some top-level folders."""
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, top-level module) of every import of a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; say where from"
            yield node.lineno, (node.module or "").split(".")[0]


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def tracked() -> list[Path]:
    """Files under version control; every file of the packages where there is no repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        return sources(*LAYERS, "tests")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_import_points_back():
    # hwmodels <- sim <- runtime <- experiments, notebooks; the front door stands on the three packages
    wrong = []
    for path in [*sources(*LAYERS), ROOT / "scheinfer.py"]:
        home = path.relative_to(ROOT).parts[0]
        allowed = LAYERS[:3] if home == "scheinfer.py" else LAYERS[: LAYERS.index(home) + 1]
        forbidden = {*LAYERS, "tests"} - set(allowed) | ({"scheinfer"} if home in PACKAGES else set())
        wrong += [f"{place(path)}:{line} imports {name}" for line, name in imports(path) if name in forbidden]
    assert wrong == []


def test_planning_needs_no_torch():
    files = sources("hwmodels", "sim")
    wrong = [f"{place(p)}:{line} imports {name}" for p in files for line, name in imports(p) if name in TORCH_WORLD]
    assert wrong == []


@pytest.mark.parametrize("module", ["hwmodels", "hwmodels.catalog", "sim", "sim.timeline", "sim.report", "scheinfer"])
def test_an_import_loads_neither_torch_nor_a_plotting_library(module):
    heavy = sorted(TORCH_WORLD | {"matplotlib"})
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_files_and_functions_stay_small():
    wrong = []
    for path in [*sources(*LAYERS[:4]), ROOT / "scheinfer.py"]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        wrong += [f"{place(path)} has {lines} lines"] if lines > MAX_FILE_LINES else []
        for node in functions(path):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            wrong += [f"{place(path)}:{node.lineno} {node.name} has {lines}"] if lines > MAX_FUNCTION_LINES else []
    assert wrong == []


def test_public_functions_say_what_they_do():
    wrong = []
    for path in sources(*PACKAGES):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owners = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
        for node in (n for owner in owners for n in owner.body):
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                wrong.append(f"{place(path)}:{node.lineno} {node.name}")
    assert wrong == []


def test_packages_are_typed():
    assert all((ROOT / name / "py.typed").is_file() for name in PACKAGES)


def test_no_file_knows_a_machine():
    path_of_a_machine = re.compile(rb"(?<![\w.])/(?:home|root|Users|work|mnt|opt)/\w")
    wrong = [place(p) for p in tracked() if path_of_a_machine.search(p.read_bytes())]
    assert wrong == []


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = project["dependencies"] + [r for extra in project["optional-dependencies"].values() for r in extra]
    return [Requirement(name) for name in names]


def test_every_requirement_has_one_exact_version_within_its_range():
    exact = pins()
    assert [str(r) for r in requirements() if r.name not in exact or not r.specifier.contains(exact[r.name])] == []


def test_what_the_packages_import_is_required():
    named = {r.name for r in requirements()} | {*LAYERS, "scheinfer"} | set(sys.stdlib_module_names)
    found = {name for path in [*sources(*LAYERS[:4]), ROOT / "scheinfer.py"] for _, name in imports(path)}
    assert sorted(found - named) == []


def test_the_makefile_installs_the_torch_of_the_constraints():
    assert f"torch=={pins()['torch']}" in (ROOT / "Makefile").read_text()
