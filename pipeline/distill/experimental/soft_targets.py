"""Declares the interface of a session model that teaches the transfer phase (P2Rec, arXiv 2406.00333)."""

from typing import Protocol

from torch import Tensor


class Teacher(Protocol):
    """A trained session model. The command line passes it in, because `pipeline` may not import `recommender`."""

    sha256: str

    def __call__(self, prefixes: list[Tensor], candidates: Tensor) -> Tensor:
        """Returns log-scores (n, C) of the rows `candidates` (C,) after each of n prefixes of rows."""
