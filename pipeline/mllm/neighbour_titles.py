"""Titles of near items, shown beside an item that lacks its image or its text: retrieved context, as in RA-BLIP (arXiv 2410.14154).

Near by the knowledge half of the embeddings an earlier run has published, among the items that have both there, and not below
a least cosine: where nothing is near, nothing is shown. Titles are content; no session is read, and embeddings distilled from
other training sessions are refused. One item is compared with all at a time, when it is shown, so memory grows with their
number alone.

Views withheld in training get them too, or a complete catalogue would never teach the model to read them. Limit: an item from
which something is withheld was embedded with it, so its neighbours are better than those of an item that lacks it.
"""

from pathlib import Path

import numpy as np

from pipeline.core.config import NeighboursConfig
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.data.catalog import Catalog
from pipeline.data.embeddings import read_embeddings


class Neighbours:
    """Those of one catalogue's items in the embeddings of `config.run`."""

    def __init__(self, config: NeighboursConfig, catalog: Catalog, sessions_sha256: str) -> None:
        assert config.run is not None
        self.config = config
        found = read_embeddings(Path(config.run) / "embeddings")
        self.sha256 = found.version.manifest_sha256
        if found.version.manifest["sessions_sha256"] != sessions_sha256:
            raise UserError(
                f"the embeddings of the neighbours were distilled from other training sessions (data.neighbours.run = {config.run}); "
                "name a run over the same data, data.valid and data.test",
                ARTIFACT,
            )
        if "knowledge" not in found.vectors:
            raise UserError(f"embeddings without a knowledge half (data.neighbours.run = {config.run}); name another run", ARTIFACT)
        place = {item_id: n for n, item_id in enumerate(found.item_ids)}
        self.place = np.array([place.get(item_id, -1) for item_id in catalog.item_ids])  # (N,) row there, or -1
        self.vectors = found.knowledge / np.linalg.norm(found.knowledge, axis=1, keepdims=True)
        whole = found.has_image & found.has_text
        rows = (row for row, at in enumerate(self.place) if at >= 0 and whole[at])
        titles = {row: title for row in rows if (title := catalog.text(row, "title"))}
        self.rows, self.titles = np.array([*titles], np.int64), [*titles.values()]  # of those that can be shown
        self.shown = self.vectors[self.place[self.rows]]
        self._known: dict[int, list[str]] = {}

    def settings(self) -> dict[str, object]:
        """All that what is shown depends on, but for the catalogue."""
        return {"embeddings": self.sha256, **self.config.model_dump(exclude={"run"})}

    def __call__(self, row: int) -> list[str]:
        """Titles, the nearest first; none of an item without a vector."""
        if row not in self._known:
            self._known[row] = self._titles(row) if self.place[row] >= 0 and len(self.rows) else []
        return self._known[row]

    def _titles(self, row: int) -> list[str]:
        cosines = np.where(self.rows == row, -np.inf, (self.shown @ self.vectors[self.place[row]]).round(5))
        at = np.argpartition(-cosines, min(self.config.count, len(cosines) - 1))[: self.config.count]
        order = at[np.lexsort((at, -cosines[at]))]
        return [self.titles[n] for n in order if cosines[n] >= self.config.least]


def load_neighbours(config: NeighboursConfig, catalog: Catalog, sessions_sha256: str) -> Neighbours | None:
    """None where no run is named. Raises `UserError` (4)."""
    return None if config.run is None else Neighbours(config, catalog, sessions_sha256)
