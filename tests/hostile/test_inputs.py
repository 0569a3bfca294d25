"""Hostile files, settings and option values: one line, the right exit code, soon, and in little memory."""

import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.commands import tpad_here

SECONDS, MEGABYTES = 10, 500  # a refusal takes a tenth of a second; the bound is for a busy machine
DIGITS = "9" * 5000
DEEP = "[" * 400 + "]" * 400
ESCAPES = "\x1b]52;c;eA==\x07\x9b2J"


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def parquet(**columns: object) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


# the file that is given as --sessions to `tpad recommend`
SESSIONS: dict[str, tuple[str, Callable[[Path], object], int]] = {
    "a fifo": ("x.csv", os.mkfifo, 3),
    "a fifo of Parquet": ("x.parquet", os.mkfifo, 3),
    "an endless device": ("x.csv", zeros, 3),
    "a folder": ("x.csv", os.mkdir, 3),
    "nothing": ("x.csv", lambda path: None, 3),
    "an unknown type": ("x.exe", text("a"), 3),
    "an empty file": ("x.csv", text(""), 3),
    "only a head": ("x.csv", text("session_id,item_id\n"), 3),
    "no such columns": ("x.csv", text("a,b\n1,2\n"), 3),
    "a column twice": ("x.csv", text("session_id,item_id,item_id\na,b,c\n"), 3),
    "a hundred thousand columns": ("x.csv", text(",".join(f"c{n}" for n in range(100_000)) + "\n"), 3),
    "a line too long": ("x.csv", text("session_id,item_id\na,b,c\n"), 3),
    "bytes of another encoding": ("x.csv", text(b"session_id,item_id\n\xff\xfe,\xff\n"), 3),
    "an empty id": ("x.csv", text("session_id,item_id\n,a\n"), 3),
    "times that are words": ("x.csv", text("session_id,item_id,timestamp\na,b,yesterday\n"), 3),
    "JSON that is cut": ("x.jsonl", text('{"session_id": "a", "item_id":\n'), 3),
    "JSON that is a list": ("x.jsonl", text("[1, 2]\n"), 3),
    "JSON of other types by line": ("x.jsonl", text('{"session_id": "a", "item_id": "b"}\n{"session_id": {}, "item_id": []}\n'), 3),
    "random bytes": ("x.parquet", text(os.urandom(4000)), 3),
    "Parquet that is cut": ("x.parquet", text(b"PAR1" + b"\0" * 100), 3),
    "ids that are lists": ("x.parquet", parquet(session_id=[["a"]], item_id=["b"]), 3),
    "ids that are empty": ("x.parquet", parquet(session_id=pa.array([None], pa.string()), item_id=["b"]), 3),
    "times that are lists": ("x.parquet", parquet(session_id=["a"], item_id=["b"], timestamp=[[1]]), 3),
}


@pytest.mark.parametrize("name", SESSIONS)
def test_files_of_sessions(shop: Path, tmp_path: Path, name: str) -> None:
    file, write, code = SESSIONS[name]
    write(tmp_path / file)
    refused(code, "recommend", "--run", shop, "--sessions", tmp_path / file, "--out", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


OPTIONS: dict[str, tuple[Sequence[str], int]] = {
    "a number of 5000 digits": (["-k", DIGITS], 2),
    "a negative number": (["-k", "-1"], 2),
    "a word for a number": (["-k", "ten"], 2),
    "no number": (["--new-items", "nan"], 2),
    "a number without end": (["--new-items", "inf"], 2),
    "more than all diversity": (["--diversify", "1e308"], 2),
    "no time": (["--at", "9999-99-99"], 2),
    "a time of 5000 digits": (["--at", DIGITS], 2),
    "no session": (["--session", ", ,"], 2),
    "a session of no text": (["--session", "\udcff"], 2),
    "a filter without a value": (["--filter", "kind"], 2),
    "a filter by no column": (["--filter", f"{ESCAPES}=1"], 2),
    "a filter of a million letters": (["--filter", "kind=" + "x" * 10**6], 2),
    "an option that is none": ([f"--{ESCAPES}"], 2),
    "a run that is a file": (["--run", __file__], 5),
    "a run that is not there": (["--run", f"/nowhere/{ESCAPES}"], 4),
    "a run of too long a name": (["--run", "x" * 5000], 5),
    "sessions without --out": (["--sessions", "x.csv"], 2),
    "a device as --out": (["--sessions", "x.csv", "--out", "/dev/null"], 2),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(shop: Path, name: str) -> None:
    words, code = OPTIONS[name]
    refused(code, "recommend", *([] if "--run" in words else ["--run", shop]), *words)
    assert Path("/dev/null").is_char_device()


SETTINGS = [
    *(
        "seed=" + DIGITS,
        "seed=-1",
        "seed=1.5",
        "seed=x",
        "sbr.dim=" + "9" * 30,
        "sbr.dim=10000000",
        "sbr.lr=1e400",
        "sbr.lr=.nan",
        "sbr.lr=0",
    ),
    *("sbr.batch=1000000000000000000", "sbr.epochs=99999999999999999999999", "data.max_prefix=1000000000", "sbr.negatives=10000000000000"),
    *("sbr.seeds=10000000000000000", "sbr.components=1000000000000000000000000", "sbr.index=" + "x" * 100_000, "sbr.index=" + ESCAPES),
    *(
        "sbr.models=[]",
        "sbr.models=[x]",
        "sbr.models=x",
        "=1",
        "a.b.c.d=1",
        "sbr=5",
        "sbr",
        "sbr.=1",
        ".=1",
    ),
    *("sbr.parts.companions=1000000000000", "data.valid=1", "data.valid=-0.1", "data.protocol=nope", "sbr.patience=" + str(2**63)),
    *(
        "sbr.models={a: 1}",
        "sbr.models=" + DEEP,
        "sbr.models=&a [*a]",
        "sbr.models=!!python/object:os.system x",
        "sbr.loss=[1",
        'sbr.loss="',
    ),
    *("sbr.refit=maybe", "data.text=5", "backbone.lora.targets='('", "export.keep=0", "distill.dim=100000000"),
    *("backbone.tiny.dim=1073741824", "backbone.tiny.vocab=1000000000000", "backbone.tiny.layers=1000000000", "backbone.tiny.patch=7"),
    *("backbone.max_text_tokens=99999999999999999999", "distill.knowledge.batch=1000000000000", "distill.chunk=99999999999999999999"),
    *("backbone.lora.rank=1000000000", "distill.workers=100000", "distill.critic.hidden=100000000000", "shop.items=1000000000000"),
    *("export.shard_rows=100000000000000", "distill.transfer.window=1000000000000000", "backbone.name=vectors", "backbone.path=x.npy"),
    *("backbone.dtype=bfloat16", f"{ESCAPES}=1", f"sbr.loss={ESCAPES}", "sbr.seeds=0x10", "sbr.new_items=21"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: repr(setting)[:40])
def test_settings(shop: Path, tmp_path: Path, setting: str) -> None:
    refused(2, "train-sbr", "--run", tmp_path / "run", "--data", shop / "data", "--set", setting)
    assert not (tmp_path / "run").exists()


CONFIGS: dict[str, Callable[[Path], object]] = {
    "a fifo of nothing but its name": lambda path: None,
    "an endless device": zeros,
    "a folder": os.mkdir,
    "random bytes": text(os.urandom(2000)),
    "a large file": text("#" * 300_000),
    "another encoding": text("seed: 1".encode("utf-16")),
    "deep nesting": text("sbr: " + DEEP),
    "an alias that repeats itself": text("sbr: &a [*a, *a]"),
    "a tag with code": text("sbr: !!python/object/apply:os.system ['true']"),
    "a key twice": text("seed: 1\nseed: 2\n"),
    "a list": text("- seed\n"),
    "escapes": text(f"{ESCAPES}: 1\n"),
    "a null byte": text("seed: \0\n"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_settings(shop: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "my.yaml"
    CONFIGS[name](path)
    refused(2, "train-sbr", "--run", tmp_path / "run", "--data", shop / "data", "--config", path)


OTHERS: dict[str, tuple[Callable[[Path, Path], Sequence[object]], int]] = {
    "a shard of no share": (lambda shop, tmp: ("export-embeddings", "--run", shop, "--shard", "5/" + DIGITS), 2),
    "a shard of other digits": (lambda shop, tmp: ("export-embeddings", "--run", shop, "--shard", "²/²"), 2),
    "an image budget of 5000 digits": (lambda shop, tmp: ("export-embeddings", "--run", shop, "--max-pixels", DIGITS), 2),
    "a negative search": (lambda shop, tmp: ("train-sbr", "--run", shop, "--search", "-1"), 2),
    "windows of 5000 digits": (lambda shop, tmp: ("evaluate", "--run", shop, "--windows", DIGITS), 2),
    "an unknown protocol": (lambda shop, tmp: ("evaluate", "--run", shop, "--protocol", ESCAPES), 2),
    "an unknown model": (lambda shop, tmp: ("evaluate", "--run", shop, "--models", ESCAPES), 2),
    "an unknown variant": (lambda shop, tmp: ("ablate", "--run", tmp, "--variants", ESCAPES), 2),
    "a port beyond the last": (lambda shop, tmp: ("serve", "--run", shop, "--port", "65536"), 2),
    "a host of no name": (lambda shop, tmp: ("serve", "--run", shop, "--port", "0", "--host", ESCAPES), 5),
    "a key that is a folder": (lambda shop, tmp: ("serve", "--run", shop, "--key-file", tmp), 2),
    "a key without end": (lambda shop, tmp: ("serve", "--run", shop, "--key-file", "/dev/zero"), 2),
    "data that is a file": (lambda shop, tmp: ("train-sbr", "--run", tmp / "run", "--data", __file__), 3),
    "data of too long a name": (lambda shop, tmp: ("train-sbr", "--run", tmp / "run", "--data", "x" * 5000), 5),
    "no run": (lambda shop, tmp: ("report", "--run", tmp), 4),
    "no command": (lambda shop, tmp: (ESCAPES,), 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands(shop: Path, tmp_path: Path, name: str) -> None:
    make, code = OTHERS[name]
    refused(code, *make(shop, tmp_path))


def refused(code: int, *words: object) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = tpad_here(*words)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert told.is_one_line, told.err
    assert told.code == code, told.err
    assert told.seconds < SECONDS and grown < MEGABYTES
    assert all(letter.isprintable() or letter == "\n" for letter in told.err)
    assert told.out == "" and len(told.err) < 3000
