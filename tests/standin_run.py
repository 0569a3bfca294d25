"""A small data folder and a run with published embeddings, as `tpad export-embeddings` leaves it, without any MLLM."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifact import embeddings_schema, stage, write_part
from pipeline.catalog import load_catalog, load_sessions, split_by_time
from pipeline.config import Config

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
        pa.table({"item_id": [f"item-{n:03d}" for n in range(items)], "title": [f"Title {n}" for n in range(items)]}),
        data / "items.parquet",
    )
    pq.write_table(
        pa.table(dict(zip(("session_id", "item_id", "timestamp"), zip(*log, strict=True), strict=True))), data / "sessions.parquet"
    )
    return group


def publish_embeddings(run: Path, data: Path, group: np.ndarray, config: Config, seed: int = 0, **wrong: str) -> None:
    """Noisy vectors of the groups; `wrong` overrides entries of the manifest."""
    rng = np.random.default_rng(seed)
    catalog = load_catalog(data)
    train = split_by_time(load_sessions(data, catalog), config.data.valid, config.data.test).train
    halves = [
        (np.eye(GROUPS)[group] @ rng.normal(size=(GROUPS, DIM)) + 0.2 * rng.normal(size=(len(group), DIM))).astype(np.float32)
        for _ in range(2)
    ]
    vectors = [pa.FixedSizeListArray.from_arrays(pa.array(half.ravel()), DIM) for half in halves]
    flags = [pa.array([True] * len(group))] * 2
    columns = [pa.array(catalog.item_ids), *vectors, *flags, pa.array([5] * len(group), pa.int32()), pa.array([bytes(32)] * len(group))]
    table = pa.table(
        [c.cast(f.type) for c, f in zip(columns, embeddings_schema(DIM, "float32"), strict=True)], schema=embeddings_schema(DIM, "float32")
    )
    facts = {"dim": DIM, "dtype": "float32", "rows": len(group), "parts": [{"name": "part-00000.parquet", "rows": len(group)}]}
    facts |= {"catalogue_sha256": catalog.sha256, "sessions_sha256": train.ids_sha256()} | wrong
    with stage(run / "embeddings", "embeddings") as staging:
        write_part(staging.path / "part-00000.parquet", table)
        staging.publish(facts)
