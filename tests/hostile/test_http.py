"""Attacks on the service while others use it: floods, dribbles, smuggled and odd requests. The others do not notice."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from helpers.processes import FORK
from helpers.server import Server, serving
from recommender.serving import bounded_heads, middleware
from recommender.serving.server import serve

P99 = 0.25  # seconds that others wait at most, on a machine of its own
SHARED = 1.0  # and on one where other tests run
BOUNDS = [SHARED, pytest.param(P99, marks=pytest.mark.slow)]
POST = b"POST /recommend HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
BODY = b'{"session": []}'
WHOLE = POST + b"content-length: 15\r\n\r\n" + BODY


@pytest.fixture(scope="module")
def server(shop: Path) -> Iterator[Server]:
    with serving(shop) as started:
        started.ask("/recommend", {"session": []})
        yield started


@contextmanager
def others_wait_little(server: Server, most: float, tell: Callable[[str, object], None]) -> Iterator[None]:
    """Asks all the while what others ask, and checks how long they wait: all but one in a hundred less than `most` seconds."""
    waits: list[float] = []
    stop = threading.Event()

    def use() -> None:
        while not stop.is_set():
            began = time.monotonic()
            for path, body in (("/livez", None), ("/recommend", {"session": ["p0003"]})):
                assert server.ask(path, body).status == 200
            waits.append((time.monotonic() - began) / 2)
            time.sleep(0.01)

    user = threading.Thread(target=use)
    user.start()
    yield
    while len(waits) < 10 and user.is_alive():
        time.sleep(0.02)
    stop.set()
    user.join()
    p99 = float(np.percentile(waits, 99))
    tell("requests of others", 2 * len(waits))
    tell("most p99, ms", round(1000 * p99, 1))
    assert p99 < most


def connect(server: Server) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port))
    client.settimeout(20)
    return client


def send(client: socket.socket, data: bytes) -> bool:
    """Sends; False if the service has closed the connection."""
    try:
        client.sendall(data)
        return True
    except OSError:
        return False


def received(client: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(OSError):
        while piece := client.recv(65536):
            data += piece
    return data


FLOODS = {
    "a header value": (b"GET /livez HTTP/1.1\r\nx: ", b"y"),
    "a header name": (b"GET /livez HTTP/1.1\r\n", b"y"),
    "headers": (b"GET /livez HTTP/1.1\r\n", b"a: b\r\n"),
    "a path": (b"GET /", b"y"),
    "a query": (b"GET /items?q=", b"%41"),
    "a method": (b"", b"G"),
    "blank lines": (b"", b"\r\n"),
    "a chunk line": (POST + b"transfer-encoding: chunked\r\n\r\n1;x=", b"y"),
    "a trailer": (POST + b"transfer-encoding: chunked\r\n\r\nf\r\n" + BODY + b"\r\n0\r\nx: ", b"y"),
    "trailers": (POST + b"transfer-encoding: chunked\r\n\r\nf\r\n" + BODY + b"\r\n0\r\n", b"x: y\r\n"),
    "chunks of one byte": (POST + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a body": (POST + b"content-length: 100000000\r\n\r\n", b" "),
    "requests": (b"", b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n"),
}


@pytest.mark.parametrize("most", BOUNDS)
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_and_others_wait_little(
    server: Server, name: str, most: float, record_property: Callable[[str, object], None]
) -> None:
    """Eighty megabytes as fast as the service takes them: it soon takes no more, and meanwhile answers others."""
    begin, piece = FLOODS[name]
    pieces = piece * (1_000_000 // len(piece))
    with others_wait_little(server, most, record_property), connect(server) as client:
        client.settimeout(2)
        taken = send(client, begin) and sum(send(client, pieces) for _ in range(80))
        assert taken < 60
    assert server.ask("/livez").status == 200


ODD = {
    "two lengths": (POST + b"content-length: 15\r\ncontent-length: 16\r\n\r\n" + BODY, 400),
    "length and chunks": (POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + WHOLE, 400),
    "chunks under another name": (POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "chunks after a space": (POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    "a negative length": (POST + b"content-length: -1\r\n\r\n", 400),
    "a signed length": (POST + b"content-length: +15\r\n\r\n" + BODY, 400),
    "a length of two words": (POST + b"content-length: 1 5\r\n\r\n" + BODY, 400),
    "a length beyond all": (POST + b"content-length: 99999999999999999999999999\r\n\r\n", 400),
    "a chunk beyond all": (POST + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n", 400),
    "a chunk of no size": (POST + b"transfer-encoding: chunked\r\n\r\nx\r\n", 400),
    "a folded header": (b"GET /livez HTTP/1.1\r\nhost: a\r\nx: a\r\n b\r\n\r\n", None),
    "a null byte in a header": (b"GET /livez HTTP/1.1\r\nhost: a\r\nx: a\0b\r\n\r\n", 400),
    "a header without a name": (b"GET /livez HTTP/1.1\r\nhost: a\r\n: b\r\n\r\n", 400),
    "HTTP/2 by its first words": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "HTTP/2 by an upgrade": (b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\r\n", None),
    "a websocket": (
        b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        b"sec-websocket-key: eA==\r\n\r\n",
        None,
    ),
    "HTTP/0.9": (b"GET /livez\r\n\r\n", None),
    "HTTP/3.0": (b"GET /livez HTTP/3.0\r\nhost: a\r\n\r\n", 400),
    "a tunnel": (b"CONNECT example.org:443 HTTP/1.1\r\nhost: a\r\n\r\n", None),
    "another server": (b"GET http://example.org/livez HTTP/1.1\r\nhost: example.org\r\n\r\n", None),
    "a star": (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", None),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400),
    "bytes of no kind": (bytes(range(128, 256)) * 4, 400),
    "a path of no text": (b"GET /items/%ff%fe HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    "a path upwards": (b"GET /items/../../etc/passwd HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    "a path with control characters": (b"GET /items/%1b%5d52;c;x%07%7f%c2%9b HTTP/1.1\r\nhost: a\r\n\r\n", 404),
    "JSON nested without end": (POST + b"content-length: 200011\r\n\r\n" + b'{"session":' + b"[" * 200_000, 400),
    "JSON with a number of 5000 digits": (POST + b"content-length: 5007\r\n\r\n" + b'{"k": ' + b"9" * 5000 + b"}", None),
    "JSON that is no text": (POST + b"content-length: 4\r\n\r\n\xff\xfe\xfd\xfc", None),
    "a key of another kind": (POST + b"content-length: 15\r\nconnection: close\r\nauthorization: \xff\xfe\r\n\r\n" + BODY, 200),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_is_answered_once(server: Server, name: str) -> None:
    request, status = ODD[name]
    with connect(server) as client:
        assert send(client, request)
        if status != 200:
            client.shutdown(socket.SHUT_WR)
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 ") and answer.count(b"HTTP/1.1 ") == 1, answer
    assert int(answer[9:12]) in ([status] if status else [*range(200, 300), *range(400, 500)]), answer
    assert b"Traceback" not in answer and b"location" not in answer.lower()
    assert server.ask("/livez").status == 200


@pytest.mark.parametrize("path", ["/info/", "/items/", "//evil.example/", "/livez/", "/docs", "/recommend/"])
def test_no_answer_names_the_host_of_a_request(server: Server, path: str) -> None:
    for host in ("evil.example", "evil.example:80@x", "[::1]", "a\tb", ""):
        with connect(server) as client:
            send(client, f"GET {path} HTTP/1.1\r\nhost: {host}\r\nx-forwarded-host: evil.example\r\nconnection: close\r\n\r\n".encode())
            answer = received(client)
        assert b"evil" not in answer.replace(path.encode(), b"") and not answer.startswith(b"HTTP/1.1 3"), answer


def test_a_service_answers_to_its_name_only(shop: Path) -> None:
    with serving(shop, "--allowed-host", "Shop.example", "--allowed-host", "127.0.0.1") as server:
        assert [server.ask("/readyz", host=host).status for host in ("shop.example:80", "shop.EXAMPLE")] == [200, 200]
        assert server.ask("/readyz").status == 200
        refused = [server.ask("/readyz", host=host) for host in ("evil.example", "shop.example.evil.example", "localhost")]
        assert [answer.status for answer in refused] == [421] * 3
        assert not any(b"evil" in answer.body for answer in refused)


def serve_hurriedly(run: Path, port: int) -> None:
    middleware.FIRM_SECONDS, middleware.BODY_SECONDS = 0.5, 4.0
    bounded_heads.UNREAD_SECONDS = bounded_heads.IDLE_SECONDS = 1.0
    serve(run, lambda: None, "127.0.0.1", port, None, 1, print)


@pytest.fixture(scope="module")
def hurried(shop: Path) -> Iterator[Server]:
    """A service whose limits of time are short."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = FORK.Process(target=serve_hurriedly, args=(shop, port))
    process.start()
    server = object.__new__(Server)
    server.url, server.port = f"http://127.0.0.1:{port}", port
    for _ in range(600):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.05)
    yield server
    process.terminate()
    process.join()


@pytest.mark.parametrize("most", BOUNDS)
def test_bodies_that_dribble_do_not_hold_the_places(hurried: Server, most: float, record_property: Callable[[str, object], None]) -> None:
    """As many as there are places, a byte now and then: others are answered, and each dribble ends."""
    slow = [connect(hurried) for _ in range(middleware.MAX_AT_ONCE)]
    for client in slow:
        send(client, POST + b"content-length: 15\r\n\r\n{")
    time.sleep(0.6)
    with others_wait_little(hurried, most, record_property):
        for _ in range(4):
            time.sleep(0.25)
            for client in slow:
                send(client, b" ")
    time.sleep(3.5)
    answers = [received(client) for client in slow]
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    for client in slow:
        client.close()


def test_silent_clients_and_such_as_read_nothing_are_dropped(hurried: Server) -> None:
    with connect(hurried) as silent:
        assert received(silent) == b""
    body = json.dumps({"sessions": [["p0003"]] * 64, "k": 500}).encode()
    head = b"POST /recommend/batch HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", hurried.port))
        deaf.settimeout(2)
        send(deaf, (head + body) * 16)  # megabytes of answers that nobody reads
        time.sleep(4)
        assert received(deaf).count(b"HTTP/1.1 200") < 16
    assert hurried.ask("/livez").status == 200


def test_the_log_is_of_one_line_of_json_for_each_request_whatever_it_held(server: Server) -> None:
    time.sleep(0.2)
    for line in server.lines:
        if line.startswith("{"):
            assert isinstance(json.loads(line), dict)
        assert all(letter.isprintable() or letter == "\n" for letter in line), repr(line)
        assert "Traceback" not in line
