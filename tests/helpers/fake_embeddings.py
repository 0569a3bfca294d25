"""A small data folder and a run with published embeddings, as `tpad export-embeddings` leaves it, without any MLLM."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifact import stage
from pipeline.core.config import Config
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import HALVES, embeddings_schema, vector_columns, write_part
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions

GROUPS = 6  # the next item is mostly one of the next group: what the vectors show
DIM = 8


def write_data(data: Path, items: int = 60, sessions: int = 400, cold: int = 8, seed: int = 0) -> np.ndarray:
    """Items in groups, the last `cold` of them only in late sessions; each item has one companion, known from the log alone.
    Returns the group of each item."""
    rng = np.random.default_rng(seed)
    group = np.arange(items) % GROUPS
    companion = rng.permutation(items - cold)
    data.mkdir(parents=True, exist_ok=True)
    log: list[tuple[str, str, int]] = []
    for s in range(sessions):
        allowed = items if s >= 0.8 * sessions else items - cold
        row = int(rng.integers(allowed))
        for n in range(int(rng.integers(2, 8))):
            log.append((f"s{s:04d}", f"item-{row:03d}", 1_600_000_000 + s * 1000 + n))
            following = np.flatnonzero(group[:allowed] == (group[row] + 1) % GROUPS)
            row = int(companion[row]) if row < items - cold and rng.random() < 0.4 else int(rng.choice(following))
    pq.write_table(
        pa.table(
            {
                "item_id": [f"item-{n:03d}" for n in range(items)],
                "title": [f"Title {n}" for n in range(items)],
                "colour": [("red", "blue", "grey", None)[n % 4] for n in range(items)],
                "tags": [[f"t{n % 5}", "t2"] if n % 5 == 1 else [f"t{n % 5}"] for n in range(items)],
            }
        ),
        data / "items.parquet",
    )
    pq.write_table(
        pa.table(dict(zip(("session_id", "item_id", "timestamp"), zip(*log, strict=True), strict=True))), data / "sessions.parquet"
    )
    return group


def publish_embeddings(
    run: Path,
    data: Path,
    group: np.ndarray,
    config: Config,
    seed: int = 0,
    halves: np.ndarray | None = None,
    skipped: Sequence[int] = (),
    **wrong: str,
) -> None:
    """Noisy vectors of the groups, or `halves` (2, N, D), without the rows `skipped`; `wrong` overrides entries of the manifest."""
    rng = np.random.default_rng(seed)
    catalog = load_catalog(data)
    if halves is None:
        noise = [np.eye(GROUPS)[group] @ rng.normal(size=(GROUPS, DIM)) + 0.2 * rng.normal(size=(len(group), DIM)) for _ in range(2)]
        halves = np.stack(noise).astype(np.float32)
    rows = [row for row in range(len(catalog)) if row not in skipped]
    facts = {"dim": DIM, "dtype": "float32", "rows": len(rows), "parts": [{"name": "part-00000.parquet", "rows": len(rows)}]}
    facts |= {"catalogue_sha256": catalog.sha256, "skipped": [catalog.item_ids[row] for row in skipped]} | wrong
    if "sessions_sha256" not in facts:
        facts["sessions_sha256"] = split_sessions(load_sessions(data, catalog), config.data).train.ids_sha256()
    schema = embeddings_schema(DIM, "float32")
    columns = {"item_id": [catalog.item_ids[row] for row in rows], "has_image": [True] * len(rows), "has_text": [True] * len(rows)}
    columns |= {"n_tokens": [5] * len(rows), "content_sha256": [bytes(32)] * len(rows)}
    for half, values in zip(HALVES, halves, strict=True):
        columns |= vector_columns(half, values[rows], schema)
    with stage(run / "embeddings", "embeddings") as staging:
        write_part(staging.path / "part-00000.parquet", pa.table({name: columns[name] for name in schema.names}, schema=schema))
        staging.publish(facts)
