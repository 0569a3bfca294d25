"""Reads the rows of the previous version whose content is unchanged, for `tpad export-embeddings --update`."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.artifact import Version
from pipeline.data.embeddings import read_part


class PreviousVersion:
    """The version that is updated: its content hashes and vectors, by the rows of the new catalogue."""

    def __init__(self, version: Version, item_ids: list[str]) -> None:
        self.version = version
        self.parts = [(version.path / part["name"], part["rows"]) for part in version.manifest["parts"]]
        self.bounds = np.cumsum([0, *(rows for _, rows in self.parts)])
        columns = ["item_id", "content_sha256"]
        table = pa.concat_tables([pq.read_table(path, columns=columns, page_checksum_verification=True) for path, _ in self.parts])
        self.place = (
            pc.index_in(pa.array(item_ids, pa.string()), table["item_id"]).fill_null(-1).to_numpy()
        )  # (N,) row in the version, or -1
        self.contents = np.frombuffer(b"".join(table["content_sha256"].to_pylist()), np.uint8).reshape(-1, 32)
        self._read: tuple[int, pa.Table] | None = None

    def contents_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the content hashes (n, 32); zeros for items that the version lacks."""
        place = self.place[rows]
        return np.where(place[:, None] < 0, np.uint8(0), self.contents[place])

    def take(self, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
        """Returns the rows of the version for `rows`, all of which it has, in that order."""
        place = self.place[rows]
        number = np.searchsorted(self.bounds, place, side="right") - 1
        order = np.argsort(number, kind="stable")
        tables = [self._part(n, schema).take(place[number == n] - self.bounds[n]) for n in np.unique(number)]
        return pa.concat_tables(tables).take(np.argsort(order))

    def _part(self, number: int, schema: pa.Schema) -> pa.Table:
        if self._read is None or self._read[0] != number:
            path, rows = self.parts[number]
            self._read = number, read_part(path, schema, rows, "run `tpad export-embeddings` without --update first")
        return self._read[1]
