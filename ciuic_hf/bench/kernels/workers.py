"""The processes that the gate runs in: nearly all of its time is Triton compiling a kernel for each codec and tile.

A kernel that reads where it must not takes the CUDA context of its process with it, and everything that the process
would have run after it. That one case is a failure; the others are run again in fresh processes, so that a red gate
names what is broken and nothing else. A kernel that never ends is found by nothing having ended for long.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager

import torch

from ciuic_hf.bench.kernels.gate import FULL, Case, Failure, Sizes, check_case

WORKERS = 16
STALL_SECONDS = 300.0
"""After so long without a result what still runs is given up; the slowest case compiles for less."""

ROUNDS = 6
"""Fresh processes are started so often after contexts were lost."""


class LostError(Exception):
    """A case could not be run, since its process lost its CUDA context before."""


_lost = ""


def run_gate(
    cases: Sequence[Case],
    device: torch.device,
    advance: Callable[[str], None] = lambda _: None,
    workers: int | None = None,
    sizes: Sizes = FULL,
) -> list[Failure]:
    """All failures of all cases, in the order of the cases.

    Args:
        advance: called with the name of each case that is done.
        workers: processes; 0 for this one, by default as many as processors, 16 at most.
    """
    count = min(WORKERS, processors()) if workers is None else workers
    found: dict[int, list[Failure]] = {}
    if count == 0:
        for place, case in enumerate(cases):
            found[place] = check_case(case, device, sizes)
            advance(str(case))
    else:
        for _ in range(ROUNDS):
            left = [place for place in range(len(cases)) if place not in found]
            if not left:
                break
            _one_round(found, left, cases, device, advance, count, sizes)
    for place in set(range(len(cases))) - set(found):
        found[place] = [Failure(str(cases[place]), "not run: other cases broke one process after another")]
    return [failure for place in sorted(found) for failure in found[place]]


def compile_cases(cases: Sequence[Case], device: torch.device, sizes: Sizes) -> None:
    """Compile the kernels of some cases side by side, for this process and every later one; nothing is computed."""
    from ciuic_kernels.triton._launch import compiling  # imports Triton

    with compiling(processors()):
        for case in cases:
            check_case(case, device, sizes)


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_round(
    found: dict[int, list[Failure]],
    places: Sequence[int],
    cases: Sequence[Case],
    device: torch.device,
    advance: Callable[[str], None],
    count: int,
    sizes: Sizes,
) -> None:
    """Add the failures of each case by its place. What a lost context kept from running is left out."""
    threads = max(1, processors() // count)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(count, len(places)), context, initializer=_begin, initargs=(threads,))
    with _ended(pool):
        futures = {pool.submit(_check, cases[place], device, sizes): place for place in places}
        for future in _as_completed(futures):
            place = futures[future]
            error = future.exception() if future.done() else None
            if isinstance(error, LostError):
                continue
            if error is not None:  # the process died
                found[place] = [Failure(str(cases[place]), f"could not be run: {error}")]
            elif future.done():
                found[place] = future.result()
            else:
                gave_up = f"gave no result in {STALL_SECONDS:.0f} seconds, or waited for one that did not"
                found[place] = [Failure(str(cases[place]), gave_up)]
            advance(str(cases[place]))


def _as_completed(futures: dict[Future[list[Failure]], int]) -> Iterator[Future[list[Failure]]]:
    """Futures as they end; when nothing ends any more, those that are left."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=STALL_SECONDS, return_when=FIRST_COMPLETED)
        yield from done
        if not done:
            yield from pending
            return


@contextmanager
def _ended(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Leave no process behind, also where one hangs or the user interrupts."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        own = [child for child in multiprocessing.active_children() if child not in before]
        pool.shutdown(wait=False, cancel_futures=True)
        for child in own:
            child.kill()
            child.join()


def _begin(threads: int) -> None:
    """In each process: it shares the processors, and Ctrl-C is its parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def _check(case: Case, device: torch.device, sizes: Sizes) -> list[Failure]:
    """``check_case`` in a worker. Raises LostError when an earlier case broke it."""
    global _lost
    if _lost:
        raise LostError(_lost)
    failures = check_case(case, device, sizes)
    if failures and device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:
            _lost = str(case)
    return failures
