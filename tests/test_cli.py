"""The command line from outside: the chain on the sample shop, what is said where, and every bad input as one clear line."""

import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from PIL import Image

import cli
from helpers.processes import ENVIRONMENT, ITEMS, ROOT, SET, command, contents, tpad, tpad_from_nothing
from helpers.server import publish_again
from pipeline.core.artifact import OWN_KEYS, open_verified, stage
from pipeline.core.config_file import load_config
from recommender.baselines.registry import BASELINES

Done = subprocess.CompletedProcess[str]
CHAIN = ("distill", "export-embeddings", "train-sbr", "recommend")
SESSION = ["p0003", "p0011", "p0003", "p0020"]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Done]]:
    """The four commands in order, without --data; settings only for the first."""
    run = tmp_path_factory.mktemp("cli") / "run"
    return run, {name: tpad_from_nothing(name, "--run", run, *(SET if name == "distill" else [])) for name in CHAIN}


@pytest.fixture(scope="module")
def run(chain: tuple[Path, dict[str, Done]]) -> Path:
    folder, done = chain
    assert [d.returncode for d in done.values()] == [0, 0, 0, 0], "\n".join(d.stderr for d in done.values())
    return folder


@pytest.fixture(scope="module")
def said(run: Path, chain: tuple[Path, dict[str, Done]]) -> dict[str, Done]:
    return chain[1]


def ask(run: Path, *args: object) -> dict[str, Any]:
    done = tpad("recommend", "--run", run, "--json", *args)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def answer(run: Path) -> dict[str, Any]:
    """The whole catalogue, ranked."""
    return ask(run, "--session", ",".join(SESSION), "-k", ITEMS)


@pytest.fixture(scope="module")
def popular(run: Path) -> Done:
    """What a session of unknown items gets."""
    return tpad("recommend", "--run", run, "--session", "nonsense, other", "-k", "5")


def table(done: Done) -> list[tuple[str, float]]:
    """item_id and score of each line of the printed table."""
    return [(item, float(score)) for item, score in re.findall(r"^ +\d+ +(p\d{4}) .* (-?\d+\.\d{4}) *$", done.stdout, re.MULTILINE)]


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


# --- the chain


def test_each_command_names_the_next_one(run: Path, said: dict[str, Done]) -> None:
    for name, following in itertools.pairwise(CHAIN):
        assert said[name].stderr.splitlines()[-1] == f"next: tpad {following} --run {run}"


def test_results_go_to_stdout_and_all_else_to_stderr(run: Path, said: dict[str, Done]) -> None:
    assert said["distill"].stdout == ""
    assert said["export-embeddings"].stdout == ""
    for line in (
        f"drawing the sample shop: {run / 'data'}",
        "knowledge: 3/3",
        "transfer: 3/3",
        "align: 3/3",
        f"unified MLLM: {run / 'mllm'}",
    ):
        assert line in said["distill"].stderr
    assert f"{ITEMS} items x (8 knowledge + 8 transition)" in said["export-embeddings"].stderr
    rows = [line.split("  ")[0] for line in said["train-sbr"].stdout.splitlines()]
    names = [*BASELINES, "ID-only", "content-only", "full", "ceiling"]
    assert rows[-1 - len(names) : -1] == names
    assert rows[-1].endswith("the published model was then trained on all sessions")
    for done in said.values():
        assert "warning" not in done.stderr.lower()
        assert "\x1b" not in done.stdout + done.stderr, "no colours in a pipe"


def test_without_a_session_one_of_the_test_is_taken_and_shown(run: Path, said: dict[str, Done]) -> None:
    done = said["recommend"]
    shown = re.findall(r"^  (p\d{4})  \w", done.stderr, re.MULTILINE)
    log = pq.read_table(run / "data" / "sessions.parquet").to_pydict()
    sessions: dict[str, list[str]] = {}
    for session, item in zip(log["session_id"], log["item_id"], strict=True):
        sessions.setdefault(session, []).append(item)
    assert shown in list(sessions.values())[-20:]
    assert len(table(done)) == 10
    figure = r"0\.\d{3}"
    figures = f"session model {figure}, popularity {figure}, ID-only {figure}, ceiling {figure}"
    line = f"HR@10 on the test sessions, trained without the newest sessions: {figures}"
    assert re.fullmatch(line, done.stdout.splitlines()[-1])


def test_a_run_remembers_its_data_and_settings_and_does_nothing_twice(run: Path, said: dict[str, Done]) -> None:
    settings = load_config(run / "config.yaml")
    assert (settings.shop.items, settings.distill.dim, settings.sbr.dim) == (ITEMS, 8, 16)
    assert open_verified(run / "sbr", "sbr", "").manifest["settings"]["dim"] == 16
    before = contents(run)
    again = tpad("train-sbr", "--run", run)
    assert again.returncode == 0
    assert again.stdout == said["train-sbr"].stdout
    assert again.stderr.splitlines() == [f"session model: {run / 'sbr' / 'v0001'} (up to date)", f"next: tpad recommend --run {run}"]
    assert contents(run) == before


# --- recommend


def test_json_holds_session_items_and_titles(run: Path, answer: dict[str, Any]) -> None:
    assert answer["session"] == SESSION
    assert (answer["unknown"], answer["fallback"]) == ([], None)
    assert [item["rank"] for item in answer["items"]] == list(range(1, ITEMS + 1))
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    catalogue = pq.read_table(run / "data" / "items.parquet").to_pydict()
    titles = dict(zip(catalogue["item_id"], catalogue["title"], strict=True))
    assert all(item["title"] == titles[item["item_id"]] for item in answer["items"])


def test_exclude_seen_leaves_out_the_session_and_loses_no_place(run: Path, answer: dict[str, Any]) -> None:
    assert set(SESSION) < set(ids(answer))
    kept = ids(ask(run, "--session", ",".join(SESSION), "-k", ITEMS, "--exclude-seen"))
    assert kept == [item for item in ids(answer) if item not in SESSION]


def test_an_unknown_id_is_named_and_ignored(run: Path, answer: dict[str, Any]) -> None:
    done = tpad("recommend", "--run", run, "--session", f"nonsense,{','.join(SESSION)}")
    assert done.returncode == 0
    assert "  nonsense  not in the catalogue, ignored\n" in done.stderr
    assert [item for item, _ in table(done)] == ids(answer)[:10]
    assert "most popular" not in done.stderr


def test_nothing_known_gives_the_popular_items_and_says_so(run: Path, popular: Done) -> None:
    assert popular.returncode == 0
    assert popular.stderr.splitlines() == [
        "  nonsense  not in the catalogue, ignored",
        "  other  not in the catalogue, ignored",
        "no item of this session is in the catalogue: these are the most popular ones",
    ]
    events = pq.read_table(run / "data" / "sessions.parquet")["item_id"].to_pylist()  # the published model has seen all sessions
    most = sorted((events.count(item) for item in set(events)), reverse=True)[:5]
    assert [events.count(item) for item, _ in table(popular)] == most


def test_a_file_of_sessions_gets_the_answers_of_single_calls(run: Path, answer: dict[str, Any], popular: Done, tmp_path: Path) -> None:
    events = [{"session_id": "known", "item_id": item, "timestamp": 100 - n} for n, item in enumerate(reversed(SESSION))]
    events[2:2] = [{"session_id": "new", "item_id": "nonsense", "timestamp": 7}]
    path = tmp_path / "events.parquet"
    pq.write_table(pa.Table.from_pylist(events), path)
    out = tmp_path / "out.parquet"
    done = tpad("recommend", "--run", run, "--sessions", path, "--out", out, "-k", "5")
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    read = [line for line in lines if line.startswith("read: ")]
    progress, *told = lines[len(read) :]
    assert read[:2] == [f"read: {path}: 5 rows", f"read: {path}: times are in seconds"]
    assert re.fullmatch(r"recommendations: 2/2, [0-9.]+/s", progress)
    assert told == [
        f"2 sessions, 10 rows: {out}",
        "events of items not in the catalogue, left out: 1",
        "sessions of no other items, which got the most popular ones: 1",
    ]
    found = pq.read_table(out).to_pydict()
    assert list(found) == ["session_id", "item_id", "rank", "score"]
    assert found["session_id"] == ["known"] * 5 + ["new"] * 5
    assert found["item_id"] == ids(answer)[:5] + [item for item, _ in table(popular)]
    assert found["rank"] == [1, 2, 3, 4, 5] * 2
    scores = [item["score"] for item in answer["items"][:5]] + [score for _, score in table(popular)]
    assert found["score"] == pytest.approx(scores, abs=1e-4)


def test_processes_of_a_launcher_answer_a_part_of_the_file_each(run: Path, tmp_path: Path) -> None:
    file, whole, out = run / "data" / "sessions.parquet", tmp_path / "whole.parquet", tmp_path / "out.parquet"
    words = command("recommend", "--run", run, "--sessions", file, "-k", 3, "--out")
    parts = [tmp_path / f"out-0000{rank}-of-00002.parquet" for rank in (0, 1)]
    for rank in (0, 1):
        place = ENVIRONMENT | {"RANK": str(rank), "WORLD_SIZE": "2"}
        done = subprocess.run([*words, str(out)], cwd=ROOT, env=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert pq.read_metadata(parts[rank]).num_rows == 300
    assert tpad("recommend", "--run", run, "--sessions", file, "-k", 3, "--out", whole).returncode == 0
    assert not out.exists()
    columns = ["session_id", "item_id", "rank"]
    together = pa.concat_tables([pq.read_table(part, columns=columns) for part in parts])
    assert together.equals(pq.read_table(whole, columns=columns))


# --- bad input


def refused(done: Done, code: int, *words: str) -> None:
    """Exit code, and one line on stderr that has all the words; nothing on stdout."""
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines), done.stdout) == (code, 1, ""), done.stderr
    assert lines[0].startswith("error: ")
    assert ";" in lines[0], "says what to do"
    for word in words:
        assert word in lines[0]


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def drop_column(path: Path, name: str) -> None:
    pq.write_table(pq.read_table(path).drop_columns([name]), path)


ITEMS_FILE, SESSIONS_FILE = "items.parquet", "sessions.parquet"
BAD_DATA: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing items": (lambda data: (data / ITEMS_FILE).unlink(), ["items.parquet not found ({data}/items.parquet)", "tpad prepare"]),
    "missing sessions": (lambda data: (data / SESSIONS_FILE).unlink(), ["sessions.parquet not found ({data}/sessions.parquet)"]),
    "missing column of items": (
        lambda data: drop_column(data / ITEMS_FILE, "title"),
        ["column `title` is missing ({data}/items.parquet has item_id, kind,"],
    ),
    "missing column of sessions": (
        lambda data: drop_column(data / SESSIONS_FILE, "timestamp"),
        ["column `timestamp` is missing ({data}/sessions.parquet has session_id, item_id)"],
    ),
    "duplicate item_id": (
        lambda data: rewrite(data / ITEMS_FILE, lambda rows: rows[7].update(item_id="p0003")),
        ["item_id 'p0003' is duplicated ({data}/items.parquet row 7 and {data}/items.parquet row 3)"],
    ),
    "empty item_id": (
        lambda data: rewrite(data / ITEMS_FILE, lambda rows: rows[5].update(item_id="")),
        ["item_id is empty ({data}/items.parquet row 5)"],
    ),
    "unknown item": (
        lambda data: rewrite(data / SESSIONS_FILE, lambda rows: [rows[n].update(item_id="gone") for n in (4, 9)]),
        ["item_id 'gone' is not in items.parquet ({data}/sessions.parquet row 4, 2 such rows in all)"],
    ),
    "one event a session": (
        lambda data: rewrite(data / SESSIONS_FILE, lambda rows: [row.update(session_id=f"s{n}") for n, row in enumerate(rows)]),
        ["no session has two events ({data}/sessions.parquet, ", "session_id"],
    ),
    "not Parquet": (lambda data: (data / ITEMS_FILE).write_text("item_id,title\n"), ["not readable as Parquet", "{data}/items.parquet"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line_with_file_and_row(run: Path, tmp_path: Path, name: str) -> None:
    spoil, words = BAD_DATA[name]
    data = tmp_path / "data"
    shutil.copytree(run / "data", data)
    spoil(data)
    before = contents(run), contents(data)
    refused(tpad("distill", "--run", run, "--data", data), 3, *(word.format(data=data) for word in words))
    assert (contents(run), contents(data)) == before


def test_bad_data_begins_no_run(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(run / "data", data)
    (data / ITEMS_FILE).unlink()
    refused(tpad("distill", "--run", tmp_path / "new", "--data", data), 3)
    assert not (tmp_path / "new").exists()


def bomb() -> bytes:
    """A PNG of a few kilobytes that says it is 50,000 x 50,000 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[:-300]


def with_picture(run: Path, data: Path, row: int, picture: bytes) -> None:
    shutil.copytree(run / "data", data)
    rewrite(data / ITEMS_FILE, lambda rows: rows[row].update(image={"bytes": picture, "path": None}))


def test_a_truncated_jpeg_stops_distill(run: Path, tmp_path: Path) -> None:
    data, new = tmp_path / "data", tmp_path / "run"
    with_picture(run, data, 17, truncated())
    done = tpad("distill", "--run", new, "--data", data, *SET)
    refused(done, 3, "image cannot be used: damaged", f"({data}/items.parquet row 17, item_id 'p0017')", "data.on_bad_image")
    assert not (new / "mllm").exists()


def test_a_decompression_bomb_stops_export_and_leaves_the_embeddings(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with_picture(run, data, 21, bomb())
    shutil.copytree(run, tmp_path / "run")
    before = contents(tmp_path / "run")
    done = tpad("export-embeddings", "--run", tmp_path / "run", "--data", data)
    refused(done, 3, "image cannot be used", "pixels", f"({data}/items.parquet row 21, item_id 'p0021')", "data.on_bad_image")
    after = contents(tmp_path / "run")
    assert {name: after.get(name) for name in before} == before, "a command that failed does not change what the run remembers either"


BAD_SETTINGS = {
    "sbr:\n  epoch: 3\n": ["unknown key `sbr.epoch`", ":2)", "did you mean `epochs`?"],
    "seed: 1\ndistil:\n  dim: 3\n": ["unknown key `distil`", ":2)", "did you mean `distill`?"],
    "sbr:\n  epochs: many\n": ["`sbr.epochs` = 'many'", "valid integer", ":2)"],
    "sbr:\n  lr: -1\n": ["`sbr.lr` = -1", "greater than 0", ":2)"],
}


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_a_wrong_setting_is_named_with_its_line(run: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    before = contents(run)
    refused(tpad("train-sbr", "--run", run, "--config", path), 2, str(path), *BAD_SETTINGS[text])
    assert contents(run) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train-sbr", "--set", "sbr.epoch=3"], ["unknown key `sbr.epoch` (--set sbr.epoch=3)", "did you mean `epochs`?"]),
        (["train-sbr", "--set", "sbr.epochs=many"], ["`sbr.epochs` = 'many'", "(--set sbr.epochs=many)"]),
        (["train-sbr", "--config", "none.yaml"], ["No such file", "none.yaml"]),
        (["export-embeddings", "--shard", "5/4"], ["--shard '5/4'", "2/4"]),
        (["recommend", "-k", "0"], ["'-k'", "greater than or equal to 1", "tpad recommend --help"]),
        (["recommend", "--session", " , "], ["--session names no item"]),
        (["recommend", "--sessions", "some.csv"], ["--out"]),
        (["recommend", "--sessions", "some.csv", "--out", "some.parquet", "--json"], ["--json is for one session"]),
        (["recommend", "--session", "p0003,caf\udce9"], [r"--session 'p0003,caf\udce9' is not UTF-8"]),
        (["recommend", "--filter", "kind=\udcff"], [r"--filter 'kind=\udcff' is not UTF-8"]),
        (["index", "--check", "--rebuild"], ["--check changes nothing"]),
        (["index", "--check", "--set", "sbr.index=hnsw"], ["--check changes nothing"]),
        (["recommend", "--sesion", "a"], ["--sesion", "tpad recommend --help"]),
        (["recomend"], ["'recomend'", "'recommend'"]),
        (["prepare", "--items", "a.csv"], ["--sessions", "tpad prepare --help"]),
    ],
)
def test_a_wrong_command_line_is_one_line(run: Path, args: list[str], words: list[str]) -> None:
    before = contents(run)
    refused(tpad(*args, *(["--run", run] if args[0] in (*CHAIN, "index") else [])), 2, *words)
    assert contents(run) == before


def test_a_data_folder_that_is_not_there(run: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    for name in CHAIN[:3]:
        before = contents(run)
        refused(tpad(name, "--run", run, "--data", gone), 3, f"no such data folder ({gone})", "tpad prepare")
        assert contents(run) == before
    refused(tpad("distill", "--run", tmp_path / "new", "--data", gone), 3, f"({gone})")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("export-embeddings", "run.json", ["no run here ({run})", "`tpad distill`"]),
        ("train-sbr", "embeddings", ["embeddings not found ({run}/embeddings)", "`tpad export-embeddings`"]),
        ("recommend", "sbr", ["session model not found ({run}/sbr)", "`tpad train-sbr`"]),
    ],
)
def test_a_command_before_its_turn_names_the_one_to_run(run: Path, tmp_path: Path, name: str, missing: str, words: list[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns(missing))
    before = contents(copy)
    refused(tpad(name, "--run", copy), 4, *(word.format(run=copy) for word in words))
    assert contents(copy) == before


def test_embeddings_newer_than_the_session_model_are_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    old = open_verified(copy / "embeddings", "embeddings", "")
    with stage(copy / "embeddings", "embeddings") as staging:
        for file in old.manifest["files"]:
            shutil.copy(old.path / file["name"], staging.path)
        staging.publish({key: value for key, value in old.manifest.items() if key not in OWN_KEYS} | {"fingerprint": "another"})
    before = contents(copy)
    done = tpad("recommend", "--run", copy, "--session", "p0001")
    refused(
        done,
        4,
        "embeddings v0002 are not those the session model was trained on, v0001",
        f"({copy})",
        "run `tpad index`, or `tpad train-sbr`",
    )
    assert contents(copy) == before


def test_one_flipped_bit_in_a_part_is_refused(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    part = copy / "embeddings" / "v0001" / "part-00000.parquet"
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 0b100
    part.write_bytes(bytes(data))
    before = contents(copy)
    refused(tpad("train-sbr", "--run", copy), 4, "file differs from what was published", f"({part})", "run `tpad export-embeddings` again")
    assert contents(copy) == before


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(tpad("distill", "--run", place), 5, f"({tmp_path / 'file'}", "another --run")
    assert contents(tmp_path).keys() == {"file"}
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_leave_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    refused(tpad("distill", "--run", tmp_path / "run"), 5, "permission denied", str(tmp_path / "run"), "another --run")


# --- what is no user's fault


def test_a_bug_in_tpad_keeps_its_traceback() -> None:
    code = "import cli\n@cli.app.command()\ndef broken():\n    {}['ours']\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code, "broken"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'ours'" in done.stderr


@pytest.mark.parametrize("before", [True, False])
def test_debug_before_or_after_the_command_shows_the_traceback_of_an_error(tmp_path: Path, before: bool) -> None:
    words = ["export-embeddings", "--run", tmp_path / "none"]
    done = tpad("--debug", *words) if before else tpad(*words, "--debug")
    assert done.returncode == 4
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: no run here")


def test_ctrl_c_leaves_a_checkpoint_and_130(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "run"
    process = subprocess.Popen(
        command("distill", "--run", new, "--data", run / "data", *SET, "--set", "distill.knowledge.steps=100000"),
        **{"cwd": ROOT, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    metrics = new / "distill" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 1):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert list((new / "distill" / "knowledge").glob("step-*/state.json"))


def test_help_takes_under_half_a_second() -> None:
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = tpad_from_nothing("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time: what others do on the machine is not ours
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert all(name in done.stdout for name in (*CHAIN, "prepare"))
    assert min(took) < 0.5


def test_help_cuts_no_text_in_a_narrow_terminal() -> None:
    group: Any = typer.main.get_command(cli.app)

    def helped(name: str, width: int) -> str:
        with group.make_context("tpad", ["doctor"], max_content_width=width, terminal_width=width) as context:
            command = group.commands.get(name, group)
            return str(command.get_help(context))

    for name in ("", *group.commands):
        narrow, wide = helped(name, 50), helped(name, 400)
        assert max(map(len, narrow.splitlines())) <= 50
        assert "".join(narrow.split()) == "".join(wide.split())
    assert all(command.get_short_help_str(1000) in helped("", 400) for command in group.commands.values())


def test_titles_and_ids_give_no_commands_to_the_terminal(run: Path, tmp_path: Path) -> None:
    """OSC 52 would fill the clipboard, OSC 8 hide a link, C1 do either in one byte; JSON stays JSON."""
    hostile = "\x1b]52;c;aGk=\x07 mug \x1b[2J\x9b31m\u202e\x7f"
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = open_verified(copy / "sbr", "sbr", "")
    items = pq.read_table(before.path / "items.parquet")
    place = items.column_names.index("title")
    titled = items.set_column(place, "title", pa.array([hostile] * len(items), items.schema.field("title").type))
    sink = pa.BufferOutputStream()
    pq.write_table(titled, sink, write_page_checksum=True)
    publish_again(copy, items_parquet=sink.getvalue().to_pybytes())
    control = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
    first = items["item_id"][0].as_py()
    for words in (["recommend", "--session", f"{first},{hostile}"], ["recommend", "--session", first, "--json"], ["recommend", hostile]):
        done = tpad(*words, "--run", str(copy))
        assert not control.search(done.stdout + done.stderr), words
        if "--json" in words:
            assert json.loads(done.stdout)["items"][0]["title"] == hostile
