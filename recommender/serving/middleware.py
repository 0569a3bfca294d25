"""What every HTTP request passes: request id, key, limits of body, patience and concurrency, a line of log, metrics.

Plain ASGI around the whole application, so that nothing of a refused request is read or parsed further than needed.
Limits: the server below waits for ever for a request line, so 500 idle sockets cost 500 sockets; TLS, and limits per
client, are a reverse proxy's.
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
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import BaseModel
from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("tpad.serve")

MAX_BODY = 1_000_000  # bytes
MAX_DRAINED = 32_000_000  # of a body that is too large: read and thrown away, so that its sender gets to see the answer
MAX_AT_ONCE = 256  # requests being answered
PATIENCE = 10.0  # seconds for the next piece of a body
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
OPEN_TO_ALL = {"/", "/livez", "/readyz"}  # the page has no data in it; what it asks for needs the key
NEVER_BUSY = {"/livez", "/readyz", "/metrics"}
FAULT = "a fault of ours; the log has it under this id"
SHARED_METRICS = "PROMETHEUS_MULTIPROC_DIR"  # names the folder where several processes keep their figures
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.04, 0.1, 0.25, 0.5, 1.0, 2.5)


class Problem(BaseModel):
    """What went wrong, and the id under which the log has it."""

    error: str
    request_id: str


class Metrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second time series for each, which nobody reads
        self.registry = CollectorRegistry()
        to = self.registry
        self.requests = Counter("tpad_requests", "Requests answered", ["method", "route", "status"], registry=to)
        self.seconds = Histogram("tpad_request_seconds", "Until the last byte was written", ["route"], buckets=SECONDS, registry=to)
        self.at_once = Gauge("tpad_requests_in_flight", "Requests being answered", registry=to, multiprocess_mode="livesum")
        self.sessions = Counter("tpad_sessions", "Sessions recommended for", registry=to)
        self.popular = Counter("tpad_sessions_popular", "Sessions of which nothing was known: they got the popular items", registry=to)
        self.unknown = Counter("tpad_unknown_items", "item_ids of sessions that the catalogue does not have", registry=to)
        self.version = Gauge(
            "tpad_version", "1 for the version that answers, 0 for one that did", ["version"], registry=to, multiprocess_mode="livemax"
        )
        self.loaded = Gauge("tpad_version_loaded_timestamp_seconds", "When it was taken up", registry=to, multiprocess_mode="livemin")
        self.reloads = Counter("tpad_reloads", "New versions taken up, or refused", ["result"], registry=to)
        self.answering: str | None = None

    def answers(self, version: str) -> None:
        if SHARED_METRICS not in os.environ:
            self.version.clear()
        elif self.answering is not None:  # what processes share cannot be taken back
            self.version.labels(self.answering).set(0)
        self.version.labels(version).set(1)
        self.answering = version

    def exposition(self) -> bytes:
        """As Prometheus reads it: of all processes at this port."""
        if SHARED_METRICS not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)


class Answered(NamedTuple):
    status: int
    error: BaseException | None


class Gate:
    def __init__(self, app: App, metrics: Metrics, key: str | None) -> None:
        self.app, self.metrics = app, metrics
        self.key = None if key is None else f"Bearer {key}".encode()
        self.at_once = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers: dict[bytes, bytes] = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        scope["request_id"] = request_id = request_id if REQUEST_ID.fullmatch(request_id) else uuid.uuid4().hex
        self.at_once += 1
        self.metrics.at_once.inc()
        try:
            status, error = await self.answer(scope, headers, receive, send)
        finally:
            self.at_once -= 1
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

    async def answer(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> Answered:
        """The status that was sent, and the exception of ours that made it 500."""
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", scope["request_id"].encode())]
                message["headers"] += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                if not body.complete:  # what is left of it must not be taken for the next request
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        body = Body(receive, headers)
        refusal, failure = HTTPException(500, FAULT), None
        try:
            self.let_in(scope["path"], headers)
            await body.begin()
            await self.app(scope, body.receive, send_marked)
        except HTTPException as found:
            refusal = found
        except Exception as found:
            failure = found
        if status == 0:
            problem = Problem(error=refusal.detail, request_id=scope["request_id"]).model_dump_json().encode()
            described = {"content-type": "application/json", "content-length": str(len(problem)), **(refusal.headers or {})}
            start = [(name.encode(), value.encode()) for name, value in described.items()]
            await send_marked({"type": "http.response.start", "status": refusal.status_code, "headers": start})
            await send_marked({"type": "http.response.body", "body": problem})
        return Answered(status, failure)

    def let_in(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.key is not None and path not in OPEN_TO_ALL:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self.key):
                raise HTTPException(401, "a key is needed: the header Authorization: Bearer KEY", {"www-authenticate": "Bearer"})
        if self.at_once > MAX_AT_ONCE and path not in NEVER_BUSY:
            raise HTTPException(429, f"{MAX_AT_ONCE} requests are being answered; try again", {"retry-after": "1"})


class Body:
    """The body of a request, piece by piece: not more of it, and not slower, than is allowed."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes]) -> None:
        self.source = receive
        self.announced = int(headers.get(b"content-length", 0))  # the server has seen to it that it is a number
        self.size, self.complete = 0, self.announced == 0 and b"transfer-encoding" not in headers

    async def begin(self) -> None:
        """Refuses what says itself that it is too large, before any of it is kept."""
        if self.announced > MAX_BODY:
            await self.drain()

    async def receive(self) -> Message:
        message = await self.next() if not self.complete else await self.source()
        if self.size > MAX_BODY:
            await self.drain()
        return message

    async def next(self) -> Message:
        try:
            message = await asyncio.wait_for(self.source(), PATIENCE)
        except TimeoutError:
            raise HTTPException(408, f"nothing came for {PATIENCE:.0f} seconds") from None
        self.size += len(message.get("body", b""))
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        while not self.complete and self.size < MAX_DRAINED and self.announced <= MAX_DRAINED:
            await self.next()
        raise HTTPException(413, f"a body of more than {MAX_BODY} bytes is not read")


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "facts", {})
        if record.exc_info and record.exc_info[1]:
            line["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(line)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def log_to_stderr() -> None:
    """Our lines, and the server's, in one form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("tpad.serve", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "tpad.serve" else logging.WARNING)
