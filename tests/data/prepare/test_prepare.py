"""Tests `prepare`: every format gives the same catalogue and sessions, dropped rows are counted, and errors write nothing."""

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.errors import DATA, ENVIRONMENT, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.prepare.prepare import PrepareOptions, PrepareSummary, prepare
from pipeline.data.prepare.table_options import TableOptions
from pipeline.data.session_log import load_sessions

ITEMS = [
    {"item_id": "7", "title": 'Lamp, "old"', "description": "line one\nline two", "colour": "red"},
    {"item_id": "08", "title": "Käse", "description": "", "colour": "blue"},
    {"item_id": "9", "title": "cold", "description": "never seen", "colour": ""},
]
EVENTS = [
    {"session_id": "s1", "item_id": "7", "timestamp": 1_500_000_000},
    {"session_id": "s2", "item_id": "08", "timestamp": 1_400_000_000},
    {"session_id": "s1", "item_id": "08", "timestamp": 1_500_000_030},
    {"session_id": "s2", "item_id": "7", "timestamp": 1_400_000_030},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Writes records in the format of the file name."""
    kind = path.name.removesuffix(".gz")
    if kind.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    if kind.endswith(".jsonl"):
        text = "".join(json.dumps(record) + "\n\n" for record in records)
    else:
        sign = "\t" if kind.endswith(".tsv") else ";" if "semicolon" in kind else ","
        rows: list[list[Any]] = [list(records[0]), *([record.get(name) for name in records[0]] for record in records)]
        text = "".join(sign.join('"' + str("" if cell is None else cell).replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows)
    data = text.encode("utf-8-sig" if kind.endswith(".csv") else "utf-8")
    path.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
    return path


def run(folder: Path, items: list[dict[str, Any]], events: list[dict[str, Any]], kind: str = "jsonl", **options: Any) -> PrepareSummary:
    out, table = options.pop("out", folder / "out"), TableOptions(columns=options.pop("columns", {}))
    return prepare(
        PrepareOptions(write(folder / f"items.{kind}", items), write(folder / f"log.{kind}", events), out, table=table, **options)
    )


def sessions(out: Path) -> dict[str, list[str]]:
    catalog = load_catalog(out)
    log = load_sessions(out, catalog)
    return {name: [catalog.item_ids[row] for row in log.session(i)] for i, name in enumerate(log.session_ids)}


def image_file(shade: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, kind)
    return buffer.getvalue()


def refused(call: Any, code: int, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


# --- formats


@pytest.mark.parametrize("kind", ["csv", "semicolon.csv", "tsv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_data(tmp_path: Path, kind: str) -> None:
    summary = run(tmp_path, ITEMS, EVENTS, kind)
    catalog = load_catalog(tmp_path / "out")
    assert catalog.columns == ["title", "description", "colour"]
    texts = [[catalog.text(row, name) for name in ("title", "description", "colour")] for row in range(3)]
    assert texts == [[item["title"], item["description"], item["colour"]] for item in ITEMS]
    assert catalog.item_ids == ["7", "08", "9"]
    assert list(sessions(tmp_path / "out").items()) == [("s2", ["08", "7"]), ("s1", ["7", "08"])]
    assert (summary.items, summary.cold, summary.sessions, summary.events, summary.dropped) == (3, 1, 2, 4, {})


def test_output_is_the_contract_and_the_same_bytes_twice(tmp_path: Path) -> None:
    items = [item | {"image": image_file(n)} for n, item in enumerate(ITEMS)]
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        run(tmp_path, items, EVENTS, "parquet", out=out)
    schema = pq.read_schema(outs[0] / "items.parquet")
    assert schema.field("item_id").type == schema.field("title").type == pa.string()
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pq.read_schema(outs[0] / "sessions.parquet")
    assert (schema.names, schema.field("timestamp").type) == (["session_id", "item_id", "timestamp"], pa.int64())
    for name in ("items.parquet", "sessions.parquet"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    assert sorted(os.listdir(outs[0])) == ["items.parquet", "sessions.parquet"]


def test_other_names_of_columns_and_integer_ids(tmp_path: Path) -> None:
    items = [{"movieId": n, "Name": f"film {n}", "year": 1990 + n} for n in range(3)]
    events = [{"SessionId": 5, "movieId": n, "time": 100 + n} for n in range(3)]
    summary = run(tmp_path, items, events, "parquet")
    assert sessions(tmp_path / "out") == {"5": ["0", "1", "2"]}
    assert load_catalog(tmp_path / "out").columns == ["title", "year"]
    assert "`movieId` as item_id, `Name` as title" in "\n".join(summary.lines())


def test_chosen_columns_come_first(tmp_path: Path) -> None:
    items = [{"item_id": "wrong", "code": f"c{n}", "title": "t"} for n in range(2)]
    events = [{"item_id": f"c{n}", "session_id": "s", "visit": f"v{n // 2}", "timestamp": n} for n in (0, 1)]
    run(tmp_path, items, events, columns={"item_id": "code", "session_id": "visit"})
    assert sessions(tmp_path / "out") == {"v0": ["c0", "c1"]}
    refused(lambda: run(tmp_path, items, events, columns={"session_id": "nope"}), USAGE, "nope", "visit")
    refused(lambda: run(tmp_path, items, events, columns={"colour": "code"}), USAGE, "colour")


def test_ids_made_float_by_gaps_are_whole_again(tmp_path: Path) -> None:
    items = [{"item_id": n, "title": "t"} for n in (1, 2)]
    events = [{"session_id": "s", "item_id": item, "timestamp": n} for n, item in enumerate([1.0, None, 2.0])]
    summary = run(tmp_path, items, events, "parquet")
    assert sessions(tmp_path / "out") == {"s": ["1", "2"]}
    assert summary.dropped == {"events without item_id": 1}


# --- order and sessions


def test_position_instead_of_time_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [("late", 2, "7"), ("late", 1, "08"), ("early", 10, "7"), ("early", 9, "7"), ("early", 11, "08")]
    events = [{"session_id": session, "position": place, "item_id": item} for session, place, item in rows]
    summary = run(tmp_path, ITEMS, events, "csv")
    assert list(sessions(tmp_path / "out").items()) == [("late", ["08", "7"]), ("early", ["7", "7", "08"])]
    assert "numbered instead of timed" in "\n".join(summary.lines())


def test_position_decides_between_equal_times(tmp_path: Path) -> None:
    events = [{"session_id": "s", "item_id": item, "timestamp": 5, "position": place} for item, place in (("7", 2), ("08", 1))]
    run(tmp_path, ITEMS, events)
    assert sessions(tmp_path / "out") == {"s": ["08", "7"]}


def test_users_are_cut_into_sessions_at_pauses(tmp_path: Path) -> None:
    minutes = {"u": [0, 10, 40, 71, 80], "v": [75, 76]}
    events = [
        {"user_id": user, "item_id": "7", "timestamp": 1_500_000_000 + 60 * m} for user, times in minutes.items() for m in reversed(times)
    ]
    run(tmp_path, ITEMS, events)
    assert {name: len(items) for name, items in sessions(tmp_path / "out").items()} == {"u-0": 3, "u-1": 2, "v-0": 2}
    table = pq.read_table(tmp_path / "out" / "sessions.parquet")
    owners = dict(zip(table["session_id"].to_pylist(), table["user_id"].to_pylist(), strict=True))
    assert owners == {"u-0": "u", "u-1": "u", "v-0": "v"}  # so that `data.protocol: user-hash` keeps a user's sessions together
    run(tmp_path, ITEMS, events, session_gap_minutes=31)
    assert {name: len(items) for name, items in sessions(tmp_path / "out").items()} == {"u-0": 5, "v-0": 2}


@pytest.mark.parametrize(
    "times",
    [
        [1_500_000_000_500, 1_500_000_000_700],
        ["1500000000", "1500000001"],
        [1_500_000_000.7, 1_500_000_000.9],
        ["2017-07-14T02:40:00Z", "2017-07-14T04:40:01+02:00"],
        ["2017-07-14 02:40:00", "2017-07-14 02:40:00.5"],
        [1_500_000_000_000_000, 1_500_000_000_000_001],
        [1_500_000_000_000_000_000, 1_500_000_000_000_000_001],
    ],
)
def test_times_of_any_kind(tmp_path: Path, times: list[Any]) -> None:
    events = [{"session_id": "s", "item_id": item, "timestamp": time} for item, time in zip(("7", "08"), reversed(times), strict=True)]
    run(tmp_path, ITEMS, events)
    assert sessions(tmp_path / "out") == {"s": ["08", "7"]}
    assert pq.read_table(tmp_path / "out" / "sessions.parquet")["timestamp"][0].as_py() == 1_500_000_000


@pytest.mark.parametrize("kind", [int, float, str])
def test_days_written_as_numbers_are_days(tmp_path: Path, kind: type) -> None:
    """Read as seconds, all of a user's days would be one session."""
    events = [{"user_id": "u", "item_id": item, "date": kind(day)} for day in (20240228, 20240301) for item in ("7", "08")]
    summary = run(tmp_path, ITEMS, events)
    assert sessions(tmp_path / "out") == {"u-0": ["7", "08"], "u-1": ["7", "08"]}
    times = pq.read_table(tmp_path / "out" / "sessions.parquet")["timestamp"].unique().to_pylist()
    assert np.array(times, "datetime64[s]").astype(str).tolist() == ["2024-02-28T00:00:00", "2024-03-01T00:00:00"]
    assert any("times are days" in note for note in summary.notes)


def test_the_users_of_named_sessions_are_kept(tmp_path: Path) -> None:
    run(tmp_path, ITEMS, [event | {"user_id": "u" if event["session_id"] == "s1" else None} for event in EVENTS])
    table = pq.read_table(tmp_path / "out" / "sessions.parquet")
    owners = dict(zip(table["session_id"].to_pylist(), table["user_id"].to_pylist(), strict=True))
    assert owners == {"s1": "u", "s2": "s2"}  # a session without user_id is a user of its own
    summary = run(tmp_path, ITEMS, [event | {"user_id": 1.5} for event in EVENTS])  # users are optional, so this is no error
    assert "user_id" not in pq.read_table(tmp_path / "out" / "sessions.parquet").column_names
    assert any("users left out" in note for note in summary.notes)


def test_losses_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [("s", item) for item in ("7", "7", "08", "unknown", "7", "08", "9")] + [("one", "7"), ("", "7"), ("s", "")]
    events = [{"session_id": session, "item_id": item, "timestamp": n} for n, (session, item) in enumerate(rows)]
    summary = run(tmp_path, ITEMS, events, min_item_count=2, max_session_length=4)
    assert sessions(tmp_path / "out") == {"s": ["7", "08", "7", "08"]}
    assert summary.dropped == {
        "events without session_id": 1,
        "events without item_id": 1,
        "events of items that are not in the catalogue": 1,
        "events of items with fewer than 2 events": 1,
        "events before the last 4 of a session": 1,
        "sessions of one event": 1,
    }
    assert (summary.items, summary.cold, summary.events) == (3, 1, 4)


# --- images


def test_plain_bytes_paths_and_a_folder_give_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "7.JPG").write_bytes(image_file(70, "JPEG"))
    (folder / "08.webp").write_bytes(image_file(80, "WEBP"))
    (folder / "stray.png").write_bytes(image_file())
    summary = run(tmp_path, ITEMS, EVENTS, images=folder)
    assert (summary.images, [load_catalog(tmp_path / "out").has_image(row) for row in range(3)]) == (2, [True, True, False])
    assert any("no item_id names" in reason for reason in summary.dropped)

    linked = [item | {"image": path} for item, path in zip(ITEMS, ["images/7.JPG", "", "images/08.webp"], strict=True)]
    for kind in ("csv", "jsonl", "parquet"):
        run(tmp_path, linked, EVENTS, kind)
        catalog = load_catalog(tmp_path / "out")
        assert [catalog.image_bytes(row) for row in range(3)] == [(folder / "7.JPG").read_bytes(), None, (folder / "08.webp").read_bytes()]

    run(tmp_path, [item | {"image": image_file(n)} for n, item in enumerate(ITEMS)], EVENTS, "parquet")
    assert [load_catalog(tmp_path / "out").image_bytes(row) for row in range(3)] == [image_file(n) for n in range(3)]


def test_a_bad_image_stops_or_is_left_out_as_asked(tmp_path: Path) -> None:
    items = [item | {"image": data} for item, data in zip(ITEMS, [image_file(), image_file(1, "JPEG")[:-60], image_file(2)], strict=True)]
    refused(lambda: run(tmp_path, items, EVENTS, "parquet"), DATA, "image", "items.parquet row 1")
    summary = run(tmp_path, items, EVENTS, "parquet", on_bad_image="text_only")
    assert (summary.images, summary.dropped) == (2, {"images that are missing or cannot be decoded (e.g. of '08')": 1})
    assert not load_catalog(tmp_path / "out").has_image(1)
    refused(lambda: run(tmp_path, items, EVENTS, "parquet", on_bad_image="skip"), USAGE, "--on-bad-image skip", "error or text_only")


def test_image_paths_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(image_file())
    (tmp_path / "data").mkdir()
    for path in ("../secret.png", str(tmp_path / "secret.png"), "https://example.org/a.png"):
        refused(lambda path=path: run(tmp_path / "data", [ITEMS[0] | {"image": path}, *ITEMS[1:]], EVENTS), DATA, "items.jsonl line 1")


# --- errors


def test_errors_name_the_line_and_write_nothing(tmp_path: Path) -> None:
    run(tmp_path, ITEMS, EVENTS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad_time = [*EVENTS[:2], EVENTS[2] | {"timestamp": "yesterday"}]
    cases: list[tuple[Any, list[str]]] = [
        (lambda: run(tmp_path, [*ITEMS, ITEMS[0]], EVENTS, "csv"), ["'7'", "items.csv line 6", "items.csv line 2"]),
        (lambda: run(tmp_path, [*ITEMS, ITEMS[0]], EVENTS), ["'7'", "items.jsonl line 7", "items.jsonl line 1"]),
        (lambda: run(tmp_path, [*ITEMS, ITEMS[0] | {"item_id": " "}], EVENTS, "csv"), ["empty", "items.csv line 6"]),
        (lambda: run(tmp_path, [{"title": "t"}], EVENTS), ["`item_id`", "missing", "--column"]),
        (lambda: run(tmp_path, [{"item_id": "7"}], EVENTS), ["`title`", "missing"]),
        (lambda: run(tmp_path, ITEMS, [{"item_id": "7", "timestamp": 1}]), ["--column session_id=NAME", "--column user_id=NAME"]),
        (lambda: run(tmp_path, ITEMS, [{"item_id": "7", "user_id": 1}]), ["`timestamp`", "missing"]),
        (lambda: run(tmp_path, ITEMS, bad_time, "csv"), ["'yesterday'", "log.csv line 4"]),
        (lambda: run(tmp_path, ITEMS, [EVENTS[0] | {"item_id": "x"}]), ["no event is of an item", "'x'"]),
        (lambda: run(tmp_path, ITEMS, EVENTS[:2]), ["no session has two"]),
        (lambda: run(tmp_path, ITEMS, [event | {"session_id": None} for event in EVENTS]), ["no event has both session_id"]),
        (lambda: run(tmp_path, ITEMS, [event | {"session_id": "x" * 513} for event in EVENTS]), ["session_id", "512"]),
        (lambda: run(tmp_path, ITEMS, [event | {"timestamp": True} for event in EVENTS]), ["`timestamp`", "'true'", "not a time"]),
        (lambda: run(tmp_path, [{"item_id": 1.5, "title": "t"}], EVENTS), ["1.5", "line 1"]),
        (lambda: run(tmp_path, ITEMS, EVENTS, images=tmp_path / "none"), ["image folder not found"]),
        (lambda: run(tmp_path, ITEMS, [EVENTS[0] | {"timestamp": float("inf")}, *EVENTS[1:]], "parquet"), ["not finite", "row 0"]),
        (lambda: run(tmp_path, [{"item_id": 1e20, "title": "t"}], EVENTS), ["1e+20", "line 1", "strings"]),
    ]
    for call, words in cases:
        refused(call, DATA, *words)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("items.csv", b"item_id,title\na,b\nc\n", ["Expected 2 columns"]),
        ("items.csv", b"item_id,title\na,\xff\xfe\n", ["UTF"]),
        ("items.csv", b"", ["no header"]),
        ("items.csv", b"item_id,title,title\na,b,c\n", ["`title`", "duplicated"]),
        ("items.csv", b"item_id,title\n", ["no items"]),
        ("items.csv.gz", b"not gzip", ["items.csv.gz"]),
        ("items.csv.gz", gzip.compress(b"item_id,title\na,b\n", mtime=0)[:10] + b"damaged" * 9, ["items.csv.gz"]),
        ("items.jsonl", b'{"item_id": "a"\n', ["line 1"]),
        ("items.jsonl", b"[1]\n", ["line 1", "object"]),
        ("items.jsonl.gz", gzip.compress(b'{"item_id": "a", "title": "b"}\n' * 99, mtime=0)[:-9], ["items.jsonl.gz"]),
        ("items.parquet", b"PAR1", ["Parquet"]),
        ("items.xlsx", b"", ["unknown kind"]),
    ],
)
def test_faulty_files_are_one_line(tmp_path: Path, name: str, data: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    options = PrepareOptions(tmp_path / name, write(tmp_path / "log.csv", EVENTS), tmp_path / "out")
    refused(lambda: prepare(options), DATA, *words)
    assert not (tmp_path / "out").exists()


def test_errors_in_a_list_of_json_name_the_row_and_the_file(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", EVENTS)
    items = tmp_path / "items.json"
    items.write_text(json.dumps([*ITEMS, ITEMS[0]], indent=1))  # a row has several lines
    refused(lambda: prepare(PrepareOptions(items, log, tmp_path / "out")), DATA, "'7'", "items.json row 3", "items.json row 0")
    items.write_text(items.read_text()[:-5])
    with pytest.raises(UserError) as caught:
        prepare(PrepareOptions(items, log, tmp_path / "out"))
    assert str(items) in str(caught.value) and ".prepare-" not in str(caught.value)  # not the name of a temporary copy


def test_missing_input_and_unusable_output(tmp_path: Path) -> None:
    log = write(tmp_path / "log.csv", EVENTS)
    refused(lambda: prepare(PrepareOptions(tmp_path / "no.csv", log, tmp_path / "out")), DATA, "no.csv", "not found")
    refused(lambda: run(tmp_path, ITEMS, EVENTS, out=log), ENVIRONMENT, "log.csv", "cannot write")
    refused(lambda: run(tmp_path, ITEMS, EVENTS, min_item_count=0), USAGE)


def test_a_log_and_catalogue_in_place(tmp_path: Path) -> None:
    """The output of one run is the input of the next, in the same folder."""
    run(tmp_path, ITEMS, EVENTS)
    out = tmp_path / "out"
    before = sessions(out)
    prepare(PrepareOptions(out / "items.parquet", out / "sessions.parquet", out))
    assert sessions(out) == before


# --- a real data set

MOVIELENS = os.environ.get("TPAD_MOVIELENS")


@pytest.mark.skipif(
    MOVIELENS is None, reason="TPAD_MOVIELENS does not name a folder with items.parquet (with posters) and interactions.parquet"
)
def test_movielens(tmp_path: Path) -> None:
    """The counts in the description of the data set: 9,321 films, 143,816 events, 5,266 sessions of two or more."""
    folder = Path(MOVIELENS or "")
    options = PrepareOptions(folder / "items.parquet", folder / "interactions.parquet", tmp_path)
    summary = prepare(options)
    assert (summary.items, summary.images, summary.sessions) == (9321, 9321, 5266)
    assert summary.events + summary.dropped["sessions of one event"] == 143_816
    catalog = load_catalog(tmp_path)
    log = load_sessions(tmp_path, catalog)
    assert (len(log), log.dropped, len(np.unique(log.rows))) == (5266, 0, summary.items - summary.cold)
    poster = catalog.image(9000)
    assert poster is not None and max(poster.size) <= 128
