"""Runs several server processes at one port: `tpad serve --workers`.

Python runs one thread of a process at a time, so one process uses little more than one core, whatever its number of scoring threads.
Each worker process holds its own copy of the model, and accepts connections from the shared socket.
"""

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from pipeline.core.errors import ENVIRONMENT, UserError
from pipeline.core.process import end_with

ENDS = {signal.SIGINT, signal.SIGTERM}

Say = Callable[[str], None]


def share(listener: socket.socket, workers: int, work: Callable[[Say], None], say: Say) -> None:
    """Runs `work(say)` in `workers` forked processes until a signal, or until one of them ends.

    The end of one ends all, so that a service manager notices and restarts the service. The line that each worker says when it is
    ready is said once, after the last one. Raises `UserError` (5) if a worker ends."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    processes = [context.Process(target=_work, args=(work, sender, os.getpid())) for _ in range(workers)]
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # an exception from a signal handler would be lost during a fork
        for process in processes:
            process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        listener.close()  # only the workers hold it, so no connection waits in it when they no longer listen
        starting = workers
        while True:
            wait([receiver, *(process.sentinel for process in processes)])
            if receiver.poll():
                message = receiver.recv()
                if isinstance(message, Exception):
                    raise message
                starting -= 1
                if not starting:
                    say(message)
            elif ended := [process for process in processes if process.exitcode is not None]:
                code = ended[0].exitcode
                guess = ", perhaps out of memory" if code == -signal.SIGKILL else ""
                raise UserError(f"a server process has ended{guess} (exit code {code}; --workers); restart the service", ENVIRONMENT)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()  # it first answers its open requests


def _work(work: Callable[[Say], None], sender: Connection, parent: int) -> None:
    end_with(parent)
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)  # an exception from a handler may be lost; then this process, and its parent, would not end
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    try:
        work(sender.send)
    except Exception as error:  # the parent process reports it, once
        error.add_note(traceback.format_exc())
        sender.send(error)
