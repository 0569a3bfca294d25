"""The command line as a user has it: real processes, on a shop small enough to go through the whole chain in seconds."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)  # to look at pages with
ROOT = Path(__file__).parent.parent
ITEMS = 40
SETTINGS = [
    *(f"shop.items={ITEMS}", "shop.sessions=200", "shop.image_size=24"),
    *("backbone.tiny.vocab=400", "backbone.tiny.image_size=24", "backbone.tiny.patch=6", "backbone.tiny.heads=2"),
    *("backbone.tiny.vision_dim=16", "backbone.tiny.vision_layers=1", "backbone.tiny.dim=32", "backbone.tiny.layers=1"),
    *(f"distill.{phase}.{setting}" for phase in ("knowledge", "transfer", "align") for setting in ("steps=3", f"batch={ITEMS}")),
    *("distill.dim=8", "distill.critic.warmup=1", "sbr.epochs=1", "sbr.dim=16"),
]
SET = [word for setting in SETTINGS for word in ("--set", setting)]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("RANK", None)  # of a launcher around the tests


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "cli", *map(str, args)]


def tpad(*args: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, check=False)


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by its name there."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
