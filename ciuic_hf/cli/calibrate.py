"""``ciuic calibrate SRC --save FILE``: how much each block of a model matters, for plans."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ciuic_hf.errors import CiuicError


def add_command(commands: Any) -> None:
    command = commands.add_parser("calibrate", help="measure how much each block of a model matters")
    command.add_argument("source", type=Path, help="directory of an uncompressed model")
    command.add_argument("--save", type=Path, required=True, help="file to write, such as sens.safetensors")
    command.add_argument("--text", type=Path, help="text to measure on; without it the model writes its own")
    command.add_argument("--tokens", type=int, default=1536, help="how many tokens (default 1536)")
    command.add_argument("--dtype", default="auto", help="to compute in; default: the model's own")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from ciuic_hf.checkpoint import read_config
    from ciuic_hf.hf.probe import SEQUENCE, measure, own_text

    if read_config(arguments.source).get("quantization_config"):
        raise CiuicError(
            f"{arguments.source} is quantized; sensitivities are measured on the uncompressed model, which has to fit "
            "into memory."
        )
    if arguments.tokens < SEQUENCE:
        raise CiuicError(f"--tokens must be at least {SEQUENCE}, got {arguments.tokens}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = _text_ids(arguments) if arguments.text else None
    model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=arguments.dtype).to(device).eval()
    source = f"text of {arguments.text.name}" if arguments.text else "text of the model's own"
    if ids is None:
        ids = own_text(model, arguments.tokens)
    steps = iter(track(range(len(ids)), description="Measuring", transient=True))
    next(steps)
    found = measure(model, ids.to(device), source, done=lambda _n: next(steps, None))
    found.save(arguments.save)
    _show(found)
    print(f"Measured on {found.tokens} tokens, {found.source}; saved to {arguments.save}.")


def _text_ids(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoTokenizer

    from ciuic_hf.hf.probe import SEQUENCE

    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    text = arguments.text.read_text(encoding="utf-8")
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = min(arguments.tokens, len(found)) // SEQUENCE
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
        table.add_column(heading, justify="left" if heading in ("weights", "most sensitive") else "right")
    for kind, group in sorted(groups.items(), key=lambda item: -sum(total for total, _, _ in item[1])):
        total, blocks = sum(t for t, _, _ in group), sum(n for _, _, n in group)
        table.add_row(kind, f"{100 * total / everything:.1f} %", f"{total / blocks:.2e}", max(group)[1])
    Console().print(table)
