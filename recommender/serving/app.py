"""`tpad serve`: recommendations over HTTP, and a page to try them at `/`. No MLLM; one process, or several alike.

Every answer names the version it is from. What a request may be is said in `schemas.py` and `middleware.py`, each limit with its status
code in the OpenAPI document (/openapi.json); `live_version.py` holds the version that answers, and takes up new ones.
Limits: an item_id that ends in /similar or /image cannot be asked for by path.
"""

import asyncio
import base64
import hashlib
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as AnyHTTPException

from pipeline.core.errors import UserError
from recommender.serving.live_version import Served, Service
from recommender.serving.middleware import FAULT, MAX_AT_ONCE, MAX_BODY, Gate, Problem
from recommender.serving.recommender import Recommendation
from recommender.serving.schemas import (
    MAX_BATCH,
    MAX_K,
    MAX_PAGE,
    MAX_SESSION,
    Alive,
    Answer,
    Answers,
    Ask,
    AskMany,
    Info,
    ItemFacts,
    ItemName,
    Near,
    Page,
    Ranked,
    Ranking,
    Ready,
    Similar,
    Wishes,
)
from recommender.serving.workers import ENDS

NAMED = 80  # letters of a key that a message repeats
PAGE = Path(__file__).with_name("page.html")
# --- the application


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": what}
    for status, what in {
        400: "not JSON that can be read",
        401: "the key is missing or wrong",
        404: "no such item, attribute or path",
        405: "not with this method",
        408: "the body came too slowly",
        413: f"more than {MAX_BODY} bytes",
        422: "a value is missing, of the wrong kind, or beyond its limit; or nothing is left to recommend",
        429: f"{MAX_AT_ONCE} requests are being answered; try again after `Retry-After` seconds",
        500: "a fault of ours",
    }.items()
}


def problem(request: Request, status: int, error: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(Problem(error=error, request_id=request.scope["request_id"]).model_dump(), status, headers)


def describe(error: RequestValidationError) -> str:
    """Where and what, without what was given: it may be long, or not printable."""
    faults = [f"{'.'.join(str(part)[:NAMED] for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
    return "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")


def create_app(service: Service, key: str | None) -> Gate:
    @asynccontextmanager
    async def watching(_: FastAPI) -> AsyncIterator[None]:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        task = asyncio.create_task(service.watch())
        yield
        task.cancel()

    app = FastAPI(
        title="tpad",
        summary="What next? Recommendations for anonymous sessions.",
        version="1",
        lifespan=watching,
        docs_url=None,  # its page would need scripts of other servers
        redoc_url=None,
        responses=PROBLEMS,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if key else [],  # for the document; `Gate` sees to it
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        unread = any(fault["type"] == "json_invalid" for fault in error.errors())
        return problem(request, 400 if unread else 422, describe(error))

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return problem(request, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(UserError)
    async def unfit(request: Request, error: UserError) -> JSONResponse:
        return problem(request, 422, str(error))

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> JSONResponse:
        return problem(request, 500, FAULT)

    def stamp(served: Served, began: float) -> dict[str, Any]:
        return {"version": served.version, "took_ms": round((time.perf_counter() - began) * 1000, 3)}

    def row_of(served: Served, item_id: str) -> int:
        if (row := served.recommender.row.get(item_id)) is None:
            raise HTTPException(404, f"no such item: {item_id}")
        return row

    def name(served: Served, row: int) -> dict[str, Any]:
        return {"item_id": served.recommender.item_ids[row], "title": served.recommender.titles[row]}

    def wishes(served: Served, ask: Wishes) -> tuple[int, bool, dict[str, list[str]], float, float | None]:
        """As the recommender takes them, which would refuse them in the words of the command line."""
        if unknown := [column for column in ask.filters if column not in served.recommender.attributes.column_names]:
            raise HTTPException(404, f"no such attribute: {unknown[0]}")
        if ask.diversify and "knowledge" not in served.recommender.halves:
            raise HTTPException(422, "diversify: the model reads no vectors of what items are")
        return ask.k, ask.exclude_seen, ask.filters, ask.diversify, ask.new_items

    def ranking(found: Recommendation) -> Ranking:
        service.metrics.sessions.inc()
        service.metrics.popular.inc(found.fallback is not None)
        service.metrics.unknown.inc(len(found.unknown))
        return Ranking(items=[Ranked(**item._asdict()) for item in found.items], unknown=found.unknown, fallback=found.fallback)

    @app.post("/recommend")
    async def recommend(ask: Annotated[Ask, Body()]) -> Answer:
        """The k items that go best with what was seen. Unknown items are named and left out."""
        served, began = service.now, time.perf_counter()
        wanted = wishes(served, ask)
        found = await service.compute(lambda: served.recommender.recommend(ask.session, *wanted))
        return Answer(**dict(ranking(found)), **stamp(served, began))

    @app.post("/recommend/batch")
    async def recommend_batch(ask: Annotated[AskMany, Body()]) -> Answers:
        """The same for several sessions, all from one version."""
        served, began = service.now, time.perf_counter()
        wanted = wishes(served, ask)
        found = await service.compute(lambda: served.recommender.recommend_batch(ask.sessions, *wanted))
        return Answers(answers=[ranking(one) for one in found], **stamp(served, began))

    @app.get("/items")
    async def items(
        q: Annotated[str, Query(max_length=200, description="words that the title or item_id must have")] = "",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    ) -> Page:
        """The catalogue, the most popular items first."""
        served, began = service.now, time.perf_counter()
        rows = await service.compute(lambda: served.search(q))
        names = [ItemName(**name(served, row)) for row in rows[offset : offset + limit].tolist()]
        return Page(items=names, total=len(rows), **stamp(served, began))

    @app.get("/items/{item_id:path}/similar")
    async def similar(item_id: str, half: Literal["knowledge", "transition"], k: Annotated[int, Query(ge=1, le=MAX_K)] = 10) -> Similar:
        """The nearest items by what they are (knowledge) or by what people move on to (transition)."""
        served, began = service.now, time.perf_counter()
        row = row_of(served, item_id)
        if half not in served.recommender.halves:
            raise HTTPException(404, f"the embeddings have no {half} half")
        found = await service.compute(lambda: served.similar(row, half, k))
        items = [Near(rank=n, **name(served, other), score=score) for n, (other, score) in enumerate(found, 1)]
        return Similar(item_id=item_id, half=half, items=items, **stamp(served, began))

    @app.get("/items/{item_id:path}/image", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def image(item_id: str) -> Response:
        """The item's picture, small, as JPEG."""
        row_of(service.now, item_id)
        if (found := await service.pictures.thumbnail(item_id)) is None:
            raise HTTPException(404, f"no picture: {item_id}")
        return Response(found, media_type="image/jpeg", headers={"cache-control": "private, max-age=300"})

    @app.get("/items/{item_id:path}")
    async def item(item_id: str) -> ItemFacts:
        served, began = service.now, time.perf_counter()
        known = name(served, row_of(served, item_id))
        return ItemFacts(**known, attributes=await service.pictures.attributes(item_id), **stamp(served, began))

    @app.get("/info")
    async def info() -> Info:
        """Which version answers, and within which limits."""
        served, began = service.now, time.perf_counter()
        version, model = served.recommender.version, served.recommender.config
        return Info(
            manifest_sha256=version.manifest_sha256,
            embeddings_version=version.manifest["embeddings_version"],
            items=len(served.recommender.item_ids),
            model=asdict(model),
            figures_of=version.manifest["figures_of"],
            loaded_at=served.loaded_at,
            refused=service.refused,
            limits={"session": MAX_SESSION, "batch": MAX_BATCH, "k": MAX_K, "page": MAX_PAGE, "body": MAX_BODY, "at_once": MAX_AT_ONCE},
            **stamp(served, began),
        )

    @app.get("/livez")
    async def livez() -> Alive:
        return Alive()

    @app.get("/readyz")
    async def readyz() -> Ready:
        return Ready(version=service.now.version)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    html = PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(html)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    return Gate(app, service.metrics, key)


def content_security_policy(html: str) -> str:
    """Allows the page's own script and style, by their hashes, pictures, and requests to where it came from; nothing else."""
    allowed = {}
    for tag in ("script", "style"):
        found = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        allowed[tag] = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
