"""The options of reading a user's tables, and the report of what was read and dropped."""

from dataclasses import dataclass, field
from pathlib import Path

Paths = Path | str | list[Path] | list[str]


@dataclass(frozen=True)
class TableOptions:
    """How the tables of a user are read, in `tpad prepare` and `tpad recommend --sessions`; `mapping.Side` says what they mean."""

    columns: dict[str, str] = field(default_factory=dict)
    encoding: str | None = None
    delimiter: str | None = None
    quotes: str | None = None
    names: list[list[str]] = field(default_factory=list)
    where: str | None = None
    time_format: str | None = None
    preset: str | None = None
    mapping: Path | None = None
    memory: str | None = None  # such as 4GB


@dataclass
class Report:
    """How files were read, and what was dropped."""

    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count
    notes: list[str] = field(default_factory=list)

    def say(self, note: str) -> None:
        """Records how a file was read; a note may begin with `warning: `."""
        self.notes.append(note)

    def drop(self, reason: str, count: int) -> None:
        """Counts dropped rows."""
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + int(count)

    def read_lines(self) -> list[str]:
        """Returns the report as lines of text."""
        read = [note if note.startswith("warning: ") else f"read: {note}" for note in self.notes]
        return [*read, *(f"dropped: {count:,} {reason}" for reason, count in self.dropped.items())]
