"""Handles files: checksums, canonical JSON, atomic replacement, errors of the disk."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.core.errors import ENVIRONMENT, UserError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
LOCK_ERRORS = {errno.ENOTDIR, errno.EMFILE, errno.ENOLCK, errno.EOPNOTSUPP}


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a file as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(obj: Any) -> bytes:
    """Returns the only byte form of `obj` that tpad writes. Raises ValueError for NaN and infinity."""
    return (json.dumps(obj, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def fsync_path(path: Path) -> None:
    """Forces a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is synced and renamed to it at the end, or removed if the body fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # with the process id: two processes may replace one file
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    fsync_path(path.parent)


def write_json(path: Path, obj: Any) -> None:
    """Writes canonical JSON, replacing the file atomically."""
    data = canonical_json(obj)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def remove(path: Path) -> None:
    """Removes a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # checked first: a read-only disk refuses to unlink even a missing file
        path.unlink()


def environment_error(error: BaseException, where: Path) -> UserError | None:
    """Turns an error of the disk or of permissions into `UserError` (5); None for other errors. `where`: the path if it names none."""
    number, name = None, where
    if isinstance(error, OSError):
        number = error.errno
        name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else where
    elif isinstance(error, SafetensorError) and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    if number is None or number not in DISK_ERRORS | LOCK_ERRORS:
        return None
    return UserError(f"{os.strerror(number).lower()} ({name}); free or unlock it, or use another --run, and start again", ENVIRONMENT)
