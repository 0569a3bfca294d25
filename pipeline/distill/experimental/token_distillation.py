"""Lets the unified MLLM follow T's distribution over every answer token: MDist of LLaVA-KD (arXiv 2410.16236).

Without the visual tokens of the paper, whose logits would need more memory than the model. `Mllm.teacher` holds T's weights.
"""

from pipeline.distill.experimental.hook import LossInputs, Option, Tensors


class TokenDistillation(Option):
    """Adds the divergence that `Mllm` computes where it has a teacher."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def losses(self, step: LossInputs) -> Tensors:
        return {"token_distill": self.weight * step.out["items.divergence"]}
