"""`tpad recommend --sessions FILE --out FILE`: a file of events in, a Parquet file of ranked items out, in chunks.

Several processes (`accelerate launch`) take a stretch of the sessions each, without a word between them, and leave a file
each, `out-00000-of-00002.parquet` and so on: one table, in this order, to whatever reads Parquet. The events are held in
memory as integers, 8 bytes for each event, and the names of the sessions; the answers are not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.artifact import environment_error, replacing
from pipeline.errors import DATA, UserError
from recommender.recommend import Filters, Recommender

CHUNK = 8192  # sessions
SCHEMA = pa.schema([("session_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])


@dataclass(frozen=True)
class BatchSummary:
    out: Path
    sessions: int
    popular: int  # sessions of which nothing was known: they got the popular items
    unknown_events: int
    rows: int  # written


def recommend_file(
    recommender: Recommender,
    sessions: Path,
    out: Path,
    k: int = 10,
    exclude_seen: bool = False,
    filters: Filters | None = None,
    diversify: float = 0.0,
    share: tuple[int, int] = (0, 1),
) -> BatchSummary:
    """Sessions by first appearance, events by (timestamp, row). `out` is replaced whole at the end, or not at all. `share`
    (number, count): only this process's sessions, to a file named after both."""
    session_ids, events, offsets = read_sessions(sessions, recommender)
    number, count = share
    if count > 1:
        out = out.with_name(f"{out.stem}-{number:05d}-of-{count:05d}{out.suffix}")
    first, last = (len(session_ids) * n // count for n in (number, number + 1))
    popular = rows = 0
    try:
        with replacing(out) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
            for start in range(first, last, CHUNK):
                names = session_ids[start : min(start + CHUNK, last)]
                prefixes = [_known(events[offsets[n] : offsets[n + 1]]) for n in range(start, start + len(names))]
                popular += sum(not prefix for prefix in prefixes)
                table = _ranked_table(recommender, names, recommender.rank(prefixes, k, exclude_seen, filters, diversify))
                writer.write_table(table)
                rows += len(table)
    except OSError as error:
        raise environment_error(error, out) or UserError(
            f"cannot write: {error.strerror or error} ({out}); give another --out", DATA
        ) from None
    return BatchSummary(out, last - first, popular, int((events[offsets[first] : offsets[last]] < 0).sum()), rows)


def _known(events: np.ndarray) -> list[int]:
    return [int(row) for row in events if row >= 0]


def _ranked_table(recommender: Recommender, names: list[str], ranked: list[tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    lengths = [len(best) for best, _ in ranked]
    best = np.concatenate([best for best, _ in ranked])
    return pa.table(
        {
            "session_id": pa.array(names, pa.string()).take(pa.array(np.repeat(np.arange(len(names)), lengths))),
            "item_id": pa.array(recommender.item_ids, pa.string()).take(pa.array(best)),
            "rank": pa.array(np.concatenate([np.arange(1, n + 1) for n in lengths]), pa.int32()),
            "score": pa.array(np.concatenate([scores for _, scores in ranked]), pa.float32()),
        },
        schema=SCHEMA,
    )


def read_sessions(path: Path, recommender: Recommender) -> tuple[list[str], np.ndarray, np.ndarray]:
    """session_ids, the rows of all events session after session (-1: not in the catalogue), and where each session begins."""
    table = read_events(path)
    for name in ("session_id", "item_id"):
        if name not in table.column_names:
            raise UserError(
                f"no column {name} ({path}; it has {', '.join(table.column_names)}); give session_id, item_id[, timestamp]", DATA
            )
        empty = pc.index(pc.is_null(table[name]), True).as_py()
        if empty >= 0:
            raise UserError(f"{name} is empty ({path} row {empty}); every event needs one", DATA)
    if not len(table):
        raise UserError(f"no events ({path}); give one line per event", DATA)
    session = _text(table["session_id"], path).dictionary_encode().combine_chunks()
    item = _text(table["item_id"], path).dictionary_encode().combine_chunks()
    rows = np.array([recommender.row.get(i, -1) for i in item.dictionary.to_pylist()], np.int64)[item.indices.to_numpy()]
    number = session.indices.to_numpy().astype(np.int64)
    order = np.lexsort((*_clock(table, path), number))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=len(session.dictionary)))])
    return session.dictionary.to_pylist(), rows[order], offsets


def _text(column: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    try:
        return pa.chunked_array([pa.concat_arrays(column.cast(pa.string()).chunks)])
    except pa.ArrowException:
        raise UserError(f"ids are neither text nor whole numbers ({path}, {column.type}); mend the column", DATA) from None


def _clock(table: pa.Table, path: Path) -> Iterator[np.ndarray]:
    """The order inside a session: nothing, or the timestamps."""
    if "timestamp" not in table.column_names:
        return
    column = table["timestamp"]
    empty = pc.index(pc.is_null(column), True).as_py()
    if empty >= 0 or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_timestamp(column.type)):
        where = f"{path} row {empty}" if empty >= 0 else f"{path}, {column.type}"
        raise UserError(f"timestamp is no time ({where}); give seconds or milliseconds for every event, or leave the column out", DATA)
    yield (column if not pa.types.is_timestamp(column.type) else column.cast(pa.int64())).to_numpy()


def read_events(path: Path) -> pa.Table:
    """Parquet, CSV or JSON lines, by the file's name; ids in CSV stay text (`007` is not 7)."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            return pq.read_table(path)
        if kind in (".csv", ".tsv"):
            text = pa.csv.ConvertOptions(
                column_types={"session_id": pa.string(), "item_id": pa.string()}, strings_can_be_null=True, quoted_strings_can_be_null=False
            )
            return pa.csv.read_csv(path, convert_options=text, parse_options=pa.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ","))
        if kind in (".jsonl", ".ndjson", ".json"):
            return pa.json.read_json(path)
    except FileNotFoundError:
        raise UserError(f"file not found ({path}); give an existing file", DATA) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not readable: {str(error).splitlines()[0]} ({path}); mend the file", DATA) from None
    raise UserError(f"unknown kind of file {kind!r} ({path}); give .parquet, .csv, .tsv or .jsonl", DATA)
