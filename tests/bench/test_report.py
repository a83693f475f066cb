"""What a run prints, writes and draws, from made-up numbers; nothing of it needs a GPU."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ciuic_hf.bench.kernels.bar import BarLine, bar
from ciuic_hf.bench.kernels.end_to_end import GenerateRow
from ciuic_hf.bench.kernels.facts import parse_smi, slug
from ciuic_hf.bench.kernels.gate import Failure
from ciuic_hf.bench.kernels.picture import draw
from ciuic_hf.bench.kernels.products import CUBLAS, FORMATS, ProductRow
from ciuic_hf.bench.kernels.report import report
from ciuic_hf.bench.kernels.result import Result
from ciuic_hf.bench.kernels.run import FIRST
from ciuic_hf.bench.kernels.shapes import TOKENS, standard
from ciuic_hf.bench.kernels.timing import Ceilings
from tests.bench.conftest import MACHINE

CEILINGS = Ceilings(copy_bandwidth=3e12, dense_rate=7e14)


def product(name: str, bits: float, tokens: int, share: float, ratio: float, **peers: float) -> ProductRow:
    """A row with this share of the copy bandwidth, this ratio to cuBLAS and these ratios to peers."""
    shape = standard(name)
    nbytes = int(shape.weights * bits / 8) * max(1, shape.routed if tokens == 1 else 1)
    seconds = nbytes / (share * CEILINGS.copy_bandwidth)
    times = {CUBLAS: ratio * seconds} | {peer: r * seconds for peer, r in peers.items()}
    return ProductRow(name, shape.shape, shape.weights, bits, tokens, nbytes, seconds, times)


def full_result(share: float = 0.9, ratio: float = 3.5) -> Result:
    """A run that measured everything of the bar."""
    rows = [
        product(name, form.bits, tokens, share, ratio, gemlite=1.4)
        for name in FIRST
        for form in FORMATS
        for tokens in TOKENS
    ]
    generated = [
        GenerateRow(model, 1, True, speed, 20 << 30) for model, speed in (("ciuic", 310.0), ("bf16", 100.0))
    ]
    return Result(MACHINE, 400, [], CEILINGS, rows, generated, ["torchao int4: not installed"], 400.0)


def by_what(lines: list[BarLine]) -> dict[tuple[str, str], BarLine]:
    return {(line.what, line.unit): line for line in lines}


def test_a_good_run_meets_every_goal() -> None:
    lines = full_result().bar()
    assert [line.verdict for line in lines] == ["goal"] * len(lines)
    assert all(line.floor <= line.goal for line in lines)


def test_the_worst_case_decides() -> None:
    result = full_result()
    result.products.append(product("V3 dense gate_proj", 4, 8, share=0.7, ratio=2.0))
    lines = by_what(result.bar())
    assert lines["4-bit decode, large", "of copy bandwidth"].verdict == "floor"
    ratio = lines["4-bit decode, large", "x cuBLAS"]
    assert (ratio.verdict, ratio.measured) == ("not met", pytest.approx(2.0))
    assert ratio.of == "V3 dense gate_proj, 4 bits, 8 tokens"
    assert lines["4-bit decode, 4096 x 7168", "x cuBLAS"].verdict == "goal"


def test_experts_count_the_bytes_of_both_products() -> None:
    result = full_result()
    for row in result.products:
        if row.name == "V3 experts down" and row.tokens == 1 and row.seconds:
            row.seconds *= 3
    (line,) = [line for line in result.bar() if "experts" in line.what]
    rows = [r for r in result.products if "experts" in r.name and r.tokens == 1 and r.bits == 4]
    floor = sum(r.nbytes for r in rows) / CEILINGS.copy_bandwidth
    assert line.measured == pytest.approx(floor / sum(r.seconds or 0 for r in rows))
    assert line.verdict == "not met"


def test_nothing_measured_is_not_met() -> None:
    lines = bar([], [], CEILINGS)
    assert {line.verdict for line in lines} == {"not measured"}


def printed(result: Result) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in report(result):
        console.print(part)
    return console.export_text()


def test_it_prints_what_it_measured() -> None:
    text = printed(full_result())
    for word in ("NVIDIA H100", "3000 GB/s", "700 TFLOP/s", "90%", "3.50x", "x gemlite", "310.0", "3.10x"):
        assert word in text, word
    assert "torchao int4: not installed" in text


def test_a_red_gate_prints_no_speed() -> None:
    result = full_result()
    result.failures = [Failure("linear, grid4_g64, 64 x 128, bfloat16, 8 tokens", "two runs differ")]
    text = printed(result)
    assert "RED" in text and "two runs differ" in text
    assert "GB/s" not in text and "tokens/s" not in text and "%" not in text


def test_an_error_of_a_peer_is_shown_and_kept() -> None:
    row = product("V3 shared gate_up", 4, 1, 0.5, 2.0)
    row.errors["gemlite int4"] = "TypeError: unexpected"
    result = Result(MACHINE, 1, [], CEILINGS, [row], [], [], 1.0)
    assert result.to_dict()["products"][0]["errors"] == {"gemlite int4": "TypeError: unexpected"}


def test_json_holds_every_number() -> None:
    data = json.loads(json.dumps(full_result().to_dict()))
    assert data["machine"]["gpu"] == MACHINE.gpu
    assert len(data["products"]) == len(FIRST) * len(FORMATS) * len(TOKENS)
    assert data["products"][0]["share"] == pytest.approx(0.9)
    assert data["products"][0]["ratio"] == pytest.approx(3.5)
    assert {"gate", "ceilings", "bar", "generate", "not_measured", "seconds"} <= set(data)


@pytest.mark.parametrize("products", [0, 60])
def test_the_picture_is_drawn(products: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    result = full_result()
    result.products = result.products[:products]
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_nvidia_smi_is_read() -> None:
    read = parse_smi("580.65.06, 1980, 2619, 1980, 700.00, 35\n")
    assert (read["driver"], read["sm_clock_mhz"], read["temperature_c"]) == ("580.65.06", "1980", "35")
    assert parse_smi("") == {} and parse_smi("no devices were found") == {}


def test_a_gpu_as_part_of_a_file_name() -> None:
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
