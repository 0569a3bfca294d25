"""Prints tables to stdout."""

import sys

from rich.console import Console
from rich.table import Table

WIDTH = 140  # characters, where there is no terminal but a file or a pipe


def print_table(table: Table, markup: bool = True) -> None:
    """Prints a table as wide as the terminal. `markup`: whether its cells may have markup of rich."""
    Console(highlight=False, markup=markup, width=None if sys.stdout.isatty() else WIDTH).print(table)
