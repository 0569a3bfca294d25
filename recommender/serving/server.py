"""Runs `tpad serve`: the socket, uvicorn, and signals."""

import os
import signal
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn
from threadpoolctl import threadpool_limits

from pipeline.core.errors import ENVIRONMENT, UserError
from recommender.serving.app import create_app
from recommender.serving.bounded_heads import BoundedHeads
from recommender.serving.live_version import Service
from recommender.serving.middleware import log_to_stderr
from recommender.serving.workers import ENDS, share

BACKLOG = 2048  # connections that wait to be accepted
DRAIN_SECONDS = 30  # for open requests after SIGTERM


def serve(
    run: Path,
    find_data: Callable[[], Path | None],
    host: str,
    port: int,
    key: str | None,
    workers: int,
    say: Callable[[str], None],
    hosts: Collection[str] = (),
) -> None:
    """Answers requests until a signal; then finishes the open ones and exits with 130 or 143.

    `find_data` returns the data folder of the current version. `workers`: processes. `hosts`: the only names to answer under."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    threadpool_limits(1, "blas")  # cores are shared by requests: one is too small to be split
    listener = bind(host, port)
    host, port = listener.getsockname()[:2]

    def answer(say: Callable[[str], None]) -> None:
        service = Service(run, find_data, max(1, (os.cpu_count() or 1) // workers))
        log_to_stderr()
        config = uvicorn.Config(
            create_app(service, key, hosts),
            http=BoundedHeads,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=DRAIN_SECONDS,
            backlog=BACKLOG,
        )
        try:
            listener.listen(BACKLOG)
        except OSError as error:  # another process bound the same address before either listened
            raise cannot_listen(error, host, port) from None
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)  # until the server handles them (`watching`): a signal before that may be lost
        say(f"serving {service.current.version}: http://{f'[{host}]' if ':' in host else host}:{port}")
        uvicorn.Server(config).run([listener])

    if workers == 1:
        answer(say)
    else:
        share(listener, workers, answer, say)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket to the address, which does not listen yet. Raises `UserError` (5)."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: the host name is not valid
        raise cannot_listen(error, host, port) from None
    return listener


def cannot_listen(error: OSError | UnicodeError, host: str, port: int) -> UserError:
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    return UserError(f"cannot listen: {reason} ({host} port {port}); give another --host or --port", ENVIRONMENT)
