"""``ciuic plan MODEL``: what a model would take and what its bits would be, from config.json alone."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ciuic_hf.errors import CiuicError
from ciuic_hf.presets import read_preset

_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "red", "bright_cyan", "bright_green", "white")
_BAR = 72


def add_command(commands: Any) -> None:
    command = commands.add_parser("plan", help="choose bits for a card or a size before loading anything")
    command.add_argument("source", type=Path, help="directory of a model, or its config.json")
    command.add_argument("--gpu", help="card of configs/cards.json, such as H100")
    command.add_argument("--memory", help='instead of --gpu: a size such as "22GiB"')
    command.add_argument("--bits", type=float, help="instead of both: bits per weight")
    command.add_argument("--context", type=int, default=8192, help="tokens of a sequence (default 8192)")
    command.add_argument("--batch", type=int, default=1, help="sequences at once (default 1)")
    command.add_argument("--sensitivity", type=Path, help="file of `ciuic calibrate`")
    command.add_argument("--save", type=Path, help="write the plan, for CiuicConfig(plan=...)")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ciuic_hf.hf.choosing import choose

    model = _meta_model(arguments.source)
    config, memory = _config(arguments)
    choice = choose(model, config, model.dtype, arguments.context, arguments.batch)
    found = _describe(choice, model, arguments, memory)
    if arguments.save:
        settings = {key: found[key] for key in ("memory", "context", "batch", "bits")}
        choice.plan(settings).save(arguments.save)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found, Console())
        if arguments.save:
            print(f"Saved to {arguments.save}; load with CiuicConfig(plan={str(arguments.save)!r}).")


def _meta_model(source: Path) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not source.exists():
        raise CiuicError(f"{source} is not there; give the directory of a model or its config.json.")
    config = AutoConfig.from_pretrained(source)
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None and quantized.get("quant_method") != "fp8":
        raise CiuicError(
            f"{source} is {quantized.get('quant_method')} already; plans are made for bf16 and FP8 models."
        )
    if quantized is not None:
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)


def _config(arguments: argparse.Namespace) -> tuple[Any, int | None]:
    """The CiuicConfig that was asked for, and its memory in bytes."""
    from ciuic_hf.hf.config import CiuicConfig
    from ciuic_hf.planning.memory import parse_size

    given = [n for n in ("gpu", "memory", "bits") if getattr(arguments, n) is not None]
    if len(given) > 1:
        raise CiuicError(f"--{given[0]} and --{given[1]} contradict each other; give one of them.")
    options: dict[str, Any] = {"sensitivity": arguments.sensitivity}
    if not given or given == ["bits"]:
        return CiuicConfig(bits=4.25 if arguments.bits is None else arguments.bits, **options), None
    memory = parse_size(arguments.memory) if arguments.memory else _card_nbytes(arguments.gpu)
    return CiuicConfig(memory=memory, context=arguments.context, batch=arguments.batch, **options), memory


def _card(name: str) -> dict[str, Any]:
    cards = {key.lower(): card for key, card in read_preset("cards")["cards"].items()}
    if name.lower() not in cards:
        known = ", ".join(read_preset("cards")["cards"])
        raise CiuicError(f'No card is named {name!r}; choose one of {known}, or say --memory "22GiB".')
    return dict(cards[name.lower()])


def _card_nbytes(name: str) -> int:
    return int(_card(name)["mib"] - read_preset("cards")["reserved_mib"]) << 20


def _describe(choice: Any, model: Any, arguments: argparse.Namespace, memory: int | None) -> dict[str, Any]:
    """Everything that is shown."""
    from ciuic_hf.hf.choosing import stored_nbytes
    from ciuic_hf.planning.memory import largest_fitting
    from ciuic_kernels import BlockGrid

    weights: dict[str, int] = defaultdict(int)
    nbytes: dict[str, int] = defaultdict(int)
    for target in choice.targets:
        if target.name not in choice.tied:
            weights[target.role] += BlockGrid(target.shape).numel
            nbytes[target.role] += stored_nbytes(target)
    roles = {
        role: {"weights": count, "nbytes": nbytes[role], "bits": 8 * nbytes[role] / count}
        for role, count in weights.items()
    }
    budget = choice.budget()
    total = sum(budget.values())
    found: dict[str, Any] = {
        "model": str(arguments.source),
        "memory": memory,
        "context": arguments.context,
        "batch": arguments.batch,
        "bits": choice.bits,
        "predicted_kl": choice.error,
        "nbytes": total,
        "budget": budget,
        "roles": roles,
    }
    if memory is not None:
        text = model.config.get_text_config().to_dict()
        room = memory - (total - choice.beside.total)
        found["longest_context"] = largest_fitting(text, room, model.dtype.itemsize, batch=arguments.batch)
        found["largest_batch"] = largest_fitting(text, room, model.dtype.itemsize, context=arguments.context)
    return found


def _show(found: dict[str, Any], console: Console) -> None:
    from ciuic_hf.report import human_bytes, human_count

    memory, total = found["memory"], found["nbytes"]
    of = f" of {human_bytes(memory)}, {100 * total / memory:.1f} %" if memory else ""
    console.print(
        f"[bold]{found['model']}[/bold]: {found['bits']:.2f} bits per weight, {human_bytes(total)}{of}",
        highlight=False,
    )
    bar = Text()
    legend = Table.grid(padding=(0, 2))
    whole = max(total, memory or 0)
    for colour, (purpose, nbytes) in zip(_COLOURS, found["budget"].items(), strict=False):
        bar.append("█" * round(_BAR * nbytes / whole), style=colour)
        legend.add_row(Text("█ " + purpose, style=colour), human_bytes(nbytes))
    bar.append("░" * max(0, _BAR - len(bar)))
    console.print(bar, legend)
    table = Table(box=box.ROUNDED)
    for heading in ("role", "weights", "bits", "bytes"):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for role, row in found["roles"].items():
        table.add_row(role, human_count(row["weights"]), f"{row['bits']:.2f}", human_bytes(row["nbytes"]))
    console.print(table)
    if found["predicted_kl"] is not None:
        console.print(
            f"Predicted KL to the original: {found['predicted_kl']:.3f} nats per token.", highlight=False
        )
    console.print(
        f"Counted for {found['context']:,} tokens in {found['batch']} sequence(s).", highlight=False
    )
    if memory is not None:
        console.print(
            f"With these weights the longest context is {found['longest_context']:,} tokens, the largest batch "
            f"{found['largest_batch']:,}.",
            highlight=False,
        )
