"""Where the lanes of a warp that a branch parts come together again: the branch's immediate post-dominator."""

from __future__ import annotations

from tests.triton.emulator.parse import Function, Line


def target_of(line: Line) -> str | None:
    """The label that a line may go to."""
    return line.operands[0] if line.opcode in ("bra", "bra.uni") else None


def ends(line: Line) -> bool:
    """Whether nothing follows a line."""
    return line.opcode in ("ret", "ret.uni", "exit", "trap") and not line.guard


def joins(function: Function) -> dict[int, int]:
    """For each guarded branch by index: the index of the first line that both ways pass, or -1."""
    lines = function.lines
    if not any(line.guard and target_of(line) for line in lines):
        return {}
    starts = {0, *function.labels.values()}
    starts |= {i + 1 for i, line in enumerate(lines) if target_of(line) or ends(line)}
    first = sorted(start for start in starts if start < len(lines))
    block_of = {start: number for number, start in enumerate(first)}
    last = [stop - 1 for stop in (*first[1:], len(lines))]
    leave = len(first)
    follow: list[list[int]] = []
    for number in range(len(first)):
        line, after = lines[last[number]], last[number] + 1
        label = target_of(line)
        next_ones = [block_of.get(function.labels[label], leave)] if label else []
        if not ends(line) and not (label and not line.guard):
            next_ones.append(block_of.get(after, leave))
        follow.append(next_ones or [leave])
    dominator = _post_dominators(follow, leave)
    found = {}
    for number, at in enumerate(last):
        if lines[at].guard and target_of(lines[at]):
            found[at] = first[dominator[number]] if dominator[number] < leave else -1
    return found


def _post_dominators(follow: list[list[int]], leave: int) -> list[int]:
    """Immediate post-dominator of each block (Cooper, Harvey and Kennedy 2001, on the reversed graph)."""
    before: list[list[int]] = [[] for _ in range(leave + 1)]
    for block, successors in enumerate(follow):
        for successor in successors:
            before[successor].append(block)
    order: list[int] = []
    seen, stack = {leave}, [(leave, iter(before[leave]))]
    while stack:
        block, rest = stack[-1]
        for predecessor in rest:
            if predecessor not in seen:
                seen.add(predecessor)
                stack.append((predecessor, iter(before[predecessor])))
                break
        else:
            order.append(block)
            stack.pop()
    rank = {block: place for place, block in enumerate(order)}
    immediate = [-1] * (leave + 1)
    immediate[leave] = leave
    changed = True
    while changed:
        changed = False
        for block in reversed(order):
            if block == leave:
                continue
            known = [s for s in follow[block] if immediate[s] >= 0]
            if not known:
                continue
            new = known[0]
            for other in known[1:]:
                while new != other:
                    while rank[new] < rank[other]:
                        new = immediate[new]
                    while rank[other] < rank[new]:
                        other = immediate[other]
            if immediate[block] != new:
                immediate[block], changed = new, True
    return [leave if dominator < 0 else dominator for dominator in immediate]
