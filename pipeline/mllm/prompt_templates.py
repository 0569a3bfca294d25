"""Defines the wording of every prompt: templates a user can edit, in a YAML file named by `data.prompts`.

The defaults below are `configs/prompts/default.yaml`. A placeholder is written in braces, once; `{{` is a brace. The words between
placeholders are separated by one space. The published MLLM holds the templates it was trained with, and the export uses those.
"""

from pathlib import Path
from string import Formatter
from typing import Annotated

from pydantic import AfterValidator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.core.config_file import load_section
from pipeline.core.section import Section


def wording(*names: str) -> AfterValidator:
    """Returns the check that a template has exactly these placeholders, each once."""

    def check(template: str) -> str:
        try:
            used = [name + (f"!{how}" if how else "") + (f":{form}" if form else "") for name, form, how in placeholders(template)]
        except ValueError as error:  # a lone brace
            raise _wrong(f"{error}; write {{{{ or }}}} for a brace") from None
        takes = f"it takes {' and '.join(f'{{{name}}}' for name in names) or 'none'}"
        for name in used:
            if name not in names:
                raise _wrong(f"unknown placeholder {{{name}}}, {takes}")
        for name in names:
            if used.count(name) != 1:
                raise _wrong(f"placeholder {{{name}}} {'is duplicated' if name in used else 'is missing'}, {takes}")
        return template

    return AfterValidator(check)


def placeholders(template: str) -> list[tuple[str, str, str]]:
    """Returns (name, format, conversion) of every placeholder."""
    return [(name, form or "", how or "") for _, name, form, how in Formatter().parse(template) if name is not None]


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("template", "{message}", {"message": message})


class Templates(Section):
    """The wording of every prompt."""

    # An item.
    instruction: Annotated[str, wording()] = ""  # first in every prompt
    item: Annotated[str, wording("image", "text")] = "Item: {image} {text}"  # an item, wherever one is shown
    no_image: Annotated[str, wording()] = "no picture."  # in place of the image, where an item has none or it is withheld
    no_text: Annotated[str, wording()] = "no text."
    similar: Annotated[str, wording("titles")] = "Similar: {titles}"  # after an item that lacks something: titles of near ones
    describe: Annotated[str, wording("item")] = "{item} Describe it:"  # the item prompt, at whose end the item feature is read
    knowledge: Annotated[str, wording("column")] = "{column}:"  # asks for a column of the item; the answer follows
    # A session.
    next: Annotated[str, wording("item")] = "{item} Next:"  # each item of a session; at the end a next item is asked for
    intent: Annotated[str, wording("intent")] = "In common: {intent} Next item:"  # follows them; the next title follows it
    earlier: Annotated[str, wording("summary")] = "Earlier: {summary}"  # before them, what a summary says of the items before
    summarise: Annotated[str, wording("items")] = "{items} In short:"  # asks for that summary

    @model_validator(mode="after")
    def _says_something(self) -> "Templates":
        """Refuses wordings that leave an item without image and text without any token, since a feature is read at a token."""
        for name in ("describe", "next"):
            others = ("instruction", "item", "no_image", "no_text")
            if not any(words.strip() for key in (name, *others) for words, *_ in Formatter().parse(getattr(self, key))):
                raise _wrong(f"`{name}` has no words, nor have {', '.join(others)}: an item without image and text would be no prompt")
        return self


def load_templates(path: str | None) -> Templates:
    """Loads the templates of a file (None: the defaults). Raises `UserError` (2) that lists every mistake in it."""
    return Templates() if path is None else load_section(Templates, Path(path))
