"""Calibrates the weights of repeats and of cold items on the validation sessions, after the training.

Training misjudges both. Ids memorise the training sessions, so that the repeat component looks less useful than it is. ID dropout
hides random items one by one, so that cold items seem to occur as often as any other item, and never together. With fewer than
`LEAST_CASES` cold targets in validation, cold items keep the weights learned with ID dropout.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recommender.metrics.ranks import case_values
from recommender.session_model.model import SessionModel
from recommender.session_model.windows import PAD, Windows, prefixes_of

LEAST_CASES = 100
REPEAT_STEP, COLD_STEP = 1.0, 0.5  # steps of the line search, in log-weights
FARTHEST = 6  # steps in each direction
ERRORS = 2.0  # standard errors that a gain on validation must exceed
METRIC = "MRR@20"  # it changes with every rank, unlike HR
Ranks = Callable[[], np.ndarray]  # returns the ranks (cases,) of the validation targets by the current model


class Calibration(NamedTuple):
    """The shifts that were added to the log-weights, and the number of cases they are based on."""

    repeat: float = 0.0
    cold_after_warm: float = 0.0  # of cold items that are scored from a warm item of the session
    cold_after_cold: float = 0.0  # of cold items that are scored from a cold item of the session
    cold_targets: int = 0  # validation cases with a cold target
    cold_targets_after_cold: int = 0  # those of them with a cold item in the prefix

    def summary(self) -> str:
        """Describes the calibration of cold items in one line for the user."""
        text = f"cold targets in validation: {self.cold_targets}"
        if self.cold_targets < LEAST_CASES:
            return f"{text}, fewer than {LEAST_CASES}; cold items keep the weights learned with ID dropout"
        text += f"; weight of cold items after warm ones {self.cold_after_warm:+.1f}"
        if self.cold_targets_after_cold < LEAST_CASES:
            return f"{text}, after cold ones as learned with ID dropout ({self.cold_targets_after_cold} such targets)"
        return f"{text}, after cold ones {self.cold_after_cold:+.1f} (log-odds, added to the learned weights)"


def calibrate(model: SessionModel, windows: Windows, ranks: Ranks) -> Calibration:
    """Moves the weights of the model, one after the other, to the highest `METRIC` on validation. `windows`: those of validation."""
    prefixes, targets = prefixes_of(windows)
    known = model.known.cpu().numpy()
    cold = ~known[targets]
    after_cold = cold & ((prefixes != PAD) & ~known[prefixes.clip(min=0)]).any(1)
    counts = int(cold.sum()), int(after_cold.sum())
    weights: list[tuple[str, Tensor, float]] = [] if model.copy is None else [("repeat", model.copy, REPEAT_STEP)]
    if model.config.content_dim:
        cold_weights = zip(("cold_after_warm", "cold_after_cold"), model.stranger, counts, strict=False)
        weights += [(name, weight, COLD_STEP) for name, weight, count in cold_weights if count >= LEAST_CASES]
    shifts = {}
    with torch.no_grad():
        scores = case_values(ranks(), METRIC) if weights else np.empty(0)
        for name, weight, step in weights:
            shifts[name], scores = line_search(weight, step, scores, lambda: case_values(ranks(), METRIC))
    return Calibration(**shifts, cold_targets=counts[0], cold_targets_after_cold=counts[1])


def apply(model: SessionModel, calibration: Calibration) -> None:
    """Adds the shifts of the calibration of another training of the same model."""
    with torch.no_grad():
        if model.copy is not None:
            model.copy.add_(calibration.repeat)
        if model.config.content_dim:
            model.stranger[0].add_(calibration.cold_after_warm)
            model.stranger[1].add_(calibration.cold_after_cold)


def line_search(weight: Tensor, step: float, initial: np.ndarray, scores: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Moves `weight` in place by multiples of `step` to the best mean of `scores()` (cases,); returns the shift and the scores there.

    Of all positions within `ERRORS` standard errors of the best mean, the one nearest to the start is taken (after Breiman et al., 1984),
    so that chance moves no weight. `initial` (cases,): the scores at the start."""
    start, by_steps = weight.clone(), {0: initial}
    for direction in (1, -1):
        for steps in range(direction, direction * (FARTHEST + 1), direction):
            weight.copy_(start + steps * step)
            by_steps[steps] = scores()
            if by_steps[steps].mean() <= by_steps[steps - direction].mean():
                break
    best = max(by_steps.values(), key=lambda values: float(values.mean()))

    def as_good(steps: int) -> bool:
        less = best - by_steps[steps]
        return bool(less.mean() <= ERRORS * less.std() / len(less) ** 0.5)

    nearest = min(filter(as_good, by_steps), key=abs)
    weight.copy_(start + nearest * step)
    return nearest * step, by_steps[nearest]
