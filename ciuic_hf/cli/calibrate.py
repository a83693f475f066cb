"""``ciuic calibrate SRC --save FILE``: how much each block of a model matters, and what its inputs are."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ciuic_hf.errors import CiuicError
from ciuic_hf.report import human_bytes

TEXT_BITS = 8  # of the copy that writes the text: its KL is a hundredth of what is measured
TOKENS, TOKENS_FOR_ROUNDING = 1536, 4096


def add_command(commands: Any) -> None:
    command = commands.add_parser("calibrate", help="measure how much each block of a model matters")
    command.add_argument("source", type=Path, help="directory of an uncompressed or FP8 model")
    command.add_argument("--save", type=Path, required=True, help="file to write, such as sens.safetensors")
    command.add_argument(
        "--rounding",
        action="store_true",
        help="keep second moments of the inputs as well, for CiuicConfig(calibration=...)",
    )
    command.add_argument("--text", type=Path, help="text to measure on; without it the model writes its own")
    command.add_argument(
        "--tokens",
        type=int,
        help=f"how many tokens (default {TOKENS}, with --rounding {TOKENS_FOR_ROUNDING})",
    )
    command.add_argument("--dtype", default="auto", help="to compute in; default: the model's own")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from ciuic_hf.hf.layer_by_layer import StreamedModel
    from ciuic_hf.hf.probe import SEQUENCE, measure
    from ciuic_hf.planning.moments import Moments

    tokens = arguments.tokens or (TOKENS_FOR_ROUNDING if arguments.rounding else TOKENS)
    if tokens < SEQUENCE:
        raise CiuicError(f"--tokens must be at least {SEQUENCE}, got {tokens}.")
    _check_source(arguments.source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype, None)
    if arguments.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CiuicError(f"--dtype must be auto, float32, bfloat16 or float16, got {arguments.dtype}.")
    if arguments.text:
        ids, source = _text_ids(arguments, tokens), f"text of {arguments.text.name}"
    else:
        ids, source = _own_text(arguments, tokens, device), "text of the model's own"
    streamed = StreamedModel(arguments.source, dtype, device)
    moments = Moments() if arguments.rounding else None
    with _progress("Measuring") as done:
        found = measure(streamed.model, ids.to(device), source, done, moments, streamed.present)
    found.save(arguments.save, moments)
    _show(found)
    print(f"Measured on {found.tokens} tokens, {found.source}; saved to {arguments.save}", end="")
    print(f" ({human_bytes(arguments.save.stat().st_size)}).")
    if moments is not None:
        print(_rounding_text(found, moments))


def _check_source(source: Path) -> None:
    """Raise CiuicError for what cannot be calibrated, before the model writes text for minutes."""
    from transformers import AutoConfig

    from ciuic_hf.hf.layer_by_layer import passive_quantizer
    from ciuic_hf.hf.writers import refusal

    if not (source / "config.json").is_file():
        raise CiuicError(
            f"{source} is not the directory of a model; `ciuic calibrate` reads files that are on this machine."
        )
    config = AutoConfig.from_pretrained(source)
    other = refusal(str(source), config)
    if other is not None:
        raise other
    passive_quantizer(config, source)  # refuses what is compressed already


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar that is told the share that is done."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=1.0)
        yield lambda share: progress.update(task, completed=share)


def _rounding_text(found: Any, moments: Any) -> str:
    """What rounding will know of, in a sentence."""
    inside = {name.partition("/")[0] for name in moments.inputs}
    absent = sum(
        len(found.blocks[name]) - sum(f"{name}/{i}" in moments.inputs for i in range(len(found.blocks[name])))
        for name in inside - moments.inputs.keys()
    )
    text = f"Inputs to round by: {len(moments.factors)}, of {len(inside)} weights."
    return text + (
        f" {absent} experts met too few tokens; they are rounded to the nearest." if absent else ""
    )


def _own_text(arguments: argparse.Namespace, tokens: int, device: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from ciuic_hf.hf.config import CiuicConfig
    from ciuic_hf.hf.probe import own_text

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # and with it the report of this copy
    try:
        writer = AutoModelForCausalLM.from_pretrained(
            arguments.source, quantization_config=CiuicConfig(bits=TEXT_BITS), device_map=device
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    with _progress("Writing text") as done:
        return own_text(writer, tokens, done)


def _text_ids(arguments: argparse.Namespace, tokens: int) -> Any:
    import torch
    from transformers import AutoTokenizer

    from ciuic_hf.hf.probe import SEQUENCE

    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    text = arguments.text.read_text(encoding="utf-8")
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = min(tokens, len(found)) // SEQUENCE
    if rows == 0:
        raise CiuicError(
            f"{arguments.text} has {len(found)} tokens; at least {SEQUENCE} are needed, thousands are better."
        )
    return torch.tensor(found[: rows * SEQUENCE]).view(rows, SEQUENCE)


def _show(found: Any) -> None:
    """Sensitivity by the last part of the name: in all, and the most sensitive parameter's share."""
    groups: dict[str, list[tuple[float, str, int]]] = {}
    for name, values in found.blocks.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        groups.setdefault(kind, []).append((float(values.sum()), name, values.numel()))
    everything = sum(total for group in groups.values() for total, _, _ in group)
    table = Table(box=box.ROUNDED)
    for heading in ("weights", "share of KL", "per block", "most sensitive"):
        left = heading in ("weights", "most sensitive")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for kind, group in sorted(groups.items(), key=lambda item: -sum(total for total, _, _ in item[1])):
        total, blocks = sum(t for t, _, _ in group), sum(n for _, _, n in group)
        table.add_row(kind, f"{100 * total / everything:.1f} %", f"{total / blocks:.2e}", max(group)[1])
    Console().print(table)
