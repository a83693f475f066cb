"""Memory budgets and plans: what they choose, that a load follows them exactly, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ciuic_hf import CiuicConfig, CiuicError
from ciuic_hf.cli.main import main
from ciuic_hf.hf.placing import TooSmallError
from ciuic_hf.planning.cache_formats import cache_nbytes
from ciuic_hf.planning.memory import Run, footprint
from ciuic_hf.planning.plan import ModelPlan
from ciuic_kernels import BlockGrid

CPU = Run(device="cpu")


def stored(model: Any) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("family", ["v3_fp8", "qwen2_tied", "llama_wide"])
def test_a_budget_is_filled_and_not_exceeded(family: str, checkpoint: Callable[[str], Path]) -> None:
    """Weights as they are after the load, with what the memory model counts beside them."""
    dense = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    text, size = dense.config.to_dict(), sum(p.numel() for p in dense.parameters())
    memory = footprint(text, 128, 2, CPU).total + int(0.75 * size)
    config = CiuicConfig(memory=memory, context=128, batch=2)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), quantization_config=config)
    offsets = sum(
        8 * (BlockGrid(tuple(p.shape)).strips * BlockGrid(tuple(p.shape)).matrices + 1)
        for p in model.ciuic_report.compressed
    )
    used = stored(model) + offsets + footprint(text, 128, 2, CPU).total
    assert memory - 3 * 16384 < used <= memory
    assert 2 < model.ciuic_report.bits_per_weight() < 10


@pytest.mark.parametrize("chunk", [None, "none"])
def test_a_budget_too_small_says_what_would_do_and_that_does(
    chunk: str | None, checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint("llama_wide")
    given = {"memory": "30MiB", "prefill_chunk": chunk}
    with pytest.raises(CiuicError, match=r"The smallest plan needs .* or context=") as caught:
        load_with(path, **given, context=20_000)
    message = str(caught.value)
    enough, context = (
        message.split('memory="')[1].split('"')[0],
        int(message.split("context=")[2].split(",")[0]),
    )
    load_with(path, **given | {"memory": enough}, context=20_000)
    load_with(path, **given, context=context)
    with pytest.raises(CiuicError, match="The smallest plan needs"):
        load_with(path, **given, context=context + 1)


def test_a_cache_that_would_do_is_offered_and_does(checkpoint: Callable[[str], Path]) -> None:
    """The most bits at which the whole fits."""
    path = checkpoint("llama_wide")
    options = {"memory": 1000, "context": 20_000}
    needed = {}
    for bits in (None, 8, 4):
        with pytest.raises(TooSmallError) as caught:
            load_with(path, cache_bits=bits, **options)
        needed[bits] = caught.value.needed
        assert caught.value.cache_bits == 0
    assert needed[4] < needed[8] < needed[None]
    for bits in (8, 4):
        with pytest.raises(CiuicError, match=rf"or context=\d+ or cache_bits={bits}, or bits with"):
            load_with(path, memory=needed[bits], context=20_000)
        model = load_with(path, memory=needed[bits], context=20_000, cache_bits=bits)
        assert model.config.quantization_config.cache_bits == bits


def test_a_plan_with_cache_bits(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saved plan brings them along; the other caches are among the alternatives."""
    path, file = checkpoint("llama_wide"), tmp_path / "plan.json"
    text = AutoConfig.from_pretrained(path).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(text | {"max_position_embeddings": 100_000}))
    options = ["plan", str(tmp_path / "config.json"), "--memory", "200MiB", "--device", "cpu"]
    options += ["--context", "2048", "--batch", "2"]
    assert main([*options, "--cache-bits", "8", "--save", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    element = torch.empty(0, dtype=AutoConfig.from_pretrained(path).dtype).element_size()
    assert found["cache_bits"] == 8
    assert found["budget"]["cache"] == cache_nbytes(text, 8, 2048, 2, element)
    rows = {row["choice"]: row for row in found["alternatives"]}
    contexts = [rows[name]["longest_context"] for name in ("cache in full", "this plan", "cache at 4 bits")]
    assert contexts == sorted(contexts) and contexts[0] < contexts[2] and "cache at 8 bits" not in rows
    assert load_with(path, plan=file).config.quantization_config.cache_bits == 8
    assert load_with(path, plan=file, cache_bits=4).config.quantization_config.cache_bits == 4
    assert main([*options, "--cache-bits", "4"]) == 0
    assert ", cache at 4 bits" in " ".join(capsys.readouterr().out.split())


def load_with(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=CiuicConfig(**options))


@pytest.mark.parametrize("family", ["v3_fp8", "qwen2_tied"])
def test_a_saved_plan_is_followed_exactly(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, file = checkpoint(family), tmp_path / "plan.json"
    options = ["plan", str(path), "--memory", "40MiB", "--context", "64", "--json", "--save", str(file)]
    options += ["--device", "cpu"]
    assert main(options) == 0
    shown, plan = json.loads(capsys.readouterr().out), ModelPlan.load(file)
    model = load_with(path, plan=file)
    for name, codecs in plan.codecs.items():
        tags = model.get_parameter(f"{name}_tags")[..., 0]
        assert torch.equal(tags, codecs.expand(tags.shape)), name
    assert model.ciuic_report.nbytes == shown["budget"]["compressed weights"] + sum(
        p.nbytes for p in model.ciuic_report.kept
    )
    assert shown["nbytes"] == sum(shown["budget"].values()) <= 40 << 20
    direct = load_with(path, memory="40MiB", context=64).state_dict()
    assert all(torch.equal(value, direct[name]) for name, value in model.state_dict().items())


def test_a_plan_for_another_model_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert (
        main(["plan", str(checkpoint("qwen2_tied")), "--bits", "4", "--context", "64", "--save", str(file)])
        == 0
    )
    with pytest.raises(CiuicError, match=r"for another model .*this model and .* in the plan"):
        load_with(checkpoint("llama_wide"), plan=file)


def test_damaged_plans_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert (
        main(["plan", str(checkpoint("qwen2_tied")), "--bits", "4", "--context", "64", "--save", str(file)])
        == 0
    )
    good = json.loads(file.read_text())
    first = next(iter(good["parameters"]))
    cases: list[tuple[Any, str]] = [
        ("{", "is not a plan"),
        ([], "is not a plan"),
        (good | {"version": 9}, "plan of version 9"),
        (good | {"model": "0"}, "damaged plan"),
        (
            good
            | {"parameters": good["parameters"] | {first: good["parameters"][first] | {"codecs": "AAAA"}}},
            "damaged plan",
        ),
        ({k: v for k, v in good.items() if k != "nbytes"}, "damaged plan"),
    ]
    for content, message in cases:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(CiuicError, match=message):
            ModelPlan.load(file)
    with pytest.raises(CiuicError, match="There is no plan"):
        ModelPlan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4, "memory": "1GiB", "context": 8}, "give one of them"),
        ({"bits": 4.25, "memory": "1GiB", "context": 8}, "give one of them"),
        ({"memory": "1GiB"}, "say for how many tokens"),
        ({"context": 100}, "belong to memory"),
        ({"plan": "p.json", "bits": 3}, "A plan holds every size"),
        ({"memory": "1GiB", "context": 8, "policy": "uniform"}, "goes by bits alone"),
        ({"memory": "much", "context": 8}, "memory must be a size"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CiuicError, match=message):
        CiuicConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H101"], "No card is named 'H101'; choose one of RTX3090"),
        (["--gpu", "H100", "--bits", "4"], "--gpu and --bits contradict each other"),
        (["--memory", "1MiB"], "Does not fit: at the smallest bits it needs"),
        (["--memory", "lots"], 'memory must be a size such as "22GiB"'),
        (["--count", "2"], "add --gpu or --memory"),
        (["--count", "0", "--gpu", "H100"], "--count must be 1 or more"),
        (["--count", "8", "--gpu", "H100"], "2 layers cannot be spread over 8 devices"),
        (["--device", "cpu", "--gpu", "H100"], "--device cpu is one device"),
        (["--revision", "main"], "is on this machine, where there is no revision"),
        (["--context", "0"], "context must be a positive integer"),
    ],
)
def test_bad_commands(
    options: list[str], message: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(checkpoint("llama_wide")), *options]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
