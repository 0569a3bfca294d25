"""Random command lines, files of settings and contracts: nothing but a `UserError` comes of them."""

import string
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.commands import tpad_here
from pipeline.core.config import Config
from pipeline.core.config_file import check_seal, load_config, save_config
from pipeline.core.errors import UserError, printable
from pipeline.core.files import canonical_json, parse_json
from pipeline.core.setting_paths import relative, resolved
from recommender.serving.options import parse_filters, parse_time

FEW, MANY = 200, 5000
TIMES = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]
COMMANDS = ("distill", "export-embeddings", "train-sbr", "index", "recommend", "ablate", "evaluate", "serve", "prepare", "report", "doctor")
OPTIONS = ("--set", "--config", "--data", "--shard", "-k", "--session", "--sessions", "--out", "--at", "--filter", "--new-items", "--port")
OPTIONS += ("--diversify", "--variants", "--models", "--windows", "--seeds", "--protocol", "--items", "--images", "--column", "--search")
OPTIONS += (
    "--key-file",
    "--workers",
    "--host",
    "--format",
    "--max-pixels",
    "--session-gap",
    "--on-bad-image",
    "--json",
    "--update",
    "--check",
)
WORDS = st.one_of(
    st.sampled_from((*OPTIONS, *COMMANDS, "--help", "--debug", "--", "=", "a=b", "sbr.dim=8", "sbr.models=[x]", "1", "-1", "0", "1/2")),
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def tell_times(times: int, record_property: Callable[[str, object], None]) -> None:
    record_property("random inputs", times)


def drawn(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("times", [FEW // 2, pytest.param(MANY, marks=pytest.mark.slow)])
def test_random_command_lines(tmp_path: Path, times: int) -> None:
    """Over a run that is not there, so that none begins a training."""

    @drawn(times)
    @given(st.sampled_from(COMMANDS), st.lists(WORDS, max_size=6))
    def check(command: str, words: Sequence[str]) -> None:
        if command in ("distill", "ablate") and "--help" not in words:  # which begin a run of their own with the sample shop
            words = [*words, "--data", str(tmp_path / "none")]
        told = tpad_here(command, *words, *([] if command == "prepare" else ["--run", tmp_path / "none"]))
        assert told.is_one_line or told.code == 0, (command, words, told)
        assert all(letter.isprintable() or letter == "\n" for letter in told.err)

    check()


@pytest.mark.parametrize("times", TIMES)
def test_random_files_of_settings(tmp_path: Path, times: int) -> None:
    path = tmp_path / "my.yaml"
    keys = st.sampled_from([*Config.model_fields, *(f"sbr.{name}" for name in ("dim", "lr", "models")), "x", ""])
    lines = st.lists(st.tuples(keys, st.text(alphabet=string.printable, max_size=20)).map(": ".join), max_size=5).map("\n".join)

    @drawn(times)
    @given(st.one_of(st.binary(max_size=300), lines.map(str.encode), st.text(max_size=100).map(str.encode)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            config = load_config(path)
        except UserError as error:
            assert error.code == 2
            return
        save_config(config, tmp_path / "again.yaml")
        check_seal(tmp_path / "again.yaml")
        assert load_config(tmp_path / "again.yaml") == config

    check()


@pytest.mark.parametrize("times", TIMES)
def test_round_trips(times: int) -> None:
    @drawn(times)
    @given(JSON, st.text(), st.lists(st.text(max_size=20), max_size=4))
    def check(content: object, text: str, words: list[str]) -> None:
        assert parse_json(canonical_json(content)) == content
        assert canonical_json(parse_json(canonical_json(content))) == canonical_json(content)
        assert all(letter.isprintable() or letter == "\n" for letter in printable(text))
        assert printable(printable(text)) == printable(text)
        for parse in (lambda: parse_time(text), lambda: parse_filters(words)):
            try:
                parse()
            except UserError as error:
                assert error.code == 2

    check()


@pytest.mark.parametrize("times", TIMES)
def test_paths_of_settings_are_found_again(tmp_path: Path, times: int) -> None:
    names = st.lists(st.sampled_from(["a", "b", "..", "c d"]), min_size=1, max_size=4).map("/".join)

    @drawn(times)
    @given(names, names)
    def check(prompts: str, run: str) -> None:
        tree = {"data": {"prompts": prompts, "neighbours": {"run": run}}, "seed": 1}
        absolute = resolved(tree, tmp_path)
        assert absolute["data"]["prompts"].startswith("/")
        assert resolved(relative(absolute, tmp_path / "x"), tmp_path / "x") == absolute

    check()
