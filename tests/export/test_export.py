"""Tests `export`: the content of the files, interruptions, and errors."""

import io
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from helpers.items import make
from helpers.processes import ENVIRONMENT, contents, kill_when, pair, start, two_processes
from helpers.runs import PHASES, change_items, distill_run, export_run, published_folder, settings
from pipeline.core.artifact import OWN_KEYS, open_verified, stage
from pipeline.core.errors import ARTIFACT, DATA, UserError
from pipeline.core.errors import ENVIRONMENT as ENVIRONMENT_ERROR
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.export.export import export
from pipeline.export.item_batches import ItemBatches
from pipeline.mllm.prompts import Prompts


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model_only(run: Path, to: Path) -> Path:
    """A run with the MLLM of `run` and no embeddings."""
    shutil.copytree(run / "mllm", to / "mllm")
    return to


def parts(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(published_folder(run, "embeddings").glob("part-*.parquet"))}


# --- the contract


def test_columns_and_manifest_are_those_of_the_contract(tiny_run: Path, tiny_data: Path) -> None:
    folder = published_folder(tiny_run, "embeddings")
    manifest = json.loads((folder / "manifest.json").read_text())
    catalog = load_catalog(tiny_data)
    assert [part["rows"] for part in manifest["parts"]] == [16, 16, 8]
    item_ids: list[str] = []
    for part in manifest["parts"]:
        table = pq.read_table(folder / part["name"])
        assert table.column_names == ["item_id", "knowledge", "transition", "has_image", "has_text", "n_tokens", "content_sha256"]
        for half in ("knowledge", "transition"):
            assert pa.types.is_fixed_size_list(table.schema.field(half).type)
            assert table.schema.field(half).type.list_size == manifest["dim"] == 16
            assert table.schema.field(half).type.value_type == pa.float32()
        assert table.num_rows == part["rows"]
        assert all(n > 5 for n in table["n_tokens"].to_pylist())
        item_ids += table["item_id"].to_pylist()
    assert item_ids == catalog.item_ids
    model = json.loads((published_folder(tiny_run, "mllm") / "manifest.json").read_text())
    assert manifest["kind"] == "embeddings"
    assert (manifest["format_version"], manifest["rows"], manifest["dtype"], manifest["backbone"]) == (1, 40, "float32", "tiny")
    assert manifest["catalogue_sha256"] == catalog.sha256
    assert manifest["sessions_sha256"] == model["sessions_sha256"]
    assert manifest["weights_sha256"] == next(f["sha256"] for f in model["files"] if f["name"] == "weights.safetensors")
    assert {"metric", "revision", "prompts", "pooling", "max_pixels", "files"} <= manifest.keys()


def test_both_halves_are_unit_vectors_that_tell_items_apart(tiny_run: Path) -> None:
    outcome = read_embeddings(tiny_run / "embeddings")
    for half in (outcome.knowledge, outcome.transition):
        np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)
        assert len(np.unique(half.round(5), axis=0)) > 35
    assert np.abs(outcome.knowledge - outcome.transition).max() > 0.01
    assert outcome.has_image.all()
    assert outcome.has_text.all()


def test_a_manifest_tells_nothing_of_place_time_or_machine(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The same model and items give the same version, byte for byte, wherever and whenever."""
    run = model_only(tiny_run, tmp_path / "elsewhere")
    export_run(run, Path(shutil.copytree(tiny_data, tmp_path / "copy")))
    for kind in ("mllm", "embeddings"):
        text = (published_folder(run, kind) / "manifest.json").read_text()
        assert text == (published_folder(tiny_run, kind) / "manifest.json").read_text()
        assert not any(word in text for word in ("/tmp", str(tmp_path), socket.gethostname(), '": "/'))
    assert parts(run) == parts(tiny_run)


def test_half_precision_is_the_same_vectors_rounded(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = model_only(tiny_run, tmp_path)
    export_run(run, tiny_data, "export.dtype=float16")
    half, full = read_embeddings(run / "embeddings"), read_embeddings(tiny_run / "embeddings")
    assert half.version.manifest["dtype"] == "float16"
    np.testing.assert_array_equal(half.knowledge, full.knowledge.astype(np.float16).astype(np.float32))


# --- repeated exports


def test_a_second_export_is_up_to_date_and_another_layout_is_not(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert not export(settings(), run, tiny_data).made
    assert published_folder(run, "embeddings").name == "v0001"
    one = read_embeddings(tiny_run / "embeddings")
    for name, changed in (("v0002", "export.shard_rows=25"), ("v0003", "export.attention=eager")):
        again = export(settings(changed), run, tiny_data)
        assert again.made
        assert again.version.name == name
        two = read_embeddings(run / "embeddings")
        np.testing.assert_allclose(one.knowledge, two.knowledge, atol=1e-5)
        np.testing.assert_allclose(one.transition, two.transition, atol=1e-5)


def staged(run: Path) -> Path:
    """Returns the folder with the parts of an unfinished export."""
    return next((run / "embeddings").glob(".staging-*"), run / "nowhere")


def test_a_killed_export_goes_on_and_ends_with_the_same_bytes(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    undisturbed, run = model_only(tiny_run, tmp_path / "undisturbed"), model_only(tiny_run, tmp_path / "run")
    export_run(undisturbed, tiny_data, "export.shard_rows=1")
    process = start(export_run, run, tiny_data, "export.shard_rows=1")
    kill_when(process, lambda: (staged(run) / "part-00003.parquet").exists())
    assert not (run / "embeddings" / "current").exists()
    before = {path.name: path.stat().st_mtime_ns for path in staged(run).glob("part-*.parquet")}
    assert 4 <= len(before) < 40
    damaged = staged(run) / "part-00001.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 1  # damaged: computed again
    damaged.write_bytes(data)
    export_run(run, tiny_data, "export.shard_rows=1")
    assert contents(published_folder(run, "embeddings")) == contents(published_folder(undisturbed, "embeddings"))
    times = {path.name: path.stat().st_mtime_ns for path in published_folder(run, "embeddings").glob("part-*.parquet")}
    assert [name for name in before if times[name] != before[name]] == ["part-00001.parquet"]


def a_version_or_another(run: Path, stop: threading.Event, seen: list[str]) -> None:
    """Reads all the time. Each version is complete, or reading raises."""
    while not stop.is_set():
        outcome = read_embeddings(run / "embeddings")
        assert len(outcome.item_ids) == len(outcome.knowledge) == 40
        seen.append(outcome.version.manifest["dtype"])


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_however_often_it_is_killed_the_bytes_are_those_of_a_quiet_run(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, kills: int, record_property: Callable[[str, object], None]
) -> None:
    """A reader sees the old version or the new one, nothing between."""
    record_property("kills", kills)
    small = "export.shard_rows=4"
    undisturbed, run = model_only(tiny_run, tmp_path / "undisturbed"), model_only(tiny_run, tmp_path / "run")
    for folder in (undisturbed, run):
        export_run(folder, tiny_data, "export.dtype=float16")
    began = time.monotonic()
    export_run(undisturbed, tiny_data, small)
    usual = time.monotonic() - began
    stop, seen = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(a_version_or_another, run, stop, seen)
        draw = random.Random(0)
        for kill in range(kills):
            process = start(export_run, run, tiny_data, small, f"export.workers={kill % 2}")
            process.join(draw.random() * usual * 1.2)
            process.kill()
            process.join()
        export_run(run, tiny_data, small)
        stop.set()
        reader.result()
    assert "float16" in seen
    assert contents(published_folder(run, "embeddings")) == contents(published_folder(undisturbed, "embeddings"))
    assert [path.name for path in (run / "embeddings").iterdir() if path.name.startswith((".staging", ".work"))] == []


def test_processes_of_a_launcher_do_a_share_each_and_give_the_bytes_of_one(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    undisturbed, run = model_only(tiny_run, tmp_path / "undisturbed"), model_only(tiny_run, tmp_path / "run")
    export_run(undisturbed, tiny_data, "export.shard_rows=2")
    one, other = pair(export_run, run, tiny_data, "export.shard_rows=2")
    kill_when(one, lambda: (staged(run) / "part-00002.parquet").exists())
    other.kill()  # as a launcher does
    other.join()
    assert not (run / "embeddings" / "current").exists()
    before = {path.name: path.stat().st_mtime_ns for path in staged(run).glob("part-*.parquet")}
    two_processes(export_run, run, tiny_data, "export.shard_rows=2")
    assert contents(published_folder(run, "embeddings")) == contents(published_folder(undisturbed, "embeddings"))
    assert published_folder(run, "embeddings").name == "v0001"
    times = {path.name: path.stat().st_mtime_ns for path in published_folder(run, "embeddings").glob("part-*.parquet")}
    assert times.items() >= before.items()


def test_shares_are_done_one_by_one_and_the_last_one_publishes(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = model_only(tiny_run, tmp_path / "run")
    left = []
    for number in (2, 3, 1):
        outcome = export(settings(), run, tiny_data, share=(number, 3))
        left.append(outcome.left)
        assert (outcome.version is None) == (outcome.left > 0)
        assert (run / "embeddings" / "current").exists() == (outcome.left == 0)
    assert left == [2, 1, 0]
    assert parts(run) == parts(tiny_run)


def test_workers_and_threads_change_no_byte(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = model_only(tiny_run, tmp_path / "run")
    export_run(run, tiny_data, "export.workers=2")
    assert parts(run) == parts(tiny_run)


def test_an_item_alone_has_the_vector_it_has_in_the_full_export(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = model_only(tiny_run, tmp_path / "run")
    export_run(run, tiny_data, "export.token_budget=1")
    alone, full = read_embeddings(run / "embeddings"), read_embeddings(tiny_run / "embeddings")
    np.testing.assert_allclose(alone.knowledge, full.knowledge, atol=1e-5)
    np.testing.assert_allclose(alone.transition, full.transition, atol=1e-5)


# --- updates


def by_id(run: Path) -> dict[str, tuple[bytes, bytes]]:
    outcome = read_embeddings(run / "embeddings")
    return {item: (k.tobytes(), t.tobytes()) for item, k, t in zip(outcome.item_ids, outcome.knowledge, outcome.transition, strict=True)}


def test_an_update_computes_what_is_new_or_changed_and_keeps_the_rest(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Also where items were added before, between and after the others, or removed: rows move, vectors stay."""
    data = change_items(tiny_data, tmp_path / "data", {3: png("red"), 5: None}, {9: "another title"})
    table = pq.read_table(data / "items.parquet")
    rows = table.to_pylist()
    new = [rows[n] | {"item_id": f"new-{n}", "title": f"new thing {n}"} for n in range(3)]
    rows = [new[0], *rows[:20], new[1], *rows[25:], new[2]]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), data / "items.parquet")
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    outcome = export(settings(), run, data, update=True)
    assert outcome.notes == []
    assert outcome.work.items == 6
    assert outcome.version is not None and outcome.version.name == "v0002"
    before, after = by_id(tiny_run), by_id(run)
    assert list(after) == [row["item_id"] for row in rows]
    changed = {"p0003", "p0005", "p0009"}
    for item, vectors in after.items():
        assert (vectors == before.get(item)) == (item in before and item not in changed), item
    again = model_only(tiny_run, tmp_path / "full")
    export_run(again, data)
    one, other = read_embeddings(run / "embeddings"), read_embeddings(again / "embeddings")
    np.testing.assert_allclose(one.knowledge, other.knowledge, atol=1e-5)
    for flags in ("has_image", "has_text"):
        np.testing.assert_array_equal(getattr(one, flags), getattr(other, flags))
    assert not export(settings(), run, data, update=True).made
    assert not export(settings(), run, data).made


def test_an_update_that_cannot_be_one_says_why(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = model_only(tiny_run, tmp_path / "run")
    assert "nothing to update" in export(settings(), run, tiny_data, update=True).notes[0]
    outcome = export(settings("export.dtype=float16"), run, tiny_data, update=True)
    assert outcome.notes == ["a full export, not an update: the type of the vectors changed"]
    assert outcome.work.items == 40


def test_a_part_may_be_measured_by_several_workers(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.export.exporter.MEASURED", 5)  # rows; a part has 16
    run = model_only(tiny_run, tmp_path / "run")
    export_run(run, tiny_data, "export.workers=2")
    assert parts(run) == parts(tiny_run)


# --- other forms


@pytest.mark.slow
def test_a_compiled_export_gives_the_same_vectors(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = model_only(tiny_run, tmp_path / "run")
    export_run(run, tiny_data, "export.compile=true")
    compiled, full = read_embeddings(run / "embeddings"), read_embeddings(tiny_run / "embeddings")
    np.testing.assert_allclose(compiled.knowledge, full.knowledge, atol=1e-5)


def test_int8_and_arrays_are_the_same_vectors(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = model_only(tiny_run, tmp_path / "run")
    export_run(run, tiny_data, "export.dtype=int8", "export.format=npy")
    folder = published_folder(run, "embeddings")
    outcome, full = read_embeddings(run / "embeddings"), read_embeddings(tiny_run / "embeddings")
    for half in ("knowledge", "transition"):
        values = getattr(full, half)
        assert (np.abs(getattr(outcome, half) - values) <= np.abs(values).max(1, keepdims=True) / 127 * 0.51).all()
        np.testing.assert_array_equal(np.load(folder / f"{half}.npy"), getattr(outcome, half))
    assert (folder / "item_ids.txt").read_text().split("\n")[:-1] == outcome.item_ids
    assert "int8" in (folder / "README.md").read_text()


def test_datasets_reads_the_folder_as_it_is(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the header of its card, which leaves out the manifest."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = datasets.load_dataset(str(published_folder(tiny_run, "embeddings")), split="train", cache_dir=str(tmp_path))
    full = read_embeddings(tiny_run / "embeddings")
    assert rows["item_id"][:] == full.item_ids
    np.testing.assert_allclose(np.array(rows["knowledge"][:], np.float32), full.knowledge)


def test_other_programs_read_the_halves(tiny_run: Path) -> None:
    import duckdb
    import pandas
    import polars

    full = read_embeddings(tiny_run / "embeddings")
    files = str(published_folder(tiny_run, "embeddings") / "part-*.parquet")
    rows = duckdb.sql(f"SELECT item_id, knowledge FROM '{files}' ORDER BY item_id").fetchall()
    assert [item for item, _ in rows] == full.item_ids
    np.testing.assert_array_equal(np.array([vector for _, vector in rows], np.float32), full.knowledge)
    frame = pandas.read_parquet(published_folder(tiny_run, "embeddings") / "part-00000.parquet", columns=["item_id", "transition"])
    np.testing.assert_array_equal(np.stack(frame["transition"]), full.transition[:16])
    np.testing.assert_array_equal(polars.read_parquet(files, columns=["knowledge"])["knowledge"].to_numpy(), full.knowledge)


# --- damage


def test_one_flipped_bit_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    path = published_folder(run, "embeddings") / "part-00001.parquet"
    full = path.read_bytes()
    for offset in (4, len(full) // 2, len(full) - 20):
        path.write_bytes(full[:offset] + bytes([full[offset] ^ 1]) + full[offset + 1 :])
        with pytest.raises(UserError, match="part-00001") as error:
            read_embeddings(run / "embeddings")
        assert error.value.code == ARTIFACT
    path.write_bytes(full)
    read_embeddings(run / "embeddings")


def test_a_damaged_model_is_refused_and_a_missing_one_named(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tpad distill") as error:
        export_run(tmp_path, tiny_data)
    assert error.value.code == ARTIFACT
    run = model_only(tiny_run, tmp_path / "run")
    path = published_folder(run, "mllm") / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"weights\.safetensors") as error:
        export_run(run, tiny_data)
    assert error.value.code == ARTIFACT
    assert not (run / "embeddings").exists()


def test_a_full_disk_is_one_line_and_leaves_the_old_version(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    before = contents(published_folder(run, "embeddings"))
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
    code += "from helpers import runs; from pathlib import Path\n"
    code += "try: runs.export_run(Path(sys.argv[1]), Path(sys.argv[2]), 'export.shard_rows=8')\n"
    code += "except runs.UserError as error: print(error); sys.exit(error.code)"
    command = [sys.executable, "-c", code, str(run), str(tiny_data)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("\n")) == (ENVIRONMENT_ERROR, 1), done.stderr
    assert "file too large" in done.stdout
    assert contents(published_folder(run, "embeddings")) == before
    export_run(run, tiny_data, "export.shard_rows=8")
    assert published_folder(run, "embeddings").name == "v0002"
    assert sorted(path.name for path in (run / "embeddings").iterdir()) == [".lock", "current", "v0001", "v0002"]


# --- items that lack something, and images that cannot be read


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_items_without_image_or_text_are_exported(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Also items the model never saw: a new catalogue needs no new model."""
    data = change_items(tiny_data, tmp_path / "data", {3: None, 5: None}, {4: "", 5: ""})
    run = model_only(tiny_run, tmp_path / "run")
    export_run(run, data)
    outcome, full = read_embeddings(run / "embeddings"), read_embeddings(tiny_run / "embeddings")
    assert [row for row in range(40) if not outcome.has_image[row]] == [3, 5]
    assert [row for row in range(40) if not outcome.has_text[row]] == [4, 5]
    for row in (3, 4, 5):
        assert np.abs(outcome.knowledge[row] - full.knowledge[row]).max() > 1e-3
    others = [row for row in range(40) if row not in (3, 4, 5)]
    np.testing.assert_allclose(outcome.knowledge[others], full.knowledge[others], atol=1e-5)
    manifest, before = outcome.version.manifest, full.version.manifest
    assert manifest["catalogue_sha256"] != before["catalogue_sha256"] == manifest["distilled_on_catalogue_sha256"]


def test_a_catalogue_without_any_image_is_distilled_and_exported(tiny_data: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    pq.write_table(pq.read_table(data / "items.parquet").drop_columns("image"), data / "items.parquet")
    few = [f"distill.{phase}.steps=2" for phase in PHASES]
    distill_run(tmp_path / "run", data, *few)
    export_run(tmp_path / "run", data, *few)
    outcome = read_embeddings(tmp_path / "run" / "embeddings")
    assert outcome.has_text.all() and not outcome.has_image.any()
    np.testing.assert_allclose(np.linalg.norm(outcome.transition, axis=1), 1, atol=1e-5)
    assert len(np.unique(outcome.knowledge.round(5), axis=0)) > 30


def test_a_broken_image_stops_the_chain_with_file_and_row(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = change_items(tiny_data, tmp_path / "data", {7: png("red")[:60]}, {})
    run = model_only(tiny_run, tmp_path / "run")
    for step in (lambda: export_run(run, data), lambda: distill_run(tmp_path / "new", data)):
        with pytest.raises(UserError, match=r"items\.parquet row 7, item_id 'p0007'") as error:
            step()
        assert error.value.code == DATA
    assert not (run / "embeddings" / "current").exists()
    assert not (tmp_path / "new" / "mllm").exists()


def test_or_the_item_is_shown_as_text_only(tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = change_items(tiny_data, tmp_path / "data", {7: png("red")[:60]}, {})
    without = change_items(tiny_data, tmp_path / "without", {7: None}, {})
    few = ["data.on_bad_image=text_only", *(f"distill.{phase}.steps=1" for phase in PHASES)]
    outcome = []
    for data in (broken, without):
        run = tmp_path / f"run-{data.name}"
        distill_run(run, data, *few)
        export_run(run, data, *few)
        outcome.append(read_embeddings(run / "embeddings"))
    assert "row 7" in capfd.readouterr().err
    assert not outcome[0].has_image[7]
    assert outcome[0].has_image.sum() == 39
    np.testing.assert_array_equal(outcome[0].knowledge, outcome[1].knowledge)


def test_an_image_file_that_is_missing_is_no_image_either(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = change_items(tiny_data, tmp_path / "data", {7: "gone.png"}, {})
    run = model_only(tiny_run, tmp_path / "run")
    with pytest.raises(UserError, match="row 7") as error:
        export_run(run, data)
    assert error.value.code == DATA
    export_run(run, data, "data.on_bad_image=text_only")
    assert np.flatnonzero(~read_embeddings(run / "embeddings").has_image).tolist() == [7]


def test_or_the_item_is_left_out_and_listed(tiny_run: Path, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = change_items(tiny_data, tmp_path / "data", {7: png("red")[:60]}, {})
    run = model_only(tiny_run, tmp_path / "run")
    export_run(run, data, "data.on_bad_image=skip")
    outcome = read_embeddings(run / "embeddings")
    assert "row 7" in capfd.readouterr().err
    assert outcome.item_ids == [f"p{row:04d}" for row in range(40) if row != 7]
    assert outcome.version.manifest["skipped"] == ["p0007"]
    none = change_items(tiny_data, tmp_path / "none", dict.fromkeys(range(40), png("red")[:60]), {})
    with pytest.raises(UserError, match=r"every item would be left out for its image .*items\.parquet") as error:
        export_run(run, none, "data.on_bad_image=skip")
    assert error.value.code == DATA
    assert read_embeddings(run / "embeddings").version.name == "v0001"


def test_items_that_change_while_in_use_are_no_bad_images(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    setup = make(folder, tmp_path, "tiny", "data.on_bad_image=text_only")
    source = ItemBatches(setup.processor.catalog, Prompts(setup.processor.catalog, settings().data), setup.processor, 4096, "text_only")
    (folder / "items.parquet").touch()
    rows, known = np.arange(6), np.zeros((6, 32))
    for work in (lambda: setup.prompts.has_image(0), lambda: source.measure(rows, known), lambda: source.load(rows, rows)):
        with pytest.raises(UserError, match="the items changed while in use"):
            work()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_an_mllm_that_names_code_of_its_own_is_refused_and_nothing_is_asked(
    tiny_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Sealed again with right sums: the code must not run, whatever somebody would answer on the terminal."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run / "mllm", run / "mllm")
    before = open_verified(run / "mllm", "mllm", "")
    ran = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Own: pass\n"
    with stage(run / "mllm", "mllm") as staging:
        shutil.copytree(before.path, staging.path, dirs_exist_ok=True)
        (staging.path / "own.py").write_text(code)
        content = json.loads((staging.path / file).read_text())
        own = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoImageProcessor"), "own.Own")
        content |= {"model_type": "own", "image_processor_type": "Own", "tokenizer_class": "Own"}
        content["auto_map"] = own | {"AutoTokenizer": ["own.Own", None]}
        (staging.path / file).write_text(json.dumps(content))
        staging.publish({key: value for key, value in before.manifest.items() if key not in OWN_KEYS} | {"forged": True})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    # transformers may still have a tokenizer or image processor of its own for the model
    with pytest.raises(UserError) if file == "config.json" else suppress(UserError):
        export_run(run, tiny_data)
    assert not ran.exists()
