"""Tests artifacts: a reader gets a complete version or one clear error, whatever happens to the writer, the disk or the bytes."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.artifacts import publish
from pipeline.core import artifact
from pipeline.core.artifact import Version, open_verified, published, stage
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import sha256_file, write_json
from pipeline.data.embeddings import HALVES, Dtype, embeddings_schema, read_embeddings, vector_columns, write_part

HINT = "run `tpad export-embeddings` first"
REPOSITORY = Path(__file__).parents[2]


def table(rows: int = 2500, dim: int = 8, dtype: Dtype = "float32", first: int = 0) -> pa.Table:
    schema = embeddings_schema(dim, dtype)
    draw = np.random.default_rng(first)
    columns: dict[str, Any] = {
        "item_id": [f"item {first + i}" for i in range(rows)],
        "has_image": [i % 3 == 0 for i in range(rows)],
        "has_text": [True] * rows,
        "n_tokens": [7] * rows,
        "content_sha256": [draw.bytes(32) for _ in range(rows)],
    }
    for half in HALVES:
        columns |= vector_columns(half, draw.normal(size=(rows, dim)).astype(np.float32), schema)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def publish_embeddings(root: Path, tables: list[pa.Table], dim: int = 8, dtype: Dtype = "float32", **changes: Any) -> Version:
    with stage(root, "embeddings") as staging:
        parts = []
        for number, part in enumerate(tables):
            write_part(staging.path / f"part-{number:05d}.parquet", part)
            parts.append({"name": f"part-{number:05d}.parquet", "rows": part.num_rows})
        manifest = {"dim": dim, "dtype": dtype, "rows": sum(t.num_rows for t in tables), "parts": parts}
        return staging.publish(manifest | changes)


def refusal(root: Path, kind: str = "mllm") -> str:
    with pytest.raises(UserError) as caught:
        open_verified(root, kind, HINT)
    assert caught.value.code == ARTIFACT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_was_published_is_what_is_opened(tmp_path: Path) -> None:
    published_version = publish(tmp_path / "mllm")
    version = open_verified(tmp_path / "mllm", "mllm", HINT)
    assert version == published_version
    assert version.name == "v0001" and version.path == tmp_path / "mllm" / "v0001"
    assert version.manifest["backbone"] == "tiny" and version.manifest["format_version"] == 1 and version.manifest["kind"] == "mllm"
    assert [f["name"] for f in version.manifest["files"]] == ["adapter/weights.bin", "notes.txt"]
    assert (version.path / "adapter" / "weights.bin").read_text() == "content" * 50
    assert sorted(p.name for p in (tmp_path / "mllm").iterdir()) == [".lock", "current", "v0001"]


def test_equal_content_gives_an_equal_manifest_anywhere(tmp_path: Path) -> None:
    assert publish(tmp_path / "a").manifest_sha256 == publish(tmp_path / "deep" / "b").manifest_sha256
    assert publish(tmp_path / "a", "other").manifest_sha256 != publish(tmp_path / "a").manifest_sha256


def test_temporary_files_of_a_killed_writer_are_not_published(tmp_path: Path) -> None:
    with stage(tmp_path, "mllm") as staging:
        (staging.path / "deep").mkdir()
        (staging.path / "weights.bin").write_bytes(b"whole")
        for name in (".manifest.json.4711.tmp", "deep/.part-00000.parquet.12.tmp"):
            (staging.path / name).write_bytes(b"half")
        version = staging.publish({})
    assert [file["name"] for file in version.manifest["files"]] == ["weights.bin"]
    assert sorted(path.name for path in version.path.rglob("*") if path.is_file()) == ["manifest.json", "weights.bin"]


def test_nothing_published_names_the_command_to_run(tmp_path: Path) -> None:
    assert refusal(tmp_path / "embeddings", "embeddings") == f"embeddings not found ({tmp_path / 'embeddings'}); {HINT}"
    with pytest.raises(RuntimeError), stage(tmp_path / "embeddings", "embeddings") as staging:
        (staging.path / "part").write_text("half")
        raise RuntimeError
    assert "not found" in refusal(tmp_path / "embeddings", "embeddings")


def test_asking_what_is_published_is_no_error(tmp_path: Path) -> None:
    assert published(tmp_path, "mllm") is None
    version = publish(tmp_path)
    assert published(tmp_path, "mllm") == version
    (version.path / "notes.txt").write_text("Content")
    assert published(tmp_path, "mllm") is None


def test_another_kind_or_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path, kind="sbr")
    assert "holds 'sbr', not 'mllm'" in refusal(tmp_path)
    monkeypatch.setattr(artifact, "FORMAT_VERSION", 2)
    assert "format 1, but this tpad reads format 2" in refusal(tmp_path, "sbr")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embeddings")
    publish_embeddings(root, [table(60, 4), table(40, 4, first=60)], dim=4)
    open_verified(root, "embeddings", HINT)
    return root


def files_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name != artifact.LOCK)


def test_every_bit_flip_is_refused(sound: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "copy"))
    names = [p.relative_to(root) for p in files_of(root)]
    assert len(names) == 4
    draw = random.Random(0)
    for number in range(400):
        path = root / names[number % 4]
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        assert path.name in refusal(root, "embeddings") or path.name == artifact.CURRENT
        path.write_bytes(good)
    open_verified(root, "embeddings", HINT)


def test_every_bit_of_the_pointer_counts(sound: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "copy"))
    path = root / artifact.CURRENT
    good = path.read_bytes()
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        refusal(root, "embeddings")


def test_every_truncation_and_extension_is_refused(sound: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "copy"))
    draw = random.Random(1)
    for path in files_of(root):
        good = path.read_bytes()
        for length in [0, len(good) - 1, *(draw.randrange(len(good)) for _ in range(23))]:
            path.write_bytes(good[:length])
            refusal(root, "embeddings")
        path.write_bytes(good + b"\n")
        refusal(root, "embeddings")
        path.unlink()
        refusal(root, "embeddings")
        path.write_bytes(good)
    open_verified(root, "embeddings", HINT)


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    version = publish(tmp_path)
    path = version.path / "adapter" / "weights.bin"
    path.write_text("contenT" * 50)
    assert refusal(tmp_path) == f"file differs from what was published ({path}); restore it, or run `tpad export-embeddings` again"


def test_foreign_files_and_links_in_a_version_are_refused(tmp_path: Path) -> None:
    version = publish(tmp_path)
    (version.path / "adapter" / "pytorch_model.bin").write_text("surprise")
    assert "pytorch_model.bin" in refusal(tmp_path)
    (version.path / "adapter" / "pytorch_model.bin").unlink()
    (tmp_path / "elsewhere").write_text("content")
    (version.path / "notes.txt").unlink()
    (version.path / "notes.txt").symlink_to(tmp_path / "elsewhere")
    assert "notes.txt" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "a/../../../secret", "", ".", "notes.txt/"])
def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    version = publish(root)
    (tmp_path / "secret").write_text("s")
    manifest = version.manifest | {"files": [{"name": name, "bytes": 1, "sha256": sha256_file(tmp_path / "secret")}]}
    write_json(version.path / artifact.MANIFEST, manifest)
    write_json(root / artifact.CURRENT, {"version": "v0001", "manifest_sha256": sha256_file(version.path / artifact.MANIFEST)})
    assert "outside its folder" in refusal(root)


@pytest.mark.parametrize("version", ["../root/v0001", "v1", "v0001/", "/v0001", "v0009", "v0001\n"])
def test_a_pointer_to_anything_but_a_version_is_refused(tmp_path: Path, version: str) -> None:
    published_version = publish(tmp_path / "root")
    write_json(tmp_path / "root" / artifact.CURRENT, {"version": version, "manifest_sha256": published_version.manifest_sha256})
    refusal(tmp_path / "root")


def test_old_versions_are_pruned_and_the_current_one_never(tmp_path: Path) -> None:
    for number in range(5):
        publish(tmp_path, f"text {number}", keep=2)
    assert sorted(p.name for p in tmp_path.glob("v*")) == ["v0004", "v0005"]
    publish(tmp_path, keep=1)
    assert sorted(p.name for p in tmp_path.glob("v*")) == ["v0006"]
    assert open_verified(tmp_path, "mllm", HINT).name == "v0006"


def test_a_version_that_was_never_made_current_does_not_push_out_one_that_was(tmp_path: Path) -> None:
    publish(tmp_path, "good")
    shutil.copytree(tmp_path / "v0001", tmp_path / "v0002")  # as a kill just before the pointer is replaced leaves it
    assert open_verified(tmp_path, "mllm", HINT).name == "v0001"
    assert publish(tmp_path, "next").name == "v0003"
    assert sorted(p.name for p in tmp_path.glob("v*")) == ["v0001", "v0003"]


def test_publishing_mends_a_damaged_artifact(tmp_path: Path) -> None:
    publish(tmp_path)
    (tmp_path / artifact.CURRENT).write_text("{")
    refusal(tmp_path)
    publish(tmp_path, "again")
    assert open_verified(tmp_path, "mllm", HINT).manifest["text"] == "again"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"b": 1, "a": [0.1, "é"]})
    assert path.read_text() == '{\n "a": [\n  0.1,\n  "\\u00e9"\n ],\n "b": 1\n}\n'
    for bad in (float("nan"), float("inf"), {"x": {1, 2}}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert path.read_text().startswith('{\n "a"') and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- embeddings


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_come_back_bit_for_bit(tmp_path: Path, dtype: Dtype) -> None:
    tables = [table(1500, 8, dtype), table(3, 8, dtype, first=1500)]
    publish_embeddings(tmp_path, tables, dtype=dtype)
    back = read_embeddings(tmp_path)
    all_columns = pa.concat_tables(tables).to_pydict()
    assert back.item_ids == all_columns["item_id"]
    for half in ("knowledge", "transition"):
        vectors = getattr(back, half)
        assert vectors.shape == (1503, 8) and vectors.dtype == np.float32
        np.testing.assert_array_equal(vectors, np.array(all_columns[half], dtype))
    assert back.has_image.tolist() == all_columns["has_image"] and back.has_text.tolist() == all_columns["has_text"]
    assert back.version.name == "v0001"


def test_int8_halves_come_back_within_half_a_step_of_their_scale(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    values[5] = 0
    schema = embeddings_schema(8, "int8")
    columns = {name: rows for name, rows in zip(table(300).column_names, table(300).columns, strict=True) if name not in HALVES}
    for half in HALVES:
        columns |= vector_columns(half, values, schema)
    publish_embeddings(tmp_path, [pa.table({name: columns[name] for name in schema.names}, schema=schema)], dtype="int8")
    back = read_embeddings(tmp_path)
    assert back.knowledge.dtype == np.float32
    assert (np.abs(back.knowledge - values) <= np.abs(values).max(1, keepdims=True) / 127 * 0.501).all()
    np.testing.assert_array_equal(back.knowledge, back.transition)


def test_a_part_has_the_promised_layout_and_always_the_same_bytes(tmp_path: Path) -> None:
    rows = table(2500)
    write_part(tmp_path / "a", rows)
    write_part(tmp_path / "b", pa.concat_tables([rows[:7], rows[7:2000], rows[2000:]]).replace_schema_metadata({"host": "here"}))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pq.ParquetFile(tmp_path / "a") as file:
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        assert [g.num_rows for g in groups] == [1024, 1024, 452]
        assert {groups[0].column(n).compression for n in range(7)} == {"ZSTD"}
        assert not any("DICTIONARY" in e for n in range(7) for e in groups[0].column(n).encodings)
        assert file.schema_arrow.equals(embeddings_schema(8, "float32"))


def test_page_checksums_are_written(tmp_path: Path) -> None:
    rows = table(64, 64)
    write_part(tmp_path / "part", rows)
    data = bytearray((tmp_path / "part").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "part").write_bytes(data)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(tmp_path / "part", page_checksum_verification=True)


def test_a_failing_write_leaves_the_part_that_was_there(tmp_path: Path) -> None:
    write_part(tmp_path / "part", table(10))
    before = (tmp_path / "part").read_bytes()
    with pytest.raises(pa.ArrowException):
        write_part(tmp_path / "part", pa.table([pa.nulls(1, pa.month_day_nano_interval())], ["not for Parquet"]))
    assert (tmp_path / "part").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def with_value(rows: pa.Table, value: float) -> pa.Table:
    values = rows["transition"].combine_chunks().flatten().to_numpy().copy()
    values[11] = value
    kind = rows.schema.field("transition").type
    return rows.set_column(2, rows.schema.field("transition"), pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind))


def test_embeddings_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    good = table(50)
    cases: dict[str, tuple[list[pa.Table], dict[str, Any]]] = {
        "not finite": ([with_value(good, float("nan"))], {}),
        "vectors that are not finite": ([good, with_value(table(50, first=50), float("-inf"))], {}),
        "item_id is duplicated": ([good, table(50)], {}),
        "rows promised": ([good], {"rows": 51}),
        "51 rows promised, 50 found": ([good], {"rows": 51, "parts": [{"name": "part-00000.parquet", "rows": 51}]}),
        "columns are not those": ([good], {"dim": 4}),
        "wrong 'float64'": ([good], {"dtype": "float64"}),
        "not a readable Parquet file|columns are not": ([good.drop_columns(["n_tokens"])], {}),
        "file is missing": ([good], {"parts": [{"name": "part-00007.parquet", "rows": 50}]}),
        "wrong 'name'": ([good], {"parts": [{"rows": 50}]}),
    }
    for number, (message, (tables, changes)) in enumerate(cases.items()):
        publish_embeddings(tmp_path / str(number), tables, **changes)
        with pytest.raises(UserError, match=message) as caught:
            read_embeddings(tmp_path / str(number))
        assert caught.value.code == ARTIFACT
    with pytest.raises(UserError, match=r"not found .*; run `tpad export-embeddings` first"):
        read_embeddings(tmp_path / "none")
