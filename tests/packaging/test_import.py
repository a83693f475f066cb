"""Importing the packages does no work; the house rules that a linter does not know."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"ciuic_hf": ROOT / "ciuic_hf", "ciuic_kernels": ROOT / "kernels" / "ciuic_kernels"}
MODULES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
MAX_LINES = 500

PROBE = """
import sys
import {package}
import torch
found = [name for name in ("triton", "matplotlib", "bitsandbytes", "gguf", "peft") if name in sys.modules]
assert not found, f"importing {package} imports {{found}}"
assert not torch.cuda.is_initialized(), "importing {package} initialises CUDA"
assert "{package}" == "ciuic_hf" or "transformers" not in sys.modules, "ciuic_kernels imports transformers"
"""


def module_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", PACKAGES)
def test_import_does_no_work(package: str, tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "CIUIC"))
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(package=package)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_kernels_is_a_source_root_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the PyPI package kernels"


@pytest.mark.parametrize("path", MODULES, ids=module_id)
def test_module_follows_the_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = next(name for name, folder in PACKAGES.items() if path.is_relative_to(folder))
    if path.stem == "__init__" or not path.stem.startswith("_"):
        assert ast.get_docstring(tree), "a public module starts with a docstring"
    assert len(text.splitlines()) <= MAX_LINES, f"over {MAX_LINES} lines: split it"
    if path != PACKAGES[package] / "__init__.py":
        shortcuts = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == package and node.level == 0
        ]
        assert not shortcuts, f"line {shortcuts}: import from the full submodule path, not from {package}"
