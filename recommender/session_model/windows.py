"""Packs sessions into padded integer windows, once: a batch is then a slice of two arrays.

A case is a pair (prefix, target): one for every event of a session from the second on, with the prefix cut to its last `max_prefix`
events. A causal model answers all cases of a window in one pass, so a session that fits is one window. A longer session gives several
windows; each has only the cases that no earlier window of the session has.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.session_log import SessionLog

PAD = -1  # in `inputs`: no event; in `targets`: no case


@dataclass(frozen=True)
class Windows:
    """Holds W windows of up to L events, padded on the right."""

    inputs: np.ndarray  # (W, L) int32 rows of items
    targets: np.ndarray  # (W, L) int32 row of the item that follows
    session: np.ndarray  # (W,) int64 number of the window's session
    times: np.ndarray | None = None  # (W, L) int64 Unix seconds of the targets; None: items are always available

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def cases(self) -> int:
        return int((self.targets != PAD).sum())

    def take(self, numbers: np.ndarray) -> "Windows":
        """Selects windows by their numbers and cuts them to the longest of them."""
        inputs = self.inputs[numbers]
        longest = max(1, int((inputs != PAD).sum(1).max(initial=1)))
        times = None if self.times is None else self.times[numbers, :longest]
        return Windows(inputs[:, :longest], self.targets[numbers, :longest], self.session[numbers], times)


class DeviceWindows:
    """Holds windows on a device, so that a batch is a selection there.

    Lengths and numbers of cases stay on the host: reading them from the device would wait for its queue.
    """

    def __init__(self, windows: Windows, device: torch.device) -> None:
        self.inputs = torch.as_tensor(windows.inputs, device=device)  # (W, L) int32
        self.targets = torch.as_tensor(windows.targets, device=device)  # (W, L) int32
        self.times = None if windows.times is None else torch.as_tensor(windows.times, device=device)  # (W, L) int64
        self.lengths = (windows.inputs != PAD).sum(1)
        self.cases = (windows.targets != PAD).sum(1)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, numbers: np.ndarray) -> tuple[Tensor, Tensor, Tensor | None]:
        """Selects windows by their numbers: inputs, targets and times (B, L) int64, cut to the longest of them."""
        place = torch.as_tensor(numbers, device=self.inputs.device)
        longest = max(1, int(self.lengths[numbers].max(initial=1)))
        rows, targets = (packed.index_select(0, place)[:, :longest].long() for packed in (self.inputs, self.targets))
        return rows, targets, None if self.times is None else self.times.index_select(0, place)[:, :longest]


def pack(rows: np.ndarray, offsets: np.ndarray, max_prefix: int, stride: int = 1, times: np.ndarray | None = None) -> Windows:
    """Packs sessions in CSR form (session i is rows[offsets[i]:offsets[i + 1]]) into windows; `times` (E,) are the events' Unix seconds.

    `stride` is the distance, in events, of the windows of a long session. 1 gives every case its last `max_prefix` events, as evaluation
    needs; max_prefix / 2 gives every case at least half of them at a fraction of the cost, which is enough for training.
    """
    lengths = np.diff(offsets) - 1  # the last event is only ever a target
    beyond = np.maximum(lengths - max_prefix, 0)
    count = np.where(lengths > 0, 1 + -(-beyond // stride), 0)
    session = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(session)) - np.repeat(np.cumsum(count) - count, count)
    limit = lengths[session]
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
    """Pads prefixes to (B, L), each cut to its last `max_prefix` events; an empty prefix gives a line of padding."""
    suffixes = [prefix[-max_prefix:] for prefix in prefixes]
    padded = np.full((len(suffixes), max(1, max(map(len, suffixes), default=1))), PAD, np.int32)
    for line, prefix in zip(padded, suffixes, strict=True):
        line[: len(prefix)] = prefix
    return padded


def batches(count: int, batch: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Yields the window numbers of an epoch's batches: a function of (seed, epoch) alone, so that a training can resume at any step."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    for start in range(0, count, batch):
        yield order[start : start + batch]


def training_windows(log: SessionLog, max_prefix: int, timed: bool = False) -> Windows:
    """Packs training sessions: every case has at least half of `max_prefix` events before it, if there are so many. `timed`: with the
    times of the targets."""
    return pack(log.rows, log.offsets, max_prefix, max(max_prefix // 2, 1), log.times if timed else None)


def cases_of(log: SessionLog, max_prefix: int, timed: bool = False) -> Windows:
    """Packs the cases of a log for evaluation: all cases of each session, or, of a last-out split, whose other events were trained on, the
    last one. With `timed`, the windows have the targets' times."""
    windows = pack(log.rows, log.offsets, max_prefix, times=log.times if timed else None)
    if not log.last_out:
        return windows
    last = np.flatnonzero(np.diff(windows.session, append=-1))  # the last window of each session
    inputs, line, place = windows.inputs[last], np.arange(len(last)), (windows.inputs[last] != PAD).sum(1) - 1
    targets = np.full_like(inputs, PAD)
    targets[line, place] = windows.targets[last, place]
    return Windows(inputs, targets, windows.session[last], None if windows.times is None else windows.times[last])


def prefixes_of(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Unpacks windows into single cases: prefixes (cases, L) padded on the right, targets (cases,)."""
    window, position = np.nonzero(windows.targets != PAD)
    visible = np.arange(windows.inputs.shape[1]) <= position[:, None]
    return np.where(visible, windows.inputs[window], PAD), windows.targets[window, position]
