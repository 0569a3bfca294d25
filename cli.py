"""The command line: parse, load the settings, call one function, print what it says.

Everything heavy is imported inside the commands, so `tpad --help` is quick. A `UserError` becomes one line on stderr
and its exit code; results go to stdout, everything else to stderr.
"""

import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import ENVIRONMENT, USAGE, UserError
from pipeline.run_folder import find_images, open_run, remember, say

if TYPE_CHECKING:
    from pipeline.core.config import Config, VariantName
    from pipeline.data.session_log import SessionLog
    from pipeline.export.export import Exported
    from recommender.serving.recommender import Item, Recommender
    from recommender.training.teacher import Teacher

RUN = Path("artifacts/shop")
ABLATION = Path("artifacts/ablation")
WIDTH = 140  # of a table that goes to a file or a pipe
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer brings its own copy of click, or uses the other, by version

app = typer.Typer(
    help="Next-item recommendation from what items are and what people move on to. "
    "distill, export-embeddings, train-sbr and recommend, in this order, run without arguments on a built-in sample shop.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="Settings (YAML). Default: those the run was last used with, else the built-in ones.")
]
DataFolder = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of items.parquet and sessions.parquet. Default: the run's; for a new run, the sample shop."),
]
RunFolder = Annotated[Path, typer.Option("--run", help="Folder of the run: everything made from one catalogue.")]
Override = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="One setting over the file's, e.g. sbr.epochs=5; repeatable.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Turns a `UserError` into its line and exit code; any other exception is a bug of ours and ends in its traceback, and 1."""
    try:
        yield
    except UserError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.code) from None


def following(command: str, run: Path) -> None:
    say(f"next: tpad {command}{f' --run {run}' if run != RUN else ''}")


def open_teacher(run: Path, item_ids: list[str], train: "SessionLog") -> "Teacher":
    from recommender.training.teacher import Teacher

    return Teacher(run, item_ids, train)


@app.command()
def distill(
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Teach a multimodal LLM the catalogue and its transitions: items + sessions -> the unified MLLM."""
    with errors(debug), open_run(config, data, run, set_, begin=True) as (settings, folder):
        from pipeline.distill.distill import distill as run_stages

        made = run_stages(settings, run, folder, fresh, open_teacher=open_teacher)
        say(f"unified MLLM: {run / 'mllm'}{'' if made else ' (up to date)'}")
        if settings.distill.refit:
            from pipeline.data.embeddings import REFIT

            made = run_stages(settings, run / REFIT, folder, fresh, open_teacher=open_teacher, everything=True)
            say(f"unified MLLM of all sessions: {run / REFIT / 'mllm'}{'' if made else ' (up to date)'}")
        following("export-embeddings", run)


@app.command()
def export_embeddings(
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    update: Annotated[bool, typer.Option("--update", help="Keep the vectors of items that have not changed.")] = False,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Only the I-th of N shares of the work, for batch schedulers; the last one to end publishes.")
    ] = "1/1",
    format_: Annotated[
        str | None, typer.Option("--format", metavar="parquet|npy", help="npy: .npy and item_ids.txt beside the Parquet (export.format).")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Image budget: pictures are scaled down to so many pixels (export.max_pixels).")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one vector per item: items + unified MLLM -> Parquet and manifest. Several processes may do it together."""
    flags = {"format": format_, "max_pixels": max_pixels}
    overrides = [*(set_ or []), *(f"export.{key}={value}" for key, value in flags.items() if value is not None)]
    with errors(debug), open_run(config, data, run, overrides) as (settings, folder):
        share = parse_shard(shard)
        from pipeline.data.embeddings import REFIT
        from pipeline.export.export import export

        exports = [export(settings, part, folder, update, share) for part in ([run, run / REFIT] if settings.distill.refit else [run])]
        for found in exports:
            tell_export(found)
        if all(found.version for found in exports):
            noted = any(found.notes for found in exports)
            following("index" if update and (run / "sbr" / "current").exists() and not noted else "train-sbr", run)


def tell_export(found: "Exported") -> None:
    from pipeline.data.embeddings import halves_of

    for note in found.notes:
        say(note)
    if (done := found.work).items:
        speed = f"{done.items} items in {done.seconds:.1f} s, {done.items / done.seconds:.1f} a second"
        say(f"{speed}; {done.padding:.1%} of the tokens padding; the model at work {done.computing / done.seconds:.0%} of the time")
    if found.version is None:
        say(f"{found.left} of {found.parts} parts are left, for the other shards or `tpad export-embeddings`")
        return
    size = f"{found.rows} items x ({' + '.join(f'{found.dim} {half}' for half in halves_of(found.version.manifest))})"
    say(f"{size}: {found.version.path}{'' if found.made else ' (up to date)'}")


def parse_shard(shard: str) -> tuple[int, int]:
    number, slash, count = shard.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard {shard!r} is not of the form i/n with 1 <= i <= n (command line); write e.g. 2/4", USAGE)
    return int(number), int(count)


@app.command()
def train_sbr(
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    search: Annotated[
        int, typer.Option(metavar="N", min=0, help="First try N settings of each model, on validation. What is found stays until --fresh.")
    ] = 0,
    update: Annotated[
        bool, typer.Option("--update", help="Go on from the published model with the new sessions, and publish if it is not worse.")
    ] = False,
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Train the session model beside its baselines: embeddings + sessions -> session model, index, table of results."""
    with errors(debug), open_run(config, data, run, set_) as (settings, folder):
        if update:
            if search or fresh:
                raise UserError("--update goes on from the published model (command line); give it without --search and --fresh", USAGE)
            from recommender.training.update import update_sbr

            updated = update_sbr(settings, run, folder)
            say(updated.told)
            say(f"session model: {updated.version.path} ({f'{updated.sessions} sessions learned' if updated.sessions else 'as it was'})")
            following("recommend", run)
            return
        from recommender.training.train import train_sbr as run_training

        found = run_training(settings, run, folder, fresh, search)
        say(f"session model: {found.version.path}{'' if found.made else ' (up to date)'}")
        following("recommend", run)


@app.command()
def index(
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build the index anew, whatever has changed or not.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Change nothing: measure the published index against exact search.")] = False,
    debug: Debug = False,
) -> None:
    """Put the trained session model over the current embeddings, with the index of `sbr.index`; nothing is trained."""
    if check:
        with errors(debug):  # without `open_run`, which would remember what was given
            if rebuild or config or data or set_:
                raise UserError("--check changes nothing (command line); give it no other option than --run", USAGE)
            from recommender.retrieval.index_tuning import check as run_check
            from recommender.serving.recommender import Recommender

            recommender = Recommender.load(run)
            for line in run_check(recommender.index, recommender.sample_rows(), recommender.version.manifest["index"]):
                typer.echo(line)
        return
    with errors(debug), open_run(config, data, run, set_) as (settings, folder):
        from recommender.training.rebuild_index import refresh

        found = refresh(run, folder, settings.sbr.index, settings.sbr.new_items, rebuild)
        changes = f"{found.added} items added, {found.removed} removed" if found.made else "up to date"
        facts = found.version.manifest["index"]
        quality = "exact" if facts["exact"] else f"recall@20 {facts['recall@20']:.4f} on {facts['sessions']} test sessions"
        say(f"session model: {found.version.path} ({changes}); index {facts['factory']}, {quality}")
        following("recommend", run)


@app.command()
def recommend(
    session: Annotated[str | None, typer.Option(help="item_ids, oldest first: a,b,c. Default: a session of the test split.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out the items of the session.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    filter_: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="COLUMN=VALUE", help="Only items with this value; repeatable: any of a column's, all columns."),
    ] = None,
    diversify: Annotated[float, typer.Option(help="Diversity by MMR, from 0 (relevance only) to 1 (diversity only).")] = 0.0,
    new_items: Annotated[
        float | None, typer.Option(metavar="SHIFT", help="Log-odds added to items without training events. Default: sbr.new_items.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(metavar="TIME", help="Only items available then: ISO 8601 (UTC) or Unix seconds. Default: now.")
    ] = None,
    sessions: Annotated[
        Path | None, typer.Option(help="A file of sessions (Parquet, CSV or JSONL: session_id, item_id, timestamp).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --sessions: the Parquet file to write (session_id, item_id, rank, score).")] = None,
    run: RunFolder = RUN,
    debug: Debug = False,
) -> None:
    """Answer "what next?" for one session, or for a file of them."""
    with errors(debug):
        if (sessions is None) != (out is None) or (sessions is not None and session is not None):
            raise UserError(
                "--sessions FILE and --out FILE go together, without --session (command line); see `tpad recommend --help`", USAGE
            )
        if sessions is not None and as_json:
            raise UserError("--json is for one session (command line); a file's answers are Parquet, at --out", USAGE)
        for option, text in [("--session", session or ""), *(("--filter", wish) for wish in filter_ or [])]:
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # how Python has bytes that are not UTF-8
                raise UserError(f"{option} {text!r} is not UTF-8 (command line); give ids and values as the catalogue has them", USAGE)
        from recommender.serving.recommender import Recommender

        moment = None if at is None else parse_time(at)
        filters: dict[str, list[str]] = {}
        for wish in filter_ or []:
            column, equals, value = wish.partition("=")
            if not equals:
                raise UserError(f"--filter {wish!r} is not of the form column=value (command line); write e.g. motif=dots", USAGE)
            filters.setdefault(column, []).append(value)
        recommender = Recommender.load(run)
        if sessions is not None and out is not None:
            from recommender.serving.recommend_file import recommend_file

            share = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
            done = recommend_file(recommender, sessions, out, k, exclude_seen, filters, diversify, new_items, moment, share)
            say(f"{done.sessions} sessions, {done.rows} rows: {done.out}")
            if done.popular or done.unknown_events:
                say(f"events of items not in the catalogue, left out: {done.unknown_events}")
                say(f"sessions of no other items, which got the most popular ones: {done.popular}")
            return
        if session is None:
            items = recommender.samples[0]
            say("a session of the test split:")
        else:
            items = [item for part in session.split(",") if (item := part.strip())]
        if not items:
            raise UserError("--session names no item (command line); give item_ids, e.g. --session a,b,c", USAGE)
        answer = recommender.recommend(items, k, exclude_seen, filters, diversify, new_items, moment)
        if as_json:
            ranked = [item._asdict() for item in answer.items]
            typer.echo(
                json.dumps({"session": items, "items": ranked, "unknown": answer.unknown, "fallback": answer.fallback}, ensure_ascii=False)
            )
            return
        for item in items:
            known = recommender.row.get(item)
            say(f"  {item}  {'not in the catalogue, ignored' if known is None else recommender.titles[known]}")
        if answer.fallback:
            say("no item of this session is in the catalogue: these are the most popular ones")
        print_items(recommender, answer.items)
        if session is None:
            results_line(recommender)


def parse_time(text: str) -> int:
    """ISO 8601, in UTC without a zone, or Unix seconds -> Unix seconds."""
    try:
        if re.fullmatch(r"[+-]?\d{1,12}", text):
            return int(text)
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise UserError(f"--at {text!r} is no time (command line); give e.g. 2026-11-30T12:00 or Unix seconds", USAGE) from None


@app.command()
def ablate(
    variants: Annotated[
        str, typer.Option(metavar="A,B,...", help="Values of distill.variant, beside full; `all` for every one of them.")
    ] = "all",
    seeds: Annotated[int, typer.Option(min=1, help="How often each variant is trained, with the seeds from `seed` on.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at a time, each in a process of its own.")] = 1,
    config: ConfigFile = None,
    data: DataFolder = None,
    run: Annotated[Path, typer.Option("--run", help="Folder of the ablation: ablation.md, .csv and .png, and all runs.")] = ABLATION,
    set_: Override = None,
    table: Annotated[bool, typer.Option("--table", help="Only the table, of runs that are there already: nothing is trained.")] = False,
    debug: Debug = False,
) -> None:
    """Train the method with one part left out at a time: what does each part give? Goes on where it was, if it was killed."""
    with errors(debug):
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("tpad ablate starts its own processes (accelerate launch); start it alone, with --jobs", USAGE)
        chosen = parse_variants(variants)
        with open_run(config, data, run, set_, begin=True) as (settings, folder):
            from recommender.experiments.ablate import ablate as run_ablation

            run_ablation(settings, run, folder, chosen, range(settings.seed, settings.seed + seeds), jobs, found_run if table else make_run)


def found_run(settings: "Config", run: Path, data: Path, siblings: Sequence[Path]) -> dict[str, float]:
    """In place of `make_run`, where the runs are there already."""
    return {}


def parse_variants(text: str) -> "list[VariantName]":
    from typing import get_args

    from pipeline.core.config import VariantName

    known: list[VariantName] = list(get_args(VariantName))
    asked = [part for word in text.split(",") if (part := word.strip())]
    for word in asked:
        if word not in [*known, "all"]:
            raise UserError(f"no variant `{word}` (--variants); known: {', '.join(known)}", USAGE)
    return known if "all" in asked else [name for name in known if name in asked]


def make_run(settings: "Config", run: Path, data: Path, siblings: Sequence[Path]) -> dict[str, float]:
    """The three steps from data to session model, for a run of an ablation; what the export cost, where it was made."""
    from pipeline.distill.distill import distill as run_stages
    from pipeline.export.export import export
    from recommender.training.train import train_sbr as run_training

    settings = settings.model_copy(update={"sbr": settings.sbr.model_copy(update={"refit": False})})  # nothing here is for use
    remember(run, data, settings)
    run_stages(settings, run, data, siblings=siblings, open_teacher=open_teacher)
    work = export(settings, run, data).work
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # a table of all runs comes at the end
        run_training(settings, run, data)
    return {"export seconds": work.seconds, "export items": float(work.items)} if work.items else {}


@app.command()
def evaluate(
    protocol: Annotated[
        str | None, typer.Option(metavar="time|user-hash|last-out|paper-max", help="How sessions are split. Default: as in the run.")
    ] = None,
    models: Annotated[str | None, typer.Option(metavar="A,B,...", help="Models and baselines. Default: every one there is.")] = None,
    windows: Annotated[
        int, typer.Option(metavar="N", min=0, help="Evaluate over N cut-off times inside the log: mean and spread of every figure.")
    ] = 0,
    seeds: Annotated[int | None, typer.Option(min=1, help="How often each model is trained (sbr.seeds).")] = None,
    against: Annotated[str | None, typer.Option(help="What the others are held against. Default: full, else ID-only.")] = None,
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    fresh: Fresh = False,
    debug: Debug = False,
) -> None:
    """Train models and baselines under one protocol, and tell what the figures are worth. Goes on where it was, if it was killed."""
    with errors(debug), open_run(config, data, run, set_) as (settings, folder):
        from recommender.experiments.evaluate import PROTOCOLS, chosen_models
        from recommender.experiments.evaluate import evaluate as run_evaluation

        protocol = protocol or settings.data.protocol
        if protocol not in PROTOCOLS:
            raise UserError(f"no protocol `{protocol}` (--protocol); known: {', '.join(PROTOCOLS)}", USAGE)
        names = None if models is None else chosen_models(models)
        if seeds is not None:
            settings = settings.model_copy(update={"sbr": settings.sbr.model_copy(update={"seeds": seeds})})
        if windows:
            if protocol != "time":
                raise UserError(f"--windows cuts the log by time (--protocol {protocol}); leave --protocol out", USAGE)
            from recommender.experiments.rolling import evaluate_windows

            version, text, left_out = evaluate_windows(settings, run, folder, windows, names, against, fresh)
        else:
            version, text, left_out = run_evaluation(settings, run, folder, protocol, names, against, fresh)
        typer.echo(text.partition("\n## Distinct")[0])
        if left_out:
            say(f"left out: {left_out}")
        say(f"evaluation: {version.path / 'report.md'}")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that requests must bring. Default: TPAD_API_KEY of the environment, else none.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes, each with the model in its memory: one makes use of little more than one core.")
    ] = 1,
    data: Annotated[Path | None, typer.Option("--data", help="Folder of items.parquet, for pictures. Default: the run's.")] = None,
    run: RunFolder = RUN,
    debug: Debug = False,
) -> None:
    """Answer over HTTP, with a page to try it at /."""
    with errors(debug), tempfile.TemporaryDirectory(prefix="tpad-metrics-") if workers > 1 else nullcontext() as shared:
        key = api_key(key_file)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # requests are what runs at once
        for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):  # read when its library is imported
            os.environ.pop(name, None)  # one of the user's may hold the figures of other processes
        if shared is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared
        try:
            from recommender.serving.server import serve as run_service
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed (tpad serve); pip install '.[faiss-cpu,serve]'", ENVIRONMENT) from None

        run_service(run, find_images(data, run), host, port, key, workers, say)


def api_key(key_file: Path | None) -> str | None:
    """From a file or the environment: a command line can be read by every user of the machine."""
    try:
        key = os.environ.get("TPAD_API_KEY") if key_file is None else key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"key not readable: {getattr(error, 'strerror', 'not text')} ({key_file}); give a file with one line", USAGE
        ) from None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and len(key) >= 16):
        where = key_file or "TPAD_API_KEY"
        raise UserError(f"not fit for a key ({where}); give one line of 16 or more ASCII characters", USAGE)
    return key


@app.command()
def prepare(
    sessions: Annotated[Path, typer.Option(help="Log of events: session (or user) and item, with a time or a position.")],
    out: Annotated[Path, typer.Option(help="Folder to write items.parquet and sessions.parquet to.")],
    items: Annotated[
        Path | None, typer.Option(help="Catalogue: CSV, TSV, JSONL or Parquet. Default: the items of the log, with nothing but their ids.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures named item_id.jpg (.png, .webp), or that the image column's paths start from.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="A column under another name, e.g. item_id=movieId; repeatable.")
    ] = None,
    session_gap: Annotated[float, typer.Option(help="Minutes of pause that begin a session, where only users are named.")] = 30.0,
    min_item_count: Annotated[int, typer.Option(help="Drop the events of items with fewer events.")] = 1,
    max_session_length: Annotated[int, typer.Option(help="Keep the last so many events of a session; 0: all.")] = 0,
    on_bad_image: Annotated[
        str, typer.Option(metavar="error|text_only", help="A picture that cannot be decoded stops the run, or is left out.")
    ] = "error",
    debug: Debug = False,
) -> None:
    """Turn your own tables and pictures into a data folder, and say what was read, dropped and why."""
    with errors(debug):
        columns = dict(part.partition("=")[::2] for part in column or [])
        from pipeline.data.prepare.prepare import PrepareOptions
        from pipeline.data.prepare.prepare import prepare as run_import

        options = PrepareOptions(items, sessions, out, images, session_gap, min_item_count, max_session_length, on_bad_image, columns)  # type: ignore[arg-type]
        for line in run_import(options).lines():
            typer.echo(line)
        command, last = ("distill", "") if items else ("train-sbr", " --set 'sbr.models=[ID-only]'")
        say(f"next: tpad {command} --data {out} --run artifacts/{out.name}{last}")


@app.command()
def report(data: DataFolder = None, run: RunFolder = RUN, debug: Debug = False) -> None:
    """Write the run's report.html: results, curves, maps of the catalogue, the index, test sessions as pictures."""
    with errors(debug):
        from recommender.report.html_report import write_report

        config = run / "config.yaml"
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        say(f"report: {write_report(run, find_images(data, run), text)}")


@app.command()
def doctor(run: RunFolder = RUN, debug: Debug = False) -> None:
    """Say what is installed, what the machine has, and what tpad will use of it and why."""
    with errors(debug):
        from rich.console import Console
        from rich.table import Table

        from recommender.doctor import examine

        found = examine(run)
        table = Table(box=None, show_header=False, pad_edge=False)
        for what, value in found.lines:
            table.add_row(what, value)
        Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH).print(table)
        if found.missing:
            raise UserError(f"something is missing (this environment); {'; '.join(found.missing)}", ENVIRONMENT)
        say("nothing is missing")


def print_items(recommender: "Recommender", items: "list[Item]") -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rank", justify="right")
    table.add_column("item_id", no_wrap=True)
    for name in ("title", "similar to", "next after"):
        table.add_column(name)
    table.add_column("score", justify="right")
    for item in items:
        reasons = ("" if item_id is None else recommender.titles[recommender.row[item_id]] for item_id in (item.similar_to, item.after))
        table.add_row(str(item.rank), *map(escape, (item.item_id, item.title, *reasons)), f"{item.score:.4f}")
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(table)


def results_line(recommender: "Recommender") -> None:
    """One line of the table that `tpad train-sbr` printed."""
    metrics = json.loads((recommender.version.path / "metrics.json").read_text(encoding="utf-8"))
    results, twin = metrics["results"], ", trained without the newest sessions" if metrics["facts"].get("refit") else ""
    names = {"full": "session model", "popularity": "popularity", "ID-only": "ID-only", "ceiling": "ceiling"}
    shown = [f"{name} {results[key]['mean']['all']['HR@10']:.3f}" for key, name in names.items() if key in results]
    typer.echo(f"HR@10 on the test sessions{twin}: {', '.join(shown)}")


def start_processes() -> None:
    """Starts the processes that `accelerate launch --cpu --num_processes N` was asked for.

    Without MPI, accelerate 1.15 starts a single one on CPUs, and does not say so; the number stands only on its command line.
    """
    if os.environ.get("ACCELERATE_USE_CPU") != "True" or "MASTER_ADDR" not in os.environ or "RANK" in os.environ:
        return
    try:
        launcher = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8").replace("=", "\0").split("\0")
        count = int(launcher[next(n for n, word in enumerate(launcher) if word in ("--num_processes", "--num-processes")) + 1])
    except (OSError, StopIteration, ValueError):
        say("note: accelerate starts one process here; for several on CPUs use `torchrun --nproc-per-node N -m -- cli ...`")
        return
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    os.execv(sys.executable, [*torchrun, "--", "cli", *sys.argv[1:]])


def main() -> None:
    """The entry point: `tpad`, and `accelerate launch -m cli`. A mistake in the command line is one line too; Ctrl-C is 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    start_processes()
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="tpad", standalone_mode=False)
    except UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        where = error.ctx.command_path if error.ctx else "tpad"  # type: ignore[attr-defined]
        typer.echo(f"error: {message[0].lower()}{message[1:]} (command line); see `{where} --help`", err=True)
        code = USAGE
    raise SystemExit(code)


if __name__ == "__main__":
    main()
