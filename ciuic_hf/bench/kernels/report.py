"""The tables that ``ciuic bench kernels`` prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ciuic_hf.bench.kernels.end_to_end import FillRow
from ciuic_hf.bench.kernels.products import CUBLAS, ProductRow
from ciuic_hf.bench.kernels.result import Result

SHOWN_TOKENS = (1, 8, 64, 2048)
SHOWN_FAILURES = 20


def report(result: Result) -> Iterator[RenderableType]:
    """Everything to print; a red gate is all there is to say."""
    yield Text(str(result.machine))
    yield _gate(result)
    if not result.green or result.ceilings is None:
        return
    ceilings = result.ceilings
    yield Text(
        f"copy {ceilings.copy_bandwidth / 1e9:.0f} GB/s, dense bf16 {ceilings.dense_rate / 1e12:.0f} TFLOP/s, "
        f"measured; {1e6 * ceilings.empty:.1f} us of every time are the start of a graph"
    )
    yield from _products(result)
    if result.others:
        yield _others(result)
    if result.generated:
        yield _generation(result)
    for fill in result.fills:
        yield _fill(fill)
    yield _bar(result)
    if result.not_measured:
        yield Text("Not measured:\n" + "\n".join(f"  {what}" for what in result.not_measured))
    yield Text(f"{result.seconds:.0f} seconds in all, {result.state}")


def _gate(result: Result) -> Text:
    if not result.cases:
        return Text(f"gate: not run; {result.state}", style="red")
    if result.green:
        return Text(f"gate: {result.cases} cases right, against float64", style="green")
    lines = [f"gate: RED, {len(result.failures)} failures in {result.cases} cases; no speed is measured"]
    lines += [f"  {failure.case}: {failure.what}" for failure in result.failures[:SHOWN_FAILURES]]
    more = len(result.failures) - SHOWN_FAILURES
    return Text("\n".join(lines + ([f"  and {more} more"] if more > 0 else [])), style="red")


def _products(result: Result) -> Iterator[Table]:
    """A table for each number of bits; the picture and the JSON have all tokens."""
    peers = sorted({name for row in result.products for name in row.peers} - {CUBLAS})
    for bits in sorted({row.bits for row in result.products}):
        title = f"{bits:g} bits; all {len(result.products)} rows are in the JSON"
        shown = Table(title=title, box=box.ROUNDED)
        shown.add_column("weight")
        for heading in (
            "tokens",
            "us",
            "GB/s stored",
            "of copy",
            "x cuBLAS",
            *(f"x {name}" for name in peers),
        ):
            shown.add_column(heading, justify="right")
        name = ""
        for row in result.products:
            if row.bits != bits or row.tokens not in SHOWN_TOKENS:
                continue
            size = " x ".join(map(str, row.shape))
            shown.add_row(f"{row.name} [{size}]" if row.name != name else "", *_cells(result, row, peers))
            name = row.name
        if shown.rows:
            yield shown


def _cells(result: Result, row: ProductRow, peers: list[str]) -> list[str]:
    if row.seconds is None or row.bandwidth is None:
        return [str(row.tokens), row.errors.get("ciuic", "")]
    share = result.share(row)
    ratios = [row.ratio(peer) for peer in (CUBLAS, *peers)]
    return [
        str(row.tokens),
        f"{1e6 * row.seconds:.1f}",
        f"{row.bandwidth / 1e9:.0f}",
        "" if share is None else f"{share:.0%}",
        *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
    ]


def _others(result: Result) -> Table:
    shown = Table(title="attention, siblings, dequantize", box=box.ROUNDED)
    for heading in ("what", "bits", "tokens", "us", "of copy", "faster than"):
        left = heading in ("what", "faster than")
        shown.add_column(heading, justify="left" if left else "right")
    for row in result.others:
        name, share = f"{row.kind}, {row.name}", result.share(row)
        if row.seconds is None or share is None:
            shown.add_row(name, f"{row.bits:g}", str(row.tokens), row.errors.get("ciuic", ""))
            continue
        ratios = ", ".join(f"{seconds / row.seconds:.2f}x {peer}" for peer, seconds in row.peers.items())
        shown.add_row(
            name, f"{row.bits:g}", str(row.tokens), f"{1e6 * row.seconds:.1f}", f"{share:.0%}", ratios
        )
    return shown


def _fill(fill: FillRow) -> Text:
    if fill.ratio is None or fill.peak_nbytes is None:
        return Text(f"memory: not measured: {fill.error}")
    peak, predicted = fill.peak_nbytes / 2**30, fill.predicted_nbytes / 2**30
    return Text(
        f"memory: {fill.tokens} tokens in sequences of {fill.context} took {peak:.2f} GiB of {predicted:.2f} GiB "
        f"planned, {fill.ratio:.1%}; the promise is 97 % to 100 %",
        style="green" if 0.97 <= fill.ratio <= 1 else "yellow",
    )


def _generation(result: Result) -> Table:
    title = "generate, random weights in the sizes of DeepSeek-V2-Lite, static cache"
    shown = Table(title=title, box=box.ROUNDED)
    for heading in ("batch", "CUDA graphs", "model", "tokens/s", "x bf16", "peak GiB"):
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    rows = sorted(result.generated, key=lambda r: (r.batch, r.graphs, r.model))
    dense = {(r.batch, r.graphs): r.tokens_per_second for r in rows if r.model == "bf16"}
    for row in rows:
        base, graphs = dense.get((row.batch, row.graphs)), "on" if row.graphs else "off"
        graphs += f", {row.skipped} skipped" if row.skipped else ""
        if row.tokens_per_second is None:
            shown.add_row(str(row.batch), graphs, row.model, row.error)
            continue
        peak = "" if row.peak_nbytes is None else f"{row.peak_nbytes / 2**30:.1f}"
        ratio = f"{row.tokens_per_second / base:.2f}x" if base else ""
        shown.add_row(str(row.batch), graphs, row.model, f"{row.tokens_per_second:.1f}", ratio, peak)
    return shown


def _bar(result: Result) -> Table:
    shown = Table(title="the bar: the worst case of each line", box=box.ROUNDED)
    for heading in ("what", "unit", "floor", "goal", "measured", "met", "worst case"):
        shown.add_column(heading, justify="right" if heading in ("floor", "goal", "measured") else "left")
    colours = {"goal": "green", "floor": "yellow", "not met": "red", "not measured": "dim"}
    for line in result.bar():
        measured = "" if line.measured is None else f"{line.measured:.2f}"
        verdict = Text(line.verdict, style=colours[line.verdict])
        shown.add_row(line.what, line.unit, f"{line.floor:g}", f"{line.goal:g}", measured, verdict, line.of)
    return shown
