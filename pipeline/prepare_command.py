"""`tpad prepare`: the options, and what is printed."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from pipeline.core.errors import USAGE, UserError, printable
from pipeline.run_folder import say

if TYPE_CHECKING:
    from pipeline.data.prepare.table_options import TableOptions

Tables = partial["TableOptions"]


def table_options(
    column: Annotated[list[str] | None, Option(metavar="OURS=THEIRS", help="A column's name, e.g. item_id=movieId; repeatable.")] = None,
    names: Annotated[
        list[str] | None, Option(metavar="A,B,C", help="The columns in order, for files without a header; repeatable.")
    ] = None,
    encoding: Annotated[str | None, Option(help="Encoding of the text files that are not UTF-8, e.g. cp1252.")] = None,
    delimiter: Annotated[str | None, Option(help="What parts the cells of a text file. Default: seen from its first line.")] = None,
    quotes: Annotated[
        str | None, Option(metavar="cells|letters", help="Quotation marks enclose cells, or have no meaning. Default: seen.")
    ] = None,
    where: Annotated[str | None, Option(metavar="SQL", help="Only these events, by the log's own columns: \"event = 'view'\".")] = None,
    time_format: Annotated[
        str | None, Option(help="Notation of the times: seconds, ..., days, excel, or a pattern like %d/%m/%Y %H:%M.")
    ] = None,
    preset: Annotated[str | None, Option(metavar="NAME", help="Read a known data set: a file of configs/data, e.g. movielens.")] = None,
    mapping: Annotated[Path | None, Option(metavar="FILE", help="Read as this YAML file says; see configs/data.")] = None,
    memory: Annotated[str | None, Option(metavar="SIZE", help="Most memory to use, e.g. 4GB. Larger logs go through the disk.")] = None,
) -> "TableOptions":
    """Returns how the user's tables are read. Raises `UserError` (2)."""
    from pipeline.data.prepare.table_options import TableOptions

    columns = dict(part.partition("=")[::2] for part in column or [])
    lists = [[name.strip() for name in text.split(",")] for text in names or []]
    if delimiter in ("", "\\t", "tab"):
        delimiter = "\t"
    if delimiter is not None and len(delimiter) > 4:
        raise UserError(f"--delimiter {delimiter} (command line); give one to four characters, such as ';' or '::'", USAGE)
    return TableOptions(columns, encoding, delimiter, quotes, lists, where, time_format, preset, mapping, memory)


def reads_tables(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of `table_options`, in place of its parameter `tables`, which is their `partial`."""
    own, options = (inspect.signature(function).parameters for function in (command, table_options))

    @wraps(command)
    def with_options(**given: Any) -> None:
        command(**{name: given[name] for name in own if name != "tables"}, tables=partial(table_options, **{n: given[n] for n in options}))

    all_options = [option for name in own for option in (options.values() if name == "tables" else [own[name]])]
    parameters = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in all_options]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {option.name: option.annotation for option in parameters}
    return with_options


@reads_tables
def prepare(
    sessions: Annotated[list[str], Option(metavar="PATH", help="Log of events: a file, folder, pattern or address; repeatable.")],
    out: Annotated[Path, Option(help="Folder to write items.parquet and sessions.parquet to.")],
    items: Annotated[list[str] | None, Option(metavar="PATH", help="Catalogue, likewise. Default: the ids in the log.")] = None,
    images: Annotated[Path | None, Option(help="Folder of item_id.jpg (.png, ...), or of the image column's paths.")] = None,
    download_images: Annotated[bool, Option("--download-images", help="Fetch the images of a column of addresses, into --out.")] = False,
    allow_private_addresses: Annotated[bool, Option("--allow-private-addresses", help="Fetch from your own network too.")] = False,
    *,
    tables: Tables,
    session_gap: Annotated[
        float | None, Option(help="Minutes of pause that begin a session. Default: 30 where only users are named.")
    ] = None,
    min_item_count: Annotated[int, Option(help="Drop the events of items with fewer events.")] = 1,
    min_session_length: Annotated[int, Option(help="Drop sessions of fewer events.")] = 2,
    max_session_length: Annotated[int, Option(help="Keep the last so many events of a session; 0: all.")] = 0,
    collapse_repeats: Annotated[bool, Option("--collapse-repeats", help="Keep one of equal items in a row.")] = False,
    on_bad_image: Annotated[str, Option(metavar="error|text_only", help="Stop at a broken image, or leave it out.")] = "error",
    dry_run: Annotated[bool, Option("--dry-run", help="Print the first items and sessions of a sample, and write nothing.")] = False,
) -> None:
    """Turn your own tables and images into a data folder, and report what was read and dropped, and why."""
    from pipeline.data.prepare.prepare import PrepareOptions, PrepareSummary
    from pipeline.data.prepare.prepare import prepare as run_import

    options = PrepareOptions(
        items or None,
        sessions,
        out,
        images,
        session_gap,
        min_item_count,
        max_session_length,
        on_bad_image,  # type: ignore[arg-type]
        min_session_length=min_session_length,
        collapse_repeats=collapse_repeats,
        table=tables(),
        dry_run=dry_run,
        download_images=download_images,
        allow_private=allow_private_addresses,
    )
    summary = PrepareSummary()
    try:
        run_import(options, summary)
    except UserError:
        if lines := summary.read_lines():
            say("\n".join(lines))
        raise
    typer.echo(printable("\n".join(summary.lines())))
    if not dry_run:
        command, last = ("distill", "") if items else ("train-sbr", " --set 'sbr.models=[ID-only]'")
        name = out.resolve().name
        run = out.parent / (name.removesuffix("-data") if name.endswith("-data") else f"{name}-run")
        say(f"next: tpad {command} --data {out} --run {run}{last}")
