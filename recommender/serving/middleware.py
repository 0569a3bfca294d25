"""Wraps the application in ASGI middleware: request id, API key, limits of body size, body time and concurrency, access log, metrics.

Plain ASGI around the whole application, so that no more of a refused request is read or parsed than needed.
Limits: the server below waits without end for a request line, so 500 idle sockets cost 500 sockets; TLS and limits per client are the
job of a reverse proxy.
"""

import asyncio
import hmac
import json
import logging
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("tpad.serve")

MAX_BODY = 1_000_000  # bytes
MAX_DRAINED = 32_000_000  # bytes of a body that is too large: read and thrown away, so that its sender receives the response
MAX_AT_ONCE = 256  # requests being answered, and as many whose bodies are arriving
BODY_TIMEOUT = 10.0  # seconds for the next piece of a body ...
BODY_SECONDS = 30.0  # ... and for all of it
FIRM_SECONDS = 5.0  # an older body that is still arriving gives its place to a new request where none is free
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
PUBLIC_PATHS = {"/", "/livez", "/readyz"}  # answered without the key: the page holds no data, and its requests bring the key
UNLIMITED_PATHS = {"/livez", "/readyz", "/metrics"}  # answered also when `MAX_AT_ONCE` requests are
INTERNAL_ERROR = "internal error; see the server log for this request id"
SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # environment variable: the folder where several processes keep their metrics
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.04, 0.1, 0.25, 0.5, 1.0, 2.5)


class Problem(BaseModel):
    """An error message, and the request id under which the server log has the request."""

    error: str
    request_id: str


class ServiceMetrics:
    """Holds the Prometheus metrics that /metrics returns."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second time series of every metric that nobody reads
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("tpad_requests", "Requests answered", ["method", "route", "status"], registry=registry)
        self.seconds = Histogram(
            "tpad_request_seconds",
            "Seconds from the request to the last byte of the response",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.at_once = Gauge("tpad_requests_in_flight", "Requests being answered", registry=registry, multiprocess_mode="livesum")
        self.sessions = Counter("tpad_sessions", "Sessions recommended for", registry=registry)
        self.popular = Counter("tpad_sessions_popular", "Sessions without a known item: they got the popular items", registry=registry)
        self.unknown = Counter("tpad_unknown_items", "item_ids of sessions that the catalogue does not have", registry=registry)
        self.version = Gauge(
            "tpad_version", "1: the active version, 0: an earlier one", ["version"], registry=registry, multiprocess_mode="livemax"
        )
        self.loaded = Gauge(
            "tpad_version_loaded_timestamp_seconds", "When the version was loaded", registry=registry, multiprocess_mode="livemin"
        )
        self.reloads = Counter("tpad_reloads", "New versions activated or refused", ["result"], registry=registry)
        self.active_version: str | None = None

    def set_version(self, version: str) -> None:
        """Makes `version` the one whose gauge is 1."""
        if SHARED_METRICS not in os.environ:
            self.version.clear()
        elif self.active_version is not None:  # a label that processes share cannot be removed
            self.version.labels(self.active_version).set(0)
        self.version.labels(version).set(1)
        self.active_version = version

    def exposition(self) -> bytes:
        """Returns the metrics of all processes at this port in the text format of Prometheus."""
        if SHARED_METRICS not in os.environ:
            return generate_latest(self.registry)
        all_processes = CollectorRegistry()
        MultiProcessCollector(all_processes)  # type: ignore[no-untyped-call]
        return generate_latest(all_processes)


class Outcome(NamedTuple):
    """The status that was sent, and the exception behind a 500."""

    status: int
    error: BaseException | None


class ServiceMiddleware:
    """Passes requests on to an ASGI application, refuses those beyond a limit, logs and counts all of them."""

    def __init__(self, app: App, metrics: ServiceMetrics, key: str | None, hosts: Collection[str] = ()) -> None:
        """`hosts`: the only names under which the service answers, without ports; empty: any."""
        self.app, self.metrics = app, metrics
        self.key = None if key is None else f"Bearer {key}".encode()
        self.hosts = hosts
        self.answering: dict[Body, None] = {}  # requests that are being answered, their bodies complete
        self.arriving: dict[Body, None] = {}  # requests whose bodies are not complete, the oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        scope["request_id"] = request_id = request_id if REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        self.metrics.at_once.inc()
        try:
            status, error = await self.answer(scope, headers, receive, send)
        finally:
            self.metrics.at_once.dec()
        seconds = time.perf_counter() - began
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(scope["method"], route, status).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        facts = {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
        log.log(
            logging.ERROR if error else logging.INFO,
            "failed" if error else "answered",
            extra={"facts": facts | {"ms": round(seconds * 1000, 2)}},
            exc_info=error,
        )

    async def answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> Outcome:
        """Answers one request: passes it on, or sends the refusal, or a 500 for an exception of the application."""
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", scope["request_id"].encode())]
                message["headers"] += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                if not body.complete:  # the rest of the body must not be read as the next request
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        body = Body(receive, headers, self.arrived)
        refusal, failure = HTTPException(500, INTERNAL_ERROR), None
        try:
            self.authorize(scope["path"], headers)
            self.find_place(scope["path"], body)
            await body.begin()
            await self.app(scope, body.receive, send_marked)
        except HTTPException as error:
            refusal = error
        except Exception as error:
            failure = error
        finally:
            for places in (self.arriving, self.answering):
                places.pop(body, None)
        if status == 0:
            problem = Problem(error=refusal.detail, request_id=scope["request_id"]).model_dump()
            await JSONResponse(problem, refusal.status_code, refusal.headers)(scope, receive, send_marked)
        return Outcome(status, failure)

    def authorize(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuses a request of another host (421) or without the key (401), with an `HTTPException`."""
        if self.hosts and host_name(headers) not in self.hosts:
            raise HTTPException(421, "this service has another name (--allowed-host)")
        if self.key is not None and path not in PUBLIC_PATHS:
            authorization = headers.get(b"authorization", b"")
            if not hmac.compare_digest(authorization, self.key):
                raise HTTPException(401, "a key is needed: the header Authorization: Bearer KEY", {"www-authenticate": "Bearer"})

    def find_place(self, path: str, body: "Body") -> None:
        """Refuses a request beyond the concurrency limit (429). A body that dribbles does not hold its place for long."""
        places = self.answering if body.complete else self.arriving
        if len(places) >= MAX_AT_ONCE and path not in UNLIMITED_PATHS:
            oldest = next(iter(places))
            if body.complete or not oldest.is_older_than(FIRM_SECONDS):
                raise HTTPException(429, f"{MAX_AT_ONCE} requests are being answered; try again", {"retry-after": "1"})
            oldest.give_up()
            del places[oldest]
        places[body] = None

    def arrived(self, body: "Body") -> None:
        """Counts a request whose body is complete among those being answered."""
        if self.arriving.pop(body, body) is None:
            self.answering[body] = None


def host_name(headers: dict[bytes, bytes]) -> str:
    """Returns the host that a request names, in lower case and without its port."""
    return re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1").lower())


class Body:
    """Receives the body of a request piece by piece, within the limits of size and time."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], arrived: "Callable[[Body], None]") -> None:
        """`arrived` is called once the body is complete."""
        self.source, self.arrived, self.began = receive, arrived, time.monotonic()
        self.limit: asyncio.Timeout | None = None  # of the piece that is being waited for
        self.announced = int(headers.get(b"content-length", 0))  # the server has checked that it is a number
        self.size, self.complete = 0, self.announced == 0 and b"transfer-encoding" not in headers

    async def begin(self) -> None:
        """Refuses a body whose content-length is too large before any of it is kept."""
        if self.announced > MAX_BODY:
            await self.drain()

    async def receive(self) -> Message:
        """Returns the next message to the application; 413 beyond `MAX_BODY` bytes."""
        message = await self.next() if not self.complete else await self.source()
        if self.size > MAX_BODY:
            await self.drain()
        return message

    async def next(self) -> Message:
        """Returns the next piece of the body; 408 after `BODY_TIMEOUT` seconds without one, or `BODY_SECONDS` in all."""
        left = self.began + BODY_SECONDS - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(BODY_TIMEOUT, left))) as self.limit:
                message = await self.source()
        except TimeoutError:
            fault = f"no data received for {BODY_TIMEOUT:.0f} seconds" if left > BODY_TIMEOUT else "the body arrives too slowly"
            raise HTTPException(408, fault) from None
        finally:
            self.limit = None
        self.size += len(message.get("body", b""))
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self.complete:
            self.arrived(self)
        return message

    def is_older_than(self, seconds: float) -> bool:
        return time.monotonic() - self.began > seconds

    def give_up(self) -> None:
        """Ends the waiting for the next piece at once, with the 408."""
        self.began = -BODY_SECONDS
        if self.limit is not None:
            self.limit.reschedule(asyncio.get_running_loop().time())

    async def drain(self) -> None:
        """Reads and drops the rest of the body up to `MAX_DRAINED` bytes, then raises the 413."""
        while not self.complete and self.size < MAX_DRAINED and self.announced <= MAX_DRAINED:
            await self.next()
        raise HTTPException(413, f"the body has more than {MAX_BODY} bytes")


class JsonLines(logging.Formatter):
    """Formats a log record as one line of JSON."""

    converter = time.gmtime  # type: ignore[assignment]
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line).replace("\x7f", "\\u007f")  # the one control character that JSON leaves as it is


def log_to_stderr() -> None:
    """Sends the log lines of tpad and of the server to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("tpad.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "tpad.serve" else logging.WARNING)
