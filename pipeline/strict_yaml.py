"""YAML as settings are written in it, read more strictly than PyYAML reads it: a key twice, anchors, tags and merge keys are
refused, `1e-3` is a number, `no` is a string. Nothing else in the project reads YAML. Errors name the file and the line.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import USAGE, UserError

MAX_BYTES = 256 * 1024  # no honest settings file is larger
MAX_DEPTH = 20  # nor deeper
Lines = dict[tuple[str, ...], int]  # of every key, below which keys it stands


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers and words as people write them."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] not in ("bool", "float", "int", "timestamp", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$"), list("-+.0123456789"))
_Loader.add_implicit_resolver(*_FLOAT)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the texts which the loader above would read as numbers."""


_Dumper.add_implicit_resolver(*_FLOAT)


def written(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def _compose(text: str, name: str) -> yaml.Node | None:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            spot = f"{name}:{event.start_mark.line + 1}" if event.start_mark else name
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(f"anchors and aliases are not supported ({spot}); write the value out", USAGE)
            if getattr(event, "tag", None):
                raise UserError(f"tags are not supported ({spot}); write the plain value", USAGE)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"nested too deep ({spot}); settings have three levels", USAGE)
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        spot = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"not valid YAML: {getattr(error, 'problem', None) or error} ({spot}); mend the file", USAGE) from None


def parse(text: str, name: str) -> Any:
    """The value of a text; `name` says in errors where it is from."""
    node = _compose(text, name)
    if node is None:
        return None
    _lines(node, name)
    return _build(node, name)


def _build(node: yaml.Node, name: str) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise UserError(
            f"not valid YAML: {getattr(error, 'problem', error)} ({name}:{node.start_mark.line + 1}); mend the file", USAGE
        ) from None
    except ValueError:
        raise UserError(f"a number of too many digits ({name}:{node.start_mark.line + 1}); mend the value", USAGE) from None
    finally:
        loader.dispose()


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """The tree of a file, and the line of every key."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"settings file is larger than {MAX_BYTES // 1024} KB ({path}); is it the right file?", USAGE)
        text = data.decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read settings: {error.strerror or error} ({path}); give an existing YAML file", USAGE) from None
    except UnicodeDecodeError:
        raise UserError(f"settings file is not UTF-8 text ({path}); give a YAML file", USAGE) from None
    node = _compose(text, str(path))
    if node is None:
        return {}, {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"settings must be `key: value` pairs ({path}:1); see configs/shop.yaml", USAGE)
    lines = _lines(node, str(path))
    return _build(node, str(path)), lines


def _lines(node: yaml.Node, name: str) -> Lines:
    """The line of every key; an error when one stands twice."""
    lines: Lines = {}
    for key, line in _keys(node, (), name):
        if key in lines:
            raise UserError(f"key `{'.'.join(key)}` stands twice ({name}:{line}); keep one", USAGE)
        lines[key] = line
    return lines


def _keys(node: yaml.Node, above: tuple[str, ...], name: str) -> Iterator[tuple[tuple[str, ...], int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise UserError(f"only plain keys are supported ({name}:{key.start_mark.line + 1}); write the value out", USAGE)
            yield (*above, key.value), key.start_mark.line + 1
            yield from _keys(value, (*above, key.value), name)
