"""Session logs of a given number of sessions."""

import numpy as np

from pipeline.data.session_log import SessionLog


def log_of(count: int, length: int = 2, users: int = 0) -> SessionLog:
    """Sessions of the items 0, 1, 2, ..., each with a time of its own."""
    offsets, rows = np.arange(count + 1, dtype=np.int64) * length, np.tile(np.arange(length, dtype=np.int32), count)
    whose = [f"u{n % users}" for n in range(count)] if users else []
    return SessionLog([f"s{n}" for n in range(count)], rows, offsets, np.arange(count, dtype=np.int64), np.arange(len(rows)), users=whose)
