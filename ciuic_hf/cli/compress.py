"""``ciuic compress SRC DST``: a checkpoint of any size into a compressed one, without loading it."""

from __future__ import annotations

import argparse
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ciuic_hf.errors import CiuicError
from ciuic_hf.presets import card_nbytes
from ciuic_hf.report import human_bytes

INTERRUPTED = 130  # exit status, as shells have it for SIGINT
LINE_SECONDS = 30  # between two lines where the output is no terminal
_EPILOG = """The result is what from_pretrained with the same settings and save_pretrained write, byte for byte, and the
tokenizer's files. Interrupted or killed, the same command goes on where it was."""


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "compress", help="compress a checkpoint of any size on disk, without loading it", epilog=_EPILOG
    )
    command.add_argument(
        "source", help="directory of a bf16, fp16, fp32 or FP8 model, or its name on the hub"
    )
    command.add_argument("destination", type=Path, help="directory to make")
    command.add_argument("--bits", type=float, help="bits per weight (default 4.25)")
    command.add_argument("--memory", help='instead: what the model may take while it generates, "22GiB"')
    command.add_argument("--gpu", help="instead: a card of configs/cards.json, such as H100")
    command.add_argument("--context", type=int, help="with --memory or --gpu: tokens (default 8192)")
    command.add_argument("--batch", type=int, help="with --memory or --gpu: sequences at once (default 1)")
    command.add_argument("--plan", type=Path, help="instead: a plan of `ciuic plan --save`, followed exactly")
    command.add_argument("--sensitivity", type=Path, help="file of `ciuic calibrate`")
    command.add_argument("--calibration", type=Path, help="file of `ciuic calibrate --rounding`")
    command.add_argument("--prefill-chunk", help="tokens of a prompt at once while generating: N or none")
    command.add_argument(
        "--cache-bits", type=int, help="8, 4, 3 or 2: generate will keep its cache compressed"
    )
    command.add_argument(
        "--modules",
        action="append",
        default=[],
        metavar="WHICH=SETTING",
        help="exception by role or part of a name, such as attention=6 or lm_head=raw; repeat it for more",
    )
    command.add_argument("--policy", help="rate-distortion (default) or uniform")
    command.add_argument("--max-shard-size", default="50GB", help="largest file (default 50GB)")
    command.add_argument("--restart", action="store_true", help="throw unfinished work of DST away")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ciuic_hf.hf.offline import compress_checkpoint, unfinished_path

    console = Console(stderr=True)
    config = _config(arguments)
    with _Bar(console) as bar:
        try:
            report = compress_checkpoint(
                arguments.source,
                arguments.destination,
                config,
                max_shard_size=arguments.max_shard_size,
                restart=arguments.restart,
                on_progress=bar.show,
            )
        except KeyboardInterrupt:
            stopped = True
        else:
            stopped = False
    if stopped:
        kept = unfinished_path(arguments.destination)
        console.print(
            f"Stopped. {kept} holds what is finished; the same command goes on from there."
            if kept.exists()
            else "Stopped before anything was written.",
            highlight=False,
            soft_wrap=True,
        )
        return INTERRUPTED
    Console().print(report)
    print(
        f"{arguments.destination} is ready: from_pretrained({str(arguments.destination)!r}) after import ciuic_hf."
    )
    return 0


def _config(arguments: argparse.Namespace) -> Any:
    """The CiuicConfig that was asked for. Raises CiuicError."""
    from ciuic_hf.cli.plan import prefill_chunk
    from ciuic_hf.hf.config import CiuicConfig

    sizes = [name for name in ("bits", "memory", "gpu", "plan") if getattr(arguments, name) is not None]
    if len(sizes) > 1:
        raise CiuicError(
            f"--{sizes[0]} and --{sizes[1]} both say how large the model becomes; give one of them."
        )
    memory = card_nbytes(arguments.gpu) if arguments.gpu else arguments.memory
    if memory is None and (arguments.context is not None or arguments.batch is not None):
        raise CiuicError("--context and --batch belong to --memory or --gpu, of which none is given.")
    options: dict[str, Any] = {
        "modules": dict(_module_setting(text) for text in arguments.modules),
        "policy": arguments.policy,
        "sensitivity": arguments.sensitivity,
        "calibration": arguments.calibration,
        "plan": arguments.plan,
        "cache_bits": arguments.cache_bits,
        "prefill_chunk": prefill_chunk(arguments.prefill_chunk),
    }
    if arguments.bits is not None:
        options["bits"] = arguments.bits
    if memory is not None:
        options |= {"memory": memory, "context": arguments.context or 8192, "batch": arguments.batch or 1}
    return CiuicConfig(**options)


def _module_setting(text: str) -> tuple[str, float | str]:
    """``attention=6`` -> ``("attention", 6.0)``. Raises CiuicError."""
    which, equals, setting = text.rpartition("=")
    if not equals or not which or not setting:
        raise CiuicError(f"--modules takes WHICH=SETTING, such as attention=6 or lm_head=raw, got {text!r}.")
    try:
        return which, float(setting)
    except ValueError:
        return which, setting


class _Bar:
    """What is shown meanwhile: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            _Sizes(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("Reading headers", total=None)
        self._begun = False
        self._said = time.monotonic()

    def __enter__(self) -> _Bar:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, progress: Any) -> None:
        """Callback of ``compress_checkpoint``."""
        if not self._begun:
            self._begun = True
            self._say(_beginning(progress))
            self._bar.reset(
                self._task, description="Compressing", total=progress.nbytes, completed=progress.written
            )
        self._bar.update(self._task, completed=progress.written)
        if not self._console.is_terminal and time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            left = self._bar.tasks[0].time_remaining
            self._say(
                f"{human_bytes(progress.written)} of {human_bytes(progress.nbytes)}"
                + (f", {timedelta(seconds=round(left))} left" if left else "")
            )

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


class _Sizes(ProgressColumn):
    """``1.2 of 3.4 GiB``."""

    def render(self, task: Task) -> Text:
        return Text(f"{human_bytes(task.completed)} of {human_bytes(task.total)}" if task.total else "")


def _beginning(progress: Any) -> str:
    files = "one file" if progress.files == 1 else f"{progress.files} files"
    text = f"Writing {human_bytes(progress.nbytes)} into {files}"
    return (
        f"{text}; {human_bytes(progress.resumed)} are there from before." if progress.resumed else f"{text}."
    )
