"""Lets T follow the next-item distribution of a session model (P2Rec, arXiv 2406.00333)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.distill.experimental.hook import LossInputs, Option, Tensors
from pipeline.distill.windows import Window
from pipeline.objectives.contrastive import soft_loss


class Teacher(Protocol):
    """A trained session model. The command line passes it in, because `pipeline` may not import `recommender`."""

    sha256: str

    def __call__(self, prefixes: list[Tensor], candidates: Tensor) -> Tensor:
        """Returns log-scores (n, C) of the rows `candidates` (C,) after each of n prefixes of rows."""


class SoftTargets(Option):
    """Adds the KL divergence from the teacher's distribution over the candidates of a batch."""

    def __init__(self, teacher: Teacher, items: int, weight: float) -> None:
        self.teacher, self.items, self.weight = teacher, items, weight

    def facts(self, windows: Sequence[Window]) -> Tensors:
        # short windows are padded with items that are no inputs of a target
        return {"shown": torch.from_numpy(np.array([np.resize(window.rows[:-1], self.items) for window in windows]))}

    def losses(self, step: LossInputs) -> Tensors:
        assert step.scores is not None and step.has_target is not None
        prefixes = [step.facts["shown"][b, : n + 1] for b, n in step.has_target.nonzero().tolist()]
        return {"soft": self.weight * soft_loss(step.scores, self.teacher(prefixes, step.facts["block"]))}
