"""From a session of item_ids to a ranked list: what `tpad recommend` and the service run. No MLLM, no training code.

One session and a file of sessions go the same way. A catalogue of up to `DENSE_ITEMS`, or so many items left by a filter,
is scored whole in one matrix product per batch; more of them go through the FAISS index, session by session, which finds
the same items (flat) or nearly all of them (any other index, also of a small catalogue).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from pipeline.artifact import Version, canonical_json, open_verified
from pipeline.catalog import Catalog
from pipeline.embeddings import HALVES
from pipeline.errors import ARTIFACT, USAGE, UserError
from recommender.channels import Parts
from recommender.index import ItemIndex, build_indexes, describe, first, load_indexes, save_indexes
from recommender.model import ModelConfig, SessionModel
from recommender.ranker import Ranker, Read
from recommender.sessions import pad_prefixes
from recommender.whitening import Whitening

DENSE_ITEMS = 20_000
POOL = 5  # times k: what `diversify` chooses from
SCORES_AT_ONCE = 8_000_000  # numbers: bounds the memory of a batch
ENTRY = 10  # numbers that an entry of a table of pairs takes while it is added, whether a filter leaves its item or not

Filters = Mapping[str, Sequence[str]]  # column -> values
Found = tuple[np.ndarray, np.ndarray, Read | None]  # scores and rows, and what the session says, where it was read alone


class Item(NamedTuple):
    rank: int  # from 1
    item_id: str
    title: str
    score: float
    similar_to: str | None = None  # the session's item nearest by the knowledge half: they are alike
    after: str | None = None  # the one it followed most in training; where it never did, the one that brings most of its score


@dataclass(frozen=True)
class Recommendation:
    items: list[Item]
    unknown: list[str] = field(default_factory=list)  # item_ids of the session that the catalogue does not have
    fallback: Literal["popular"] | None = None  # nothing of the session was known


def write_model(
    folder: Path,
    model: SessionModel,
    catalog: Catalog,
    counts: np.ndarray,
    samples: list[list[str]],
    whitening: dict[str, Whitening],
    setting: str,
) -> dict[str, Any]:
    """The files of the published session model: weights, settings, items with what they can be filtered by, the index of
    `setting`, sessions to try, and the whitening that an item added later needs. Returns the facts of the index."""
    model = model.cpu().eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    axes = {f"{half}.{name}": array for half, of in whitening.items() for name, array in of._asdict().items()}
    save_arrays(axes, folder / "whitening.safetensors")
    (folder / "config.json").write_bytes(canonical_json(asdict(model.config)))
    (folder / "samples.json").write_bytes(canonical_json(samples))
    items = {"item_id": pa.array(catalog.item_ids, pa.string()), "title": catalog.titles, "count": pa.array(counts, pa.int64())}
    pq.write_table(pa.table(items), folder / "items.parquet", write_page_checksum=True)
    pq.write_table(pa.table(catalog.attributes()), folder / "attributes.parquet", write_page_checksum=True)
    with torch.inference_mode():
        ranker = Ranker(model, model.tables())
    indexes = build_indexes(ranker, setting)
    save_indexes(indexes, folder)
    sessions = [[catalog.row[item] for item in session] for session in samples]
    return describe(ItemIndex(indexes, ranker), setting, sessions)


class Recommender:
    def __init__(self, model: SessionModel, indexes: dict[str, Any], items: pa.Table, attributes: pa.Table, version: Version) -> None:
        self.model = model.eval()
        self.items = items
        self.item_ids = items["item_id"].to_pylist()
        self.titles = [title or item_id for title, item_id in zip(items["title"].to_pylist(), self.item_ids, strict=True)]
        self.row = {item_id: row for row, item_id in enumerate(self.item_ids)}
        # events in training, which the model's own prior need not follow; not by `to_numpy`, for which pyarrow imports pandas
        counts: np.ndarray = np.from_dlpack(items["count"].combine_chunks())
        self.by_count = np.argsort(-counts, kind="stable")
        self.log_share = np.log((counts + 1) / (counts + 1).sum()).astype(np.float32)  # one more: of an item never seen too
        self.attributes = attributes  # what items can be filtered by: text, or a list of texts
        self.version = version
        self.samples: list[list[str]] = json.loads((version.path / "samples.json").read_bytes())  # sessions of the test split
        with safe_open(version.path / "whitening.safetensors", "numpy") as file:
            halves = [half for half in HALVES if f"{half}.mean" in file.keys()]  # noqa: SIM118
        content = np.split(model.content.numpy(), len(halves), axis=1) if halves else ()
        self.halves = dict(zip(halves, content, strict=True))  # (N, D) each, whitened; none of a model of ids alone
        with torch.inference_mode():
            self.tables = model.tables()
        self.ranker = Ranker(model, self.tables)
        self.entries = sum((np.diff(pairs.begin) for pairs in self.ranker.pairs.values()), np.zeros(len(self.item_ids), int))
        self.index = ItemIndex(indexes, self.ranker, version.manifest["index"].get("effort", 1.0))

    @classmethod
    def load(cls, run: Path | str) -> "Recommender":
        run = Path(run)
        version = open_verified(run / "sbr", "sbr", "run `tpad train-sbr` first")
        check_embeddings(run, version)
        if "index" not in version.manifest:
            raise UserError(f"index of an older tpad ({version.path}); run `tpad index`", ARTIFACT)
        items, attributes = (  # not by read_table, for the same reason
            pq.ParquetFile(version.path / f"{name}.parquet", page_checksum_verification=True).read() for name in ("items", "attributes")
        )
        return cls(load_model(version.path), load_indexes(version.path), items, attributes, version)

    def recommend(
        self, session: list[str], k: int = 10, exclude_seen: bool = False, filters: Filters | None = None, diversify: float = 0.0
    ) -> Recommendation:
        """`filters`: column -> values of which an item must have one, of every column. `diversify`, from 0 to 1: how much an
        item loses for being like those above it."""
        return self.recommend_batch([session], k, exclude_seen, filters, diversify)[0]

    def recommend_batch(
        self, sessions: list[list[str]], k: int = 10, exclude_seen: bool = False, filters: Filters | None = None, diversify: float = 0.0
    ) -> list[Recommendation]:
        known = [[self.row[i] for i in session if i in self.row] for session in sessions]
        found = []
        ranked = self._ranked(known, k, exclude_seen, filters, diversify)
        for session, rows, (scores, best, read) in zip(sessions, known, ranked, strict=True):
            names = [(self.item_ids[row], self.titles[row], score) for row, score in zip(best.tolist(), scores.tolist(), strict=True)]
            items = [Item(n, *named, *why) for n, (named, why) in enumerate(zip(names, self._reasons(rows, best, read), strict=True), 1)]
            unknown = list(dict.fromkeys(i for i in session if i not in self.row))
            found.append(Recommendation(items, unknown, None if rows else "popular"))
        return found

    def rank(
        self, sessions: list[list[int]], k: int, exclude_seen: bool = False, filters: Filters | None = None, diversify: float = 0.0
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows and scores of the k best items of each session of rows, best first; an empty session gets those of most
        training events, with the log of their share of them. Fewer than k only where no more are allowed."""
        return [(rows, scores) for scores, rows, _ in self._ranked(sessions, k, exclude_seen, filters, diversify)]

    def _ranked(self, sessions: list[list[int]], k: int, exclude_seen: bool, filters: Filters | None, diversify: float) -> list[Found]:
        if k < 1:
            raise UserError(f"-k {k} is no number of items; give 1 or more", USAGE)
        if not 0 <= diversify <= 1:
            raise UserError(f"--diversify {diversify} is not from 0 to 1; 0 is the plain ranking", USAGE)
        allowed = self._allowed(filters) if filters else None
        count = len(self.item_ids) if allowed is None else int(allowed.sum())
        pool = min(POOL * k if diversify else k, count)
        wanted = {n: min(pool + len(set(s)) if exclude_seen else pool, count) for n, s in enumerate(sessions) if s}
        found, ranked = self._best(sessions, wanted, allowed), []
        for n, session in enumerate(sessions):
            scores, rows, read = found[n] if session else self._popular(pool, allowed)
            if exclude_seen:
                kept = ~np.isin(rows, session)
                scores, rows = scores[kept], rows[kept]
            scores, rows = scores[:pool], rows[:pool]
            chosen = diverse(self._knowledge()[rows], scores, k, diversify) if diversify and len(rows) else slice(k)
            ranked.append((scores[chosen], rows[chosen], read))
        return ranked

    def _popular(self, count: int, allowed: np.ndarray | None) -> Found:
        rows = (self.by_count if allowed is None else self.by_count[allowed[self.by_count]])[:count]
        return self.log_share[rows], rows, None

    def _best(self, sessions: list[list[int]], wanted: dict[int, int], allowed: np.ndarray | None) -> dict[int, Found]:
        """At least the `wanted` best of the allowed items, by number of the session."""
        items = None if allowed is None else np.flatnonzero(allowed)
        count = len(self.item_ids) if items is None else len(items)
        found: dict[int, Found] = {}
        if count > DENSE_ITEMS or not (self.index.exact or items is not None):
            for n, most in wanted.items():
                read = self.ranker.read(sessions[n])
                found[n] = *self.index.top(read, most, allowed), read
            return found
        length = self.model.config.max_prefix
        order = sorted(wanted, key=lambda n: len(sessions[n]))  # like lengths together: less padding
        cost = np.cumsum([length * count + ENTRY * int(self.entries[sessions[n][-length:]].sum()) for n in order])
        for _, part in itertools.groupby(zip(cost // SCORES_AT_ONCE, order, strict=True), key=lambda each: each[0]):
            numbers = [n for _, n in part]
            rows = torch.as_tensor(pad_prefixes([sessions[n] for n in numbers], length)).long()
            with torch.inference_mode():
                scores = self.model.scores(rows, self.tables, items=None if items is None else torch.as_tensor(items))
                best, places = greatest(scores, max(wanted[n] for n in numbers))
            found |= {n: (best[line], places[line] if items is None else items[places[line]], None) for line, n in enumerate(numbers)}
        return found

    def _allowed(self, filters: Filters) -> np.ndarray:
        """(N,) bool"""
        allowed = np.ones(len(self.item_ids), bool)
        for column, values in filters.items():
            if column not in self.attributes.column_names:
                known = ", ".join(self.attributes.column_names) or "none"
                raise UserError(f"no attribute `{column}` to filter by (the catalogue has: {known}); name one of these", USAGE)
            allowed &= having(self.attributes[column].combine_chunks(), values)
        if not allowed.any():
            wanted = " and ".join(f"{column} {' or '.join(map(repr, values))}" for column, values in filters.items())
            raise UserError(f"no item has {wanted} (filter); ask for values of the catalogue", USAGE)
        return allowed

    def _knowledge(self) -> np.ndarray:
        if "knowledge" not in self.halves:
            raise UserError(f"the model reads no knowledge vectors to diversify by ({self.version.path}); leave --diversify out", USAGE)
        return self.halves["knowledge"]

    def sample_rows(self) -> list[list[int]]:
        return [[self.row[item] for item in session] for session in self.samples]

    def _reasons(self, session: list[int], best: np.ndarray, read: Read | None) -> list[tuple[str | None, str | None]]:
        """`similar_to` and `after` of each item of a ranking, among the other items of the session."""
        if not session:
            return [(None, None)] * len(best)
        read = self.ranker.read(session) if read is None else read
        own = read.rows[:, None] == best
        shares = self.ranker.shares(read, best)
        origins = self.ranker.origins(read, best, shares)
        origins[:-1][own] = 0
        source = origins.argmax(0)
        if "followers" in shares:
            times = shares["followers"] * self.ranker.pairs["followers"].whole(read.rows)[:, None]  # less the discount, the same for all
            followed = np.where(own, 0, times)
            source = np.where(followed.max(0) > 0, followed.argmax(0), source)
        alike = np.zeros(own.shape, np.float32)
        if (vectors := self.halves.get("knowledge")) is not None:
            alike = unit(vectors[read.rows]) @ unit(vectors[best]).T
        alike[own] = -1
        seen = [self.item_ids[row] for row in read.rows]
        after = [*seen, None]  # there for being popular: that is no item's doing
        near = zip(alike.max(0).tolist(), alike.argmax(0).tolist(), source.tolist(), strict=True)
        return [(seen[which] if cosine > 0 else None, after[origin]) for cosine, which, origin in near]


def greatest(scores: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`index.first` of each line of (B, C): values and places (B, k). Of equal ones `topk` takes any, in any order."""
    values, places = scores.topk(min(k + 1, scores.shape[1]))
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    found = places.gather(1, order).numpy()
    if values.shape[1] > k:
        for line in (values[:, k - 1] == values[:, k]).nonzero()[:, 0].tolist():  # some of the equal ones are in: which?
            found[line, :k] = first(scores[line].numpy(), k)
    return values[:, :k].numpy(), found[:, :k]


def having(column: pa.Array, values: Sequence[str]) -> np.ndarray:
    """(N,) bool: whose text, or one of whose texts, is one of the values."""
    wanted = pa.array(values, pa.string())
    if not pa.types.is_list(column.type):
        found: np.ndarray = pc.is_in(column, wanted).to_numpy(zero_copy_only=False)
        return found
    found = np.zeros(len(column), bool)
    found[pc.list_parent_indices(column).filter(pc.is_in(pc.list_flatten(column), wanted)).to_numpy()] = True
    return found


def diverse(vectors: np.ndarray, scores: np.ndarray, k: int, strength: float) -> np.ndarray:
    """The order of k of the items, vectors (P, D) and scores (P,), by maximal marginal relevance (Carbonell and Goldstein,
    SIGIR 1998): each next one is the best by its score, from 0 to 1 in the pool, less its cosine to the nearest above it."""
    vectors = unit(vectors)
    worth = (1 - strength) * (scores - scores.min()) / max(float(scores.max() - scores.min()), 1e-9)
    nearest, chosen = np.zeros(len(scores), np.float32), []
    for _ in range(min(k, len(scores))):
        chosen.append(int((worth - strength * nearest).argmax()))
        worth[chosen[-1]] = -np.inf
        nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
    return np.array(chosen, int)


def unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D), each of length one, but for those that are zero."""
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found


def load_model(folder: Path) -> SessionModel:
    config = json.loads((folder / "config.json").read_bytes())
    if "parts" not in config:
        raise UserError(f"session model of an older tpad ({folder}); run `tpad train-sbr`", ARTIFACT)
    return SessionModel.restored(ModelConfig(**config | {"parts": Parts(**config["parts"])}), load_file(folder / "model.safetensors"))


def check_embeddings(run: Path, version: Version) -> None:
    """Refuses a session model beside other embeddings than it was trained on. A run without embeddings serves as it is, and so does
    a model that reads none."""
    if version.manifest["embeddings_manifest_sha256"] is None:
        return
    pointer = run / "embeddings" / "current"
    try:
        current = json.loads(pointer.read_bytes())
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
