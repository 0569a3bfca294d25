"""Loads settings from a YAML file (`strict_yaml.py`) and `--set a.b=value` into the sections of `config.py`.

An unknown key, a wrong type or an out-of-range value is an error that names the file, the line and the nearest
known key. All errors of a file are reported together.
"""

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from pipeline.core.config import Config
from pipeline.core.errors import USAGE, UserError
from pipeline.core.files import read_small
from pipeline.core.section import Section
from pipeline.core.setting_paths import relative, resolved
from pipeline.core.strict_yaml import parse, read, written

SEAL = "# written by tpad; sha256 of the lines below: "
S = TypeVar("S", bound=Section)


def load_config(path: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Loads the settings of `path` (None: the defaults) with `a.b=value` overrides on top.

    Raises `UserError` (2) that lists every mistake of the file and the overrides.
    """
    tree: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    if path is not None:
        tree, lines = read(path)
        tree = resolved(tree, path.parent)
    where = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides or []:
        key, sign, text = override.partition("=")
        keys = tuple(key.strip().split("."))
        if not sign or not all(keys):
            raise UserError(f"--set {override!r} is not of the form a.b=value (command line); write e.g. sbr.epochs=5", USAGE)
        value, _ = parse(text, f"--set {override}")
        nested = reduce(lambda inner, name: {name: inner}, reversed(keys), value)
        _put(tree, keys, reduce(lambda section, name: section[name], keys, resolved(nested, Path())), override)
        above = {keys[:n]: f"--set {override}" for n in range(1, len(keys))}  # for sections that only the override names
        where = above | {k: w for k, w in where.items() if k[: len(keys)] != keys} | {keys: f"--set {override}"}
    return _validated(Config, tree, where, str(path or "settings"))


def altered(config: Config, name: str, **sections: Any) -> Config:
    """Returns a copy with other sections. Raises `UserError` (2), with the name `name`, if the sections contradict each other."""
    return _validated(Config, config.model_copy(update=sections).model_dump(), {}, name)


def load_section(model: type[S], path: Path) -> S:
    """Loads a file that holds one section. Raises `UserError` (2) that lists every mistake."""
    tree, lines = read(path)
    return _validated(model, tree, {key: f"{path}:{line}" for key, line in lines.items()}, str(path))


def _validated(model: type[S], tree: dict[str, Any], where: dict[tuple[str, ...], str], name: str) -> S:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError("; ".join(_explain(error, where, name, model)), USAGE) from None


def save_config(config: Config, path: Path, folder: Path | None = None) -> None:
    """Writes the settings as YAML, with their sha256 in the first line. `folder`: of the file that this is a temporary of."""
    text = written(relative(config.model_dump(), folder or path.parent))
    path.write_text(f"{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")


def check_seal(path: Path) -> None:
    """Refuses settings that a command has written and something has changed since. Raises `UserError` (2)."""
    with suppress(OSError, UnicodeDecodeError):  # `load_config` has the better message
        first, _, rest = read_small(path).decode("utf-8").partition("\n")
        written_by_tpad = first.startswith(SEAL) or (not rest and SEAL.startswith(first))  # the latter: cut in its first line
        if written_by_tpad and first != f"{SEAL}{hashlib.sha256(rest.encode()).hexdigest()}":
            raise UserError(f"the settings of the run were changed or damaged ({path}); restore it, or give your own as --config", USAGE)


def _put(tree: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> None:
    for key in keys[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"`{key}` holds a value, not a section (--set {override}); set the section instead", USAGE)
    tree[keys[-1]] = value


def _explain(error: ValidationError, where: dict[tuple[str, ...], str], name: str, model: type[Section]) -> Iterator[str]:
    for problem in error.errors():
        loc = tuple(str(part) for part in problem["loc"])
        spot = next((where[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in where), name)
        key = ".".join(loc)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(loc[-1], _fields(model, loc[:-1]), n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(_fields(model, loc[:-1]))}"
            yield f"unknown key `{key}` ({spot}); {hint}"
        elif not loc:  # two sections that contradict each other
            yield f"{problem['msg']} ({spot}); change one of them"
        else:
            yield f"`{key}` = {_short(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]} ({spot}); fix the value"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields(model: Any, loc: tuple[str, ...]) -> list[str]:
    for part in loc:
        annotation = model.model_fields[part].annotation
        model = next((a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Section)), None)
        if model is None:
            return []
    return list(model.model_fields)
