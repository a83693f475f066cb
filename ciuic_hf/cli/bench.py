"""``ciuic bench load | decode | quality | products``: measurements, printed as ratios taken in one run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console


def add_command(commands: Any) -> None:
    command = commands.add_parser("bench", help="measure loading, decoding or quality on this machine")
    kinds = command.add_subparsers(dest="kind", required=True, metavar="kind")
    load = kinds.add_parser("load", help="peak memory and time of loading, against a plain bf16 load")
    load.add_argument(
        "--repeats", type=int, default=3, help="runs of each load; medians are shown (default 3)"
    )
    load.set_defaults(run=run_load)
    decode = kinds.add_parser("decode", help="decode and prefill speed on the CPU, against bf16")
    decode.add_argument("--repeats", type=int, default=20, help="interleaved rounds (default 20)")
    decode.add_argument("--bits", type=float, default=4.25)
    decode.set_defaults(run=run_decode)
    quality = kinds.add_parser("quality", help="KL and perplexity of SmolLM2, against bitsandbytes NF4")
    quality.add_argument("--tokens", type=int, default=2048)
    quality.add_argument("--bits", type=float, nargs="+", default=[8, 6, 5, 4.25, 4, 3])
    quality.add_argument(
        "--sensitivity", type=Path, help="file of `ciuic calibrate` for SmolLM2: measure its plans as well"
    )
    quality.set_defaults(run=run_quality)
    products = kinds.add_parser("products", help="one matrix by rows of x: fused, decode-then-GEMM, bf16")
    products.add_argument("--repeats", type=int, default=15, help="interleaved rounds (default 15)")
    products.add_argument("--codec", default="grid4_g32", help="block codec (default grid4_g32)")
    products.set_defaults(run=run_products)
    for kind in (load, decode, quality, products):
        kind.add_argument("--json", type=Path, help="also write the numbers to this file")
        kind.add_argument("--cache", type=Path, default=Path("ciuic-bench"), help="directory for the models")


def run_load(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.load import measure_loads, table

    rows = measure_loads(arguments.cache, arguments.repeats)
    _show(table(rows), rows, arguments.json)


def run_decode(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.decode import measure_decode, table

    rows = measure_decode(arguments.cache, arguments.bits, arguments.repeats)
    _show(table(rows), rows, arguments.json)


def run_quality(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.smollm2_quality import measure_quality, table

    rows = measure_quality(arguments.cache, arguments.bits, arguments.tokens, arguments.sensitivity)
    _show(table(rows), rows, arguments.json)


def run_products(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.products import measure_products, table

    rows = measure_products(arguments.codec, arguments.repeats)
    _show(table(rows), rows, arguments.json)


def _show(table: Any, rows: list[Any], path: Path | None) -> None:
    Console().print(table)
    if path is not None:
        path.write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")
