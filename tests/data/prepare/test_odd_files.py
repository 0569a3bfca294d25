"""Tests the kinds of files that people have trouble with: each comes out right, or is refused in one line; never wrong in silence."""

import bz2
import codecs
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.prepare.prepare import PrepareOptions, PrepareSummary, prepare
from pipeline.data.prepare.table_options import TableOptions
from pipeline.data.session_log import load_sessions

BEGIN = 1_709_287_200  # 2024-03-01 10:00:00
LOG = "session_id,item_id,timestamp\n" + "".join(f"s{n},{n + m},{BEGIN + 100 * n + m}\n" for n in range(4) for m in range(3))
ITEMS = [(str(n), f"Thing {n}", "1.5") for n in range(8)]


def table(rows: list[tuple[str, ...]], sign: str = ",") -> str:
    return "".join(sign.join(row) + "\n" for row in [("item_id", "title", "price"), *rows])


class Shop:
    """Runs `prepare` on files of these contents."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.summary = folder, folder / "out", PrepareSummary()

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def prepare(self, log: Any, items: Any = None, columns: dict[str, str] | None = None, **options: Any) -> dict[str, list[str]]:
        """Returns session -> items, as training reads them."""
        if isinstance(log, str | bytes):
            log = self.file("log.csv", log)
        if isinstance(items, str | bytes):
            items = self.file("items.csv", items)
        self.summary = PrepareSummary()
        of_prepare = {name: options.pop(name) for name in list(options) if name in PrepareOptions.__dataclass_fields__}
        prepare(PrepareOptions(items, log, self.out, table=TableOptions(columns=columns or {}, **options), **of_prepare), self.summary)
        catalog = load_catalog(self.out)
        sessions = load_sessions(self.out, catalog)
        return {name: [catalog.item_ids[row] for row in sessions.session(i)] for i, name in enumerate(sessions.session_ids)}

    def refuse(self, code: int, *words: str, **arguments: Any) -> None:
        with pytest.raises(UserError) as caught:
            self.prepare(**arguments)
        assert caught.value.code == code and "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    def times(self) -> list[int]:
        return list(pq.read_table(self.out / "sessions.parquet")["timestamp"].to_pylist())

    def items(self) -> dict[str, list[Any]]:
        return dict(pq.read_table(self.out / "items.parquet").to_pydict())

    def said(self, *words: str) -> None:
        lines = "\n".join(self.summary.lines())
        assert all(word in lines for word in words), lines


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


# --- forms of files


def test_a_file_without_header_is_refused_and_read_with_names(shop: Shop) -> None:
    log = shop.file("clicks.dat", LOG.partition("\n")[2].replace(str(BEGIN), "2024-03-01T10:00:00.277Z"))
    shop.refuse(DATA, "no header", "clicks.dat line 1", "--names", log=log)
    assert len(shop.prepare(LOG.partition("\n")[2], names=[["session_id", "item_id", "timestamp"]])) == 4
    assert shop.summary.events == 12
    shop.refuse(USAGE, "--names", "no effect", log=LOG, names=[["a", "b"]])


def test_quotes_are_letters_where_they_do_not_enclose_cells(shop: Shop) -> None:
    open_title = [*ITEMS[:3], ("3", '"Weird Al" mug', "1.5"), *ITEMS[4:6], ("6", '"never closed', "1.5"), ITEMS[7]]
    for name, sign in (("items.tsv", "\t"), ("items.csv", ",")):
        shop.prepare(LOG, shop.file(name, table(open_title, sign)))
        assert shop.items()["title"] == [title for _, title, _ in open_title]
    quoted = [tuple(f'"{cell}"' for cell in row) for row in ITEMS]
    shop.prepare(LOG, shop.file("items.tsv", table(quoted, "\t")))  # type: ignore[arg-type]
    assert shop.items()["title"] == [title for _, title, _ in ITEMS]


def test_a_quote_that_swallows_rows_is_refused_at_its_line(shop: Shop) -> None:
    rows = [*ITEMS[:2], ("2", '"a, b"', "1.5"), ("3", '"open', "1.5"), ITEMS[4], ("5", 'inch"', "1.5"), *ITEMS[6:]]
    shop.refuse(DATA, "items.csv line 5", "--quotes", log=LOG, items=table(rows))
    shop.refuse(DATA, "items.csv line 5", log=LOG, items=table([*rows[:5], *ITEMS[5:]]))
    unclear = table([*ITEMS[:2], ("2", '"a, b\nc, d"', "1.5"), *ITEMS[3:]])  # each of its lines might be a row
    shop.refuse(DATA, "items.csv line 4", log=LOG, items=unclear)
    shop.prepare(LOG, unclear, quotes="cells")
    assert shop.items()["title"][2] == "a, b\nc, d"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (codecs.BOM_UTF8 + table([("1", "Käse", "1")]).encode(), None),
        (table([("1", "Käse", "1")]).encode("utf-16"), None),
        (table([("1", "Käse", "1")]).encode("utf-16-le"), "utf-16-le"),
        (table([("1", "Käse", "1")]).encode("latin-1"), "cp1252"),
        (table([("1", "Käse", "1")]).replace("\n", "\r").encode(), None),
        (table([("1", "Käse", "1")]).replace("\n", "\r\n", 1).encode(), None),
        (b"sep=;\n" + table([("1", "Käse", "1")], ";").encode(), None),
        (codecs.BOM_UTF8 + b"sep=;\r\n" + table([("1", "Käse", "1")], ";").replace("\n", "\r\n").encode(), None),
        (table([("1", "Käse", "1")], "::").encode(), None),
        (table([("1", "Käse", "1")], "|").encode(), None),
        (table([(" 1", " Käse ", " 1")], ",").replace("item_id,", "item_id, ").encode(), None),
    ],
)
def test_encodings_line_ends_and_delimiters(shop: Shop, data: bytes, encoding: str | None) -> None:
    shop.prepare("session_id,item_id,timestamp\ns,1,1700000000\ns,1,1700000001\n", shop.file("items.csv", data), encoding=encoding)
    assert shop.items() == {"item_id": ["1"], "title": ["Käse"], "price": [1]}


def test_another_encoding_is_refused_with_its_line(shop: Shop) -> None:
    for data in (table([("1", "a", "1"), ("2", "Käse", "1")]).encode("latin-1"), table([("1", "a", "1"), ("2", "a\0b", "1")]).encode()):
        shop.refuse(DATA, "items.csv line 3", "--encoding", log=LOG, items=data)
    shop.refuse(USAGE, "--encoding klingon", log=LOG, encoding="klingon")


def test_archives_folders_and_several_files(shop: Shop) -> None:
    wanted = shop.prepare(LOG)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("log.csv", LOG)
    zstd = pa.compress(LOG.encode(), "zstd", asbytes=True)
    for name, data in {"A.CSV.GZ": gzip.compress(LOG.encode()), "b.csv.bz2": bz2.compress(LOG.encode()), "c.csv.zst": zstd}.items():
        assert shop.prepare(shop.file(name, data)) == wanted
    assert shop.prepare(shop.file("d.csv.zip", archive.getvalue())) == wanted
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("more.csv", LOG)
    shop.refuse(DATA, "2 files", log=shop.file("e.csv.zip", archive.getvalue()))
    shop.refuse(DATA, "compressed", log=shop.file("f.csv.gz", LOG))
    head, *lines = LOG.splitlines()
    for part, chosen in enumerate((lines[:5], lines[5:])):
        rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in chosen]
        (shop.folder / "log.parquet" / f"part={part}").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), shop.folder / "log.parquet" / f"part={part}" / f"part-{part}.snappy.parquet")
        shop.file(f"parts/{part}.csv", "\n".join([head, *chosen]) + "\n")
    shop.file("log.parquet/_SUCCESS", b"")
    assert shop.prepare(shop.folder / "log.parquet") == wanted
    shop.said("2 files; left out: _SUCCESS", "not used: `part`")
    assert shop.prepare([str(shop.folder / "parts" / "*.csv")]) == wanted
    assert shop.prepare([shop.folder / "parts" / "0.csv", shop.folder / "parts" / "1.csv"]) == wanted
    shop.refuse(DATA, "no file matches", log=[str(shop.folder / "none*.csv")])
    shop.refuse(DATA, "two kinds", log=[shop.folder / "parts" / "0.csv", shop.folder / "log.parquet"])


# --- values


def test_ids_are_the_same_from_every_format(shop: Shop) -> None:
    items = "item_id,title\n" + "".join(f"{n},T\n" for n in (101, 102))
    rows: list[dict[str, Any]] = [{"session_id": 0, "item_id": n, "timestamp": BEGIN} for n in (101.0, None, 102.0)]
    shop.file("log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    shop.file("mixed.jsonl", "".join(json.dumps(row | {"item_id": n}) + "\n" for row, n in zip(rows, (101, "102", 101.0), strict=True)))
    pq.write_table(pa.Table.from_pylist(rows), shop.folder / "log.parquet")
    shop.file("log.csv", "session_id,item_id,timestamp\n0.0,101.0,1709287200.0\n0.0,,1709287200.0\n0.0,102.0,1709287200.0\n")
    for name in ("log.jsonl", "log.parquet", "log.csv"):
        assert shop.prepare(shop.folder / name, items) == {"0": ["101", "102"]}
        assert shop.summary.dropped == {"events without item_id": 1}
    assert shop.prepare(shop.folder / "mixed.jsonl", items) == {"0": ["101", "102", "101"]}
    for number in ("1.23457E+12", "9007199254740994.0"):
        shop.refuse(DATA, "lost digits", "log.csv line 2", log=f"session_id,item_id\na,{number}\na,1\n")


def test_lost_zeros_show_an_id_of_each_side(shop: Shop) -> None:
    log = "customer_id,article_id,t_dat\n" + "".join(f"c,{n},2018-09-20\n" for n in ("0108775010", "0108775021"))
    articles = "article_id,prod_name,detail_desc\n0108775010,Top,x\n0108775021,Top,y\n"
    assert shop.prepare(log, articles) == {"c-0": ["0108775010", "0108775021"]}
    shop.said("preset hm")
    shop.refuse(DATA, "'108775010'", "'0108775010'", "lost the zeros", log=log.replace("0108", "108"), items=articles)


@pytest.mark.parametrize("word", ["NULL", "nan", "NA", "None", r"\N", "  "])
def test_words_for_missing_values_are_missing_and_counted(shop: Shop, word: str) -> None:
    for row, reason in ((f"{word},1,{BEGIN}", "session_id"), (f"s0,{word},{BEGIN}", "item_id"), (f"s0,1,{word}", "a time or position")):
        assert len(shop.prepare(LOG + row + "\n")) == 4
        assert shop.summary.dropped == {f"events without {reason}": 1}
        if word.strip():
            shop.said(f"1 cells say {word}")


def stamps(texts: list[str]) -> str:
    return "user_id,item_id,timestamp\n" + "".join(f'u,{n},"{text}"\n' for n, text in enumerate(texts))


@pytest.mark.parametrize(
    "texts",
    [
        ["2024-03-01 10:00:00", "2024-03-01 10:01:00", "2024-03-13 10:00:00", "2024-03-13 10:01:00"],
        ["2024-03-01 10:00:00 UTC", "2024-03-01 10:01:00 UTC", "2024-03-13 10:00:00 UTC", "2024-03-13 10:01:00 UTC"],
        [
            "2024-03-01 10:00:00 +0000 UTC",
            "2024-03-01 10:01:00 +0000 UTC",
            "2024-03-13 10:00:00 +0000 UTC",
            "2024-03-13 10:01:00 +0000 UTC",
        ],
        ["2024-03-01T12:00:00+0200", "2024-03-01T12:01:00+0200", "2024-03-13T12:00:00+0200", "2024-03-13T12:01:00+0200"],
        ["03/01/2024 10:00", "03/01/2024 10:01", "03/13/2024 10:00", "03/13/2024 10:01"],
        ["3/1/2024 10:00:00 AM", "3/1/2024 10:01:00 AM", "3/13/2024 10:00:00 AM", "3/13/2024 10:01:00 AM"],
        ["01.03.2024 10:00", "01.03.2024 10:01", "13.03.2024 10:00", "13.03.2024 10:01"],
        ["13.03.24 10:00", "13.03.24 10:01", "25.03.24 10:00", "25.03.24 10:01"],
        ["20240301100000", "20240301100100", "20240313100000", "20240313100100"],
        ["202403011000", "202403011001", "202403131000", "202403131001"],
        ["1 Mar 2024 10:00", "1 Mar 2024 10:01", "13 Mar 2024 10:00", "13 Mar 2024 10:01"],
        [
            "Fri, 01 Mar 2024 10:00:00 GMT",
            "Fri, 01 Mar 2024 10:01:00 GMT",
            "Wed, 13 Mar 2024 10:00:00 GMT",
            "Wed, 13 Mar 2024 10:01:00 GMT",
        ],
        ["638448840000000000", "638448840600000000", "638459208000000000", "638459208600000000"],
    ],
)
def test_times_in_any_notation(shop: Shop, texts: list[str]) -> None:
    assert shop.prepare(stamps(texts)) == {"u-0": ["0", "1"], "u-1": ["2", "3"]}
    first = BEGIN + 12 * 86_400 * (texts[0] == "13.03.24 10:00")
    assert shop.times() == [first, first + 60, first + 12 * 86_400, first + 12 * 86_400 + 60]


@pytest.mark.parametrize(
    ("texts", "given"),
    [(["45352.416667", "45352.417361"], "excel"), (["1", "1"], "days"), (["600", "601"], "minutes"), (["7", "7"], "hours")],
)
def test_numbers_that_are_no_unix_times_are_refused_and_read_as_given(shop: Shop, texts: list[str], given: str) -> None:
    shop.refuse(DATA, texts[0][:8], "1970", "log.csv line 2", "--time-format", log=stamps(texts))
    assert shop.prepare(stamps(texts), time_format=given) == {"u-0": ["0", "1"]}
    if given == "excel":
        assert shop.times() == [BEGIN, BEGIN + 60]


def test_days_and_months_in_doubt_are_refused(shop: Shop) -> None:
    log = stamps(["03/04/2024 10:00", "03/04/2024 10:01"])
    shop.refuse(DATA, "'03/04/2024 10:00'", "--time-format", log=log)
    shop.prepare(log, time_format="%d/%m/%Y %H:%M")
    assert shop.times() == [1_712_138_400, 1_712_138_460]


@pytest.mark.parametrize("odd", ["9999-12-31 23:59:59", "2099-12-31", "1970-01-01"])
def test_a_time_that_cannot_be_meant_costs_its_event(shop: Shop, odd: str) -> None:
    times = [f"2024-03-01 10:{minute:02}:00" for minute in range(20)]
    assert len(shop.prepare(stamps([*times[:5], odd, *times[5:]]))["u-0"]) == 20
    shop.said("dropped: 1 events with a time before 1990 or in the future", odd[:10], "log.csv line 7")


@pytest.mark.parametrize("odd", ["1e30", "-1e30", "9223372036854775808", "yesterday"])
def test_a_time_that_is_none_is_refused_at_its_line(shop: Shop, odd: str) -> None:
    shop.refuse(DATA, odd, "log.csv line 14", log=LOG + f"s0,1,{odd}\n")


# --- columns and sessions


def test_guesses_that_do_not_fit_are_dropped_and_the_finer_time_wins(shop: Shop) -> None:
    for column, value in (("order", "ORD-3"), ("step", "cart")):
        lines = [f"{line},{value if n else column}" for n, line in enumerate(LOG.splitlines())]
        assert len(shop.prepare("\n".join(lines) + "\n")) == 4
        shop.said(f"`{column}` is not read as position", f"not used: `{column}`")
    lines = [f"{line.replace('timestamp', 'event_timestamp')},{'2024-03-01' if n else 'date'}" for n, line in enumerate(LOG.splitlines())]
    shop.prepare("\n".join(lines) + "\n")
    assert shop.times()[:2] == [BEGIN, BEGIN + 1]
    shop.said("`event_timestamp` as timestamp", "not used: `date`")


def test_the_catalogue_decides_which_column_has_the_ids(shop: Shop) -> None:
    shop.prepare(LOG, "SKU,ID,Name\n" + "".join(f"SKU-{n},{n},T\n" for n in range(8)))
    shop.said("`ID` as item_id")
    assert shop.items()["SKU"][0] == "SKU-0"


def test_a_session_id_of_several_users_is_joined_with_the_user(shop: Shop) -> None:
    rows = "".join(
        f"u{user},{session},{item},{BEGIN + 9000 * session + item}\n" for user in range(3) for session in (1, 2) for item in (0, 1)
    )
    sessions = shop.prepare("user_id,session_id,item_id,timestamp\n" + rows)
    assert sorted(sessions) == [f"u{user}-{session}" for user in range(3) for session in (1, 2)]
    shop.said("2 session ids have several users (e.g. '1')")
    google = "fullVisitorId,visitId,productSKU,time\n" + rows
    assert sorted(shop.prepare(google)) == sorted(sessions)


def test_histories_say_what_to_give(shop: Shop) -> None:
    log = "user_id,item_id,timestamp\n" + "".join(f"u{n},{n + m},{BEGIN + 345_600 * m}\n" for n in range(4) for m in range(3))
    shop.refuse(DATA, "30 minutes", "--session-gap", "--column session_id=user_id", "5,760 minutes", log=log)
    assert len(shop.prepare(log, session_gap_minutes=10_080.0)["u0-0"]) == 3
    assert len(shop.prepare(log, columns={"session_id": "user_id"})["u0"]) == 3
    shop.said("4 of 4 sessions last longer than a day", "--session-gap")
    assert shop.prepare(log + f"u0,9,{BEGIN + 1}\n")["u0-0"] == ["0", "9"]
    shop.said("warning: 84.6% of the events are dropped")


def test_a_gap_also_cuts_named_sessions(shop: Shop) -> None:
    log = "session_id,item_id,timestamp\n" + "".join(f"s,{n},{BEGIN + 60 * (n + 100 * (n > 1))}\n" for n in range(4))
    assert shop.prepare(log) == {"s": ["0", "1", "2", "3"]}
    assert shop.prepare(log, session_gap_minutes=30.0) == {"s-0": ["0", "1"], "s-1": ["2", "3"]}


def test_one_user_with_much_of_the_log_is_pointed_out(shop: Shop) -> None:
    rows = [(n % 2 * n, n) for n in range(400)]
    shop.prepare("user_id,item_id,timestamp\n" + "".join(f"{user},{n % 9},{BEGIN + n}\n" for user, n in rows))
    shop.said("warning: user_id '0' has 50% of the events", "--where")


def test_where_and_collapse(shop: Shop) -> None:
    kinds = ["view", "view", "addtocart", "view", "view"]
    log = "timestamp,visitorid,event,itemid\n" + "".join(f"{BEGIN * 1000 + n},v,{kind},{n // 2}\n" for n, kind in enumerate(kinds))
    assert shop.prepare(log) == {"v-0": ["0", "0", "1", "1", "2"]}
    shop.said("not used: `event`")
    assert shop.prepare(log, where="event = 'view'") == {"v-0": ["0", "0", "1", "2"]}
    assert shop.prepare(log, where="event = 'view' and itemid < 2", collapse_repeats=True) == {"v-0": ["0", "1"]}
    for where in ("nope = 1", "event =", "1=1); drop table log; --"):
        shop.refuse(USAGE, "--where", "visitorid", log=log, where=where)
    shop.refuse(DATA, "no event fits", log=log, where="event = 'x'")


# --- presets


def test_presets_of_nested_and_headerless_logs(shop: Shop) -> None:
    events = [{"aid": n, "ts": BEGIN * 1000 + n, "type": "clicks"} for n in (5, 6, 7)]
    otto = shop.file("train.jsonl", json.dumps({"session": 1, "events": events}) + "\n")
    assert shop.prepare(otto, preset="otto") == shop.prepare(otto) == {"1": ["5", "6", "7"]}
    news = "".join(
        f"N{n}\tsport\tsub\t{title}\tabstract\thttps://x.invalid\t[]\t[]\n" for n, title in enumerate(['"Best" dogs', '"open', "six"])
    )
    behaviors = "".join(f"{n}\tU\t11/1{n}/2019 9:05:58 AM\tN0 N2 N1\tN1-1\n" for n in range(2))
    mind = shop.prepare(shop.file("behaviors.tsv", behaviors), shop.file("news.tsv", news), preset="mind")
    assert mind == {"0": ["N0", "N2", "N1"], "1": ["N0", "N2", "N1"]} and shop.items()["title"] == ['"Best" dogs', '"open', "six"]
    recbole = "session_id:token\titem_id_list:token_seq\titem_id:token\n0\t100 101\t102\n"
    assert shop.prepare(shop.file("dg.inter", recbole)) == {"0": ["100", "101", "102"]}
    day = "sessionId;userId;itemId;timeframe;eventdate\n" + "".join(
        f"{s};NA;{i};{i};2016-05-0{9 - s}\n" for s in (1, 2) for i in (102, 101)
    )
    assert list(shop.prepare(day).items()) == [("2", ["101", "102"]), ("1", ["101", "102"])]
    assert "NA" not in pq.read_table(shop.out / "sessions.parquet")["user_id"].to_pylist()
    shop.refuse(USAGE, "no preset 'nope'", "movielens", log=day, preset="nope")


def test_amazon_with_a_negative_time(shop: Shop) -> None:
    items = [{"main_category": "M", "title": f"T{n}", "description": ["One.", "Two."], "parent_asin": f"B{n}"} for n in range(20)]
    items[0] |= {"images": [{"large": "https://m.invalid/0.jpg"}], "categories": ["Home", "Kitchen"], "details": {"Key": "x"}}
    log = [{"parent_asin": f"B{n}", "asin": "X", "user_id": "U", "timestamp": BEGIN * 1000 + n} for n in range(20)]
    log[3]["timestamp"] = -1_461_974_400_000
    meta = shop.file("meta.jsonl.gz", gzip.compress("".join(json.dumps(item) + "\n" for item in items).encode()))
    reviews = shop.file("reviews.jsonl.gz", gzip.compress("".join(json.dumps(event) + "\n" for event in log).encode()))
    assert len(shop.prepare(reviews, meta)["U-0"]) == 19
    shop.said("preset amazon-2023", "dropped: 1 events with a time before 1990", "-1461974400000", "line 4")
    found = shop.items()
    assert (found["description"][0], found["categories"][0], found["details"][0]) == ("One. Two.", ["Home", "Kitchen"], [("Key", "x")])


def test_a_mapping_file_and_its_errors(shop: Shop) -> None:
    mapping = shop.file("mine.yaml", "sessions:\n  columns: {session_id: a, item_id: b}\n  names: [a, b]\n")
    assert shop.prepare("x,1\nx,2\n", mapping=mapping) == {"x": ["1", "2"]}
    mapping.write_text("sessions:\n  colums: {a: b}\n")
    shop.refuse(USAGE, "colums", "mine.yaml:2", log=LOG, mapping=mapping)


# --- items


def test_one_catalogue_gives_one_file_from_every_format(shop: Shop) -> None:
    records = [
        {"item_id": f"a{n}", "title": f"T {n}", "brand": "xyz"[n % 3], "price": n + 0.5, "stock": n, "sale": n > 1} for n in range(4)
    ]
    records = [record | {"url": f"https://shop.invalid/{record['item_id']}"} for record in records]
    shop.file("items.csv", "\n".join([",".join(records[0]), *(",".join(map(str, record.values())) for record in records)]) + "\n")
    shop.file("items.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), shop.folder / "items.parquet")
    log, found = LOG.replace(",0,", ",a0,").replace(",1,", ",a1,"), []
    for name in ("items.csv", "items.jsonl", "items.parquet"):
        shop.prepare(log, shop.folder / name)
        found.append((shop.out / "items.parquet").read_bytes())
    assert found[0] == found[1] == found[2]
    assert pq.read_schema(shop.out / "items.parquet").types[2:] == [pa.string(), pa.float64(), pa.int64(), pa.bool_(), pa.string()]
    assert load_catalog(shop.out).text_columns == ["title", "brand"]  # what is learned: no address


def test_lists_in_cells_are_lists(shop: Shop) -> None:
    rows = "".join(f"{n},Film {n},{'Drama|Romance' if n % 2 else 'Drama'},\"['A part.' 'B & last']\",\"['x', 'y']\"\n" for n in range(8))
    shop.prepare(LOG, "movieId,title,genres,description,tags\n" + rows)
    found = shop.items()
    assert (found["genres"][:2], found["description"][0], found["tags"][0]) == (
        [["Drama"], ["Drama", "Romance"]],
        "A part. B & last",
        ["x", "y"],
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("string_view", pa.string_view()), ("large", pa.large_string()), ("dictionary", pa.dictionary(pa.int32(), pa.string()))],
)
def test_arrow_types_of_ids(shop: Shop, name: str, kind: pa.DataType) -> None:
    rows = [line.split(",") for line in LOG.splitlines()[1:]]
    for clock in (pa.int64(), pa.uint64(), *(pa.timestamp(unit, "Europe/Berlin") for unit in ("s", "ms", "us", "ns"))):
        times = pa.array([int(row[2]) for row in rows])
        times = times.cast(pa.timestamp("s", "UTC")).cast(clock) if pa.types.is_timestamp(clock) else times.cast(clock)
        columns = {"session_id": pa.array([row[0] for row in rows]).cast(kind), "item_id": pa.array([row[1] for row in rows]).cast(kind)}
        pq.write_table(pa.table(columns | {"timestamp": times}), shop.folder / "log.parquet")
        assert shop.prepare(shop.folder / "log.parquet")["s0"] == ["0", "1", "2"] and shop.times()[0] == BEGIN


def test_types_that_are_no_ids_are_named(shop: Shop) -> None:
    for kind, values in ((pa.binary(), [b"a", b"b"]), (pa.decimal128(38, 0), [1, 2])):
        pq.write_table(pa.table({"session_id": ["s", "s"], "item_id": pa.array(values, kind)}), shop.folder / "log.parquet")
        shop.refuse(DATA, "`item_id`", str(kind), log=shop.folder / "log.parquet")


def test_hostile_files_are_refused_at_once(shop: Shop) -> None:
    wide = "item_id,title," + ",".join(f"a{n}" for n in range(100_000))
    shop.refuse(DATA, "columns", log=LOG, items=wide + "\n")
    deep = '{"item_id": "1", "title": "t", "x": ' + "[" * 400 + "]" * 400 + "}\n"
    shop.refuse(DATA, "nested", "items.jsonl line 1", log=LOG, items=shop.file("items.jsonl", deep))
    (shop.folder / "zero.csv").symlink_to("/dev/zero")
    shop.refuse(DATA, "not a plain file", log=shop.folder / "zero.csv")


# --- images


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 200, 9)).save(buffer, kind)
    return buffer.getvalue()


def test_images_in_every_format_and_in_folders(shop: Shop) -> None:
    for n, kind in enumerate(("GIF", "BMP", "TIFF", "AVIF", "PNG", "WEBP", "JPEG")):
        shop.file(f"images/{n % 3}/{n}.{kind.lower()}", picture(kind))
    shop.prepare(LOG, table(ITEMS), images=shop.folder / "images")
    catalog = load_catalog(shop.out)
    assert [catalog.has_image(row) for row in range(8)] == [True] * 7 + [False]
    assert catalog.image(0).size == (8, 8)  # type: ignore[union-attr]
    shop.file("images/1/1.bmp", b"broken")
    shop.refuse(DATA, "images/1/1.bmp", log=LOG, items=table(ITEMS), images=shop.folder / "images")
    others = [(f"x{n}", title, price) for n, title, price in ITEMS]
    shop.refuse(
        DATA,
        "no image of the folder is used",
        "'x0'",
        log=LOG.replace(",0,", ",x0,").replace(",1,", ",x1,"),
        items=table(others),
        images=shop.folder / "images",
    )
    shop.file("empty/readme.txt", b"")
    shop.refuse(DATA, "no image in the folder", "1 other files", log=LOG, items=table(ITEMS), images=shop.folder / "empty")


def test_items_without_text_or_image_are_pointed_out(shop: Shop) -> None:
    shop.prepare(LOG, table([*ITEMS[:7], ("7", "NULL", "1")]))
    shop.said("warning: 1 items have neither a text nor an image (e.g. '7')")


def test_a_preview_writes_nothing(shop: Shop) -> None:
    prepare(PrepareOptions(shop.file("items.csv", table(ITEMS)), shop.file("log.csv", LOG), shop.out, dry_run=True), shop.summary)
    shop.said("session 's0': 0 at 1709287200, 1 at 1709287201", "item: item_id='0', title='Thing 0', price='1.5'", "nothing is written")
    assert sorted(path.name for path in shop.folder.iterdir()) == ["items.csv", "log.csv"]
