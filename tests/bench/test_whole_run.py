"""``ciuic bench kernels --report`` from the command line to the files, on a CPU that counts as a GPU."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_hf.bench.kernels import end_to_end, others, products, run
from ciuic_hf.bench.kernels.gate import Case, Sizes
from ciuic_hf.bench.kernels.peers import Peer, cublas
from ciuic_hf.bench.kernels.products import FORMATS
from ciuic_hf.bench.kernels.shapes import WeightShape
from ciuic_hf.cli import bench as cli
from ciuic_hf.cli.main import main
from tests.bench.conftest import CPU, MACHINE
from tests.bench.test_run import broken_quantizer

pytestmark = pytest.mark.usefixtures("fake_cuda", "quiet")
WEIGHTS = (
    WeightShape("V3 dense gate_proj", 70, 192),
    WeightShape("V3 shared gate_up", 64, 128),
    WeightShape("V3 experts gate_up", 24, 64, 4, 2),
    WeightShape("V3 experts down", 64, 24, 4, 2),
    WeightShape("other", 10, 64),
)
LINES = [
    {"batch": 1, "graphs": False, "tokens_per_second": 10.0, "peak_nbytes": 7, "total_seconds": 1.0},
    {"batch": 1, "graphs": True, "error": "RuntimeError: no compiler"},
    {"bits": 4.25, "context": 64, "tokens": 128, "predicted_nbytes": 1000, "peak_nbytes": 980},
]
CHILD = f"""
import json, sys
with open(sys.argv[sys.argv.index("--out") + 1], "a") as out:
    for line in {LINES!r}:
        out.write(json.dumps(line) + "\\n")
"""


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, caches and gate of a size for a CPU."""
    for module in (run, others):
        monkeypatch.setattr(
            module, "standard", lambda name: next(shape for shape in WEIGHTS if shape.name == name)
        )
    monkeypatch.setattr(run, "STANDARD", WEIGHTS)
    monkeypatch.setattr(run, "FORMATS", FORMATS[:2])
    monkeypatch.setattr(run, "DECODE", (1, 2))
    monkeypatch.setattr(run, "PREFILL", (3,))
    monkeypatch.setattr(run, "TOKENS", (1, 3))
    monkeypatch.setattr(run, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(run, "FULL", Sizes())
    monkeypatch.setattr(run, "needed_nbytes", lambda: 1 << 50)
    monkeypatch.setattr(
        run, "gate_cases", lambda dtypes, sizes=None: [Case("linear", "zero", (2, 3), dtypes[0])]
    )
    monkeypatch.setattr(run, "run_gate", lambda cases, *rest: [])
    monkeypatch.setattr(
        run, "measure_ceilings", lambda timer, device: measured_ceilings(timer, device, 1 << 10, 8)
    )
    for name in ("FAMILIES", "CACHES", "DECODED"):
        monkeypatch.setattr(others, name, ())
    monkeypatch.setattr(
        products, "PEERS", (Peer("good", "torch", cublas), Peer("absent", "no_such_module", cublas))
    )
    monkeypatch.setattr(end_to_end, "child_command", lambda *_: [sys.executable, "-c", CHILD])
    monkeypatch.setattr(cli, "_gpu", lambda name, command: CPU)


measured_ceilings = run.measure_ceilings


def report_of(folder: Path, *more: str) -> tuple[int, dict[str, Any], bool]:
    """Exit status, the JSON, and whether there is a picture."""
    status = main(["bench", "kernels", "--report", str(folder), *more])
    (path,) = folder.glob("*.json")
    assert path.name == f"kernels-{MACHINE.slug}.json" and not list(folder.glob(".*"))
    return status, json.loads(path.read_text()), path.with_suffix(".png").exists()


pytest.importorskip("matplotlib", reason="the bench extra is not installed")


def test_a_green_run_measures_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(others, "FAMILIES", (others.Family("siblings", (64, 8), 128),))
    monkeypatch.setattr(others, "DECODED", ("other",))
    monkeypatch.setattr(others, "CACHES", (others.Attended("heads", 4, 2, (128, 128), False),))
    monkeypatch.setattr(others, "LENGTHS", (512,))
    status, data, drawn = report_of(tmp_path)
    assert (status, data["state"], drawn) == (0, "finished", True)
    names = [row["name"] for row in data["products"]]
    assert set(names) == {shape.name for shape in WEIGHTS}
    formats, decode, prefill = 2, 2, 1
    assert len(names) == 4 * formats * (decode + prefill) + 2 * decode + formats * 2
    assert all(row["seconds"] == pytest.approx(1e-5) for row in data["products"])
    assert {row["kind"] for row in data["others"]} == {"attention", "siblings", "dequantize"}
    assert all(row["seconds"] and not row["errors"] and row["peers"] for row in data["others"])
    assert [row["model"] for row in data["generate"]] == ["ciuic"] * 2 + ["bf16"] * 2
    assert [row["ratio"] for row in data["memory"]] == [0.98] * 2
    assert [row["peers"].get("good") for row in data["products"] if "good" in row["peers"]] == [
        pytest.approx(1e-5)
    ] * 4
    said = "\n".join(data["not_measured"])
    assert "absent: not installed" in said and "batch 1, CUDA graphs on: RuntimeError: no compiler" in said
    assert "parameters of over 2^31 bytes" in said
    assert data["ceilings"]["empty"] == pytest.approx(1e-5)
    shown = capsys.readouterr().out
    assert "98.0%" in shown and "finished" in shown and "attention, heads" in shown


def test_a_red_gate_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "run_gate", lambda cases, *rest: [run.Failure("linear", "two runs differ")])
    status, data, drawn = report_of(tmp_path)
    assert (status, data["state"], drawn) == (1, "finished", False)
    assert data["ceilings"] is None and not data["products"] and not data["generate"]
    assert data["gate"]["failures"] == [{"case": "linear", "what": "two runs differ"}]


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **named: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("module", "name", "lost", "kept"),
    [
        (run, "measure_generation", "generate: ended by RuntimeError: a CUDA error", "products"),
        pytest.param(
            others,
            "measure_attention",
            "attention, siblings, dequantize: ended by",
            "products",
            marks=pytest.mark.slow,
        ),
        (run, "measure_shape", "V3 dense gate_proj at 1 to 2 tokens: RuntimeError: a CUDA error", "generate"),
    ],
)
def test_a_section_that_fails_is_a_sentence(
    module: Any, name: str, lost: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, failing(RuntimeError("a CUDA error\nmore")))
    status, data, drawn = report_of(tmp_path)
    assert (status, data["state"], drawn) == (0, "finished", True)
    assert data[kept] and any(what.startswith(lost) for what in data["not_measured"])
    assert not any("\n" in what for what in data["not_measured"])


@pytest.mark.slow
def test_out_of_memory_in_one_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.measure_shape

    def measure(shape: WeightShape, *rest: Any) -> Any:
        if shape.name == "V3 experts down":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(shape, *rest)

    monkeypatch.setattr(run, "measure_shape", measure)
    _, data, _ = report_of(tmp_path)
    assert "V3 experts down at 1 to 2 tokens: out of memory after 0 of 4 rows" in data["not_measured"]
    assert {row["name"] for row in data["products"]} == {shape.name for shape in WEIGHTS} - {
        "V3 experts down"
    }


def test_a_peer_that_raises_has_a_sentence_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Peer("wrong", "torch", lambda weight: lambda x: 2 * (x @ weight.t()))
    monkeypatch.setattr(products, "PEERS", (Peer("broken", "torch", broken_quantizer), wrong))
    _, data, _ = report_of(tmp_path)
    compared = [row for row in data["products"] if row["errors"]]
    assert len(compared) == 4
    for row in compared:
        assert row["errors"]["broken"] == "TypeError: unexpected keyword argument"
        assert "its product is off by 100%" in row["errors"]["wrong"]
        assert row["seconds"]


def test_no_time_left_is_said_of_everything(tmp_path: Path) -> None:
    status, data, _ = report_of(tmp_path, "--minutes", "0")
    assert status == 0 and not data["products"] and not data["generate"]
    said = "\n".join(data["not_measured"])
    for what in (
        "V3 dense gate_proj at 1 to 2 tokens",
        "V3 shared gate_up at 3",
        "generate",
        "other at 1 to 3",
    ):
        assert f"{what}" in said, what


@pytest.mark.parametrize("how", ["ctrl-c", "asked to end"])
def test_an_interrupted_run_keeps_its_rows(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.measure_shape

    def measure(shape: WeightShape, *rest: Any) -> Any:
        if shape.name == "V3 experts gate_up":
            if how == "ctrl-c":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        return right(shape, *rest)

    monkeypatch.setattr(run, "measure_shape", measure)
    status, data, drawn = report_of(tmp_path)
    assert (status, data["state"], drawn) == (130, "interrupted", True)
    assert {row["name"] for row in data["products"]} == {"V3 dense gate_proj", "V3 shared gate_up"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_was_measured_is_in_the_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process can say nothing any more."""
    found: list[dict[str, Any]] = []
    right = run.measure_shape

    def measure(shape: WeightShape, *rest: Any) -> Any:
        found.append(json.loads(next(tmp_path.glob("*.json")).read_text()))
        return right(shape, *rest)

    monkeypatch.setattr(run, "measure_shape", measure)
    report_of(tmp_path)
    assert [data["state"] for data in found] == ["running"] * len(found)
    assert found[0]["gate"]["cases"] and found[0]["ceilings"] and not found[0]["products"]
    assert [len(data["products"]) for data in found[:5]] == [0, 4, 8, 12, 16]


def test_an_error_outside_of_the_sections_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_ceilings", failing(RuntimeError("no copy")))
    status, data, _ = report_of(tmp_path)
    assert (status, data["state"]) == (1, "ended by RuntimeError: no copy")


def test_the_gate_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(run, "compile_cases", lambda cases, device, sizes: seen.update(compiled=len(cases)))
    monkeypatch.setattr(
        run,
        "run_gate",
        lambda cases, device, step, workers, sizes: seen.update(workers=workers, sizes=sizes) or [],
    )
    assert main(["bench", "kernels", "--gate-only"]) == 0
    assert seen == {"compiled": 1, "workers": 0, "sizes": run.SMALL}
    assert "1 cases right" in capsys.readouterr().out
