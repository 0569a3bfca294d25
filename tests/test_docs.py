"""What README.md, CONTRIBUTING.md, docs/ and configs/ say is what works: their commands are run, small, or at least understood.

A line before each block says how it is tried:

    <!-- test: NAME -->        it is run, in the order of the documents; snippets of Python and unit files by the test of that name
    <!-- not run: REASON -->   it cannot be run here; its commands and options must exist
    <!-- history: COMMIT -->   a command of that commit, in the log of experiments; nothing is tried

Blocks of `text`, `json` and `math` are no code and need none.
"""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from ruamel.yaml import YAML
from torch.distributed.run import get_args_parser

import cli
from helpers.processes import ENVIRONMENT, ROOT, SET, SETTINGS, command, tpad
from helpers.server import serving
from pipeline.core.artifact import open_verified
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.data.sample_shop import draw_shop

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GENERATED = ("cli.md", "configuration.md")  # which have a test of their own
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in GENERATED]
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *PAGES]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
HISTORY = "docs/experiments.md"  # of commands and settings that need not exist any more
NO_CODE = ("text", "json", "math")
PROGRAMS = ("tpad", "make", "accelerate", "torchrun", "pip")
SCRIPTS = ("python", "echo", "docker", "vllm")  # in blocks that are not run
DISTILLING = re.compile(r"tpad (distill|ablate)\b|-m cli distill\b")


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    mark: str  # "test", "not run" or "history"; "" without a marker
    name: str  # what the marker says: name, reason or commit
    language: str
    content: str


def blocks(document: str, text: str) -> Iterator[Block]:
    for match in re.finditer(r"^(?:<!-- (test|not run|history): ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(document, match[1] or "", match[2] or "", match[3], match[4])


def commands(block: Block) -> list[list[str]]:
    """The command lines of a block, as words. A program that no test knows is an error."""
    lines = re.sub(r"\\\n", " ", block.content).splitlines()
    found = [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]
    for words in found:
        known = PROGRAMS if block.mark == "test" else (*PROGRAMS, *SCRIPTS)
        assert words[0] in known, f"a command that no test knows ({block.document}): {shlex.join(words)}"
    return found


BLOCKS = [block for document, text in TEXTS.items() for block in blocks(document, text)]
COMMANDS = {
    mark: [line for block in BLOCKS if (block.language, block.mark) == ("bash", mark) for line in commands(block)]
    for mark in ("test", "not run")
}
TPAD = list(dict.fromkeys(shlex.join(words) for words in COMMANDS["test"] if words[0] == "tpad"))
NOT_RUN = [shlex.join(words) for words in COMMANDS["not run"] if words[0] == "tpad"]
LAUNCHES = [shlex.join(words) for mark in COMMANDS for words in COMMANDS[mark] if words[0] in ("accelerate", "torchrun")]
SNIPPETS = {block.name: block for block in BLOCKS if block.mark == "test" and block.language != "bash"}
PRINTED = {  # what the snippets that print are to print
    "recommend": r"1 p\d{4} \w+ \w+ \w+ -?\d",
    "encode": r"\[(.\w+ \w+ \w+.(, )?){10}\]",
    "read_embeddings": r"knowledge(.|\n)*transition(.|\n)*has_image",
    "load_model": r"\(1, 8\)\n\(1, 8\)",
}


def understood(arguments: list[str]) -> dict[str, Any]:
    """The options of a `tpad` command line, read by the program itself; wrong ones are an error."""
    group: Any = typer.main.get_command(cli.app)
    with group.make_context("tpad", list(arguments)) as context:
        _, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        return dict(command.make_context(arguments[0], rest, parent=context).params)


def launched(words: list[str]) -> list[str]:
    """What a command line of `accelerate launch` or `torchrun` gives to `tpad`."""
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
    else:
        assert words[:2] == ["accelerate", "launch"]
        given = launch_command_parser().parse_args(words[2:])
    assert (given.training_script, given.module) == ("cli", True)
    return list(given.training_script_args)


def settings_load(options: dict[str, Any]) -> None:
    """The config and the settings of a command line are valid."""
    if "config" in options:
        load_config(ROOT / options["config"] if options["config"] else None, options["set_"] or [])


def smaller(words: list[str]) -> list[str]:
    words = ["2" if before == "--search" else word for before, word in zip(["", *words], words, strict=False)]
    return [*words, *SET] if DISTILLING.search(shlex.join(words)) else words


# --- blocks


@pytest.mark.parametrize("document", TEXTS)
def test_every_block_says_how_it_is_tried(document: str) -> None:
    text = TEXTS[document]
    found = list(blocks(document, text))
    assert len(re.findall(r"^\s*(```|~~~)", text, re.MULTILINE)) == 2 * len(found), "a block that no test finds"
    for block in found:
        assert block.mark or block.language in NO_CODE, f"a block without a marker: {block.content}"
        assert block.mark != "history" or (document == HISTORY and re.fullmatch("[0-9a-f]{7,}", block.name))
        assert block.mark != "test" or block.language == "bash" or block.name in {*PRINTED, "add_model", "roll_back", "systemd_unit"}
    markers = re.findall(r"<!-- (?:test|not run|history): .+ -->", text)
    assert len(markers) == sum(bool(block.mark) for block in found), "a marker without its block"


def test_the_names_of_blocks_are_unique() -> None:
    names = [block.name for block in BLOCKS if block.mark == "test"]
    assert len(set(names)) == len(names)
    assert SNIPPETS.keys() == {*PRINTED, "add_model", "roll_back", "systemd_unit"}


@pytest.mark.parametrize("content", ["curl example.org\n", "tpad distill\nrm -rf /\n"])
@pytest.mark.parametrize("mark", ["test", "not run"])
def test_a_command_no_test_knows_is_noticed(content: str, mark: str) -> None:
    with pytest.raises(AssertionError, match="no test knows"):
        commands(Block("a page", mark, "a name", "bash", content))


# --- commands


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents suppose: configs, and a catalogue, images and a log of one's own."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    settings = load_config(None, SETTINGS)
    draw_shop(folder / "own", settings.shop, settings.data)
    items, log = (pq.read_table(folder / "own" / f"{name}.parquet").to_pylist() for name in ("items", "sessions"))
    vectors = list(np.random.default_rng(0).normal(size=(len(items), 16)).astype(np.float32))
    pq.write_table(pa.table({"item_id": [item["item_id"] for item in items], "vector": vectors}), folder / "vectors.parquet")
    (folder / "images").mkdir()
    for item in items:
        (folder / "images" / f"{item['item_id']}.png").write_bytes(item["image"]["bytes"])
    lines = [f"{item['item_id']},{item['title']},{item['motif']}" for item in items]
    (folder / "items.csv").write_text("\n".join(["item_id,title,motif", *lines]) + "\n")
    lines = [f"{event['session_id']},{event['item_id']},{event['timestamp']}" for event in log]
    (folder / "events.csv").write_text("\n".join(["session_id,item_id,timestamp", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def played(place: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every `tpad` command of the documents, in order, in that folder."""
    return {line: (served if line.startswith("tpad serve") else played_out)(line, place) for line in TPAD}


def played_out(line: str, place: Path) -> subprocess.CompletedProcess[str]:
    return tpad(*smaller(shlex.split(line))[1:], cwd=place)


def served(line: str, place: Path) -> subprocess.CompletedProcess[str]:
    """`tpad serve` ends by a signal only: it has done its work when it gives the page."""
    with serving(place / understood(shlex.split(line)[1:])["run"]) as server:
        assert b"<h1>tpad</h1>" in server.ask("/").body
        server.process.terminate()
        assert server.process.wait(60) == 143
    return subprocess.CompletedProcess(shlex.split(line), 0, "", "".join(server.lines))


def test_the_documents_have_the_commands_they_should() -> None:
    assert {shlex.split(line)[1] for line in TPAD} == {
        "distill",
        "export-embeddings",
        "export-model",
        "train-sbr",
        "evaluate",
        "recommend",
        "prepare",
        "index",
        "ablate",
        "report",
        "doctor",
        "serve",
    }
    assert TPAD[:4] == ["tpad distill", "tpad export-embeddings", "tpad train-sbr", "tpad recommend"]
    assert LAUNCHES


@pytest.mark.parametrize("line", TPAD)
def test_a_tpad_command_runs(played: dict[str, subprocess.CompletedProcess[str]], line: str) -> None:
    done = played[line]
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()


def test_what_the_commands_are_said_to_make_is_there(place: Path, played: dict[str, subprocess.CompletedProcess[str]]) -> None:
    for run in ("shop", "mine"):
        for made in ("mllm", "embeddings", "sbr"):
            assert (place / "artifacts" / run / made / "current").is_file()
    lines = [shlex.split(line) for line in TPAD]
    files = [words for words in lines if "--sessions" in words and words[1] == "recommend"]
    for option, columns in (("--out", ["session_id", "item_id", "rank", "score"]), ("--vectors", ["session_id", "position", "item_id"])):
        answers = [place / words[words.index(option) + 1] for words in files if option in words]
        assert answers
        for out in answers:
            assert pq.read_table(out).column_names[: len(columns)] == columns


def test_tpad_commands_that_are_not_run_are_understood() -> None:
    for line in NOT_RUN:
        settings_load(understood(shlex.split(line)[1:]))


@pytest.mark.parametrize("words", [words for words in COMMANDS["not run"] if words[0] == "python"], ids=lambda words: words[1])
def test_a_script_that_is_not_run_is_there(words: list[str]) -> None:
    assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("target", [word for words in COMMANDS["test"] if words[0] == "make" for word in words[1:]])
def test_a_make_target_exists_and_does_its_own_setup(target: str) -> None:
    recipe = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m venv" in recipe
    assert "pip install" in recipe


def test_make_demo_is_the_four_commands() -> None:
    recipe = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [f"tpad {name}" for name in re.findall(r"tpad (.+)", recipe)] == TPAD[:4]


@pytest.mark.parametrize("line", LAUNCHES)
def test_a_launcher_command_is_understood(line: str) -> None:
    settings_load(understood(launched(shlex.split(line))))


@pytest.mark.slow
def test_the_torchrun_commands_run(place: Path, tmp_path: Path) -> None:
    lines = [line for line in LAUNCHES if line.startswith("torchrun ")]
    assert lines
    for line in lines:
        words = [sys.executable, "-m", "torch.distributed.run", *smaller(shlex.split(line))[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "artifacts" / "shop" / "sbr" / "current").is_file()


# --- snippets


@pytest.mark.parametrize("name", PRINTED)
def test_a_python_snippet_runs(place: Path, played: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    words = [sys.executable, "-c", SNIPPETS[name].content]
    done = subprocess.run(words, cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[name], done.stdout)


def test_an_earlier_session_model_comes_back(place: Path, played: dict[str, Any]) -> None:
    run = place / "artifacts" / "mine"
    assert tpad("index", "--run", run, "--rebuild").returncode == 0
    assert open_verified(run / "sbr", "sbr", "").name != "v0001"
    subprocess.run([sys.executable, "-c", SNIPPETS["roll_back"].content], cwd=place, env=ENVIRONMENT, check=True)
    assert open_verified(run / "sbr", "sbr", "").name == "v0001"


def test_the_unit_for_systemd_starts_the_service() -> None:
    unit = configparser.ConfigParser()
    unit.read_string(SNIPPETS["systemd_unit"].content)
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, words[0]) == ("tpad", "serve")
    assert understood(words)["key_file"]
    assert unit["Service"]["SuccessExitStatus"] == "143"  # after SIGTERM, as above


def test_a_session_model_is_added_by_one_file_and_one_entry(place: Path, played: dict[str, Any], tmp_path: Path) -> None:
    """What the document says, done in a copy of the tree."""
    for name in ("pipeline", "recommender", "cli.py", "configs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    snippet = SNIPPETS["add_model"]
    path = snippet.content.splitlines()[0].removeprefix("# ")
    (tmp_path / path).write_text(snippet.content)
    table = tmp_path / "recommender" / "baselines" / "registry.py"
    name_of_file, name = Path(path).stem, "RecentMean"
    line, entry = f"from recommender.baselines.{name_of_file} import {name}", f'"{name}": {name}'
    assert f"`{line}`" in TEXTS[snippet.document] and f"`{entry}`" in TEXTS[snippet.document]
    text = table.read_text().replace("ENCODERS: dict[str, Encoder] = {", f"{line}\n\nENCODERS: dict[str, Encoder] = {{{entry}, ")
    table.write_text(text)
    arguments = ["train-sbr", "--data", place / "artifacts" / "clicks-data", "--run", tmp_path / "run"]
    settings = ["--set", f"sbr.models=[{name}, ID-only]", "--set", "sbr.epochs=1"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command(*arguments, *settings), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{name} +0\.\d+", done.stdout, re.MULTILINE)


# --- names in the text: settings, options, files, links


@pytest.mark.parametrize("document", sorted({*TEXTS} - {HISTORY}))
def test_settings_and_options_in_the_text_exist(document: str) -> None:
    tree, group = Config().model_dump(), typer.main.get_command(cli.app)
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", TEXTS[document], flags=re.MULTILINE | re.DOTALL)):
        for name in re.findall(r"(?<![\w./-])(?:data|shop|backbone|distill|export|sbr)(?:\.[a-z]\w*)+(?![\w/]|\.py)", code):
            assert has(tree, name.split(".")), f"no setting `{name}`"
        if code.startswith("tpad ") and not code.startswith("tpad -"):
            name, *words = code.split()[1:]
            options = {option for parameter in group.commands[name].params for option in parameter.opts}
            assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options, f"`{code}`"


def has(tree: Any, path: list[str]) -> bool:
    """A key that is unset by default may have keys of its own."""
    return not path or tree is None or (isinstance(tree, dict) and path[0] in tree and has(tree[path[0]], path[1:]))


@pytest.mark.parametrize("document", TEXTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[document]):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        if path.name in GENERATED and path.parent == ROOT / "docs":
            continue
        assert path.exists(), target
        heads = [
            re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        ]
        assert not anchor or anchor in heads, target


@pytest.mark.skipif(
    not (ROOT / "pipeline" / "core").is_dir(), reason="the documents name the packages, into which the code has not moved yet"
)
@pytest.mark.parametrize("document", sorted({*TEXTS} - {HISTORY}))
def test_files_in_the_text_exist(document: str) -> None:
    named = set(re.findall(r"`((?:pipeline|recommender|tests|benchmarks|configs)/[\w./-]*)`", TEXTS[document]))
    assert {name for name in named if not (ROOT / name).exists()} == set()


# --- configs


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_loads_and_begins_with_the_command_that_runs_it(path: Path) -> None:
    load_config(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    words = shlex.split(first.removeprefix("# "))
    arguments = words[1:] if words[0] == "tpad" else launched(words)
    assert arguments[0] == ("train-sbr" if path.name == "clicks.yaml" else "distill")  # clicks alone are nothing to distil
    assert understood(arguments)["config"] == Path("configs", path.name)


def test_shop_yaml_is_the_built_in_defaults_with_every_key() -> None:
    path = ROOT / "configs" / "shop.yaml"
    assert load_config(path) == Config()
    assert keys(YAML(typ="safe").load(path)) == keys(Config().model_dump())


def keys(tree: dict[str, Any]) -> list[Any]:
    """The keys of a nested mapping, in order."""
    return [(key, keys(value)) if isinstance(value, dict) else key for key, value in tree.items()]


@pytest.mark.parametrize("document", TEXTS)
def test_configs_named_in_the_documents_exist(document: str) -> None:
    assert {name for name in named_configs(document) if not (ROOT / name).is_file()} == set()


def test_the_documents_name_configs() -> None:
    assert named_configs("README.md")


def named_configs(document: str) -> set[str]:
    return set(re.findall(r"configs/[\w.-]+\.yaml", TEXTS[document]))
