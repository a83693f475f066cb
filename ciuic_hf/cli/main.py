"""The ``ciuic`` command: thin argparse over the library."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from rich.console import Console

import ciuic_hf
from ciuic_hf.cli import bench, calibrate, compress, demo, inspect, plan
from ciuic_hf.errors import CiuicError

COMMANDS = (demo, plan, calibrate, compress, inspect, bench)


def parser() -> argparse.ArgumentParser:
    """All commands; each module adds its own."""
    top = argparse.ArgumentParser(
        prog="ciuic", description="Transformers models loaded straight into compressed blocks."
    )
    top.add_argument("--version", action="version", version=f"ciuic-hf {ciuic_hf.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS:
        module.add_command(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and give its exit status; an error of ours or of files is a sentence, without a traceback."""
    arguments = parser().parse_args(argv)
    warnings.simplefilter("default")
    try:
        status: int | None = arguments.run(arguments)
    except (CiuicError, OSError) as error:
        Console(stderr=True).print(f"ciuic: {error}", style="red", highlight=False, markup=False)
        return 1
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
