"""Handles files: checksums, canonical JSON, atomic replacement, guarded reading, errors of the disk."""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import select
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.core.errors import ENVIRONMENT, UserError

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG}
LOCK_ERRORS = {errno.EMFILE, errno.ENOLCK, errno.EOPNOTSUPP}
PLACE_ERRORS = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY}
OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory|not enough memory|bad_alloc")  # in errors of torch and FAISS
PATIENCE = 60.0  # seconds: the other end may ask for a password
MAX_SMALL = 256 * 1024 * 1024  # bytes: of a manifest, a log of metrics and the like, which are read completely


def open_plain(path: Path) -> io.BufferedReader:
    """Opens a plain file to read. Raises OSError for anything else: a fifo would wait for ever, and a device has no end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return open(handle, "rb")


def read_small(path: Path, most: int = MAX_SMALL) -> bytes:
    """Returns the content of a plain file of at most `most` bytes. Raises OSError."""
    with open_plain(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EINVAL, f"larger than {most} bytes", str(path))
    return data


def read_given(path: Path, most: int) -> bytes:
    """Returns the content of a file that a user names, a pipe too (`<(pass show key)`), up to `most` bytes and one more.

    Raises OSError, also where nothing comes for `PATIENCE` seconds. A fifo without a writer, which would wait for ever, is empty.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) <= most:
            try:
                piece = os.read(handle, most + 1 - len(data))
            except BlockingIOError:  # a pipe whose writer has nothing yet
                if not select.select([handle], [], [], PATIENCE)[0]:
                    raise OSError(errno.ETIMEDOUT, "nothing arrives", str(path)) from None
                continue
            if not piece:
                break
            data += piece
        return data
    finally:
        os.close(handle)


def parse_json(data: bytes) -> Any:
    """Parses JSON. Raises ValueError for anything else, nesting that is too deep included."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises OSError or ValueError."""
    return parse_json(read_small(path))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a file of JSON objects, one a line; none without a file. Skips other lines, as a kill or a flipped bit leaves them."""
    lines = []
    with suppress(FileNotFoundError):
        for line in read_small(path).split(b"\n"):
            with suppress(ValueError):
                if isinstance(entry := parse_json(line), dict):
                    lines.append(entry)
    return lines


def sha256_file(path: Path) -> str:
    """Returns the sha256 of a plain file as hex digits."""
    with open_plain(path) as file:
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


# ---------------------------------------------------------------- replacing
# A writer works in `.NAME.RANDOM.tmp` beside the target NAME, and holds a lock on it. So the next writer of the same target recognises
# and removes what killed ones have left, on this machine or another.


@contextmanager
def replacing(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yields a temporary file, or `folder`, beside `path`, which is synced and renamed to it at the end, or removed if the body fails.

    An existing file is replaced; an existing folder is an OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two processes, of two machines, may replace one file
    remove_leftovers(path.parent, f".{path.name}.", ".tmp")
    lock = _create_locked(temporary, folder)
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    finally:
        os.close(lock)
    fsync_path(path.parent)


@contextmanager
def temporary_folder(parent: Path, start: str) -> Iterator[Path]:
    """Yields a folder `start`... for this process alone, which is removed at the end; those of killed processes are removed first."""
    remove_leftovers(parent, start)
    folder = parent / f"{start}{secrets.token_hex(4)}"
    lock = _create_locked(folder, folder=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _create_locked(path: Path, folder: bool) -> int:
    """Creates an empty file or folder, and returns an open handle that locks it, where the file system has locks."""
    while True:
        if folder:
            path.mkdir()
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                return handle
        os.close(handle)  # another process took it for a leftover before it was locked


def remove_leftovers(parent: Path, start: str, end: str = "") -> None:
    """Removes the files and folders `start`...`end` in a folder that no living process holds a lock on."""
    for name in os.listdir(parent):
        if name.startswith(start) and name.endswith(end):
            with suppress(FileNotFoundError, PermissionError):  # in /tmp it may be another user's
                _remove_unless_locked(parent / name)


def _remove_unless_locked(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
        return
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its writer lives, or there are no locks here
        return
    finally:
        os.close(handle)
    remove(path)


def write_json(path: Path, obj: Any) -> None:
    """Writes canonical JSON, replacing the file atomically."""
    data = canonical_json(obj)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_sealed(path: Path, content: Any) -> None:
    """Writes JSON with the sha256 of its content, replacing the file atomically: a working file whose figures are believed later."""
    write_json(path, {"content": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()})


def read_sealed(path: Path) -> Any:
    """Reads what `write_sealed` wrote. Raises OSError, or ValueError for anything else, one flipped bit included."""
    data = read_small(path)
    entry = parse_json(data)
    if not isinstance(entry, dict) or entry.keys() != {"content", "sha256"} or canonical_json(entry) != data:
        raise ValueError("not as written")
    if entry["sha256"] != hashlib.sha256(canonical_json(entry["content"])).hexdigest():
        raise ValueError("not as written")
    return entry["content"]


def remove(path: Path) -> None:
    """Removes a file, link or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # checked first: a read-only disk refuses to unlink even a missing file
        path.unlink()


def environment_error(error: BaseException, where: Path) -> UserError | None:
    """Turns an error of the disk, of permissions or of memory into `UserError` (5); None for other errors.

    `where`: the path to name if the error names none.
    """
    number, name = None, where
    if isinstance(error, OSError):
        number = error.errno
        name = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else where
    elif isinstance(error, SafetensorError) and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return UserError("not enough memory (this machine); take smaller sizes or batches, see docs/operations.md", ENVIRONMENT)
    if number in PLACE_ERRORS:
        return UserError(f"a file is where a folder is needed, or the reverse ({name}); move it, or use another --run", ENVIRONMENT)
    if number is None or number not in DISK_ERRORS | LOCK_ERRORS:
        return None
    return UserError(f"{os.strerror(number).lower()} ({name}); free or unlock it, or use another --run, and start again", ENVIRONMENT)
