"""The version that answers, and its change: `tpad serve` without the HTTP.

One version of the session model answers at a time. When `tpad train-sbr` or `tpad index` publishes another, it is
verified, loaded and asked a question beside the one that answers, then takes its place by one assignment; one that fails
is refused, and the old one goes on. While both are held, they need the memory of both.
"""

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.artifact import CURRENT
from recommender.serving.middleware import Metrics, log
from recommender.serving.recommender import Recommender
from recommender.serving.thumbnails import Pictures
from recommender.session_model.top_k import first

POLL_SECONDS = 1.0  # between two looks at `current`
RETRY_SECONDS = 30.0  # until a version that was refused is tried again: a disk may have been full

T = TypeVar("T")


@dataclass(frozen=True)
class Refused:
    error: str
    at: float


@dataclass(frozen=True)
class Served:
    """One version, with what searching its items needs."""

    recommender: Recommender
    texts: list[pa.ChunkedArray]  # titles and item_ids, in small letters
    lengths: dict[str, np.ndarray]  # (N,) of each half's vectors
    loaded_at: float

    @classmethod
    def load(cls, run: Path) -> "Served":
        recommender = Recommender.load(run)
        tried = recommender.recommend(recommender.samples[0]).items
        if not tried or not all(math.isfinite(item.score) for item in tried):
            raise ValueError("the model's scores are not finite")
        names = recommender.items
        texts = [pc.utf8_lower(text) for text in (pc.coalesce(names["title"], names["item_id"]), names["item_id"])]
        lengths = {half: np.maximum(np.linalg.norm(vectors, axis=1), 1e-12) for half, vectors in recommender.halves.items()}
        return cls(recommender, texts, lengths, time.time())

    @property
    def version(self) -> str:
        return self.recommender.version.name

    def search(self, words: str) -> np.ndarray:
        """Rows of the items that have all the words in their titles or item_ids, those of most training events first."""
        popular = self.recommender.by_count
        fits = np.ones(len(popular), bool)
        for word in words.split():
            small = pc.utf8_lower(pa.scalar(word)).as_py()
            fits &= np.logical_or(*(pc.match_substring(text, small).to_numpy() for text in self.texts))
        found: np.ndarray = popular[fits[popular]]
        return found

    def similar(self, row: int, half: str, k: int) -> list[tuple[int, float]]:
        """Rows and cosines of the nearest items by the whitened vectors of a half."""
        vectors, lengths = self.recommender.halves[half], self.lengths[half]
        cosine = vectors @ vectors[row] / (lengths * lengths[row])
        cosine[row] = -np.inf
        best = first(cosine, min(k, len(cosine) - 1))
        return list(zip(best.tolist(), cosine[best].tolist(), strict=True))


class Service:
    """Holds the version that answers, and looks out for the next one."""

    def __init__(self, run: Path, data: Path | None, threads: int) -> None:
        self.run = run
        self.metrics = Metrics()
        self.pictures = Pictures(data)
        self.scoring = ThreadPoolExecutor(threads, "scoring")
        self.seen = self.pointer()
        self.take_up(Served.load(run))

    def take_up(self, served: Served) -> None:
        self.now = served
        self.refused: Refused | None = None
        self.metrics.answers(served.version)
        self.metrics.loaded.set(served.loaded_at)
        self.pictures.begin()

    def pointer(self) -> bytes:
        """What changes when a version is published."""
        try:
            return (self.run / "sbr" / CURRENT).read_bytes()
        except OSError:  # trying to load it will say it better
            return b""

    async def watch(self) -> None:
        tried = time.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            pointer = self.pointer()
            if pointer == self.seen and (self.refused is None or time.monotonic() - tried < RETRY_SECONDS):
                continue
            self.seen, tried = pointer, time.monotonic()
            try:
                served = await asyncio.to_thread(Served.load, self.run)
            except Exception as error:  # whatever is wrong with it, the old one goes on
                self.refused = Refused(str(error) or type(error).__name__, time.time())
                self.metrics.reloads.labels("refused").inc()
                log.error("new version refused", extra={"facts": {"error": self.refused.error, "version": self.now.version}})
                continue
            self.take_up(served)
            self.metrics.reloads.labels("taken up").inc()
            log.info("new version", extra={"facts": {"version": served.version}})

    async def compute(self, work: Callable[[], T]) -> T:
        """In a thread, so that the others are heard meanwhile; as many at once as the process may use cores."""
        return await asyncio.get_running_loop().run_in_executor(self.scoring, work)
