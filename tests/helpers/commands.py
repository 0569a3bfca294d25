"""Runs commands in this process, for many cases of which none should take a second."""

import contextlib
import io
import sys
import time
from typing import NamedTuple
from unittest import mock

import cli


class Told(NamedTuple):
    """What a command said and how it ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def is_one_line(self) -> bool:
        """Whether it ended as a mistake of the user does: one line, `error: what (where); what to do`, after any notes."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return self.code in (2, 3, 4, 5) and len(errors) == 1 and self.err.endswith(f"{errors[0]}\n") and "Traceback" not in self.err


def tpad_here(*words: object) -> Told:
    """Runs `tpad WORDS`. An exception that is no `UserError` is raised: a user would see its traceback."""
    out, err, began = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8"), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", ["tpad", *map(str, words)]):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Told(code, *texts, time.monotonic() - began)
