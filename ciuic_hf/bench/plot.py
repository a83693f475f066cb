"""Pictures of results. matplotlib is imported when a picture is drawn; it is in the ``demo`` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ciuic_hf.bench.memory import MemoryRow
from ciuic_hf.pictures.png import require_matplotlib


def draw_bytes_against_quality(
    path: Path, points: Sequence[tuple[str, float, float]], reference: tuple[str, float], title: str
) -> None:
    """A picture of size and KL divergence, one labelled point for each model.

    Args:
        points: ``(label, bytes, KL in nats per token)``.
        reference: label and bytes of the uncompressed model, drawn as a line.

    Raises:
        CiuicError: when matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    megabytes = [nbytes / 1e6 for _, nbytes, _ in points]
    axes.plot(megabytes, [kl for _, _, kl in points], "o-", color="#2563eb", markersize=8)
    for (label, _, kl), size in zip(points, megabytes, strict=True):
        axes.annotate(label, (size, kl), textcoords="offset points", xytext=(9, 7), fontsize=10)
    axes.axvline(reference[1] / 1e6, color="#6b7280", linestyle="--")
    axes.annotate(
        reference[0], (reference[1] / 1e6, max(kl for _, _, kl in points)), textcoords="offset points",
        xytext=(-6, 0), ha="right", va="top", rotation=90, color="#6b7280",
    )  # fmt: skip
    axes.set_yscale("log")
    axes.margins(y=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("size of the model (MB)")
    axes.set_ylabel("KL divergence from the original (nats per token)")
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="both", alpha=0.25)
    figure.savefig(path, dpi=150)


_MARKERS = "os^vDP*X"
_SHADES = ("#440154", "#d1495b", "#26838f", "#e69f00", "#6b7280", "#0072b2", "#35b779", "#cc79a7")


def draw_kl_against_bits(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """A picture of formats: a line for each with a marker of its own; formats of Ciuic are drawn full.

    Args:
        lines: name of a format -> ``(bits per weight, KL in nats per token)`` by rising bits.

    Raises:
        CiuicError: when matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(lines.items()):
        ours = name.startswith("Ciuic")
        axes.plot(
            [bits for bits, _ in points], [kl for _, kl in points], _MARKERS[place % len(_MARKERS)],
            linestyle="-" if ours else ":", color=_SHADES[place % len(_SHADES)], label=name,
            markerfacecolor=None if ours else "white", markersize=7,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("bits per weight of Linears and experts, everything counted")
    axes.set_ylabel("KL divergence from bf16 (nats per token)")
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def draw_memory(path: Path, rows: Sequence[MemoryRow]) -> None:
    """Measured peaks against batch and against length, a line for each setting, and the budget across.

    Raises:
        CiuicError: when matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2)
    for across, work in zip(grid, ("train", "generate"), strict=True):
        chosen = [row for row in rows if row.setting.work == work]
        for axes, axis in zip(across, ("batch", "length"), strict=True):
            for place, row in enumerate(chosen):
                measured = sorted((row.batches if axis == "batch" else row.lengths).items())
                axes.plot(
                    [size for size, _ in measured], [nbytes / 2**20 for _, nbytes in measured],
                    _MARKERS[place] + "-", color=_SHADES[place], label=row.setting.name, markersize=5,
                )  # fmt: skip
            axes.axhline(chosen[0].budget_nbytes / 2**20, color="#6b7280", linestyle="--", label="budget")
            axes.set_ylim(bottom=0)
            axes.set_xlabel("batch, 512 tokens each" if axis == "batch" else "tokens, batch of 4")
            axes.set_ylabel("peak memory (MiB)")
            axes.set_title("LoRA training step" if work == "train" else "generate", fontsize=11)
            axes.grid(True, alpha=0.25)
        across[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
