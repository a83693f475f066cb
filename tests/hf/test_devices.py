"""Memory that is asked of a device, and memory by device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ciuic_hf import CiuicConfig, CiuicError
from ciuic_hf.hf import devices
from ciuic_hf.hf.placing import place_of, split_beside, split_layers
from ciuic_hf.planning.memory import Run, footprint

GPU, CPU = 30 << 20, 20 << 20


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: so much free on a GPU, so much on the CPU."""
    free = {"cuda": GPU, "cpu": CPU}
    monkeypatch.setattr(devices, "device_memory", lambda device: (1 << 40, free[device.type]))


@pytest.mark.parametrize(
    ("device_map", "free"),
    [
        (None, int(0.9 * CPU)),
        ("cpu", int(0.9 * CPU)),
        ("cuda:1", GPU),
        (torch.device("cuda", 1), GPU),
        (0, GPU),
        ({"": 0}, GPU),
        ({"model": "cuda:0", "lm_head": 0}, GPU),
        ("auto", int(0.9 * CPU)),  # no GPU here
    ],
)
def test_auto_is_what_the_device_has_free(machine: None, device_map: Any, free: int) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        free = GPU
    assert devices.free_nbytes(device_map) == free


@pytest.mark.parametrize("device_map", [{"model": 0, "lm_head": "cpu"}, {"": "disk"}])
def test_auto_is_refused_for_several_devices(machine: None, device_map: Any) -> None:
    with pytest.raises(CiuicError, match='memory="auto" is for one device'):
        devices.free_nbytes(device_map)


def stored(model: Any, place: Callable[[str], Any], device: Any) -> int:
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if place(name) == device)


def test_auto_fills_what_is_free(machine: None, checkpoint: Callable[[str], Path]) -> None:
    config = CiuicConfig(memory="auto", context=64)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama_wide"), quantization_config=config)
    used = stored(model, lambda _: 0, 0) + footprint(model.config.to_dict(), 64, 1, Run(device="cpu")).total
    assert used <= int(0.9 * CPU)
    assert model.config.quantization_config.bits == pytest.approx(model.ciuic_report.bits_per_weight(), abs=1)
    assert "memory" not in model.config.quantization_config.to_dict()


def test_memory_by_device_is_kept_on_each(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """The second layer has less room than the first, so it gets fewer bits."""
    path = checkpoint("llama_wide")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    memory = {"cpu": "6MiB", "disk": "4MiB"}
    config = CiuicConfig(memory=memory, context=16)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map=device_map, offload_folder=tmp_path
    )
    sizes = {"cpu": 0, "disk": 0}
    place = place_of(device_map)
    for parameter in model.ciuic_report.compressed:
        sizes[place(parameter.name)] += parameter.nbytes
    run = Run(device="cpu")
    beside = split_beside(footprint(model.config.to_dict(), 16, 1, run), {"cpu": 1, "disk": 1})
    for device, memory_nbytes in (("cpu", 6 << 20), ("disk", 4 << 20)):
        room = memory_nbytes - beside[device]
        assert 0.97 * room < sizes[device] <= room


@pytest.mark.parametrize(
    ("memory", "device_map", "message"),
    [
        ({0: "1GiB"}, "auto", "memory by device needs to know which module goes where"),
        ({0: "1GiB"}, {"": "cpu"}, "memory says nothing of device 'cpu'"),
        ({"cpu": "1GiB"}, {"model": "cpu"}, "The device_map says nothing of lm_head"),
    ],
)
def test_memory_by_device_is_refused(
    memory: Any, device_map: Any, message: str, checkpoint: Callable[[str], Path]
) -> None:
    config = CiuicConfig(memory=memory, context=16)
    with pytest.raises(CiuicError, match=message):
        AutoModelForCausalLM.from_pretrained(
            checkpoint("llama_wide"), quantization_config=config, device_map=device_map
        )


@pytest.mark.parametrize("memory", [{}, {0: "lots"}])
def test_bad_sizes_by_device(memory: Any) -> None:
    with pytest.raises(CiuicError, match="memory"):
        CiuicConfig(memory=memory, context=16)


def test_layers_are_spread_whole_and_in_order(checkpoint: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint("v3_bf16"))
    weights = {name: p.numel() for name, p in model.named_parameters()}
    device_map = split_layers(model, weights, 2)
    assert list(device_map.values()) == sorted(device_map.values())
    assert set(device_map.values()) == {0, 1}
    place = place_of(device_map)
    for name in weights:
        assert place(name) in (0, 1)
    with pytest.raises(CiuicError, match="cannot be spread"):
        split_layers(model, weights, 99)
