"""Ranks the sessions of a file of events into a Parquet file: `tpad recommend --sessions FILE --out FILE`.

Several processes (`accelerate launch`) take consecutive ranges of the sessions, without communication, and write one file each,
`out-00000-of-00002.parquet` and so on, which Parquet readers read as one table. A Parquet file whose events are grouped by session is
read in pieces, with 8 bytes in memory for each session; any other file is read completely and grouped first.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.core.files import environment_error, replacing
from pipeline.core.progress import Steps
from pipeline.core.ray_workers import in_order, on_ray
from recommender.serving.recommender import Filters, Recommender

PIECE = 32_768  # events of a Parquet file read at a time
NEEDED = ("session_id", "item_id")
SCHEMA = pa.schema([("session_id", pa.string()), ("item_id", pa.string()), ("rank", pa.int32()), ("score", pa.float32())])


class Chunk(NamedTuple):
    """Some complete sessions."""

    names: list[str]  # session_ids
    rows: np.ndarray  # (E,) int64 rows of all their events, session after session; -1: not in the catalogue
    offsets: np.ndarray  # (S + 1,) where each session begins


class RankedChunk(NamedTuple):
    """The answers for a chunk, with the counts of `BatchSummary`."""

    table: pa.Table
    sessions: int
    popular: int
    unknown_events: int


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
    sessions: Path,
    out: Path,
    k: int = 10,
    exclude_seen: bool = False,
    filters: Filters | None = None,
    diversify: float = 0.0,
    new_items: float | None = None,
    at: int | None = None,
    share: tuple[int, int] = (0, 1),
    ray_run: Path | None = None,
) -> BatchSummary:
    """Writes the k best items of every session in `sessions` to `out`, which is replaced atomically at the end.

    Sessions are in the order of their first event, the events of a session in the order of (timestamp, row). `share` (number, count):
    only the sessions of this process, to a file named after both; files of another count in the same folder are refused, as a reader
    would get each session twice. `ray_run`: the run of `recommender`, whose model ranks on a cluster of Ray; reading and writing stay
    here, so the file has the same bytes. The other parameters are those of `Recommender.recommend`. Raises `UserError`."""
    number, processes = share
    out = destination(out, sessions, number, processes)
    count, pieces = open_events(sessions)
    first, last = (count * n // processes for n in (number, number + 1))
    popular = unknown = rows = 0
    options = (k, exclude_seen, filters, diversify, new_items, at)
    try:
        with (
            replacing(out) as temporary,
            pq.ParquetWriter(temporary, SCHEMA, compression="zstd", write_page_checksum=True) as writer,
            Steps("recommendations", last - first, show=number == 0) as shown,
        ):
            chunks = session_range(complete_sessions(pieces, recommender, sessions), first, last)
            if ray_run is None:
                ranked: Iterable[RankedChunk] = map(partial(rank_chunk, recommender, options), chunks)
            else:
                ranked = in_order(on_ray(chunk_ranker, (ray_run.absolute(), options), chunks))
            for table, names, popular_ones, unknown_ones in ranked:
                popular, unknown, rows = popular + popular_ones, unknown + unknown_ones, rows + len(table)
                writer.write_table(table)
                shown.advance(by=names)
    except OSError as error:
        raise environment_error(error, out) or UserError(
            f"cannot write: {error.strerror or error} ({out}); give another --out", DATA
        ) from None
    return BatchSummary(out, last - first, popular, unknown, rows)


def chunk_ranker(run: Path, options: tuple[Any, ...]) -> Callable[[Chunk], RankedChunk]:
    """Loads the model of a run in a worker of Ray."""
    return partial(rank_chunk, Recommender.load(run), options)


def rank_chunk(recommender: Recommender, options: tuple[Any, ...], chunk: Chunk) -> RankedChunk:
    """Ranks the items for the sessions of a chunk; `options` are the arguments of `Recommender.rank` after the sessions."""
    prefixes = [_known(chunk.rows[begin:end]) for begin, end in itertools.pairwise(chunk.offsets)]
    table = _ranked_table(recommender, chunk.names, recommender.rank(prefixes, *options))
    return RankedChunk(table, len(chunk.names), sum(not prefix for prefix in prefixes), int((chunk.rows < 0).sum()))


def destination(out: Path, sessions: Path, number: int, processes: int) -> Path:
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
    if out.resolve() == sessions.resolve():
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
            "item_id": recommender.items["item_id"].take(pa.array(best)).combine_chunks(),
            "rank": pa.array(np.concatenate([np.arange(1, n + 1) for n in lengths]), pa.int32()),
            "score": pa.array(np.concatenate([scores for _, scores in ranked]), pa.float32()),
        },
        schema=SCHEMA,
    )


# --- reading


def open_events(path: Path) -> tuple[int, Iterable[pa.Table]]:
    """Returns the number of sessions, and their events in pieces, grouped by session. Raises `UserError`."""
    begins, events = [], 0
    before: str | None = None
    for piece in read_pieces(path, ["session_id"]):
        session = _text(piece, "session_id", path, events)
        if not len(session):
            continue
        new = np.concatenate([[before is None or session[0].as_py() != before], pc.not_equal(session[1:], session[:-1])])
        begins.append(np.fromiter(map(hash, session.filter(pa.array(new)).to_pylist()), np.int64))
        before, events = session[-1].as_py(), events + len(session)
    if not events:
        raise UserError(f"no events ({path}); give one line per event", DATA)
    hashes = np.concatenate(begins)
    if len(np.unique(hashes)) == len(hashes):
        return len(hashes), read_pieces(path, [*NEEDED, "timestamp"])
    table = pa.concat_tables(read_pieces(path, [*NEEDED, "timestamp"]))
    session, _, _ = (
        *(_text(table, name, path) for name in NEEDED),
        list(_clock(table, path, 0)),
    )  # checked here: errors name rows of the file
    coded = session.dictionary_encode()  # numbered by first appearance
    return len(coded.dictionary), split_table(table.take(pa.array(np.argsort(coded.indices.to_numpy(), kind="stable"))))


def split_table(table: pa.Table) -> Iterator[pa.Table]:
    """Splits a table into pieces of at most `PIECE` rows."""
    return (pa.Table.from_batches([batch]) for batch in table.to_batches(max_chunksize=PIECE))


def complete_sessions(pieces: Iterable[pa.Table], recommender: Recommender, path: Path) -> Iterator[Chunk]:
    """Yields the sessions of the pieces, also those that continue in the next piece; their events in the order of (timestamp, row)."""
    rest, done = None, 0
    for piece in pieces:
        table = piece if rest is None else pa.concat_tables([rest, piece])
        session = _text(table, "session_id", path, done)
        begin = np.flatnonzero(np.concatenate([[True], pc.not_equal(session[1:], session[:-1])]))
        if begin[-1]:
            yield _chunk(table[: begin[-1]], begin, recommender, path, done)
        rest, done = table[begin[-1] :], done + int(begin[-1])
    assert rest is not None
    yield _chunk(rest, np.array([0, len(rest)]), recommender, path, done)


def _chunk(table: pa.Table, offsets: np.ndarray, recommender: Recommender, path: Path, before: int) -> Chunk:
    """`before`: number of events in the file before those of the table, for error messages."""
    session, item = (_text(table, name, path, before) for name in NEEDED)
    coded = item.dictionary_encode()
    rows = np.array([recommender.row.get(i, -1) for i in coded.dictionary.to_pylist()], np.int64)[coded.indices.to_numpy()]
    order = np.lexsort((*_clock(table, path, before), np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))))
    return Chunk(session.take(pa.array(offsets[:-1])).to_pylist(), rows[order], offsets)


def session_range(chunks: Iterable[Chunk], first: int, last: int) -> Iterator[Chunk]:
    """Yields the sessions `first` to `last` (exclusive) of all chunks."""
    done = 0
    for names, rows, offsets in chunks:
        begin, end = (min(max(0, number - done), len(names)) for number in (first, last))
        done += len(names)
        if begin < end:
            yield Chunk(names[begin:end], rows[offsets[begin] : offsets[end]], offsets[begin : end + 1] - offsets[begin])


def _text(table: pa.Table, name: str, path: Path, before: int = 0) -> pa.Array:
    """Returns a column of ids as text. Raises `UserError` (3) for a missing column or an empty id."""
    if name not in table.column_names:
        raise UserError(f"no column {name} ({path}; it has {', '.join(table.column_names)}); give session_id, item_id[, timestamp]", DATA)
    column = table[name].combine_chunks()
    if (empty := pc.index(pc.is_null(column), True).as_py()) >= 0:
        raise UserError(f"{name} is empty ({path} row {before + empty}); every event needs one", DATA)
    try:
        return column.cast(pa.string())
    except pa.ArrowException:
        raise UserError(f"ids are neither text nor integers ({path}, {column.type}); fix the column", DATA) from None


def _clock(table: pa.Table, path: Path, before: int) -> Iterator[np.ndarray]:
    """Yields the timestamps, (E,); nothing without such a column. Raises `UserError` (3) for an empty or unusable one."""
    if "timestamp" not in table.column_names:
        return
    column = table["timestamp"]
    empty = pc.index(pc.is_null(column, nan_is_null=True), True).as_py()
    if empty >= 0 or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_timestamp(column.type)):
        where = f"{path} row {before + empty}" if empty >= 0 else f"{path}, {column.type}"
        raise UserError(f"timestamp is not a time ({where}); give seconds or milliseconds for every event, or leave the column out", DATA)
    yield (column if not pa.types.is_timestamp(column.type) else column.cast(pa.int64())).to_numpy()


def read_pieces(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Reads a file in pieces: of Parquet the `columns` that exist, of CSV, TSV and JSON lines all columns, completely in memory.
    Ids in CSV stay text (`007` is not 7). Raises `UserError` (3)."""
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                names = file.schema_arrow.names
                selected = [name for name in columns if name in names] if set(NEEDED) <= set(names) else names  # an error names all columns
                for batch in file.iter_batches(PIECE, columns=selected):
                    yield pa.Table.from_batches([batch])
        elif kind in (".csv", ".tsv"):
            text = pa.csv.ConvertOptions(
                column_types={"session_id": pa.string(), "item_id": pa.string()},
                null_values=[""],  # `NA` is an ordinary id
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            )
            lines = pa.csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",")
            yield from split_table(pa.csv.read_csv(path, convert_options=text, parse_options=lines))
        elif kind in (".jsonl", ".ndjson", ".json"):
            yield from split_table(pa.json.read_json(path))
        else:
            raise UserError(f"unknown file type {kind!r} ({path}); give .parquet, .csv, .tsv or .jsonl", DATA)
    except FileNotFoundError:
        raise UserError(f"file not found ({path}); give an existing file", DATA) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not readable: {str(error).splitlines()[0]} ({path}); fix the file", DATA) from None
