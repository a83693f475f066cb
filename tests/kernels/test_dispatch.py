"""Which implementation runs: the device decides, and one switch."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels import codec, dispatch
from ciuic_kernels.codecs.zero import ZeroCodec
from ciuic_kernels.cpu import native
from tests.kernels.operands import operand

CPU = torch.device("cpu")


@pytest.mark.usefixtures("compiled")
def test_the_switch_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIUIC_IMPL", raising=False)
    assert dispatch.use_native(CPU)
    monkeypatch.setenv("CIUIC_IMPL", "reference")
    assert not dispatch.use_native(CPU)


def test_other_devices_have_no_compiled_cpu_kernels() -> None:
    assert not dispatch.use_native(torch.device("cuda"))
    assert not dispatch.use_native(torch.device("meta"))


def test_a_machine_without_a_compiler_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIUIC_IMPL", raising=False)
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "unavailable_reason", lambda: "no C compiler was found")
    monkeypatch.setattr(dispatch, "_said", set())
    with pytest.warns(UserWarning, match="slow torch reference on this CPU: no C compiler was found"):
        assert not dispatch.use_native(CPU)
    assert not dispatch.use_native(CPU)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("codec_id", [3, 127, 255])
def test_a_codec_that_the_compiled_kernels_do_not_know_turns_them_off(
    codec_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any time: they would take its records for another codec's, and read what is not there."""
    monkeypatch.delenv("CIUIC_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "_said", set())
    assert dispatch.use_native(CPU)
    for registry, key in ((codec._BY_ID, codec_id), (codec._BY_NAME, "foreign")):
        monkeypatch.setitem(registry, key, ZeroCodec(codec_id, "foreign"))
    with pytest.warns(UserWarning, match="blocks.c has no code for the codec foreign"):
        assert not dispatch.use_native(CPU)
    with pytest.raises(RuntimeError, match="no code for the codec foreign"):
        w = operand((5, 40))
        native.gather(w.arena, w.tags, w.derived.offsets, 5, 40, torch.tensor([0]), torch.float32)


def test_asking_for_the_reference_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIUIC_IMPL", "reference")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(dispatch, "_said", set())
    assert not dispatch.use_native(CPU)
