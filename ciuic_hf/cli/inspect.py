"""``ciuic inspect PATH``: what a compressed checkpoint holds, from its files alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ciuic_hf.inspection import inspect_checkpoint


def add_command(commands: Any) -> None:
    command = commands.add_parser("inspect", help="show what a compressed checkpoint holds")
    command.add_argument("path", type=Path, help="directory of a checkpoint that Ciuic saved")
    command.add_argument("--json", action="store_true", help="every parameter, as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    report = inspect_checkpoint(arguments.path)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(report)
