"""Text as token streams and training windows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tokenizers import Tokenizer

from ciuic_hf.demo.config import BOS_ID, EOS_ID
from ciuic_hf.demo.text import chapters


def encode(tokenizer: Tokenizer, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The token stream [n] int64, chapters ending in EOS, and the offsets of the verses in it [verses]."""
    ids: list[int] = []
    starts: list[int] = []
    for chapter in chapters(text):
        for verse in chapter.split("\n"):
            starts.append(len(ids))
            ids += tokenizer.encode(verse + "\n", add_special_tokens=False).ids
        ids[-1] = EOS_ID  # in place of the last line's end
    return torch.tensor(ids), torch.tensor(starts)


def training_windows(
    stream: torch.Tensor, starts: torch.Tensor, *, batch: int, length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yields batches [batch, length + 1] int64: BOS, then the text from a random verse on, without end.

    Every window begins with BOS at the start of a verse, because prompts will begin so; all verses take their
    turn before one comes again.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = starts[starts + length <= len(stream)]
    offsets = torch.arange(length)
    while True:
        order = starts[torch.randperm(len(starts), generator=generator)]
        whole = len(order) // batch * batch  # a smaller last batch would be compiled anew
        for chosen in torch.split(order[:whole], batch):
            text = stream[chosen[:, None] + offsets]
            yield torch.cat([torch.full((len(chosen), 1), BOS_ID), text], dim=1)
