"""Calibrates the weights of repeats, of ids and of cold items on the validation sessions, after the training.

Training misjudges them. Ids memorise the training sessions, so that the repeat component looks less useful than it is, and the id channel
more, above all where id vectors start from the co-occurrence of those sessions: its weight may fall, but not rise. ID dropout
hides random items, so that cold items seem to come as often as any other item, and each alone. A weight moves only where validation
can tell it: with fewer than `LEAST_CASES` cold targets there, cold items keep the weights that ID dropout taught. And what all cases
gain must not be taken from the cold ones: they keep at least `KEPT` of their HR@20.
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
REPEAT_STEP, ID_STEP, COLD_STEP = 1.0, 0.5, 0.5  # of log-weights
UP, DOWN = 1, -1
FARTHEST = 6  # steps
ERRORS, ID_ERRORS = 2.0, 0.0  # standard errors that a gain on validation must exceed; of ids it is known which way they err
KEPT = 0.9  # share of the HR@20 of cold targets that a shift must leave
METRIC = "MRR@20"  # it tells one rank from the next, as HR does not
Ranks = Callable[[], np.ndarray]  # of the targets of validation, (cases,), by the model as it is now


class Search(NamedTuple):
    """How a weight is moved."""

    step: float
    ways: tuple[int, ...] = (UP, DOWN)
    errors: float = ERRORS


class Calibration(NamedTuple):
    """What was added to the log-weights, and how many cases could tell it."""

    repeat: float = 0.0
    ids: float = 0.0  # of the id channel
    cold_after_warm: float = 0.0  # of cold items, as far as a warm item of the session leads to them
    cold_after_cold: float = 0.0  # the same for a cold item of the session
    cold_targets: int = 0  # cases of validation with a cold target
    cold_targets_after_cold: int = 0  # of them, those whose prefix has a cold item

    def summary(self) -> str:
        """Says in one line what was done about cold items, and why."""
        summary = f"cold targets in validation: {self.cold_targets}"
        if self.cold_targets < LEAST_CASES:
            return f"{summary}, fewer than {LEAST_CASES}; cold items keep the weights that ID dropout taught"
        summary += f"; weight of cold items after warm ones {self.cold_after_warm:+.1f}"
        if self.cold_targets_after_cold < LEAST_CASES:
            return f"{summary}, after cold ones as ID dropout taught ({self.cold_targets_after_cold} such targets)"
        return f"{summary}, after cold ones {self.cold_after_cold:+.1f} (log-odds, beside what ID dropout taught)"


def calibrate(model: SessionModel, windows: Windows, ranks: Ranks) -> Calibration:
    """Moves the model's weights, one after the other, to where `METRIC` on validation is highest. `windows` are those of validation."""
    prefixes, targets = prefixes_of(windows)
    known = model.known.cpu().numpy()
    cold = ~known[targets]
    after_cold = cold & ((prefixes != PAD) & ~known[prefixes.clip(min=0)]).any(1)
    counts = int(cold.sum()), int(after_cold.sum())
    weights: list[tuple[str, Tensor, Search]] = []
    if model.repeat_weights is not None:
        weights.append(("repeat", model.repeat_weights, Search(REPEAT_STEP)))
    if model.config.ids and len(targets) >= LEAST_CASES:
        weights.append(("ids", model.channel("id").weight_bias.bias, Search(ID_STEP, (DOWN,), ID_ERRORS)))
    if model.config.content_dim:
        cold_weights = zip(("cold_after_warm", "cold_after_cold"), model.cold_weights, counts, strict=False)
        weights += [(name, weight, Search(COLD_STEP)) for name, weight, count in cold_weights if count >= LEAST_CASES]
    shifts = {}
    with torch.no_grad():
        now = ranks() if weights else np.empty(0)
        least = KEPT * hit_rate(now[cold]) if weights and cold.any() else 0.0
        for name, weight, how in weights:
            shifts[name], now = line_search(weight, how, now, ranks, lambda moved: not cold.any() or hit_rate(moved[cold]) >= least)
    return Calibration(**shifts, cold_targets=counts[0], cold_targets_after_cold=counts[1])


def hit_rate(ranks: np.ndarray) -> float:
    """HR@20 of the ranks (cases,)."""
    return float(case_values(ranks, "HR@20").mean())


def apply(model: SessionModel, calibration: Calibration) -> None:
    """Adds the shifts that another training of the same model was given."""
    with torch.no_grad():
        if model.repeat_weights is not None:
            model.repeat_weights.add_(calibration.repeat)
        if model.config.ids:
            model.channel("id").weight_bias.bias.add_(calibration.ids)
        if model.config.content_dim:
            model.cold_weights[0].add_(calibration.cold_after_warm)
            model.cold_weights[1].add_(calibration.cold_after_cold)


def line_search(
    weight: Tensor, how: Search, now: np.ndarray, ranks: Ranks, allowed: Callable[[np.ndarray], bool]
) -> tuple[float, np.ndarray]:
    """Moves `weight` by steps to where the mean of `METRIC` is highest or, nearer to the start, within some
    standard errors of the highest (after Breiman et al., 1984): a difference by chance moves nothing. `now`: the ranks (cases,) at the
    start; only ranks that are `allowed` count. Returns the shift and the ranks there."""
    start, by_steps = weight.clone(), {0: now}
    for direction in how.ways:
        for steps in range(direction, direction * (FARTHEST + 1), direction):
            weight.copy_(start + steps * how.step)
            moved = ranks()
            if not allowed(moved):
                break
            by_steps[steps] = moved
            if case_values(moved, METRIC).mean() <= case_values(by_steps[steps - direction], METRIC).mean():
                break
    scores = {steps: case_values(moved, METRIC) for steps, moved in by_steps.items()}
    best = max(scores.values(), key=lambda values: float(values.mean()))

    def as_good(steps: int) -> bool:
        less = best - scores[steps]
        return bool(less.mean() <= how.errors * less.std() / len(less) ** 0.5)

    nearest = min(filter(as_good, scores), key=abs)
    weight.copy_(start + nearest * how.step)
    return nearest * how.step, by_steps[nearest]
