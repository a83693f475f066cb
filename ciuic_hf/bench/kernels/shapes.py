"""The weights of real models, and the numbers of tokens that kernels are timed at."""

from __future__ import annotations

from dataclasses import dataclass

from ciuic_kernels.selection import EXPERTS, LINEAR

TOKENS = (1, 2, 4, 8, 16, 64, 256, 2048, 8192)
LARGE = 60_000_000
"""From this many weights on a matrix counts as large in the bar of the issue."""


@dataclass(frozen=True)
class WeightShape:
    """One compressed parameter of a model.

    Attributes:
        name: such as ``V3 o_proj``.
        rows, cols: N, K of one matrix.
        experts: number of matrices of fused experts, 0 for a plain weight.
        routed: experts that each token goes to.
        mixed: whether its blocks are of several codecs, as those of a plan by importance mostly are.
    """

    name: str
    rows: int
    cols: int
    experts: int = 0
    routed: int = 0
    mixed: bool = True

    @property
    def op(self) -> str:
        return EXPERTS if self.experts else LINEAR

    @property
    def weights(self) -> int:
        """Of one matrix."""
        return self.rows * self.cols

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.experts, self.rows, self.cols) if self.experts else (self.rows, self.cols)

    def __str__(self) -> str:
        lead = f"{self.experts} x " if self.experts else ""
        return f"{self.name} [{lead}{self.rows} x {self.cols}]"


# deepseek-ai/DeepSeek-V2-Lite, config.json
V2_LITE = (
    WeightShape("V2-Lite q_proj", 3072, 2048),
    WeightShape("V2-Lite kv_a_proj", 576, 2048),
    WeightShape("V2-Lite kv_b_proj", 4096, 512),
    WeightShape("V2-Lite o_proj", 2048, 2048),
    WeightShape("V2-Lite dense gate_proj", 10944, 2048),
    WeightShape("V2-Lite dense down_proj", 2048, 10944),
    WeightShape("V2-Lite shared gate_proj", 2816, 2048),
    WeightShape("V2-Lite shared down_proj", 2048, 2816),
    WeightShape("V2-Lite lm_head", 102400, 2048),
    WeightShape("V2-Lite experts gate_up", 2816, 2048, 64, 6),
    WeightShape("V2-Lite experts down", 2048, 1408, 64, 6),
)

# deepseek-ai/DeepSeek-V3 and R1, config.json
V3 = (
    WeightShape("V3 q_a_proj", 1536, 7168),
    WeightShape("V3 kv_a_proj", 576, 7168),
    WeightShape("V3 q_b_proj", 24576, 1536),
    WeightShape("V3 kv_b_proj", 32768, 512),
    WeightShape("V3 o_proj", 7168, 16384),
    WeightShape("V3 dense gate_proj", 18432, 7168),
    WeightShape("V3 dense down_proj", 7168, 18432),
    WeightShape("V3 shared gate_up", 4096, 7168),
    WeightShape("V3 shared down_proj", 7168, 2048),
    WeightShape("V3 lm_head", 129280, 7168),
    WeightShape("V3 experts gate_up", 4096, 7168, 256, 8),
    WeightShape("V3 experts down", 7168, 2048, 256, 8),
)

# DeepSeek-R1-Distill-Qwen-7B and -32B, config.json
DISTILLS = (
    WeightShape("7B q_proj", 3584, 3584),
    WeightShape("7B k_proj", 512, 3584),
    WeightShape("7B gate_proj", 18944, 3584),
    WeightShape("7B down_proj", 3584, 18944),
    WeightShape("7B lm_head", 152064, 3584),
    WeightShape("32B q_proj", 5120, 5120),
    WeightShape("32B k_proj", 1024, 5120),
    WeightShape("32B gate_proj", 27648, 5120),
    WeightShape("32B down_proj", 5120, 27648),
)

STANDARD = (*V2_LITE, *V3, *DISTILLS)


def standard(name: str) -> WeightShape:
    """One of ``STANDARD`` by its name."""
    return next(shape for shape in STANDARD if shape.name == name)
