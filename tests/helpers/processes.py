"""The command line as a user has it, in real processes; and the same work in a process of its own, or in two.

The shop is small enough to go through the whole chain in seconds.
"""

import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

import cli

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # to look at pages with
ROOT = Path(__file__).parents[2]
ITEMS = 40
SETTINGS = [
    *(f"shop.items={ITEMS}", "shop.sessions=200", "shop.image_size=24"),
    *("backbone.tiny.vocab=400", "backbone.tiny.image_size=24", "backbone.tiny.patch=6", "backbone.tiny.heads=2"),
    *("backbone.tiny.vision_dim=16", "backbone.tiny.vision_layers=1", "backbone.tiny.dim=32", "backbone.tiny.layers=1"),
    *(f"distill.{phase}.{setting}" for phase in ("knowledge", "transfer", "align") for setting in ("steps=3", f"batch={ITEMS}")),
    "distill.transfer.lr=1e-4",  # three steps at the rate of two hundred would only shift all features
    *("distill.dim=8", "distill.critic.warmup=1", "sbr.epochs=1", "sbr.dim=16"),
]
SET = [word for setting in SETTINGS for word in ("--set", setting)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("RANK", None)  # of a launcher around the tests


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "cli", *map(str, args)]


def tpad_from_nothing(*args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command with an interpreter of its own, imports and all, as a user starts it; seconds slower."""
    return subprocess.run(command(*args), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)


# Its children start with everything imported, and die like any process. What it does not find it leaves out without a word: modules
# of tests/ are such, since Python 3.11 does not give it this process's path
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["cli", "pipeline.distill.distill", "pipeline.export.export", "recommender.training.train", "recommender.serving.recommender"]
)


def tpad(*args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own that begins with everything imported."""
    return tpad_stopped(None, str.isspace, *args, cwd=cwd)


def tpad_stopped(
    by: signal.Signals | None, reached: Callable[[str], object], *args: object, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """The same; it gets the signal `by` as soon as `reached` holds of what it has said on stderr."""
    words = [*map(str, args)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        process = start(_run, words, cwd, out, err)
        deadline = time.monotonic() + 900
        while by and time.monotonic() < deadline and process.is_alive():
            if reached(err.read_text()):
                os.kill(int(process.pid or 0), by)
                break
            time.sleep(0.005)
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run(words: list[str], cwd: Path, *files: Path) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    sys.argv = ["tpad", *words]
    cli.main()


def contents(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file below a folder, by its relative name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(work: Callable[..., object], *args: object) -> BaseProcess:
    process = FORK.Process(target=work, args=args)
    process.start()
    return process


def member(rank: int, port: int, work: Callable[..., object], *args: object) -> None:
    """`work` as one of two processes that know of each other."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    work(*args)


def pair(work: Callable[..., object], *args: object) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(member, rank, port, work, *args) for rank in range(2)]


def two_processes(work: Callable[..., object], *args: object) -> None:
    for process in pair(work, *args):
        process.join(600)
        assert process.exitcode == 0


def kill_when(process: BaseProcess, reached: Callable[[], bool]) -> None:
    """Sends SIGKILL as soon as the condition holds."""
    deadline = time.monotonic() + 600
    while not reached() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def kill_a_ray_worker(process: "subprocess.Popen[str]", reached: Callable[[], bool]) -> bool:
    """Kills one of the processes in which Ray runs a `Worker`, once the condition holds. Returns whether there was one."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if reached():
            for child in psutil.Process(process.pid).children(recursive=True):
                if "ray::Worker" in " ".join(child.cmdline()):
                    child.send_signal(signal.SIGKILL)
                    return True
        time.sleep(0.02)
    return False
