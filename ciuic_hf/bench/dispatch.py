"""Which kernel serves weights and attention at how many tokens, and why: what ``ciuic inspect --dispatch`` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from ciuic_hf.bench.kernels.shapes import WeightShape
from ciuic_hf.checkpoint import read_config
from ciuic_hf.inspection import inspect_checkpoint
from ciuic_hf.modules.siblings import families
from ciuic_hf.planning.cache_formats import check_cache_bits
from ciuic_hf.runtime.cache.rehearsal import CachedAttention
from ciuic_kernels.attention import MAX_QUERIES, choose_attention
from ciuic_kernels.device import DeviceFacts
from ciuic_kernels.format import BLOCK_COLS, BLOCK_ROWS, ceil_div
from ciuic_kernels.selection import EXPERTS, SHARED_BLOCK_M, Choice, Rule, choose
from ciuic_kernels.work import ROUTED_SLOTS

MAX_TOKENS = 8192
CONTEXT = 32768
"""Tokens that are cached where attention is shown."""


@dataclass(frozen=True)
class Route:
    """A range of tokens that one kernel serves.

    Attributes:
        kernel: file under ``ciuic_kernels/triton`` and kernel in it, or what runs instead.
        launch: its tile and warps, empty when it is not fused.
    """

    first: int
    last: int
    kernel: str
    launch: str
    reason: str

    @property
    def tokens(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def routes(
    shape: WeightShape, facts: DeviceFacts, rules: Sequence[Rule], dtype: torch.dtype = torch.bfloat16
) -> list[Route]:
    """What runs at 1 to 8192 tokens, neighbours with the same answer joined."""

    def told(tokens: int) -> tuple[str, str, str]:
        pairs = tokens * shape.routed
        rows = ceil_div(pairs, shape.experts) if shape.experts else tokens
        choice = choose(shape.op, rows, shape.weights, dtype, facts, rules)
        return _kernel(shape, choice, pairs), _launch(shape, choice), choice.reason

    return _joined(told, MAX_TOKENS)


def attention_routes(
    attention: CachedAttention, facts: DeviceFacts, dtype: torch.dtype = torch.bfloat16
) -> list[Route]:
    """What attends to ``CONTEXT`` packed tokens of one sequence, by the number of new tokens."""
    kernel = "attention.latents" if attention.sizes.latent else "attention.heads"

    def told(tokens: int) -> tuple[str, str, str]:
        choice = choose_attention(attention.shape(tokens, CONTEXT), dtype, facts)
        if choice.launch is None:
            return "torch tiles", "", choice.reason
        launch = choice.launch
        return (
            kernel,
            f"{launch.block_m} queries x {launch.block_t} tokens, {launch.num_warps} warps, "
            f"{launch.num_stages} stages, {launch.splits} splits",
            f"up to {MAX_QUERIES} new tokens attend to packed bytes in place",
        )

    return _joined(told, MAX_TOKENS)


def _joined(told: Callable[[int], tuple[str, str, str]], most: int) -> list[Route]:
    """Kernel, launch and reason of 1 to ``most`` tokens, neighbours with the same answer joined."""
    found: list[Route] = []
    for tokens in range(1, most + 1):
        answer = told(tokens)
        if found and (found[-1].kernel, found[-1].launch, found[-1].reason) == answer:
            found[-1] = Route(found[-1].first, tokens, *answer)
        else:
            found.append(Route(tokens, tokens, *answer))
    return found


def _kernel(shape: WeightShape, choice: Choice, pairs: int) -> str:
    if choice.name == "reference":
        return "reference"
    if choice.launch is None:
        return "experts one by one" if shape.op == EXPERTS else "dequantize + GEMM"
    if shape.op == EXPERTS:
        return "experts.few" if pairs <= ROUTED_SLOTS else "experts.many"
    return "linear"


def _launch(shape: WeightShape, choice: Choice) -> str:
    if choice.launch is None:
        return ""
    launch = choice.launch.of_kinds(2 if shape.mixed else 1)
    warps = "1 warp" if launch.num_warps == 1 else f"{launch.num_warps} warps"
    return f"{launch.block_m} tokens, {warps}, {launch.num_stages} stages, {launch.programs} programs"


def checkpoint_shapes(directory: Path) -> list[WeightShape]:
    """The different shapes of a compressed checkpoint, named after the first parameter that has each.

    A shape stands twice when some of its parameters mix codecs and others do not: tiles differ.
    """
    config = read_config(directory)
    routed = int(_value(config, "num_experts_per_tok") or 1)
    found: dict[tuple[object, ...], WeightShape] = {}
    for parameter in inspect_checkpoint(directory).compressed:
        *experts, rows, cols = parameter.shape
        count = experts[0] if experts else 0
        ragged = rows % BLOCK_ROWS or cols % BLOCK_COLS
        mixed = len(parameter.codecs) > 1 or (ragged and rows > BLOCK_ROWS and cols > BLOCK_COLS)
        shape = WeightShape(parameter.name, rows, cols, count, min(routed, count), bool(mixed))
        found.setdefault((tuple(parameter.shape), shape.mixed), shape)
    return list(found.values())


def checkpoint_attention(directory: Path) -> CachedAttention | None:
    """Attention to the compressed cache that the checkpoint was saved with, None without ``cache_bits``."""
    config = read_config(directory)
    bits = (config.get("quantization_config") or {}).get("cache_bits")
    if bits is None:
        return None
    return CachedAttention.of({**config, **(config.get("text_config") or {})}, check_cache_bits(bits))


def attention_label(attention: CachedAttention) -> str:
    """Such as ``attention, 128 heads, latents of 512 + 64, cache at 4 bits``."""
    sizes = attention.sizes
    what = (
        f"latents of {sizes.key_width} + {sizes.value_width}"
        if sizes.latent
        else f"{sizes.heads} cached heads of {sizes.key_width}"
    )
    return f"attention, {attention.heads} heads, {what}, cache at {attention.bits} bits, {CONTEXT} tokens"


def _value(config: dict[str, Any], key: str) -> Any:
    """A key of config.json, or of the text part of a multimodal one."""
    return config.get(key, (config.get("text_config") or {}).get(key))


def checkpoint_groups(directory: Path) -> list[str]:
    """The linears of a checkpoint that are tried in one launch, such as ``2 x gate_proj + up_proj``."""
    linears = [p for p in inspect_checkpoint(directory).compressed if len(p.shape) == 2]
    widths = {p.name.removesuffix(".weight"): p.shape[1] for p in linears if p.name.endswith(".weight")}
    counts = Counter(" + ".join(members) for _, members in families(widths))
    return [f"{count} x {members}" for members, count in counts.items()]


def label(shape: WeightShape) -> str:
    """A shape and whether its blocks are of several codecs."""
    return f"{shape}, {'several codecs' if shape.mixed else 'one codec'}"


def dispatch_table(
    shapes: Iterable[WeightShape],
    facts: DeviceFacts,
    rules: Sequence[Rule],
    source: str,
    groups: Sequence[str] = (),
    attention: CachedAttention | None = None,
) -> Table:
    """One line for each shape and range of tokens.

    Args:
        source: where the rules come from.
        groups: linears that are tried in one launch.
        attention: shown last, to a compressed cache.
    """
    title = f"{facts.name or facts.kind}, bfloat16, rules: {source}"
    caption = (
        f"in one launch up to {SHARED_BLOCK_M} tokens, if few kinds meet: {', '.join(groups)}"
        if groups
        else None
    )
    shown = Table(title=title, caption=caption, box=box.ROUNDED)
    for heading in ("weight", "tokens", "kernel", "launch", "why"):
        shown.add_column(heading, justify="right" if heading == "tokens" else "left", overflow="fold")
    named = [(label(shape), routes(shape, facts, rules)) for shape in shapes]
    if attention is not None:
        named.append((attention_label(attention), attention_routes(attention, facts)))
    for name, found in named:
        for place, route in enumerate(found):
            shown.add_row(name if place == 0 else "", route.tokens, route.kernel, route.launch, route.reason)
        shown.add_section()
    return shown
