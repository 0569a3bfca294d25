"""Lets several processes write the parts of one version, on one machine or on several that share the folder.

They coordinate through lock files in the output folder. Each process claims the next part that neither exists nor is claimed, and
adds it as a complete file. A claim is a file that its owner holds a lock on and touches every few seconds. It is free as soon as
its owner has ended (where locks reach), and where they do not, or the owner hangs, once it was not touched for `STALE_SECONDS`. Two
processes that compute one part after all only waste time: parts are functions of the inputs, and the first one added stays.
A process that finds all parts complete publishes, under the artifact's lock; the others find the version published, and end.
"""

import fcntl
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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

STALE_SECONDS = 60.0
BEAT_SECONDS = 5.0


class PartClaims:
    """Claims, adds and publishes the parts of the version `fingerprint`; parts of an interrupted run of it are used again.

    `is_complete(path, name)` returns whether a part of another run or process is complete.
    """

    def __init__(self, root: Path, kind: str, fingerprint: str, is_complete: Callable[[Path, str], bool]) -> None:
        tag = fingerprint[:16]
        self.root, self.kind, self.fingerprint, self.is_complete = root, kind, fingerprint, is_complete
        self.staging = Staging(root, kind, f"{STAGING}-{tag}")
        self.work = root / f".work-{tag}"  # claims and unfinished files, which are not published
        self.done: set[str] = set()  # parts known to be complete
        self.held: dict[str, IO[bytes]] = {}
        self.presence = f"{socket.gethostname()}-{os.getpid()}"  # a claim on no part, held from the start
        self._over = threading.Event()

    def begin(self, pointer: bytes) -> bool:
        """Prepares the folders. Returns False if a version was published since `pointer` was read: plan again from that one."""
        with environment(self.root), locked(self.root, wait=True):
            finish_publication(self.root)
            if current_pointer(self.root) != pointer:
                return False
            for work in self.root.glob(".work-*"):
                if work != self.work and _has_owner(work):
                    raise UserError(f"another tpad is exporting here ({self.root}); wait until it ends, or use another --run", ARTIFACT)
            clear_leftovers(self.root, self.work, self.staging.path)
            for folder in (self.work, self.staging.path):
                folder.mkdir(exist_ok=True)
            remove(self.staging.path / MANIFEST)
            self._take(self.presence)
        return True

    def __enter__(self) -> "PartClaims":
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        for name in list(self.held):
            self._release(name)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for name in list(self.held):
                with suppress(OSError):
                    os.utime(self._claim(name))

    def _claim(self, name: str) -> Path:
        return self.work / f"{name}.claim"

    def take(self, names: Sequence[str]) -> Iterator[str]:
        """Claims and yields the parts of `names` that are neither complete nor claimed by others now, one at a time."""
        for name in names:
            if name not in self.done and not self._is_complete(name) and self._take(name):
                if self._is_complete(name) or not self.staging.path.exists():  # added, or the version published, since the check
                    self._release(name)
                    continue
                remove(self.staging.path / name)
                yield name

    def _is_complete(self, name: str) -> bool:
        path = self.staging.path / name
        if name not in self.done and path.exists() and self.is_complete(path, name):
            self.done.add(name)
        return name in self.done

    def _take(self, name: str) -> bool:
        path, host = self._claim(name), socket.gethostname().encode()
        try:
            file = open(path, "a+b")  # noqa: SIM115 (held until the part is added)
        except FileNotFoundError:
            return False  # published, and the folder with it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(file.fileno()).st_ino == path.stat().st_ino
            file.seek(0)
            mine = mine and (file.read() in (b"", host) or _age(path) > STALE_SECONDS)
            if mine:
                file.truncate(0)
                file.write(host)
                file.flush()
                self.held[name] = file
                return True
        except BlockingIOError:
            with suppress(FileNotFoundError):
                if _age(path) > STALE_SECONDS:  # its owner hangs: the next attempt finds no claim
                    path.unlink()
        except FileNotFoundError:
            pass  # released just now
        file.close()
        return False

    def _release(self, name: str) -> None:
        file = self.held.pop(name)
        with suppress(OSError):
            if os.fstat(file.fileno()).st_ino == self._claim(name).stat().st_ino:
                self._claim(name).unlink()
        file.close()

    def add(self, name: str, table: pa.Table) -> None:
        """Adds a complete part, synced to the disk, and releases its claim. If the version was published meanwhile, it has the part."""
        temporary = self.work / f"{name}.{socket.gethostname()}-{os.getpid()}"
        try:
            write_part(temporary, table)
            with suppress(FileExistsError):
                os.link(temporary, self.staging.path / name)
            temporary.unlink()
            fsync_path(self.staging.path)
        except FileNotFoundError:
            if self.staging.path.exists():
                raise
        self.done.add(name)
        self._release(name)

    def left(self, names: Sequence[str]) -> list[str]:
        """Returns the parts of `names` that are not complete; none once the version is published."""
        return [name for name in names if not self._is_complete(name)] if self.staging.path.exists() else []

    def publish(self, manifest: Callable[[], dict[str, Any]], keep: int) -> Version:
        """Publishes the version, and returns it; also where another process has published it. Raises `UserError` (4)."""
        with environment(self.root), locked(self.root, wait=True):
            if self.staging.path.exists():
                version = self.staging.publish(manifest(), keep)
                shutil.rmtree(self.work, ignore_errors=True)
                return version
        version = open_verified(self.root, self.kind, "run `tpad export-embeddings` first")
        if version.manifest["fingerprint"] != self.fingerprint:
            raise UserError(
                f"another export, of other settings or items, was published meanwhile ({self.root}); start this one again", ARTIFACT
            )
        return version


def current_pointer(root: Path) -> bytes:
    """Returns the content of the file `current`, which names the current version; empty where there is none."""
    try:
        return read_small(root / CURRENT)
    except OSError:
        return b""


def clear_work(root: Path) -> None:
    """Removes what killed exports have left, unless another one is at work; for an export that finds nothing to do."""
    with suppress(UserError, OSError), locked(root):
        if not any(map(_has_owner, root.glob(".work-*"))):
            clear_leftovers(root)


def _has_owner(work: Path) -> bool:
    return any(_alive(claim) for claim in work.glob("*.claim"))


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _alive(claim: Path) -> bool:
    """Returns whether the owner of a claim still locks or touches it."""
    try:
        with open(claim, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file.read() != socket.gethostname().encode() and _age(claim) < STALE_SECONDS
    except BlockingIOError:
        with suppress(FileNotFoundError):
            return _age(claim) < STALE_SECONDS
    except FileNotFoundError:
        pass
    return False
