"""Defines `UserError`, which the command line turns into one line and an exit code.

Everything a user can cause (a bad file, a bad config, a missing artifact, a missing device) is a `UserError`;
any other exception is a bug in tpad and keeps its traceback.
"""

import sys

USAGE = 2  # command line or config
DATA = 3  # input data
ARTIFACT = 4  # an artifact is missing, corrupt or does not match
ENVIRONMENT = 5  # device, package, disk


MOST = 2000  # characters of a line


def printable(text: str) -> str:
    """Escapes what is not printable, but line ends: titles, ids and names from outside must not give commands to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def note(line: str) -> None:
    """Prints a line to stderr, beside the result of a command."""
    print(printable(line), file=sys.stderr, flush=True)


class UserError(Exception):
    """An error the user can fix: one line, `what (where); what to do`, and the exit code of the contract (2, 3, 4 or 5)."""

    def __init__(self, message: str, code: int) -> None:
        line = printable(" ".join(message.split()))  # it may quote a file or an id, of any length
        super().__init__(line if len(line) <= MOST else f"{line[: MOST // 2]} ... {line[-MOST // 2 :]}")
        self.code = code

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, int]]:
        return type(self), (str(self), self.code)  # to be pickled by a worker process
