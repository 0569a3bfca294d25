"""Tests the service over HTTP: answers, refusals, new versions under load, the key, shutdown."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from helpers.fake_embeddings import publish_embeddings
from helpers.processes import FORK, tpad, tpad_from_nothing
from helpers.server import HOSTILE, SETTINGS, Server, publish_again, serving, write_shop
from pipeline.core.artifact import Version
from pipeline.core.config_file import load_config
from pipeline.core.files import sha256_file
from recommender.serving import bounded_heads, middleware
from recommender.serving.recommender import Recommender
from recommender.serving.server import serve
from recommender.serving.thumbnails import Thumbnails
from recommender.training.train import train_sbr


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("serve") / "run", tiny_data)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    with serving(run) as started:
        yield started


@pytest.fixture(scope="module")
def ids(run: Path) -> list[str]:
    return Recommender.load(run).item_ids


# --- answers


def test_the_answer_equals_that_of_the_library(server: Server, run: Path, ids: list[str]) -> None:
    session = [ids[3], "nonsense", ids[5], "nonsense"]
    for exclude in (False, True):
        wanted = Recommender.load(run).recommend(session, 5, exclude)
        answer = server.ask("/recommend", {"session": session, "k": 5, "exclude_seen": exclude}).json
        assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in wanted.items]
        assert [item["score"] for item in answer["items"]] == pytest.approx([item.score for item in wanted.items], abs=1e-4)
        assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5]
        assert (answer["unknown"], answer["fallback"], answer["version"]) == (["nonsense"], None, "v0001")


def test_an_answer_is_filtered_and_diversified(server: Server, run: Path, ids: list[str]) -> None:
    wish = {"filters": {"kind": ["mug", "chair"]}, "diversify": 0.7}
    wanted = Recommender.load(run).recommend([ids[3]], 4, **wish)
    ranked = server.ask("/recommend", {"session": [ids[3]], "k": 4, **wish}).json["items"]
    assert [item["item_id"] for item in ranked] == [item.item_id for item in wanted.items]
    assert {server.ask(f"/items/{item['item_id']}").json["attributes"]["kind"] for item in ranked} <= {"mug", "chair"}
    for filters, status, said in (
        ({"colour of money": ["red"]}, 404, "no such attribute: colour of money"),
        ({"kind": ["nothing"]}, 422, "no item has kind 'nothing' (filter); use values of the catalogue"),
    ):
        for path, sessions in (("/recommend", {"session": []}), ("/recommend/batch", {"sessions": [[ids[3]]]})):
            refused = server.ask(path, {**sessions, "filters": filters})
            assert (refused.status, refused.json["error"]) == (status, said)


def test_new_items_shifts_the_scores_of_cold_items(run: Path, tmp_path: Path) -> None:
    """On the model of the training sessions alone, in which some items are cold."""
    folder = tmp_path / "run"
    shutil.copytree(run / "data", folder / "data")
    shutil.copytree(run / "embeddings", folder / "embeddings")
    (folder / "run.json").write_text('{"data": "data"}')
    train_sbr(load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.refit=false", "sbr.models=[full]"]), folder, folder / "data")
    library = Recommender.load(folder)
    new = {item for item, known in zip(library.item_ids, library.arrays["known"], strict=True) if not known}
    assert 0 < len(new) < 40
    warm = next(item for item in library.item_ids if item not in new)
    with serving(folder) as server:

        def ask(path: str = "/recommend", body: Any = None, **wish: object) -> dict[str, float]:
            scores_of = server.ask(path, {"session": [warm], "k": 40} | wish | (body or {})).json
            return {item["item_id"]: item["score"] for item in scores_of["items"]}

        plain = ask()
        for shift in (-3, 0, 2.5):
            scores_of = ask(new_items=shift)
            assert scores_of == pytest.approx({item: score + shift * (item in new) for item, score in plain.items()}, abs=1e-3)
            assert list(scores_of) == [item.item_id for item in library.recommend([warm], 40, new_items=shift).items]
        assert ask(new_items=None) == plain
        assert list(ask(session=[], new_items=20))[: len(new)] == [item for item in library.item_ids if item in new]
        many = server.ask("/recommend/batch", {"sessions": [[warm]] * 9, "k": 40, "new_items": 2.5}).json["answers"]
        assert all(
            {item["item_id"]: item["score"] for item in answer["items"]} == pytest.approx(ask(new_items=2.5), abs=1e-3) for answer in many
        )


@pytest.mark.parametrize("session", [[], ["nonsense"]])
def test_a_session_without_known_items_gets_the_popular_ones(server: Server, session: list[str]) -> None:
    answer = server.ask("/recommend", {"session": session}).json
    assert answer["fallback"] == "popular"
    assert len(answer["items"]) == 10


def test_a_batch_gets_the_rankings_of_single_sessions(server: Server, ids: list[str]) -> None:
    sessions = [[ids[1]], [], [ids[2], ids[4]]]
    reply = server.ask("/recommend/batch", {"sessions": sessions, "k": 3}).json
    for session, answer in zip(sessions, reply["answers"], strict=True):
        alone = server.ask("/recommend", {"session": session, "k": 3}).json
        assert [item["item_id"] for item in answer["items"]] == [item["item_id"] for item in alone["items"]]
        assert answer["fallback"] == alone["fallback"]


def test_the_catalogue_is_searched_and_paged(server: Server, run: Path, ids: list[str]) -> None:
    pages = [server.ask(f"/items?limit=15&offset={offset}").json for offset in (0, 15, 30, 45)]
    assert [len(page["items"]) for page in pages] == [15, 15, 10, 0]
    assert sorted(item["item_id"] for page in pages for item in page["items"]) == sorted(ids)
    assert pages[0]["total"] == 40
    popular = [item.item_id for item in Recommender.load(run).recommend([], 15).items]
    assert [item["item_id"] for item in pages[0]["items"]] == popular
    matches = server.ask("/items?q=SCRIPT%20Taken").json
    assert [item["title"] for item in matches["items"]] == [HOSTILE]
    assert server.ask(f"/items?q={ids[11]}").json["items"][0]["item_id"] == ids[11]


def test_an_item_has_attributes_an_image_and_similar_items(server: Server, ids: list[str]) -> None:
    assert {"kind", "style"} <= server.ask(f"/items/{ids[3]}").json["attributes"].keys()
    image = server.ask(f"/items/{ids[3]}/image")
    assert image.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(image.body)).format == "JPEG"
    assert server.ask(f"/items/{ids[8]}/image").status == 404  # its bytes are not an image
    nearest = {}
    for half in ("knowledge", "transition"):
        neighbours = server.ask(f"/items/{ids[3]}/similar?half={half}&k=39").json["items"]
        assert {item["item_id"] for item in neighbours} == {*ids} - {ids[3]}
        assert [item["score"] for item in neighbours] == sorted((item["score"] for item in neighbours), reverse=True)
        nearest[half] = [item["item_id"] for item in neighbours]
        assert {ids.index(item) % 6 for item in nearest[half][:3]} == {3}  # the groups that the vectors were made of
    assert nearest["knowledge"] != nearest["transition"]


def test_a_thumbnail_requested_before_a_reload_is_not_cached_after_it(tiny_data: Path, tmp_path: Path) -> None:
    items = pq.read_table(tiny_data / "items.parquet")
    turned = items.set_column(
        items.column_names.index("image"), items.schema.field("image"), items["image"].take([*range(1, len(items)), 0])
    )
    item_id = items["item_id"][3].as_py()
    versions = []
    for table in (turned, items):
        pq.write_table(table, tmp_path / "items.parquet")
        versions.append(Version(tmp_path, {"catalogue_sha256": sha256_file(tmp_path / "items.parquet")}, "", ""))

    async def ask() -> list[bytes | None]:
        thumbnails = Thumbnails(lambda: tmp_path)
        thumbnails.reload(versions[1])
        before = asyncio.create_task(thumbnails.thumbnail(item_id))
        await asyncio.sleep(0)  # the request starts
        thumbnails.thread.submit(pq.write_table, turned, tmp_path / "items.parquet")
        thumbnails.reload(versions[0])
        return [await before, *[await thumbnails.thumbnail(item_id) for _ in range(2)]]

    old, new, again = asyncio.run(ask())
    assert old and new and old != new == again


def test_a_service_goes_on_over_the_data_of_the_new_version(tiny_data: Path, tmp_path: Path) -> None:
    run, new = tmp_path / "run", tmp_path / "new"
    write_shop(run, tiny_data)
    shutil.copytree(run / "data", new)
    items = pq.read_table(new / "items.parquet")
    place, kinds = items.column_names.index("kind"), ["changed"] * len(items)
    pq.write_table(items.set_column(place, items.schema.field("kind"), [kinds]), new / "items.parquet")
    item_id = items["item_id"][3].as_py()
    with serving(run) as server:
        before = server.ask(f"/items/{item_id}").json
        assert before["attributes"]["kind"] not in ("changed", "")
        publish_embeddings(run, new, np.arange(len(items)) % 6, SETTINGS)
        wait_for(lambda: tpad("index", "--run", run, "--data", new).returncode == 0)
        wait_for(lambda: server.ask("/readyz").json["version"] == "v0002")
        wait_for(lambda: server.ask(f"/items/{item_id}").json["attributes"])
        after = server.ask(f"/items/{item_id}").json
        assert (after["version"], after["attributes"]["kind"]) == ("v0002", "changed")
        assert server.ask(f"/items/{item_id}/image").status == 200
        shutil.copy(run / "data" / "items.parquet", new / "items.parquet")  # other items than those of the version
        publish_again(run)
        wait_for(lambda: server.ask("/readyz").json["version"] == "v0003")
        assert server.ask(f"/items/{item_id}").json["attributes"] == {}
    assert any("these are not the items of v0003" in line for line in server.lines)


def test_health_info_and_metrics_describe_the_service(server: Server) -> None:
    assert server.ask("/livez").json == {"status": "alive"}
    assert server.ask("/readyz").json == {"status": "ready", "version": "v0001"}
    info = server.ask("/info").json
    assert (info["items"], info["version"], info["refused"]) == (40, "v0001", None)
    assert info["figures_of"] == "the held-out twin, trained without validation and test sessions"
    before = numbers(server)
    server.ask("/recommend", {"session": ["nonsense", "other"]})
    after = numbers(server)
    for name, more in (
        ("tpad_sessions_total", 1),
        ("tpad_sessions_popular_total", 1),
        ("tpad_unknown_items_total", 2),
        ('tpad_requests_total{method="POST",route="/recommend",status="200"}', 1),
        ('tpad_request_seconds_count{route="/recommend"}', 1),
    ):
        assert after[name] == before.get(name, 0) + more, name
    assert after['tpad_version{version="v0001"}'] == 1


def numbers(server: Server, **headers: str) -> dict[str, float]:
    lines = server.ask("/metrics", **headers).body.decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_every_request_has_an_id_and_a_line_of_json(server: Server) -> None:
    assert server.ask("/livez", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    forged = server.ask("/livez", x_request_id='x", "status": 500').headers["x-request-id"]
    missing = server.ask("/nowhere")
    assert missing.json == {"error": "Not Found", "request_id": missing.headers["x-request-id"]}
    wait_for(lambda: len(server.lines) and missing.json["request_id"] in server.lines[-1])
    lines = {line.get("request_id"): line for line in map(json.loads, server.lines)}
    assert lines["mine-1"] | {"time": "", "ms": 0} == {
        **{"time": "", "level": "info", "message": "answered", "request_id": "mine-1"},
        **{"method": "GET", "path": "/livez", "status": 200, "ms": 0},
    }
    assert lines[forged]["status"] == 200
    assert lines[missing.json["request_id"]]["status"] == 404


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- refusals


def test_faulty_requests_are_refused_with_the_right_status(server: Server) -> None:
    deep = b'{"session": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    million = json.dumps({"session": [str(n) for n in range(1_000_000)]}).encode()
    for body, status in (
        (b"", 422),
        (b"nonsense", 400),
        (b"[]", 422),
        (b"{}", 422),
        (b'{"session": "a"}', 422),
        (b'{"session": [1]}', 422),
        (b'{"session": [""]}', 422),
        (b'{"session": ["\\ud800"]}', 422),
        (b'{"session": [], "more": 1}', 422),
        *((b'{"session": [], "filters": %s}' % f, 422) for f in (b'{"kind": []}', b'{"kind": ["\\ud800"]}', b'{"\\ud800": ["mug"]}')),
        *((b'{"session": [], "k": %s}' % k, 422) for k in (b"0", b"-1", b"1e9", b"1000000000", b"NaN", b"true", b'"5"', b"null")),
        *(
            (b'{"session": [], "new_items": %s}' % n, 422)
            for n in (b"20.5", b"-21", b"1e400", b"NaN", b"-Infinity", b'"2"', b"true", b"[]")
        ),
        (b'{"session": [], "k": ' + b"9" * 5000 + b"}", 400),
        (b'{"session": ["\xff\xfe"]}', 400),
        (deep, 400),
        (json.dumps({"session": ["a" * 600]}).encode(), 422),
        (json.dumps({"session": ["a"] * 1001}).encode(), 422),
        (million, 413),
        (b" " * 10_000_000, 413),
    ):
        refusal = server.ask("/recommend", body)
        assert refusal.status == status, body[:80]
        assert refusal.json.keys() == {"error", "request_id"}
        assert len(refusal.body) < 500
    assert server.ask("/recommend/batch", {"sessions": [[]] * 65}).status == 422
    assert server.ask("/items?limit=1000").status == 422
    assert server.ask("/items/p0001/similar?half=other").status == 422
    assert server.ask("/items/nonsense").status == 404
    assert server.ask("/recommend", method="DELETE").status == 405
    assert server.ask("/recommend", {"session": [], "k": 500}).status == 200


def test_a_body_without_a_length_is_counted_as_it_comes(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    pieces = (b" " * 100_000 for _ in range(100))
    connection.request("POST", "/recommend", pieces, {"content-type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_idle_hurried_and_garbled_clients_do_no_harm(server: Server) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
    ask = b'POST /recommend HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n{"session": []}'
    for sent in [ask] * 20 + [ask[:50], ask[:-5], b"\x16\x03\x01 not HTTP\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]:
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(sent)
    assert server.ask("/recommend", {"session": []}).status == 200
    for client in idle:
        client.close()
    wait_for(lambda: numbers(server)["tpad_requests_in_flight"] == 1)


def test_a_head_without_end_is_refused_while_others_are_answered(server: Server) -> None:
    """Its bytes were held and searched again with every piece: one client without a key could stop the service."""
    with socket.create_connection(("127.0.0.1", server.port)) as flood:
        flood.sendall(b"GET /livez HTTP/1.1\r\nhost: a\r\nx: ")
        with suppress(ConnectionError):  # the service closes while pieces are on their way
            for _ in range(50):
                flood.sendall(b"y" * 1_000_000)
                assert server.ask("/livez").status == 200
        with suppress(ConnectionError):
            assert flood.recv(100).startswith(b"HTTP/1.1 431")
    with socket.create_connection(("127.0.0.1", server.port)) as many, suppress(ConnectionError):
        many.sendall(b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n")
        assert many.recv(100).startswith(b"HTTP/1.1 431")
    large = server.ask("/livez", x="y" * 60_000)
    assert large.status == 200


def test_requests_of_one_connection_each_have_the_whole_limit(server: Server) -> None:
    one = b"GET /livez HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000 + b"\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(one * 3)  # without waiting for answers
        client.settimeout(20)
        answers = b""
        while answers.count(b'{"status":"alive"}') < 3:
            answers += client.recv(65536)
    assert answers.count(b"HTTP/1.1 200") == 3


def test_requests_beyond_the_concurrency_limit_get_429(server: Server) -> None:
    """256 requests that wait for their bodies fill the limit."""
    head = b"POST /recommend HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n"
    waiting = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(256)]
    for client in waiting:
        client.sendall(head)
    wait_for(lambda: numbers(server)["tpad_requests_in_flight"] == 257)
    refused = server.ask("/recommend", {"session": []})
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    assert server.ask("/livez").status == 200
    for client in waiting:
        client.sendall(b'{"session": []}')
    for client in waiting:
        assert client.recv(20).startswith(b"HTTP/1.1 200")
        client.close()


def serve_impatiently(run: Path, port: int) -> None:
    middleware.BODY_TIMEOUT = bounded_heads.HEAD_SECONDS = 0.2
    serve(run, lambda: None, "127.0.0.1", port, None, 1, print)


def test_a_body_that_stalls_is_answered_by_408_and_the_connection_closed(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = FORK.Process(target=serve_impatiently, args=(run, port))
    process.start()
    wait_for(lambda: listens(port))
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b'POST /recommend HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n{"ses')
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"no data received for" in answer
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nhost:")
        assert b"".join(iter(lambda: slow.recv(65536), b"")).startswith(b"HTTP/1.1 408")
    process.terminate()
    process.join()
    assert process.exitcode == 143


@pytest.mark.parametrize("phases", ["fuzzing", pytest.param("coverage,fuzzing,stateful", marks=pytest.mark.slow)])
def test_the_openapi_document_is_kept(server: Server, phases: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--phases", phases, "--no-color"]
    words += ["--max-examples", "5" if phases == "fuzzing" else "100"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- new versions, the key, shutdown


def test_new_versions_are_loaded_under_load_with_a_key_and_requests_finish_at_shutdown(run: Path, ids: list[str], tmp_path: Path) -> None:
    later = tmp_path / "run"
    shutil.copytree(run / "sbr", later / "sbr")
    key = tmp_path / "key"
    key.write_text("a key of some length\n")
    with serving(later, "--key-file", key) as server:
        good = {"authorization": "Bearer a key of some length"}
        for path in ("/info", "/items", "/metrics", "/openapi.json", "/nowhere"):
            assert server.ask(path).status == 401
            assert server.ask(path, authorization="Bearer a key of some lengtH").status == 401
        assert [server.ask(path).status for path in ("/", "/livez", "/readyz")] == [200] * 3
        assert server.ask("/info", **good).status == 200
        assert server.ask(f"/items/{ids[3]}/image", **good).status == 404  # there is no data folder here
        assert server.ask(f"/items/{ids[3]}", **good).json["attributes"] == {}

        answers: list[tuple[str, list[dict[str, Any]]]] = []
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                reply = server.ask("/recommend", {"session": [ids[3]]}, **good)
                assert reply.status == 200
                answers.append((reply.json["version"], reply.json["items"]))

        clients = [threading.Thread(target=load) for _ in range(2)]
        for client in clients:
            client.start()
        weights = load_file(open_model(later))
        turned = publish_again(later, model_safetensors=save(weights | {"popularity_weight": np.array(3, np.float32)}))
        wait_for(lambda: server.ask("/info", **good).json["version"] == turned.name)
        publish_again(later, model_safetensors=save(weights | {"popularity_weight": np.array(np.nan, np.float32)}))
        wait_for(lambda: server.ask("/info", **good).json["refused"])
        assert "not finite" in server.ask("/info", **good).json["refused"]["error"]
        damaged = later / "sbr" / "v0004"
        shutil.copytree(later / "sbr" / turned.name, damaged)
        (damaged / "items.parquet").write_bytes(b"damaged")
        pointer = json.loads((later / "sbr" / "current").read_bytes()) | {"version": "v0004", "manifest_sha256": turned.manifest_sha256}
        (later / "sbr" / "current").write_text(json.dumps(pointer, sort_keys=True, indent=1) + "\n")
        wait_for(lambda: "items.parquet" in server.ask("/info", **good).json["refused"]["error"])
        count = numbers(server, **good)
        assert (count['tpad_reloads_total{result="refused"}'], count['tpad_reloads_total{result="activated"}']) == (2, 1)
        stop.set()
        for client in clients:
            client.join()
        of_version = {name: [items for version, items in answers if version == name] for name in ("v0001", turned.name)}
        assert {name for name, _ in answers} == of_version.keys()
        assert all(items == reply[0] for reply in of_version.values() for items in reply)
        assert of_version["v0001"][0] != of_version[turned.name][0]

        half = socket.create_connection(("127.0.0.1", server.port))
        head = "POST /recommend HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 15\r\n"
        half.sendall(f"{head}authorization: {good['authorization']}\r\n\r\n".encode())
        wait_for(lambda: numbers(server, **good)["tpad_requests_in_flight"] == 2)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not listens(server.port))
        half.sendall(b'{"session": []}')
        answer = b"".join(iter(lambda: half.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"fallback":"popular"' in answer
        assert server.process.wait(60) == 143


def test_several_processes_answer_at_one_port(run: Path, ids: list[str], tmp_path: Path) -> None:
    later = tmp_path / "run"
    shutil.copytree(run / "sbr", later / "sbr")
    with serving(later, "--workers", 2) as server:

        def by_each(path: str, body: Any = None) -> list[Any]:
            """The answer of each process while the other is stopped."""
            answers = []
            for quiet in workers(server):
                os.kill(quiet, signal.SIGSTOP)
                try:
                    answers.append(server.ask(path, body).json)
                finally:
                    os.kill(quiet, signal.SIGCONT)
            return answers

        one, other = by_each("/recommend", {"session": [ids[3]]})
        assert one["items"] == other["items"]
        assert [reply["version"] for reply in (one, other)] == ["v0001"] * 2
        asked = 'tpad_requests_total{method="POST",route="/recommend",status="200"}'
        wait_for(lambda: numbers(server).get(asked) == 2)  # counted when they are answered
        assert numbers(server)["tpad_sessions_total"] == 2
        publish_again(later)
        wait_for(lambda: [reply["version"] for reply in by_each("/readyz")] == ["v0002"] * 2)
        count = numbers(server)
        assert [count[f'tpad_version{{version="{name}"}}'] for name in ("v0001", "v0002")] == [0, 1]
        assert count['tpad_reloads_total{result="activated"}'] == 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 143
        assert not listens(server.port)


@pytest.mark.parametrize("end", ["of one", "of the first"])
def test_several_processes_end_together(run: Path, end: str) -> None:
    with serving(run, "--workers", 2) as server:
        started = workers(server)
        os.kill(started[0] if end == "of one" else server.process.pid, signal.SIGKILL)
        if end == "of one":
            assert server.process.wait(60) == 5
        wait_for(lambda: not any(lives(pid) for pid in started))
        wait_for(lambda: not listens(server.port))
    assert ["exit code -9" in line for line in server.lines] == [True] * (end == "of one")  # and nothing else is said


def lives(pid: int) -> bool:
    """Whether a process runs; False for one that has ended, also before its parent has waited for it."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def workers(server: Server) -> list[int]:
    """The ids of the worker processes. /proc/PID/task/PID/children may omit some while they run."""
    pids = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended
            if f"\nPPid:\t{server.process.pid}\n" in status.read_text():
                pids.append(int(status.parent.name))
    return pids


def open_model(run: Path) -> Path:
    return run / "sbr" / str(json.loads((run / "sbr" / "current").read_bytes())["version"]) / "model.safetensors"


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


# --- the command


def test_an_error_at_the_start_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, code, said in (
            (["--run", tmp_path], 4, "tpad train-sbr"),
            (["--run", run, "--port", port], 5, "in use"),
            (["--run", run, "--host", "a..b"], 5, "cannot listen"),
            (["--run", run, "--key-file", tmp_path / "none"], 2, "not readable"),
            (["--run", run, "--key-file", tmp_path / "short"], 2, "not fit for a key"),
        ):
            done = tpad("serve", *words)
            assert done.returncode == code, done.stderr
            assert re.fullmatch(rf"error: [^\n]*{said}[^\n]*\n", done.stderr)
    several = tpad_from_nothing("serve", "--run", tmp_path, "--workers", 2)
    assert several.returncode == 4
    assert re.fullmatch(r"error: [^\n]*tpad train-sbr[^\n]*\n", several.stderr)
