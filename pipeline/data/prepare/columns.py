"""Finds the columns of a foreign table: as given, as a preset says, or under their usual names if their values fit."""

import itertools

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.prepare.column_names import ROLES, candidates
from pipeline.data.prepare.mapping import Side
from pipeline.data.prepare.tables import Source
from pipeline.data.prepare.timestamps import find_clock

NOT_IDS = ("binary", "decimal", "other", "nested", "time", "boolean")
GUESS = "by name"


class Columns:
    """The columns of a source: our name -> the file's, and why."""

    def __init__(self, source: Source, side: Side, given: dict[str, str], preset: str) -> None:
        self.source, self.side = source, side
        self.columns: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self.guesses: dict[str, list[str]] = {}
        roles = ROLES[source.label]
        for role, column in given.items():
            if role not in roles:
                continue
            if source.has(column):
                self.choose(role, column, "--column")
            elif role != "item_id" or not candidates(source.names, source.label, role):  # item_id is in both files
                raise UserError(f"--column {role}={column}: no such column ({source.path} has {source.some()}); give one of them", USAGE)
        for role, column in side.columns.items():
            if role not in self.columns and source.has(column):
                self.choose(role, column, f"preset {preset}")
        for role in roles:
            if role not in self.columns and role != "history":  # a list of items is never a guess
                self.guesses[role] = self.free(candidates(source.names, source.label, role))
                if self.guesses[role]:
                    self.choose(role, self.guesses[role][0], GUESS)

    def free(self, columns: list[str]) -> list[str]:
        """Returns those of `columns` that are none of ours yet."""
        return [column for column in columns if column not in self.columns.values()]

    def choose(self, role: str, column: str, why: str) -> None:
        self.columns[role], self.why[role] = column, why

    def get(self, role: str) -> str | None:
        return self.columns.get(role)

    def guessed(self, role: str) -> bool:
        """Returns whether a column is one of another name than ours, which nobody gave: a value that does not fit is then no error."""
        return self.why[role] == GUESS and self.columns[role] != role

    def drop(self, role: str, why: str) -> None:
        """Drops a guess that does not fit, and tries the next one."""
        self.source.say(f"`{self.columns[role]}` is not read as {role}: {why}")
        self.guesses[role] = self.free(self.guesses.get(role, []))
        del self.columns[role]
        if self.guesses[role]:
            self.choose(role, self.guesses[role][0], GUESS)

    def need(self, role: str) -> str:
        """Returns the file's name of our column. Raises `UserError` (3) if the file lacks it."""
        if role not in self.columns:
            fault = f"column `{role}` is missing ({self.source.path} has {self.source.some()})"
            raise UserError(f"{fault}; name it with --column {role}=NAME{self.headless}", DATA)
        return self.columns[role]

    @property
    def headless(self) -> str:
        """What to try where the first line is no header."""
        return ", or all columns in order with --names if the first line is no header" if self.source.kind == "csv" else ""

    def describe(self) -> None:
        """Says which columns are read under other names, and which are not read."""
        text = f"{self.source.rows:,} rows"
        for ours, theirs in self.columns.items():
            if ours != theirs:
                text += f", `{theirs}` as {ours}" + (f" ({self.why[ours]})" if self.why[ours] not in (GUESS, "--column") else "")
        used = {column.partition("/")[0] for column in self.columns.values()}
        unused = [f"`{name}`" for name in self.source.names if name not in used]
        if unused and self.source.label == "sessions":
            text += f"; not used: {', '.join(unused[:20])}{' ...' if len(unused) > 20 else ''}"
        self.source.say(text)


def check_guesses(log: Columns) -> None:
    """Drops guessed columns of a log whose values do not fit, and takes the finest of several times."""
    for role in ("position", "user_id", "session_id"):
        while log.get(role) and (role == "user_id" or log.guessed(role)) and (why := _misfit(log, role)):
            if role == "user_id":
                log.source.say(f"users left out: `{log.columns[role]}`: {why}")
            log.drop(role, why)
    if log.why.get("timestamp") == GUESS:
        _take_finest_time(log)


def _misfit(log: Columns, role: str) -> str:
    """Returns why the sample of a column does not fit, or an empty text."""
    source, column = log.source, log.columns[role]
    x, kind = f"cell({source.ref(column)})", source.kinds.get(column)
    if kind in NOT_IDS:
        return f"its type is {kind}"
    sample = f"from {source.label}_sample"
    if role == "position":
        count, numbers, total = source.data.one(f"select count({x}), count(try_cast({x} as double)), count(*) {sample}")
        return "its values are no numbers" if numbers < count else "it is mostly empty" if count * 2 < total else ""
    if role == "user_id" and (kind == "float" or source.kind == "json"):
        fraction = source.data.one(f"select min({x}) {sample} where regexp_full_match({x}, '-?\\d+\\.\\d*[1-9]\\d*')")[0]
        return "" if fraction is None else f"{fraction} is not an id"
    return ""


def _take_finest_time(log: Columns) -> None:
    source, first = log.source, log.columns["timestamp"]
    best: dict[bool, str] = {}  # whether the times are days -> the first such column
    for column in [first, *log.free(log.guesses["timestamp"])]:
        try:
            days = find_clock(source, column, log.side.time_format).days
        except UserError:
            if column == "timestamp":
                raise
            continue
        filled = f"{source.label}_sample where cell({source.ref(column)}) is not null"
        if column == "timestamp" or source.data.first(f"select 1 from {filled} limit 1"):
            best.setdefault(days, column)
    finest = best.get(False, best.get(True))
    if finest is None:
        log.guesses["timestamp"] = []
        log.drop("timestamp", "its values are no times")
    elif finest != first:
        source.say(f"`{finest}` is read as timestamp, it is finer than `{first}`")
        log.choose("timestamp", finest, "the finer time")


def match_items(log: Columns, items: Columns) -> None:
    """Of several columns that may hold the ids, takes those of which most events find their item, in the samples."""
    mine, theirs = (columns.guesses.get("item_id", [columns.columns.get("item_id", "")]) for columns in (log, items))
    shares: dict[tuple[str, str], float] = {}
    for pair in itertools.product(mine, theirs) if len(mine) * len(theirs) > 1 else ():
        sides = list(zip((log, items), pair, strict=True))
        if not any(columns.source.kinds.get(column) in NOT_IDS for columns, column in sides):
            event, item = (f"plain_id(cell({columns.source.ref(column)}))" for columns, column in sides)
            found = f"select avg(({event} in (select {item} from items_sample))::int) from sessions_sample"
            shares[pair] = log.source.data.one(found)[0] or 0.0
    best = max(shares, key=lambda pair: shares[pair], default=None)
    if best is not None and shares[best]:
        for columns, column in zip((log, items), best, strict=True):
            if columns.columns["item_id"] != column:
                columns.source.say(f"`{column}` is read as item_id, since its ids are those of the other file")
                columns.choose("item_id", column, "its ids are those of the other file")
