"""One finished run over a small shop with hostile titles, for all tests of this folder; they change copies only."""

from pathlib import Path

import pytest

from helpers.server import write_shop


@pytest.fixture(scope="session")
def shop(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with embeddings, session model and settings, and its data folder inside."""
    return write_shop(tmp_path_factory.mktemp("shop") / "run", tiny_data)
