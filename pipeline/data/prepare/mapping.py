"""Reads a mapping: how the files of a data set become items and sessions. The presets in `configs/data/` are mappings."""

import sysconfig
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.core import strict_yaml
from pipeline.core.errors import USAGE, UserError
from pipeline.data.prepare.table_options import TableOptions

FOLDERS = (Path(__file__).parents[3] / "configs" / "data", Path(sysconfig.get_path("data")) / "share" / "tpad" / "configs" / "data")


def _several(value: object) -> object:
    return [value] if isinstance(value, list) and value and isinstance(value[0], str) else value


class Side(BaseModel):
    """How one of the two tables is read; every part is optional."""

    model_config = ConfigDict(extra="forbid")
    recognise: list[str] = []  # columns by which the data set is recognised
    columns: dict[str, str] = {}  # our column -> the file's; `images/0/large` is a value inside a nested column
    names: Annotated[list[list[str]], BeforeValidator(_several)] = []  # of the columns of files without a header
    delimiter: str | None = None
    quotes: Literal["cells", "letters"] | None = None  # quotation marks enclose cells, or have no meaning
    encoding: str | None = None  # of files that are not UTF-8
    explode: str | None = None  # a column with a JSON list of events
    time_format: str | None = None
    where: str | None = None  # SQL over the columns of the log

    def overridden(self, options: TableOptions) -> "Side":
        """Returns the side with what the user's options say instead; columns apart, which are checked one by one."""
        single = {key: getattr(options, key) or getattr(self, key) for key in ("delimiter", "quotes", "encoding", "time_format", "where")}
        return self.model_copy(update={**single, "names": [*options.names, *self.names]})


class Mapping(BaseModel):
    """A data set's files."""

    model_config = ConfigDict(extra="forbid")
    about: str = ""
    sessions: Side = Field(default_factory=Side)
    items: Side = Field(default_factory=Side)


def presets() -> dict[str, Path]:
    """Returns name -> file of every preset."""
    return {path.stem: path for folder in reversed(FOLDERS) if folder.is_dir() for path in sorted(folder.glob("*.yaml"))}


def read_mapping(preset: str | None, file: Path | None) -> Mapping:
    """Reads a preset by name, or a mapping by its path. Raises `UserError` (2)."""
    if preset is not None and file is not None:
        raise UserError("--preset and --mapping (command line); give one of them", USAGE)
    known = presets()
    path = file or known.get(str(preset))
    if path is None:
        raise UserError(f"no preset {preset!r} (--preset); known: {', '.join(known) or 'none'}", USAGE)
    tree, lines = strict_yaml.read(path)
    try:
        return Mapping.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        key = tuple(str(part) for part in fault["loc"])
        line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), 1)
        raise UserError(f"{'.'.join(key)}: {fault['msg'].lower()} ({path}:{line}); see the presets in configs/data", USAGE) from None


@cache
def _known() -> dict[str, Mapping]:
    return {preset: read_mapping(preset, None) for preset in presets()}


def recognised(names: list[str], label: str) -> tuple[str, Side] | None:
    """Returns the preset whose columns a file of sessions or items has; of several, that with the most."""
    sides = {preset: getattr(mapping, label) for preset, mapping in _known().items()}
    fitting = [preset for preset, side in sides.items() if side.recognise and set(side.recognise) <= set(names)]
    best = max(fitting, key=lambda preset: len(sides[preset].recognise), default=None)
    return None if best is None else (best, sides[best])
