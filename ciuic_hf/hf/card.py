"""The model card of a compressed checkpoint."""

from __future__ import annotations

from typing import Any

from ciuic_hf.report import Report, human_bytes

_CARD = """---
library_name: transformers
tags:
- ciuic
{base}---

# {title}

{origin} compressed with Ciuic: {bits:.2f} bits per weight with everything
counted, {after} instead of {before}.

```python
import ciuic_hf  # registers the format; without it transformers refuses this checkpoint
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{repository}")
```

`pip install ciuic-hf`

| role | tensors | bits per weight |
|---|---|---|
{rows}
"""


def model_card(model: Any, report: Report, repository: str) -> str:
    """Markdown with the snippet that loads the model and what was compressed to what."""
    origin = getattr(model.config, "_name_or_path", "") or ""
    is_hub_id = origin.count("/") == 1 and not origin.startswith((".", "/"))
    roles = sorted({p.role for p in report.compressed})
    rows = [
        f"| {role} | {sum(p.role == role for p in report.compressed)} | {report.bits_per_weight([role]):.2f} |"
        for role in roles
    ]
    return _CARD.format(
        base=f"base_model: {origin}\n" if is_hub_id else "",
        title=repository.rsplit("/", 1)[-1],
        origin=f"[{origin}](https://huggingface.co/{origin})" if is_hub_id else type(model).__name__,
        bits=report.bits_per_weight(),
        before=human_bytes(report.dense_nbytes),
        after=human_bytes(report.nbytes),
        auto_class="AutoModelForCausalLM" if "CausalLM" in type(model).__name__ else "AutoModel",
        repository=repository,
        rows="\n".join(rows),
    )
