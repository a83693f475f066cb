"""Tables of measured rules, one JSON file a GPU: which launch is fastest for which sizes.

    {"schema": 1, "gpu": "NVIDIA H100 80GB HBM3", "triton": "3.8", "command": "ciuic bench tune",
     "rules": [{"op": "linear", "max_tokens": 8, "size": "large", "launch": [8, 1, 6], "programs": 8}, ...]}

A rule without ``max_tokens`` or ``size`` fits all; ``launch: null`` is decode-then-GEMM; ``programs``, for each
streaming multiprocessor, may be left out. A file serves the GPU and the
minor version of Triton that it names, since compilers differ. Folders are searched in the order of
``search_paths()``: the user's own first, then those that ``add_search_path`` was given.
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ciuic_kernels.selection import (
    DEFAULT_RULES,
    EXPERTS,
    LINEAR,
    MAX_TOKENS,
    PROGRAMS_PER_PROCESSOR,
    SIZES,
    Rule,
)

SCHEMA = 1
_added: list[Path] = []


def user_path() -> Path:
    """The folder of the user's own tables."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "ciuic" / "tuned"


def add_search_path(folder: Path) -> None:
    """Have tables looked for in a folder, after all folders known so far."""
    if folder not in _added:
        _added.append(folder)
        rules_for.cache_clear()


def search_paths() -> list[Path]:
    return [user_path(), *_added]


def triton_minor() -> str:
    """``3.8`` of the installed Triton, empty without one; asks the package's metadata and imports nothing."""
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return ""


def read_rules(path: Path) -> tuple[str, str, list[Rule]]:
    """GPU name, Triton minor version and rules of a file. Raises ValueError that says what is wrong with it."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["schema"] != SCHEMA:
            raise ValueError(f"schema {table['schema']} is not {SCHEMA}")
        return table["gpu"], table["triton"], [_rule(entry) for entry in table["rules"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of launch rules ({error}); delete it or run `ciuic bench tune` again."
        ) from None


def _rule(entry: dict[str, Any]) -> Rule:
    unknown = set(entry) - {"op", "max_tokens", "size", "launch", "programs"}
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    op, size, launch = entry["op"], entry.get("size"), entry["launch"]
    if op not in (LINEAR, EXPERTS) or (size is not None and size not in SIZES):
        raise ValueError(f"no operator {op!r} with size {size!r}")
    if launch is not None:
        block_m, num_warps, num_stages = (int(value) for value in launch)
        if (
            block_m < 8
            or block_m & (block_m - 1)
            or num_warps not in (1, 2, 4, 8)
            or not 1 <= num_stages <= 16
        ):
            raise ValueError(f"launch {launch} is not [tokens, warps, stages]")
        launch = (block_m, num_warps, num_stages)
    elif op == EXPERTS:
        raise ValueError("experts have no decode-then-GEMM: the host would have to know the routing")
    programs = int(entry.get("programs", PROGRAMS_PER_PROCESSOR))
    if not 1 <= programs <= 64:
        raise ValueError(f"{programs} programs for each processor are not 1 to 64")
    return Rule(op, int(entry.get("max_tokens") or MAX_TOKENS), size, launch, programs)


def table_for(gpu: str, triton: str) -> Path | None:
    """The first table for a GPU and this Triton, None when there is none. Raises ValueError for a broken one."""
    for folder in search_paths():
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
            if read_rules(path)[:2] == (gpu, triton):
                return path
    return None


@cache
def rules_for(gpu: str, triton: str) -> tuple[Rule, ...]:
    """The rules of a GPU: those of its table, then the defaults."""
    path = table_for(gpu, triton)
    return DEFAULT_RULES if path is None else (*read_rules(path)[2], *DEFAULT_RULES)
