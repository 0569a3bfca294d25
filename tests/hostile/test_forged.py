"""Artifacts with right sums and wrong contents: refused in one line, with nothing run, asked or waited for.

Sums protect against damage, so whoever can write into a run can make its sums right; a forged file must still not run code, hang, or
be believed where it cannot be true.
"""

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save, save_file

from helpers.commands import tpad_here
from helpers.processes import SET
from helpers.runs import SETTINGS
from pipeline.core.artifact import OWN_KEYS, open_verified, stage
from pipeline.core.files import canonical_json, sha256_file

SECONDS = 20  # in which a refusal is certain to come, on the slowest machine
Forge = Callable[[Path], None]


@contextmanager
def in_time() -> Iterator[None]:
    """Ends a body that hangs with an error."""

    def hangs(*_: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def published_again(run: Path, kind: str, forge: Forge, **entries: Any) -> None:
    """Publishes the current version once more, changed by `forge` and with other manifest entries (None: without)."""
    before = open_verified(run / kind, kind, "")
    manifest = {key: value for key, value in before.manifest.items() if key not in OWN_KEYS} | entries
    with stage(run / kind, kind) as staging:
        shutil.copytree(before.path, staging.path, dirs_exist_ok=True)
        forge(staging.path)
        staging.publish({key: value for key, value in manifest.items() if value is not None})


def written(name: str, content: bytes | Any) -> Forge:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode()) and None


def absent(name: str) -> Forge:
    return lambda folder: (folder / name).unlink()


def arrays(name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Forge:
    def forge(folder: Path) -> None:
        content = {key: array.copy() for key, array in load_file(folder / name).items()}
        change(content)
        save_file(content, folder / name)

    return forge


def entries(name: str, **changed: Any) -> Forge:
    """Changes entries of a JSON file."""

    def forge(folder: Path) -> None:
        (folder / name).write_bytes(canonical_json(json.loads((folder / name).read_bytes()) | changed))

    return forge


def rows(name: str, change: Callable[[pa.Table], pa.Table]) -> Forge:
    return lambda folder: pq.write_table(change(pq.read_table(folder / name)), folder / name)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(Path.cwd() / "exploded"),)


PICKLE = pickle.dumps(Bomb())
HUGE = (10**15).to_bytes(8, "little") + b"{}"  # a header of a petabyte
LYING = save({"a": np.zeros(1, np.float32)}).replace(b'"shape":[1]', b'"shape":[9]')
NOTHING: Forge = lambda folder: None  # noqa: E731
CODE = "import os; os.mkdir('exploded')"

SBR: dict[str, tuple[Forge, dict[str, Any]]] = {
    "a pickle as weights": (written("model.safetensors", PICKLE), {}),
    "a huge header": (written("model.safetensors", HUGE), {}),
    "a lying header": (written("model.safetensors", LYING), {}),
    "no weights": (absent("model.safetensors"), {}),
    "weights that are NaN": (arrays("model.safetensors", lambda a: a["popularity_exponent"].fill(np.nan)), {}),
    "weights of another shape": (arrays("model.safetensors", lambda a: a.update({"ids.weight": a["ids.weight"][:3]})), {}),
    "a weight too few": (arrays("model.safetensors", lambda a: a.pop("ids.weight")), {}),
    "counts of items that are not there": (arrays("model.safetensors", lambda a: a.update(counts=a["counts"][:2])), {}),
    "no settings": (absent("config.json"), {}),
    "settings that are a list": (written("config.json", [1, 2]), {}),
    "settings nested without end": (written("config.json", b"[" * 100_000), {}),
    "settings of a petabyte": (entries("config.json", items=10**15), {}),
    "unknown settings": (entries("config.json", nope=1), {}),
    "an older form": (entries("config.json", form=1), {}),
    "a pickle as an index": (written("index-id.faiss", PICKLE), {}),
    "an index of other vectors": (lambda f: shutil.copy(f / "index-id.faiss", f / "index-content.faiss") and None, {}),
    "an index of an unknown channel": (lambda f: shutil.copy(f / "index-id.faiss", f / "index-x.faiss") and None, {}),
    "no index": (absent("index-id.faiss"), {}),
    "items twice": (rows("items.parquet", lambda t: pa.concat_tables([t, t])), {}),
    "items without a column": (rows("items.parquet", lambda t: t.drop_columns(["count"])), {}),
    "items of another type": (rows("items.parquet", lambda t: t.set_column(0, "item_id", [list(range(len(t)))])), {}),
    "items that are no table": (written("items.parquet", PICKLE), {}),
    "attributes of other items": (rows("attributes.parquet", lambda t: t.slice(0, 3)), {}),
    "sessions of unknown items": (written("samples.json", [["nope"]]), {}),
    "sessions that are numbers": (written("samples.json", 5), {}),
    "no entry for the index": (NOTHING, {"index": None}),
    "an index entry that is a list": (NOTHING, {"index": [1]}),
    "no settings in the manifest": (NOTHING, {"settings": None}),
    "embeddings that are a number": (NOTHING, {"embeddings_run": 5}),
    "a run outside the run": (NOTHING, {"embeddings_run": "\0"}),
    "whitening that is no file of tensors": (written("whitening.safetensors", HUGE), {}),
}


@pytest.mark.parametrize("name", SBR)
def test_a_forged_session_model_is_refused(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    for kind in ("sbr", "embeddings"):
        shutil.copytree(shop / kind, run / kind)
    published_again(run, "sbr", SBR[name][0], **SBR[name][1])
    with in_time():
        told = tpad_here("recommend", "--run", run)
    assert told.is_one_line and told.code == 4, told.err
    assert str(run) in told.err and "tpad " in told.err
    assert not Path("exploded").exists()


METRICS = {"no metrics": absent("metrics.json"), "metrics that are a list": written("metrics.json", [])}


@pytest.mark.parametrize("name", METRICS)
def test_forged_metrics_are_refused_where_they_are_read(shop: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    for kind in ("sbr", "embeddings"):
        shutil.copytree(shop / kind, run / kind)
    published_again(run, "sbr", METRICS[name])
    for command in ("recommend", "report"):
        told = tpad_here(command, "--run", run)
        assert told.is_one_line and told.code == 4, told.err


def nan_vectors(table: pa.Table) -> pa.Table:
    field = table.schema.field("knowledge")
    return table.set_column(1, field, pa.array([[float("nan")] * field.type.list_size] * len(table), field.type))


EMBEDDINGS: dict[str, tuple[Forge, dict[str, Any]]] = {
    "a part outside": (NOTHING, {"parts": [{"name": "../../data/items.parquet", "rows": 40}]}),
    "a petabyte of rows": (NOTHING, {"rows": 10**12, "parts": [{"name": "part-00000.parquet", "rows": 10**12}]}),
    "a vector of a petabyte": (NOTHING, {"dim": 10**15}),
    "vectors that are NaN": (
        rows("part-00000.parquet", nan_vectors),
        {},
    ),
    "parts that are text": (NOTHING, {"parts": "part"}),
    "no catalogue": (NOTHING, {"catalogue_sha256": None}),
    "no sessions": (NOTHING, {"sessions_sha256": None}),
    "halves of no kind": (NOTHING, {"halves": ["knowledge", "knowledge"]}),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_forged_embeddings_are_refused(shop: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    for kind in ("embeddings", "data"):
        shutil.copytree(shop / kind, run / kind)
    published_again(run, "embeddings", EMBEDDINGS[name][0], **EMBEDDINGS[name][1])
    with in_time():
        told = tpad_here("train-sbr", "--run", run, "--data", run / "data", *SET)
    assert told.is_one_line and told.code == 4, told.err


def with_code(name: str, **changed: Any) -> Forge:
    """Makes a JSON file name classes of a file with code beside it."""

    def forge(folder: Path) -> None:
        entries(name, **changed)(folder)
        (folder / "code.py").write_text(CODE)

    return forge


MLLM: dict[str, Forge] = {
    "code that a config names": with_code(
        "config.json", model_type="nope", auto_map={"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    ),
    "a tokenizer with code": with_code(
        "tokenizer_config.json", tokenizer_class="Nope", auto_map={"AutoTokenizer": ["code.Tokenizer", None]}
    ),
    "a pickle as weights": written("weights.safetensors", PICKLE),
    "weights that are NaN": arrays("weights.safetensors", lambda a: next(iter(a.values())).fill(np.nan)),
    "weights of another shape": arrays("weights.safetensors", lambda a: a.update({next(iter(a)): np.zeros(3, np.float32)})),
    "settings that are a list": written("mllm.json", []),
    "a dimension that is text": entries("mllm.json", dim="x"),
    "heads of no kind": entries("mllm.json", heads=["nope"]),
    "templates that are numbers": entries("mllm.json", templates={"item": 5}),
    "prompts of another version": entries("mllm.json", prompts=1),
    "a tokenizer that is no JSON": written("tokenizer.json", PICKLE),
}


@pytest.mark.parametrize("name", MLLM)
def test_a_forged_mllm_is_refused(tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on the terminal"))
    shutil.copytree(tiny_run / "mllm", tmp_path / "run" / "mllm")
    published_again(tmp_path / "run", "mllm", MLLM[name])
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    with in_time():
        told = tpad_here("export-embeddings", "--run", tmp_path / "run", "--data", tiny_data, *words)
    assert told.is_one_line and told.code == 4, told.err
    assert not Path("exploded").exists()


SMALL = ("sbr/current", "sbr/v0001/manifest.json", "sbr/v0001/samples.json", "embeddings/current", "run.json", "config.yaml")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("put", [fifo, endless])
@pytest.mark.parametrize("name", SMALL)
def test_what_is_no_plain_file_is_refused_and_not_waited_for(shop: Path, tmp_path: Path, name: str, put: Callable[[Path], None]) -> None:
    run = shutil.copytree(shop, tmp_path / "run")
    (run / "config.yaml").write_text("seed: 0\n")
    put(run / name)
    with in_time():
        told = tpad_here(*(("index", "--run", run) if name in ("run.json", "config.yaml") else ("recommend", "--run", run)))
    assert told.is_one_line or name == "config.yaml", told.err  # an empty fifo is an empty file of settings
    assert told.code in (0, 2, 4, 5)


@pytest.mark.parametrize("name", ["manifest.json", "../v0002"])
def test_a_link_in_a_version_is_refused(shop: Path, tmp_path: Path, name: str) -> None:
    run = shutil.copytree(shop, tmp_path / "run")
    (run / "sbr" / "v0001" / "link").symlink_to(run / "sbr" / "v0001" / name)
    told = tpad_here("recommend", "--run", run)
    assert told.is_one_line and told.code == 4
    assert sha256_file(shop / "sbr" / "current") == sha256_file(run / "sbr" / "current")
