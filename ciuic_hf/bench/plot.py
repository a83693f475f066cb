"""Pictures of results. matplotlib is imported when a picture is drawn; it is in the ``demo`` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ciuic_hf.errors import CiuicError


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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CiuicError("Drawing needs matplotlib: pip install 'ciuic-hf[demo]'.") from None
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
