"""Remembers which data and settings a run folder was last used with, and generates the sample shop for a new run.

Heavy modules are imported inside functions, since the command line always imports this one.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import ARTIFACT, DATA, ENVIRONMENT, USAGE, UserError, note

if TYPE_CHECKING:
    from pipeline.core.config import Config

MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # the only one that prints, under `accelerate launch`


def say(line: str) -> None:
    """Prints a line to stderr, in the main process."""
    if MAIN_PROCESS:
        note(line)


@contextmanager
def open_run(
    config: Path | None, data: Path | None, run: Path, overrides: list[str] | None, begin: bool = False
) -> Iterator[tuple["Config", Path]]:
    """Yields the settings and the data folder of a run, as given or as remembered. Raises `UserError`.

    `begin`: a new run without data gets the sample shop. What is given is remembered, unless the data is faulty or the body fails in
    a run that already remembers something.
    """
    from pipeline.core.config_file import check_seal, load_config
    from pipeline.core.files import environment_error, read_small, replacing

    record, remembered = run / "run.json", run / "config.yaml"
    try:
        if config is None and remembered.exists():
            check_seal(remembered)
        settings = load_config(config or (remembered if remembered.exists() else None), overrides)
        folder = find_data(data, run, settings if begin else None)
        if data is not None or not record.exists():
            check_data(folder)  # before anything is written, and before imports that take seconds
        before = [(path, read_small(path)) for path in (record, remembered) if path.exists()]
        if MAIN_PROCESS:
            remember(run, folder, settings)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        other = UserError(f"cannot write a run folder: {reason} ({error.filename or run}); use another --run", ENVIRONMENT)
        raise environment_error(error, run) or other from None
    try:
        yield settings, folder
    except Exception:
        for path, content in before if MAIN_PROCESS else []:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        raise


def remember(run: Path, data: Path, settings: "Config") -> None:
    """Writes the data folder and the settings of a run for later commands."""
    from pipeline.core.config_file import save_config
    from pipeline.core.files import replacing, write_json

    run.mkdir(parents=True, exist_ok=True)
    place = os.path.relpath(data.parent.resolve() / data.name, run.resolve())
    write_json(run / "run.json", {"data": place, "sha256": seal_of(place)})
    with replacing(run / "config.yaml") as temporary:
        save_config(settings, temporary, run)


def seal_of(place: str) -> str:
    return hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()


def find_data(data: Path | None, run: Path, begin: "Config | None" = None) -> Path:
    """Returns the data folder as given, else as remembered, else, to begin a run, the sample shop of these settings.

    Raises `UserError`.
    """
    if data is not None:
        if not data.is_dir():
            raise UserError(f"no such data folder ({data}); give --data a folder made by `tpad prepare`", DATA)
        return data
    from pipeline.core.files import read_json

    record = run / "run.json"
    if record.exists():
        try:
            entry = read_json(record)
            place = entry["data"]
            intact = isinstance(place, str) and "\0" not in place and not entry.keys() - {"data", "sha256"}
            if not intact or entry.get("sha256", seal_of(place)) != seal_of(place):
                raise ValueError("not as written")
            data = Path(os.path.normpath(run.resolve() / place))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"not the record of a run, or a damaged one ({record}); delete it and give --data", ARTIFACT) from None
        if not data.is_dir():
            raise UserError(f"the data folder of this run is gone ({data}, by {record}); put it back, or give --data", DATA)
    elif begin is None:
        raise UserError(f"no run here ({run}); run `tpad distill` first, or give --data or another --run", ARTIFACT)
    else:
        data = run / "data"
        if not data.exists():
            draw_sample(data, begin)
    if begin is not None and data == run / "data" and drawn_otherwise(data, begin):
        raise UserError(f"the sample shop of this run was drawn with other settings of `shop` ({data}); use another --run", USAGE)
    return data


def drawn_otherwise(data: Path, settings: "Config") -> bool:
    """Returns whether the folder is a sample shop of other settings."""
    from pipeline.core.config import ShopConfig
    from pipeline.core.files import read_json

    try:
        shop = ShopConfig.model_validate(read_json(data / "ceiling.json")["shop"])
    except (OSError, ValueError, KeyError, TypeError):  # pydantic's errors are ValueErrors
        return False
    return shop != settings.shop


def find_images(data: Path | None, run: Path) -> Path | None:
    """Returns the data folder for showing images, or None: a trained run works without the remembered one."""
    try:
        return find_data(data, run) if data or (run / "run.json").exists() else None
    except UserError as error:
        if data is not None:
            raise
        say(f"no images: {error}")
        return None


def draw_sample(data: Path, settings: "Config") -> None:
    """Generates the sample shop in `data` completely or not at all, also if several processes begin a run together."""
    from pipeline.core.files import replacing
    from pipeline.data.sample_shop import draw_shop

    data.parent.mkdir(parents=True, exist_ok=True)
    say(f"drawing the sample shop: {data}")
    try:
        with replacing(data, folder=True) as temporary:
            draw_shop(temporary, settings.shop, settings.data)
    except OSError:
        if not data.is_dir():  # otherwise another process was first, with the same shop
            raise


def check_data(data: Path) -> None:
    """Loads items and sessions once. Raises `UserError` (3)."""
    from pipeline.data.catalog import load_catalog
    from pipeline.data.session_log import load_sessions

    load_sessions(data, load_catalog(data))
