"""Writers that fail, meet, are killed or find no room: readers see the old version or the new one, and nothing is left over."""

import multiprocessing
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from helpers.artifacts import publish
from pipeline.core import artifact
from pipeline.core.artifact import open_verified, stage
from pipeline.core.errors import ENVIRONMENT, UserError

HINT = "run `tpad distill` first"
REPOSITORY = Path(__file__).parents[2]


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != artifact.LOCK)


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stage(tmp_path, "mllm") as staging:
        (staging.path / "half").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == [artifact.LOCK]
    (tmp_path / artifact.STAGING).mkdir()  # as a kill leaves it
    (tmp_path / artifact.STAGING / "half").write_text("half")
    (tmp_path / ".current.123.tmp").write_text("{")
    assert [f["name"] for f in publish(tmp_path).manifest["files"]] == ["adapter/weights.bin", "notes.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "current", "v0001"]


def test_a_second_writer_is_turned_away(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from pipeline.core.artifact import stage\nwith stage(Path(sys.argv[1]), 'mllm'): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with stage(tmp_path, "mllm") as staging:
        (staging.path / "mine").write_text("mine")
        second = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True)
        assert second.returncode != 0 and "another tpad is writing here" in second.stderr
        with pytest.raises(UserError, match="another tpad"), stage(tmp_path, "mllm"):
            pass
        staging.publish({})
    assert [f["name"] for f in open_verified(tmp_path, "mllm", HINT).manifest["files"]] == ["mine"]
    assert subprocess.run(command, check=False, cwd=REPOSITORY).returncode == 0


def publish_forever(root: Path) -> None:
    while True:
        with stage(root, "mllm") as staging:
            text = str(time.monotonic_ns()) * 100
            for name in "abcdefgh":
                (staging.path / name).write_text(text)
            staging.publish({"text": text}, keep=1)


def test_a_reader_sees_whole_versions_only_while_writers_are_killed(tmp_path: Path) -> None:
    publish(tmp_path)
    names: set[str] = set()
    for kill in range(8):
        writer = multiprocessing.get_context("fork").Process(target=publish_forever, args=(tmp_path,))
        writer.start()
        try:
            before, end = len(names), time.monotonic() + 10
            while len(names) < before + 3 and time.monotonic() < end:
                version = open_verified(tmp_path, "mllm", HINT)
                names.add(version.name)
            assert len(names) > before + 2, "the writer did not publish"
            time.sleep(random.Random(kill).random() * 0.02)
        finally:
            writer.kill()
            writer.join()
        version = open_verified(tmp_path, "mllm", HINT)
        contents = {(version.path / f["name"]).read_text() for f in version.manifest["files"] if len(f["name"]) == 1}
        assert contents == {version.manifest["text"]}
    (tmp_path / ".pruned-1").mkdir(exist_ok=True)  # as a kill in the middle of pruning leaves it
    assert publish(tmp_path, "last").name == open_verified(tmp_path, "mllm", HINT).name
    assert len(list(tmp_path.glob("v*"))) == 2
    assert not list(tmp_path.glob(".pruned-*")) and not (tmp_path / artifact.STAGING).exists()


WRITER = """
    import sys, os
    from pathlib import Path
    from pipeline.core.artifact import stage
    from pipeline.data.embeddings import write_part
    from pipeline.core.errors import UserError
    import numpy, pyarrow
    {setup}
    try:
        with stage(Path(sys.argv[1]), "mllm") as staging:
            write_part(staging.path / "part", pyarrow.table([numpy.random.default_rng(0).random(100_000)], names=["x"]))
            staging.publish({{}})
    except UserError as error:
        print(error)
        sys.exit(error.code)
"""


def write_in_subprocess(root: Path, setup: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(WRITER).format(setup=setup)
    return subprocess.run([sys.executable, "-c", code, str(root)], check=False, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_the_old_version(tmp_path: Path) -> None:
    publish(tmp_path)
    before = {p: p.read_bytes() for p in files_of(tmp_path)}
    done = write_in_subprocess(tmp_path, "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))")
    assert done.returncode == ENVIRONMENT and "file too large" in done.stdout and done.stdout.count("\n") == 1, done.stderr
    assert {p: p.read_bytes() for p in files_of(tmp_path)} == before
    with pytest.raises(UserError, match="no space left on device") as caught, stage(tmp_path, "mllm"):
        Path("/dev/full").write_text("x")
    assert caught.value.code == ENVIRONMENT
    assert open_verified(tmp_path, "mllm", HINT).name == "v0001"


def test_a_read_only_folder_can_be_read_and_refuses_a_writer_in_one_line(tmp_path: Path) -> None:
    root = tmp_path / "mllm"
    publish(root)
    before = {p: p.read_bytes() for p in files_of(tmp_path)}
    for folder in [tmp_path, *tmp_path.parents]:
        if os.stat(folder).st_uid == os.getuid() and folder.is_relative_to(tmp_path.parents[1]):
            folder.chmod(0o755)
    (root / artifact.LOCK).chmod(0o444)
    root.chmod(0o555)
    try:
        setup = "os.setuid(65534)" if os.getuid() == 0 else ""  # root may write anywhere
        done = write_in_subprocess(root, setup)
        assert done.returncode == ENVIRONMENT and "permission denied" in done.stdout, done.stderr
        assert open_verified(root, "mllm", HINT).name == "v0001"
    finally:
        root.chmod(0o755)
    assert {p: p.read_bytes() for p in files_of(tmp_path)} == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for root in (tmp_path / "taken", tmp_path / "taken" / "mllm"):
        with pytest.raises(UserError) as caught, stage(root, "mllm"):
            pass
        assert caught.value.code == ENVIRONMENT
    assert (tmp_path / "taken").read_text() == "mine"
