"""Which implementation runs: the device decides, and one switch."""

from __future__ import annotations

import pytest
import torch

from ciuic_kernels import dispatch
from ciuic_kernels.cpu import native

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


def test_asking_for_the_reference_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIUIC_IMPL", "reference")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(dispatch, "_said", set())
    assert not dispatch.use_native(CPU)
