"""The hook by which an option from related work enters a phase: extra prompt parts and extra losses."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pipeline.distill.process_group import Group
from pipeline.distill.windows import Window

Tensors = dict[str, Tensor]


class LossInputs(NamedTuple):
    """The tensors of a step, as its losses see them."""

    out: Tensors  # outputs of `Mllm`, token losses as means
    facts: Tensors  # of the global batch, those of the options included
    group: Group
    scores: Tensor | None = None  # (R, C) of the transfer phase: session features times candidates, gathered
    has_target: Tensor | None = None  # (B, n) bool, with R times true


class Option:
    """An option that adds nothing. Each one overrides the methods it needs."""

    def prompt_parts(self, session: np.ndarray, first: int, window: np.ndarray) -> dict[str, str]:
        """Returns the texts that a prompt gains, as in `Window.parts`. `window` are the rows of the `session` from `first` on."""
        return {}

    def facts(self, windows: Sequence[Window]) -> Tensors:
        """Returns facts about the global batch that the losses need."""
        return {}

    def losses(self, step: LossInputs) -> Tensors:
        """Returns extra weighted losses."""
        return {}
