"""Rounding by a calibration, end to end: what it improves, what it counts, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ciuic_hf import CiuicConfig, CiuicError, apply_ciuic_compression
from ciuic_hf.cli.main import main
from ciuic_hf.demo import bf16_path
from ciuic_hf.hf import probe
from ciuic_hf.hf.decoder_layers import decoder_layers
from ciuic_hf.hf.layer_by_layer import StreamedModel
from ciuic_hf.hf.offline import compress_checkpoint
from ciuic_hf.hf.probe import measure
from ciuic_hf.planning.moments import InputMoments, Moments, factor_of, moments_of
from ciuic_hf.planning.sensitivity import Sensitivity
from tests.hf.conftest import read_files

DOWN = "model.layers.1.mlp.experts.down_proj"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


def some_ids(rows: int = 8, length: int = 64) -> torch.Tensor:
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def calibration(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny DeepSeek-V3."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("v3_bf16"), dtype=torch.float32)
    path, moments = tmp_path_factory.mktemp("calibration") / "calib.safetensors", Moments()
    measure(model, some_ids(), "test", moments=moments).save(path, moments)
    return path


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=CiuicConfig(**options))


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (300, 64), (1, 1), (5, 9), (400, 300)])
def test_factors_hold_the_moments(shape: tuple[int, int]) -> None:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    rows[:, ::3] = 0
    factor = factor_of(rows)
    assert factor.numel() == min(shape[0] * shape[1], shape[1] * (shape[1] + 1) // 2)
    wanted = rows.T @ rows
    torch.testing.assert_close(moments_of(factor), wanted, atol=0.02 * float(wanted.abs().max()), rtol=0)


def test_moments_are_those_of_the_inputs(checkpoint: Callable[[str], Path]) -> None:
    """Against inputs and gradients caught by hooks in one ordinary pass; q, k and v share theirs."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama_untied"), dtype=torch.float32)
    ids, moments, caught = some_ids(2, 24), Moments(), {}
    measure(model, ids, "test", moments=moments)
    attention = model.model.layers[0].self_attn
    kinds = ("q_proj", "k_proj", "v_proj")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert {moments.inputs[f"model.layers.0.self_attn.{kind}.weight"] for kind in kinds} == {name}
    for kind in kinds:
        getattr(attention, kind).register_forward_hook(
            lambda _m, inputs, out, kind=kind: (out.retain_grad(), caught.update({kind: (inputs[0], out)}))[0]
        )
    generator, wanted = torch.Generator().manual_seed(1), torch.zeros(1)
    for row in ids:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        weight = sum(out.grad[0].square().sum(-1, keepdim=True) for _, out in caught.values())
        x = caught["q_proj"][0][0].detach()
        wanted = wanted + (x * weight).T @ x / ids.numel()
    found = moments_of(moments.factors[name])
    torch.testing.assert_close(found, wanted, atol=0.01 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("family", [pytest.param("v3_bf16", marks=pytest.mark.slow), "v3_fp8"])
def test_calibrated_loads_store_the_same_bytes_with_less_error(
    family: str, checkpoint: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    """Same sizes as without rounding; errors fall; saves and reloads bit for bit; repeats itself."""
    path = checkpoint(family)
    plain = load(path, bits=3.25, sensitivity=calibration)
    model = load(path, bits=3.25, calibration=calibration)
    report = model.ciuic_report
    assert plain.ciuic_report.rounded is None
    stored = [r.bits_per_weight(("attention", "mlp", "experts")) for r in (report, plain.ciuic_report)]
    assert stored[0] == pytest.approx(stored[1], rel=1e-3)
    assert 0 < report.rounded.stored < 0.9 * report.rounded.nearest
    assert "Rounded for calibrated inputs" in str(report)
    assert json.dumps(report.to_dict())
    again = load(path, bits=3.25, calibration=calibration)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for other in (again, reloaded):
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "calib" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("v3_bf16", {"attention": "sparse", "experts": "sparse30"}),
        pytest.param("v3_fused", {}, marks=pytest.mark.slow),
    ],
)
def test_a_model_in_memory_is_rounded_as_from_pretrained_does(
    family: str, modules: dict[str, Any], checkpoint: Callable[[str], Path], calibration: Path
) -> None:
    """The same file, the same bytes, the same account up to the order of its sums."""
    config = CiuicConfig(bits=3.25, modules=modules, calibration=calibration)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint(family), quantization_config=config)
    model = apply_ciuic_compression(AutoModelForCausalLM.from_pretrained(checkpoint(family)), config)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    ours, theirs = model.ciuic_report.rounded, loaded.ciuic_report.rounded
    assert (ours.matrices, ours.plain, ours.pruned.keys()) == (
        theirs.matrices, theirs.plain, theirs.pruned.keys(),
    )  # fmt: skip
    assert ours.stored == pytest.approx(theirs.stored) and ours.nearest == pytest.approx(theirs.nearest)


def test_pruning_says_what_it_cost(
    checkpoint: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    """Of the attention alone, less than by magnitude; offline the same."""
    path, modules = checkpoint("v3_bf16"), {"attention": "sparse50", "experts": "sparse20"}
    report = load(path, modules=modules, calibration=calibration).ciuic_report
    pruned = report.rounded.pruned
    assert any("attn" in name for name in pruned) and any("experts" in name for name in pruned)
    assert not any("layers.0.mlp" in name for name in pruned)
    for cost in pruned.values():
        assert 0 < cost.relative_error <= 1.01 * cost.relative_error_by_magnitude < 1
    assert sum(c.stored for c in pruned.values()) < 0.9 * sum(c.by_magnitude for c in pruned.values())
    assert f"Sparse blocks in {len(pruned)} weights" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["rounded"]["pruned"].keys() == pruned.keys()
    config = CiuicConfig(modules=modules, calibration=calibration)
    offline = compress_checkpoint(path, tmp_path / "offline", config).rounded
    assert offline is not None and offline.pruned.keys() == pruned.keys()
    for name, cost in offline.pruned.items():
        assert cost.stored == pytest.approx(pruned[name].stored, rel=1e-4)


def test_rounding_alone_follows_any_plan(checkpoint: Callable[[str], Path], calibration: Path) -> None:
    """Uniform bits, and what modules says: sensitivities are for the default policy, rounding for all."""
    path = checkpoint("v3_bf16")
    options: dict[str, Any] = {"bits": 3, "policy": "uniform", "modules": {"attention": "grid2_g64"}}
    model = load(path, calibration=calibration, **options)
    plain = load(path, **options)
    reports = [[vars(p) for p in m.ciuic_report.compressed] for m in (model, plain)]
    assert reports[0] == reports[1]
    assert model.ciuic_report.rounded.stored < model.ciuic_report.rounded.nearest


def test_experts_that_met_no_token_are_rounded_plainly_and_counted(
    checkpoint: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    inputs = InputMoments(calibration)
    known = [i for i in range(64) if inputs.feedback(DOWN, i) is not None]
    assert known and inputs.feedback(GATE_UP, 0) is not None
    with safe_open(calibration, framework="pt") as file:
        metadata = dict(file.metadata())
    names = json.loads(metadata["ciuic-moments"])
    del names[f"{DOWN}/{known[0]}"]
    save_file(
        load_file(calibration), tmp_path / "c.safetensors", metadata | {"ciuic-moments": json.dumps(names)}
    )
    options: dict[str, Any] = {"bits": 4, "policy": "uniform"}
    before = load(checkpoint("v3_bf16"), calibration=calibration, **options)
    after = load(checkpoint("v3_bf16"), calibration=tmp_path / "c.safetensors", **options)
    plain = load(checkpoint("v3_bf16"), **options)
    counts = [model.ciuic_report.rounded.plain.get(DOWN, 0) for model in (before, after)]
    assert counts[1] == counts[0] + 1
    assert f"{DOWN} ({counts[1]})" in str(after.ciuic_report.rounded)
    experts = [m.get_submodule(DOWN.rpartition(".")[0]) for m in (after, plain)]
    packed = [m.packed("down_proj") for m in experts]
    assert torch.equal(packed[0].tags[known[0]], packed[1].tags[known[0]])


@pytest.mark.parametrize("family", ["v3_bf16", "v3_fused", "v3_fp8", "qwen2_tied"])
def test_a_streamed_checkpoint_measures_like_one_in_memory(
    family: str, checkpoint: Callable[[str], Path]
) -> None:
    """One layer at a time, FP8 too; between layers no weight of a layer is there."""
    raw = CiuicConfig(bits=16, modules={"embeddings": "raw", "lm_head": "raw"})
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(family), dtype=torch.float32, quantization_config=raw
    )
    streamed = StreamedModel(checkpoint(family), torch.float32, "cpu")
    whole, apart = Moments(), Moments()
    wanted = measure(model, some_ids(), "test", moments=whole).blocks
    found = measure(streamed.model, some_ids(), "test", moments=apart, present=streamed.present).blocks
    assert found.keys() == wanted.keys() and apart.inputs == whole.inputs
    for name, values in wanted.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-9)
    for layer in decoder_layers(streamed.model).values():
        assert all(p.device.type == "meta" for p in layer.parameters())


def test_the_command_line(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.safetensors"
    command = ["calibrate", str(checkpoint("v3_fp8")), "--save", str(file), "--rounding", "--tokens", "512"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Measured on 512 tokens" in shown and "Inputs to round by" in shown
    model = load(checkpoint("v3_fp8"), bits=3, calibration=file)
    assert model.ciuic_report.rounded.stored < model.ciuic_report.rounded.nearest


def test_what_is_refused(
    checkpoint: Callable[[str], Path], calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CiuicError, match="made with another model"):
        load(checkpoint("llama_wide"), bits=4, policy="uniform", calibration=calibration)
    Sensitivity({"w": torch.ones(1, 1)}, "test", 1).save(tmp_path / "s.safetensors")
    with pytest.raises(CiuicError, match="no moments of inputs to round by"):
        load(checkpoint("v3_bf16"), bits=4, policy="uniform", calibration=tmp_path / "s.safetensors")
    with pytest.raises(CiuicError, match="calibration is for models of transformers"):
        apply_ciuic_compression(torch.nn.Linear(64, 64), CiuicConfig(calibration=calibration))
    with pytest.raises(CiuicError, match="There is no file"):
        load(checkpoint("v3_bf16"), bits=4, policy="uniform", calibration=tmp_path / "none")
    (tmp_path / "short.txt").write_text("In the beginning")
    for more, message in (
        (["--tokens", "5"], "--tokens must be at least 128"),
        (["--dtype", "int8"], "--dtype must be auto, float32"),
        (["--text", str(tmp_path / "short.txt")], "tokens; at least 128 are needed"),
    ):
        save = str(tmp_path / "x.safetensors")
        assert main(["calibrate", str(bf16_path()), "--save", save, *more]) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_activations_that_are_not_finite_are_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama_untied"), dtype=torch.float32)
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _m, args: (args[0] * float("inf"),))
    monkeypatch.setattr(
        probe, "_draw", lambda logits, _g: torch.zeros(*logits.shape[:-1], 1, dtype=torch.long)
    )
    with pytest.raises(CiuicError, match="not finite"):
        measure(model, some_ids(1), "test", moments=Moments())


@pytest.mark.parametrize("family", ["v3_bf16", "v3_fp8"])
def test_offline_compression_rounds_the_same(
    family: str, checkpoint: Callable[[str], Path], calibration: Path, tmp_path: Path
) -> None:
    path, config = checkpoint(family), CiuicConfig(bits=3.25, calibration=calibration)
    report = compress_checkpoint(path, tmp_path / "offline", config)
    loaded = load(path, bits=3.25, calibration=calibration)
    assert report.rounded == loaded.ciuic_report.rounded and report.rounded.matrices > 20
    loaded.save_pretrained(tmp_path / "loaded")
    ours, theirs = (read_files(tmp_path / name) for name in ("offline", "loaded"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
