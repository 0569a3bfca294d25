"""A session model as teacher of the transfer phase (P2Rec, arXiv 2406.00333): what the phase asks of it."""

from typing import Protocol

from torch import Tensor


class Teacher(Protocol):
    """A trained session model, as the command line hands it in: this half of the project knows no other."""

    sha256: str

    def __call__(self, prefixes: list[Tensor], candidates: Tensor) -> Tensor:
        """Log-scores (n, C) of the rows `candidates` (C,) after each of n prefixes of rows."""
