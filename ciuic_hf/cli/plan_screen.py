"""What ``ciuic plan`` prints: one screen."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ciuic_hf.report import ROLE_ORDER, human_bytes, human_count

_COLOURS = (
    "cyan", "green", "magenta", "yellow", "blue", "red", "bright_cyan", "bright_green", "white", "bright_blue",
)  # fmt: skip
_BAR = 96


def show(found: dict[str, Any], console: Console) -> None:
    """Print a plan as :func:`ciuic_hf.hf.plan_description.describe` has it."""
    line(console, _headline(found))
    if found["files"] is not None:
        line(console, _files(found["files"]))
    bar(found, console)
    _roles(found, console)
    line(console, _quality(found))
    line(console, _speed(found))
    line(console, _limits(found))
    if found.get("cache_choice"):
        line(console, found["cache_choice"])
    if found["device_map"] is not None:
        line(console, _split(found))
    _alternatives(found, console)


def line(console: Console, text: str) -> None:
    """Print text as it is."""
    console.print(text, highlight=False, markup=False)


def _headline(found: dict[str, Any]) -> str:
    total, memory = found["nbytes"], found["memory"]
    what = f"{found['bits']:.2f} bits per weight, {human_bytes(total)}"
    if memory is None:
        return f"{found['model']}: {what}"
    card = found["card"] or f"{human_bytes(memory / found['count'])}"
    where = f"{found['count']} x {card}" if found["count"] > 1 else card
    return f"{found['model']} fits on {where}: {what} of {human_bytes(memory)}, {100 * total / memory:.1f} %"


def _files(files: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{name} {human_bytes(nbytes)}" for name, nbytes in files["dtypes"].items())
    if len(files["absent"]) == files["count"]:
        return f"Weights: {files['count']} files by the index, none of them here."
    absent = f"; {len(files['absent'])} of them are not here yet" if files["absent"] else ""
    number = f"{files['count']} files" if files["count"] > 1 else "1 file"
    return f"Weights as published: {human_bytes(files['nbytes'])} in {number} ({dtypes}){absent}."


def bar(found: dict[str, Any], console: Console) -> None:
    """Print ``found["budget"]`` as a bar with a legend, of ``memory`` where that is more."""
    filled, legend, width = Text(), Table.grid(padding=(0, 2)), min(_BAR, console.width)
    whole = max(found["nbytes"], found["memory"] or 0)
    cells: list[Any] = []
    shown = {purpose: nbytes for purpose, nbytes in found["budget"].items() if nbytes}
    for colour, (purpose, nbytes) in zip(_COLOURS, shown.items(), strict=False):
        filled.append("█" * round(width * nbytes / whole), style=colour)
        cells += [Text("█ " + purpose, style=colour), Text(human_bytes(nbytes), justify="right")]
    filled.append("░" * max(0, width - len(filled)))
    for start in range(0, len(cells), 6):
        legend.add_row(*cells[start : start + 6])
    console.print(filled[:width], legend)


def _roles(found: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("role", "weights", "bits", "bytes"):
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for role in sorted(found["roles"], key=lambda r: (ROLE_ORDER.get(r, len(ROLE_ORDER)), r)):
        row = found["roles"][role]
        table.add_row(role, human_count(row["weights"]), f"{row['bits']:.2f}", human_bytes(row["nbytes"]))
    console.print(table)


def _quality(found: dict[str, Any]) -> str:
    added = found["reference_cache_kl"]
    cache = (
        ""
        if added is None
        else f" Its cache added {added:.3f} to that of SmolLM2 135M, without a forecast here."
    )
    return _weights_quality(found) + cache


def _weights_quality(found: dict[str, Any]) -> str:
    if found["predicted_kl"] is not None:
        return f"Quality: KL to the original {found['predicted_kl']:.3f} nats per token, by measured sensitivities."
    reference = found["reference_quality"]
    if reference is None:
        return "Quality: nothing was measured at so few bits; expect a damaged model."
    return (
        f"Quality: not predicted without --sensitivity; {reference['model']} has KL {reference['kl']:.3f} and "
        f"{100 * reference['top1']:.0f} % same next tokens at these bits."
    )


def _speed(found: dict[str, Any]) -> str:
    history = found["step_history_nbytes"]
    weights = human_bytes(found["step_nbytes"] - history)
    step = f"a step reads {weights} of weights and moves {human_bytes(history)} of history"
    if found["tokens_per_second"] is None:
        return f"Speed: {step}; with --gpu this becomes a bound in tokens per second."
    return f"Speed: at most {_rate(found['tokens_per_second'])} tokens/s (memory roofline, not measured): {step}."


def _limits(found: dict[str, Any]) -> str:
    sequences = f"{found['batch']} sequence{'s' if found['batch'] > 1 else ''}"
    cache = f", cache at {found['cache_bits']} bits" if found["cache_bits"] else ""
    counted = f"Counted for {found['context']:,} tokens in {sequences}{cache}{_pieces(found)}"
    limit = found["max_position_embeddings"]
    beyond = f", more than the {limit:,} the model was made for" if limit and found["context"] > limit else ""
    if found["memory"] is None:
        return f"{counted}{beyond}."
    most = " (all the model was made for)" if found["longest_context"] == limit else ""
    return (
        f"{counted}{beyond}; beside these weights fit {found['longest_context']:,} tokens{most}, or "
        f"{found['largest_batch']:,} sequence{'s' if found['largest_batch'] > 1 else ''}."
    )


def _pieces(found: dict[str, Any]) -> str:
    chunk = found["prefill_chunk"]
    if chunk is None or chunk >= found["context"]:
        return ""
    return f", prompt in pieces of {chunk:,}"


def _split(found: dict[str, Any]) -> str:
    layers: dict[Any, int] = {}
    for name, device in found["device_map"].items():
        layers[device] = layers.get(device, 0) + (name.rpartition(".")[2].isdigit())
    numbers = " ".join(str(n) for n in layers.values())
    return f"Layers on each device: {numbers}; they work in turn (device_map, in --json and --save)."


def _alternatives(found: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    measured = found["predicted_kl"] is not None
    each = "memory" if found["count"] == 1 else "memory of each"
    headings = ["choice", each, "bits", "KL" if measured else "KL there", "longest context", "tokens/s"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "choice" else "right")
    for row in found["alternatives"]:
        if row["bits"] is None:
            table.add_row(row["choice"], human_bytes(row["memory"]), "does not fit", "", "", "")
            continue
        kl = row["predicted_kl"] if measured else (row["reference"] or {}).get("kl")
        table.add_row(
            row["choice"],
            human_bytes(row["memory"]),
            f"{row['bits']:.2f}",
            "-" if kl is None else f"{kl:.3f}",
            f"{row['longest_context']:,}" if row["longest_context"] else "-",
            "-" if row["tokens_per_second"] is None else _rate(row["tokens_per_second"]),
        )
    console.print(table)


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"
