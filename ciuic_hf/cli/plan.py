"""``ciuic plan MODEL``: what a model would take and what its bits would be, from config.json and headers alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ciuic_hf.cli import plan_training
from ciuic_hf.errors import CiuicError
from ciuic_hf.presets import card_named, card_nbytes


def add_command(commands: Any) -> None:
    command = commands.add_parser("plan", help="choose bits for a card or a size before loading anything")
    command.add_argument("source", help="directory of a model, its config.json, or a hub repository")
    command.add_argument("--revision", help="of the hub repository")
    command.add_argument("--gpu", help="card of configs/cards.json, such as H100")
    command.add_argument("--memory", help='instead of --gpu: a size such as "22GiB"')
    command.add_argument("--count", type=int, default=1, help="cards, or devices of that size (default 1)")
    command.add_argument("--bits", type=float, help="instead of a memory: bits per weight")
    command.add_argument("--context", type=int, help="tokens of a sequence (default 8192)")
    command.add_argument("--batch", type=int, default=1, help="sequences at once (default 1)")
    command.add_argument(
        "--cache-bits",
        choices=("8", "4", "3", "2", "auto"),
        help="compress the cache; auto: as far as a memory needs",
    )
    command.add_argument("--prefill-chunk", help="tokens of a prompt at once: N, auto (with a memory), none")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="kind (default cuda)")
    command.add_argument("--sensitivity", type=Path, help="file of `ciuic calibrate`")
    command.add_argument("--save", type=Path, help="write the plan, for CiuicConfig(plan=...)")
    command.add_argument("--json", action="store_true", help="print JSON")
    plan_training.add_options(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from ciuic_hf.cli.plan_screen import show
    from ciuic_hf.hf import plan_alternatives, plan_description, planner
    from ciuic_hf.hf.cache_choice import choose_cache
    from ciuic_hf.hf.placing import TooSmallError
    from ciuic_hf.hf.source import open_source

    if arguments.train:
        plan_training.run(arguments)
        return
    plan_training.refuse_without_train(arguments)
    request = _request(arguments)
    source = open_source(arguments.source, arguments.revision)
    model = planner.meta_model(source)
    told = None
    try:
        if arguments.cache_bits == "auto":
            outlook, told = choose_cache(source, model, request)
        else:
            outlook = planner.Outlook(source, model, request)
    except TooSmallError as error:
        ways = plan_alternatives.smaller_requests(model, request, error)
        setups = plan_alternatives.setups_that_fit(model, request)
        if arguments.json:
            print(json.dumps({"fits": False, "needed": error.needed, **ways, "setups": setups}, indent=2))
        raise CiuicError(_refusal(error, ways, setups)) from None
    found = plan_description.describe(outlook) | {"cache_choice": told}
    if arguments.save:
        plan_description.save(outlook, found, arguments.save)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    show(found, Console())
    if arguments.save:
        print(f"Saved to {arguments.save}; load with CiuicConfig(plan={str(arguments.save)!r}).")


def _request(arguments: argparse.Namespace) -> Any:
    """What was asked for. Raises CiuicError for options that contradict each other."""
    from ciuic_hf.hf.planner import Request
    from ciuic_hf.planning.memory import parse_size

    given = [n for n in ("gpu", "memory", "bits") if getattr(arguments, n) is not None]
    if len(given) > 1:
        raise CiuicError(f"--{given[0]} and --{given[1]} contradict each other; give one of them.")
    if arguments.count < 1:
        raise CiuicError(f"--count must be 1 or more, got {arguments.count}.")
    if arguments.count > 1 and given not in (["gpu"], ["memory"]):
        raise CiuicError("--count says how many devices share a model; add --gpu or --memory for their size.")
    if arguments.device == "cpu" and (arguments.gpu or arguments.count > 1):
        raise CiuicError("--device cpu is one device of --memory; leave out --gpu and --count.")
    card = card_named(arguments.gpu) if arguments.gpu else None
    memory = card_nbytes(card) if card else parse_size(arguments.memory) if arguments.memory else None
    return Request(
        8192 if arguments.context is None else arguments.context,
        arguments.batch,
        memory,
        card,
        arguments.count,
        4.25 if arguments.bits is None else arguments.bits,
        arguments.sensitivity,
        arguments.device,
        int(arguments.cache_bits) if arguments.cache_bits not in (None, "auto") else None,
        prefill_chunk(arguments.prefill_chunk),
    )


def prefill_chunk(text: str | None) -> int | str | None:
    """What ``--prefill-chunk`` says. Raises CiuicError."""
    from ciuic_hf.planning.prefill_chunk import check_prefill_chunk

    return None if text is None else check_prefill_chunk(int(text) if text.isdecimal() else text)


def _refusal(error: Any, ways: dict[str, int], setups: list[str]) -> str:
    """One sentence: what is needed, and everything that would do."""
    from ciuic_hf.report import human_bytes
    from ciuic_kernels.format import ceil_div

    options = [f"--memory {ceil_div(error.needed, 1 << 20)}MiB"]
    options += [f"--{name.replace('_', '-')} {value}" for name, value in ways.items()]
    cards = f", or {', or '.join(setups)}" if setups else ""
    each = "each device needs" if error.several else "it needs"
    return (
        f"Does not fit: at the smallest bits {each} {human_bytes(error.needed)} and has "
        f"{human_bytes(error.memory)}; what would fit: {', or '.join(options)}{cards}."
    )
