"""Instructions: an item, or a session of items, becomes a list of parts, in the wording of `prompt_templates.py`.

A part is words of a template, text or image of an item, the end of the user's turn, a place where a feature is read
(the last token before it), or an answer the model learns to write. Which modality is withheld is said in words, so an
item that lacks one is no riddle. The paper does not publish its prompts: wording and order are this project's own.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from string import Formatter
from typing import Literal, NamedTuple

import numpy as np

from pipeline.core.config import DataConfig
from pipeline.core.errors import USAGE, UserError
from pipeline.data.catalog import Catalog
from pipeline.data.images import ImageError
from pipeline.mllm.neighbour_titles import Neighbours
from pipeline.mllm.prompt_templates import Templates, load_templates

VERSION = "2"  # goes into fingerprints and manifests; raise it with any change of what is shown beside the templates


class PromptPart(NamedTuple):
    kind: Literal["words", "text", "image", "turn", "read", "answer", "intent"]  # "text", of an item, may be cut
    text: str = ""
    row: int = -1  # of the item whose image it is


class View(NamedTuple):
    """What of an item is shown."""

    image: bool
    text: bool


TURN, READ = PromptPart("turn"), PromptPart("read")
FULL = View(True, True)


def check_columns(catalog: Catalog, config: DataConfig) -> None:
    """Refuses names of columns that the catalogue of a training lacks. One that is exported later is shown as far as it has them."""
    for key, names in (("text", config.text), ("attributes", config.attributes or [])):
        unknown = [c for c in names if c not in catalog.columns and (key, c) != ("text", "description")]  # which a catalogue may lack
        if unknown:
            raise UserError(f"no column `{unknown[0]}` in items.parquet (data.{key}); columns: {', '.join(catalog.columns)}", USAGE)


class Prompts:
    """The prompts over one catalogue's items. `templates` (None: those the settings name) word them."""

    def __init__(
        self, catalog: Catalog, config: DataConfig, templates: Templates | None = None, neighbours: Neighbours | None = None
    ) -> None:
        self.catalog, self.on_bad_image, self.neighbours = catalog, config.on_bad_image, neighbours
        self.templates = templates or load_templates(config.prompts)
        self.shown = [c for c in config.text if c in catalog.columns]
        written = catalog.text_columns if config.attributes is None else [c for c in config.attributes if c in catalog.columns]
        self.columns = list(dict.fromkeys([*self.shown, *written]))
        self.attributes = [c for c in self.columns if c not in self.shown]
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
            except ImageError as error:
                print(f"warning: {error}; shown as text only", file=sys.stderr)
                self._decodes[row] = False
        return self._decodes[row]

    def _begin(self) -> list[PromptPart]:
        return filled(self.templates.instruction)

    def _block(self, row: int, view: View) -> list[PromptPart]:
        text = self.text(row) if view.text else ""
        image = [PromptPart("image", row=row)] if view.image and self.has_image(row) else []
        shown = image or filled(self.templates.no_image), [PromptPart("text", text)] if text else filled(self.templates.no_text)
        block = filled(self.templates.item, image=shown[0], text=shown[1])
        return block if text and image else [*block, *self._similar(row)]

    def similar(self, row: int) -> str:
        """What is shown beside an item that lacks something: titles of near items, or nothing."""
        return "; ".join(self.neighbours(row)) if self.neighbours else ""

    def _similar(self, row: int) -> list[PromptPart]:
        titles = self.similar(row)
        return filled(self.templates.similar, titles=[PromptPart("text", titles)]) if titles else []

    def item(self, row: int, view: View = FULL) -> list[PromptPart]:
        """The prompt at whose last token the item feature h(v) is read."""
        return [*self._begin(), *filled(self.templates.describe, item=self._block(row, view)), TURN, READ]

    def knowledge(self, row: int, view: View, rng: np.random.Generator) -> list[PromptPart]:
        """The item prompt, and then one thing the model learns to write: a column that the view does not show.

        With the text withheld that is the first of its columns, the title, half of the time. Where nothing is hidden it is the title.
        """
        hidden = [c for c in self.columns if not (view.text and c in self.shown) and self.catalog.text(row, c)]
        if not view.text and hidden and rng.random() < 0.5:
            hidden = hidden[:1]
        column = hidden[rng.integers(len(hidden))] if hidden else "title"
        return [*self.item(row, view), self._asked(column), PromptPart("answer", self.catalog.text(row, column))]

    def _asked(self, column: str) -> PromptPart:
        return PromptPart("words", self.templates.knowledge.format(column=column).strip())

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

    def common(self, rows: Sequence[int] | np.ndarray) -> str:
        """The intent of a session of `rows`: the attribute values that most of its different items share; "" where there is none.

        After LLM4SBR (arXiv 2402.13840; intents as texts beside the items) and SPRINT (arXiv 2508.00570; from a closed pool, here
        what the catalogue's columns hold). A session that shows none is not given one. Values of a list count each for itself.
        """
        items = {int(row) for row in rows}
        values = [(c, value) for row in items for c in self.attributes for value in {*self.catalog.text(row, c).split(", ")} if value]
        shared = [found for found, count in Counter(values).items() if count > max(1, len(items) / 2)]
        return ", ".join(f"{c}: {value}" for c, value in sorted(shared, key=lambda found: (self.attributes.index(found[0]), found[1])))

    def summary(self, earlier: str, rows: Sequence[int] | np.ndarray) -> list[PromptPart]:
        """After which a summary of `rows` is to be written, `earlier` being that of the items before them."""
        items = [part for row in rows for part in self._block(int(row), FULL)]
        return [*self._begin(), *self._earlier(earlier), *filled(self.templates.summarise, items=items), TURN]

    def _earlier(self, summary: str) -> list[PromptPart]:
        return filled(self.templates.earlier, summary=[PromptPart("text", summary)]) if summary else []

    def session(
        self, rows: Sequence[int] | np.ndarray, views: Sequence[View] | None = None, intent: str = "", earlier: str = ""
    ) -> list[PromptPart]:
        """The items of a session but the last, whose text is the answer; a feature is read wherever a next item is asked for.

        One pass so trains on every prefix of the session: the model is causal. An intent is written before it, and
        after the last feature, which so has to know it without having read it.
        """
        shown = zip(rows[:-1], views or [FULL] * (len(rows) - 1), strict=True)
        parts = [part for row, view in shown for part in (*filled(self.templates.next, item=self._block(row, view)), READ)]
        asked = filled(self.templates.intent, intent=[PromptPart("intent", intent)]) if intent else []
        answer = PromptPart("answer", self.text(rows[-1]) or self.templates.no_text)
        return [*self._begin(), *self._earlier(earlier), *parts[:-1], TURN, READ, *asked, answer]

    def words(self) -> list[str]:
        """Every text of the catalogue and of the templates that K knows, for a tokenizer that is trained on them."""
        texts = [self.catalog.text(row, column) for row in range(len(self)) for column in self.columns]
        of = self.templates
        wordings = [of.instruction, of.item, of.no_image, of.no_text, of.describe, of.next, *([of.similar] if self.neighbours else [])]
        templates = [part.text for part in (*(p for t in wordings for p in filled(t)), *map(self._asked, self.columns))]
        return texts + templates * (len(texts) // 10 + 10)  # often enough to become one token a word


def filled(template: str, **parts: list[PromptPart]) -> list[PromptPart]:
    """The words of a template, and the parts that stand for its placeholders (without them: the words alone)."""
    found: list[PromptPart] = []
    for words, name, *_ in Formatter().parse(template):
        if words.strip():
            found.append(PromptPart("words", words.strip()))
        found += parts.get(name or "", [])
    return found
