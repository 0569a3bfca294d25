"""`tpad export-embeddings` and `tpad export-model`: the options, and what is printed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from pipeline.command_options import RUN, ConfigFile, DataFolder, Override, RunFolder, following
from pipeline.core.errors import USAGE, UserError
from pipeline.core.process import own_share
from pipeline.run_folder import find_data, open_run, say

if TYPE_CHECKING:
    from pipeline.export.export import Exported


def export_embeddings(
    config: ConfigFile = None,
    data: DataFolder = None,
    run: RunFolder = RUN,
    set_: Override = None,
    update: Annotated[bool, Option("--update", help="Keep the vectors of items that have not changed.")] = False,
    shard: Annotated[str | None, Option(metavar="I/N", help="Only the I-th of N shares of the work; the last one publishes.")] = None,
    engine: Annotated[str | None, Option(metavar="ray|URL", help="Compute on a cluster of Ray, or by a server of embeddings.")] = None,
    format_: Annotated[str | None, Option("--format", metavar="parquet|npy", help="npy: .npy files too (export.format).")] = None,
    max_pixels: Annotated[int | None, Option(min=1, help="Images are scaled down to this many pixels (export.max_pixels).")] = None,
) -> None:
    """Write one vector per item: items + unified MLLM -> Parquet and manifest. Several processes may do it together."""
    flags = {"format": format_, "max_pixels": max_pixels}
    overrides = [*(set_ or []), *(f"export.{key}={value}" for key, value in flags.items() if value is not None)]
    with open_run(config, data, run, overrides) as (settings, folder):
        share = None if shard is None else parse_shard(shard)
        if shard is not None and (engine == "ray" or own_share()[1] > 1):
            raise UserError("--shard is for processes that are started one by one (command line); a launcher and Ray share the work", USAGE)
        if engine is not None and engine != "ray" and not engine.startswith(("http://", "https://")):
            raise UserError(f"--engine {engine!r} is neither `ray` nor a URL (command line); write e.g. http://localhost:8000", USAGE)
        from pipeline.data.embeddings import REFIT
        from pipeline.export.export import export

        exports = [
            export(settings, part, folder, update, share, engine) for part in ([run, run / REFIT] if settings.distill.refit else [run])
        ]
        for exported in exports:
            report_export(exported)
        if all(exported.version for exported in exports):
            noted = any(exported.notes for exported in exports)
            following("index" if update and (run / "sbr" / "current").exists() and not noted else "train-sbr", run)


def report_export(exported: "Exported") -> None:
    from pipeline.data.embeddings import halves_of

    for note in exported.notes:
        say(note)
    if (work := exported.work).items:
        speed = f"{work.items} items in {work.seconds:.1f} s, {work.items / work.seconds:.1f} a second"
        say(f"{speed}; {work.padding:.1%} of the tokens padding; the model at work {work.computing / work.seconds:.0%} of the time")
    if exported.version is None:
        say(f"{exported.left} of {exported.parts} parts are left, for the other shards or `tpad export-embeddings`")
        return
    manifest = exported.version.manifest
    halves = " + ".join(f"{manifest['dim']} {half}" for half in halves_of(manifest))
    say(f"{manifest['rows']} items x ({halves}): {exported.version.path}{'' if exported.made else ' (up to date)'}")


def parse_shard(shard: str) -> tuple[int, int]:
    number, slash, count = shard.partition("/")
    if not (slash and len(shard) < 20 and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard {shard!r} is not of the form i/n with 1 <= i <= n (command line); write e.g. 2/4", USAGE)
    return int(number), int(count)


def export_model(
    to: Annotated[Path, Option(help="New folder to write to.")],
    text_only: Annotated[bool, Option("--text-only", help="The language model without the vision tower: items are texts.")] = False,
    data: DataFolder = None,
    run: RunFolder = RUN,
) -> None:
    """Write the unified MLLM in the format of sentence-transformers, which other tools and servers load."""
    from pipeline.mllm.sentence_transformer import export_model as run_export

    cosine = run_export(run, find_data(data, run), to, text_only)
    say(f"model: {to} (loaded by sentence-transformers it gives the vectors of this catalogue, cosine {cosine:.6f} or more)")
