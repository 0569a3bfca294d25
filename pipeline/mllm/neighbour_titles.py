"""Finds titles of similar items to show with an item that lacks its image or its text: retrieved context, as in RA-BLIP (arXiv
2410.14154).

Similarity is the cosine of the knowledge embeddings that an earlier run has published, over the items that have image and text
there; titles below a least cosine are not shown. Titles are content: no session is read, and embeddings distilled from other
training sessions are refused. One item at a time is compared with all others, so memory grows only with their number.

Training also shows them with items whose image or text is withheld, since otherwise a complete catalogue would never teach the
model to read them. Limit: such an item was embedded complete, so its neighbours are better than those of an item that lacks something.
"""

from pathlib import Path

import numpy as np

from pipeline.core.config import NeighboursConfig
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.data.catalog import Catalog
from pipeline.data.embeddings import read_embeddings


class Neighbours:
    """The neighbours of one catalogue's items in the embeddings of `config.run`. Raises `UserError` (4)."""

    def __init__(self, config: NeighboursConfig, catalog: Catalog, sessions_sha256: str) -> None:
        assert config.run is not None
        self.config = config
        embeddings = read_embeddings(Path(config.run) / "embeddings")
        self.sha256 = embeddings.version.manifest_sha256
        if embeddings.version.manifest.get("sessions_sha256") != sessions_sha256:
            raise UserError(
                f"the embeddings of the neighbours were distilled from other training sessions (data.neighbours.run = {config.run}); "
                "name a run over the same data, data.valid and data.test",
                ARTIFACT,
            )
        if "knowledge" not in embeddings.vectors:
            raise UserError(f"embeddings without a knowledge half (data.neighbours.run = {config.run}); name another run", ARTIFACT)
        place = {item_id: n for n, item_id in enumerate(embeddings.item_ids)}
        self.place = np.array([place.get(item_id, -1) for item_id in catalog.item_ids])  # (N,) row in the embeddings, or -1
        self.vectors = embeddings.knowledge / np.linalg.norm(embeddings.knowledge, axis=1, keepdims=True)
        complete = embeddings.has_image & embeddings.has_text
        rows = (row for row, position in enumerate(self.place) if position >= 0 and complete[position])
        titles = {row: title for row in rows if (title := catalog.text(row, "title"))}
        self.rows, self.titles = np.array([*titles], np.int64), [*titles.values()]  # of the items that can be shown
        self.shown = self.vectors[self.place[self.rows]]
        self._known: dict[int, list[str]] = {}

    def settings(self) -> dict[str, object]:
        """Returns what the titles depend on beside the catalogue, for fingerprints."""
        return {"embeddings": self.sha256, **self.config.model_dump(exclude={"run"})}

    def __call__(self, row: int) -> list[str]:
        """Returns titles, the nearest first; none for an item without a vector."""
        if row not in self._known:
            self._known[row] = self._titles(row) if self.place[row] >= 0 and len(self.rows) else []
        return self._known[row]

    def _titles(self, row: int) -> list[str]:
        cosines = np.where(self.rows == row, -np.inf, (self.shown @ self.vectors[self.place[row]]).round(5))
        nearest = np.argpartition(-cosines, min(self.config.count, len(cosines) - 1))[: self.config.count]
        order = nearest[np.lexsort((nearest, -cosines[nearest]))]
        return [self.titles[n] for n in order if cosines[n] >= self.config.least]


def load_neighbours(config: NeighboursConfig, catalog: Catalog, sessions_sha256: str) -> Neighbours | None:
    """Loads the neighbours; None where no run is named. Raises `UserError` (4)."""
    return None if config.run is None else Neighbours(config, catalog, sessions_sha256)
