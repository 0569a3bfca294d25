"""Tests loading of items and sessions: errors are one line with file and row, and hostile images do no harm."""

import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core.config import DataConfig
from pipeline.core.errors import DATA, UserError
from pipeline.data.catalog import Catalog, load_catalog
from pipeline.data.images import decode_image
from pipeline.data.session_log import load_sessions
from pipeline.mllm.prompts import Prompts

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def write_items(folder: Path, ids: Any, group: int = 1024, **columns: Any) -> Path:
    table = {"item_id": pa.array(ids, pa.string()), "title": [f"item {i}" for i in range(len(ids))], **columns}
    pq.write_table(
        pa.table({name: values for name, values in table.items() if values is not None}), folder / "items.parquet", row_group_size=group
    )
    return folder


def write_sessions(folder: Path, sessions: Any, items: Any, times: Any) -> Path:
    columns = {"session_id": pa.array(sessions, pa.string()), "item_id": pa.array(items, pa.string()), "timestamp": times}
    pq.write_table(pa.table(columns), folder / "sessions.parquet")
    return folder


def write_images(folder: Path, images: list[Any]) -> Catalog:
    values = [{"bytes": image} if isinstance(image, bytes) else {"path": image} if image else None for image in images]
    write_items(folder, [f"i{n}" for n in range(len(images))], image=pa.array(values, IMAGE))
    return load_catalog(folder)


def refused(call: Any, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == DATA
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# --- items


def test_texts_of_every_kind_read_as_text(tmp_path: Path) -> None:
    write_items(
        tmp_path,
        ["a", "b"],
        title=["Ümlaut", None],
        year=[1999, None],
        price=[2.5, float("nan")],
        tags=[["x", "y"], []],
        sizes=[[1.5, 2.0], None],
        colour=pa.array(["red", None]).dictionary_encode(),
        new=[True, False],
        blob=[b"\x00", b"\x01"],
    )
    catalog = load_catalog(tmp_path)
    assert catalog.columns == ["title", "year", "price", "tags", "sizes", "colour", "new"]
    assert catalog.text_columns == ["title", "tags", "colour"]
    assert Prompts(catalog, DataConfig()).columns == ["title", "tags", "colour"]
    assert Prompts(catalog, DataConfig(attributes=["year"])).columns == ["title", "year"]
    assert [catalog.text(0, name) for name in catalog.columns] == ["Ümlaut", "1999", "2.5", "x, y", "1.5, 2", "red", "yes"]
    assert [catalog.text(1, name) for name in catalog.columns] == ["", "", "", "", "", "", "no"]
    assert (catalog.titles, catalog.row, len(catalog)) == (["Ümlaut", ""], {"a": 0, "b": 1}, 2)
    assert catalog.image(0) is None and not catalog.has_image(0)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["a", "b", "a"], ["'a'", "row 2", "row 0", "duplicated"]),
        (["a", ""], ["empty", "row 1"]),
        (["a", " "], ["empty", "row 1"]),
        (["a", None], ["empty", "row 1"]),
        (["a", "x" * 513], ["512", "row 1"]),
        (["a", "b\x1b[31m"], ["control", "row 1"]),
        (["a", "b\u0085"], ["control", "row 1"]),
        ([], ["no items"]),
    ],
)
def test_faulty_ids_are_named_with_file_and_row(tmp_path: Path, ids: list[Any], words: list[str]) -> None:
    write_items(tmp_path, ids)
    refused(lambda: load_catalog(tmp_path), "items.parquet", *words)


def test_ids_as_categories_and_images_of_one_kind_alone_are_read(tmp_path: Path) -> None:
    """Categories as pandas writes them, and an Arrow column of dictionaries whose `bytes` are all empty."""
    (tmp_path / "a.png").write_bytes(encoded(noise()))
    table = pa.table(
        {"item_id": pa.array(["a", "b"]).dictionary_encode(), "title": ["x", "y"], "image": [{"bytes": None, "path": "a.png"}, None]}
    )
    pq.write_table(table, tmp_path / "items.parquet")
    catalog = load_catalog(tmp_path)
    assert (catalog.item_ids, catalog.has_image(0), catalog.has_image(1), catalog.by_path) == (["a", "b"], True, False, True)
    assert catalog.image(0) is not None


def test_another_image_beside_the_catalogue_is_another_catalogue(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(noise()))
    before = write_images(tmp_path, ["a.png", "b.png", None]).sha256
    assert load_catalog(tmp_path).sha256 == before
    (tmp_path / "b.png").write_bytes(encoded(noise()) + b"more")
    assert load_catalog(tmp_path).sha256 != before


def test_faulty_files_are_refused(tmp_path: Path) -> None:
    refused(lambda: load_catalog(tmp_path), "items.parquet", "not found", "tpad prepare")
    write_items(tmp_path, ["a"], title=None)
    refused(lambda: load_catalog(tmp_path), "`title`", "missing")
    pq.write_table(pa.table({"item_id": [1], "title": ["x"]}), tmp_path / "items.parquet")
    refused(lambda: load_catalog(tmp_path), "`item_id`", "int64")
    write_items(tmp_path, ["a"], image=pa.array(["a.jpg"]))
    refused(lambda: load_catalog(tmp_path), "`image`", "wrong type")
    (tmp_path / "items.parquet").write_bytes(b"PAR1 not really")
    refused(lambda: load_catalog(tmp_path), "items.parquet", "Parquet")


def test_damaged_parquet_never_ends_in_a_traceback(tmp_path: Path) -> None:
    write_items(tmp_path, [f"i{n}" for n in range(50)])
    content = (tmp_path / "items.parquet").read_bytes()
    dice = random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        (tmp_path / "items.parquet").write_bytes(damaged[: dice.choice([len(content), dice.randrange(len(content))])])
        try:
            load_catalog(tmp_path)
        except UserError as error:
            assert error.code == DATA


# --- images


def test_images_are_read_by_row_group_in_any_order(tmp_path: Path) -> None:
    images = [encoded(Image.new("RGB", (4, 4), (n, 0, 0))) for n in range(10)]
    values = [None if n == 3 else {"bytes": data} for n, data in enumerate(images)]
    write_items(tmp_path, [str(n) for n in range(10)], group=4, image=pa.array(values, IMAGE))
    catalog = load_catalog(tmp_path)
    for row in (9, 0, 5, 3, 4, 8, 0):
        image = catalog.image(row)
        assert catalog.has_image(row) == (image is not None) == (row != 3)
        assert image is None or image.getpixel((0, 0)) == (row, 0, 0)


def test_items_replaced_under_a_reader_are_noticed(tmp_path: Path) -> None:
    catalog = write_images(tmp_path, [encoded(noise())])
    write_images(tmp_path, [encoded(Image.new("RGB", (9, 9)))])
    refused(lambda: catalog.image(0), "changed")
    (tmp_path / "items.parquet").unlink()
    refused(lambda: catalog.image(0), "changed")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), (254, 0, 0)),
        (encoded(Image.fromarray(np.full((9, 9), 0x8000, np.uint16))), (127, 127, 127)),
        (encoded(Image.new("RGBA", (9, 9), (255, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.new("LA", (9, 9), (0, 255))), (0, 0, 0)),
        (encoded(Image.new("1", (9, 9), 1)), (255, 255, 255)),
        (encoded(Image.new("RGB", (9, 9), (0, 0, 255)).quantize(4), transparency=0), (255, 255, 255)),
        (encoded(Image.new("RGB", (9, 9), (0, 0, 255)).quantize(4)), (0, 0, 255)),
        (
            encoded(Image.new("RGB", (9, 9), (255, 0, 0)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9))], lossless=True),
            (255, 0, 0),
        ),
    ],
    ids=["cmyk", "16 bit", "alpha", "grey alpha", "1 bit", "palette alpha", "palette", "animated webp"],
)
def test_unusual_images_become_rgb(data: bytes, expected: tuple[int, int, int]) -> None:
    image = decode_image(data, "here")
    assert (image.mode, image.size) == ("RGB", (9, 9))
    assert np.abs(np.asarray(image)[4, 4].astype(int) - expected).max() <= 1


def test_exif_turns_the_image_and_broken_exif_does_not_matter() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(noise(64, 48), "JPEG", exif=exif), "here").size == (48, 64)
    assert decode_image(encoded(noise(64, 48), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff"), "here").size == (64, 48)


def test_large_jpegs_are_decoded_smaller() -> None:
    assert decode_image(encoded(Image.new("RGB", (6000, 3000)), "JPEG"), "here").size == (3000, 1500)
    assert decode_image(encoded(Image.new("RGB", (4096, 10)), "JPEG"), "here").size == (4096, 10)


def bomb_png(side: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("data", "word"),
    [
        (bomb_png(7000), "too large"),
        (bomb_png(12000), "too many pixels"),
        (bomb_png(50000), "too many pixels"),
        (encoded(noise(), "JPEG")[:-300], "truncated"),
        (encoded(noise(), "JPEG", progressive=True)[:900], "truncated"),
        (encoded(noise())[:-2000], "truncated"),
        (encoded(noise(), "WEBP")[:-300], "damaged"),
        (encoded(noise(), "TGA"), "not a JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG"),
        (b"", "not a JPEG"),
        (b"\xff\xd8\xff" + bytes(21 * 2**20), "MB"),
    ],
    ids=["49 MP", "144 MP", "2500 MP", "jpeg", "progressive", "png", "webp", "tga", "svg", "nothing", "huge"],
)
def test_hostile_images_are_one_line(data: bytes, word: str) -> None:
    refused(lambda: decode_image(data, "items.parquet row 7"), word, "items.parquet row 7", "on_bad_image")


def test_damaged_images_are_a_user_error_or_an_image() -> None:
    dice = random.Random(0)
    for content in (encoded(noise(), "JPEG"), encoded(noise()), encoded(noise(), "WEBP")):
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(3):
                damaged[dice.randrange(min(len(content), 400))] ^= 1 << dice.randrange(8)
            try:
                assert decode_image(bytes(damaged), "here").mode == "RGB"
            except UserError as error:
                assert error.code == DATA


def test_image_paths_stay_inside_the_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(encoded(noise()))
    (data / "images" / "a.png").write_bytes(encoded(noise()))
    (data / "out.png").symlink_to(tmp_path / "secret.png")
    (data / "loop.png").symlink_to(data / "loop.png")
    (data / "up").symlink_to(tmp_path)
    paths = [
        "images/a.png",
        "../secret.png",
        str(tmp_path / "secret.png"),
        "out.png",
        "up/secret.png",
        "images",
        "loop.png",
        "gone.png",
    ]
    catalog = write_images(data, [*paths, "https://example.org/a.png", "images/../../secret.png", "a\x00.png"])
    good = catalog.image(0)
    assert good is not None and good.size == (64, 48)
    for row in range(1, len(catalog)):
        refused(lambda row=row: catalog.image(row), f"items.parquet row {row}, item_id 'i{row}'")


# --- sessions


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return write_items(tmp_path, ["a", "b", "c"])


def test_sessions_are_in_order_of_time_then_row(shop: Path) -> None:
    write_sessions(
        shop, ["z", "y", "z", "one", "y", "z", "x", "x"], ["a", "b", "b", "a", "c", "c", "c", "a"], [50, 40, 50, 10, 45, 49, 40, 40]
    )
    log = load_sessions(shop, load_catalog(shop))
    assert (log.session_ids, log.start.tolist(), log.dropped) == (["x", "y", "z"], [40, 40, 49], 1)
    assert [log.session(i).tolist() for i in range(3)] == [[2, 0], [1, 2], [2, 0, 1]]
    part = log.select(np.array([2, 0]))
    assert (part.session_ids, part.start.tolist()) == (["z", "x"], [49, 40])
    assert [part.session(i).tolist() for i in range(2)] == [[2, 0, 1], [2, 0]]
    assert part.ids_sha256() == log.select(np.array([0, 2])).ids_sha256() != log.ids_sha256()


def test_seconds_milliseconds_and_arrow_times_agree(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalog = load_catalog(shop)
    seconds = [1_500_000_000, 1_500_000_060]
    for times in (
        pa.array(seconds),
        pa.array([t * 1000 + 999 for t in seconds]),
        pa.array([t * 10**6 for t in seconds], pa.timestamp("us", "UTC")),
        pa.array(seconds, pa.timestamp("s")),
    ):
        write_sessions(shop, ["s", "s"], ["a", "b"], times)
        assert load_sessions(shop, catalog).start.tolist() == [1_500_000_000]
    assert capsys.readouterr().err.count("read as milliseconds") == 1


@pytest.mark.parametrize(
    ("sessions", "items", "times", "words"),
    [
        (["s", "s"], ["a", "nope"], [1, 2], ["'nope'", "row 1"]),
        (["s", ""], ["a", "b"], [1, 2], ["session_id", "empty", "row 1"]),
        (["s", "s"], ["a", None], [1, 2], ["item_id", "empty", "row 1"]),
        (["s", "s"], ["a", "b"], pa.array([1, None]), ["timestamp", "empty", "row 1"]),
        (["s", "s"], ["a", "b"], [1.5, 2.5], ["timestamp", "wrong type"]),
        (["s", "s"], ["a", "b"], [1_500_000_000, 1_500_000_000_000], ["partly", "row 0"]),
        (["s", "s"], ["a", "b"], [1_500_000_000_000_000] * 2, ["neither"]),
        (["s", "t"], ["a", "b"], [1, 2], ["no session has two events"]),
        ([], [], pa.array([], pa.int64()), ["no events"]),
    ],
)
def test_faulty_logs_are_named_with_file_and_row(shop: Path, sessions: Any, items: Any, times: Any, words: list[str]) -> None:
    write_sessions(shop, sessions, items, times)
    refused(lambda: load_sessions(shop, load_catalog(shop)), "sessions.parquet", *words)


def test_users_that_are_no_texts_are_refused(shop: Path) -> None:
    write_sessions(shop, ["s", "s"], ["a", "b"], [1, 2])
    table = pq.read_table(shop / "sessions.parquet")
    pq.write_table(table.append_column("user_id", pa.array([7, 7])), shop / "sessions.parquet")
    refused(lambda: load_sessions(shop, load_catalog(shop)), "`user_id`", "int64")


def test_missing_log_and_column(shop: Path) -> None:
    catalog = load_catalog(shop)
    refused(lambda: load_sessions(shop, catalog), "sessions.parquet", "not found")
    pq.write_table(pa.table({"session_id": ["s"], "item_id": ["a"]}), shop / "sessions.parquet")
    refused(lambda: load_sessions(shop, catalog), "`timestamp`", "missing")


def test_catalogue_needs_no_torch() -> None:
    code = "import sys, pipeline.data.catalog, pipeline.data.prepare.prepare; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
