"""Builds prompts: an item, or a session of items, becomes a list of parts, worded by `prompt_templates.py`.

A part is words of a template, text or image of an item, the end of the user's turn, a point where a feature is read (of the tokens
before it: `backbone.pooling`), or an answer the model learns to generate. A missing or withheld image or text is stated in the
prompt. The paper does not publish its prompts, so wording and order are this project's own.
"""

from collections import Counter
from collections.abc import Sequence
from string import Formatter
from typing import Literal, NamedTuple

import numpy as np

from pipeline.core.config import DataConfig
from pipeline.core.errors import USAGE, UserError, note
from pipeline.data.catalog import Catalog
from pipeline.data.images import ImageError
from pipeline.mllm.neighbour_titles import Neighbours
from pipeline.mllm.prompt_templates import Templates, load_templates
from pipeline.mllm.shown_columns import shown_columns

VERSION = "2"  # part of fingerprints and manifests; raise it whenever prompts change other than by the templates


class PromptPart(NamedTuple):
    """One part of a prompt."""

    kind: Literal["words", "text", "image", "turn", "read", "answer", "intent", "vector"]  # "text": of an item, may be cut
    text: str = ""
    row: int = -1  # of the item, for "image" and "vector"


class View(NamedTuple):
    """Which modalities of an item are shown."""

    image: bool
    text: bool


TURN, READ = PromptPart("turn"), PromptPart("read")
FULL = View(True, True)


def check_columns(catalog: Catalog, config: DataConfig) -> None:
    """Raises `UserError` (2) if the training catalogue lacks a column of the settings. Catalogues exported later may lack them."""
    for key, names in (("text", config.text or []), ("attributes", config.attributes or [])):
        unknown = [c for c in names if c not in catalog.columns and (key, c) != ("text", "description")]  # description is optional
        if unknown:
            raise UserError(f"no column `{unknown[0]}` in items.parquet (data.{key}); columns: {', '.join(catalog.columns)}", USAGE)


class Prompts:
    """Builds the prompts of one catalogue's items. `templates`: their wording; None: the one that the settings name."""

    def __init__(
        self, catalog: Catalog, config: DataConfig, templates: Templates | None = None, neighbours: Neighbours | None = None
    ) -> None:
        self.catalog, self.on_bad_image, self.neighbours = catalog, config.on_bad_image, neighbours
        self.templates = templates or load_templates(config.prompts)
        self.shown = shown_columns(catalog) if config.text is None else [c for c in config.text if c in catalog.columns]
        generated = catalog.text_columns if config.attributes is None else [c for c in config.attributes if c in catalog.columns]
        self.columns = list(dict.fromkeys([*self.shown, *generated]))
        self.attributes = [c for c in self.columns if c not in self.shown]
        self._decodes: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self.catalog)

    def text(self, row: int) -> str:
        """Returns the item's text that is shown (`data.text`); empty where it has none."""
        return ". ".join(text for column in self.shown if (text := self.catalog.text(row, column)))

    def has_image(self, row: int) -> bool:
        """Returns whether the item has an image to show. One that cannot be decoded counts as none, unless `on_bad_image` is error."""
        if self.on_bad_image == "error" or not self.catalog.has_image(row):
            return self.catalog.has_image(row)
        if row not in self._decodes:
            try:
                self.catalog.image(row)
                self._decodes[row] = True
            except ImageError as error:
                note(f"warning: {error}; shown as text only")
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
        """Returns the titles of the nearest items, which are shown with an item that lacks its image or text; empty without any."""
        return "; ".join(self.neighbours(row)) if self.neighbours else ""

    def _similar(self, row: int) -> list[PromptPart]:
        titles = self.similar(row)
        return filled(self.templates.similar, titles=[PromptPart("text", titles)]) if titles else []

    def item(self, row: int, view: View = FULL) -> list[PromptPart]:
        """Returns the item prompt, from whose tokens the item feature h(v) is read."""
        return [*self._begin(), *filled(self.templates.describe, item=self._block(row, view)), TURN, READ]

    def knowledge(self, row: int, view: View, rng: np.random.Generator) -> list[PromptPart]:
        """Returns the item prompt followed by a column that the view does not show, which the model learns to generate.

        With the text withheld it is the first text column, the title, half of the time. Where nothing is hidden it is the title.
        """
        hidden = [c for c in self.columns if not (view.text and c in self.shown) and self.catalog.text(row, c)]
        if not view.text and hidden and rng.random() < 0.5:
            hidden = hidden[:1]
        column = hidden[rng.integers(len(hidden))] if hidden else "title"
        return [*self.item(row, view), self._question(column), PromptPart("answer", self.catalog.text(row, column))]

    def _question(self, column: str) -> PromptPart:
        return PromptPart("words", self.templates.knowledge.format(column=column).strip())

    def pair(self, row: int, rng: np.random.Generator) -> tuple[View, View]:
        """Draws two views of an item for L_view; equal ones if the item has only an image or only a text."""
        image, text, full = View(True, False), View(False, True), FULL
        if not (self.has_image(row) and self.text(row)):
            return full, full
        return ((full, image), (full, image), (full, text), (full, text), (image, text))[rng.integers(5)]

    def dropped(self, row: int, text: float, image: float, rng: np.random.Generator) -> View:
        """Draws the view of an item in training: `text` and `image` are the probabilities of withholding either, if it has both."""
        draw = rng.random()
        if draw >= text + image or not (self.has_image(row) and self.text(row)):
            return FULL
        return View(True, False) if draw < text else View(False, True)

    def common(self, rows: Sequence[int] | np.ndarray) -> str:
        """Returns the intent of a session: the attribute values that most of its distinct items share; "" if there are none.

        After LLM4SBR (arXiv 2402.13840; intents as texts beside the items) and SPRINT (arXiv 2508.00570; from a closed pool, here
        the values of the catalogue's columns). Each value of a list counts on its own.
        """
        items = {int(row) for row in rows}
        values = [(c, value) for row in items for c in self.attributes for value in {*self.catalog.text(row, c).split(", ")} if value]
        shared = [pair for pair, count in Counter(values).items() if count > max(1, len(items) / 2)]
        return ", ".join(f"{c}: {value}" for c, value in sorted(shared, key=lambda pair: (self.attributes.index(pair[0]), pair[1])))

    def summary(self, earlier: str, rows: Sequence[int] | np.ndarray) -> list[PromptPart]:
        """Returns the prompt that asks for a summary of the items `rows`; `earlier` is the summary of the items before them."""
        items = [part for row in rows for part in self._block(int(row), FULL)]
        return [*self._begin(), *self._earlier(earlier), *filled(self.templates.summarise, items=items), TURN]

    def _earlier(self, summary: str) -> list[PromptPart]:
        return filled(self.templates.earlier, summary=[PromptPart("text", summary)]) if summary else []

    def session(
        self, rows: Sequence[int] | np.ndarray, views: Sequence[View] | None = None, intent: str = "", earlier: str = ""
    ) -> list[PromptPart]:
        """Returns the prompt of a session: a feature is read after every item but the last one, whose text is the answer.

        The model is causal, so one pass trains on every prefix. The intent is generated after the last feature, which must thus hold
        it without having read it, and before the answer.
        """
        shown = zip(rows[:-1], views or [FULL] * (len(rows) - 1), strict=True)
        parts = [part for row, view in shown for part in (*filled(self.templates.next, item=self._block(row, view)), READ)]
        intents = filled(self.templates.intent, intent=[PromptPart("intent", intent)]) if intent else []
        answer = PromptPart("answer", self.text(rows[-1]) or self.templates.no_text)
        return [*self._begin(), *self._earlier(earlier), *parts[:-1], TURN, READ, *intents, answer]

    def words(self) -> list[str]:
        """Returns the texts of the catalogue and of K's templates, on which the tiny backbone's tokenizer is trained."""
        texts = [self.catalog.text(row, column) for row in range(len(self)) for column in self.columns]
        t = self.templates
        wordings = [t.instruction, t.item, t.no_image, t.no_text, t.describe, t.next, *([t.similar] if self.neighbours else [])]
        templates = [part.text for part in (*(p for template in wordings for p in filled(template)), *map(self._question, self.columns))]
        return texts + templates * (len(texts) // 10 + 10)  # often enough that each word becomes one token


def filled(template: str, **parts: list[PromptPart]) -> list[PromptPart]:
    """Returns the parts of a template: its words, and `parts` in place of its placeholders."""
    prompt: list[PromptPart] = []
    for words, name, *_ in Formatter().parse(template):
        if words.strip():
            prompt.append(PromptPart("words", words.strip()))
        prompt += parts.get(name or "", [])
    return prompt
