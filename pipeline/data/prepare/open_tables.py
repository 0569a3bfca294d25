"""Opens the log and the catalogue of a user, and finds their columns."""

from pipeline.core.errors import USAGE, UserError
from pipeline.data.prepare.columns import EVENT_NAMES, ITEM_NAMES, Columns, check_guesses, is_known, match_items
from pipeline.data.prepare.database import Database
from pipeline.data.prepare.files import find_parts
from pipeline.data.prepare.layouts import Reading
from pipeline.data.prepare.mapping import Mapping, Side, read_mapping, recognised
from pipeline.data.prepare.table_options import Paths, Report, TableOptions
from pipeline.data.prepare.tables import Source


def open_tables(
    data: Database, sessions: Paths, items: Paths | None, options: TableOptions, report: Report
) -> tuple[Columns, Columns | None]:
    """Opens both tables. Raises `UserError` (2, 3)."""
    unknown = options.columns.keys() - ITEM_NAMES.keys() - EVENT_NAMES.keys()
    if unknown:
        known = ", ".join(dict.fromkeys([*ITEM_NAMES, *EVENT_NAMES]))
        raise UserError(f"tpad has no column `{min(unknown)}` (--column); known: {known}", USAGE)
    if options.quotes not in (None, "cells", "letters"):
        raise UserError(f"--quotes {options.quotes} (command line); give cells or letters", USAGE)
    mapping = read_mapping(options.preset, options.mapping) if options.preset or options.mapping else None
    effects: set[str] = set()
    catalogue = None if items is None else _open(data, "items", items, options, mapping, effects, report)
    log = _open(data, "sessions", sessions, options, mapping, effects, report)
    for option in ("delimiter", "names"):
        if getattr(options, option) and option not in effects:
            raise UserError(f"--{option} has no effect (command line): no file fits it; leave it out, or check its value", USAGE)
    given = options.columns.get("item_id")
    if given is not None and not any(side.source.has(given) for side in (log, catalogue) if side is not None):
        raise UserError(f"--column item_id={given}: no such column ({log.source.path} has {log.source.some()}); give one of them", USAGE)
    if catalogue is not None:
        match_items(data, log, catalogue)
    check_guesses(data, log, options.time_format or log.side.time_format)
    return log, catalogue


def _open(
    data: Database, label: str, paths: Paths, options: TableOptions, mapping: Mapping | None, effects: set[str], report: Report
) -> Columns:
    side: Side = getattr(mapping, label) if mapping is not None else Side()
    folder = data.folder / label
    folder.mkdir()
    several = [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]
    parts = find_parts(several, folder, options.encoding or side.encoding, report.say)
    reading = Reading(
        options.delimiter or side.delimiter, [*options.names, *side.names], options.quotes or side.quotes, side.explode, effects
    )
    source = Source(data, label, parts, reading, is_known(label, {**side.columns, **options.columns}))
    preset = options.preset or (str(options.mapping) if mapping is not None else None)
    if mapping is None and (found := recognised(source.names, label)) is not None:
        preset, side = found[0], getattr(found[1], label)
        report.say(f"{source.path}: read as the preset {preset}, by its columns")
        if side.explode:
            reading.explode = side.explode
            source.explode()
    source.sample()
    return Columns(source, side, options.columns, preset, report.say)
