"""How far a compressed language model is from the model it was made from.

Both models read the same tokens; at each position t both give a distribution over the next token, P_t (the
reference) and Q_t (the candidate). Reported are

* KL divergence in nats per token, mean over t of KL(P_t || Q_t) = sum_v P_t(v) * (ln P_t(v) - ln Q_t(v))
  (Kullback and Leibler 1951). It is the expected extra code length paid for coding text drawn from the
  reference with the candidate's probabilities, needs no labels, and is paired: both models see the same
  prefix, so it separates candidates long before perplexity does.
* perplexity, exp(-mean over t of ln Q_t(x_{t+1})), on the text itself, for both models.
* top-1 agreement, the fraction of positions at which both put most probability on the same token.
* accuracy, the fraction of predicted tokens that the model in question puts most probability on, for both models.

The text is cut into windows that share no context: token t of a window sees only the tokens before it in that
window. A window of n tokens yields n distributions (KL and top-1 use all of them) and n - 1 predicted tokens
(perplexity and accuracy). Results are comparable only at the same window, text and tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_WINDOW = 512


@dataclass(frozen=True)
class Quality:
    """Distance of a candidate from its reference; formulas in the module docstring."""

    kl: float  # nats per token, >= 0 up to rounding; 0 for the reference itself
    perplexity: float  # of the candidate
    reference_perplexity: float
    top1_agreement: float  # fraction, 0 to 1
    tokens: int  # positions that `kl` and `top1_agreement` average over
    accuracy: float  # of the candidate, fraction
    reference_accuracy: float


@dataclass(frozen=True)
class ReferenceLogprobs:
    """The reference's distributions, kept so that many candidates can be compared with one forward of it.

    Attributes:
        input_ids: int64 [1, T], on the CPU.
        logprobs: one float32 [n, V] per window, on the CPU: 4 * T * V bytes together (403 MB for 2048 tokens
            and 49152 words). Half precision would save half of that and is not offered: its rounding of ln P
            (up to 0.03 in bfloat16) is larger than the differences an 8-bit weight makes.
        window: tokens per window; the last one may be shorter.
    """

    input_ids: Tensor
    logprobs: tuple[Tensor, ...]
    window: int


def compare(
    reference: nn.Module | ReferenceLogprobs,
    candidate: nn.Module,
    input_ids: Tensor | None = None,
    window: int | None = None,
) -> Quality:
    """Measures `candidate` against `reference`.

    Args:
        reference: a causal language model, run here window by window (extra memory: a few windows of
            [window, V] float32), or the result of `reference_logprobs`, which fixes `input_ids` and `window`.
        candidate: a causal language model with the same vocabulary. Each model runs on its own device in its
            own dtype; logits become float32 before the log-softmax, and sums over tokens are float64.
        input_ids: int64 [1, T], T >= 2; required when `reference` is a model.
        window: tokens per window, `DEFAULT_WINDOW` if not given.

    Raises:
        ValueError: a bad shape or window, a model in training mode, two vocabularies, or `input_ids` or
            `window` that disagree with a `ReferenceLogprobs`.
    """
    ids, window = _text(reference, input_ids, window)
    divergence = agreed = reference_nll = candidate_nll = 0.0
    reference_hits = candidate_hits = 0
    for chunk, wanted, got in zip(
        ids.split(window, dim=1),
        _reference_windows(reference, ids, window),
        _windows(candidate, ids, window),
        strict=True,
    ):
        wanted = wanted.to(got.device)
        if wanted.shape != got.shape:
            raise ValueError(
                f"the models give {wanted.shape[-1]} and {got.shape[-1]} logits per token; "
                "they need the same vocabulary"
            )
        agreed += (wanted.argmax(-1) == got.argmax(-1)).sum().item()
        reference_nll += _negative_log_likelihood(wanted, chunk)
        candidate_nll += _negative_log_likelihood(got, chunk)
        reference_hits += _hits(wanted, chunk)
        candidate_hits += _hits(got, chunk)
        divergence += (wanted.exp() * (wanted - got)).sum(dtype=torch.float64).item()
    tokens = ids.shape[1]
    predicted = _predicted_tokens(tokens, window)
    return Quality(
        kl=divergence / tokens,
        perplexity=_exp(candidate_nll / predicted),
        reference_perplexity=_exp(reference_nll / predicted),
        top1_agreement=agreed / tokens,
        tokens=tokens,
        accuracy=candidate_hits / predicted,
        reference_accuracy=reference_hits / predicted,
    )


def reference_logprobs(
    model: nn.Module, input_ids: Tensor, window: int = DEFAULT_WINDOW
) -> ReferenceLogprobs:
    """Runs `model` once over `input_ids` [1, T] and keeps its log-probabilities; memory as stated there."""
    ids = _checked(input_ids, window)
    return ReferenceLogprobs(ids, tuple(logprobs.cpu() for logprobs in _windows(model, ids, window)), window)


def perplexity(model: nn.Module, input_ids: Tensor, window: int = DEFAULT_WINDOW) -> float:
    """Perplexity of `model` on `input_ids` int64 [1, T], over windows of `window` tokens."""
    ids = _checked(input_ids, window)
    chunks = ids.split(window, dim=1)
    nll = sum(
        _negative_log_likelihood(logprobs, chunk)
        for logprobs, chunk in zip(_windows(model, ids, window), chunks, strict=True)
    )
    return _exp(nll / _predicted_tokens(ids.shape[1], window))


def english_text(name: str = "python-docs") -> str:
    """A text to evaluate on that needs no download; `name` is a key of `TEXTS`.

    Raises:
        ValueError: `name` is unknown.
    """
    if name not in TEXTS:
        raise ValueError(f"no text named {name!r}; known: {', '.join(sorted(TEXTS))}")
    return TEXTS[name]()


def text_ids(tokenizer: Any, tokens: int, name: str = "python-docs") -> Tensor:
    """The first `tokens` tokens of `english_text(name)` as int64 [1, tokens], without special tokens.

    Raises:
        ValueError: `name` is unknown, or its text is shorter than that.
    """
    encoded = tokenizer(english_text(name), add_special_tokens=False, truncation=True, max_length=tokens)
    ids = torch.tensor([encoded["input_ids"]], dtype=torch.int64)
    if ids.shape[1] < tokens:
        raise ValueError(f"the text {name!r} has {ids.shape[1]} tokens, fewer than the {tokens} asked for")
    return ids


def _python_docs() -> str:
    """The Python language reference: English technical prose with short pieces of code, 465,000 characters.

    It ships with the interpreter and changes with it: compare numbers from one Python version only.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


TEXTS: dict[str, Callable[[], str]] = {"python-docs": _python_docs}


def _text(
    reference: nn.Module | ReferenceLogprobs, input_ids: Tensor | None, window: int | None
) -> tuple[Tensor, int]:
    """The (token ids, window) that a comparison with `reference` runs over."""
    if not isinstance(reference, ReferenceLogprobs):
        if input_ids is None:
            raise ValueError("input_ids is needed when the reference is a model")
        window = DEFAULT_WINDOW if window is None else window
        return _checked(input_ids, window), window
    if input_ids is not None and not torch.equal(input_ids.cpu(), reference.input_ids):
        raise ValueError("input_ids are not the ones that the reference log-probabilities were computed on")
    if window is not None and window != reference.window:
        raise ValueError(f"the reference was computed with window {reference.window}, not {window}")
    return reference.input_ids, reference.window


def _checked(input_ids: Tensor, window: int) -> Tensor:
    """`input_ids` on the CPU, after a check of its shape and of `window`."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must have shape [1, T] with T >= 2, got {list(input_ids.shape)}")
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    return input_ids.cpu()


def _reference_windows(
    reference: nn.Module | ReferenceLogprobs, input_ids: Tensor, window: int
) -> Iterator[Tensor]:
    """Log-probabilities of the reference, one float32 [n, V] per window."""
    if isinstance(reference, ReferenceLogprobs):
        return iter(reference.logprobs)
    return _windows(reference, input_ids, window)


def _windows(model: nn.Module, input_ids: Tensor, window: int) -> Iterator[Tensor]:
    """Runs `model` over each window of `input_ids`; yields ln Q as float32 [n, V] on the model's device."""
    if model.training:
        raise ValueError("the model is in training mode, where dropout adds noise; call model.eval() first")
    device = next(chain(model.parameters(), model.buffers())).device
    for chunk in input_ids.split(window, dim=1):
        # Left before the yield: a generator that yields inside would switch the mode for its caller too.
        with torch.inference_mode():
            logits = model(input_ids=chunk.to(device), use_cache=False).logits[0]
            logprobs = torch.log_softmax(logits.float(), dim=-1)
        yield logprobs


def _negative_log_likelihood(logprobs: Tensor, chunk: Tensor) -> float:
    """Sum of -ln Q(x_{t+1}) in nats; `logprobs` [n, V] and `chunk` [1, n] belong to one window."""
    targets = chunk[0, 1:].to(logprobs.device)
    return -logprobs[:-1].gather(1, targets[:, None]).sum(dtype=torch.float64).item()


def _hits(logprobs: Tensor, chunk: Tensor) -> int:
    """How many tokens of a window `[1, n]` are the most probable ones after those before them."""
    return int((logprobs[:-1].argmax(-1) == chunk[0, 1:].to(logprobs.device)).sum())


def _predicted_tokens(tokens: int, window: int) -> int:
    """Tokens that have a prediction: all but the first of each window."""
    return tokens - math.ceil(tokens / window)


def _exp(nats: float) -> float:
    """exp, with infinity instead of an error for a destroyed model."""
    return math.inf if nats > 700 else math.exp(nats)  # written so that NaN stays NaN
