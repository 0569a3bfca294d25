"""Finds the columns of a foreign table: as given, as a preset says, or under their usual names if their values fit."""

import re
from collections.abc import Callable

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.prepare.database import Database
from pipeline.data.prepare.mapping import Side
from pipeline.data.prepare.tables import Source
from pipeline.data.prepare.timestamps import find_clock

ITEM_NAMES = {  # our column -> other names for it, in lower-case letters and digits only, the likeliest first
    "item_id": "itemid movieid productid articleid parentasin asin sku productsku newsid bookid goodsid trackid videoid item product id",
    "title": "title name itemname productname producttitle itemtitle movietitle productdisplayname prodname headline",
    "description": "description desc productdescription itemdescription detaildesc plot overview abstract",
    "image": "image img picture photo poster imagepath imagefile imagebytes",
    "image_url": "imageurl imgurl imgurls pictureurl photourl posterurl imagelink",
    "available_from": "availablefrom",
    "available_until": "availableuntil",
}
EVENT_NAMES = {
    "session_id": "sessionid session usersession gasessionid sid visitid",
    "user_id": "userid user visitorid visitor customer client userpseudoid fullvisitorid customerid memberid reviewerid clientid uid",
    "item_id": ITEM_NAMES["item_id"].removesuffix(" id"),
    "timestamp": "timestamp eventtimestamp time ts datetime eventtime unixtime unixreviewtime createdat eventdate date tdat",
    "position": "position pos step sequence order timeframe",
    "history": "",
}
ROLES = {"sessions": EVENT_NAMES, "items": ITEM_NAMES}
NOT_IDS = ("binary", "decimal", "other", "nested", "time", "boolean")


def bare(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def candidates(names: list[str], role: str, others: str) -> list[str]:
    """Returns the columns that may be `role`, the likeliest first: of the same name, else of another known name."""
    by_name: dict[str, str] = {}
    for name in names:
        by_name.setdefault(bare(name), name)
    same = [role] if role in names else []
    return same + [by_name[other] for other in others.split() if other in by_name and by_name[other] not in same]


def is_known(label: str, given: dict[str, str]) -> Callable[[list[str]], bool]:
    """Returns a test of whether a header names what `sessions` or `items` need."""

    def known(names: list[str]) -> bool:
        def has(role: str) -> bool:
            return given.get(role, "").partition("/")[0] in names or bool(candidates(names, role, ROLES[label][role]))

        if label == "items":
            return has("item_id")
        return (has("item_id") or has("history")) or (has("session_id") and has("timestamp"))

    return known


class Columns:
    """The columns of a source: our name -> the file's, and why."""

    def __init__(self, source: Source, side: Side, given: dict[str, str], preset: str | None, say: Callable[[str], None]) -> None:
        self.source, self.say = source, say
        self.roles = ROLES[source.label]
        self.given = {role: column for role, column in given.items() if role in self.roles}
        self.columns: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self.side = side
        self.fixed: set[str] = set()  # given, by the preset or of our own name: a value that does not fit is an error
        for role, column in self.given.items():
            if source.has(column):
                self._set(role, column, "--column", fixed=True)
            elif role != "item_id" or not candidates(source.names, role, self.roles[role]):  # item_id is in both files
                raise UserError(f"--column {role}={column}: no such column ({source.path} has {source.some()}); give one of them", USAGE)
        for role, column in side.columns.items():
            if role not in self.columns and source.has(column):
                self._set(role, column, f"preset {preset}" if preset else "mapping", fixed=True)
        self.guesses: dict[str, list[str]] = {}
        for role, others in self.roles.items():
            if role not in self.columns and role != "history":  # a list of items is never a guess
                free = [one for one in candidates(source.names, role, others) if one not in self.columns.values()]
                self.guesses[role] = free
                if free:
                    self._set(role, free[0], "by name", fixed=free[0] == role)

    def _set(self, role: str, column: str, why: str, fixed: bool = False) -> None:
        self.columns[role], self.why[role] = column, why
        self.fixed.discard(role)
        if fixed:
            self.fixed.add(role)

    def get(self, role: str) -> str | None:
        return self.columns.get(role)

    def drop(self, role: str, why: str) -> None:
        """Drops a guess that does not fit, and tries the next one."""
        column = self.columns.pop(role)
        self.say(f"{self.source.path}: `{column}` is not read as {role}: {why}")
        rest = [one for one in self.guesses.get(role, []) if one not in (column, *self.columns.values())]
        self.guesses[role] = rest
        if rest:
            self._set(role, rest[0], "by name")

    def choose(self, role: str, column: str, why: str) -> None:
        """Prefers another of the guesses."""
        if self.columns.get(role) != column:
            self._set(role, column, why)

    def need(self, role: str) -> str:
        """Returns the file's name of our column. Raises `UserError` (3) if the file lacks it."""
        if role not in self.columns:
            source = self.source
            fault = f"column `{role}` is missing ({source.path} has {source.some()})"
            raise UserError(f"{fault}; name it with --column {role}=NAME{self.headless}", DATA)
        return self.columns[role]

    @property
    def headless(self) -> str:
        """What to try where the first line is no header."""
        return ", or all columns in order with --names if the first line is no header" if self.source.kind == "csv" else ""

    def describe(self) -> None:
        """Says which columns are read under other names, and which are not read."""
        renamed = [
            f"`{theirs}` as {ours}" + (f" ({self.why[ours]})" if self.why[ours] not in ("by name", "--column") else "")
            for ours, theirs in self.columns.items()
            if ours != theirs
        ]
        used = {column.partition("/")[0] for column in self.columns.values()} | {self.source.reading.explode}
        unused = [f"`{name}`" for name in self.source.names if name not in used]
        text = f"{self.source.path}: {self.source.rows:,} rows" + "".join(f", {one}" for one in renamed)
        if unused and self.source.label == "sessions":
            text += f"; not used: {', '.join(unused[:20])}{' ...' if len(unused) > 20 else ''}"
        self.say(text)


def check_guesses(data: Database, columns: Columns, time_format: str | None) -> None:
    """Drops guessed columns whose values do not fit, and takes the finest of several times."""
    source = columns.source
    for role in ("position", "user_id", "session_id"):
        while (column := columns.get(role)) is not None and (role not in columns.fixed or role == "user_id"):
            if source.kinds.get(column) in NOT_IDS:
                why = f"its type is {source.kinds[column]}"
            elif role == "position":
                x = source.sampled(column)
                count, numbers, total = data.one(
                    f"select count(cell({x})), count(try_cast(cell({x}) as double)), count(*) from {source.label}_sample"
                )
                why = "its values are no numbers" if numbers < count else "it is mostly empty" if count * 2 < total else ""
            elif role == "user_id":
                x = f"cell({source.sampled(column)})"
                fraction = source.kinds.get(column) == "float"
                odd = (
                    data.one(f"select min({x}) from {source.label}_sample where regexp_full_match({x}, '-?\\d+\\.\\d*[1-9]\\d*')")[0]
                    if fraction or source.kind == "json"
                    else None
                )
                why = f"{odd} is not an id" if odd is not None else ""
            else:
                why = ""
            if not why:
                break
            if role == "user_id":
                columns.say(f"{source.path}: users left out: `{column}`: {why}")
            columns.fixed.discard(role)
            columns.drop(role, why)
    best: tuple[bool, str] | None = None
    if columns.get("timestamp") and columns.why["timestamp"] == "by name":
        for column in [columns.columns["timestamp"], *columns.guesses.get("timestamp", [])]:
            if best is not None and column in columns.columns.values():
                continue
            try:
                clock = find_clock(data, source, column, time_format)
            except UserError:
                if column == "timestamp":
                    raise
                continue
            sql = f"select count(*) filter (cell({source.sampled(column)}) is not null) from {source.label}_sample"
            if not data.one(sql)[0] and column != "timestamp":
                continue
            if best is None or (best[0] and not clock.days):
                best = clock.days, column
        if best is None:
            columns.drop("timestamp", "its values are no times")
            columns.columns.pop("timestamp", None)
        elif best[1] != columns.columns["timestamp"]:
            columns.say(f"{source.path}: `{best[1]}` is read as timestamp, it is finer than `{columns.columns['timestamp']}`")
            columns.choose("timestamp", best[1], "the finer time")


def match_items(data: Database, log: Columns, items: Columns) -> None:
    """Of several columns that may hold the ids, takes those of which most events find their item, in the samples."""
    logs = [log.need("item_id")] if log.get("item_id") and log.why["item_id"] != "by name" else log.guesses.get("item_id", [])
    catalogues = [items.need("item_id")] if items.get("item_id") and items.why["item_id"] != "by name" else items.guesses.get("item_id", [])
    if len(logs) * len(catalogues) < 2:
        return
    best, pair = 0.0, None
    for mine in logs:
        for theirs in catalogues:
            if log.source.kinds.get(mine) in NOT_IDS or items.source.kinds.get(theirs) in NOT_IDS:
                continue
            event, item = f"plain_id(cell({log.source.sampled(mine)}))", f"plain_id(cell({items.source.sampled(theirs)}))"
            sql = f"select avg(({event} in (select {item} from items_sample))::int) from sessions_sample"
            share = data.one(sql)[0] or 0.0
            if share > best:
                best, pair = share, (mine, theirs)
    if pair is not None:
        for columns, column in zip((log, items), pair, strict=True):
            if columns.columns["item_id"] != column:
                columns.say(f"{columns.source.path}: `{column}` is read as item_id, since its ids are those of the other file")
                columns.choose("item_id", column, "its ids are those of the other file")
