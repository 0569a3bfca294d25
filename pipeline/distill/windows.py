"""Windows of training sessions: the prompts and targets of the transfer phase."""

from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """A window of a training session. The items before the last are the input; the items after the first are the targets."""

    rows: np.ndarray
    parts: dict[str, str]  # extra texts of its prompt: "intent", and "history", a summary of the items before the window


def window_starts(rows: np.ndarray, items: int) -> range:
    """Returns the start offsets of windows with `items` inputs, so that every item except the first is a target exactly once."""
    return range(0, len(rows) - 1, items)
