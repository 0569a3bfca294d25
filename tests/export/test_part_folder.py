"""Tests the folder of parts: shares of one export in several processes, and no part is lost when some die or start late."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.artifact import open_verified, published, stage
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.export import part_folder as module
from pipeline.export.part_folder import PartFolder, current_pointer

NAMES = [f"part-{n:05d}.parquet" for n in range(12)]
FORK = multiprocessing.get_context("fork")  # no torch here


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)


def whole(path: Path, name: str) -> bool:
    try:
        return bool(pq.read_table(path, page_checksum_verification=True)["name"].to_pylist() == [name])
    except (OSError, pa.ArrowException):
        return False


def open_folder(root: Path, fingerprint: str = "one", shared: bool = False) -> PartFolder:
    folder = PartFolder(root, "embeddings", fingerprint, shared, whole)
    assert folder.begin(current_pointer(root))
    return folder


def work(root: Path, log: Path, seconds: float = 0.0, fingerprint: str = "one", share: slice = slice(None)) -> None:
    """Adds the missing parts of a share and publishes if none is left; logs a line for each part."""
    with open_folder(root, fingerprint, share != slice(None)) as folder:
        for name in folder.missing(NAMES[share]):
            with log.open("a") as file:
                file.write(f"{name}\n")
            time.sleep(seconds)
            folder.add(name, pa.table({"name": [name]}))
        if not folder.missing(NAMES):
            folder.publish(lambda: {"fingerprint": fingerprint}, 2)


def begin(*arguments: Any) -> Any:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def logged(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_each_share_is_done_once_and_one_version_published(tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    processes = [begin(root, log, 0.01, "one", slice(rank, None, 3)) for rank in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(logged(log)) == NAMES
    assert [file["name"] for file in open_verified(root, "embeddings", "").manifest["files"]] == NAMES
    assert sorted(path.name for path in root.iterdir()) == [".lock", "current", "v0001"]


def test_what_a_killed_process_has_added_stays_and_a_second_start_does_the_rest(tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    process = begin(root, log, 0.05)
    wait_for(lambda: len(logged(log)) > 3)
    process.kill()
    process.join()
    before = logged(log)
    work(root, log)
    assert logged(log)[len(before) :] == NAMES[len(before) - 1 :]


def test_a_share_may_join_and_another_export_may_not(tmp_path: Path) -> None:
    with open_folder(tmp_path, "one", shared=True), open_folder(tmp_path, "one", shared=True) as second:
        second.add(NAMES[0], pa.table({"name": [NAMES[0]]}))
        for fingerprint, shared in (("two", True), ("two", False), ("one", False)):
            with pytest.raises(UserError, match="another tpad is exporting here") as error:
                open_folder(tmp_path, fingerprint, shared)
            assert error.value.code == ARTIFACT
    assert open_folder(tmp_path, "one").missing(NAMES) == NAMES[1:]


def test_an_export_alone_is_alone_and_clears_away_a_dead_one(tmp_path: Path) -> None:
    with open_folder(tmp_path, "one"), pytest.raises(UserError, match="another tpad is exporting here"):
        open_folder(tmp_path, "one", shared=True)
    with open_folder(tmp_path, "one") as folder:
        folder.add(NAMES[0], pa.table({"name": [NAMES[0]]}))
    with open_folder(tmp_path, "two") as other:
        assert other.missing(NAMES) == NAMES
    with open_folder(tmp_path, "one") as folder:
        assert folder.missing(NAMES) == NAMES


def test_an_export_that_is_about_to_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 30.0)
    root, log = tmp_path / "root", tmp_path / "log"
    process = begin(root, log, 0.02)
    wait_for(lambda: logged(log))
    assert not PartFolder(root, "embeddings", "one", False, whole).begin(b"")  # it has published: the export is planned again
    process.join()
    assert len(logged(log)) == len(NAMES)


def test_a_version_of_another_export_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    with open_folder(tmp_path, "one") as folder:
        pass
    work(tmp_path, tmp_path / "log", fingerprint="two")
    with pytest.raises(UserError, match="was published meanwhile") as error:
        folder.publish(lambda: {"fingerprint": "one"}, 2)
    assert error.value.code == ARTIFACT


def test_a_part_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    with open_folder(tmp_path) as folder:
        for name in NAMES[:3]:
            folder.add(name, pa.table({"name": [name]}))
    (folder.staging.path / NAMES[1]).write_bytes(b"PAR1")
    work(tmp_path, tmp_path / "log")
    assert logged(tmp_path / "log") == [NAMES[1], *NAMES[3:]]


def test_a_kill_between_rename_and_pointer_costs_no_part(tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "log"
    with stage(root, "embeddings") as staging:
        staging.publish({"fingerprint": "before"})
    pointer = current_pointer(root)
    work(root, log)
    (root / "current").rename(root / ".next")
    (root / "current").write_bytes(pointer)  # as a kill just before leaves it
    assert not PartFolder(root, "embeddings", "one", False, whole).begin(pointer)  # plan again: there is a new version
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
    assert not PartFolder(tmp_path, "embeddings", "one", False, whole).begin(pointer)
