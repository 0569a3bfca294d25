"""Several processes that answer at one port: `tpad serve --workers`.

Python runs one thread of a process at a time, so one process makes use of little more than one core, however many threads score.
Each of these holds a model of its own, and takes connections from the socket they share.
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
    """`work(say)` in so many processes, forks of this one, until a signal or until one of them ends, which ends all: whatever
    watches over the service sees it, and starts it anew. When all have said their line, it is said once."""
    context = multiprocessing.get_context("fork")
    heard, told = context.Pipe(duplex=False)
    started = [context.Process(target=_work, args=(work, told, os.getpid())) for _ in range(workers)]
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # what a signal raises would be lost in the middle of a fork
        for each in started:
            each.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        listener.close()  # theirs alone, so that nothing waits in it when they no longer listen
        silent = workers
        while True:
            wait([heard, *(each.sentinel for each in started)])
            if heard.poll():
                said = heard.recv()
                if isinstance(said, Exception):
                    raise said
                silent -= 1
                if not silent:
                    say(said)
            elif ended := [each for each in started if each.exitcode is not None]:
                code = ended[0].exitcode
                guess = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
                what = f"a process that answers has ended{guess} (exit code {code}; --workers)"
                raise UserError(f"{what}; start all of them again", ENVIRONMENT)
    finally:
        for each in started:
            if each.is_alive():
                each.terminate()
        for each in started:
            if each.pid is not None:
                each.join()  # after the requests in hand


def _work(work: Callable[[Say], None], told: Connection, parent: int) -> None:
    end_with(parent)
    for number in ENDS:
        signal.signal(number, signal.SIG_DFL)  # what a handler raises may be lost, and this process would stay, and the first one wait
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    try:
        work(told.send)
    except Exception as error:  # for the first process to say, once
        error.add_note(traceback.format_exc())
        told.send(error)
