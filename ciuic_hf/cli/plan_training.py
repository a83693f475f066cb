"""``ciuic plan MODEL --train lora``: options, and the screen."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ciuic_hf.cli.plan_screen import bar, line
from ciuic_hf.errors import CiuicError
from ciuic_hf.presets import card_named, card_nbytes
from ciuic_hf.report import human_bytes, human_count

_OPTIONS = (
    "seq", "rank", "targets", "lora_dropout", "activation_bits", "checkpointing", "optimizer",
)  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("training")
    group.add_argument("--train", choices=("lora",), help="plan a training step in place of generation")
    group.add_argument("--seq", type=int, help="tokens of a sequence (default 2048)")
    group.add_argument("--rank", type=int, help="of the adapters (default 16)")
    group.add_argument(
        "--targets", help="attention, mlp, experts, all-linear or names, with commas (default attention)"
    )
    group.add_argument("--lora-dropout", type=float, help="before the adapters (default 0)")
    group.add_argument("--activation-bits", type=int, choices=(8, 4, 2), help="of compress_activations")
    group.add_argument("--checkpointing", action="store_true", default=None, help="recompute layers")
    group.add_argument("--optimizer", choices=("adamw", "sgd"), help="(default adamw)")


def refuse_without_train(arguments: argparse.Namespace) -> None:
    """Raise CiuicError where options of training come without ``--train``."""
    for name in _OPTIONS:
        if getattr(arguments, name) is not None:
            raise CiuicError(f"--{name.replace('_', '-')} is of a training plan; add --train lora.")


def run(arguments: argparse.Namespace) -> None:
    from ciuic_hf.hf.planner import meta_model
    from ciuic_hf.hf.source import open_source
    from ciuic_hf.hf.training_planner import TrainingOutlook

    request = _request(arguments)
    source = open_source(arguments.source, arguments.revision)
    found = TrainingOutlook(source, meta_model(source), request).describe()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found, Console())
    if found["fits"] is False:
        raise CiuicError(_refusal(found))


def _request(arguments: argparse.Namespace) -> Any:
    from ciuic_hf.hf.training_planner import TrainingRequest
    from ciuic_hf.planning.memory import parse_size

    for name in ("context", "cache_bits", "sensitivity", "save"):
        if getattr(arguments, name) is not None:
            instead = "; use --seq" if name == "context" else ""
            raise CiuicError(f"--{name.replace('_', '-')} is of a plan for generation{instead}.")
    if arguments.count != 1:
        raise CiuicError("Training is planned for one device; leave out --count.")
    if arguments.gpu and arguments.memory:
        raise CiuicError("--gpu and --memory contradict each other; give one of them.")
    if arguments.device == "cpu" and arguments.gpu:
        raise CiuicError("--device cpu is one device of --memory; leave out --gpu.")
    dropout = arguments.lora_dropout or 0.0
    if not 0 <= dropout < 1:
        raise CiuicError(f"--lora-dropout is a share from 0 to below 1, got {dropout:g}.")
    card = card_named(arguments.gpu) if arguments.gpu else None
    return TrainingRequest(
        length=2048 if arguments.seq is None else arguments.seq,
        batch=arguments.batch,
        targets=tuple(part.strip() for part in (arguments.targets or "attention").split(",")),
        rank=16 if arguments.rank is None else arguments.rank,
        dropout=dropout,
        bits=4.25 if arguments.bits is None else arguments.bits,
        memory=card_nbytes(card) if card else parse_size(arguments.memory) if arguments.memory else None,
        card=card,
        device=arguments.device,
        activation_bits=arguments.activation_bits,
        checkpointing=bool(arguments.checkpointing),
        optimizer=arguments.optimizer or "adamw",
    )


def show(found: dict[str, Any], console: Console) -> None:
    """Print a plan as ``TrainingOutlook.describe`` has it."""
    line(console, _headline(found))
    bar(found, console)
    line(console, "")
    line(console, _how(found))
    _alternatives(found, console)


def _headline(found: dict[str, Any]) -> str:
    total, memory = found["nbytes"], found["memory"]
    step = f"a LoRA step of {found['batch']:,} x {found['sequence']:,} tokens takes {human_bytes(total)}"
    if memory is None:
        return f"{found['model']}: {step}."
    where = found["card"] or human_bytes(memory)
    verdict = "fits on" if found["fits"] else "does not fit on"
    return (
        f"{found['model']} {verdict} {where}: {step} of {human_bytes(memory)}, {100 * total / memory:.1f} %"
    )


def _how(found: dict[str, Any]) -> str:
    bits = found["activation_bits"]
    saved = f"activations at {bits} bits" if bits else "activations in full"
    recomputed = ", layers recomputed" if found["checkpointing"] else ""
    limit = found["max_position_embeddings"]
    beyond = f" The model was made for {limit:,} tokens." if limit and found["sequence"] > limit else ""
    return (
        f"Counted: weights frozen at {found['bits']:.2f} bits; {human_count(found['adapter_parameters'])} parameters "
        f"of rank {found['rank']} on {', '.join(found['adapted'])}, float32; {found['optimizer']}; {saved}"
        f"{recomputed}; loss over all logits in float32.{beyond}"
    )


def _alternatives(found: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["choice", "memory"]
    if found["memory"] is not None:
        headings += ["", f"longest at {found['batch']:,}", f"batch at {found['sequence']:,}"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "choice" else "right")
    for row in found["alternatives"]:
        cells = [row["choice"], human_bytes(row["nbytes"])]
        if found["memory"] is not None:
            cells += ["fits" if row["fits"] else "too much"]
            cells += [f"{row[key]:,}" if row[key] else "-" for key in ("longest_sequence", "largest_batch")]
        table.add_row(*cells)
    console.print(table)


def _refusal(found: dict[str, Any]) -> str:
    """One sentence: what is needed, and everything that would do."""
    plan, *others = found["alternatives"]
    ways = [row["choice"] for row in others if row["fits"]]
    ways += [f"--seq {plan['longest_sequence']}"] if plan["longest_sequence"] else []
    ways += [f"--batch {plan['largest_batch']}"] if plan["largest_batch"] else []
    needed = f"Does not fit: it needs {human_bytes(found['nbytes'])} and has {human_bytes(found['memory'])}"
    if not ways:
        return f"{needed}; no one change would do: see --json for what each takes."
    return f"{needed}; what would fit: {', or '.join(ways)}."
