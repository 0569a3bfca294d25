"""Makes settings that name files independent of the folder in which a command is started.

A relative path in a settings file is relative to the folder of that file, one of `--set` to the working folder. In memory they are
absolute. A run remembers them relative to itself, so that the run and its files can be moved together.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATHS = (("data", "prompts"), ("data", "neighbours", "run"), ("backbone", "path"), ("distill", "transfer", "teacher"))
BACKBONE = ("backbone", "name")  # a path only where there is such a folder; otherwise a name on the hub


def resolved(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the settings with absolute paths, for relative ones in a file in `folder`."""

    def absolute(text: str) -> str:
        return os.path.normpath(Path(folder).resolve() / text)

    tree = _changed(tree, PATHS, absolute)
    return _changed(tree, (BACKBONE,), lambda name: absolute(name) if Path(folder, name).is_dir() else name)


def relative(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the settings with absolute paths made relative to `folder`."""
    return _changed(tree, (*PATHS, BACKBONE), lambda text: os.path.relpath(text, folder.resolve()) if os.path.isabs(text) else text)


def _changed(tree: dict[str, Any], keys: tuple[tuple[str, ...], ...], change: Callable[[str], str]) -> dict[str, Any]:
    for first, *rest in keys:
        if first in tree:
            value = tree[first]
            if rest and isinstance(value, dict):
                value = _changed(value, (tuple(rest),), change)
            elif not rest and isinstance(value, str) and value and "\0" not in value:
                value = change(value)
            tree = tree | {first: value}
    return tree
