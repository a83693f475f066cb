"""The wheel holds what the tree holds, and works where nothing of the checkout is in reach."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

SHIPPED = {"ciuic_hf": "ciuic_hf", "kernels/ciuic_kernels": "ciuic_kernels", "configs": "ciuic_hf/configs"}


def tree_files(root: Path) -> set[str]:
    """The names that the files of the checkout must have in the wheel."""
    names = set()
    for source, target in SHIPPED.items():
        for path in (root / source).rglob("*"):
            relative = path.relative_to(root / source)
            cached = any(part == "__pycache__" or part.startswith(".") for part in relative.parts)
            if path.is_file() and not cached:
                names.add(f"{target}/{relative.as_posix()}")
    return names


def wheel_files(wheel: Path) -> set[str]:
    """What the wheel installs, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_equals_the_tree(wheel: Path, root: Path) -> None:
    shipped, tree = wheel_files(wheel), tree_files(root)
    assert shipped == tree, f"missing: {sorted(tree - shipped)}, unexpected: {sorted(shipped - tree)}"


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("ciuic_hf/py.typed", ""),
        ("ciuic_kernels/py.typed", ""),
        ("ciuic_hf/configs/", ""),
        ("ciuic_hf/demo/heldout.txt", ""),
        ("ciuic_hf/demo/models/", "config.json"),
        ("ciuic_hf/demo/models/", ".safetensors"),
        ("ciuic_kernels/cpu/", ".c"),
        ("ciuic_kernels/cpu/", ".h"),
    ],
)
def test_wheel_ships_what_is_not_python(wheel: Path, start: str, end: str) -> None:
    assert any(name.startswith(start) and name.endswith(end) for name in wheel_files(wheel))


def test_wheel_has_no_package_named_kernels(wheel: Path) -> None:
    assert {name.split("/")[0] for name in wheel_files(wheel)} == {"ciuic_hf", "ciuic_kernels"}


def test_dev_extra_equals_the_dev_group(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["dev"] == project["dependency-groups"]["dev"]


def test_every_dependency_is_pinned(root: Path) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = dict(line.split("==") for line in lines)
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for text in itertools.chain.from_iterable(groups):
        requirement = requirements.Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name]), f"{text} excludes the pin"


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(wheel: Path, root: Path, tmp_path: Path) -> None:
    """Install into a new environment as a user would, then run the demo in an empty folder."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "VIRTUAL_ENV", "TRITON", "CIUIC"))
    }
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    install = (python, "-m", "pip", "install", "-qq", "--constraint", root / "constraints.txt")
    run(*install, "torch")  # first and alone: see the Makefile
    run(*install, f"{wheel}[demo]")
    run(python, "-m", "pip", "check")

    where = run(
        python, "-c", "import ciuic_hf, ciuic_kernels; print(ciuic_hf.__file__, ciuic_kernels.__file__)"
    )
    assert all(Path(path).is_relative_to(venv) for path in where.split())

    printed = run(venv / "bin" / "ciuic", "demo")
    assert sum(line.count("│") >= 3 or line.count("|") >= 3 for line in printed.splitlines()) >= 2, printed
    assert "bits" in printed
