"""Searches the top-k items of the session model with FAISS.

Each query of a session (one for each channel and position) gives item j the log-mass q . v(j) + b(j). So every channel has an index of its
own over the vectors [v ; b / scale] of its items, whose inner product with [q ; scale] is that log-mass. The candidates are the best M
items of every query, the items that the counts have beside those of the session, the session's items and the most popular ones; the
model scores them exactly.

With a flat index the result is exact: the search stops when the k-th best candidate beats the upper bound of the items outside all lists,
and otherwise takes a larger M. Any other index (HNSW, IVF, ...) finds most of the candidates in a fraction of the time: when it is
built, its recall against the exact search is measured, and the smallest search effort that reaches `WANTED` is used from then on. A
product quantizer (`ivfpq`, `IVF4096,PQ36x4fs`, ...) keeps a few bytes of a vector: enough to find candidates, which the model scores.

A GPU builds the indexes that faiss-gpu supports (not HNSW), and they are saved in their CPU form; no test of this project runs that. This
module imports faiss and sets its number of threads.
"""

import math
import re
from pathlib import Path
from typing import Any

import faiss  # type: ignore[import-untyped]
import numpy as np

from pipeline.core.errors import USAGE, UserError
from pipeline.core.progress import Steps
from recommender.session_model.config import LOG_ZERO
from recommender.session_model.numpy_model import NumpySessionModel, SessionState
from recommender.session_model.top_k import first

FLAT_ITEMS = 50_000  # auto: up to this catalogue size a flat index, which is exact ...
HNSW_ITEMS = 2_000_000  # ... up to this one HNSW, and above IVF with a product quantizer, in a tenth of the memory and with less recall
PQ_PIECES = 36  # of a quantized vector, each half a byte
POINTS = 64  # vectors a list that are looked at to place the lists
EFFORT = {"efSearch": 64, "nprobe": 16}  # search parameters of HNSW and IVF at an effort of 1
QUERY_WEIGHT = 0.95  # an inexact index is asked only the heaviest queries that together have this share of a session's weight
FIRST_LIST = 64  # entries that the first search takes of every query ...
LISTED = 448  # ... and, of an inexact index, of all queries of a session together: the more queries, the less each one contributes
GROWTH = 8  # factor of M from one search to the next
ADD_AT_ONCE = 20_000
THREADS = faiss.omp_get_max_threads()  # cores, or OMP_NUM_THREADS


def factory_of(setting: str, items: int) -> str:
    """Translates `sbr.index` into a string for FAISS's index factory."""
    if setting == "auto":
        setting = "flat" if items <= FLAT_ITEMS else "hnsw" if items <= HNSW_ITEMS else "ivfpq"
    lists = 2 ** int(math.log2(max(1.0, min(4 * math.sqrt(items), items / 40))))  # FAISS warns of fewer than 40 items a list
    known = {"flat": "Flat", "hnsw": "HNSW32,Flat", "ivf": f"IVF{lists},Flat", "ivfpq": f"IVF{lists},PQ{PQ_PIECES}x4fs"}
    return known.get(setting, setting)


def empty_index(setting: str, items: int, dim: int) -> faiss.Index:
    """Creates an index without vectors. Raises `UserError` (2) for a setting that FAISS refuses."""
    try:
        return faiss.index_factory(dim, factory_of(setting, items), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _refused(setting, error) from None


def _refused(setting: str, error: RuntimeError) -> UserError:
    reason = str(error).splitlines()[0].rpartition("Error: ")[2][:200]
    way_out = "give auto, flat, hnsw, ivf or another factory string"
    return UserError(f"FAISS cannot build this index: {reason} (sbr.index {setting!r}); {way_out}", USAGE)


def build_indexes(model: NumpySessionModel, setting: str) -> dict[str, faiss.Index]:
    """Builds an index for each channel, over the items that the channel can offer. Raises `UserError` (2) as `empty_index` does."""
    faiss.omp_set_num_threads(THREADS)
    indexes = {}
    for (name, vectors), scale in zip(model.vectors.items(), model.channels.scale, strict=True):
        rows = offered(model.priors[name])
        factory = factory_of(setting, len(rows))
        width = vectors.shape[1] + 1
        index = empty_index(setting, len(rows), padded(width, factory))
        on_gpu = gpus() > 0 and "HNSW" not in factory

        def points(some: np.ndarray, vectors: Any = vectors, scale: float = scale, prior: np.ndarray = model.priors[name]) -> np.ndarray:
            return pad(np.concatenate([vectors.take(some, 0), prior[some, None] / scale], 1), index.d)  # noqa: B023 (called below)

        try:
            index = faiss.index_cpu_to_all_gpus(index) if on_gpu else index
            if not index.is_trained:
                most = POINTS * (int(lists[1]) if (lists := re.search(r"IVF(\d+)", factory)) else FLAT_ITEMS)
                index.train(points(np.sort(np.random.default_rng(0).permutation(rows)[:most])))
            with Steps(f"index of {name}", len(rows), show=len(rows) > ADD_AT_ONCE) as progress:
                for start in range(0, len(rows), ADD_AT_ONCE):
                    index.add(points(rows[start : start + ADD_AT_ONCE]))
                    progress.advance(by=len(rows[start : start + ADD_AT_ONCE]))
        except RuntimeError as error:  # for example: fewer items than lists
            raise _refused(setting, error) from None
        indexes[name] = faiss.index_gpu_to_cpu(index) if on_gpu else index
    return indexes


def padded(width: int, factory: str) -> int:
    """Returns the length of the vectors of an index: a product quantizer cuts them into `PQ_PIECES` pieces of equal length."""
    return -(-width // PQ_PIECES) * PQ_PIECES if "PQ" in factory else width


def pad(vectors: np.ndarray, width: int) -> np.ndarray:
    """Appends zeros to vectors (P, d), which change no inner product."""
    missing = width - vectors.shape[1]
    return np.pad(vectors, ((0, 0), (0, missing))) if missing else vectors


def gpus() -> int:
    """Counts the GPUs that this build of FAISS can use."""
    return int(faiss.get_num_gpus()) if "GPU" in faiss.get_compile_options() else 0


def save_indexes(indexes: dict[str, faiss.Index], folder: Path) -> None:
    for name, index in indexes.items():
        faiss.write_index(index, str(folder / f"index-{name}.faiss"))


def load_indexes(folder: Path) -> dict[str, faiss.Index]:
    files = {path.stem.removeprefix("index-"): path for path in folder.glob("index-*.faiss")}
    return {name: faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC) for name, path in files.items()}


class ItemIndex:
    """Searches items with the indexes of a model's channels and scores them with the model. Threads may share it."""

    def __init__(self, indexes: dict[str, faiss.Index], model: NumpySessionModel, effort: float = 1.0) -> None:
        self.model, self.indexes = model, indexes
        self.rows = {name: offered(model.priors[name]).astype(np.int32) for name in indexes}
        kinds = {type(faiss.downcast_index(index)) for index in indexes.values()}
        self.exact = all(issubclass(kind, faiss.IndexFlat) for kind in kinds)
        self.graph = all(issubclass(kind, faiss.IndexHNSW) for kind in kinds)
        self.spend(effort)

    def spend(self, effort: float) -> None:
        """Sets the search effort, a factor of the usual cost; a flat index is always exact and ignores it."""
        self.effort, self.first, self.listed = effort, math.ceil(FIRST_LIST * max(1, effort)), math.ceil(LISTED * effort)
        for index in [] if self.exact else self.indexes.values():
            for name, value in EFFORT.items():
                try:
                    faiss.ParameterSpace().set_index_parameter(index, name, math.ceil(value * effort))
                except RuntimeError:  # this kind of index has no such parameter
                    continue

    def top(self, state: SessionState, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Finds the k best items of one session, among the `allowed` (N,) bool; None: among all. Returns scores (k,), descending, and rows
        (k,)."""
        # OpenMP keeps this number for each calling thread; an inexact search takes microseconds, less than waking other threads
        faiss.omp_set_num_threads(THREADS if self.exact else 1)
        model, count = self.model, len(self.model.known)
        queries = self.queries(state)
        size = max(self.first, 2 * k)
        if allowed is not None:
            size = math.ceil(size * count / max(1, int(allowed.sum())))
        elif not self.exact:
            size = max(k, min(self.first, self.listed // max(1, sum(len(query) for query, _ in queries.values()))))
        search = faiss.SearchParametersHNSW(efSearch=size) if self.graph else None  # type: ignore[attr-defined]
        while True:
            size = min(size, count)
            popular = model.by_popularity[:size]
            lists = [state.counted_items, popular]
            # log-masses that an item outside all lists has at most
            bounds = [model.priors["popularity"][popular[-1:]] + model.popularity_weight + max(0.0, state.new_items)]
            for name, (query, weights) in queries.items():
                index = self.indexes[name]
                log_masses, entries = index.search(pad(query, index.d), min(size, index.ntotal), params=search)
                lists.append(self.rows[name][entries[entries >= 0]])
                bounds.append(weights + log_masses[:, -1])
            candidates = distinct(np.concatenate(lists))
            if allowed is not None:
                candidates = candidates[allowed[candidates]]
            if len(candidates) >= k or size == count:
                scores = model.scores(state, candidates)
                best = first(scores, k)
                if size == count or not self.exact or scores[best[-1]] >= np.logaddexp.reduce(np.concatenate(bounds)):
                    return scores[best], candidates[best]
            size *= GROWTH

    def queries(self, state: SessionState) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Builds by channel the queries for its index, (Q, D + 1) or, of content, (Q, D + 2), and their log-weights (Q,). An inexact index
        gets no queries of low weight, for their items hardly ever rank first."""
        least = LOG_ZERO / 2
        if not self.exact:
            log_weights = np.sort(np.concatenate([state.weights[name] for name in self.indexes]))
            cumulated = np.cumsum(np.exp(log_weights - log_weights[-1]))
            least = max(least, log_weights[np.searchsorted(cumulated, (1 - QUERY_WEIGHT) * cumulated[-1])])
        by_channel = {}
        for (name, queries), scale in zip(state.queries.items(), self.model.channels.scale, strict=True):
            heavy = state.weights[name] >= least
            if heavy.any():
                scales = np.full((len(queries), 1), scale)
                if name == "content":  # the last number is multiplied by 1 for a cold item, by 0 for a warm one
                    queries = queries + np.append(np.zeros(self.model.channels.dim, np.float32), np.float32(state.new_items))
                by_channel[name] = np.concatenate([queries, scales], 1)[heavy], state.weights[name][heavy]
        return by_channel


def distinct(rows: np.ndarray) -> np.ndarray:
    """Sorts rows (P,) and drops duplicates, several times as fast as `np.unique`, which hashes them first."""
    rows = np.sort(rows)
    unique: np.ndarray = rows[np.append(True, rows[1:] != rows[:-1])]
    return unique


def offered(prior: np.ndarray) -> np.ndarray:
    """Lists the rows of the items that a channel with this prior (N,) can offer, ascending."""
    rows: np.ndarray = np.flatnonzero(prior > LOG_ZERO / 2)
    return rows
