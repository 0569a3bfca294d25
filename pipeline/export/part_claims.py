"""One version made by any number of processes, on one machine or on several that share the folder, without a word between them.

The version is a list of parts. Each process takes the next part that is neither there nor claimed, and adds it whole.
A claim is a file that its owner holds a lock on and touches every few seconds: it is free as soon as the owner is gone
(where locks reach), and where they do not, or the owner hangs, once it has not been touched for `STALE_SECONDS`. Two
processes at work on one part after all are a waste and nothing worse: parts are functions of the inputs, the first one
added stays. Whoever finds all parts there publishes, under the artifact's lock; the others find it done and leave.
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
    locked,
    open_verified,
    take_back_unpublished,
)
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import fsync_path, remove
from pipeline.data.embeddings import write_part

STALE_SECONDS = 60.0
BEAT_SECONDS = 5.0


class PartClaims:
    """The parts of the version that `fingerprint` names; what an interrupted run of the same fingerprint added is still there.

    `whole(path, name)` says whether a part that another run or process added is what it should be.
    """

    def __init__(self, root: Path, kind: str, fingerprint: str, whole: Callable[[Path, str], bool]) -> None:
        tag = fingerprint[:16]
        self.root, self.kind, self.fingerprint, self.whole = root, kind, fingerprint, whole
        self.staging = Staging(root, kind, f"{STAGING}-{tag}")
        self.work = root / f".work-{tag}"  # claims and unfinished files: nothing of it is published
        self.done: set[str] = set()  # parts this process has seen whole
        self.held: dict[str, IO[bytes]] = {}
        self.presence = f"{socket.gethostname()}-{os.getpid()}"  # a claim from the beginning on, before there is one on a part
        self._over = threading.Event()

    def begin(self, pointer: bytes) -> bool:
        """Makes the folders ready. False: a version was published since `pointer` was read, so look at that one first."""
        with environment(self.root), locked(self.root, wait=True):
            if current_pointer(self.root) != pointer:
                return False
            for work in self.root.glob(".work-*"):
                if work != self.work and any(_alive(claim) for claim in work.glob("*.claim")):
                    raise UserError(f"another tpad is exporting here ({self.root}); wait until it ends, or use another --run", ARTIFACT)
            clear_leftovers(self.root, self.work, self.staging.path)
            take_back_unpublished(self.staging, self.fingerprint)
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
        """Claims those of `names` that are neither whole nor somebody else's, one at a time, as far as they are free now."""
        for name in names:
            if name not in self.done and not self._is_whole(name) and self._take(name):
                if self._is_whole(name) or not self.staging.path.exists():  # added, or all published, between the look and the claim
                    self._release(name)
                    continue
                remove(self.staging.path / name)
                yield name

    def _is_whole(self, name: str) -> bool:
        path = self.staging.path / name
        if name not in self.done and path.exists() and self.whole(path, name):
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
                if _age(path) > STALE_SECONDS:  # its owner hangs: the next look finds no claim
                    path.unlink()
        except FileNotFoundError:
            pass  # given up in this moment
        file.close()
        return False

    def _release(self, name: str) -> None:
        file = self.held.pop(name)
        with suppress(OSError):
            if os.fstat(file.fileno()).st_ino == self._claim(name).stat().st_ino:
                self._claim(name).unlink()
        file.close()

    def add(self, name: str, table: pa.Table) -> None:
        """Adds a part, whole and durable, and gives up the claim on it. Where the version was published meanwhile, it has the part."""
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
        """Those of `names` that are not there yet; none once the version is published."""
        return [name for name in names if not self._is_whole(name)] if self.staging.path.exists() else []

    def publish(self, manifest: Callable[[], dict[str, Any]], keep: int) -> Version:
        """The version, published by this process or by another one."""
        with environment(self.root), locked(self.root, wait=True):
            if self.staging.path.exists():
                version = self.staging.publish(manifest(), keep)
                shutil.rmtree(self.work, ignore_errors=True)
                return version
        version = open_verified(self.root, self.kind, "run `tpad export-embeddings` first")
        if version.manifest["fingerprint"] != self.fingerprint:
            what = "another export, of other settings or items, was published meanwhile"
            raise UserError(f"{what} ({self.root}); start this one again", ARTIFACT)
        return version


def current_pointer(root: Path) -> bytes:
    """What names the current version; empty where there is none."""
    try:
        return (root / CURRENT).read_bytes()
    except OSError:
        return b""


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _alive(claim: Path) -> bool:
    """Whether the owner of a claim still holds or touches it."""
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
