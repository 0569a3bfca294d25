"""Lets T write the intent of a session before its next item (LLM4SBR, arXiv 2402.13840; SPRINT, arXiv 2508.00570)."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.distill.experimental.hook import LossInputs, Option, Tensors
from pipeline.distill.windows import Window
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompts import Prompts


class Intents(Option):
    """Adds the attributes that most items of a window share to its prompt, and their token loss."""

    def __init__(self, prompts: Prompts, processor: PromptProcessor, weight: float) -> None:
        self.prompts, self.processor, self.weight = prompts, processor, weight

    def prompt_parts(self, session: np.ndarray, first: int, window: np.ndarray) -> dict[str, str]:
        return {"intent": self.prompts.common(window)}

    def facts(self, windows: Sequence[Window]) -> Tensors:
        lengths = [len(self.processor.answer(text)) for window in windows if (text := window.parts["intent"])]
        return {"intent_tokens": torch.tensor(sum(lengths))}

    def losses(self, step: LossInputs) -> Tensors:
        nll = step.group.total(step.out.get("sessions.intent_nll", step.out["sessions.session"].new_zeros(())))
        return {"intent": self.weight * nll / step.facts["intent_tokens"].clamp(min=1)}
