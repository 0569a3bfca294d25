"""Sessions as padded integer windows: packed once, then every batch is a slice of two arrays.

A case is one (prefix, next item) pair: every position of a session from the second on, with the prefix cut to its last
`max_prefix` events. A causal model answers all cases of a window in one pass, so a session that fits is one window.
Longer sessions give more windows; in each only the positions no earlier window answered are counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.session_log import SessionLog

PAD = -1  # in `inputs`: no event; in `targets`: not a case


@dataclass(frozen=True)
class Windows:
    """W windows of up to L events, padded on the right."""

    inputs: np.ndarray  # (W, L) int32 rows of items
    targets: np.ndarray  # (W, L) int32 row of the item that follows
    session: np.ndarray  # (W,) int64 which session a window is of
    times: np.ndarray | None = None  # (W, L) int64 seconds, when the target was seen; None where items are always available

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def cases(self) -> int:
        return int((self.targets != PAD).sum())

    def take(self, which: np.ndarray) -> "Windows":
        """Windows `which`, cut to the longest of them."""
        inputs = self.inputs[which]
        longest = max(1, int((inputs != PAD).sum(1).max(initial=1)))
        times = None if self.times is None else self.times[which, :longest]
        return Windows(inputs[:, :longest], self.targets[which, :longest], self.session[which], times)


class DeviceWindows:
    """Windows packed once on a device, so that a batch is a selection there. What the host must know of a batch, how long
    its longest window is and how many cases it has, the host keeps: asking the device would be waiting for it."""

    def __init__(self, windows: Windows, device: torch.device) -> None:
        self.inputs = torch.as_tensor(windows.inputs, device=device)  # (W, L) int32
        self.targets = torch.as_tensor(windows.targets, device=device)  # (W, L) int32
        self.times = None if windows.times is None else torch.as_tensor(windows.times, device=device)  # (W, L) int64
        self.lengths = (windows.inputs != PAD).sum(1)
        self.cases = (windows.targets != PAD).sum(1)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, which: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """TrainingData, targets and times (B, L) int64 of the windows `which`, cut to the longest of them."""
        place = torch.as_tensor(which, device=self.inputs.device)
        longest = max(1, int(self.lengths[which].max(initial=1)))
        rows, targets = (packed.index_select(0, place)[:, :longest].long() for packed in (self.inputs, self.targets))
        return rows, targets, None if self.times is None else self.times.index_select(0, place)[:, :longest]


def pack(rows: np.ndarray, offsets: np.ndarray, max_prefix: int, stride: int = 1, times: np.ndarray | None = None) -> Windows:
    """Sessions in CSR form (`rows` of session i: offsets[i]:offsets[i + 1]) as windows; `times` (E,) of the events, where they matter.

    `stride` is how far windows of a long session are apart. 1 gives every case its whole prefix, as evaluation needs;
    max_prefix / 2 gives it at least half, at a fraction of the cost, which is enough for training.
    """
    inputs_of = np.diff(offsets) - 1  # the last event is only ever a target
    beyond = np.maximum(inputs_of - max_prefix, 0)
    count = np.where(inputs_of > 0, 1 + -(-beyond // stride), 0)
    session = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(session)) - np.repeat(np.cumsum(count) - count, count)
    limit = inputs_of[session]
    end = np.minimum(max_prefix + number * stride, limit)
    start = np.maximum(end - max_prefix, 0)
    answered = np.where(number > 0, np.minimum(max_prefix + (number - 1) * stride, limit), 0)  # cases of earlier windows
    place = start[:, None] + np.arange(max_prefix)  # (W, L) position inside the session
    real = place < end[:, None]
    event = np.where(real, offsets[session][:, None] + place, 0)
    inputs = np.where(real, rows[event], PAD).astype(np.int32)
    target = np.where(real, event + 1, 0)
    targets = np.where(real & (place >= answered[:, None]), rows[target], PAD).astype(np.int32)
    return Windows(inputs, targets, session, None if times is None else times[target])


def pad_prefixes(prefixes: list[list[int]], max_prefix: int) -> np.ndarray:
    """Prefixes as (B, L), each cut to its last `max_prefix` events; an empty prefix gives a row of padding."""
    cut = [prefix[-max_prefix:] for prefix in prefixes]
    padded = np.full((len(cut), max(1, max(map(len, cut), default=1))), PAD, np.int32)
    for line, prefix in zip(padded, cut, strict=True):
        line[: len(prefix)] = prefix
    return padded


def batches(count: int, batch: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """The epoch's global batches of window numbers: a function of (seed, epoch) alone, so any run can pick up at any step."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    for start in range(0, count, batch):
        yield order[start : start + batch]


def cases_of(log: SessionLog, max_prefix: int, timed: bool = False) -> Windows:
    """Every position of each session, or its last one alone, where the others were trained on; if `timed`, with the targets' times."""
    windows = pack(log.rows, log.offsets, max_prefix, times=log.times if timed else None)
    if not log.last_out:
        return windows
    last = np.flatnonzero(np.diff(windows.session, append=-1))  # the window of each session that ends it
    inputs, line, place = windows.inputs[last], np.arange(len(last)), (windows.inputs[last] != PAD).sum(1) - 1
    targets = np.full_like(inputs, PAD)
    targets[line, place] = windows.targets[last, place]
    return Windows(inputs, targets, windows.session[last], None if windows.times is None else windows.times[last])


def prefixes_of(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Every case on its own: prefixes (cases, L) padded on the right, targets (cases,)."""
    window, position = np.nonzero(windows.targets != PAD)
    shown = np.arange(windows.inputs.shape[1]) <= position[:, None]
    return np.where(shown, windows.inputs[window], PAD), windows.targets[window, position]
