"""``ciuic inspect``: what a checkpoint or plan holds, in numbers and pictures, and which kernel serves it.

Everything comes from headers, tags and plans; no weight is read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ciuic_hf.errors import CiuicError
from ciuic_hf.inspection import inspect_checkpoint
from ciuic_hf.pictures import terminal
from ciuic_hf.pictures.blocks import read_blocks
from ciuic_hf.pictures.compare import compare_models
from ciuic_hf.pictures.curve import trace_curve
from ciuic_hf.pictures.layers import map_bits
from ciuic_hf.pictures.matrix import map_matrix
from ciuic_hf.pictures.png import PNG_CELLS, draw_comparison, draw_matrix, draw_model, require_matplotlib
from ciuic_hf.planning.sensitivity import Sensitivity
from ciuic_hf.report import printable
from ciuic_kernels import tuning
from ciuic_kernels.device import DeviceFacts, device_facts
from ciuic_kernels.gpus import GPUS, gpu_by_name


def add_command(commands: Any) -> None:
    command = commands.add_parser("inspect", help="show what a compressed checkpoint or a plan holds")
    command.add_argument(
        "path", type=Path, nargs="?", help="directory of a checkpoint that Ciuic saved, or a plan.json"
    )
    command.add_argument("--json", action="store_true", help="every parameter, as JSON")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw to this file; needs matplotlib")
    command.add_argument(
        "--matrix", metavar="NAME", help="the blocks of one weight; a part of its name will do"
    )
    command.add_argument("--expert", type=int, metavar="I", help="of --matrix: which expert")
    command.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="what B changes, both checkpoints or plans"
    )
    command.add_argument("--sensitivity", type=Path, help="file of `ciuic calibrate`: the curve in KL")
    command.add_argument(
        "--dispatch",
        action="store_true",
        help="which kernel runs for each weight, and attention to a compressed cache, at how many tokens, and why; "
        "without PATH for DeepSeek's shapes",
    )
    where = command.add_mutually_exclusive_group()
    where.add_argument("--gpu", help=f"of --dispatch: {', '.join(GPUS)}; the GPU need not be here")
    where.add_argument("--device", help="of --dispatch: a device of this machine (default cuda:0, or H100)")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    _check(arguments)
    if arguments.dispatch:
        return _show_dispatch(arguments)
    if arguments.png:
        require_matplotlib()
    if arguments.compare:
        return _show_comparison(arguments)
    if arguments.matrix:
        return _show_matrix(arguments)
    _show_model(arguments)


def _check(arguments: argparse.Namespace) -> None:
    """One sentence for combinations that mean nothing."""
    if arguments.path is None and not (arguments.dispatch or arguments.compare):
        raise CiuicError(
            "ciuic inspect needs the directory of a checkpoint or a plan.json, --compare or --dispatch."
        )
    if arguments.compare and (arguments.path or arguments.matrix or arguments.dispatch):
        raise CiuicError(
            "--compare A B takes both paths itself, and goes with --png, --json and --sensitivity only."
        )
    if (arguments.gpu or arguments.device) and not arguments.dispatch:
        raise CiuicError("--gpu and --device say for what --dispatch is shown; add --dispatch.")
    if arguments.expert is not None and not arguments.matrix:
        raise CiuicError("--expert says of which matrix the blocks are shown; add --matrix NAME.")
    drawn = arguments.png or arguments.matrix or arguments.sensitivity
    if arguments.dispatch and drawn:
        raise CiuicError("--dispatch is a table of kernels and goes with --gpu, --device and --json only.")
    if arguments.matrix and (arguments.sensitivity or arguments.json):
        raise CiuicError("--matrix draws the blocks of one weight; leave --sensitivity and --json out.")


def _show_model(arguments: argparse.Namespace) -> None:
    """The table, the map by layer, and the curve."""
    model = read_blocks(arguments.path)
    report = inspect_checkpoint(arguments.path) if arguments.path.is_dir() else model.report()
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    if arguments.json and not arguments.png:
        return
    found = map_bits(model)
    curve = trace_curve([model], _sensitivity(arguments))
    name = arguments.path.name
    if arguments.png:
        title = f"{name}: {report.bits_per_weight():.2f} bits per weight"
        draw_model(arguments.png, found, curve, [name], title)
    if not arguments.json:
        console = Console()
        console.print(report)
        console.print(terminal.layer_map(found, console.width), highlight=False)
        if curve is not None:
            console.print(terminal.curve(curve, [name], console.width), highlight=False)
        _say_where(console, arguments.png)


def _show_matrix(arguments: argparse.Namespace) -> None:
    parameter = read_blocks(arguments.path).find(arguments.matrix)
    if arguments.png:
        draw_matrix(arguments.png, map_matrix(parameter, arguments.expert, *PNG_CELLS))
    console = Console()
    cells = terminal.matrix_cells(console.width)
    console.print(terminal.matrix_map(map_matrix(parameter, arguments.expert, *cells)), highlight=False)
    _say_where(console, arguments.png)


def _show_comparison(arguments: argparse.Namespace) -> None:
    found, before, after = compare_models(*map(read_blocks, arguments.compare))
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
    if arguments.json and not arguments.png:
        return
    curve = trace_curve([before, after], _sensitivity(arguments))
    if arguments.png:
        draw_comparison(arguments.png, found, curve)
    if not arguments.json:
        console = Console()
        console.print(terminal.comparison(found))
        for which, names in (("A", found.only_before), ("B", found.only_after)):
            if names:
                some = ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")
                console.print(
                    f"Compressed in {which} only, and not compared: {some}.", highlight=False, markup=False
                )
        console.print(terminal.layer_map(found.difference, console.width, differences=True), highlight=False)
        if curve is not None:
            console.print(terminal.curve(curve, found.sources, console.width), highlight=False)
        _say_where(console, arguments.png)


def _sensitivity(arguments: argparse.Namespace) -> Sensitivity | None:
    return Sensitivity.load(arguments.sensitivity) if arguments.sensitivity else None


def _say_where(console: Console, png: Path | None) -> None:
    if png:
        console.print(f"Picture: {png}", highlight=False, markup=False, soft_wrap=True)


def _show_dispatch(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.dispatch import (
        attention_label,
        attention_routes,
        checkpoint_attention,
        checkpoint_groups,
        checkpoint_shapes,
        dispatch_table,
        label,
        routes,
    )
    from ciuic_hf.bench.kernels.shapes import STANDARD

    facts = _facts(arguments.gpu, arguments.device)
    shapes = checkpoint_shapes(arguments.path) if arguments.path else list(STANDARD)
    try:
        table = tuning.table_for(facts.name, tuning.triton_minor())
        rules = tuning.rules_for(facts.name, tuning.triton_minor())
    except ValueError as error:
        raise CiuicError(str(error)) from None
    source = str(table) if table else "defaults, no table of this GPU"
    attention = checkpoint_attention(arguments.path) if arguments.path else None
    if arguments.json:
        by_shape = {label(shape): [vars(route) for route in routes(shape, facts, rules)] for shape in shapes}
        shown = {"gpu": facts.name, "rules": source, "weights": by_shape}
        if attention is not None:
            found = attention_routes(attention, facts)
            shown["attention"] = {attention_label(attention): [vars(route) for route in found]}
        print(json.dumps(shown, indent=2))
    else:
        groups = checkpoint_groups(arguments.path) if arguments.path else []
        Console().print(dispatch_table(shapes, facts, rules, source, groups, attention))


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
