"""Ranks the next items of sessions of item_ids, with reasons: the library behind `tpad recommend` and the service.

All items are scored if there are at most `FULL_SCORING_ITEMS` (of the catalogue, or left by a filter), for `BATCH_SESSIONS` sessions or
more in one matrix product of PyTorch, if it is installed. Larger catalogues are searched by the FAISS index, session by session, which
finds the same items (flat) or nearly all of them (any other index, also of a small catalogue). No MLLM and no training code is imported.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import safe_open

from pipeline.core.artifact import Version, following
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.core.files import read_json
from pipeline.data.availability import ALWAYS, NEVER, read_availability
from pipeline.data.embeddings import HALVES
from recommender.retrieval.index import ItemIndex, load_indexes, padded
from recommender.retrieval.mapped_files import mapped_tensors, names_and_rows, read_items
from recommender.serving.session_vectors import SessionVectors, session_vectors
from recommender.session_model.config import config_of
from recommender.session_model.numpy_model import NumpySessionModel, SessionState, unit
from recommender.session_model.top_k import first

if TYPE_CHECKING:
    from recommender.serving.batch_scorer import BatchScorer

HINT = "run `tpad train-sbr` first"
TRIED = 1000  # items that a loaded model scores on trial
FULL_SCORING_ITEMS = 20_000
BATCH_SESSIONS = 8  # sessions from which one matrix product is faster than numpy session by session
TORCH = find_spec("torch") is not None  # a container that only serves has none
MAX_SHIFT = 20.0  # of log-odds
YEAR_1, YEAR_5138 = -62_135_596_800, 10**11  # Unix seconds
POOL = 5  # times k: number of items from which `diversify` chooses

Filters = Mapping[str, Sequence[str]]  # column -> values
ScoredItems = tuple[np.ndarray, np.ndarray, SessionState | None]  # scores and rows; the state of the session where it was scored alone


class Item(NamedTuple):
    """One place of a ranking."""

    rank: int  # from 1
    item_id: str
    title: str
    score: float
    similar_to: str | None = None  # item of the session with the most similar knowledge vector
    after: str | None = None  # item of the session that it followed most often in training; else the one that adds most to its score


@dataclass(frozen=True)
class Recommendation:
    """The ranking of one session."""

    items: list[Item]
    unknown: list[str] = field(default_factory=list)  # item_ids of the session that are not in the catalogue
    fallback: Literal["popular"] | None = None  # popular: no item of the session is in the catalogue


class Recommender:
    """Holds a published session model with its indexes and items, and ranks by it."""

    def __init__(self, run: Path, version: Version) -> None:
        """Reads a verified version of a run's session model. Raises `UserError` (4), or any error for content that is none."""
        check_embeddings(run, version)
        if "index" not in version.manifest:
            raise UserError(f"index of an older tpad ({version.path}); run `tpad index`", ARTIFACT)
        self.version, self.config = version, config_of(version.path)
        self.arrays = mapped_tensors(version.path / "model.safetensors")
        self.items = items = read_items(version.path, "items")
        self.attributes = read_items(version.path, "attributes")  # columns for filters: text, or lists of texts
        self.item_ids, self.titles, self.row = names_and_rows(version.path, items)
        # training events, which the model's popularity prior need not follow; not by `to_numpy`, for which pyarrow imports pandas
        counts: np.ndarray = np.from_dlpack(items["count"].combine_chunks())
        self.by_count = np.argsort(-counts, kind="stable").astype(np.int32)
        self.log_share = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)  # plus one: finite for cold items
        self.new_items = float(version.manifest["settings"].get("new_items", 0.0))  # default of a request
        self.availability = read_availability(version.path / "items.parquet", items)
        self.cached_availability = (NEVER, NEVER, np.empty(0, bool))  # from when, until when, and (N,) which items are available then
        self.samples: list[list[str]] = read_json(version.path / "samples.json")  # sessions of the test split
        with safe_open(version.path / "whitening.safetensors", "numpy") as file:
            halves = [half for half in HALVES if f"{half}.mean" in file.keys()]  # noqa: SIM118
        content = np.split(self.arrays["content"], len(halves), axis=1) if halves else ()
        self.halves = dict(zip(halves, content, strict=True))  # (N, D) each, whitened; none of a model of ids alone
        self.ranker = NumpySessionModel(self.config, self.arrays)
        self.index = ItemIndex(load_indexes(version.path), self.ranker, version.manifest["index"].get("effort", 1.0))
        self._check()

    @classmethod
    def load(cls, run: Path | str) -> "Recommender":
        """Opens the published session model of a run. Raises `UserError` (4) if it is missing, damaged or of other embeddings."""
        run = Path(run)
        return following(run / "sbr", "sbr", HINT, lambda version: cls(run, version))

    def _check(self) -> None:
        """Raises ValueError for files of a version that do not fit each other: sums say nothing of that."""
        items = len(self.item_ids)
        lengths = {len(self.attributes) if self.attributes.num_columns else items, self.config.items, len(self.row), items}
        if len(lengths) > 1 or self.items["item_id"].null_count:
            raise ValueError(f"files of different items: {sorted(lengths)}")
        for name, index in self.index.indexes.items():
            count, width = len(self.index.rows[name]), self.ranker.vectors[name].shape[1] + 1
            if index.ntotal != count or index.d not in (width, padded(width, "PQ")):
                raise ValueError(f"the index of {name} has {index.ntotal} vectors of {index.d} numbers, not {count} of {width}")
        if self.index.indexes.keys() != self.ranker.vectors.keys():
            raise ValueError("indexes of other channels")
        for session in self.samples[:1]:
            scores = self.ranker.scores(self.ranker.encode([self.row[item] for item in session]), np.arange(min(items, TRIED)))
            if not np.isfinite(scores).all():
                raise ValueError("scores are not finite")

    @cached_property
    def batch_scorer(self) -> "BatchScorer":
        """The scorer of many sessions. It is created on first use, so that single sessions do not wait for the import of PyTorch."""
        from recommender.serving.batch_scorer import BatchScorer

        return BatchScorer(self.config, self.arrays)

    def recommend(
        self,
        session: list[str],
        k: int = 10,
        exclude_seen: bool = False,
        filters: Filters | None = None,
        diversify: float = 0.0,
        new_items: float | None = None,
        at: int | None = None,
    ) -> Recommendation:
        """Ranks the k best next items of a session of item_ids, oldest first.

        `filters`: column -> values; an item must have one of them, of every column. `diversify`: from 0 (relevance only) to 1 (diversity
        only), see `diverse`. `new_items`: log-odds added to cold items (without training events); None: the published `sbr.new_items`.
        `at`: Unix seconds at which items must be available; None: now. Raises `UserError` (2) for values out of range.
        """
        return self.recommend_batch([session], k, exclude_seen, filters, diversify, new_items, at)[0]

    def recommend_batch(
        self,
        sessions: list[list[str]],
        k: int = 10,
        exclude_seen: bool = False,
        filters: Filters | None = None,
        diversify: float = 0.0,
        new_items: float | None = None,
        at: int | None = None,
    ) -> list[Recommendation]:
        """Ranks the k best next items of several sessions; parameters as in `recommend`."""
        known = [[self.row[i] for i in session if i in self.row] for session in sessions]
        recommendations = []
        ranked = self._ranked(known, k, exclude_seen, filters, diversify, new_items, at)
        for session, rows, (scores, best, read) in zip(sessions, known, ranked, strict=True):
            names = [(self.item_ids[row], self.titles[row], score) for row, score in zip(best.tolist(), scores.tolist(), strict=True)]
            reasons = self._reasons(rows, best, read)
            items = [Item(n, *named, *reason) for n, (named, reason) in enumerate(zip(names, reasons, strict=True), 1)]
            unknown = list(dict.fromkeys(i for i in session if i not in self.row))
            recommendations.append(Recommendation(items, unknown, None if rows else "popular"))
        return recommendations

    def encode(self, sessions: list[list[str]]) -> list[SessionVectors]:
        """Encodes sessions of item_ids, oldest first, into the query vectors of each channel; unknown items are left out. They point at the
        vectors of items in `item_vectors`."""
        return [session_vectors(self.ranker, [self.row[i] for i in session if i in self.row]) for session in sessions]

    @property
    def item_vectors(self) -> dict[str, np.ndarray]:
        """The item vectors (N, D) of each channel, in the order of `item_ids`: of length one, zeros for the id of a cold item."""
        return {name: vectors[:, : self.config.dim] for name, vectors in self.ranker.vectors.items()}

    def rank(
        self,
        sessions: list[list[int]],
        k: int = 10,
        exclude_seen: bool = False,
        filters: Filters | None = None,
        diversify: float = 0.0,
        new_items: float | None = None,
        at: int | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns rows and scores of the k best items of each session of rows, best first; fewer only if fewer are allowed.

        An empty session gets the items with most training events; their scores are the log of their share of all events."""
        return [(rows, scores) for scores, rows, _ in self._ranked(sessions, k, exclude_seen, filters, diversify, new_items, at)]

    def _ranked(
        self,
        sessions: list[list[int]],
        k: int,
        exclude_seen: bool,
        filters: Filters | None,
        diversify: float,
        new_items: float | None,
        at: int | None,
    ) -> list[ScoredItems]:
        if k < 1:
            raise UserError(f"-k {k} is less than 1; give 1 or more", USAGE)
        if not 0 <= diversify <= 1:
            raise UserError(f"--diversify {diversify} is not from 0 to 1; 0 is the plain ranking", USAGE)
        shift = self.new_items if new_items is None else new_items
        if not abs(shift) <= MAX_SHIFT:
            raise UserError(f"--new-items {shift} is not from -{MAX_SHIFT:g} to {MAX_SHIFT:g}; 0 leaves new items as they are", USAGE)
        allowed = self._allowed(filters or {}, self._available(at))
        count = len(self.item_ids) if allowed is None else int(allowed.sum())
        pool = min(POOL * k if diversify else k, count)
        wanted = {n: min(pool + len(set(s)) if exclude_seen else pool, count) for n, s in enumerate(sessions) if s}
        best, ranked = self._best(sessions, wanted, allowed, shift), []
        for n, session in enumerate(sessions):
            scores, rows, read = best[n] if session else self._popular(pool, allowed, shift)
            if exclude_seen:
                unseen = ~np.isin(rows, session)
                scores, rows = scores[unseen], rows[unseen]
            scores, rows = scores[:pool], rows[:pool]
            chosen = diverse(self._knowledge()[rows], scores, k, diversify) if diversify and len(rows) else slice(k)
            ranked.append((scores[chosen], rows[chosen], read))
        return ranked

    def _popular(self, count: int, allowed: np.ndarray | None, new_items: float) -> ScoredItems:
        scores: np.ndarray = self.log_share
        by_score: np.ndarray = self.by_count
        if new_items:
            scores = scores + np.float32(new_items) * ~self.ranker.known
            by_score = np.argsort(-scores, kind="stable")
        rows = (by_score if allowed is None else by_score[allowed[by_score]])[:count]
        return scores[rows], rows, None

    def _best(
        self, sessions: list[list[int]], wanted: dict[int, int], allowed: np.ndarray | None, new_items: float
    ) -> dict[int, ScoredItems]:
        """Returns n -> the best of the allowed items for the n-th session, at least `wanted[n]` of them."""
        items = None if allowed is None else np.flatnonzero(allowed)
        count = len(self.item_ids) if items is None else len(items)
        score_all = count <= FULL_SCORING_ITEMS and (self.index.exact or items is not None)
        if TORCH and score_all and len(wanted) >= BATCH_SESSIONS:
            return {n: (*best, None) for n, best in self.batch_scorer.best(sessions, wanted, items, new_items)}
        candidates = items if items is not None else np.arange(count if score_all else 0)
        ranked: dict[int, ScoredItems] = {}
        for n, most in wanted.items():
            read = self.ranker.encode(sessions[n], new_items)
            ranked[n] = *(self._score_all(read, most, candidates) if score_all else self.index.top(read, most, allowed)), read
        return ranked

    def _score_all(self, read: SessionState, k: int, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns scores and rows of the k best of `items` (C,), ascending, by scoring all of them."""
        scores = self.ranker.scores(read, items)
        best = first(scores, k)
        return scores[best], items[best]

    def _available(self, at: int | None) -> np.ndarray | None:
        """Returns (N,) bool: which items are available at the time `at` (Unix seconds; None: now). None: all of them."""
        if self.availability is None:
            return None
        moment = int(time.time()) if at is None else at
        since, until, available = self.cached_availability
        if not since <= moment < until:  # between two changes of availability the answer is the same
            available = self.availability.at(moment)
            changes = np.concatenate(self.availability)
            since, until = changes[changes <= moment].max(initial=ALWAYS), changes[changes > moment].min(initial=NEVER)
            self.cached_availability = since, until, available
        if not available.any():
            when = datetime.fromtimestamp(moment, UTC).isoformat() if YEAR_1 <= moment < YEAR_5138 else moment
            raise UserError(f"no item is available at {when} ({self.version.path}); give another --at", USAGE)
        return None if available.all() else available

    def _allowed(self, filters: Filters, available: np.ndarray | None) -> np.ndarray | None:
        """Returns (N,) bool: which items the filters and their availability allow. None: all items. Raises `UserError` (2)."""
        if not filters:
            return available
        allowed = np.ones(len(self.item_ids), bool) if available is None else available.copy()
        for column, values in filters.items():
            if column not in self.attributes.column_names:
                known = ", ".join(self.attributes.column_names) or "none"
                raise UserError(f"no attribute `{column}` to filter by (the catalogue has: {known}); name one of these", USAGE)
            allowed &= has_value(self.attributes[column].combine_chunks(), values)
        if not allowed.any():
            wanted = " and ".join(f"{column} {' or '.join(map(repr, values))}" for column, values in filters.items())
            raise UserError(f"no item has {wanted} (filter); use values of the catalogue", USAGE)
        return allowed

    def _knowledge(self) -> np.ndarray:
        if "knowledge" not in self.halves:
            raise UserError(f"the model has no knowledge vectors to diversify by ({self.version.path}); omit --diversify", USAGE)
        return self.halves["knowledge"]

    def sample_rows(self) -> list[list[int]]:
        """Returns the test sessions that are stored with the model, as rows."""
        return [[self.row[item] for item in session] for session in self.samples]

    def _reasons(self, session: list[int], best: np.ndarray, read: SessionState | None) -> list[tuple[str | None, str | None]]:
        """Returns `similar_to` and `after` of each item of a ranking, chosen among the other items of the session."""
        if not session:
            return [(None, None)] * len(best)
        read = self.ranker.encode(session) if read is None else read
        itself = read.rows[:, None] == best
        shares = self.ranker.shares(read, best)
        origins = self.ranker.origins(read, best, shares)
        origins[:-1][itself] = 0
        source = origins.argmax(0)
        if (name := "next_item_counts") in shares:  # minus the discount, which is the same for all
            times = shares[name] * self.ranker.pairs[name].discounted_totals(read.rows)[:, None]
            followed = np.where(itself, 0, times)
            source = np.where(followed.max(0) > 0, followed.argmax(0), source)
        cosines = np.zeros(itself.shape, np.float32)
        if (vectors := self.halves.get("knowledge")) is not None:
            cosines = unit(vectors[read.rows]) @ unit(vectors[best]).T
        cosines[itself] = -1
        seen = [self.item_ids[row] for row in read.rows]
        after = [*seen, None]  # None: its score comes from the popularity prior, not from an item
        nearest = zip(cosines.max(0).tolist(), cosines.argmax(0).tolist(), source.tolist(), strict=True)
        return [(seen[place] if cosine > 0 else None, after[origin]) for cosine, place, origin in nearest]


def has_value(column: pa.Array, values: Sequence[str]) -> np.ndarray:
    """Returns (N,) bool: whether the text of an item, or one of its texts, is one of the values."""
    wanted = pa.array(values, pa.string())
    if not pa.types.is_list(column.type):
        matches: np.ndarray = pc.is_in(column, wanted).to_numpy(zero_copy_only=False)
        return matches
    matches = np.zeros(len(column), bool)
    matches[pc.list_parent_indices(column).filter(pc.is_in(pc.list_flatten(column), wanted)).to_numpy()] = True
    return matches


def diverse(vectors: np.ndarray, scores: np.ndarray, k: int, strength: float) -> np.ndarray:
    """Returns the places of k items in the order of maximal marginal relevance (MMR; Carbonell and Goldstein, SIGIR 1998).

    vectors (P, D), scores (P,). The next item maximises (1 - strength) * score - strength * (its cosine to the nearest chosen item);
    scores are scaled to 0..1 over the P items."""
    vectors = unit(vectors)
    relevance = (1 - strength) * (scores - scores.min()) / max(float(scores.max() - scores.min()), 1e-9)
    nearest, chosen = np.zeros(len(scores), np.float32), []
    for _ in range(min(k, len(scores))):
        chosen.append(int((relevance - strength * nearest).argmax()))
        relevance[chosen[-1]] = -np.inf
        nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
    return np.array(chosen, int)


def check_embeddings(run: Path, version: Version) -> None:
    """Checks that the embeddings of the run are those the session model was trained on. Raises `UserError` (4).

    A run without embeddings passes, and so does a model that reads none."""
    if version.manifest["embeddings_manifest_sha256"] is None:
        return
    pointer = run / version.manifest.get("embeddings_run", ".") / "embeddings" / "current"
    try:
        current = read_json(pointer)
        name, digest = current["version"], current["manifest_sha256"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"damaged pointer ({pointer}); run `tpad export-embeddings`", ARTIFACT) from None
    if digest != version.manifest["embeddings_manifest_sha256"]:
        raise UserError(
            f"embeddings {name} are not those the session model was trained on, {version.manifest['embeddings_version']} ({run}); "
            "run `tpad index`, or `tpad train-sbr` to train anew",
            ARTIFACT,
        )
