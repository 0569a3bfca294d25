"""Instruction templates: an item, or a session of items, becomes a list of parts.

A part is text, the image of an item, the end of the user's turn, a place where a feature is read (the last token
before it), or an answer the model learns to write. Which modality is withheld is said in words, so an item that lacks
one is no riddle. Wording is this project's own: the paper does not publish its prompts.
"""

import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from pipeline.catalog import Catalog
from pipeline.config import DataConfig
from pipeline.errors import USAGE, UserError
from pipeline.neighbours import Neighbours

VERSION = "1"  # goes into fingerprints and manifests; raise it with any change of the wording

ITEM = "Item:"
NO_IMAGE = "no picture."
NO_TEXT = "no text."
DESCRIBE = "Describe it:"
NEXT = "Next:"
SIMILAR = "Similar:"


class Part(NamedTuple):
    kind: Literal["text", "image", "turn", "read", "answer"]
    text: str = ""
    row: int = -1  # of the item whose image it is


class View(NamedTuple):
    """What of an item is shown."""

    image: bool
    text: bool


TURN, READ = Part("turn"), Part("read")
FULL = View(True, True)


class Prompts:
    """The prompts over one catalogue's items."""

    def __init__(self, catalog: Catalog, config: DataConfig, neighbours: Neighbours | None = None) -> None:
        self.catalog, self.on_bad_image, self.neighbours = catalog, config.on_bad_image, neighbours
        unknown = [c for c in config.attributes or [] if c not in catalog.columns]
        if unknown:
            raise UserError(f"no column `{unknown[0]}` in items.parquet (data.attributes); columns: {', '.join(catalog.columns)}", USAGE)
        self.shown = [c for c in config.text if c in catalog.columns]
        written = catalog.columns if config.attributes is None else config.attributes
        self.columns = list(dict.fromkeys([*self.shown, *written]))
        self._decodes: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self.catalog)

    def text(self, row: int) -> str:
        return ". ".join(text for column in self.shown if (text := self.catalog.text(row, column)))

    def has_image(self, row: int) -> bool:
        """Whether the item has an image to show: one that cannot be decoded counts as none, unless it is an error."""
        if self.on_bad_image == "error" or not self.catalog.has_image(row):
            return self.catalog.has_image(row)
        if row not in self._decodes:
            try:
                self.catalog.image(row)
                self._decodes[row] = True
            except UserError as error:
                print(f"warning: {error}; shown as text only", file=sys.stderr)
                self._decodes[row] = False
        return self._decodes[row]

    def _block(self, row: int, view: View) -> list[Part]:
        text = self.text(row) if view.text else ""
        picture = Part("image", row=row) if view.image and self.has_image(row) else Part("text", NO_IMAGE)
        block = [Part("text", ITEM), picture, Part("text", text or NO_TEXT)]
        return block if text and picture.kind == "image" else [*block, *self._similar(row)]

    def similar(self, row: int) -> str:
        """What is shown beside an item that lacks something: titles of near items, or nothing."""
        return "; ".join(self.neighbours(row)) if self.neighbours else ""

    def _similar(self, row: int) -> list[Part]:
        titles = self.similar(row)
        return [Part("text", SIMILAR), Part("text", titles)] if titles else []

    def item(self, row: int, view: View = FULL) -> list[Part]:
        """The prompt at whose last token the item feature h(v) is read."""
        return [*self._block(row, view), Part("text", DESCRIBE), TURN, READ]

    def knowledge(self, row: int, view: View, rng: np.random.Generator) -> list[Part]:
        """The item prompt, and then one thing the model learns to write: a column that the view does not show.

        With the text withheld that is the title, half of the time.
        """
        hidden = [c for c in self.columns if not (view.text and c in self.shown) and self.catalog.text(row, c)]
        if not view.text and hidden and rng.random() < 0.5:
            hidden = hidden[:1]
        column = hidden[rng.integers(len(hidden))] if hidden else "title"
        return [*self.item(row, view), Part("text", f"{column}:"), Part("answer", self.catalog.text(row, column))]

    def pair(self, row: int, rng: np.random.Generator) -> tuple[View, View]:
        """Two views to be pulled together; equal where the item has only an image or only a text."""
        image, text, full = View(True, False), View(False, True), FULL
        if not (self.has_image(row) and self.text(row)):
            return full, full
        return ((full, image), (full, image), (full, text), (full, text), (image, text))[rng.integers(5)]

    def dropped(self, row: int, text: float, image: float, rng: np.random.Generator) -> View:
        """The view of an item in training: with these probabilities its text or its image is withheld, if it has both."""
        draw = rng.random()
        if draw >= text + image or not (self.has_image(row) and self.text(row)):
            return FULL
        return View(True, False) if draw < text else View(False, True)

    def session(self, rows: Sequence[int] | np.ndarray, views: Sequence[View] | None = None) -> list[Part]:
        """The items of a session but the last, whose title is the answer; a feature is read wherever a next item is asked for.

        One pass so trains on every prefix of the session: the model is causal.
        """
        shown = zip(rows[:-1], views or [FULL] * (len(rows) - 1), strict=True)
        parts = [part for row, view in shown for part in (*self._block(row, view), Part("text", NEXT), READ)]
        return [*parts[:-1], TURN, READ, Part("answer", self.text(rows[-1]) or NO_TEXT)]

    def words(self) -> list[str]:
        """Every text of the catalogue and of the templates, for a tokenizer that is trained on them."""
        texts = [self.catalog.text(row, column) for row in range(len(self)) for column in self.columns]
        similar = [SIMILAR] if self.neighbours else []
        templates = [ITEM, NO_IMAGE, NO_TEXT, DESCRIBE, NEXT, *similar, *(f"{column}:" for column in self.columns)]
        return texts + templates * (len(texts) // 10 + 10)  # often enough to become one token a word
