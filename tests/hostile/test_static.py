"""What no file of the project may do, whatever it is given: run code from data, trust the code of a model, reach the network."""

import ast
import re
from pathlib import Path

import pytest

from test_layout import ROOT, SOURCES, imported

TESTS = sorted(path for folder in ("tests", "benchmarks", "docs") for path in (ROOT / folder).rglob("*.py"))
RUNS_CODE = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load", "numpy.load", "os.system"}
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
LOADERS = {"AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoModelForImageTextToText", "AutoProcessor", "AutoModel"}
OF_ATTACKERS = {"test_forged.py"}  # which makes a pickle, to see it refused


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func) if isinstance(call.func, ast.Name | ast.Attribute) else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path: Path) -> None:
    assert not {name_of(call) for call in calls(path)} & RUNS_CODE
    assert not {name.split(".")[0] for name in imported(path)} & PICKLES
    for call in calls(path):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        assert not (isinstance(value := keywords.get("shell"), ast.Constant) and value.value), ast.unparse(call)
        loader, _, how = name_of(call).partition(".")
        if loader in LOADERS and how in ("from_pretrained", "from_config"):
            trusts = keywords.get("trust_remote_code")
            assert isinstance(trusts, ast.Constant) and trusts.value is False, ast.unparse(call)


def test_no_test_trusts_code_or_reads_pickles() -> None:
    for path in TESTS:
        if path.name in OF_ATTACKERS:
            continue
        assert not {name.split(".")[0] for name in imported(path)} & PICKLES, path
        for call in calls(path):
            assert not any(keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False" for keyword in call.keywords), path


def test_no_test_needs_the_network() -> None:
    """Addresses in tests are of this machine, of names that nobody can have (RFC 2606), or the name of an XML namespace."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for address in str(node.value).split("://")[1:] if isinstance(node, ast.Constant) else ():
                host = re.split(r"[/:'\\\\\s]", address)[0]
                assert (
                    not host
                    or "example" in host
                    or host.endswith(".invalid")
                    or host.startswith(("127.0.0.1", "{", "localhost", "www.w3.org"))
                ), (path, address)


def test_no_file_of_the_project_asks_on_the_terminal() -> None:
    assert not [path for path in SOURCES for call in calls(path) if name_of(call) in ("input", "typer.prompt", "typer.confirm", "getpass")]
