"""What `tpad serve` is asked and answers, and the limits of both."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.data.parquet_checks import MAX_ID_BYTES
from recommender.serving.live_version import Refused
from recommender.serving.recommender import MAX_SHIFT

MAX_SESSION, MAX_BATCH, MAX_K, MAX_PAGE = 1000, 64, 500, 100
MAX_FILTERS, MAX_TEXT = 20, 1000  # columns, letters of a value
ItemId = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]  # a limit has it looked at: without one, what is no Unicode would pass
Session = Annotated[list[ItemId], Field(max_length=MAX_SESSION, description="item_ids, oldest first")]
Whole = BeforeValidator(lambda number: int(number) if isinstance(number, float) and number.is_integer() else number)  # 5.0 is, in JSON
K = Annotated[int, Field(ge=1, le=MAX_K, description="how many items"), Whole]
Share = Annotated[float, Field(ge=0, le=1)]


class Wishes(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    k: K = 10
    exclude_seen: Annotated[bool, Field(description="leave out the items of the session")] = False
    filters: Annotated[
        dict[Text, Annotated[list[Text], Field(min_length=1)]],
        Field(max_length=MAX_FILTERS, description="attribute -> values, of which an item has one"),
    ] = {}
    diversify: Annotated[Share, Field(description="0: relevance only, 1: diversity only (MMR)")] = 0.0
    new_items: Annotated[
        float | None,
        Field(ge=-MAX_SHIFT, le=MAX_SHIFT, description="log-odds added to items without training events; null: sbr.new_items"),
    ] = None


class Ask(Wishes):
    session: Session


class AskMany(Wishes):
    sessions: Annotated[list[Session], Field(min_length=1, max_length=MAX_BATCH)]


class Near(BaseModel):
    rank: int
    item_id: str
    title: str
    score: float


class Ranked(Near):
    similar_to: Annotated[str | None, Field(description="item of the session that it is most like (knowledge half)")] = None
    after: Annotated[
        str | None,
        Field(description="item of the session that it most often came after in training; else the one its score comes from most"),
    ] = None


class Ranking(BaseModel):
    items: list[Ranked]
    unknown: Annotated[list[str], Field(description="item_ids of the session that the catalogue does not have")]
    fallback: Annotated[Literal["popular"] | None, Field(description="nothing of the session was known")]


class FromVersion(BaseModel):
    version: Annotated[str, Field(description="of the session model that answered")]
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
    total: Annotated[int, Field(description="of all pages")]


class ItemFacts(FromVersion):
    item_id: str
    title: str
    attributes: Annotated[dict[str, str], Field(description="its columns in the data folder")]


class Similar(FromVersion):
    item_id: str
    half: str
    items: list[Near]


class Info(FromVersion):
    manifest_sha256: str
    embeddings_version: Annotated[str | None, Field(description="null: the model knows items by their ids alone")]
    items: int
    model: dict[str, Any]
    figures_of: Annotated[str, Field(description="whose figures `tpad train-sbr` printed")]
    loaded_at: float
    refused: Annotated[Refused | None, Field(description="why the newest version does not answer")]
    limits: dict[str, int]


class Alive(BaseModel):
    status: Literal["alive"] = "alive"


class Ready(BaseModel):
    status: Literal["ready"] = "ready"
    version: str
