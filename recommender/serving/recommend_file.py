"""Ranks the sessions of a file of events into a Parquet file: `tpad recommend --sessions FILE --out FILE`.

Several processes (`accelerate launch`) take consecutive ranges of the sessions, without communication, and write one file each,
`out-00000-of-00002.parquet` and so on, which Parquet readers read as one table. The files are read as `tpad prepare` reads them, and
grouped out of core.
"""

import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, USAGE, UserError, printable
from pipeline.core.files import environment_error, replacing
from pipeline.core.progress import Steps
from pipeline.data.prepare.database import database
from pipeline.data.prepare.events import SessionRules, load_events
from pipeline.data.prepare.open_tables import open_tables
from pipeline.data.prepare.sessionizer import order_sessions
from pipeline.data.prepare.table_options import Paths, Report, TableOptions
from recommender.serving.recommender import Filters, Recommender

PIECE = 32_768  # events read at a time
SCHEMA = pa.schema([("session_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])


class Chunk(NamedTuple):
    """Some complete sessions."""

    names: list[str]  # session_ids
    rows: np.ndarray  # (E,) int64 rows of all their events, session after session; -1: not in the catalogue
    offsets: np.ndarray  # (S + 1,) where each session begins


@dataclass(frozen=True)
class BatchSummary:
    """The counts of a written file, of this process."""

    out: Path
    sessions: int
    popular: int  # sessions without a known item: they got the popular items
    unknown_events: int
    rows: int  # written


def recommend_file(
    recommender: Recommender,
    sessions: Paths,
    out: Path,
    k: int = 10,
    exclude_seen: bool = False,
    filters: Filters | None = None,
    diversify: float = 0.0,
    new_items: float | None = None,
    at: int | None = None,
    share: tuple[int, int] = (0, 1),
    tables: TableOptions | None = None,
) -> BatchSummary:
    """Writes the k best items of every session in `sessions` to `out`, which is replaced atomically at the end.

    Sessions are in the order of their first event, the events of a session in that of their times. `share` (number, count):
    only the sessions of this process, to a file named after both; files of another count in the same folder are refused, as a reader
    would get each session twice. The other parameters are those of `Recommender.recommend`. Raises `UserError`."""
    number, processes = share
    out, tables = destination(out, sessions, number, processes), tables or TableOptions()
    report = Report()
    popular = unknown = written = 0
    try:
        with database(out.parent, tables.memory) as data:
            try:
                log, _ = open_tables(data, sessions, None, tables, report)
                count, sql = order_sessions(load_events(data, log, SessionRules(), tables, report))
            finally:
                if number == 0:
                    print(printable("\n".join(report.read_lines())), file=sys.stderr)
            first, last = (count * n // processes for n in (number, number + 1))
            with (
                replacing(out) as temporary,
                pq.ParquetWriter(temporary, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
                Steps("recommendations", last - first, show=number == 0) as shown,
            ):
                for chunk in session_range(complete_sessions(data.batches(sql, PIECE), recommender), first, last):
                    prefixes = [_known(chunk.rows[begin:end]) for begin, end in itertools.pairwise(chunk.offsets)]
                    popular += sum(not prefix for prefix in prefixes)
                    unknown += int((chunk.rows < 0).sum())
                    ranked = recommender.rank(prefixes, k, exclude_seen, filters, diversify, new_items, at)
                    table = _ranked_table(recommender, chunk.names, ranked)
                    writer.write_table(table)
                    written += len(table)
                    shown.advance(by=len(chunk.names))
    except OSError as error:
        raise environment_error(error, out) or UserError(
            f"cannot write: {error.strerror or error} ({out}); give another --out", DATA
        ) from None
    return BatchSummary(out, last - first, popular, unknown, written)


def destination(out: Path, sessions: Paths, number: int, processes: int) -> Path:
    """Returns the file that this process writes. Raises `UserError` (2) for an unusable `out`, before any file is read."""
    if out.is_dir() or not out.parent.is_dir():
        fault = "a folder" if out.is_dir() else "in a folder that does not exist"
        raise UserError(f"--out is {fault} ({out}); give a file in an existing folder", USAGE)
    if processes > 1:
        shards = re.compile(rf"{re.escape(out.stem)}-\d{{5}}-of-(\d{{5}}){re.escape(out.suffix)}")
        for path in sorted(out.parent.iterdir()):
            if (shard := shards.fullmatch(path.name)) and int(shard[1]) != processes:
                raise UserError(
                    f"the folder already has the output of {int(shard[1])} processes ({path}); delete it, or give another --out", USAGE
                )
        out = out.with_name(f"{out.stem}-{number:05d}-of-{processes:05d}{out.suffix}")
    if out.resolve() in [Path(path).resolve() for path in (sessions if isinstance(sessions, list) else [sessions])]:
        raise UserError(f"--out and --sessions are the same file ({out}); give another --out", USAGE)
    return out


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


# --- reading


def complete_sessions(pieces: Iterable[pa.Table], recommender: Recommender) -> Iterator[Chunk]:
    """Yields the sessions of the pieces, also those that continue in the next piece. The events are in order, session after session."""
    rest = None
    for piece in pieces:
        table = (piece if rest is None else pa.concat_tables([rest, piece])).combine_chunks()
        session = table["session_id"].chunk(0)
        begin = np.flatnonzero(np.concatenate([[True], pc.not_equal(session[1:], session[:-1])]))
        if begin[-1]:
            yield _chunk(table[: begin[-1]], begin, recommender)
        rest = table[begin[-1] :]
    assert rest is not None
    yield _chunk(rest, np.array([0, len(rest)]), recommender)


def _chunk(table: pa.Table, offsets: np.ndarray, recommender: Recommender) -> Chunk:
    rows = np.array([recommender.row.get(item_id, -1) for item_id in table["item_id"].to_pylist()], np.int64)
    return Chunk(table["session_id"].take(pa.array(offsets[:-1])).to_pylist(), rows, offsets)


def session_range(chunks: Iterable[Chunk], first: int, last: int) -> Iterator[Chunk]:
    """Yields the sessions `first` to `last` (exclusive) of all chunks."""
    done = 0
    for names, rows, offsets in chunks:
        begin, end = (min(max(0, number - done), len(names)) for number in (first, last))
        done += len(names)
        if begin < end:
            yield Chunk(names[begin:end], rows[offsets[begin] : offsets[end]], offsets[begin : end + 1] - offsets[begin])
