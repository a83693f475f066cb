"""A byte-level BPE tokenizer (Sennrich et al., arXiv 1508.07909; bytes as the base alphabet as in GPT-2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from ciuic_hf.demo.config import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learns the merges from `texts`. Encoding prepends BOS, as DeepSeek-V3's tokenizer does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],  # takes ids 0 and 1
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if (tokenizer.token_to_id(BOS_TOKEN), tokenizer.token_to_id(EOS_TOKEN)) != (BOS_ID, EOS_ID):
        raise ValueError("the special tokens did not get the ids that the model configuration names")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A {BOS_TOKEN} $B",
        special_tokens=[(BOS_TOKEN, BOS_ID)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out_dir: Path, *, max_length: int) -> None:
    """Writes tokenizer.json and the tokenizer_config.json from which AutoTokenizer knows the class to use."""
    tokenizer.save(str(out_dir / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
