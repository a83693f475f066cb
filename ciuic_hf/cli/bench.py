"""``ciuic bench``: measurements, printed as ratios taken in one run."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from ciuic_kernels.device import device_facts


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
    quality = kinds.add_parser(
        "quality", help="KL and perplexity of a trained model, against NF4, HQQ and GGUF"
    )
    quality.add_argument("--tokens", type=int, default=2048)
    quality.add_argument("--bits", type=float, nargs="+", default=[8, 6, 5, 4.25, 4, 3.25, 3, 2.5])
    quality.add_argument(
        "--sensitivity", type=Path, help="file of `ciuic calibrate` for SmolLM2: measure its plans as well"
    )
    quality.add_argument(
        "--calibration",
        type=Path,
        help="file of `ciuic calibrate --rounding` for the model: round by it as well",
    )
    quality.add_argument(
        "--model",
        choices=("smollm2", "dithered", "demo"),
        default="smollm2",
        help="dithered: SmolLM2 off the 4-bit grid of its file; demo: the one in this package",
    )
    quality.add_argument(
        "--raw-tables",
        action="store_true",
        help="leave embeddings and lm_head of Ciuic's rows as they are, like those of the others",
    )
    quality.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="TEXT",
        help="only rows with one of these in their name; --json keeps the other rows of its file",
    )
    quality.add_argument("--plot", type=Path, metavar="FILE", help="draw KL against bits; needs matplotlib")
    quality.set_defaults(run=run_quality)
    products = kinds.add_parser("products", help="one matrix by rows of x: fused, decode-then-GEMM, bf16")
    products.add_argument("--repeats", type=int, default=15, help="interleaved rounds (default 15)")
    products.add_argument("--codec", default="grid4_g32", help="block codec (default grid4_g32)")
    products.set_defaults(run=run_products)
    memory = _add_memory(kinds)
    _add_kernels(kinds)
    _add_tune(kinds)
    for kind in (load, decode, quality, products, memory):
        kind.add_argument("--json", type=Path, help="also write the numbers to this file")
        kind.add_argument("--cache", type=Path, default=Path("ciuic-bench"), help="directory for the models")


def _add_memory(kinds: Any) -> argparse.ArgumentParser:
    memory: argparse.ArgumentParser = kinds.add_parser(
        "memory", help="batch and sequence that fit where 4 x 512 fit plain, piece by piece; needs PEFT"
    )
    memory.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture; needs matplotlib")
    memory.add_argument(
        "--checkpointing", action="store_true", help="also torch's gradient checkpointing, for comparison"
    )
    memory.add_argument("--device", help="default: a CUDA device if there is one, else the CPU")
    memory.set_defaults(run=run_memory)
    return memory


def _add_kernels(kinds: Any) -> None:
    kernels = kinds.add_parser("kernels", help="prove and time the GPU kernels; needs a CUDA GPU")
    kernels.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=Path("docs/results"),
        metavar="DIR",
        help="write kernels-<gpu>.json and .png to this directory (default docs/results)",
    )
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    kernels.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture; needs matplotlib")
    kernels.add_argument("--quick", action="store_true", help="only what the bar says of products")
    kernels.add_argument(
        "--gate-only",
        action="store_true",
        help="a small gate in one process, no times: for compute-sanitizer",
    )
    kernels.add_argument("--minutes", type=float, default=8, help="what the run may take (default 8)")
    kernels.add_argument("--device", default="cuda:0")
    kernels.set_defaults(run=run_kernels)


def _add_tune(kinds: Any) -> None:
    tune = kinds.add_parser("tune", help="find the fastest kernel launches of this GPU; needs a CUDA GPU")
    tune.add_argument(
        "--out", type=Path, metavar="FILE", help="table to write (default: where every later run finds it)"
    )
    tune.add_argument("--minutes", type=float, default=4, help="what it may take (default 4)")
    tune.add_argument("--device", default="cuda:0")
    tune.set_defaults(run=run_tune)


def run_load(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.load import measure_loads, table

    rows = measure_loads(arguments.cache, arguments.repeats)
    _show(table(rows), rows, arguments.json)


def run_decode(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.decode import measure_decode, table

    rows = measure_decode(arguments.cache, arguments.bits, arguments.repeats)
    _show(table(rows), rows, arguments.json)


def run_quality(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.plot import draw_kl_against_bits
    from ciuic_hf.bench.quality_rows import TITLES, Comparison, families, measure_quality, merged, table
    from ciuic_hf.pictures.png import require_matplotlib
    from ciuic_hf.pictures.terminal import series

    if arguments.plot:
        require_matplotlib()
    wanted = Comparison(
        arguments.cache,
        arguments.bits,
        arguments.tokens,
        arguments.model,
        arguments.sensitivity,
        arguments.calibration,
        arguments.raw_tables,
        arguments.only,
    )
    rows = measure_quality(wanted)
    if arguments.only and arguments.json:
        rows = merged(rows, arguments.json)
    _show(table(rows, arguments.model), rows, arguments.json)
    lines = families(rows)
    what = "KL to bf16, nats per token, against bits per weight"
    Console().print(series(lines, what, Console().width), highlight=False)
    if arguments.plot:
        draw_kl_against_bits(arguments.plot, lines, TITLES[arguments.model])
        print(f"Picture: {arguments.plot}")


def run_products(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.products import measure_products, table

    rows = measure_products(arguments.codec, arguments.repeats)
    _show(table(rows), rows, arguments.json)


def run_memory(arguments: argparse.Namespace) -> None:
    from ciuic_hf.bench.memory import measure_memory, table
    from ciuic_hf.bench.plot import draw_memory
    from ciuic_hf.pictures.png import require_matplotlib

    if arguments.plot:
        require_matplotlib()
    device = arguments.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    with ShownProgress() as progress:
        rows = measure_memory(arguments.cache, progress, device=device, checkpointing=arguments.checkpointing)
    for work in ("train", "generate"):
        Console().print(table(rows, work))
    if arguments.json:
        text = json.dumps([row.to_dict() for row in rows], indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        draw_memory(arguments.plot, rows)
        print(f"Picture: {arguments.plot}")


def run_kernels(arguments: argparse.Namespace) -> int:
    device = _gpu(arguments.device, "ciuic bench kernels")
    if device is None:
        return NO_GPU
    from ciuic_hf.bench.kernels.picture import draw, require_matplotlib
    from ciuic_hf.bench.kernels.report import report
    from ciuic_hf.bench.kernels.result import Result
    from ciuic_hf.bench.kernels.run import run_bench, run_gate_only

    if arguments.report or arguments.plot:
        require_matplotlib()

    def files(result: Result, suffix: str, given: Path | None) -> list[Path]:
        named = arguments.report / f"kernels-{result.machine.slug}{suffix}" if arguments.report else None
        return [path for path in (given, named) if path is not None]

    def save(result: Result) -> None:
        for path in files(result, ".json", arguments.json):
            result.write(path)

    with ShownProgress() as progress, _ended_by_ctrl_c():
        if arguments.gate_only:
            result = run_gate_only(device, progress)
            save(result)
        else:
            seconds = 60 * arguments.minutes
            result = run_bench(device, progress, seconds=seconds, quick=arguments.quick, save=save)
    for part in report(result):
        Console().print(part)
    for path in files(result, ".png", arguments.plot):
        if result.ceilings is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(result, path)
    if result.state == "interrupted":
        return INTERRUPTED
    return 0 if result.green and result.state in ("finished", "gate only") else 1


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Have a request to end, such as that of ``timeout``, do what Ctrl-C does: results are kept."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_tune(arguments: argparse.Namespace) -> int:
    device = _gpu(arguments.device, "ciuic bench tune")
    if device is None:
        return NO_GPU
    from ciuic_hf.bench.tune import report, table_path, tune, write_table

    with ShownProgress() as progress, _ended_by_ctrl_c():
        tuned = tune(device, progress, 60 * arguments.minutes)
    for part in report(tuned):
        Console().print(part)
    if not tuned.outcomes:
        Console(stderr=True).print("ciuic: nothing was tuned, so no table is written.", style="red")
        return INTERRUPTED if tuned.interrupted else 1
    path = arguments.out or table_path(tuned.gpu, tuned.triton)
    write_table(tuned, path)
    Console().print(f"written to {path}", highlight=False, soft_wrap=True)
    return INTERRUPTED if tuned.interrupted else 0


INTERRUPTED = 130
NO_GPU = 2


def _gpu(name: str, command: str) -> torch.device | None:
    """A device that the kernels run on; None after one sentence that says what is needed."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    here = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    reason = device_facts(device).reason if here else f"{name} is not there"
    if not reason:
        torch.cuda.set_device(device)
        return torch.device("cuda", torch.cuda.current_device())
    Console(stderr=True).print(
        f"ciuic: {command} needs a CUDA GPU of compute capability 8.0 or newer with Triton: {reason}.",
        style="red", highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return None


class ShownProgress:
    """A bar on standard error: what is measured, how far, how long it has taken."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None

    def __enter__(self) -> ShownProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, what: str, total: int | None) -> None:
        """A new bar takes the place of the last; where nobody sees bars, a line."""
        if not self._bars.console.is_terminal:
            self._bars.console.print(what, highlight=False, markup=False)
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(what, total=total)

    def step(self, what: str) -> None:
        """One step further, and what it was."""
        assert self._task is not None
        self._bars.update(self._task, advance=1, description=what)


def _show(table: Any, rows: list[Any], path: Path | None) -> None:
    Console().print(table)
    if path is not None:
        path.write_text(json.dumps([vars(row) for row in rows], indent=2) + "\n")
