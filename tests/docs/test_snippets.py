"""The examples of a page run as they stand, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.utils import logging

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["tensors.md", "finetuning.md", "training-memory.md", "cache.md"])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logging.disable_progress_bar()
    examples = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert examples
    exec(compile("\n".join(examples), page, "exec"), {"__name__": "__main__"})
