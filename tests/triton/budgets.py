"""Stored costs of all loops, in ``budgets.json``; a loop that becomes dearer, or much cheaper, fails the gate.

    python -m tests.triton.budgets [3.6 3.7 3.8]

compiles everything again, stores what it costs now and prints what changed. The file goes by Triton's minor version,
architecture, kernel with dtype and launch (tokens x warps x stages), and kinds of blocks. Its numbers are
instructions per weight of each loop, sorted, full blocks first; the last of a mixture with ``any`` is the general
path's. Kernels without matrix instructions are counted as a whole.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from tests.triton.cases import Case, end_cases, full_cases
from tests.triton.gate import violations
from tests.triton.measurement import Measurement, measure_each
from tests.triton.versions import PINNED, RELEASES, location

FILE = Path(__file__).with_name("budgets.json")
SLACK = 0.05
"""How much cheaper than stored a loop may be: the file must stay what the kernels do."""

Table = dict[str, Any]


def read() -> Table:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def stored(table: Table, minor: str, case: Case) -> list[float] | None:
    """The budget of a case, None if there is none."""
    costs: list[float] | None = (
        table.get(minor, {}).get(f"sm_{case.arch}", {}).get(case.setting, {}).get(case.blocks)
    )
    return costs


def cases_of(minor: str) -> list[Case]:
    """What the slow gate compiles with a version of Triton."""
    return full_cases() if minor == PINNED else end_cases()


def disagreements(case: Case, measured: Measurement, budget: list[float] | None) -> list[str]:
    """Where a kernel costs something else than is stored."""
    costs = measured.costs(case)
    if budget is None:
        return ["no budget is stored: run `make aot-budgets` and commit the file"]
    if len(costs) != len(budget):
        return [f"loops of {costs} instructions per weight, stored are {budget}"]
    found = []
    for cost, limit in zip(costs, budget, strict=True):
        if cost > limit + 0.001:
            found.append(f"a loop takes {cost} instructions per weight, the budget is {limit}")
        elif cost < limit - SLACK - 0.001:
            found.append(f"a loop takes {cost} instead of {limit}: run `make aot-budgets` to keep the gain")
    return found


def renew(table: Table, minor: str) -> bool:
    """Measure all cases of a version, print what changed and store it; whether every rule is kept.

    The file is written after each case, so what an interrupted run has measured is kept.
    """
    clean = True
    fresh: Table = {}
    for case, measured in measure_each(cases_of(minor), location(minor)):
        broken = violations(case, measured, minor)
        clean &= not broken
        old, new = stored(table, minor, case), measured.costs(case)
        if old != new or broken:
            resources = f"{measured.registers} registers, {measured.shared} bytes shared"
            print(f"{minor} {case}: {_text(old)} -> {_text(new)}  ({resources})", flush=True)
        for sentence in broken:
            print(f"    BROKEN: {sentence}", flush=True)
        for place in (fresh, table.setdefault(minor, {})):
            place.setdefault(f"sm_{case.arch}", {}).setdefault(case.setting, {})[case.blocks] = new
        write(table)
    table[minor] = fresh  # without what is compiled no more
    write(table)
    return clean


def _text(costs: list[float] | None) -> str:
    return "nothing" if costs is None else " ".join(map(str, costs)) or "none"


def write(table: Table) -> None:
    text = json.dumps(table, indent=1, sort_keys=True)
    text = re.sub(r"\[\s+([^]]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    FILE.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Store what all loops cost now.")
    parser.add_argument(
        "versions", nargs="*", metavar="MINOR", help=f"of {', '.join(RELEASES)}; all by default"
    )
    versions = parser.parse_args().versions or list(RELEASES)
    unknown = set(versions) - set(RELEASES)
    if unknown:
        parser.error(f"Triton {sorted(unknown)[0]} is not one of {', '.join(RELEASES)}")
    table, clean = read(), True
    for minor in versions:
        clean &= renew(table, minor)
    print(
        f"{FILE.name} is written." if clean else f"{FILE.name} is written, but kernels break rules (BROKEN)."
    )
    sys.exit(not clean)


if __name__ == "__main__":
    main()
