"""A pass over Inductor's graphs that makes one ``ciuic::linears`` of several ``ciuic::linear`` with the same x.

Graphs are functional where it runs: two products have the same x if the same node made it, whatever the modules were
called. The operator decides when it runs whether one launch pays.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import compute_mutation_region_ids, same_mutation_regions

from ciuic_kernels.selection import MAX_SHARED, SHARED_BLOCK_M


class MergeLinears(CustomGraphPass):
    """The pass, after another one that was installed before it."""

    def __init__(self, earlier: Any = None) -> None:
        self.earlier = earlier

    def __call__(self, graph: fx.Graph) -> None:
        if self.earlier is not None:
            self.earlier(graph)
        merge_linears(graph)

    def uuid(self) -> Any:
        """What the caches of compiled graphs know this pass by; None, never cache, if the earlier one wants that."""
        own = get_hash_for_files((__file__,))
        if self.earlier is None:
            return own
        theirs = getattr(self.earlier, "uuid", lambda: None)()
        return None if theirs is None else (own, theirs)


def install() -> None:
    """Have Inductor run the pass on what it compiles from now on; it changes nothing in graphs of other models."""
    earlier = config.post_grad_custom_pre_pass
    if not isinstance(earlier, MergeLinears):
        config.post_grad_custom_pre_pass = MergeLinears(earlier)


def merge_linears(graph: fx.Graph) -> int:
    """Merge what can be merged; returns how many ``ciuic::linears`` there are now that were not before."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.ciuic.linear.default):
        if _is_for_kernels(node):
            groups.setdefault(node.args[0], []).append(node)
    merged = 0
    if any(len(nodes) > 1 for nodes in groups.values()):
        compute_mutation_region_ids(graph)
        place = {node: number for number, node in enumerate(graph.nodes)}
        for nodes in groups.values():
            first = nodes[0]
            ready = [node for node in nodes if _is_ready(node, first, place)]
            for start in range(0, len(ready), MAX_SHARED):
                together = ready[start : start + MAX_SHARED]
                if len(together) > 1:
                    _merge(graph, first, together)
                    merged += 1
    return merged


def _is_for_kernels(node: fx.Node) -> bool:
    """Whether GPU kernels run, and x may have few enough tokens for one launch."""
    arguments: Any = node.args
    x, work, cols = arguments[0], arguments[4], arguments[8]
    size = x.meta["val"].numel()
    few = not isinstance(size, int) or size <= SHARED_BLOCK_M * cols
    return few and bool(work.meta["val"].numel() > 0)


def _is_ready(node: fx.Node, first: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether a product can be computed where the first one is: nothing it needs is made or written to in between."""
    return same_mutation_regions(node, first) and all(
        place[source] < place[first] for source in node.all_input_nodes
    )


def _merge(graph: fx.Graph, first: fx.Node, nodes: list[fx.Node]) -> None:
    x, cols = first.args[0], first.args[8]
    _, arenas, tags, offsets, works, kinds, biases, rows, _ = zip(*(node.args for node in nodes), strict=True)
    arguments = (
        x, list(arenas), list(tags), list(offsets), list(works), [kind for own in kinds for kind in own],
        [len(own) for own in kinds], [bias for bias in biases if bias is not None],
        [bias is not None for bias in biases], list(rows), cols,
    )  # fmt: skip
    with graph.inserting_before(first):
        several = graph.call_function(torch.ops.ciuic.linears.default, arguments)
        several.meta = {"val": [node.meta["val"] for node in nodes]}
        outputs = [graph.call_function(operator.getitem, (several, number)) for number in range(len(nodes))]
    for node, output in zip(nodes, outputs, strict=True):
        output.meta = node.meta
        node.replace_all_uses_with(output)
        graph.erase_node(node)
