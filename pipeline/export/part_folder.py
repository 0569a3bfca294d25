"""Keeps the parts of a version that is not published yet. One process writes them all, or several write a fixed share each.

A part appears complete, by a rename, and stays there if the export is interrupted: the next one computes what is missing. Every process
holds a lock as long as it works here. Processes with shares of one export hold it together, and any other export is refused. The
process that finds all parts complete publishes; the others find the version published.
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa

from pipeline.core.artifact import (
    CURRENT,
    MANIFEST,
    STAGING,
    Staging,
    Version,
    clear_leftovers,
    environment,
    finish_publication,
    locked,
    open_verified,
)
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import fsync_path, read_small, remove
from pipeline.data.embeddings import write_part

PRESENCE = ".exporting"
PATIENCE = 3.0  # seconds to wait for the lock: the workers of a killed process hold it until they notice


class PartFolder:
    """Holds, adds and publishes the parts of the version `fingerprint`; parts of an interrupted run of it are used again.

    `shared`: other processes write parts of it too. `is_complete(path, name)` returns whether a file is the complete part.
    """

    def __init__(self, root: Path, kind: str, fingerprint: str, shared: bool, is_complete: Callable[[Path, str], bool]) -> None:
        self.root, self.kind, self.fingerprint, self.shared, self.is_complete = root, kind, fingerprint, shared, is_complete
        self.staging = Staging(root, kind, f"{STAGING}-{fingerprint[:16]}")
        self.presence = root / PRESENCE  # the fingerprint of the export at work, locked by its processes
        self.done: set[str] = set()  # parts known to be complete
        self.lock: IO[bytes] = open(os.devnull, "rb")  # noqa: SIM115 (of `presence`, once it is taken)

    def begin(self, pointer: bytes) -> bool:
        """Prepares the folder. Returns False if a version was published since `pointer` was read: plan again from that one.

        Raises `UserError` (4) while another export is at work here.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            with environment(self.root), locked(self.root, wait=True):
                finish_publication(self.root)
                if current_pointer(self.root) != pointer:
                    return False
                if (alone := self._take()) is not None:
                    if alone:
                        clear_leftovers(self.root, self.staging.path)
                    self.staging.path.mkdir(exist_ok=True)
                    remove(self.staging.path / MANIFEST)
                    return True
            if time.monotonic() >= deadline:
                raise UserError(f"another tpad is exporting here ({self.root}); wait until it ends, or use another --run", ARTIFACT)
            time.sleep(0.1)

    def _take(self) -> bool | None:
        """Takes the lock. Returns whether this process is the only one here; None if another export is at work."""
        self.lock.close()
        self.lock = open(self.presence, "a+b")  # noqa: SIM115 (closed by `__exit__`)
        self.lock.seek(0)
        ours = self.shared and self.lock.read() == self.fingerprint.encode()
        for mode in (fcntl.LOCK_EX, fcntl.LOCK_SH) if ours else (fcntl.LOCK_EX,):
            with suppress(BlockingIOError):
                fcntl.flock(self.lock, mode | fcntl.LOCK_NB)
                if mode == fcntl.LOCK_SH:
                    return False
                self.lock.truncate(0)
                self.lock.write(self.fingerprint.encode())
                self.lock.flush()
                if self.shared:
                    fcntl.flock(self.lock, fcntl.LOCK_SH)
                return True
        return None

    def __enter__(self) -> "PartFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        fcntl.flock(self.lock, fcntl.LOCK_UN)  # not left to close(): a forked worker may hold the file open
        self.lock.close()

    def missing(self, names: Sequence[str]) -> list[str]:
        """Returns the parts of `names` that are not complete; none once the version is published."""
        if not self.staging.path.exists():
            return []
        self.done |= {name for name in names if name not in self.done and self.is_complete(self.staging.path / name, name)}
        return [name for name in names if name not in self.done]

    def add(self, name: str, table: pa.Table) -> None:
        """Adds a complete part, synced to the disk. If the version was published meanwhile, it has the part."""
        temporary = self.root / f".{name}.{socket.gethostname()}-{os.getpid()}.tmp"
        write_part(temporary, table)
        try:
            os.replace(temporary, self.staging.path / name)
            fsync_path(self.staging.path)
        except FileNotFoundError:
            if self.staging.path.exists():
                raise
            remove(temporary)
        self.done.add(name)

    def publish(self, manifest: Callable[[], dict[str, Any]], keep: int) -> Version:
        """Publishes the version, and returns it; also where another process has published it. Raises `UserError` (4)."""
        with environment(self.root), locked(self.root, wait=True):
            if self.staging.path.exists():
                version = self.staging.publish(manifest(), keep)
                remove(self.presence)
                return version
        version = open_verified(self.root, self.kind, "run `tpad export-embeddings` first")
        if version.manifest["fingerprint"] != self.fingerprint:
            raise UserError(
                f"another export, of other settings or items, was published meanwhile ({self.root}); start this one again", ARTIFACT
            )
        return version


def clear_parts(root: Path) -> None:
    """Removes what killed exports have left, unless another one is at work; for an export that finds nothing to do."""
    with suppress(UserError, OSError), locked(root), open(root / PRESENCE, "a+b") as presence:
        fcntl.flock(presence, fcntl.LOCK_EX | fcntl.LOCK_NB)
        clear_leftovers(root)
        remove(root / PRESENCE)


def current_pointer(root: Path) -> bytes:
    """Returns the content of the file `current`, which names the current version; empty where there is none."""
    try:
        return read_small(root / CURRENT)
    except OSError:
        return b""
