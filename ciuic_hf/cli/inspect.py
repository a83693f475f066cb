"""``ciuic inspect``: what a compressed checkpoint holds, and which kernel serves it, from its files alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ciuic_hf.errors import CiuicError
from ciuic_hf.inspection import inspect_checkpoint
from ciuic_kernels import tuning
from ciuic_kernels.device import DeviceFacts, device_facts
from ciuic_kernels.gpus import GPUS, gpu_by_name


def add_command(commands: Any) -> None:
    command = commands.add_parser("inspect", help="show what a compressed checkpoint holds")
    command.add_argument("path", type=Path, nargs="?", help="directory of a checkpoint that Ciuic saved")
    command.add_argument("--json", action="store_true", help="every parameter, as JSON")
    command.add_argument(
        "--dispatch",
        action="store_true",
        help="which kernel runs for each weight and number of tokens, and why; without PATH for DeepSeek's shapes",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--gpu", help=f"of --dispatch: {', '.join(GPUS)}; the GPU need not be here")
    where.add_argument("--device", help="of --dispatch: a device of this machine (default cuda:0, or H100)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    if arguments.dispatch:
        return _show_dispatch(arguments)
    if arguments.path is None:
        raise CiuicError("ciuic inspect needs the directory of a checkpoint, or --dispatch.")
    if arguments.gpu or arguments.device:
        raise CiuicError("--gpu and --device say for what --dispatch is shown; add --dispatch.")
    report = inspect_checkpoint(arguments.path)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(report)


def _show_dispatch(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.dispatch import checkpoint_shapes, dispatch_table, routes
    from ciuic_hf.bench.kernels.shapes import STANDARD

    facts = _facts(arguments.gpu, arguments.device)
    shapes = checkpoint_shapes(arguments.path) if arguments.path else list(STANDARD)
    try:
        table = tuning.table_for(facts.name, tuning.triton_minor())
        rules = tuning.rules_for(facts.name, tuning.triton_minor())
    except ValueError as error:
        raise CiuicError(str(error)) from None
    source = str(table) if table else "defaults, no table of this GPU"
    if arguments.json:
        by_shape = {str(shape): [vars(route) for route in routes(shape, facts, rules)] for shape in shapes}
        print(json.dumps({"gpu": facts.name, "rules": source, "weights": by_shape}, indent=2))
    else:
        Console().print(dispatch_table(shapes, facts, rules, source))


def _facts(gpu: str | None, device: str | None) -> DeviceFacts:
    """Of a named GPU, of a device of this machine, or of what is at hand."""
    try:
        if gpu:
            return gpu_by_name(gpu)
        if device is None:
            return device_facts(torch.device("cuda:0")) if torch.cuda.is_available() else GPUS["H100"]
        chosen = torch.device(device)
    except (ValueError, RuntimeError) as error:
        raise CiuicError(str(error).splitlines()[0]) from None
    if chosen.type != "cuda":
        raise CiuicError(
            f"--dispatch is about the kernels of CUDA GPUs, {device} has others; --gpu names one."
        )
    if (chosen.index or 0) >= torch.cuda.device_count():
        raise CiuicError(
            f"{device} is not here, this machine has {torch.cuda.device_count()} CUDA GPUs; --gpu names one."
        )
    return device_facts(chosen)
