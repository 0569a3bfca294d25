"""FAISS over the item vectors, and the top-k of the session model through it.

The model's score is a sum over queries: one for each channel and item of the session. So every channel has an index of its
own, over [v ; prior / scale] of its items; the inner product with [q ; scale] is what a query gives an item. The
best M of every query, the items counted beside those of the session, these themselves and the popular ones are scored exactly by the model.

With a flat index the answer is exact: it stops when the k-th best of the candidates beats all that an item outside every
list could score, else it takes a larger M. Any other index (HNSW, IVF, ...) finds most of the candidates in a fraction of
the time: when it is built, the recall of the answer against the exact one is measured, and the least effort that reaches
`WANTED` is what a search spends from then on. A GPU builds what faiss-gpu can (not HNSW), and the index goes to the disk in
its CPU form; no test of this project has had one.

This is where faiss is imported and its threads are set.
"""

import math
from pathlib import Path

import faiss  # type: ignore[import-untyped]
import numpy as np

from pipeline.core.errors import USAGE, UserError
from pipeline.core.progress import Steps
from recommender.session_model.config import NEVER
from recommender.session_model.numpy_model import Ranker, Read
from recommender.session_model.top_k import first

FLAT_ITEMS = 50_000  # auto: up to here flat, which is exact ...
HNSW_ITEMS = 2_000_000  # ... up to here HNSW, and above IVF, which is built faster and finds less
EFFORT = {"efSearch": 64, "nprobe": 16}  # what HNSW and IVF spend on a query at an effort of 1
ASKED = 0.95  # of the weight of a session's queries, unless the index is exact
FIRST_LIST = 64  # entries taken of every query at first ...
LISTED = 448  # ... and of all queries of a session, unless the index is exact: the more there are, the less of the answer is from one
GROWTH = 8
ADD_AT_ONCE = 20_000
THREADS = faiss.omp_get_max_threads()  # cores, or OMP_NUM_THREADS


def factory_of(setting: str, items: int) -> str:
    """`sbr.index` as FAISS's factory reads it."""
    if setting == "auto":
        setting = "flat" if items <= FLAT_ITEMS else "hnsw" if items <= HNSW_ITEMS else "ivf"
    lists = 2 ** int(math.log2(max(1.0, min(4 * math.sqrt(items), items / 40))))  # 40: of fewer items a list, FAISS warns
    return {"flat": "Flat", "hnsw": "HNSW32,Flat", "ivf": f"IVF{lists},Flat"}.get(setting, setting)


def empty_index(setting: str, items: int, dim: int) -> faiss.Index:
    try:
        return faiss.index_factory(dim, factory_of(setting, items), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _refused(setting, error) from None


def _refused(setting: str, error: RuntimeError) -> UserError:
    reason = str(error).splitlines()[0].rpartition("Error: ")[2][:200]
    way_out = "give auto, flat, hnsw, ivf or another factory string"
    return UserError(f"FAISS cannot build this index: {reason} (sbr.index {setting!r}); {way_out}", USAGE)


def build_indexes(ranker: Ranker, setting: str) -> dict[str, faiss.Index]:
    """An index for each channel, over its own items."""
    faiss.omp_set_num_threads(THREADS)
    indexes = {}
    for (name, vectors), scale in zip(ranker.vectors.items(), ranker.channels.scale, strict=True):
        rows = offered(ranker.priors[name])
        vectors = np.concatenate([vectors[rows], ranker.priors[name][rows, None] / scale], 1)
        index = empty_index(setting, len(vectors), vectors.shape[1])
        on_gpu = gpus() > 0 and "HNSW" not in factory_of(setting, len(vectors))
        try:
            index = faiss.index_cpu_to_all_gpus(index) if on_gpu else index
            index.train(vectors)
            with Steps(f"index of {name}", len(vectors), show=len(vectors) > ADD_AT_ONCE) as shown:
                for start in range(0, len(vectors), ADD_AT_ONCE):
                    index.add(vectors[start : start + ADD_AT_ONCE])
                    shown.advance(by=len(vectors[start : start + ADD_AT_ONCE]))
        except RuntimeError as error:  # too few items for so many lists, ...
            raise _refused(setting, error) from None
        indexes[name] = faiss.index_gpu_to_cpu(index) if on_gpu else index
    return indexes


def gpus() -> int:
    """How many GPUs this build of FAISS can use."""
    return int(faiss.get_num_gpus()) if "GPU" in faiss.get_compile_options() else 0


def save_indexes(indexes: dict[str, faiss.Index], folder: Path) -> None:
    for name, index in indexes.items():
        (folder / f"index-{name}.faiss").write_bytes(faiss.serialize_index(index).tobytes())


def load_indexes(folder: Path) -> dict[str, faiss.Index]:
    files = {path.stem.removeprefix("index-"): path for path in folder.glob("index-*.faiss")}
    return {name: faiss.deserialize_index(np.frombuffer(path.read_bytes(), dtype=np.uint8)) for name, path in files.items()}


class ItemIndex:
    """The indexes of a model's channels beside the model. Several threads may ask at once."""

    def __init__(self, indexes: dict[str, faiss.Index], ranker: Ranker, effort: float = 1.0) -> None:
        self.ranker, self.indexes = ranker, indexes
        self.rows = {name: offered(ranker.priors[name]) for name in indexes}
        kinds = {type(faiss.downcast_index(index)) for index in indexes.values()}
        self.exact = all(issubclass(kind, faiss.IndexFlat) for kind in kinds)
        self.graph = all(issubclass(kind, faiss.IndexHNSW) for kind in kinds)
        self.spend(effort)

    def spend(self, effort: float) -> None:
        """How much a search may cost; nothing to a flat index, which is always exact."""
        self.effort, self.first, self.listed = effort, math.ceil(FIRST_LIST * max(1, effort)), math.ceil(LISTED * effort)
        for index in [] if self.exact else self.indexes.values():
            for name, value in EFFORT.items():
                try:
                    faiss.ParameterSpace().set_index_parameter(index, name, math.ceil(value * effort))
                except RuntimeError:  # an index that has no such parameter
                    continue

    def top(self, read: Read, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best items of one session, or of the `allowed` (N,) bool: scores (k,) and rows (k,), best first."""
        # set for each thread that asks, as OpenMP has it; a search of microseconds would wait for threads longer than it takes
        faiss.omp_set_num_threads(THREADS if self.exact else 1)
        ranker, count = self.ranker, len(self.ranker.known)
        queries = self.queries(read)
        size = max(self.first, 2 * k)
        if allowed is not None:
            size = math.ceil(size * count / max(1, int(allowed.sum())))
        elif not self.exact:
            size = max(k, min(self.first, self.listed // max(1, sum(len(query) for query, _ in queries.values()))))
        search = faiss.SearchParametersHNSW(efSearch=size) if self.graph else None  # type: ignore[attr-defined]
        while True:
            size = min(size, count)
            popular = ranker.by_popularity[:size]
            found = [read.others, popular]
            elsewhere = [
                ranker.priors["popular"][popular[-1:]] + ranker.popular + max(0.0, read.new_items)
            ]  # at most, of what is in no list
            for name, (query, weights) in queries.items():
                index = self.indexes[name]
                near, entries = index.search(query, min(size, index.ntotal), params=search)
                found.append(self.rows[name][entries[entries >= 0]])
                elsewhere.append(weights + near[:, -1])
            candidates = distinct(np.concatenate(found))
            if allowed is not None:
                candidates = candidates[allowed[candidates]]
            if len(candidates) >= k or size == count:
                scores = ranker.scores(read, candidates)
                best = first(scores, k)
                if size == count or not self.exact or scores[best[-1]] >= np.logaddexp.reduce(np.concatenate(elsewhere)):
                    return scores[best], candidates[best]
            size *= GROWTH

    def queries(self, read: Read) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By channel the queries to ask its index, a number longer than the model's, and their log-weights (Q,). An index that is
        not exact is not asked for the lightest, of which hardly an item comes first."""
        least = NEVER / 2
        if not self.exact:
            every = np.sort(np.concatenate([read.weights[name] for name in self.indexes]))
            light = np.cumsum(np.exp(every - every[-1]))
            least = max(least, every[np.searchsorted(light, (1 - ASKED) * light[-1])])
        found = {}
        for (name, queries), scale in zip(read.queries.items(), self.ranker.channels.scale, strict=True):
            asked = read.weights[name] >= least
            if asked.any():
                scales = np.full((len(queries), 1), scale)
                if name == "content":  # whose last number meets a 1 of each cold item
                    queries = queries + np.append(np.zeros(self.ranker.channels.dim, np.float32), np.float32(read.new_items))
                found[name] = np.concatenate([queries, scales], 1)[asked], read.weights[name][asked]
        return found


def distinct(rows: np.ndarray) -> np.ndarray:
    """(P,) -> ascending, each once: `np.unique`, which hashes them first and takes several times as long."""
    rows = np.sort(rows)
    found: np.ndarray = rows[np.append(True, rows[1:] != rows[:-1])]
    return found


def offered(prior: np.ndarray) -> np.ndarray:
    """The items of a channel's index: those it can offer."""
    rows: np.ndarray = np.flatnonzero(prior > NEVER / 2)
    return rows
