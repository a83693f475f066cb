"""Pictures for a terminal. Every cell is a character as well as a colour, so that they survive a pipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from ciuic_hf.pictures import colours
from ciuic_hf.pictures.compare import Comparison
from ciuic_hf.pictures.curve import Curve, Point
from ciuic_hf.pictures.layers import LayerMap
from ciuic_hf.pictures.matrix import MatrixMap
from ciuic_hf.report import human_bytes, human_count, printable
from ciuic_kernels import codec_by_name
from ciuic_kernels.codecs.grid import GridCodec
from ciuic_kernels.format import ceil_div

_CELLS = (6, 3, 2, 1)  # widths of a cell
_MATRIX_ROWS, _CURVE_ROWS, _CURVE_COLS = 40, 15, 60
_GROUP_32 = {2: "b", 3: "c", 4: "d", 5: "e", 6: "f", 8: "h"}


def layer_map(found: LayerMap, width: int, *, differences: bool = False) -> Text:
    """Rows down, layers across, in bands where the terminal is too narrow for all layers.

    Args:
        width: columns of the terminal.
        differences: the values are changes of bits, not bits.
    """
    out = Text("change of bits per weight, by layer\n" if differences else "bits per weight, by layer\n")
    names = [("  " if row.is_kind else "") + row.label for row in found.rows]
    margin = max(map(len, names), default=0) + 1
    room = max(10, width - margin - 7)
    cell = next((c for c in _CELLS if c * len(found.layers) <= room), 1)
    style = _difference_style(found) if differences else colours.of_bits
    bands = ceil_div(len(found.layers) * cell, room)
    length = ceil_div(len(found.layers), max(1, bands))
    for start in range(0, len(found.layers), max(1, length)):
        band = slice(start, start + length)
        out.append_text(_header(found.layers[band], margin, cell))
        for name, row in zip(names, found.rows, strict=True):
            out.append(f"{name:<{margin}}", style="" if row.is_kind else "bold")
            for value in row.values[band]:
                out.append_text(_cell(value, cell, style, differences))
            total = f" {row.total:+6.2f}" if differences else f" {row.total:6.2f}"
            out.append(total + "\n", style="" if row.is_kind else "bold")
    for name, value in found.outside:
        out.append(
            f"{printable(name)}  {value:+.2f}\n" if differences else f"{printable(name)}  {value:.2f}\n"
        )
    return out


def matrix_map(found: MatrixMap) -> Text:
    """The codecs of a matrix, a character a cell, and what the characters mean."""
    symbols = [_symbol(name) for name in found.codecs]
    shades = [colours.of_rank(i, len(symbols)) for i in range(len(symbols))]
    out = Text(f"{printable(found.title)}: {found.bits:.2f} bits per weight; {found.scale}\n")
    for row, means in zip(found.cells.tolist(), found.means.tolist(), strict=True):
        for place, mean in zip(row, means, strict=True):
            shade = colours.of_rank(mean, len(symbols))
            out.append(symbols[place], style=f"{colours.ink_on(shade)} on {shade}")
        out.append("\n")
    for name, symbol, shade, share in zip(found.codecs, symbols, shades, found.shares, strict=True):
        out.append(f" {symbol} ", style=f"{colours.ink_on(shade)} on {shade}")
        out.append(f" {name}, {codec_by_name(name).bits:.2f} bits, {100 * share:.1f} % of the blocks\n")
    return out


def matrix_cells(width: int) -> tuple[int, int]:
    """How many cells a matrix may take: down, across."""
    return _MATRIX_ROWS, max(10, width)


def curve(found: Curve, names: Sequence[str], width: int) -> Text:
    """The least error at every size as a line of dots, uniform codecs as rings, what was chosen as letters."""
    marks = [chr(ord("A") + i) for i in range(len(found.chosen))] if len(names) > 1 else ["◆"]
    layers: list[tuple[str, str, Sequence[Point]]] = [
        ("·", colours.LINE, found.best),
        ("○", colours.GREY, list(found.uniform.values())),
        *((mark, f"bold {colours.MARK}", [point]) for mark, point in zip(marks, found.chosen, strict=True)),
    ]
    plot = _Plot(
        [point for _, _, points in layers for point in points], min(_CURVE_COLS, max(20, width - 12))
    )
    for mark, style, points in layers:
        for point in points:
            plot.put(point, mark, style)
    out = Text(f"{found.unit} against bits per weight of Linears and experts\n").append_text(plot.text())
    out.append("·", style=colours.LINE).append(" the least at this size   ")
    out.append("○", style=colours.GREY).append(" every block in one codec\n")
    for mark, name, point in zip(marks, names, found.chosen, strict=True):
        out.append(mark, style=f"bold {colours.MARK}")
        out.append(f" {printable(name)}: {point.bits:.2f} bits, {point.error:.3g}\n")
    if not found.measured:
        out.append("By kind of weight, so ratios only; with --sensitivity FILE it is in KL.\n")
    if found.left_out:
        out.append(f"Left out: {found.left_out} weights with sparse or zero blocks.\n")
    return out


def series(lines: Mapping[str, Sequence[tuple[float, float]]], what: str, width: int) -> Text:
    """Several lines of ``(bits, error)``, a letter each."""
    plot = _Plot(
        [Point(*point) for points in lines.values() for point in points],
        min(_CURVE_COLS, max(20, width - 12)),
    )
    marks = [chr(ord("A") + i) for i in range(len(lines))]
    shades = [colours.of_rank(i, max(3, len(lines))) for i in range(len(lines))]
    for mark, shade, points in zip(marks, shades, lines.values(), strict=True):
        for point in points:
            plot.put(Point(*point), mark, f"bold {colours.ink_on(shade)} on {shade}")
    out = Text(what + "\n").append_text(plot.text())
    for mark, shade, name in zip(marks, shades, lines, strict=True):
        out.append(f" {mark} ", style=f"bold {colours.ink_on(shade)} on {shade}").append(
            f" {printable(name)}\n"
        )
    return out


def comparison(found: Comparison) -> Table:
    """Role by role: bits, bytes, and blocks that take more or fewer bytes."""
    table = Table(
        title=f"A: {printable(found.sources[0])}\nB: {printable(found.sources[1])}",
        title_justify="left",
        caption="up, down, same: blocks that take more, fewer, as many bytes",
        caption_justify="left",
        box=box.ROUNDED,
    )
    for heading in ("role", "bits", "bytes", "up", "down", "same"):
        table.add_column(heading, justify="left" if heading == "role" else "right", no_wrap=True)
    for change in found.roles:
        if change is found.roles[-1]:
            table.add_section()
        bits, nbytes = change.bits, change.nbytes
        table.add_row(
            Text(printable(change.role)), f"{bits[0]:.2f} → {bits[1]:.2f}",
            f"{human_bytes(nbytes[0])} → {human_bytes(nbytes[1])}",
            human_count(change.up), human_count(change.down), human_count(change.same),
        )  # fmt: skip
    return table


def _difference_style(found: LayerMap) -> Callable[[float], str]:
    finite = [abs(v) for row in found.rows for v in row.values if not math.isnan(v)]
    largest = max([0.5, *finite])
    return lambda value: colours.of_difference(value, largest)


def _header(layers: Sequence[int], margin: int, cell: int) -> Text:
    """Numbers of layers, as many as fit side by side."""
    line, free = [" "] * (margin + cell * len(layers) + 3), 0
    for place, layer in enumerate(layers):
        at = margin + place * cell
        if at >= free and (cell > 1 or layer % 5 == 0 or place == 0):
            line[at : at + len(str(layer))] = str(layer)
            free = at + len(str(layer)) + 1
    return Text("".join(line).rstrip() + "\n", style="dim")


def _cell(value: float, width: int, style: Callable[[float], str], signed: bool) -> Text:
    if math.isnan(value):
        return Text(" " * width)
    shade = style(value)
    if width >= 6:
        label = f"{value:+.2f}" if signed else f"{value:.2f}"
    elif width == 3 and signed:
        label = f"{value:+.0f}"
    elif signed:
        label = "=" if abs(value) < 0.005 else "+" if value > 0 else "-"
    else:
        label = f"{value:.0f}" if width > 1 or value < 9.5 else "R"
    return Text(f"{label:^{width}}"[:width], style=f"{colours.ink_on(shade)} on {shade}")


def _symbol(name: str) -> str:
    codec = codec_by_name(name)
    if isinstance(codec, GridCodec):
        return str(codec.width) if codec.group == 64 else _GROUP_32[codec.width]
    return {"zero": "0", "raw_bf16": "R", "raw_fp16": "r"}.get(name, "s")


class _Plot:
    """Characters on a canvas whose vertical axis is logarithmic."""

    def __init__(self, points: Sequence[Point], cols: int) -> None:
        self.cols = cols
        self.left, self.right = min(p.bits for p in points), max(p.bits for p in points)
        errors = [math.log10(p.error) for p in points if p.error > 0]
        self.bottom, self.top = min(errors, default=0.0), max(errors, default=1.0)
        self.canvas = [[(" ", "")] * cols for _ in range(_CURVE_ROWS)]

    def put(self, point: Point, mark: str, style: str) -> None:
        height = math.log10(point.error) if point.error > 0 else self.bottom
        self.canvas[self._row(height)][self._col(point.bits)] = (mark, style)

    def _row(self, height: float) -> int:
        return round((self.top - height) / max(1e-9, self.top - self.bottom) * (_CURVE_ROWS - 1))

    def _col(self, bits: float) -> int:
        return round((bits - self.left) / max(1e-9, self.right - self.left) * (self.cols - 1))

    def text(self) -> Text:
        labels = {
            self._row(math.log10(tick)): f"{tick:g}"
            for power in range(math.floor(self.bottom), math.ceil(self.top) + 1)
            for tick in (10.0**power,)
            if self.bottom <= power <= self.top
        }
        out = Text()
        for number, row in enumerate(self.canvas):
            out.append(f"{labels.get(number, ''):>8} {'┤' if number in labels else '│'}", style="dim")
            for mark, style in row:
                out.append(mark, style=style)
            out.append("\n")
        axis, under = ["─"] * self.cols, [" "] * (self.cols + 2)
        for bits in range(math.ceil(self.left), math.floor(self.right) + 1):
            axis[self._col(bits)] = "┴"
            under[self._col(bits)] = str(bits)
        return out.append(
            " " * 9 + "└" + "".join(axis) + "\n" + " " * 10 + "".join(under) + "\n", style="dim"
        )
