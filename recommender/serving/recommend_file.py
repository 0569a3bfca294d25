"""Ranks the sessions of a file of events into a Parquet file, `tpad recommend --sessions FILE --out FILE`, or writes their vectors,
`--vectors FILE`, or both.

Several processes (`accelerate launch`) take consecutive ranges of the sessions, without communication, and write one file each,
`out-00000-of-00002.parquet` and so on, which Parquet readers read as one table. The files are read as `tpad prepare` reads them, and
grouped out of core.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, USAGE, UserError, note
from pipeline.core.files import environment_error, replacing
from pipeline.core.progress import Steps
from pipeline.core.ray_workers import in_order, on_ray
from pipeline.data.prepare.database import Database, database
from pipeline.data.prepare.events import SessionRules, load_events
from pipeline.data.prepare.open_tables import open_tables
from pipeline.data.prepare.sessionizer import order_sessions
from pipeline.data.prepare.table_options import Paths, Report, TableOptions
from recommender.serving.recommender import Recommender
from recommender.serving.session_vectors import vectors_schema, vectors_table

PIECE = 32_768  # events read at a time
SCHEMA = pa.schema([("session_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])


class Chunk(NamedTuple):
    """Some complete sessions."""

    names: list[str]  # session_ids
    rows: np.ndarray  # (E,) int64 rows of all their events, session after session; -1: not in the catalogue
    offsets: np.ndarray  # (S + 1,) where each session begins


class ChunkAnswer(NamedTuple):
    """The answers for a chunk, with the counts of `BatchSummary`. None: not asked for."""

    ranked: pa.Table | None
    vectors: pa.Table | None
    sessions: int
    popular: int
    unknown_events: int


@dataclass
class BatchSummary:
    """The counts of a written file, of this process."""

    out: Path | None
    vectors: Path | None
    sessions: int
    popular: int = 0  # sessions without a known item: they got the popular items
    unknown_events: int = 0
    rows: int = 0  # written to `out`


def recommend_file(
    recommender: Recommender,
    sessions: Paths,
    out: Path | None,
    share: tuple[int, int] = (0, 1),
    tables: TableOptions | None = None,
    vectors: Path | None = None,
    ray_run: Path | None = None,
    **ranking: Any,
) -> BatchSummary:
    """Writes the k best items of every session in `sessions` to `out`, and their vectors to `vectors`; None: not. Each file is replaced
    atomically at the end.

    Sessions are in the order of their first event, the events of a session in that of their times. `share` (number, count):
    only the sessions of this process, to a file named after both; files of another count in the same folder are refused, as a reader
    would get each session twice. `ray_run`: the run of `recommender`, whose model ranks on a cluster of Ray; reading and writing stay
    here, so the file has the same bytes. `ranking`: parameters of `Recommender.recommend`. Raises `UserError`."""
    number, processes = share
    if out is not None and vectors is not None and out.resolve() == vectors.resolve():
        raise UserError(f"--out and --vectors are the same file ({out}); give another --vectors", USAGE)
    out = destination(out, sessions, number, processes, "--out")
    vectors = destination(vectors, sessions, number, processes, "--vectors")
    main = out or vectors
    assert main is not None
    try:
        with database(main.parent, (tables or TableOptions()).memory) as data:
            count, sql = ordered_events(data, sessions, tables or TableOptions(), show=number == 0)
            first, last = (count * n // processes for n in (number, number + 1))
            chunks = session_range(complete_sessions(data.batches(sql, PIECE), recommender), first, last)
            if ray_run is None:
                answers: Iterable[ChunkAnswer] = map(ChunkRanker(recommender, ranking, out is not None, vectors is not None), chunks)
            else:
                answers = in_order(on_ray(load_ranker, (ray_run.absolute(), ranking), chunks))
            with (
                parquet_file(out, SCHEMA) as write_ranking,
                parquet_file(vectors, vectors_schema(recommender.ranker)) as write_vectors,
                Steps("recommendations" if out else "sessions", last - first, show=number == 0) as shown,
            ):
                summary = BatchSummary(out, vectors, last - first)
                for answer in answers:
                    summary.popular += answer.popular
                    summary.unknown_events += answer.unknown_events
                    summary.rows += write_ranking(answer.ranked)
                    write_vectors(answer.vectors)
                    shown.advance(by=answer.sessions)
    except OSError as error:
        written = " and ".join(str(path) for path in (out, vectors) if path is not None)
        raise environment_error(error, main) or UserError(
            f"cannot write: {error.strerror or error} ({written}); give another file", DATA
        ) from None
    return summary


def ordered_events(data: Database, sessions: Paths, tables: TableOptions, show: bool) -> tuple[int, str]:
    """Reads the user's log, and says how. Returns the number of its sessions, and the query of their events, session after session."""
    report = Report()
    try:
        log, _ = open_tables(data, sessions, None, tables, report)
        return order_sessions(load_events(data, log, SessionRules(), tables, report))
    finally:
        if show:
            note("\n".join(report.read_lines()))


class ChunkRanker:
    """Answers chunks of sessions: `ranking` are the arguments of `Recommender.rank` beside the sessions."""

    def __init__(self, recommender: Recommender, ranking: dict[str, Any], ranks: bool, encodes: bool) -> None:
        self.recommender, self.options, self.ranks, self.encodes = recommender, ranking, ranks, encodes
        self.item_ids = recommender.items["item_id"].combine_chunks()

    def __call__(self, chunk: Chunk) -> ChunkAnswer:
        prefixes = [_known(chunk.rows[begin:end]) for begin, end in itertools.pairwise(chunk.offsets)]
        ranked = vectors = None
        if self.ranks:
            ranked = _ranked_table(self.item_ids, chunk.names, self.recommender.rank(prefixes, **self.options))
        if self.encodes:
            vectors = vectors_table(self.recommender.ranker, self.item_ids, chunk.names, prefixes)
        return ChunkAnswer(ranked, vectors, len(chunk.names), sum(not prefix for prefix in prefixes), int((chunk.rows < 0).sum()))


def load_ranker(run: Path, ranking: dict[str, Any]) -> ChunkRanker:
    """Loads the model of a run in a worker of Ray."""
    return ChunkRanker(Recommender.load(run), ranking, ranks=True, encodes=False)


@contextmanager
def parquet_file(path: Path | None, schema: pa.Schema) -> Iterator[Callable[[Any], int]]:
    """Opens a Parquet file, which replaces `path` at the end: yields what writes a table to it and returns its rows. None: no file."""
    if path is None:
        yield lambda _: 0
        return
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer:

        def write(table: pa.Table) -> int:
            writer.write_table(table)
            return len(table)

        yield write


def destination(out: Path | None, sessions: Paths, number: int, processes: int, option: str) -> Path | None:
    """Returns the file that this process writes for an `option`; None: none. Raises `UserError` (2) for an unusable `out`, before any file
    is read."""
    if out is None:
        return None
    if (out.exists() and not out.is_file()) or not out.parent.is_dir():  # e.g. /dev/null, which root would replace
        fault = "a folder" if out.is_dir() else "no plain file" if out.exists() else "in a folder that does not exist"
        raise UserError(f"{option} is {fault} ({out}); give a file in an existing folder", USAGE)
    if processes > 1:
        shards = re.compile(rf"{re.escape(out.stem)}-\d{{5}}-of-(\d{{5}}){re.escape(out.suffix)}")
        for path in sorted(out.parent.iterdir()):
            if (shard := shards.fullmatch(path.name)) and int(shard[1]) != processes:
                raise UserError(
                    f"the folder already has the output of {int(shard[1])} processes ({path}); delete it, or give another {option}", USAGE
                )
        out = out.with_name(f"{out.stem}-{number:05d}-of-{processes:05d}{out.suffix}")
    if out.resolve() in [Path(path).resolve() for path in (sessions if isinstance(sessions, list) else [sessions])]:
        raise UserError(f"{option} and --sessions are the same file ({out}); give another {option}", USAGE)
    return out


def _known(events: np.ndarray) -> list[int]:
    return [int(row) for row in events if row >= 0]


def _ranked_table(item_ids: pa.Array, names: list[str], ranked: list[tuple[np.ndarray, np.ndarray]]) -> pa.Table:
    lengths = [len(best) for best, _ in ranked]
    best = np.concatenate([best for best, _ in ranked])
    return pa.table(
        {
            "session_id": pa.array(names, pa.string()).take(pa.array(np.repeat(np.arange(len(names)), lengths))),
            "item_id": item_ids.take(pa.array(best)),
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
