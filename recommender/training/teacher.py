"""Provides a trained session model as the teacher of an MLLM: its scores are soft targets (P2Rec, arXiv 2406.00333).

It scores the sessions it was trained on, and its pair counts contain their next items. So the pair counts are left out of its mixture;
otherwise each session would be evidence for itself.
"""

from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.core.artifact import Version, following
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.data.session_log import SessionLog
from recommender.retrieval.saved_model import load_model
from recommender.session_model.windows import pad_prefixes


class Teacher:
    """Scores items by the session model of a run, in the rows of `item_ids`. Raises `UserError` (4) for a model of other sessions than
    `train`."""

    def __init__(self, run: Path, item_ids: list[str], train: SessionLog) -> None:
        following(run / "sbr", "sbr", "run `tpad train-sbr` there first", lambda version: self._read(run, version, item_ids, train))

    def _read(self, run: Path, version: Version, item_ids: list[str], train: SessionLog) -> None:
        if version.manifest["sessions_sha256"] != train.ids_sha256():
            raise UserError(
                f"the teacher was trained on other training sessions (distill.transfer.teacher = {run}); "
                "train it with the same data, data.protocol, data.valid and data.test, and with sbr.refit=false",
                ARTIFACT,
            )
        self.sha256 = version.manifest_sha256
        items = pq.read_table(version.path / "items.parquet", columns=["item_id"], page_checksum_verification=True)["item_id"].to_pylist()
        row_of = {item_id: row for row, item_id in enumerate(items)}
        self.rows = torch.tensor([row_of.get(item_id, -1) for item_id in item_ids])  # (N,) row of each item in the model; -1: none
        unknown = train.rows[self.rows[train.rows].numpy() < 0]
        if len(unknown):
            raise UserError(
                f"the teacher does not know item_id {item_ids[unknown[0]]!r} (distill.transfer.teacher = {run}); "
                "train it on the items of these sessions",
                ARTIFACT,
            )
        self.model = load_model(version.path).eval()
        self.model.pairs.clear()
        with torch.inference_mode():
            self.tables = self.model.tables()

    def __call__(self, prefixes: list[Tensor], candidates: Tensor) -> Tensor:
        """Returns the log-scores (n, C) of the rows `candidates` (C,) after each of n prefixes of rows."""
        items, order = self.rows[candidates.cpu()].sort()  # the catalogue of the model may have another order
        padded = pad_prefixes([self.rows[prefix.cpu()].tolist() for prefix in prefixes], self.model.config.max_prefix)
        with torch.no_grad():
            scores = self.model.scores(torch.as_tensor(padded).long(), self.tables, items=items)
        return scores[:, order.argsort()].to(candidates.device)
