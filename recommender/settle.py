"""What of the session model training cannot tell, and validation can."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from recommender.metrics import case_values
from recommender.model import SessionModel

COPY_STEP, STRANGER_STEP = 1.0, 0.5  # of log-weights
FARTHEST = 6  # steps
Ranks = Callable[[], np.ndarray]  # of the targets of validation, (cases,), by the model as it stands


def settle(model: SessionModel, ranks: Ranks) -> None:
    """Shifts log-weights by what ranks validation best: of an item of the prefix coming again, for in training the other parts know
    by heart much of what comes next; and of a stranger after a known item, and after another stranger, for ID dropout hides
    items at random, where new ones come in their own number, and together."""
    numbers: list[tuple[Tensor, float]] = [] if model.copy is None else [(model.copy, COPY_STEP)]
    numbers += [(model.stranger[which], STRANGER_STEP) for which in range(2)] if model.config.content_dim else []

    def score() -> np.ndarray:
        return case_values(ranks(), "MRR@20")  # it tells one place from the next, as HR does not

    with torch.no_grad():
        now = score() if numbers else np.empty(0)
        for number, step in numbers:
            now = shift(number, step, now, score)


def shift(number: Tensor, step: float, now: np.ndarray, score: Callable[[], np.ndarray]) -> np.ndarray:
    """Moves `number` by steps to where the mean of the score (cases,), `now` as it stands, is highest or, nearer to that, within a
    standard error of the highest (Breiman et al., 1984): a difference that is chance moves nothing. Returns the score there."""
    start, found = number.clone(), {0: now}
    for way in (1, -1):
        for at in range(way, way * (FARTHEST + 1), way):
            number.copy_(start + at * step)
            found[at] = score()
            if found[at].mean() <= found[at - way].mean():
                break
    best = max(found.values(), key=lambda values: float(values.mean()))

    def as_good(at: int) -> bool:
        less = best - found[at]
        return bool(less.mean() <= less.std() / len(less) ** 0.5)

    nearest = min(filter(as_good, found), key=abs)
    number.copy_(start + nearest * step)
    return found[nearest]
