"""`tpad prepare`: the options, and what is printed."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from pipeline.core.errors import printable
from pipeline.run_folder import say


def prepare(
    sessions: Annotated[Path, Option(help="Log of events: session (or user) and item, with a time or a position.")],
    out: Annotated[Path, Option(help="Folder to write items.parquet and sessions.parquet to.")],
    items: Annotated[Path | None, Option(help="Catalogue: CSV, TSV, JSONL or Parquet. Default: the ids in the log.")] = None,
    images: Annotated[Path | None, Option(help="Folder of item_id.jpg (.png, .webp), or of the image column's paths.")] = None,
    column: Annotated[list[str] | None, Option(metavar="OURS=THEIRS", help="A column's name, e.g. item_id=movieId; repeatable.")] = None,
    session_gap: Annotated[float, Option(help="Minutes of pause that begin a session, where only users are named.")] = 30.0,
    min_item_count: Annotated[int, Option(help="Drop the events of items with fewer events.")] = 1,
    max_session_length: Annotated[int, Option(help="Keep the last so many events of a session; 0: all.")] = 0,
    on_bad_image: Annotated[str, Option(metavar="error|text_only", help="Stop at a broken image, or leave it out.")] = "error",
) -> None:
    """Turn your own tables and images into a data folder, and report what was read and dropped, and why."""
    columns = dict(part.partition("=")[::2] for part in column or [])
    from pipeline.data.prepare.prepare import PrepareOptions
    from pipeline.data.prepare.prepare import prepare as run_import

    options = PrepareOptions(items, sessions, out, images, session_gap, min_item_count, max_session_length, on_bad_image, columns)  # type: ignore[arg-type]
    typer.echo(printable("\n".join(run_import(options).lines())))
    command, last = ("distill", "") if items else ("train-sbr", " --set 'sbr.models=[ID-only]'")
    say(f"next: tpad {command} --data {out} --run artifacts/{out.name}{last}")
