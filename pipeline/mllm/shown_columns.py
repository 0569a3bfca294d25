"""Chooses the item columns that the MLLM reads, where `data.text` is null."""

import re
from collections.abc import Sequence

import numpy as np

from pipeline.data.catalog import Catalog

SAMPLE = 10_000  # items that are looked at
SHARED = 2  # a column tells what items have in common if a value stands in that many items on average
SAID = 0.9  # share of the items whose title or description has the value anyway
YEAR = re.compile(r"(1[89]|20)\d\d")


def shown_columns(catalog: Catalog) -> list[str]:
    """Returns title, the columns of words that several items share (categories, brands, people), a year, and description.

    Such columns hold for new items too, and many catalogues have little else. Numbers other than years are left out, as a price or a count
    of ratings may be of later days than the sessions, and so are columns that title or description repeat. What is not shown, K learns to
    write (`data.attributes`).
    """
    rows = np.unique(np.linspace(0, len(catalog) - 1, min(len(catalog), SAMPLE)).astype(int)).tolist()
    texts = [f"{catalog.text(row, 'title')} {described(catalog, row)}".lower() for row in rows]
    chosen = [name for name in catalog.columns if name not in ("title", "description") and is_shared(catalog, name, rows, texts)]
    return ["title", *chosen, *(["description"] if "description" in catalog.columns else [])]


def described(catalog: Catalog, row: int) -> str:
    return catalog.text(row, "description") if "description" in catalog.columns else ""


def is_shared(catalog: Catalog, name: str, rows: Sequence[int], texts: list[str]) -> bool:
    """Tells whether items share the values of a column, beyond what their `texts` say; each value of a list counts on its own."""
    values = [catalog.text(row, name) for row in rows]
    if name not in catalog.text_columns and not all(YEAR.fullmatch(value) for value in values if value):
        return False
    parts = [part for value in values if value for part in value.split(", ")]
    said = [all(part.lower() in text for part in value.split(", ")) for value, text in zip(values, texts, strict=True) if value]
    return 2 <= len(set(parts)) <= len(parts) / SHARED and sum(said) < SAID * len(said)
