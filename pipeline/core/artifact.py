"""Publishes and opens artifacts: versioned folders that are complete or absent, and verified before use. No torch here.

An artifact is `<root>/v000N/` with its files and a `manifest.json` that lists each of them with size and sha256; `<root>/current`
names the version and the sha256 of its manifest. Readers follow `current` only, take no lock, and refuse whatever differs by one
bit. Writers hold `<root>/.lock`, work in `<root>/.staging` on the same file system, and make a version visible by one rename
(`part_folder.py` has the form for several writers of one version). What a killed writer has left, the next one finishes or removes.
Manifests hold no clock, host or absolute path, so equal inputs give equal bytes. POSIX only (flock, atomic rename). Sizes and
checksums protect against damage, not against forgery.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from safetensors import SafetensorError

from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import (
    canonical_json,
    environment_error,
    fsync_path,
    parse_json,
    read_small,
    remove,
    remove_leftovers,
    sha256_file,
    write_json,
)

T = TypeVar("T")

FORMAT_VERSION = 1
CURRENT, MANIFEST, LOCK, STAGING = "current", "manifest.json", ".lock", ".staging"
NEXT = ".next"  # the content of `current` to be, while a version is renamed: a kill in between is made good by `settle`
VERSION_NAME = re.compile(r"v\d{4,}")
NAMES = {"mllm": "unified MLLM", "sbr": "session model"}  # kind -> its name in messages
OWN_KEYS = {"format_version", "kind", "files"}  # manifest entries that `publish` fills in
READ_ATTEMPTS = 100  # a version may be replaced and pruned while it is read; each attempt follows a newer `current`


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Version:
    """A published version."""

    path: Path
    manifest: dict[str, Any]
    name: str  # "v0001"
    manifest_sha256: str


class Staging:
    """A folder to write in, which `publish` turns into the next version. Created by `stage` or `part_folder.PartFolder`."""

    def __init__(self, root: Path, kind: str, name: str = STAGING) -> None:
        self.root = root
        self.kind = kind
        self.path = root / name
        self.published = False

    def publish(self, manifest: dict[str, Any], keep: int = 2) -> Version:
        """Makes everything in `path` the current version and prunes old ones to `keep`."""
        if self.published or OWN_KEYS & manifest.keys() or keep < 1:
            raise ValueError(f"published twice, or a manifest with one of {sorted(OWN_KEYS)}, or keep < 1")
        remove(self.path / MANIFEST)
        for leftover in self.path.rglob(".*.tmp"):  # of a writer that was killed here
            remove(leftover)
        names, folders = _walk(self.path)
        files = [{"name": n, "bytes": (self.path / n).stat().st_size, "sha256": sha256_file(self.path / n)} for n in names]
        full = manifest | {"format_version": FORMAT_VERSION, "kind": self.kind, "files": files}
        for name in [*names, *reversed(folders)]:
            fsync_path(self.path / name)
        write_json(self.path / MANIFEST, full)
        digest = sha256_file(self.path / MANIFEST)
        fsync_path(self.path)
        before, numbers = _current_number(self.root), _numbers(self.root)
        name = f"v{max(numbers, default=0) + 1:04d}"
        write_json(self.root / NEXT, {"version": name, "manifest_sha256": digest})
        os.rename(self.path, self.root / name)
        self.published = True
        fsync_path(self.root)
        os.replace(self.root / NEXT, self.root / CURRENT)
        fsync_path(self.root)
        older = [n for n in numbers if before is None or n <= before][: keep - 1]
        _prune(self.root, [*older, int(name[1:])])
        return Version(self.root / name, json.loads(canonical_json(full)), name, digest)


@contextmanager
def stage(root: Path, kind: str) -> Iterator[Staging]:
    """Writes an artifact from one process: an empty folder under the lock, which is removed unless the body publishes it."""
    with environment(root), locked(root, patience=1.0):  # for the moment in which another process settles
        finish_publication(root)
        clear_leftovers(root)
        staging = Staging(root, kind)
        staging.path.mkdir()
        try:
            yield staging
        finally:
            remove(staging.path)


@contextmanager
def environment(root: Path) -> Iterator[None]:
    """Turns errors of the disk and of permissions in the body into `UserError` (5)."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if (line := environment_error(error, root)) is None:
            raise
        raise line from error


@contextmanager
def locked(root: Path, wait: bool = False, patience: float = 0.0) -> Iterator[None]:
    """Holds the artifact's lock, and creates its folder if needed.

    Raises `UserError` (4) if another process holds the lock for longer than `patience` seconds; with `wait` it waits.
    """
    with environment(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "rb")
    with lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(f"another tpad is writing here ({root}); wait until it ends, or use another --run", ARTIFACT) from None
                time.sleep(0.2)
            except OSError as error:  # a file system without locks
                raise environment_error(error, root) or error from None
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # not left to close(): a forked worker may hold the file open


def clear_leftovers(root: Path, *exceptions: Path) -> None:
    """Removes unfinished files of killed writers, except the folders `exceptions`."""
    for pattern in (f"{STAGING}*", ".*.tmp"):
        for leftover in root.glob(pattern):
            if leftover not in exceptions:
                remove(leftover)
    _prune(root, _numbers(root))
    fsync_path(root)  # old files must be gone for good before new ones take their names


def _walk(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the names of all files and of all folders below `folder`, sorted. Raises `UserError` (4) for a link or a device."""
    names: list[str] = []
    folders: list[str] = []
    for parent, subfolders, filenames in os.walk(folder, onerror=_raise):
        for name in subfolders + filenames:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise UserError(f"neither a file nor a folder ({path}); remove it", ARTIFACT)
            (folders if path.is_dir() else names).append(path.relative_to(folder).as_posix())
    return sorted(names), sorted(folders)


def _raise(error: OSError) -> None:
    raise error


def _numbers(root: Path) -> list[int]:
    """Returns the numbers of the version folders, newest first."""
    return sorted((int(p.name[1:]) for p in root.iterdir() if VERSION_NAME.fullmatch(p.name)), reverse=True)


def _current_number(root: Path) -> int | None:
    try:
        return int(_pointer(read_small(root / CURRENT))[0][1:])
    except (OSError, ValueError):
        return None


def finish_publication(root: Path) -> None:
    """Makes a version current whose writer was killed between its rename and the update of `current`. The caller holds the lock."""
    complete = False
    with suppress(OSError, ValueError):  # no NEXT: nothing to finish; no manifest: killed before the rename
        name, digest = _pointer(read_small(root / NEXT))
        complete = hashlib.sha256(read_small(root / name / MANIFEST)).hexdigest() == digest
    if complete:
        os.replace(root / NEXT, root / CURRENT)
    else:
        remove(root / NEXT)


def settle(root: Path, keep: int = 2) -> None:
    """Finishes what a killed writer had still to do after its last file: makes its version current, prunes, removes leftovers.

    Does nothing where another writer is at work, or where this process may not write. Unfinished parts of an export stay.
    """
    if not root.is_dir():
        return
    with suppress(UserError, OSError), locked(root):
        finish_publication(root)
        remove_leftovers(root, ".", ".tmp")
        current, numbers = _current_number(root), _numbers(root)
        if current is not None:  # versions above it are those that the user has gone back from
            numbers = [*[n for n in numbers if n > current], *[n for n in numbers if n <= current][:keep]]
        _prune(root, numbers)


def _prune(root: Path, numbers: list[int]) -> None:
    """Removes all versions but `numbers`. Each is renamed first, so that no reader sees an incomplete one."""
    for number in set(_numbers(root)) - set(numbers):
        os.rename(root / f"v{number:04d}", root / f".pruned-{number}")
    for pruned in root.glob(".pruned-*"):
        shutil.rmtree(pruned, ignore_errors=True)  # the new version is published; the next writer tries again


# ---------------------------------------------------------------- reading


def open_verified(root: Path, kind: str, hint: str) -> Version:
    """Opens the current version of an artifact, after comparing every byte of it with what was published.

    `hint` says what creates the artifact, e.g. "run `tpad train-sbr` first". Raises `UserError` (4).
    """
    return following(root, kind, hint, lambda version: version)


def published(root: Path, kind: str, keep: int = 2) -> Version | None:
    """Returns the current version, or None if there is no usable one. A step asks this before it repeats its work."""
    settle(root, keep)
    try:
        return open_verified(root, kind, "")
    except UserError:
        return None


def following(root: Path, kind: str, hint: str, read: Callable[[Version], T]) -> T:
    """Returns `read(version)` of the current version; reads again if a newer one was published meanwhile."""
    for _ in range(READ_ATTEMPTS):
        pointer = _read_pointer(root, kind, hint)
        try:
            version = _verify(root, pointer, kind, hint)
            with decoding(version.path, hint):
                return read(version)
        except (UserError, OSError) as error:
            failure = error
        if _read_pointer(root, kind, hint) == pointer:
            break
    if isinstance(failure, UserError):
        raise failure
    raise environment_error(failure, root) or damaged("cannot be read", Path(failure.filename or root), hint) from failure


@contextmanager
def decoding(path: Path, hint: str) -> Iterator[None]:
    """Turns what the content of an artifact makes its reader raise into `UserError` (4): sums may be right where content is wrong.

    `hint` as in `open_verified`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: content that tpad has not written may make its readers raise anything
        reason = next(iter(str(error).splitlines()), "")[:200]
        known = environment_error(error, path)
        raise known or damaged(f"cannot be used: {type(error).__name__}{f': {reason}' if reason else ''}", path, hint) from error


def _read_pointer(root: Path, kind: str, hint: str) -> bytes:
    try:
        return read_small(root / CURRENT)
    except FileNotFoundError:
        raise UserError(f"{NAMES.get(kind, kind)} not found ({root}); {hint}", ARTIFACT) from None
    except OSError as error:
        raise environment_error(error, root) or damaged("cannot be read", root / CURRENT, hint) from None


def _pointer(data: bytes) -> tuple[str, str]:
    """Parses a `current` file to (version, manifest_sha256). Raises ValueError unless it is byte for byte what `publish` writes."""
    entry = parse_json(data)
    if not isinstance(entry, dict) or entry.keys() != {"version", "manifest_sha256"} or canonical_json(entry) != data:
        raise ValueError("not as written")
    name, digest = entry["version"], entry["manifest_sha256"]
    if not isinstance(name, str) or not VERSION_NAME.fullmatch(name) or not isinstance(digest, str):
        raise ValueError("not as written")
    return name, digest


def _verify(root: Path, pointer: bytes, kind: str, hint: str) -> Version:
    try:
        name, digest = _pointer(pointer)
    except ValueError:
        raise damaged("damaged pointer", root / CURRENT, hint) from None
    folder = root / name
    if folder.is_symlink() or not folder.is_dir():
        raise damaged("published version is missing", folder, hint)
    try:
        data = read_small(folder / MANIFEST)
    except FileNotFoundError:
        raise damaged("file is missing", folder / MANIFEST, hint) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise damaged("file differs from what was published", folder / MANIFEST, hint)
    manifest = _manifest(data, folder / MANIFEST, kind, hint)
    _verify_files(folder, manifest["files"], hint)
    return Version(folder, manifest, name, digest)


def _manifest(data: bytes, path: Path, kind: str, hint: str) -> dict[str, Any]:
    try:
        manifest = parse_json(data)
        version, found_kind, files = manifest["format_version"], manifest["kind"], manifest["files"]
        well_formed = all(set(f) == {"name", "bytes", "sha256"} and _is_inside(f["name"]) for f in files)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged("damaged manifest", path, hint) from None
    if version != FORMAT_VERSION:
        raise UserError(f"format {version}, but this tpad reads format {FORMAT_VERSION} ({path}); {_again(hint)}", ARTIFACT)
    if found_kind != kind:
        raise UserError(f"holds {found_kind!r}, not {kind!r} ({path}); {_again(hint)}", ARTIFACT)
    if not well_formed:
        raise damaged("manifest names a file outside its folder", path, hint)
    return dict(manifest)


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and not name.startswith("/") and ".." not in parts and "\0" not in name


def _verify_files(folder: Path, files: list[dict[str, Any]], hint: str) -> None:
    present, _ = _walk(folder)
    listed = [f["name"] for f in files]
    for name in sorted(set(listed) - set(present)):
        raise damaged("file is missing", folder / name, hint)
    for name in sorted(set(present) - set(listed) - {MANIFEST}):
        raise UserError(f"unknown file in a published version ({folder / name}); remove it", ARTIFACT)
    for file in files:
        path = folder / file["name"]
        if path.stat().st_size != file["bytes"] or sha256_file(path) != file["sha256"]:
            raise damaged("file differs from what was published", path, hint)


def damaged(fault: str, path: Path, hint: str) -> UserError:
    """Returns the error (4) for a damaged artifact; `hint` as in `open_verified`."""
    return UserError(f"{fault} ({path}); restore it, or {_again(hint)}", ARTIFACT)


def _again(hint: str) -> str:
    return f"{hint.removesuffix(' first')} again"
