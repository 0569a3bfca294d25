"""The house: which way imports run, what the command line may load, and what no file may do."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [ROOT / "cli.py", *sorted((ROOT / "pipeline").rglob("*.py")), *sorted((ROOT / "recommender").rglob("*.py"))]
HEAVY = {"transformers", "accelerate", "peft", "datasets", "tokenizers"}


def imported(source: Path | ast.Module) -> set[str]:
    names: set[str] = set()
    tree = source if isinstance(source, ast.Module) else ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


PACKAGES = {  # package -> what it may import: these, and what these may import
    "pipeline.core": (),
    "pipeline.objectives": (),
    "pipeline.data": ("pipeline.core",),
    "pipeline.mllm": ("pipeline.data",),
    "pipeline.distill": ("pipeline.mllm", "pipeline.objectives"),
    "pipeline.export": ("pipeline.mllm",),
    "pipeline": ("pipeline.data", "pipeline.export"),  # run_folder.py and parts of the command line
    "recommender.session_model": ("pipeline.core", "pipeline.data", "pipeline.objectives"),
    "recommender.baselines": ("recommender.session_model",),
    "recommender.retrieval": ("recommender.session_model",),
    "recommender.metrics": ("recommender.baselines",),
    "recommender.training": ("recommender.metrics", "recommender.retrieval"),
    "recommender.experiments": ("recommender.training",),
    "recommender.serving": ("recommender.retrieval",),
    "recommender.report": ("recommender.serving", "recommender.metrics"),
    "recommender": ("recommender.serving", "pipeline"),  # doctor.py, recommend_command.py
}
WITHOUT_MODELS = ("pipeline.core", "pipeline.data", "pipeline.objectives")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES if path.name != "__init__.py"}


def package_of(module: str) -> str:
    """The package of a module, or, of one that lies in none, `pipeline` or `recommender`."""
    first, *rest = module.split(".")
    return first if len(rest) < 2 else f"{first}.{rest[0]}"


def allowed(package: str) -> set[str]:
    """What a package may import, itself included."""
    return {package}.union(*(allowed(below) for below in PACKAGES[package]))


def ours(path: Path) -> set[str]:
    return imported(path) & MODULES.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if module != "cli"])
def test_imports_follow_the_packages(module: str) -> None:
    wrong = {name for name in ours(MODULES[module]) if name == "cli" or package_of(name) not in allowed(package_of(module))}
    assert not wrong, f"{module} imports {wrong}"


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    """Nor by an import inside a function."""
    TopologicalSorter({module: ours(path) for module, path in MODULES.items()}).prepare()


def test_every_package_says_what_it_is_for_and_does_nothing() -> None:
    for path in SOURCES:
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree) and len(tree.body) == 1, path


def test_files_and_objectives_need_no_model_code() -> None:
    for module, path in MODULES.items():
        if package_of(module) in WITHOUT_MODELS:  # a collection of images is read by `datasets`, which is imported then
            heavy = HEAVY - ({"datasets"} if module == "pipeline.data.prepare.collections" else set())
            assert not {name.split(".")[0] for name in imported_at_run_time(path)} & heavy, module


def imported_at_run_time(path: Path) -> set[str]:
    """`imported`, less what stands under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    return imported(tree)


def test_serving_needs_no_training_library() -> None:
    """Nor PyTorch, whose import takes as long as all else together, nor pandas."""
    kept_out = sorted(HEAVY | {"torch", "pandas"})
    code = (
        f"import sys, recommender.serving.recommend_file, recommender.serving.server; print([m for m in {kept_out!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_help_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, cli; print([m for m in ('torch', 'numpy', 'pyarrow', 'ruamel.yaml', 'pydantic') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_only_one_file_reads_yaml() -> None:
    readers = [path.name for path in SOURCES if any(name.split(".")[0] in ("yaml", "ruamel") for name in imported(path))]
    assert readers == ["strict_yaml.py"]
