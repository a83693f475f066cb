"""The two implementations as fixtures, and one thread for everything that is small."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ciuic_kernels.cpu import native
from tests.kernels.samples import IMPLEMENTATIONS, implementation


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads cost more than they save on single blocks, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiled() -> None:
    """Leaves out a test that compares with the compiled kernels on a machine that cannot build them."""
    if not native.available():
        pytest.skip(native.unavailable_reason())


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation, in force during the test."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    with implementation(request.param):
        yield request.param
