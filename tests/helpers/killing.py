"""Kills a command at one of its calls of the file system: they are counted by an audit hook, which sees every call from Python."""

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from helpers.processes import FORK, contents, tpad

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def changes(event: str, arguments: Sequence[object]) -> bool:
    """Whether an audit event is a call that changes files."""
    if event == "open":
        _, mode, flags = arguments
        return bool(set(str(mode or "")) & set("wax+")) or bool(isinstance(flags, int) and flags & WRITING)
    return event in CHANGES


def _watched(words: list[str], folder: str, fatal: int, counted: str) -> None:
    """Runs a command that dies just before its `fatal`-th change below `folder`; writes how many there were to the file `counted`."""
    seen, own = 0, os.getpid()

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        path = arguments[0] if arguments else None
        if changes(event, arguments) and isinstance(path, str | os.PathLike) and str(path).startswith(folder) and os.getpid() == own:
            seen += 1
            if seen == fatal:
                os.kill(own, signal.SIGKILL)

    import cli
    from helpers.processes import ENVIRONMENT

    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    sys.argv = ["tpad", *words]
    sys.addaudithook(watch)
    try:
        cli.main()
    finally:
        Path(counted).write_text(str(seen))


def run_watched(words: Sequence[object], folder: Path, fatal: int = 0) -> tuple[int | None, int]:
    """Returns the exit code of `tpad WORDS`, killed before its `fatal`-th change below `folder` (0: never), and the number of changes."""
    with tempfile.NamedTemporaryFile() as counted:
        process = FORK.Process(target=_watched, args=([*map(str, words)], str(folder), fatal, counted.name))
        process.start()
        process.join(600)
        process.kill()
        process.join()
        return process.exitcode, int(Path(counted.name).read_text() or 0)


def killed_and_repeated(
    base: Path,
    work: Path,
    words: Callable[[Path], Sequence[object]],
    choose: Callable[[int], Sequence[int]],
    same: Callable[[str], bool],
    inspect: Callable[[Path], object] = str,
) -> int:
    """Runs a command in copies of `base`, kills it at the changes that `choose(number of changes)` names, and repeats it.

    Checks that the folder is then as after an undisturbed run: the same files, and the same bytes in those whose name is `same`.
    `inspect` is called with each folder as the kill left it. Returns how often it was killed.
    """
    plain = shutil.copytree(base, work / "plain")
    code, count = run_watched(words(plain), plain)
    assert code == 0 and count > 0
    wanted, killed = contents(plain), 0
    for fatal in choose(count):
        copy = shutil.copytree(base, work / "copy")
        code, _ = run_watched(words(copy), copy, fatal)
        assert code == -signal.SIGKILL, (fatal, code)
        inspect(copy)
        done = tpad(*words(copy))
        assert done.returncode == 0, (fatal, done.stderr)
        found = contents(copy)
        assert found.keys() == wanted.keys(), (fatal, found.keys() ^ wanted.keys())
        changed = [name for name in wanted if same(name) and found[name] != wanted[name]]
        assert not changed, (fatal, changed)
        shutil.rmtree(copy)
        killed += 1
    return killed
