"""``ciuic demo``: the whole path on a small trained DeepSeek-V3 that comes with the package."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ciuic_hf.bench.plot import draw_bytes_against_quality
from ciuic_hf.bench.quality import Quality, ReferenceLogprobs, compare, reference_logprobs
from ciuic_hf.config import LINEAR_ROLES
from ciuic_hf.demo import bf16_path, fp8_path, heldout_text
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.report import human_bytes

BLOCK_ROLES = (*LINEAR_ROLES, "experts")
EVALUATION_TOKENS = 4096
WINDOW = 256


@dataclass(frozen=True)
class DemoRow:
    """One compressed model beside the original."""

    label: str
    bits_per_weight: float
    nbytes: int
    quality: Quality
    sample: str


def add_command(commands: Any) -> None:
    command = commands.add_parser("demo", help="compress a small DeepSeek-V3 that comes with the package")
    command.add_argument("--bits", type=float, nargs="+", default=[8, 4, 3], help="default: 8 4 3")
    command.add_argument("--prompt", default="And it came to pass")
    command.add_argument("--picture", type=Path, default=Path("ciuic-demo.png"))
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    console = Console()
    torch.set_num_threads(1)  # the model is so small that a second thread only waits for the first
    logging.disable_progress_bar()  # the demo prints its own table; each load would print one too
    tokenizer = AutoTokenizer.from_pretrained(bf16_path())
    encoded = tokenizer(
        heldout_text(), add_special_tokens=False, truncation=True, max_length=EVALUATION_TOKENS
    )
    ids = torch.tensor([encoded["input_ids"]])
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=console, transient=True
    ) as progress:
        task = progress.add_task("original in bf16", total=None)
        original = _load(bf16_path())
        reference = reference_logprobs(original, ids, WINDOW)
        nbytes = sum(p.numel() * p.element_size() for p in original.parameters())
        quality = compare(reference, original)
        rows = [DemoRow("original, bf16", 16, nbytes, quality, _write(original, tokenizer, arguments.prompt))]
        for label, path, bits in [
            *((f"{b:g} bits", bf16_path(), b) for b in arguments.bits),
            ("4 bits from FP8", fp8_path(), 4.0),
        ]:
            progress.update(task, description=f"{label}: load into compressed blocks, measure, write")
            model = _load(path, bits)
            rows.append(_row(label, model, reference, tokenizer, arguments.prompt))
        progress.update(task, description="save and reload")
        saved = _save_and_reload(model)
    _show(console, rows, arguments.picture)
    console.print(f"\nSaved and reloaded the last one: {saved}.")
    console.print(f"Picture: {arguments.picture}")


def _load(path: Path, bits: float | None = None) -> Any:
    config = {} if bits is None else {"quantization_config": CiuicConfig(bits=bits)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **config)


def _row(label: str, model: Any, reference: ReferenceLogprobs, tokenizer: Any, prompt: str) -> DemoRow:
    report = model.ciuic_report
    sample = _write(model, tokenizer, prompt)
    return DemoRow(
        label, report.bits_per_weight(BLOCK_ROLES), report.nbytes, compare(reference, model), sample
    )


def _write(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


def _save_and_reload(model: Any) -> str:
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        size = sum(file.stat().st_size for file in Path(directory).iterdir())
        reloaded = AutoModelForCausalLM.from_pretrained(directory)
        before, after = model.state_dict(), reloaded.state_dict()
        equal = before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        seconds = reloaded.ciuic_report.seconds
        del reloaded, after  # its tensors map the files that are about to go
    verdict = "every tensor is equal, bit for bit" if equal else "TENSORS DIFFER"
    return f"{human_bytes(size)} on disk, loaded in {seconds:.1f} s, {verdict}"


def _show(console: Console, rows: list[DemoRow], picture: Path) -> None:
    original = rows[0]
    table = Table(title="A trained 4 M DeepSeek-V3 in compressed blocks", box=box.ROUNDED)
    for heading in ("model", "bits", "size", "smaller", "perplexity", "KL", "top-1"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in rows:
        quality = row.quality
        table.add_row(
            row.label, f"{row.bits_per_weight:.2f}", human_bytes(row.nbytes), f"{original.nbytes / row.nbytes:.2f}x",
            f"{quality.perplexity:.2f}", f"{quality.kl:.4f}", f"{100 * quality.top1_agreement:.1f} %",
        )  # fmt: skip
    console.print(table)
    console.print(
        "bits: stored per weight of Linears and experts, everything counted; embeddings and lm_head are at 8. "
        f"Quality on {EVALUATION_TOKENS} tokens that were not trained on; top-1: how often the compressed model and "
        "the original predict the same token.",
        highlight=False,
    )
    for row in rows:
        console.print(f"\n[bold]{row.label}[/bold]: {row.sample}", highlight=False)
    draw_bytes_against_quality(
        picture,
        [(row.label, row.nbytes, row.quality.kl) for row in rows[1:] if "FP8" not in row.label],
        (original.label, original.nbytes),
        "A small trained DeepSeek-V3: bytes against quality",
    )
