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
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as AnyHTTPException

from pipeline.core.errors import UserError
from recommender.serving import schemas
from recommender.serving.live_version import LoadedVersion, Service
from recommender.serving.middleware import INTERNAL_ERROR, MAX_AT_ONCE, MAX_BODY, Problem, ServiceMiddleware
from recommender.serving.recommender import Recommendation, Recommender
from recommender.serving.workers import ENDS

MAX_FIELD_NAME = 80  # characters of a field's name that an error message repeats
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


async def refused(request: Request, error: Exception) -> JSONResponse:
    """Answers a request that failed, without its values, which may be long, or not printable."""
    status, message, headers = 500, INTERNAL_ERROR, None
    if isinstance(error, RequestValidationError):
        errors = [f"{'.'.join(str(part)[:MAX_FIELD_NAME] for part in entry['loc'])}: {entry['msg']}" for entry in error.errors()]
        status = 400 if any(entry["type"] == "json_invalid" for entry in error.errors()) else 422
        message = "; ".join(errors[:3]) + (f"; and {len(errors) - 3} more" if len(errors) > 3 else "")
    elif isinstance(error, AnyHTTPException):
        status, message, headers = error.status_code, str(error.detail), error.headers
    elif isinstance(error, UserError):
        status, message = 422, str(error)
    return JSONResponse(Problem(error=message, request_id=request.scope["request_id"]).model_dump(), status, headers)


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


HTML = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
POLICY = content_security_policy(HTML)


class Now(NamedTuple):
    """The service at the moment of a request."""

    service: Service
    loaded: LoadedVersion
    began: float

    @property
    def recommender(self) -> Recommender:
        return self.loaded.recommender

    def stamp(self) -> dict[str, Any]:
        """Returns the fields of `FromVersion`."""
        return {"version": self.loaded.version, "took_ms": round((time.perf_counter() - self.began) * 1000, 3)}

    def row(self, item_id: str) -> int:
        if (row := self.recommender.row.get(item_id)) is None:
            raise HTTPException(404, f"no such item: {item_id}")
        return row

    def name(self, row: int) -> dict[str, Any]:
        return {"item_id": self.recommender.item_ids[row], "title": self.recommender.titles[row]}

    def checked(self, request: schemas.RankingOptions) -> dict[str, Any]:
        """Returns the options as arguments of the recommender; checked here, as its error messages name command-line options."""
        if unknown := [column for column in request.filters if column not in self.recommender.attributes.column_names]:
            raise HTTPException(404, f"no such attribute: {unknown[0]}")
        if request.diversify and "knowledge" not in self.recommender.halves:
            raise HTTPException(422, "diversify: the model has no knowledge vectors")
        return request.model_dump(include=set(schemas.RankingOptions.model_fields))

    def ranking(self, answer: Recommendation) -> schemas.Ranking:
        """Counts an answer, and returns it as a response has it."""
        self.service.metrics.sessions.inc()
        self.service.metrics.popular.inc(answer.fallback is not None)
        self.service.metrics.unknown.inc(len(answer.unknown))
        items = [schemas.RankedItem(**item._asdict()) for item in answer.items]
        return schemas.Ranking(items=items, unknown=answer.unknown, fallback=answer.fallback)


async def current(request: Request) -> Now:
    """Returns what a request is answered from: the version that is current when it comes."""
    service: Service = request.app.state.service
    return Now(service, service.current, time.perf_counter())


Current = Annotated[Now, Depends(current)]
routes = APIRouter()


@routes.post("/recommend")
async def recommend(request: Annotated[schemas.RecommendRequest, Body()], now: Current) -> schemas.Answer:
    """Ranks the k best next items of a session. Unknown item_ids are returned in `unknown`, and ignored."""
    options = now.checked(request)
    answer = await now.service.compute(lambda: now.recommender.recommend(request.session, **options))
    return schemas.Answer(**dict(now.ranking(answer)), **now.stamp())


@routes.post("/recommend/batch")
async def recommend_batch(request: Annotated[schemas.RecommendBatchRequest, Body()], now: Current) -> schemas.Answers:
    """Ranks the next items of several sessions, all by one version."""
    options = now.checked(request)
    answers = await now.service.compute(lambda: now.recommender.recommend_batch(request.sessions, **options))
    return schemas.Answers(answers=[now.ranking(answer) for answer in answers], **now.stamp())


@routes.get("/items")
async def items(
    now: Current,
    q: Annotated[str, Query(max_length=200, description="words that title or item_id must contain")] = "",
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=schemas.MAX_PAGE)] = 50,
) -> schemas.Page:
    """Lists the catalogue, the most popular items first."""
    rows = await now.service.compute(lambda: now.loaded.search(q))
    names = [schemas.ItemName(**now.name(row)) for row in rows[offset : offset + limit].tolist()]
    return schemas.Page(items=names, total=len(rows), **now.stamp())


@routes.get("/items/{item_id:path}/similar")
async def similar(
    now: Current, item_id: str, half: Literal["knowledge", "transition"], k: Annotated[int, Query(ge=1, le=schemas.MAX_K)] = 10
) -> schemas.Similar:
    """Lists the nearest items by their knowledge vectors (similar content) or transition vectors (similar next items)."""
    row = now.row(item_id)
    if half not in now.recommender.halves:
        raise HTTPException(404, f"the embeddings have no {half} half")
    nearest = await now.service.compute(lambda: now.loaded.similar(row, half, k))
    items = [schemas.SimilarItem(rank=n, **now.name(other), score=score) for n, (other, score) in enumerate(nearest, 1)]
    return schemas.Similar(item_id=item_id, half=half, items=items, **now.stamp())


@routes.get("/items/{item_id:path}/image", response_class=Response, responses={200: {"content": {"image/jpeg": {}}}})
async def image(now: Current, item_id: str) -> Response:
    """Returns a thumbnail of the item's image (JPEG)."""
    now.row(item_id)
    if (jpeg := await now.service.thumbnails.thumbnail(item_id)) is None:
        raise HTTPException(404, f"no image: {item_id}")
    return Response(jpeg, media_type="image/jpeg", headers={"cache-control": "private, max-age=300"})


@routes.get("/items/{item_id:path}")
async def item(now: Current, item_id: str) -> schemas.ItemFacts:
    """Returns title and attributes of an item."""
    title = now.name(now.row(item_id))
    return schemas.ItemFacts(**title, attributes=await now.service.thumbnails.attributes(item_id), **now.stamp())


@routes.get("/info")
async def info(now: Current) -> schemas.Info:
    """Describes the version that answers, and the limits of a request."""
    version = now.recommender.version
    return schemas.Info(
        manifest_sha256=version.manifest_sha256,
        embeddings_version=version.manifest["embeddings_version"],
        items=len(now.recommender.item_ids),
        model=asdict(now.recommender.config),
        figures_of=version.manifest["figures_of"],
        loaded_at=now.loaded.loaded_at,
        refused=now.service.refused,
        limits={
            "session": schemas.MAX_SESSION,
            "batch": schemas.MAX_BATCH,
            "k": schemas.MAX_K,
            "page": schemas.MAX_PAGE,
            "body": MAX_BODY,
            "at_once": MAX_AT_ONCE,
        },
        **now.stamp(),
    )


@routes.get("/livez")
async def livez() -> schemas.Alive:
    """Answers while the process runs."""
    return schemas.Alive()


@routes.get("/readyz")
async def readyz(now: Current) -> schemas.Ready:
    """Answers once a version is loaded, and names it."""
    return schemas.Ready(version=now.loaded.version)


@routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(now: Current) -> Response:
    """Returns the metrics in the text format of Prometheus."""
    return Response(now.service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@routes.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    return HTMLResponse(HTML, headers={"content-security-policy": POLICY, "cache-control": "no-cache"})


@asynccontextmanager
async def watching(app: FastAPI) -> AsyncIterator[None]:
    """Watches for new versions while the application runs."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    task = asyncio.create_task(app.state.service.watch())
    yield
    task.cancel()


def create_app(service: Service, key: str | None, hosts: Collection[str] = ()) -> ServiceMiddleware:
    """Builds the ASGI application over a service; with a `key`, only requests that bring it are answered; `hosts`: as in
    `ServiceMiddleware`."""
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
        exception_handlers=dict.fromkeys((RequestValidationError, AnyHTTPException, UserError, Exception), refused),
    )
    app.state.service = service
    app.include_router(routes)
    return ServiceMiddleware(app, service.metrics, key, hosts)
