"""No command gives a terminal anything but printable text, whatever titles, ids and names are full of; and it can be any terminal."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.commands import tpad_here
from helpers.processes import ENVIRONMENT, ROOT, SET, command
from helpers.server import write_shop

ESCAPES = "\x1b]52;c;eA==\x07 \x1b]8;;x\x07 \x1b[2J \x9b2J \x00 \x7f \u202e \u2028 \r"
NAME = "run-\x1b]52;c;eA==\x07\x9b2J\u202e"
UNSAFE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under a hostile name, over items whose titles and attributes are hostile, in a log with hostile users."""
    data = shutil.copytree(tiny_data, tmp_path_factory.mktemp("escapes") / "data")
    items = pq.read_table(data / "items.parquet")
    for name in ("title", "kind"):
        place = items.column_names.index(name)
        values = [f"{text} {ESCAPES} {n}" for n, text in enumerate(items[name].to_pylist())]
        items = items.set_column(place, items.schema.field(name), pa.array(values, items.schema.field(name).type))
    pq.write_table(items, data / "items.parquet")
    return write_shop(data.parent / NAME, data)


COMMANDS: dict[str, Sequence[str]] = {
    "recommend": ("recommend",),
    "recommend a session": ("recommend", "--session", f"p0003,nope{ESCAPES.replace(chr(0), '')}"),
    "recommend in JSON": ("recommend", "--session", "p0003,nope\x1b", "--json"),
    "recommend by an unknown value": ("recommend", "--filter", f"kind={ESCAPES}"),
    "index": ("index", "--set", "sbr.index=hnsw"),
    "check the index": ("index", "--check"),
    "report": ("report",),
    "doctor": ("doctor",),
    "evaluate": ("evaluate", "--models", "popularity", *SET),
    "export without an MLLM": ("export-embeddings",),
    "distill with other data": ("distill", "--data", f"/nowhere/{ESCAPES}"),
    "an option of no name": ("recommend", f"--{ESCAPES}"),
    "a setting of no name": ("train-sbr", "--set", f"{ESCAPES}=1"),
    "a value of no kind": ("train-sbr", "--set", f"sbr.loss='{ESCAPES}'"),
    "an error with its traceback": ("--debug", "recommend", "--filter", f"{ESCAPES}=1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_output_has_no_control_characters(run: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(run, tmp_path / NAME)
    told = tpad_here(*COMMANDS[name], "--run", copy)
    assert told.out or told.err
    for text in (told.out, told.err):
        assert not UNSAFE.search(text), repr(text)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_few_letters(run: Path, encoding: str) -> None:
    done = subprocess.run(
        command("recommend", "--run", run, "--session", "p0003"),
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\\u202e" in done.stdout.decode(encoding)


def test_a_full_or_closed_stdout(run: Path) -> None:
    words = command("recommend", "--run", run, "--session", "p0003")
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert re.fullmatch(r"(?s).*error: [^\n]*no space left[^\n]*\n", done.stderr) and "Traceback" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode in (1, 141)  # 1: of rich
    assert "Traceback" not in done.stderr and "error" not in done.stderr
