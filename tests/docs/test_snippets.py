"""The examples of a page run as they stand, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from transformers.utils import logging

DOCS = Path(__file__).parents[2] / "docs"


PAGES = ["tensors.md", "finetuning.md", "training-memory.md", "cache.md"]
LONGER = ["transformers.md", "cli.md", "../README.md"]


@pytest.mark.parametrize("page", PAGES + [pytest.param(page, marks=pytest.mark.slow) for page in LONGER])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", lambda *_: None)  # there is no hub here
    logging.disable_progress_bar()
    examples = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert examples
    exec(compile("\n".join(examples), page, "exec"), {"__name__": "__main__"})
