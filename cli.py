"""The command line: each command parses its options, loads the settings, calls one function and prints the result.

The only file where both halves, `pipeline` and `recommender`, meet. Everything heavy is imported inside the commands, so `tpad --help` is
quick. A `UserError` becomes one line on stderr and its exit code; results go to stdout, everything else to stderr.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer import Option
from typer.core import TyperGroup

from pipeline.command_options import RUN, ConfigFile, DataFolder, Fresh, Override, RunFolder, following
from pipeline.core.errors import ENVIRONMENT, USAGE, UserError, note, printable
from pipeline.core.process import join_cpu_processes
from pipeline.export_command import export_embeddings, export_model
from pipeline.prepare_command import prepare
from pipeline.run_folder import find_images, open_run, remember, say
from recommender.recommend_command import recommend

if TYPE_CHECKING:
    from pipeline.core.config import Config
    from pipeline.core.distill_config import VariantName
    from pipeline.data.session_log import SessionLog
    from recommender.training.teacher import Teacher

ABLATION = Path("artifacts/ablation")
DEBUG = "--debug"
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # typer brings its own copy of click, or uses the other, by version


class Commands(TyperGroup):
    """Handles `--debug` and `UserError` once, for all commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes `--debug` out of the command line, before or after the command."""
        ctx.meta[DEBUG] = DEBUG in args
        return super().parse_args(ctx, [word for word in args if word != DEBUG])

    def invoke(self, ctx: Any) -> Any:
        """Turns a `UserError`, and an error of disk or memory, into its line and exit code. Any other one is a bug, with its traceback."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head`
            drop_stdout()
            raise SystemExit(128 + signal.SIGPIPE) from None
        except Exception as error:
            line = error if isinstance(error, UserError) else self._environment_error(error)
            if line is None:
                raise
            if ctx.meta[DEBUG]:
                note(traceback.format_exc())
            note(f"error: {line}")
            raise SystemExit(line.code) from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Lists the commands with all of their first lines, which click would cut to one line of the terminal."""
        commands = [(name, self.commands[name].get_short_help_str(limit=1000)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(commands)

    def _environment_error(self, error: Exception) -> UserError | None:
        from pipeline.core.files import environment_error

        return environment_error(error, Path())


app = typer.Typer(
    cls=Commands,
    help="Next-item recommendation from what items are and what people move on to. "
    "distill, export-embeddings, train-sbr and recommend, in this order, run without arguments on a built-in sample shop. "
    "--debug, before or after the command, shows the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def open_teacher(run: Path, item_ids: list[str], train: "SessionLog") -> "Teacher":
    from recommender.training.teacher import Teacher

    return Teacher(run, item_ids, train)


@app.command()
def distill(config: ConfigFile = None, data: DataFolder = None, run: RunFolder = RUN, set_: Override = None, fresh: Fresh = False) -> None:
    """Teach a multimodal LLM the catalogue and its transitions: items + sessions -> the unified MLLM."""
    with open_run(config, data, run, set_, begin=True) as (settings, folder):
        from pipeline.distill.distill import distill as run_stages

        trained = run_stages(settings, run, folder, fresh, open_teacher=open_teacher)
        say(f"unified MLLM: {run / 'mllm'}{'' if trained else ' (up to date)'}")
        if settings.distill.refit:
            from pipeline.data.embeddings import REFIT

            trained = run_stages(settings, run / REFIT, folder, fresh, open_teacher=open_teacher, everything=True)
            say(f"unified MLLM of all sessions: {run / REFIT / 'mllm'}{'' if trained else ' (up to date)'}")
        following("export-embeddings", run)


app.command()(export_embeddings)
app.command()(export_model)


@app.command()
def train_sbr(
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    search: Annotated[int, Option(metavar="N", min=0, help="First try N settings per model, on validation; kept until --fresh.")] = 0,
    search_minutes: Annotated[float | None, Option(min=0.0, help="Time for each model's search, at most. Default: no limit.")] = None,
    update: Annotated[bool, Option("--update", help="Train the published model on the new sessions; publish if not worse.")] = False,
    fresh: Fresh = False,
) -> None:
    """Train the session model beside its baselines: embeddings + sessions -> session model, index, table of results."""
    with open_run(config, data, run, set_) as (settings, folder):
        if search_minutes is not None and not search:
            raise UserError("--search-minutes limits a search (command line); give it with --search", USAGE)
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

        trained = run_training(settings, run, folder, fresh, search, search_minutes)
        say(f"session model: {trained.version.path}{'' if trained.made else ' (up to date)'}")
        following("recommend", run)


@app.command()
def index(
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    rebuild: Annotated[bool, Option("--rebuild", help="Build the index anew, whatever has changed or not.")] = False,
    check: Annotated[bool, Option("--check", help="Change nothing: measure the published index against exact search.")] = False,
) -> None:
    """Put the trained session model over the current embeddings, with the index of `sbr.index`; nothing is trained."""
    if check:
        if rebuild or config or data or set_:
            raise UserError("--check changes nothing (command line); give it no other option than --run", USAGE)
        from recommender.retrieval.index_tuning import check as run_check
        from recommender.serving.recommender import Recommender

        recommender = Recommender.load(run)
        for line in run_check(recommender.index, recommender.sample_rows(), recommender.version.manifest["index"]):
            typer.echo(printable(line))
        return
    with open_run(config, data, run, set_) as (settings, folder):
        from recommender.training.rebuild_index import refresh

        indexed = refresh(run, folder, settings.sbr.index, settings.sbr.new_items, rebuild)
        changes = f"{indexed.added} items added, {indexed.removed} removed" if indexed.made else "up to date"
        facts = indexed.version.manifest["index"]
        quality = "exact" if facts["exact"] else f"recall@20 {facts['recall@20']:.4f} on {facts['sessions']} test sessions"
        say(f"session model: {indexed.version.path} ({changes}); index {facts['factory']}, {quality}")
        following("recommend", run)


app.command()(recommend)


@app.command()
def ablate(
    variants: Annotated[str, Option(metavar="A,B,...", help="Values of distill.variant, beside full, or `all`.")] = "all",
    seeds: Annotated[int, Option(min=1, help="How often each variant is trained, with the seeds from `seed` on.")] = 1,
    jobs: Annotated[int, Option(min=1, help="How many runs at a time, each in a process of its own.")] = 1,
    config: ConfigFile = None,
    data: DataFolder = None,
    run: Annotated[Path, Option("--run", help="Folder of the ablation: ablation.md, .csv and .png, and all runs.")] = ABLATION,
    set_: Override = None,
    table: Annotated[bool, Option("--table", help="Only the table, of finished runs: nothing is trained.")] = False,
) -> None:
    """Train the method with one part left out at a time, and compare. Resumes after a kill."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("tpad ablate starts its own processes (accelerate launch); start it alone, with --jobs", USAGE)
    chosen = parse_variants(variants)
    with open_run(config, data, run, set_, begin=True) as (settings, folder):
        from recommender.experiments.ablate import ablate as run_ablation

        run_ablation(settings, run, folder, chosen, range(settings.seed, settings.seed + seeds), jobs, finished_run if table else make_run)


def finished_run(settings: "Config", run: Path, data: Path, siblings: Sequence[Path]) -> dict[str, float]:
    """Stands in for `make_run` where only the table is wanted: nothing is run."""
    return {}


def parse_variants(text: str) -> "list[VariantName]":
    from pipeline.core.distill_config import VariantName

    known: list[VariantName] = list(get_args(VariantName))
    asked = [part for word in text.split(",") if (part := word.strip())]
    for word in asked:
        if word not in [*known, "all"]:
            raise UserError(f"no variant `{word}` (--variants); known: {', '.join(known)}", USAGE)
    return known if "all" in asked else [name for name in known if name in asked]


def make_run(settings: "Config", run: Path, data: Path, siblings: Sequence[Path]) -> dict[str, float]:
    """Distils, exports and trains one run of an ablation. Returns the cost of its export; nothing if that was up to date."""
    from pipeline.distill.distill import distill as run_stages
    from pipeline.export.export import export
    from recommender.training.train import train_sbr as run_training

    settings = settings.model_copy(update={"sbr": settings.sbr.model_copy(update={"refit": False})})  # for its figures only
    remember(run, data, settings)
    run_stages(settings, run, data, siblings=siblings, open_teacher=open_teacher)
    work = export(settings, run, data).work
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # a table of all runs comes at the end
        run_training(settings, run, data)
    return {"export seconds": work.seconds, "export items": float(work.items)} if work.items else {}


@app.command()
def evaluate(
    protocol: Annotated[
        str | None,
        Option(metavar="NAME", help="The split: time, user-hash, cold-items, last-out or paper-max. Default: data.protocol."),
    ] = None,
    models: Annotated[str | None, Option(metavar="A,B,...", help="Models and baselines. Default: all of them.")] = None,
    windows: Annotated[int, Option(metavar="N", min=0, help="Evaluate at N cut-off times in the log: mean and spread.")] = 0,
    seeds: Annotated[int | None, Option(min=1, help="How often each model is trained (sbr.seeds).")] = None,
    against: Annotated[str | None, Option(help="The model that the others are compared with. Default: full, else ID-only.")] = None,
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    fresh: Fresh = False,
) -> None:
    """Train models and baselines under one protocol, and compare them with intervals. Resumes after a kill."""
    with open_run(config, data, run, set_) as (settings, folder):
        from recommender.experiments import evaluate as evaluation

        protocol = protocol or settings.data.protocol
        if protocol not in evaluation.PROTOCOLS:
            raise UserError(f"no protocol `{protocol}` (--protocol); known: {', '.join(evaluation.PROTOCOLS)}", USAGE)
        names = None if models is None else evaluation.chosen_models(models)
        if seeds is not None:
            settings = settings.model_copy(update={"sbr": settings.sbr.model_copy(update={"seeds": seeds})})
        if windows:
            if protocol != "time":
                raise UserError(f"--windows cuts the log by time (--protocol {protocol}); leave --protocol out", USAGE)
            from recommender.experiments.rolling import evaluate_windows

            version, text, left_out = evaluate_windows(settings, run, folder, windows, names, against, fresh)
        else:
            version, text, left_out = evaluation.evaluate(settings, run, folder, protocol, names, against, fresh)
        typer.echo(printable(text.partition("\n## Distinct")[0]))
        if left_out:
            say(f"left out: {left_out}")
        say(f"evaluation: {version.path / 'report.md'}")


@app.command()
def serve(
    host: Annotated[str, Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0: any that is free.")] = 8000,
    key_file: Annotated[Path | None, Option(help="File with the API key of the service. Default: TPAD_API_KEY, else no key.")] = None,
    allowed_host: Annotated[list[str] | None, Option(metavar="NAME", help="Answer to this name only; repeatable. Default: any.")] = None,
    workers: Annotated[int, Option(min=1, max=64, help="Processes, each with the model in memory; one uses about one core.")] = 1,
    data: Annotated[Path | None, Option("--data", help="Folder of items.parquet, for images. Default: the run's.")] = None,
    run: RunFolder = RUN,
) -> None:
    """Answer over HTTP, with a page to try it at /."""
    from pipeline.core.files import temporary_folder
    from recommender.serving.options import api_key

    key = api_key(key_file)
    find_data = partial(find_images, data, run)
    find_data()  # says at once what is wrong with it
    with temporary_folder(Path(tempfile.gettempdir()), "tpad-shared-metrics-") if workers > 1 else nullcontext() as shared:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the parallelism is in the requests
        for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):  # read when its library is imported
            os.environ.pop(name, None)  # a folder of the user's may hold the figures of other processes
        if shared is not None:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(shared)
        try:
            from recommender.serving.server import serve as run_service
        except ModuleNotFoundError as error:
            raise UserError(f"{error.name} is not installed (tpad serve); pip install '.[faiss-cpu,serve]'", ENVIRONMENT) from None

        run_service(run, find_data, host, port, key, workers, say, {name.lower() for name in allowed_host or []})


app.command()(prepare)


@app.command()
def report(data: DataFolder = None, run: RunFolder = RUN) -> None:
    """Write the run's report.html: results, curves, maps of the catalogue, the index, test sessions as images."""
    from recommender.report.html_report import write_report

    config = run / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    say(f"report: {write_report(run, find_images(data, run), text)}")


@app.command()
def doctor(run: RunFolder = RUN) -> None:
    """Say what is installed, what the machine has, and what tpad will use of it and why."""
    from rich.table import Table

    from pipeline.core.printed_table import print_table
    from recommender.doctor import examine

    examination = examine(run)
    table = Table(box=None, show_header=False, pad_edge=False)
    for fact, value in examination.lines:
        table.add_row(fact, printable(value))
    print_table(table, markup=False)
    if examination.missing:
        raise UserError(f"something is missing (this environment); {'; '.join(examination.missing)}", ENVIRONMENT)
    say("nothing is missing")


def drop_stdout() -> None:
    """Lets what is left for stdout go nowhere, where it cannot be written; else the interpreter tries again at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Runs `tpad`, also under `accelerate launch -m cli` and `torchrun -m cli`. A usage error is one line too; Ctrl-C is 130."""
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"} | dict(os.environ))
    join_cpu_processes()
    sys.excepthook = lambda *error: note("".join(traceback.format_exception(*error)))  # a bug's traceback may quote a title
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a title may have letters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="tpad", standalone_mode=False)
        sys.stdout.flush()
        raise SystemExit(code)
    except OSError as error:  # what `Commands` does not see, as --help; or the last bytes of stdout
        drop_stdout()
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from None
        note(f"error: cannot write: {(error.strerror or str(error)).lower()} (stdout); give it another place")
        raise SystemExit(ENVIRONMENT) from None
    except UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        command = error.ctx.command_path if error.ctx else "tpad"  # type: ignore[attr-defined]
        note(f"error: {message[0].lower()}{message[1:]} (command line); see `{command} --help`")
        raise SystemExit(USAGE) from None


if __name__ == "__main__":
    main()
