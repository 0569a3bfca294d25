"""Defines the request and response bodies of `tpad serve`, and their limits."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.data.parquet_checks import MAX_ID_BYTES
from recommender.serving.live_version import Refused
from recommender.serving.recommender import MAX_SHIFT

MAX_SESSION, MAX_BATCH, MAX_K, MAX_PAGE = 1000, 64, 500, 100
LIMITS = {"session": MAX_SESSION, "batch": MAX_BATCH, "k": MAX_K, "page": MAX_PAGE}  # that `/info` names
MAX_FILTERS, MAX_TEXT = 20, 1000  # columns; characters of a value
ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]  # without a limit, text that is not valid Unicode would pass
Session = Annotated[list[ItemId], Field(max_length=MAX_SESSION, description="item_ids, oldest first")]
Whole = BeforeValidator(
    lambda number: int(number) if isinstance(number, float) and number.is_integer() else number
)  # in JSON 5.0 is an integer
K = Annotated[int, Field(ge=1, le=MAX_K, description="how many items"), Whole]
Share = Annotated[float, Field(ge=0, le=1)]


class RankingOptions(BaseModel):
    """The options of a ranking, the same for one session and for several."""

    model_config = ConfigDict(strict=True, extra="forbid")
    k: K = 10
    exclude_seen: Annotated[bool, Field(description="leave out the items of the session")] = False
    filters: Annotated[
        dict[Text, Annotated[list[Text], Field(min_length=1)]],
        Field(max_length=MAX_FILTERS, description="attribute -> values; an item must have one of them, of every attribute"),
    ] = {}
    diversify: Annotated[Share, Field(description="0: relevance only, 1: diversity only (MMR)")] = 0.0
    new_items: Annotated[
        float | None,
        Field(ge=-MAX_SHIFT, le=MAX_SHIFT, description="log-odds added to cold items (without training events); null: sbr.new_items"),
    ] = None


class RecommendRequest(RankingOptions):
    session: Session


class RecommendBatchRequest(RankingOptions):
    sessions: Annotated[list[Session], Field(min_length=1, max_length=MAX_BATCH)]


class SimilarItem(BaseModel):
    rank: int
    item_id: str
    title: str
    score: float


class RankedItem(SimilarItem):
    similar_to: Annotated[str | None, Field(description="item of the session with the most similar knowledge vector")] = None
    after: Annotated[
        str | None,
        Field(description="item of the session that it most often followed in training; else the one that adds most to its score"),
    ] = None


class Ranking(BaseModel):
    items: list[RankedItem]
    unknown: Annotated[list[str], Field(description="item_ids of the session that are not in the catalogue")]
    fallback: Annotated[Literal["popular"] | None, Field(description="popular: no item of the session is in the catalogue")]


class FromVersion(BaseModel):
    version: Annotated[str, Field(description="version of the session model that answered")]
    took_ms: float


class Answer(Ranking, FromVersion):
    pass


class Answers(FromVersion):
    answers: list[Ranking]


class ItemName(BaseModel):
    item_id: str
    title: str


class Page(FromVersion):
    items: list[ItemName]
    total: Annotated[int, Field(description="items on all pages")]


class ItemFacts(FromVersion):
    item_id: str
    title: str
    attributes: Annotated[dict[str, str], Field(description="its text columns in the data folder")]


class Similar(FromVersion):
    item_id: str
    half: str
    items: list[SimilarItem]


class Info(FromVersion):
    manifest_sha256: str
    embeddings_version: Annotated[str | None, Field(description="null: the model reads no embeddings, only ids")]
    items: int
    model: dict[str, Any]
    figures_of: Annotated[str, Field(description="the model whose metrics `tpad train-sbr` printed")]
    loaded_at: float
    refused: Annotated[Refused | None, Field(description="why the newest version was not activated")]
    limits: dict[str, int]


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    version: str
