"""`tpad recommend`: the options, and what is printed."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from pipeline.command_options import RUN, RunFolder
from pipeline.core.errors import USAGE, UserError
from pipeline.core.process import own_share
from pipeline.prepare_command import Tables, reads_tables
from pipeline.run_folder import say

if TYPE_CHECKING:
    from pipeline.data.prepare.table_options import TableOptions
    from recommender.serving.recommender import Recommender


@reads_tables
def recommend(
    session: Annotated[str | None, Option(help="item_ids, oldest first: a,b,c. Default: a session of the test split.")] = None,
    k: Annotated[int, Option("-k", min=1, help="How many items.")] = 10,
    exclude_seen: Annotated[bool, Option("--exclude-seen", help="Leave out the items of the session.")] = False,
    as_json: Annotated[bool, Option("--json", help="JSON instead of a table.")] = False,
    filter_: Annotated[list[str] | None, Option("--filter", metavar="COLUMN=VALUE", help="Only items with this value; repeatable.")] = None,
    diversify: Annotated[float, Option(help="Diversity by MMR, from 0 (relevance only) to 1 (diversity only).")] = 0.0,
    new_items: Annotated[float | None, Option(metavar="SHIFT", help="Log-odds added to cold items. Default: sbr.new_items.")] = None,
    at: Annotated[str | None, Option(metavar="TIME", help="Items available then: ISO 8601 (UTC) or Unix seconds. Default: now.")] = None,
    sessions: Annotated[list[str] | None, Option(metavar="PATH", help="A log of sessions, as `tpad prepare` reads it; repeatable.")] = None,
    out: Annotated[Path | None, Option(help="With --sessions: the Parquet file to write (session_id, item_id, rank, score).")] = None,
    vectors: Annotated[Path | None, Option(help="With --sessions: Parquet file for the sessions' vectors, of each channel.")] = None,
    engine: Annotated[str | None, Option(metavar="ray", help="With --sessions: rank on a cluster of Ray.")] = None,
    *,
    tables: Tables,
    run: RunFolder = RUN,
) -> None:
    """Answer "what next?" for one session, or for a file of them."""
    sessions = sessions or None
    if sessions is None and (option := next((name for name, value in tables.keywords.items() if value), None)):
        raise UserError(f"--{option.replace('_', '-')} has no effect without --sessions (command line); leave it out", USAGE)
    if (sessions is None) != (out is None and vectors is None) or (sessions is not None and session is not None):
        together = "--sessions FILE and --out FILE (or --vectors FILE) go together, without --session"
        raise UserError(f"{together} (command line); see `tpad recommend --help`", USAGE)
    if sessions is not None and as_json:
        raise UserError("--json is for one session (command line); a file's answers are Parquet, at --out", USAGE)
    if engine is not None and (engine != "ray" or out is None or vectors is not None or own_share()[1] > 1):
        alone = "--engine ray is for --sessions FILE --out FILE, without --vectors and without a launcher"
        raise UserError(f"{alone} (command line); see `tpad recommend --help`", USAGE)
    reading = tables()
    from recommender.serving.options import check_utf8, parse_filters, parse_time
    from recommender.serving.recommender import Recommender

    check_utf8("--session", session or "")
    moment = None if at is None else parse_time(at)
    if moment is None and engine:
        moment = int(time.time())  # the same for all workers
    ranking: dict[str, Any] = {"k": k, "exclude_seen": exclude_seen, "filters": parse_filters(filter_ or []), "diversify": diversify}
    ranking |= {"new_items": new_items, "at": moment}
    recommender = Recommender.load(run)
    if sessions is not None:
        answer_file(recommender, sessions, out, vectors, ranking, reading, run if engine else None)
    else:
        answer_session(recommender, session, ranking, as_json)


def answer_file(
    recommender: "Recommender",
    sessions: list[str],
    out: Path | None,
    vectors: Path | None,
    ranking: dict[str, Any],
    tables: "TableOptions",
    ray_run: Path | None,
) -> None:
    from recommender.serving.recommend_file import recommend_file

    number, count = own_share()
    answers = recommend_file(
        recommender, sessions, out, share=(number - 1, count), tables=tables, vectors=vectors, ray_run=ray_run, **ranking
    )
    if answers.out is not None:
        say(f"{answers.sessions} sessions, {answers.rows} rows: {answers.out}")
    if answers.vectors is not None:
        say(f"{answers.sessions} sessions, their vectors: {answers.vectors}")
    if answers.popular or answers.unknown_events:
        say(f"events of items not in the catalogue, left out: {answers.unknown_events}")
        say(f"sessions of no other items, which got the most popular ones: {answers.popular}")


def answer_session(recommender: "Recommender", session: str | None, ranking: dict[str, Any], as_json: bool) -> None:
    if session is None:
        items = recommender.samples[0]
        say("a session of the test split:")
    else:
        items = [item for part in session.split(",") if (item := part.strip())]
    if not items:
        raise UserError("--session names no item (command line); give item_ids, e.g. --session a,b,c", USAGE)
    answer = recommender.recommend(items, **ranking)
    if as_json:
        fields = {"session": items, "items": [i._asdict() for i in answer.items], "unknown": answer.unknown, "fallback": answer.fallback}
        text = json.dumps(fields, ensure_ascii=False)
        typer.echo("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text))
        return
    from recommender.serving.printed_answer import figures_line, print_items, session_lines

    say("\n".join(session_lines(recommender, items)))
    if answer.fallback:
        say("no item of this session is in the catalogue: these are the most popular ones")
    print_items(recommender, answer.items)
    if session is None:
        typer.echo(figures_line(recommender))
