"""What README.md and configs/ say is what works: their commands are run, small, or at least understood to the last option."""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from ruamel.yaml import YAML
from server import serving
from tiny import ENVIRONMENT, ROOT, SET, SETTINGS, command, tpad

import cli
from pipeline.artifact import open_verified
from pipeline.config import Config, load_config
from pipeline.shop import draw_shop

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PICTURES_OF_WORDS = ("items (text, picture)", "cli.py  ")  # how the blocks begin that are no commands: the drawing, the tree
PROGRAMS = ("tpad", "make", "accelerate", "pip")
DISTILLING = re.compile(r"tpad (distill|ablate)\b|-m cli distill\b")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of every fenced block."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def commands(text: str) -> list[list[str]]:
    """The command lines of all blocks, as words. A block that is neither commands, nor tried elsewhere, nor known is an error."""
    lines = []
    for language, content in blocks(text):
        if language in ("python", "ini") or content.strip().startswith(PICTURES_OF_WORDS):
            continue
        assert language in ("", "sh", "bash"), f"a block of {language} that no test knows: {content}"
        lines += re.sub(r"\\\n", " ", content).splitlines()
    found = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    for words in filter(None, found):
        assert words[0] in PROGRAMS, f"a command that no test knows: {shlex.join(words)}"
    return [words for words in found if words]


README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = commands(README)
TPAD = [shlex.join(words) for words in COMMANDS if words[0] == "tpad"]
LAUNCHES = [shlex.join(words) for words in COMMANDS if words[0] == "accelerate"]


def understood(arguments: list[str]) -> dict[str, Any]:
    """The options of a `tpad` command line, read by the program itself; wrong ones are an error."""
    group: Any = typer.main.get_command(cli.app)
    with group.make_context("tpad", list(arguments)) as context:
        _, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        return dict(command.make_context(arguments[0], rest, parent=context).params)


def launched(words: list[str]) -> list[str]:
    """What an `accelerate launch` command line gives to `tpad`."""
    assert words[:2] == ["accelerate", "launch"]
    given = launch_command_parser().parse_args(words[2:])
    assert (given.training_script, given.module) == ("cli", True)
    return list(given.training_script_args)


def smaller(words: list[str]) -> list[str]:
    words = ["2" if before == "--search" else word for before, word in zip(["", *words], words, strict=False)]
    return [*words, *SET] if DISTILLING.search(shlex.join(words)) else words


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README supposes: configs, and a catalogue, pictures and a log of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", folder / "configs")
    settings = load_config(None, SETTINGS)
    draw_shop(folder / "own", settings.shop, settings.data)
    items, log = (pq.read_table(folder / "own" / f"{name}.parquet").to_pylist() for name in ("items", "sessions"))
    (folder / "pictures").mkdir()
    for item in items:
        (folder / "pictures" / f"{item['item_id']}.png").write_bytes(item["image"]["bytes"])
    lines = [f"{item['item_id']},{item['title']},{item['motif']}" for item in items]
    (folder / "items.csv").write_text("\n".join(["item_id,title,motif", *lines]) + "\n")
    lines = [f"{event['session_id']},{event['item_id']},{event['timestamp']}" for event in log]
    (folder / "events.csv").write_text("\n".join(["session_id,item_id,timestamp", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def played(place: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Every `tpad` command of the README, in order, in that folder."""
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


def test_the_readme_has_the_commands_it_should() -> None:
    assert {shlex.split(line)[1] for line in TPAD} == {
        "distill",
        "export-embeddings",
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


@pytest.mark.parametrize("block", ["curl example.org\n", "tpad distill\nrm -rf /\n"])
def test_a_command_no_test_knows_is_noticed(block: str) -> None:
    with pytest.raises(AssertionError, match="no test knows"):
        commands(f"```\n{block}```\n")


@pytest.mark.parametrize("line", TPAD)
def test_a_tpad_command_runs(played: dict[str, subprocess.CompletedProcess[str]], line: str) -> None:
    done = played[line]
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower()


def test_what_the_commands_are_said_to_make_is_there(place: Path, played: dict[str, subprocess.CompletedProcess[str]]) -> None:
    for run in ("shop", "mine"):
        for made in ("mllm", "embeddings", "sbr"):
            assert (place / "artifacts" / run / made / "current").is_file()
    answers = [place / words[words.index("--out") + 1] for words in COMMANDS if "--sessions" in words and words[1] == "recommend"]
    assert answers
    for out in answers:
        assert pq.read_table(out).column_names == ["session_id", "item_id", "rank", "score"]


SNIPPETS = [content for language, content in blocks(README) if language == "python"]
A_MODEL, BACK = (next(snippet for snippet in SNIPPETS if word in snippet) for word in ("nn.Module", "write_json"))
UNIT = next(content for language, content in blocks(README) if language == "ini")


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if snippet not in (A_MODEL, BACK)])
def test_a_python_snippet_runs(place: Path, played: dict[str, subprocess.CompletedProcess[str]], snippet: str) -> None:
    done = subprocess.run([sys.executable, "-c", snippet], cwd=place, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"1 p\d{4} \w+ \w+ \w+ -?\d" if "recommender" in snippet else r"knowledge(.|\n)*transition(.|\n)*has_image", done.stdout
    )


def test_an_earlier_session_model_comes_back(place: Path, played: dict[str, Any]) -> None:
    run = place / "artifacts" / "mine"
    assert tpad("index", "--run", run, "--rebuild").returncode == 0
    assert open_verified(run / "sbr", "sbr", "").name != "v0001"
    subprocess.run([sys.executable, "-c", BACK], cwd=place, env=ENVIRONMENT, check=True)
    assert open_verified(run / "sbr", "sbr", "").name == "v0001"


def test_the_unit_for_systemd_starts_the_service() -> None:
    unit = configparser.ConfigParser()
    unit.read_string(UNIT)
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, words[0]) == ("tpad", "serve")
    assert understood(words)["key_file"]
    assert unit["Service"]["SuccessExitStatus"] == "143"  # after SIGTERM, as above


def test_a_session_model_is_added_by_one_file_and_one_entry(place: Path, played: dict[str, Any], tmp_path: Path) -> None:
    """What the README says, done in a copy of the tree."""
    for name in ("pipeline", "recommender", "cli.py", "configs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    path = A_MODEL.splitlines()[0].removeprefix("# ")
    (tmp_path / path).write_text(A_MODEL)
    table = tmp_path / "recommender" / "models" / "__init__.py"
    name_of_file, name = Path(path).stem, "RecentMean"
    line, entry = f"from recommender.models.{name_of_file} import {name}", f'"{name}": {name}'
    assert f"`{line}`" in README and f"`{entry}`" in README
    text = table.read_text().replace("ENCODERS: dict[str, Encoder] = {", f"{line}\n\nENCODERS: dict[str, Encoder] = {{{entry}, ")
    table.write_text(text)
    arguments = ["train-sbr", "--data", place / "artifacts" / "clicks-data", "--run", tmp_path / "run"]
    settings = ["--set", f"sbr.models=[{name}, ID-only]", "--set", "sbr.epochs=1"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command(*arguments, *settings), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{name} +0\.\d+", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("target", [word for words in COMMANDS if words[0] == "make" for word in words[1:]])
def test_a_make_target_exists_and_does_its_own_setup(target: str) -> None:
    recipe = subprocess.run(["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m venv" in recipe
    assert "pip install" in recipe


def test_make_demo_is_the_four_commands() -> None:
    recipe = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [f"tpad {name}" for name in re.findall(r"tpad (.+)", recipe)] == TPAD[:4]


@pytest.mark.parametrize("line", LAUNCHES)
def test_an_accelerate_command_is_understood(line: str) -> None:
    options = understood(launched(shlex.split(line)))
    if options.get("config"):
        load_config(ROOT / options["config"])


@pytest.mark.slow
def test_the_accelerate_commands_for_a_cpu_run(place: Path, tmp_path: Path) -> None:
    lines = [line for line in LAUNCHES if "--cpu" in line]
    assert lines
    for line in lines:
        words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *smaller(shlex.split(line))[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "artifacts" / "shop" / "sbr" / "current").is_file()


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


def test_configs_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"configs/[\w.-]+\.yaml", README))
    assert named
    assert {name for name in named if not (ROOT / name).is_file()} == set()
