"""Auxiliary-loss-free load balancing of the experts (arXiv 2412.19437, section 2.1.2; arXiv 2408.15664).

Each router adds a bias b_i to the affinity of expert i when choosing (not when weighting) experts. After
every step b_i rises by a fixed speed where the expert received fewer tokens than the mean, and falls where it
received more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter


class ExpertBalancer:
    """Counts the tokens each expert receives, by forward hooks, and moves the biases against them."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, DeepseekV3TopkRouter)]
        self.counts = [torch.zeros(router.num_experts) for router in self.routers]  # [E] each
        for index, router in enumerate(self.routers):
            router.register_forward_hook(self._counting_hook(index))

    def _counting_hook(self, index: int) -> Callable[..., None]:
        def hook(router: nn.Module, inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            if router.training:
                experts = output[2].flatten()  # [tokens * top_k], indices of the chosen experts
                # histc rather than bincount, whose output shape torch.compile cannot know
                total = self.counts[index]
                total += torch.histc(experts.float(), bins=len(total), min=0, max=len(total) - 1)

        return hook

    @torch.no_grad()
    def step(self, speed: float) -> float:
        """Moves every bias by `speed`, forgets the counts; returns the worst load relative to the mean."""
        worst = 1.0
        for router, count in zip(self.routers, self.counts, strict=True):
            mean = count.mean()
            router.e_score_correction_bias += speed * torch.sign(mean - count)
            worst = max(worst, float(count.max() / mean))
            count.zero_()
        return worst
