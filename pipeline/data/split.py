"""What is trained on, what models are chosen by and what they are tested on, by `data.protocol`: the one place that splits.

- `time`: the last sessions are the test, those before them validation. What a shop meets; the default.
- `user-hash`: each user's sessions fall in one part, by a hash of the user (of the session_id, where `sessions.parquet` has
  no `user_id`). Unseen users; but training sessions are as new as the test's, so it knows what will be popular.
- `last-out`: the last item of every session is the test, the one before it validation, what is earlier training. One case a
  session, and every session tested has been trained on in part.

Every step from `distill` on splits in the same way: what one of them has learned from another split is refused by the next.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from pipeline.core.config import DataConfig
from pipeline.core.errors import DATA, UserError
from pipeline.data.session_log import SessionLog


@dataclass(frozen=True)
class Split:
    train: SessionLog
    valid: SessionLog
    test: SessionLog


def split_sessions(log: SessionLog, data: DataConfig) -> Split:
    """Raises `UserError` (3) where a part would be empty."""
    if data.protocol == "time":
        return split_by_time(log, data.valid, data.test)
    return split_by_user(log, data.valid, data.test) if data.protocol == "user-hash" else split_last_out(log)


def split_by_time(log: SessionLog, valid: float, test: float) -> Split:
    """The last `test` share of the sessions is the test, the `valid` share before it validation, what is earlier training."""
    n_valid, n_test = (max(1, int(len(log) * share + 0.5)) if share > 0 else 0 for share in (valid, test))
    part = np.zeros(len(log), np.int64)
    part[max(len(log) - n_valid - n_test, 0) :] = 1
    part[max(len(log) - n_test, 0) :] = 2
    return _split(log, part)


def split_window(log: SessionLog, data: DataConfig, number: int, count: int) -> Split:
    """One of `count` windows of time: the held-out share of the log is cut into count + 1 stretches of equal length; the training sessions
    are all before stretch `number`, validation is that stretch, and the test the next one."""
    held = sum(max(1, int(len(log) * share + 0.5)) if share > 0 else 0 for share in (data.valid, data.test))
    ends = len(log) - held + np.linspace(0, held, count + 2).astype(np.int64)
    part = np.full(len(log), 3)  # after the test: not used
    for value, end in ((2, ends[number + 2]), (1, ends[number + 1]), (0, ends[number])):
        part[:end] = value
    return _split(log, part)


def split_by_user(log: SessionLog, valid: float, test: float) -> Split:
    """About these shares of the users, whatever else is in the log: a user's part does not change as it grows."""
    share = np.array([int.from_bytes(hashlib.sha256(whose.encode()).digest()[:8], "big") / 2**64 for whose in log.users or log.session_ids])
    return _split(log, np.where(share < test, 2, np.where(share < test + valid, 1, 0)))


def _split(log: SessionLog, part: np.ndarray) -> Split:
    """By the part of each session: 0 training, 1 validation, 2 test."""
    which = [np.flatnonzero(part == number) for number in range(3)]
    if min(map(len, which)) < 1:
        counts = ", ".join(str(len(sessions)) for sessions in which)
        raise UserError(
            f"{len(log)} sessions cannot be split into training, validation and test ({counts} of them); "
            "give more sessions, or change data.valid and data.test",
            DATA,
        )
    train, held, tested = (log.select(sessions) for sessions in which)
    return Split(replace(train, dropped=log.dropped), held, tested)


def split_last_out(log: SessionLog) -> Split:
    """Every session is in all three parts, as far as it is long enough, each time with one item more."""
    log = replace(log, last_out=True)
    left = np.repeat(log.offsets[1:], np.diff(log.offsets)) - np.arange(len(log.rows))  # events from each to the end, with it
    try:
        return Split(log.keep(left > 2), log.keep(left > 1), log)
    except ValueError:
        raise UserError(
            f"none of {len(log)} sessions has four events, two to train on, one for validation and one for the test (data.protocol = "
            "last-out); take data.protocol = time",
            DATA,
        ) from None
