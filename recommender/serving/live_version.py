"""Holds the version of the session model that answers, and reloads a new one: `tpad serve` without the HTTP.

One version answers at a time. When `tpad train-sbr` or `tpad index` publishes another, it is verified, loaded and tried on one session
while the current one goes on answering; then it becomes the current one by one assignment. A version that fails is refused and the
current one stays. During a reload the memory of both is needed.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core.artifact import CURRENT
from pipeline.core.files import read_small
from recommender.serving.middleware import ServiceMetrics, log
from recommender.serving.recommender import Recommender
from recommender.serving.thumbnails import Thumbnails
from recommender.session_model.top_k import first

POLL_SECONDS = 1.0  # between two reads of `current`
RETRY_SECONDS = 30.0  # until a refused version is tried again: a disk may have been full

T = TypeVar("T")


@dataclass(frozen=True)
class Refused:
    """Why a new version was not activated, and when (Unix seconds)."""

    error: str
    at: float


@dataclass(frozen=True)
class LoadedVersion:
    """Holds one version in memory, with the arrays for searching its items."""

    recommender: Recommender
    loaded_at: float  # Unix seconds

    @cached_property
    def texts(self) -> list[pa.ChunkedArray]:
        """Titles and item_ids, in lower case; made for the first search, as a copy in memory."""
        names = self.recommender.items
        return [pc.utf8_lower(text) for text in (pc.coalesce(names["title"], names["item_id"]), names["item_id"])]

    @cached_property
    def lengths(self) -> dict[str, np.ndarray]:
        """half -> (N,) norms of its vectors."""
        return {half: np.maximum(np.linalg.norm(vectors, axis=1), 1e-12) for half, vectors in self.recommender.halves.items()}

    @classmethod
    def load(cls, run: Path) -> "LoadedVersion":
        """Loads the published version of a run, which is tried on one session. Raises `UserError`."""
        recommender = Recommender.load(run)
        return cls(recommender, time.time())

    @property
    def version(self) -> str:
        return self.recommender.version.name

    def search(self, words: str) -> np.ndarray:
        """Returns the rows of the items with all the words in title or item_id, in descending order of their training events."""
        popular = self.recommender.by_count
        matches = np.ones(len(popular), bool)
        for word in words.split():
            lower = pc.utf8_lower(pa.scalar(word)).as_py()
            matches &= np.logical_or(*(pc.match_substring(text, lower).to_numpy() for text in self.texts))
        rows: np.ndarray = popular[matches[popular]]
        return rows

    def similar(self, row: int, half: str, k: int) -> list[tuple[int, float]]:
        """Returns rows and cosines of the k nearest other items, by the whitened vectors of a half."""
        vectors, lengths = self.recommender.halves[half], self.lengths[half]
        cosine = vectors @ vectors[row] / (lengths * lengths[row])
        cosine[row] = -np.inf
        best = first(cosine, min(k, len(cosine) - 1))
        return list(zip(best.tolist(), cosine[best].tolist(), strict=True))


class Service:
    """Holds the current version, and watches the run for the next one."""

    def __init__(self, run: Path, find_data: Callable[[], Path | None], threads: int) -> None:
        self.run = run
        self.metrics = ServiceMetrics()
        self.thumbnails = Thumbnails(find_data)
        self.scoring = ThreadPoolExecutor(threads, "scoring")
        self.last_pointer = self.pointer()
        self.activate(LoadedVersion.load(run))

    def activate(self, loaded: LoadedVersion) -> None:
        """Makes `loaded` the version that answers."""
        self.current = loaded
        self.refused: Refused | None = None
        self.metrics.set_version(loaded.version)
        self.metrics.loaded.set(loaded.loaded_at)
        self.thumbnails.reload(loaded.recommender.version)

    def pointer(self) -> bytes:
        """Reads the pointer to the published version, which changes with every publication; empty where it cannot be read."""
        try:
            return read_small(self.run / "sbr" / CURRENT)
        except OSError:  # loading the version will give the better message
            return b""

    async def watch(self) -> None:
        """Activates every new version, until the task is cancelled."""
        last_attempt = time.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            pointer = self.pointer()
            if pointer == self.last_pointer and (self.refused is None or time.monotonic() - last_attempt < RETRY_SECONDS):
                continue
            self.last_pointer, last_attempt = pointer, time.monotonic()
            try:
                loaded = await asyncio.to_thread(LoadedVersion.load, self.run)
            except Exception as error:  # of any kind: the current version stays
                self.refused = Refused(str(error) or type(error).__name__, time.time())
                self.metrics.reloads.labels("refused").inc()
                log.error("new version refused", extra={"facts": {"error": self.refused.error, "version": self.current.version}})
                continue
            self.activate(loaded)
            self.metrics.reloads.labels("activated").inc()
            log.info("new version", extra={"facts": {"version": loaded.version}})

    async def compute(self, work: Callable[[], T]) -> T:
        """Runs `work` in a scoring thread, so that the event loop stays free; as many at a time as the process may use cores."""
        return await asyncio.get_running_loop().run_in_executor(self.scoring, work)
