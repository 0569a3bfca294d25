"""The columns that the MLLM reads where `data.text` is null."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.config import DataConfig
from pipeline.data.catalog import load_catalog
from pipeline.mllm.prompts import Prompts


def read_by_default(folder: Path, **columns: object) -> list[str]:
    table = pa.table({"item_id": [f"i{n}" for n in range(12)], **columns})
    pq.write_table(table, folder / "items.parquet")
    return Prompts(load_catalog(folder), DataConfig(text=None)).shown


TITLES = [f"thing {n}" for n in range(12)]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["lamps", "mugs", None] * 4, True),  # a category
        ([["red", "blue"], ["blue"], []] * 4, True),  # lists, of which each value counts
        ([1994 + n % 5 for n in range(12)], True),  # a year
        ([f"SKU-{n}" for n in range(12)], False),  # every value once
        (["shop"] * 12, False),  # one value of all
        ([3, 5, 7] * 4, False),  # numbers may be counts of later days
        ([2.5, 3.5, 4.5] * 4, False),
        ([None] * 12, False),
        (["thing", "Thing"] * 6, False),  # what the titles say
    ],
)
def test_columns_that_tell_what_items_share_are_read(values: list[object], shown: bool, tmp_path: Path) -> None:
    found = read_by_default(tmp_path, description=[f"about {n}" for n in range(12)], extra=values, title=TITLES)
    assert found == ["title", *(["extra"] if shown else []), "description"]


def test_it_need_not_have_a_description(tmp_path: Path) -> None:
    assert read_by_default(tmp_path, title=TITLES) == ["title"]


def test_an_item_shows_what_it_has(tmp_path: Path) -> None:
    read_by_default(tmp_path, title=TITLES, brand=["A", "B", None] * 4, description=["long"] * 12)
    prompts = Prompts(load_catalog(tmp_path), DataConfig(text=None))
    assert [prompts.text(row) for row in (0, 2)] == ["thing 0. A. long", "thing 2. long"]
