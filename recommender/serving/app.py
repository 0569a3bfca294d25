"""Defines the HTTP routes of `tpad serve`: recommendations, items, the service's state, and a page to try them at `/`.

Every response names the version it is from. `schemas.py` and `middleware.py` define the limits of a request; each has its status code
in the OpenAPI document (/openapi.json). `live_version.py` holds the version that answers and reloads new ones. No MLLM is loaded.
Limits: an item_id that ends in /similar or /image cannot be requested by path.
"""

import asyncio
import base64
import hashlib
import re
import signal
import time
from collections.abc import AsyncIterator, Collection
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
from recommender.serving.live_version import LoadedVersion, Service
from recommender.serving.middleware import INTERNAL_ERROR, MAX_AT_ONCE, MAX_BODY, Problem, ServiceMiddleware
from recommender.serving.recommender import Recommendation
from recommender.serving.schemas import (
    MAX_BATCH,
    MAX_K,
    MAX_PAGE,
    MAX_SESSION,
    Alive,
    Answer,
    Answers,
    Info,
    ItemFacts,
    ItemName,
    Page,
    RankedItem,
    Ranking,
    RankingOptions,
    Ready,
    RecommendBatchRequest,
    RecommendRequest,
    Similar,
    SimilarItem,
)
from recommender.serving.workers import ENDS

MAX_FIELD_NAME = 80  # characters of a field's name that an error message repeats
PAGE = Path(__file__).with_name("page.html")
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        400: "the body is not valid JSON",
        401: "the key is missing or wrong",
        404: "no such item, attribute or path",
        405: "the path does not allow this method",
        408: "the body arrived too slowly",
        421: "the request is to a host that the service does not answer for",
        413: f"the body has more than {MAX_BODY} bytes",
        422: "a value is missing, of the wrong type, or beyond its limit; or no item is left to recommend",
        429: f"{MAX_AT_ONCE} requests are being answered; try again after `Retry-After` seconds",
        500: INTERNAL_ERROR,
    }.items()
}


def problem(request: Request, status: int, error: str, headers: Any = None) -> JSONResponse:
    """Returns the response to a request that failed."""
    return JSONResponse(Problem(error=error, request_id=request.scope["request_id"]).model_dump(), status, headers)


def describe(error: RequestValidationError) -> str:
    """Returns field and message of the first validation errors, without the values: these may be long, or not printable."""
    errors = [f"{'.'.join(str(part)[:MAX_FIELD_NAME] for part in entry['loc'])}: {entry['msg']}" for entry in error.errors()]
    return "; ".join(errors[:3]) + (f"; and {len(errors) - 3} more" if len(errors) > 3 else "")


def create_app(service: Service, key: str | None, hosts: Collection[str] = ()) -> ServiceMiddleware:
    """Builds the ASGI application over a service; with a `key`, only requests that bring it are answered; `hosts`: as in
    `ServiceMiddleware`."""

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
        docs_url=None,  # its page would load scripts from other servers
        redoc_url=None,
        redirect_slashes=False,  # the answer would name the host that the request claims
        responses=PROBLEMS,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if key else [],  # for the document alone: `ServiceMiddleware` checks the key
    )

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        no_json = any(entry["type"] == "json_invalid" for entry in error.errors())
        return problem(request, 400 if no_json else 422, describe(error))

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return problem(request, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> JSONResponse:
        return problem(request, 422, str(error))

    @app.exception_handler(Exception)
    async def failed(request: Request, _: Exception) -> JSONResponse:
        return problem(request, 500, INTERNAL_ERROR)

    def stamp(loaded: LoadedVersion, began: float) -> dict[str, Any]:
        return {"version": loaded.version, "took_ms": round((time.perf_counter() - began) * 1000, 3)}

    def row_of(loaded: LoadedVersion, item_id: str) -> int:
        if (row := loaded.recommender.row.get(item_id)) is None:
            raise HTTPException(404, f"no such item: {item_id}")
        return row

    def name(loaded: LoadedVersion, row: int) -> dict[str, Any]:
        return {"item_id": loaded.recommender.item_ids[row], "title": loaded.recommender.titles[row]}

    def ranking_options(loaded: LoadedVersion, request: RankingOptions) -> tuple[int, bool, dict[str, list[str]], float, float | None]:
        """Returns the options as arguments of the recommender; checked here, as its error messages name command-line options."""
        if unknown := [column for column in request.filters if column not in loaded.recommender.attributes.column_names]:
            raise HTTPException(404, f"no such attribute: {unknown[0]}")
        if request.diversify and "knowledge" not in loaded.recommender.halves:
            raise HTTPException(422, "diversify: the model has no knowledge vectors")
        return request.k, request.exclude_seen, request.filters, request.diversify, request.new_items

    def ranking(answer: Recommendation) -> Ranking:
        service.metrics.sessions.inc()
        service.metrics.popular.inc(answer.fallback is not None)
        service.metrics.unknown.inc(len(answer.unknown))
        return Ranking(items=[RankedItem(**item._asdict()) for item in answer.items], unknown=answer.unknown, fallback=answer.fallback)

    @app.post("/recommend")
    async def recommend(request: Annotated[RecommendRequest, Body()]) -> Answer:
        """Ranks the k best next items of a session. Unknown item_ids are returned in `unknown`, and ignored."""
        loaded, began = service.current, time.perf_counter()
        options = ranking_options(loaded, request)
        answer = await service.compute(lambda: loaded.recommender.recommend(request.session, *options))
        return Answer(**dict(ranking(answer)), **stamp(loaded, began))

    @app.post("/recommend/batch")
    async def recommend_batch(request: Annotated[RecommendBatchRequest, Body()]) -> Answers:
        """Ranks the next items of several sessions, all by one version."""
        loaded, began = service.current, time.perf_counter()
        options = ranking_options(loaded, request)
        answers = await service.compute(lambda: loaded.recommender.recommend_batch(request.sessions, *options))
        return Answers(answers=[ranking(answer) for answer in answers], **stamp(loaded, began))

    @app.get("/items")
    async def items(
        q: Annotated[str, Query(max_length=200, description="words that title or item_id must contain")] = "",
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    ) -> Page:
        """Lists the catalogue, the most popular items first."""
        loaded, began = service.current, time.perf_counter()
        rows = await service.compute(lambda: loaded.search(q))
        names = [ItemName(**name(loaded, row)) for row in rows[offset : offset + limit].tolist()]
        return Page(items=names, total=len(rows), **stamp(loaded, began))

    @app.get("/items/{item_id:path}/similar")
    async def similar(item_id: str, half: Literal["knowledge", "transition"], k: Annotated[int, Query(ge=1, le=MAX_K)] = 10) -> Similar:
        """Lists the nearest items by their knowledge vectors (similar content) or transition vectors (similar next items)."""
        loaded, began = service.current, time.perf_counter()
        row = row_of(loaded, item_id)
        if half not in loaded.recommender.halves:
            raise HTTPException(404, f"the embeddings have no {half} half")
        nearest = await service.compute(lambda: loaded.similar(row, half, k))
        items = [SimilarItem(rank=n, **name(loaded, other), score=score) for n, (other, score) in enumerate(nearest, 1)]
        return Similar(item_id=item_id, half=half, items=items, **stamp(loaded, began))

    @app.get("/items/{item_id:path}/image", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
    async def image(item_id: str) -> Response:
        """Returns a thumbnail of the item's image (JPEG)."""
        row_of(service.current, item_id)
        if (jpeg := await service.thumbnails.thumbnail(item_id)) is None:
            raise HTTPException(404, f"no image: {item_id}")
        return Response(jpeg, media_type="image/jpeg", headers={"cache-control": "private, max-age=300"})

    @app.get("/items/{item_id:path}")
    async def item(item_id: str) -> ItemFacts:
        """Returns title and attributes of an item."""
        loaded, began = service.current, time.perf_counter()
        title = name(loaded, row_of(loaded, item_id))
        return ItemFacts(**title, attributes=await service.thumbnails.attributes(item_id), **stamp(loaded, began))

    @app.get("/info")
    async def info() -> Info:
        """Describes the version that answers, and the limits of a request."""
        loaded, began = service.current, time.perf_counter()
        version, model = loaded.recommender.version, loaded.recommender.config
        return Info(
            manifest_sha256=version.manifest_sha256,
            embeddings_version=version.manifest["embeddings_version"],
            items=len(loaded.recommender.item_ids),
            model=asdict(model),
            figures_of=version.manifest["figures_of"],
            loaded_at=loaded.loaded_at,
            refused=service.refused,
            limits={"session": MAX_SESSION, "batch": MAX_BATCH, "k": MAX_K, "page": MAX_PAGE, "body": MAX_BODY, "at_once": MAX_AT_ONCE},
            **stamp(loaded, began),
        )

    @app.get("/livez")
    async def livez() -> Alive:
        """Answers while the process runs."""
        return Alive()

    @app.get("/readyz")
    async def readyz() -> Ready:
        """Answers once a version is loaded, and names it."""
        return Ready(version=service.current.version)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Returns the metrics in the text format of Prometheus."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    html = PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(html)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"content-security-policy": policy, "cache-control": "no-cache"})

    return ServiceMiddleware(app, service.metrics, key, hosts)


def content_security_policy(html: str) -> str:
    """Returns the policy of the page: its own script and style (by hash), images, and requests to this service; nothing else."""
    allowed = {}
    for tag in ("script", "style"):
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        allowed[tag] = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
    return (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
