"""Tests part claims: several processes write one version, each part once, and no part is lost when some die, hang or start late."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.artifact import open_verified, published, stage
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.export import part_claims as module
from pipeline.export.part_claims import PartClaims, current_pointer

NAMES = [f"part-{n:05d}.parquet" for n in range(12)]
FORK = multiprocessing.get_context("fork")  # no torch here


def whole(path: Path, name: str) -> bool:
    try:
        return bool(pq.read_table(path, page_checksum_verification=True)["name"].to_pylist() == [name])
    except (OSError, pa.ArrowException):
        return False


def open_claims(root: Path, fingerprint: str = "one") -> PartClaims:
    claims = PartClaims(root, "embeddings", fingerprint, whole)
    assert claims.begin(current_pointer(root))
    return claims


def work(root: Path, log: Path, seconds: float = 0.0, fingerprint: str = "one") -> None:
    """Claims and adds parts until none is left, then publishes; logs a line for each part."""
    with open_claims(root, fingerprint) as claims:
        while claims.left(NAMES):
            for name in claims.take(NAMES):
                with log.open("a") as file:
                    file.write(f"{name} {os.getpid()}\n")
                time.sleep(seconds)
                claims.add(name, pa.table({"name": [name]}))
            time.sleep(0.01)
    claims.publish(lambda: {"fingerprint": fingerprint}, 2)


def begin(*arguments: Any) -> Any:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def logged(log: Path) -> list[list[str]]:
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_each_part_is_made_once_and_one_version_published(tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    processes = [begin(root, log, 0.01) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(name for name, _ in logged(log)) == NAMES
    assert len({pid for _, pid in logged(log)}) > 1
    assert [file["name"] for file in open_verified(root, "embeddings", "").manifest["files"]] == NAMES
    assert sorted(path.name for path in root.iterdir()) == [".lock", "current", "v0001"]


def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    process = begin(root, log, 60.0)
    wait_for(lambda: logged(log))
    process.kill()
    process.join()
    with open_claims(root) as claims:
        assert next(claims.take(NAMES)) == NAMES[0]


def test_a_process_that_hangs_delays_nobody_for_long_and_does_no_harm_when_it_wakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    root, log = tmp_path / "root", tmp_path / "log"
    process = begin(root, log, 0.2)
    wait_for(lambda: logged(log))
    os.kill(process.pid, signal.SIGSTOP)
    work(root, log)
    version = open_verified(root, "embeddings", "")
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert open_verified(root, "embeddings", "") == version


def test_a_slow_process_keeps_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    root, log = tmp_path / "root", tmp_path / "log"
    processes = [begin(root, log, 0.6) for _ in range(2)]
    for process in processes:
        process.join()
    assert sorted(name for name, _ in logged(log)) == NAMES


def test_a_claim_of_another_machine_counts_until_it_is_stale(tmp_path: Path) -> None:
    """Like a folder shared between machines without locks."""
    with open_claims(tmp_path) as claims:
        claim = claims.work / f"{NAMES[0]}.claim"
        claim.write_text("some-other-host")
        assert next(claims.take(NAMES)) == NAMES[1]
        os.utime(claim, (time.time() - 2 * module.STALE_SECONDS,) * 2)
        assert next(claims.take(NAMES)) == NAMES[0]


def test_another_export_is_refused_while_one_is_alive_and_clears_away_a_dead_one(tmp_path: Path) -> None:
    with open_claims(tmp_path, "one") as claims:
        name = next(claims.take(NAMES))
        claims.add(name, pa.table({"name": [name]}))
        next(claims.take(NAMES))
        with pytest.raises(UserError, match="another tpad is exporting here") as error:
            open_claims(tmp_path, "two")
        assert error.value.code == ARTIFACT
    assert open_claims(tmp_path, "one").left(NAMES) == NAMES[1:]
    assert open_claims(tmp_path, "two").left(NAMES) == NAMES
    assert open_claims(tmp_path, "one").left(NAMES) == NAMES


def test_another_export_is_refused_before_the_first_has_taken_a_part(tmp_path: Path) -> None:
    with open_claims(tmp_path, "one"), pytest.raises(UserError, match="another tpad is exporting here"):
        open_claims(tmp_path, "two")


def test_a_version_of_another_export_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    with open_claims(tmp_path, "one") as claims:
        pass
    work(tmp_path, tmp_path / "log", fingerprint="two")
    with pytest.raises(UserError, match="was published meanwhile") as error:
        claims.publish(lambda: {"fingerprint": "one"}, 2)
    assert error.value.code == ARTIFACT


def test_a_part_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    with open_claims(tmp_path) as claims:
        for name in claims.take(NAMES[:3]):
            claims.add(name, pa.table({"name": [name]}))
    (claims.staging.path / NAMES[1]).write_bytes(b"PAR1")
    work(tmp_path, tmp_path / "log")
    assert [name for name, _ in logged(tmp_path / "log")] == [NAMES[1], *NAMES[3:]]


def test_a_kill_between_rename_and_pointer_costs_no_part(tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    with stage(root, "embeddings") as staging:
        staging.publish({"fingerprint": "before"})
    pointer = current_pointer(root)
    work(root, log)
    (root / "current").rename(root / ".next")
    (root / "current").write_bytes(pointer)  # as a kill just before leaves it
    assert not PartClaims(root, "embeddings", "one", whole).begin(pointer)  # plan again: there is a new version
    assert open_verified(root, "embeddings", "").name == "v0002"
    assert sorted(path.name for path in root.iterdir()) == [".lock", "current", "v0001", "v0002"]


def test_a_version_that_the_user_has_gone_back_from_stays_and_is_not_taken_up_again(tmp_path: Path) -> None:
    for number in range(2):
        with stage(tmp_path, "embeddings") as staging:
            staging.publish({"fingerprint": str(number)})
        if not number:
            pointer = current_pointer(tmp_path)
    (tmp_path / "current").write_bytes(pointer)
    version = published(tmp_path, "embeddings")
    assert version is not None and version.name == "v0001"
    assert (tmp_path / "v0002").is_dir()


def test_a_version_published_meanwhile_is_noticed(tmp_path: Path) -> None:
    pointer = current_pointer(tmp_path)
    work(tmp_path, tmp_path / "log")
    assert not PartClaims(tmp_path, "embeddings", "one", whole).begin(pointer)
