"""Options that several commands take, and the line that names the next command."""

from pathlib import Path
from typing import Annotated

from typer import Option

from pipeline.run_folder import say

RUN = Path("artifacts/shop")
ConfigFile = Annotated[Path | None, Option("--config", help="Settings (YAML). Default: the last ones of the run, else the built-in ones.")]
DataFolder = Annotated[
    Path | None,
    Option("--data", help="Folder of items and sessions (Parquet). Default: the run's; distill and ablate: else the sample shop."),
]
RunFolder = Annotated[Path, Option("--run", help="Folder of the run: everything made from one catalogue.")]
Override = Annotated[list[str] | None, Option("--set", metavar="A.B=VALUE", help="Overrides one setting, e.g. sbr.epochs=5; repeatable.")]
Fresh = Annotated[bool, Option("--fresh", help="Start over instead of resuming.")]


def following(command: str, run: Path) -> None:
    say(f"next: tpad {command}{f' --run {run}' if run != RUN else ''}")
