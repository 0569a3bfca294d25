"""Splits the sessions into training, validation and test by `data.protocol`. No other module splits them.

- `time`: the latest sessions are the test, those before them validation. This is how a shop uses a model, and the default.
- `user-hash`: all sessions of a user are in one part, by a hash of the user (of the session_id, if `sessions.parquet` has no
  `user_id`). It tests unseen users; but training sessions are as recent as test sessions, so popularity is known in advance.
- `cold-items`: a tenth of the items, by a hash of the item_id, is withheld from training and validation, whose sessions are those of
  `user-hash`. Their events in test sessions are cold cases: strict item cold start, whatever the log.
- `last-out`: the last item of every session is the test, the one before it validation, the earlier ones training. One case a
  session, and part of every test session was trained on.

Every step from `distill` on makes the same split; a step refuses artifacts that were trained on another one.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from pipeline.core.config import DataConfig
from pipeline.core.errors import DATA, UserError
from pipeline.data.session_log import SessionLog

COLD_ITEMS = 0.1  # share of the items that the protocol cold-items withholds


@dataclass(frozen=True)
class Split:
    """The three parts of a session log."""

    train: SessionLog
    valid: SessionLog
    test: SessionLog


def split_sessions(log: SessionLog, data: DataConfig) -> Split:
    """Splits by the protocol of the settings. Raises `UserError` (3) if a part would be empty."""
    if data.protocol == "time":
        return split_by_time(log, data.valid, data.test)
    if data.protocol == "last-out":
        return split_last_out(log)
    split = split_by_user(log, data.valid, data.test)
    return split if data.protocol == "user-hash" else without_cold_items(split)


def split_by_time(log: SessionLog, valid: float, test: float) -> Split:
    """Takes the last `test` share of the sessions as test, the `valid` share before it as validation, earlier ones as training."""
    n_valid, n_test = (max(1, int(len(log) * share + 0.5)) if share > 0 else 0 for share in (valid, test))
    part = np.zeros(len(log), np.int64)
    part[max(len(log) - n_valid - n_test, 0) :] = 1
    part[max(len(log) - n_test, 0) :] = 2
    return _split(log, part)


def split_window(log: SessionLog, data: DataConfig, number: int, count: int) -> Split:
    """Returns window `number` of `count` rolling windows of time.

    The held-out share of the log is cut into count + 1 stretches of equal length. Training sessions are all before stretch `number`,
    validation is that stretch, and the test the next one.
    """
    held_out = sum(max(1, int(len(log) * share + 0.5)) if share > 0 else 0 for share in (data.valid, data.test))
    ends = len(log) - held_out + np.linspace(0, held_out, count + 2).astype(np.int64)
    part = np.full(len(log), 3)  # after the test: not used
    for value, end in ((2, ends[number + 2]), (1, ends[number + 1]), (0, ends[number])):
        part[:end] = value
    return _split(log, part)


def split_by_user(log: SessionLog, valid: float, test: float) -> Split:
    """Takes about these shares of the users; a user's part does not change as the log grows."""
    share = np.array([_hashed(user) for user in log.users or log.session_ids])
    return _split(log, np.where(share < test, 2, np.where(share < test + valid, 1, 0)))


def without_cold_items(split: Split) -> Split:
    """Withholds a tenth of the items from training and validation; an item's part does not change as the catalogue grows."""
    cold = np.array([_hashed(f"item {item_id}") < COLD_ITEMS for item_id in split.train.item_ids])
    try:
        train, valid = (replace(log.keep(~cold[log.rows]), withheld=True) for log in (split.train, split.valid))
    except ValueError:
        raise UserError(
            "no session of two events is left without the withheld items (data.protocol = cold-items); take another protocol", DATA
        ) from None
    return Split(train, valid, split.test)


def _hashed(text: str) -> float:
    """Returns a hash of the text in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _split(log: SessionLog, part: np.ndarray) -> Split:
    """Splits by the part of each session: 0 training, 1 validation, 2 test."""
    parts = [np.flatnonzero(part == number) for number in range(3)]
    if min(map(len, parts)) < 1:
        counts = ", ".join(str(len(sessions)) for sessions in parts)
        raise UserError(
            f"{len(log)} sessions cannot be split into training, validation and test ({counts} of them); "
            "give more sessions, or change data.valid and data.test",
            DATA,
        )
    train, valid, test = (log.select(sessions) for sessions in parts)
    return Split(replace(train, dropped=log.dropped), valid, test)


def split_last_out(log: SessionLog) -> Split:
    """Puts every session into all three parts, each time with one more item, if it is long enough."""
    log = replace(log, last_out=True)
    left = np.repeat(log.offsets[1:], np.diff(log.offsets)) - np.arange(len(log.rows))  # events from each one to the end of its session
    try:
        return Split(log.keep(left > 2), log.keep(left > 1), log)
    except ValueError:
        raise UserError(
            f"none of {len(log)} sessions has four events, two to train on, one for validation and one for the test (data.protocol = "
            "last-out); take data.protocol = time",
            DATA,
        ) from None
