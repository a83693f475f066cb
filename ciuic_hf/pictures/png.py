"""The same pictures as PNG. matplotlib is imported when a picture is drawn; it is in the ``demo`` extra."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.pictures import colours
from ciuic_hf.pictures.compare import Comparison
from ciuic_hf.pictures.curve import Curve, Point
from ciuic_hf.pictures.layers import LayerMap
from ciuic_hf.pictures.matrix import MatrixMap
from ciuic_hf.report import human_bytes
from ciuic_kernels import codec_by_name

PNG_CELLS = 512, 512  # of a matrix: down, across
_DPI = 130
_WRITTEN_LAYERS = 16  # with more, a cell is too small for a number


def require_matplotlib() -> None:
    """Raises CiuicError when no picture could be drawn: better before the work than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CiuicError("Drawing needs matplotlib: pip install 'ciuic-hf[demo]'.") from None


def draw_model(path: Path, found: LayerMap, curve: Curve | None, names: Sequence[str], title: str) -> None:
    """The map of a model above its rate-distortion curve."""
    figure, top, bottom = _map_and_curve(found, curve)
    _draw_layers(figure, top, found, differences=False)
    if curve is not None:
        _draw_curve(bottom, curve, names)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=_DPI)


def draw_comparison(path: Path, found: Comparison, curve: Curve | None) -> None:
    """Where the bits went: the map of differences above the curve with both choices."""
    figure, top, bottom = _map_and_curve(found.difference, curve)
    _draw_layers(figure, top, found.difference, differences=True)
    if curve is not None:
        _draw_curve(
            bottom, curve, [f"{mark}: {_short(s)}" for mark, s in zip("AB", found.sources, strict=True)]
        )
    total = found.roles[-1]
    sizes = [f"{_short(s)} ({human_bytes(n)})" for s, n in zip(found.sources, total.nbytes, strict=True)]
    figure.suptitle(f"from A, {sizes[0]}, to B, {sizes[1]}", fontsize=12)
    figure.savefig(path, dpi=_DPI)


def draw_matrix(path: Path, found: MatrixMap) -> None:
    """The codecs of one matrix."""
    require_matplotlib()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    down, across = found.cells.shape
    figure = Figure(figsize=(9.5, min(8.0, max(3.0, 1.6 + 7 * down / across))), layout="constrained")
    axes = figure.add_subplot()
    shades = [colours.of_rank(i, len(found.codecs)) for i in range(len(found.codecs))]
    cmap = LinearSegmentedColormap.from_list("codecs", shades * 2 if len(shades) == 1 else shades)
    axes.imshow(
        found.means.numpy(), cmap=cmap,
        vmin=0, vmax=max(1, len(shades) - 1), aspect="auto",
        interpolation="nearest",
        extent=(0, across * found.kblocks_a_cell, down * found.strips_a_cell, 0),
    )  # fmt: skip
    axes.set_xlabel("block of 128 input columns")
    axes.set_ylabel("strip of 64 output rows")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    legend = [
        Patch(
            facecolor=shade,
            edgecolor=colours.GREY,
            label=f"{name}\n{codec_by_name(name).bits:.2f} bits, {100 * share:.1f} %",
        )
        for name, shade, share in zip(found.codecs, shades, found.shares, strict=True)
    ]
    figure.legend(
        handles=legend[::-1],
        loc="outside right upper",
        fontsize=9,
        frameon=False,
        title="codec, share of blocks",
    )
    axes.set_title(f"{found.title}: {found.bits:.2f} bits per weight\n{found.scale}", fontsize=10)
    figure.savefig(path, dpi=_DPI)


def _short(source: str) -> str:
    return Path(source).name


def _map_and_curve(found: LayerMap, curve: Curve | None) -> tuple[Any, Any, Any]:
    """A figure, the axes of the map, and those of the curve or None."""
    require_matplotlib()
    from matplotlib.figure import Figure

    width = min(16.0, max(8.0, 3.5 + 0.19 * len(found.layers)))
    height = 1.3 + 0.27 * len(found.rows)
    if curve is None:
        figure = Figure(figsize=(width, height + 0.5), layout="constrained")
        return figure, figure.add_subplot(), None
    figure = Figure(figsize=(width, height + 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(height, 4.4))
    return figure, top, bottom


def _draw_layers(figure: Any, axes: Any, found: LayerMap, *, differences: bool) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    values = [row.values for row in found.rows]
    largest = max([0.5, *(abs(v) for row in values for v in row if not math.isnan(v))])
    scale = colours.PUOR if differences else colours.VIRIDIS
    cmap = LinearSegmentedColormap.from_list("ciuic", scale).with_extremes(over=colours.OVER)
    norm = Normalize(-largest, largest) if differences else Normalize(colours.LOW_BITS, colours.HIGH_BITS)
    for y, across in enumerate(values):
        for x, value in enumerate(across):
            if math.isnan(value):
                continue
            shade = colours.of_difference(value, largest) if differences else colours.of_bits(value)
            axes.add_patch(_box(x, y, shade))
            if len(found.layers) <= _WRITTEN_LAYERS:
                text = f"{value:+.2f}" if differences else f"{value:.2f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colours.ink_on(shade))
    axes.set_xlim(-0.5, len(found.layers) - 0.5)
    axes.set_ylim(len(values) - 0.5, -0.5)
    step = max(1, math.ceil(len(found.layers) / 31))
    axes.set_xticks(range(0, len(found.layers), step), found.layers[::step], fontsize=8)
    axes.set_yticks(
        range(len(values)), [f"{'   ' if row.is_kind else ''}{row.label}" for row in found.rows], fontsize=9
    )
    for label, row in zip(axes.get_yticklabels(), found.rows, strict=True):
        label.set_fontweight("normal" if row.is_kind else "bold")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel("layer")
    for y, row in enumerate(found.rows):
        if y and not row.is_kind:
            axes.axhline(y - 0.5, color=colours.GREY, linewidth=1)
    form = "{:+.2f}" if differences else "{:.2f}"
    for y, row in enumerate(found.rows):
        axes.annotate(
            form.format(row.total), (1, y), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8, annotation_clip=False,
            fontweight="normal" if row.is_kind else "bold",
        )  # fmt: skip
    if found.outside:
        shown = ",  ".join(
            f"{name.removesuffix('.weight')} {form.format(value)}" for name, value in found.outside[:4]
        )
        axes.set_title(f"outside the layers:  {shown}", fontsize=9, loc="left")
    figure.colorbar(
        ScalarMappable(norm, cmap), ax=axes, pad=0.06 if len(found.layers) > 20 else 0.1, fraction=0.04,
        extend="neither" if differences else "max",
        label="bits per weight, B less A" if differences else "bits per weight",
    )  # fmt: skip


def _box(x: int, y: int, shade: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=shade, edgecolor="white", linewidth=0.6)


def _families(found: Curve) -> dict[str, list[Point]]:
    """Codecs that differ in their group only lie side by side and share a label: ``grid4 g64, g32``."""
    groups: dict[str, dict[str, Point]] = {}
    for codec, point in found.uniform.items():
        family, _, group = codec.partition("_")
        groups.setdefault(family, {})[group] = point
    return {f"{family} {', '.join(members)}": list(members.values()) for family, members in groups.items()}


def _draw_curve(axes: Any, found: Curve, names: Sequence[str]) -> None:
    axes.plot(
        [p.bits for p in found.best], [p.error for p in found.best], color=colours.LINE, linewidth=2,
        label="least error at this size",
    )  # fmt: skip
    axes.plot(
        [p.bits for p in found.uniform.values()], [p.error for p in found.uniform.values()], "o", markersize=6,
        markerfacecolor="white", color=colours.GREY, label="every block in one codec",
    )  # fmt: skip
    for family, points in _families(found).items():
        rightmost = max(points, key=lambda p: p.bits)
        axes.annotate(
            family, (rightmost.bits, rightmost.error), textcoords="offset points", xytext=(8, 2), fontsize=8,
            color=colours.GREY,
        )  # fmt: skip
    for place, (name, point) in enumerate(zip(names, found.chosen, strict=True)):
        marker, shade = (("D", colours.MARK), ("s", colours.SECOND_MARK))[place % 2]
        label = f"{name}: {point.bits:.2f} bits, {point.error:.3g}"
        axes.plot([point.bits], [point.error], marker, markersize=9, color=shade, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per weight of Linears and experts, everything counted")
    axes.set_ylabel(found.unit)
    axes.grid(True, which="both", alpha=0.2)
    axes.margins(x=0.09)
    axes.legend(fontsize=9)
    if found.left_out:
        axes.set_title(f"without {found.left_out} weights that have sparse or zero blocks", fontsize=9)
