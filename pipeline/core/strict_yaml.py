"""Reads and writes settings as YAML 1.2 (`ruamel.yaml`). Nothing else in the project reads YAML.

Stricter than the library: duplicate keys, anchors, tags and merge keys are errors that name the file and the line. A plain word is
null, true or false, a decimal number, or else text: `1e-3` is a number; `no`, `1_000`, `0x10` and `2020-01-01` are text.
"""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from pipeline.core.errors import USAGE, UserError
from pipeline.core.files import read_given

MAX_BYTES = 256 * 1024  # far more than any settings file needs
MAX_DEPTH = 20
Lines = dict[tuple[str, ...], int]  # key path (items of a list by number) -> line
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+)")


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def written(tree: dict[str, Any]) -> str:
    """Writes a tree as YAML that `parse` reads back equal."""
    yaml, text = _yaml(), io.StringIO()
    yaml.default_flow_style = False
    yaml.allow_unicode = False  # the library does not quote U+0085
    yaml.width = MAX_BYTES  # one line per value
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(tree, text)
    return text.getvalue()


def parse(text: str, name: str) -> tuple[Any, Lines]:
    """Reads a text; `name` says in errors where it is from. Raises `UserError` (2)."""
    lines: Lines = {}
    node = _compose(text, name)
    return None if node is None else _value(node, name, (), lines), lines


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """Reads a file of `key: value` pairs; an empty one has none. Raises `UserError` (2)."""
    try:
        data = read_given(path, MAX_BYTES)
        if len(data) > MAX_BYTES:
            raise UserError(f"settings file is larger than {MAX_BYTES // 1024} KB ({path}); is it the right file?", USAGE)
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read settings: {error.strerror or error} ({path}); give an existing YAML file", USAGE) from None
    except UnicodeDecodeError:
        raise UserError(f"settings file is not UTF-8 text ({path}); give a YAML file", USAGE) from None
    tree, lines = parse(text, str(path))
    if not isinstance(tree, dict | None):
        raise UserError(f"settings must be `key: value` pairs ({path}:1); see configs/shop.yaml", USAGE)
    return tree or {}, lines


def _compose(text: str, name: str) -> Node | None:
    """Parses a text to nodes. Checks its events first: an alias can repeat large content, and nodes are built by recursion."""
    depth = 0
    try:
        for event in _yaml().parse(text):
            spot = f"{name}:{event.start_mark.line + 1}"
            if getattr(event, "anchor", None):
                raise UserError(f"anchors and aliases are not supported ({spot}); write the value out", USAGE)
            if getattr(event, "tag", None):
                raise UserError(f"tags are not supported ({spot}); write the plain value", USAGE)
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"nested too deep ({spot}); settings have three levels", USAGE)
        node: Node | None = _yaml().compose(text)
        return node
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"not valid YAML: {problem} ({name}{f':{mark.line + 1}' if mark else ''}); fix the file", USAGE) from None


def _value(node: Node, name: str, above: tuple[str, ...], lines: Lines) -> Any:
    """Returns the value of a node, and adds the line of every key and item below it to `lines`."""
    if isinstance(node, MappingNode):
        section: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode) or key.value == "<<":
                raise UserError(f"only plain keys are supported ({name}:{line}); write the value out", USAGE)
            path = (*above, key.value)
            if key.value in section:
                raise UserError(f"key `{'.'.join(path)}` is duplicated ({name}:{line}); keep one", USAGE)
            lines[path] = line
            section[key.value] = _value(value, name, path, lines)
        return section
    if isinstance(node, SequenceNode):
        paths = [(*above, str(number)) for number in range(len(node.value))]
        lines |= {path: item.start_mark.line + 1 for path, item in zip(paths, node.value, strict=True)}
        return [_value(item, name, path, lines) for path, item in zip(paths, node.value, strict=True)]
    assert isinstance(node, ScalarNode)
    try:
        return node.value if node.style else _word(node.value)
    except ValueError:
        raise UserError(f"a number of too many digits ({name}:{node.start_mark.line + 1}); fix the value", USAGE) from None


def _word(text: str) -> Any:
    """Returns the value of a scalar without quotes. Only what the writer would quote as a text is read as a number."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if FLOAT.fullmatch(text) else text
