"""The house: which way imports run, what the command line may load, and what no file may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "cli.py", *sorted((ROOT / "pipeline").glob("*.py")), *sorted((ROOT / "recommender").rglob("*.py"))]
BASE = {
    f"pipeline.{name}"
    for name in (
        *("errors", "config", "strict_yaml", "artifact", "embeddings", "checkpoint", "images", "catalog", "session_log", "split"),
        *("progress", "process", "mutual_information"),
    )
}  # what recommender may use
HEAVY = {"transformers", "accelerate", "peft", "datasets", "tokenizers"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in SOURCES}
    return imported(path) & modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in ours(path):
        assert module != "cli", "nothing imports the command line"
        if package == "pipeline":
            assert module.startswith("pipeline."), f"pipeline imports {module}"
        if package == "recommender":
            assert module.startswith("recommender.") or module in BASE, f"recommender imports {module}"


def test_the_base_files_import_no_model_code() -> None:
    for name in BASE:
        path = ROOT / (name.replace(".", "/") + ".py")
        assert ours(path) <= BASE, path
        assert not {n.split(".")[0] for n in imported(path)} & HEAVY, path


def test_serving_needs_no_training_library() -> None:
    """Nor PyTorch, whose import takes as long as all else together, nor pandas."""
    kept_out = sorted(HEAVY | {"torch", "pandas"})
    code = f"import sys, recommender.batch, recommender.serve; print([m for m in {kept_out!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, cli; print([m for m in ('torch', 'numpy', 'pyarrow', 'ruamel.yaml', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def called(path: Path) -> set[str]:
    """Names of what a file calls: `eval`, `torch.load`, ..."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {ast.unparse(call) for call in calls if isinstance(call, ast.Name | ast.Attribute)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path: Path) -> None:
    assert not called(path) & {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "np.load"}
    assert not {name.split(".")[0] for name in imported(path)} & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def test_only_one_file_reads_yaml() -> None:
    readers = [path.name for path in SOURCES if any(name.split(".")[0] in ("yaml", "ruamel") for name in imported(path))]
    assert readers == ["strict_yaml.py"]
