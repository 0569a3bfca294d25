"""Opens a DuckDB database in which tables larger than memory are read, sorted and joined: one connection, configured once."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.core.errors import DATA, ENVIRONMENT, USAGE, UserError
from pipeline.core.files import remove_leftovers, temporary_folder

SPILL = ".prepare-"  # begins the name of the folder of what does not fit into memory
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SMALLEST_MEMORY = 256 * 10**6
SHARE = 0.55  # of the memory of the process; the rest is for batches on their way in and out, and for the allocator
MISSING = (
    *("NULL", "null", "Null", "nan", "NaN", "NAN", "NA", "N/A", "n/a", "<NA>", "NaT", "None", "none", r"\N", "#N/A", "(null)", "<null>"),
    "undefined",
)
LONGEST = max(map(len, MISSING))
BAD = "chr(1)"  # begins an id that is none, in SQL
BLANKS = " \t\r\n\v\f\u00a0\u2003\u3000\ufeff"


def quoted(text: str) -> str:
    """Returns a text as an SQL literal."""
    return "'" + text.replace("'", "''") + "'"


def name(column: str) -> str:
    """Returns a column's name as an SQL identifier."""
    return '"' + column.replace('"', '""') + '"'


WORDS, WIDE_BLANKS = ", ".join(map(quoted, MISSING)), ", ".join(str(ord(blank)) for blank in BLANKS if ord(blank) > 32)
BEGINS, ENDS = (f"ord({end}) > 32 and ord({end}) not in ({WIDE_BLANKS})" for end in ("x", "x[-1]"))  # faster than to trim
SPACED = r"regexp_replace(x, '([''\"])\s+([''\"])', '\1, \2', 'g')"  # ['a' 'b'], as NumPy prints it
MACROS = (
    f"bare(x) as case when {BEGINS} and {ENDS} then x else trim(x, {quoted(BLANKS)}) end",
    f"is_word(x) as coalesce(strlen(x) <= {LONGEST} and x in ({WORDS}), false)",  # of bare texts, as is the next one
    f"cell(x) as case when strlen(x) <= {LONGEST} and x in ('', {WORDS}) then null else x end",
    # 12.0 is 12, since integers with gaps are stored as numbers with a point; what such numbers have lost is marked by BAD
    rf"""plain_id(x) as case when x like '%.0%' and regexp_full_match(x, '-?\d+\.0+')
    then case when abs(try_cast(x as double)) > {2**53} then {BAD} || x else split_part(x, '.', 1) end
    when x like '%+%' and regexp_full_match(x, '-?\d(\.\d+)?[eE]\+\d+') then {BAD} || x else x end""",
    rf"""number_id(x) as case
    when x like '%.%' and regexp_full_match(x, '-?\d+\.\d*[1-9]\d*') then {BAD} || x else plain_id(x) end""",
    rf"""cell_list(x) as case
    when x like '[%' then coalesce(try_cast(try_cast(x as json) as varchar[]), try_cast({SPACED} as varchar[]))
    when contains(x, '|') then string_split(x, '|') when contains(x, ',') then string_split(x, ',')
    else string_split_regex(trim(x), '\s+') end""",
    "parts_of(x) as list_filter(list_transform(x, lambda y: cell(bare(y))), lambda y: y is not null)",
)


class Database:
    """A database of temporary tables, and the folder in which they spill."""

    def __init__(self, folder: Path, memory: int | None) -> None:
        self.folder = folder
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        config = {"autoinstall_known_extensions": False, "autoload_known_extensions": False, "allow_community_extensions": False}
        self.connection = duckdb.connect(config=config)  # type: ignore[arg-type]
        self.run(f"set temp_directory = {quoted(str(folder / 'spill'))}; set threads = {self.threads}; set TimeZone = 'UTC'")
        self.run("set python_enable_replacements = false; set enable_progress_bar = false")
        if memory is not None:
            self.run(f"set memory_limit = '{int(memory * SHARE)}B'")
        for macro in MACROS:
            self.run(f"create macro {macro}")

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Raises `UserError` (5) for a lack of memory or disk."""
        try:
            yield
        except (duckdb.OutOfMemoryException, MemoryError) as error:
            raise UserError(f"not enough memory: {_first_line(error)} ({self.folder}); give more with --memory", ENVIRONMENT) from None
        except duckdb.IOException as error:
            if re.search("No space|disk|write", str(error), re.IGNORECASE):
                raise UserError(f"cannot write: {_first_line(error)} ({self.folder}); give a folder with room", ENVIRONMENT) from None
            raise

    def run(self, sql: str) -> duckdb.DuckDBPyConnection:
        """Runs statements. Raises `UserError` for a lack of memory or disk, else the errors of DuckDB."""
        with self._room():
            return self.connection.execute(sql)

    def one(self, sql: str) -> tuple[Any, ...]:
        """Returns the first row of the result, which must have one."""
        return self.rows(sql)[0]

    def first(self, sql: str) -> tuple[Any, ...] | None:
        """Returns the first row of the result, if any."""
        return next(iter(self.rows(sql)), None)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.run(sql).fetchall()

    def count(self, source: str) -> int:
        """Returns the number of rows of what comes after FROM."""
        return int(self.one(f"select count(*) from {source}")[0])

    def batches(self, sql: str, rows: int) -> Iterator[pa.Table]:
        """Yields the result in tables of `rows` rows, the last of fewer."""
        with self._room():
            reader = self.connection.cursor().sql(sql).to_arrow_reader(rows)
            rest = reader.schema.empty_table()
            for batch in reader:  # which may be smaller
                rest = pa.concat_tables([rest, pa.Table.from_batches([batch])])
                while len(rest) >= rows:
                    yield rest[:rows]
                    rest = rest[rows:]
            if len(rest):
                yield rest


@contextmanager
def database(beside: Path, memory: str | None) -> Iterator[Database]:
    """Opens a database whose temporary files are in the nearest existing folder of `beside`, and removes them at the end."""
    limit = memory_bytes(memory)
    folder, above = [path for path in (beside.absolute(), *beside.absolute().parents, Path("/")) if path.is_dir()][:2]
    with ExitStack() as stack:
        try:
            remove_leftovers(above, SPILL)  # of a killed one that began before `folder` was there
            spill = stack.enter_context(temporary_folder(folder, SPILL))
        except OSError as error:
            reason = f"cannot write: {error.strerror or error} ({folder}); give a folder with room that you may write in"
            raise UserError(reason, ENVIRONMENT) from None
        data = Database(spill, limit)
        stack.callback(data.connection.close)
        yield data


def memory_bytes(text: str | None) -> int | None:
    """Reads `4GB` as bytes. Raises `UserError` (2)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < SMALLEST_MEMORY:
        raise UserError(f"--memory {text} (command line); give 256MB or more, such as 4GB", USAGE)
    return size


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0][:300]


def sql_error(error: object, where: str, remedy: str, code: int = DATA) -> UserError:
    """Returns an error of DuckDB as one line."""
    fault = re.sub(r"^(\w+ )?Error: ", "", re.sub(r"^[\w ]+ Error: ", "", _first_line(error)))
    return UserError(f"{fault} ({where}); {remedy}", code)
