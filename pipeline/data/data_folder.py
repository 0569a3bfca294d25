"""Publishes and finds the two files of a data folder, which belong together.

`publish_pair` makes both visible by one rename, of a sub-folder, and then moves them to their places. A kill in between loses nothing:
`data_file` finds a file in the sub-folder as long as it is there, so a reader never sees new items beside old sessions, and the next
`publish_pair` goes on with the moves.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import ARTIFACT, ENVIRONMENT, UserError
from pipeline.core.files import fsync_path, replacing

ITEMS, SESSIONS = "items.parquet", "sessions.parquet"
COMPLETE = ".prepared"  # sub-folder of files that are complete, and on the way to their places


def data_file(data: Path, name: str) -> Path:
    """Returns where the file `name` of a data folder is now."""
    waiting = data / COMPLETE / name
    return waiting if waiting.exists() else data / name


@contextmanager
def publish_pair(out: Path) -> Iterator[Path]:
    """Yields a temporary folder to write both files to, which replace those of `out` together, or not at all if the body fails.

    Raises `UserError` (4 or 5).
    """
    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone_in(out):
            _move_in(out)
            with replacing(out / COMPLETE, folder=True) as folder:
                yield folder
                for name in (ITEMS, SESSIONS):
                    fsync_path(folder / name)
            _move_in(out)
        fresh = False
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write: {reason} ({out}); give a folder with room that you may write in", ENVIRONMENT) from None
    finally:
        if fresh:
            with suppress(OSError):
                out.rmdir()


def _move_in(out: Path) -> None:
    """Moves complete files to their places."""
    if (out / COMPLETE).is_dir():
        for path in (out / COMPLETE).iterdir():
            os.replace(path, out / path.name)
        fsync_path(out)
        (out / COMPLETE).rmdir()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder itself, without a file that would stay in it. Raises `UserError` (4) if another process has locked it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another tpad is writing here ({folder}); wait until it ends, or give another --out", ARTIFACT) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
