"""From a session of item_ids to a ranked list: what `tpad recommend` and the service run. No MLLM, no training code.

One session and a file of sessions go the same way. A catalogue of up to `DENSE_ITEMS` is scored whole in one matrix
product per batch; a larger one goes through the FAISS index, session by session, to the same result.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.artifact import HALVES, Version, canonical_json, open_verified
from pipeline.errors import ARTIFACT, USAGE, UserError
from recommender.index import build_index, load_index, save_index, top_items
from recommender.model import ModelConfig, SessionModel, Whitening
from recommender.sessions import pad_prefixes

DENSE_ITEMS = 20_000
SCORES_AT_ONCE = 8_000_000  # numbers: bounds the memory of a batch


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
    item_ids: Sequence[str],
    titles: Sequence[str],
    counts: np.ndarray,
    samples: list[list[str]],
    whitening: dict[str, Whitening],
) -> None:
    """The files of the published session model: weights, settings, items, index, a few sessions to try, and the whitening
    that an item added later needs."""
    model = model.cpu().eval()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    axes = {f"{half}.{name}": array for half, of in whitening.items() for name, array in of._asdict().items()}
    save_arrays(axes, folder / "whitening.safetensors")
    (folder / "config.json").write_bytes(canonical_json(asdict(model.config)))
    (folder / "samples.json").write_bytes(canonical_json(samples))
    items = pa.table(
        {"item_id": pa.array(item_ids, pa.string()), "title": pa.array(titles, pa.string()), "count": pa.array(counts, pa.int64())}
    )
    pq.write_table(items, folder / "items.parquet", write_page_checksum=True)
    with torch.inference_mode():
        save_index(build_index(model.tables()), folder / "index.faiss")


class Recommender:
    def __init__(
        self,
        model: SessionModel,
        index: Any,
        item_ids: list[str],
        titles: list[str],
        samples: list[list[str]],
        halves: list[str],
        version: Version,
    ) -> None:
        self.model = model.eval()
        self.halves = dict(zip(halves, model.content.chunk(len(halves), dim=1), strict=True))  # (N, D) each, whitened
        self.index = index
        self.item_ids, self.titles = item_ids, titles
        self.row = {item_id: row for row, item_id in enumerate(item_ids)}
        self.samples = samples  # sessions of the test split, as item_ids
        self.version = version
        with torch.inference_mode():
            self.tables = model.tables()
            self.popular = self.tables.priors["popular"].argsort(descending=True, stable=True)

    @classmethod
    def load(cls, run: Path | str) -> "Recommender":
        run = Path(run)
        version = open_verified(run / "sbr", "sbr", "run `tpad train-sbr` first")
        check_embeddings(run, version)
        model = load_model(version.path)
        items = pq.read_table(version.path / "items.parquet", page_checksum_verification=True)
        samples = json.loads((version.path / "samples.json").read_bytes())
        index = load_index(version.path / "index.faiss")
        with safe_open(version.path / "whitening.safetensors", "numpy") as file:
            halves = [half for half in HALVES if f"{half}.mean" in file.keys()]  # noqa: SIM118
        return cls(model, index, items["item_id"].to_pylist(), items["title"].to_pylist(), samples, halves, version)

    def recommend(self, session: list[str], k: int = 10, exclude_seen: bool = False) -> Recommendation:
        return self.recommend_batch([session], k, exclude_seen)[0]

    def recommend_batch(self, sessions: list[list[str]], k: int = 10, exclude_seen: bool = False) -> list[Recommendation]:
        known = [[self.row[i] for i in session if i in self.row] for session in sessions]
        found = []
        for session, rows, (best, scores) in zip(sessions, known, self.rank(known, k, exclude_seen), strict=True):
            names = [(self.item_ids[row], self.titles[row], score) for row, score in zip(best.tolist(), scores.tolist(), strict=True)]
            items = [Item(n, *named, *why) for n, (named, why) in enumerate(zip(names, self._reasons(rows, best), strict=True), 1)]
            unknown = list(dict.fromkeys(i for i in session if i not in self.row))
            found.append(Recommendation(items, unknown, None if rows else "popular"))
        return found

    def rank(self, sessions: list[list[int]], k: int, exclude_seen: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows and scores of the k best items of each session of rows, best first; an empty session gets the popular ones."""
        if k < 1:
            raise UserError(f"-k {k} is no number of items; give 1 or more", USAGE)
        k = min(k, len(self.item_ids))
        size = max(1, SCORES_AT_ONCE // (len(self.item_ids) * self.model.config.max_prefix))
        ranked: list[tuple[np.ndarray, np.ndarray]] = [self._most_popular(k)] * len(sessions)
        order = sorted((n for n, s in enumerate(sessions) if s), key=lambda n: len(sessions[n]))  # like lengths together: less padding
        with torch.inference_mode():
            for start in range(0, len(order), size):
                numbers = order[start : start + size]
                seen = [set(sessions[n]) if exclude_seen else set() for n in numbers]
                for n, result in zip(numbers, self._rank_some([sessions[n] for n in numbers], k, seen), strict=True):
                    ranked[n] = result
        return ranked

    def _reasons(self, session: list[int], best: np.ndarray) -> list[tuple[str | None, str | None]]:
        """`similar_to` and `after` of each item of a ranking, among the other items of the session."""
        if not session:
            return [(None, None)] * len(best)
        with torch.inference_mode():
            rows = torch.as_tensor(pad_prefixes([session], self.model.config.max_prefix)).long()
            items = torch.as_tensor(best)
            own = rows[0][:, None] == items
            alike = torch.zeros(own.shape)
            if (vectors := self.halves.get("knowledge")) is not None:
                alike = F.normalize(vectors[rows[0]], dim=1) @ F.normalize(vectors[items], dim=1).T
            origins = self.model.origins(rows, self.tables, items)
            origins[:-1].masked_fill_(own, 0.0)
            source = origins.max(0).indices
            if "id" in self.model.channels:
                share, followed = self.model.followers.shares(rows[0], items).masked_fill(own, 0.0).max(0)
                source = torch.where(share > 0, followed, source)
            nearest = alike.masked_fill(own, -1.0).max(0)
        seen = [self.item_ids[row] for row in rows[0].tolist()]
        after = [*seen, None]  # there for being popular: that is no item's doing
        near = zip(nearest.values.tolist(), nearest.indices.tolist(), source.tolist(), strict=True)
        return [(seen[which] if cosine > 0 else None, after[origin]) for cosine, which, origin in near]

    def _most_popular(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        best = self.popular[:k]
        return best.numpy(), self.tables.priors["popular"][best].numpy()

    def _rank_some(self, sessions: list[list[int]], k: int, seen: list[set[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        wanted = [min(k + len(items), len(self.item_ids)) for items in seen]
        if len(self.item_ids) <= DENSE_ITEMS:
            rows = torch.as_tensor(pad_prefixes(sessions, self.model.config.max_prefix)).long()
            best = self.model.scores(rows, self.tables).topk(max(wanted))
            lists: list[tuple[Tensor, Tensor]] = list(zip(best.values, best.indices, strict=True))
        else:
            lists = [self._through_index(session, n) for session, n in zip(sessions, wanted, strict=True)]
        return [_without(indices.numpy(), values.numpy(), items, k) for (values, indices), items in zip(lists, seen, strict=True)]

    def _through_index(self, session: list[int], k: int) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(pad_prefixes([session], self.model.config.max_prefix)).long()
        return top_items(self.index, self.model, self.tables, rows, k)


def _without(rows: np.ndarray, scores: np.ndarray, seen: set[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    if seen:
        kept = ~np.isin(rows, list(seen))
        rows, scores = rows[kept], scores[kept]
    return rows[:k], scores[:k]


def load_model(folder: Path) -> SessionModel:
    config = ModelConfig(**json.loads((folder / "config.json").read_bytes()))
    return SessionModel.restored(config, load_file(folder / "model.safetensors"))


def check_embeddings(run: Path, version: Version) -> None:
    """Refuses a session model beside other embeddings than it was trained on. A run without embeddings serves as it is."""
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
