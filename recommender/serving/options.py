"""Reads the options of `tpad recommend` and `tpad serve` that are more than a word or a number. Imports nothing heavy."""

import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from pipeline.core.errors import USAGE, UserError
from pipeline.core.files import read_given

KEY_LENGTH, MAX_KEY = 16, 4096  # characters at least; bytes of its file


def check_utf8(option: str, text: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # surrogates: Python's form of bytes that are not UTF-8
        raise UserError(f"{option} {text!r} is not UTF-8 (command line); give ids and values as the catalogue has them", USAGE)


def parse_filters(texts: Iterable[str]) -> dict[str, list[str]]:
    """Collects the values of each column from texts of the form column=value."""
    filters: dict[str, list[str]] = {}
    for text in texts:
        check_utf8("--filter", text)
        column, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--filter {text!r} is not of the form column=value (command line); write e.g. motif=dots", USAGE)
        filters.setdefault(column, []).append(value)
    return filters


def parse_time(text: str) -> int:
    """Converts ISO 8601 (UTC without a zone) or Unix seconds to Unix seconds."""
    try:
        if re.fullmatch(r"[+-]?\d{1,12}", text):
            return int(text)
        moment = datetime.fromisoformat(text)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise UserError(f"--at {text!r} is no time (command line); give e.g. 2026-11-30T12:00 or Unix seconds", USAGE) from None


def api_key(key_file: Path | None) -> str | None:
    """Reads the API key from a file or the environment: every user of the machine can read a command line."""
    try:
        key = os.environ.get("TPAD_API_KEY") if key_file is None else read_given(key_file, MAX_KEY).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"key not readable: {getattr(error, 'strerror', 'not text')} ({key_file}); give a file with one line", USAGE
        ) from None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key and len(key) >= KEY_LENGTH):
        source = key_file or "TPAD_API_KEY"
        raise UserError(f"not fit for a key ({source}); give one line of 16 or more ASCII characters", USAGE)
    return key
