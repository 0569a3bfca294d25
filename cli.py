"""The command line: parse, load the settings, call one function, print what it says.

Everything heavy is imported inside the commands, so `tpad --help` is quick. A `UserError` becomes one line on stderr
and its exit code; results go to stdout, everything else to stderr.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import USAGE, UserError

if TYPE_CHECKING:
    from pipeline.config import Config

RUN = Path("artifacts/shop")
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # the one that talks, under `accelerate launch`

app = typer.Typer(
    help="Next-item recommendation from what items are and what people move on to. Each command runs without arguments, on a built-in sample shop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings (YAML). Default: those the run was last used with, else the built-in ones.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Folder of items.parquet and sessions.parquet. Default: the run's; for a new run, the sample shop.")]
RunFolder = Annotated[Path, typer.Option("--run", help="Folder of the run: everything made from one catalogue.")]
Override = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="One setting over the file's, e.g. sbr.epochs=5; repeatable.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def say(line: str) -> None:
    if MAIN_PROCESS:
        typer.echo(line, err=True)


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Turns a `UserError` into its line and exit code."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.code) from None


def open_run(config: Path | None, data: Path | None, run: Path, overrides: list[str] | None, begin: bool = False) -> tuple["Config", Path]:
    """The settings and the data folder of a run, as given or as remembered; with `begin`, a new run gets the sample shop."""
    from pipeline.artifact import write_json
    from pipeline.config import load_config, save_config

    remembered = run / "config.yaml"
    settings = load_config(config or (remembered if remembered.exists() else None), overrides)
    record = run / "run.json"
    if data is None and record.exists():
        try:
            data = run / json.loads(record.read_text(encoding="utf-8"))["data"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"not the record of a run ({record}); delete it and give --data", USAGE) from None
    if data is None:
        data = run / "data"
        if begin and not data.exists():
            from pipeline.shop import draw_shop

            say(f"drawing the sample shop: {data}")
            draw_shop(data, settings.shop, settings.data)
    if not (data.exists() or (run / "mllm").exists()):
        what = "no such data folder" if begin else "nothing here yet"
        raise UserError(f"{what} ({data if begin else run}); {'give --data a folder made by `tpad prepare`' if begin else 'run `tpad distill` first'}", 3 if begin else 4)
    if MAIN_PROCESS:
        run.mkdir(parents=True, exist_ok=True)
        write_json(record, {"data": os.path.relpath(data, run)})
        save_config(settings, remembered)
    return settings, data


def following(command: str, run: Path) -> None:
    say(f"next: tpad {command}{f' --run {run}' if run != RUN else ''}")


@app.command()
def distill(config: ConfigFile = None, data: DataFolder = None, run: RunFolder = RUN, set_: Override = None, fresh: Fresh = False, debug: Debug = False) -> None:
    """Teach a multimodal LLM the catalogue and its transitions: items + sessions -> the unified MLLM."""
    with errors(debug):
        settings, folder = open_run(config, data, run, set_, begin=True)
        from pipeline.distill import distill as run_stages

        made = run_stages(settings, run, folder, fresh)
        say(f"unified MLLM: {run / 'mllm'}{'' if made else ' (up to date)'}")
        following("export-embeddings", run)


@app.command()
def export_embeddings(config: ConfigFile = None, data: DataFolder = None, run: RunFolder = RUN, set_: Override = None, debug: Debug = False) -> None:
    """Write one vector per item: items + unified MLLM -> Parquet and manifest."""
    with errors(debug):
        settings, folder = open_run(config, data, run, set_)
        from pipeline.export import export

        found = export(settings, run, folder)
        say(f"{found.rows} items x ({found.dim} knowledge + {found.dim} transition): {found.version.path}{'' if found.made else ' (up to date)'}")
        following("train-sbr", run)


def main() -> None:
    """The entry point: `tpad`, and `accelerate launch -m cli`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


if __name__ == "__main__":
    main()
