"""Opens the log and the catalogue of a user, and finds their columns."""

from pipeline.core.errors import USAGE, UserError
from pipeline.data.prepare.column_names import EVENT_NAMES, ITEM_NAMES
from pipeline.data.prepare.columns import Columns, check_guesses, match_items
from pipeline.data.prepare.database import Database
from pipeline.data.prepare.files import find_parts
from pipeline.data.prepare.mapping import Mapping, Side, read_mapping, recognised
from pipeline.data.prepare.table_options import Paths, Report, TableOptions
from pipeline.data.prepare.tables import Source


def open_tables(
    data: Database, sessions: Paths, items: Paths | None, options: TableOptions, report: Report
) -> tuple[Columns, Columns | None]:
    """Opens both tables. Raises `UserError` (2, 3)."""
    if unknown := options.columns.keys() - ITEM_NAMES.keys() - EVENT_NAMES.keys():
        known = ", ".join(dict.fromkeys([*ITEM_NAMES, *EVENT_NAMES]))
        raise UserError(f"tpad has no column `{min(unknown)}` (--column); known: {known}", USAGE)
    if options.quotes not in (None, "cells", "letters"):
        raise UserError(f"--quotes {options.quotes} (command line); give cells or letters", USAGE)
    mapping = read_mapping(options.preset, options.mapping) if options.preset or options.mapping else None
    catalogue = None if items is None else _open(data, "items", items, options, mapping, report)
    log = _open(data, "sessions", sessions, options, mapping, report)
    sources = [columns.source for columns in (log, catalogue) if columns is not None]
    for option in ("delimiter", "names"):
        if getattr(options, option) and not any(option in part.effects for source in sources for part in source.parts):
            raise UserError(f"--{option} has no effect (command line): no file fits it; leave it out, or check its value", USAGE)
    given = options.columns.get("item_id")
    if given is not None and not any(source.has(given) for source in sources):
        raise UserError(f"--column item_id={given}: no such column ({log.source.path} has {log.source.some()}); give one of them", USAGE)
    if catalogue is not None:
        match_items(log, catalogue)
    check_guesses(log)
    return log, catalogue


def _open(data: Database, label: str, paths: Paths, options: TableOptions, mapping: Mapping | None, report: Report) -> Columns:
    side: Side = (getattr(mapping, label) if mapping else Side()).overridden(options)
    folder = data.folder / label
    folder.mkdir()
    parts = find_parts([str(path) for path in paths] if isinstance(paths, list) else [str(paths)], folder, side.encoding, report.say)
    source = Source(data, label, parts, side, {**side.columns, **options.columns}, report)
    preset = options.preset or str(options.mapping)
    if mapping is None and (found := recognised(source.names, label)) is not None:
        preset, side = found[0], found[1].overridden(options)
        source.say(f"read as the preset {preset}, by its columns")
    source.explode(side.explode)
    source.sample()
    return Columns(source, side, options.columns, preset)
