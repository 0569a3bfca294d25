"""Reports the installed packages, the machine, and which of its devices tpad will use: `tpad doctor`."""

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

NEEDED = (  # and SERVE: the same as in pyproject.toml, which an installed tpad does not have
    *(
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "tokenizers",
        "safetensors",
        "scipy",
        "numpy",
        "pyarrow",
        "duckdb",
        "datasets",
        "fsspec",
        "pillow",
    ),
    *("pydantic", "ruamel.yaml", "typer", "rich"),
)
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")  # each of them provides the module `faiss`
SERVE = ("fastapi", "uvicorn", "httptools", "uvloop", "prometheus-client", "threadpoolctl")
GIB = 2**30
MEMORY = Path("/proc/meminfo")  # of Linux


@dataclass
class Findings:
    """The result of `examine`."""

    lines: list[tuple[str, str]] = field(default_factory=list)  # topic, finding
    missing: list[str] = field(default_factory=list)  # packages that tpad requires, and how to install them

    def add(self, topic: str, finding: str) -> None:
        self.lines.append((topic, finding))


def installed(name: str) -> str | None:
    """Returns the version of an installed package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine(run: Path) -> Findings:
    """Examines the packages, the machine, and the disk of a run folder."""
    findings = Findings()
    system = f"Python {platform.python_version()}, {platform.platform()}"
    findings.add("tpad", f"{installed('tpad') or 'not installed, run from its folder'}; {system}")
    versions = {name: installed(name) for name in NEEDED}
    findings.add("packages", ", ".join(f"{name} {number}" for name, number in versions.items() if number))
    lacking = [name for name, number in versions.items() if number is None]
    if lacking:
        findings.missing.append(f"{', '.join(lacking)}: pip install -c constraints.txt .")
    if MEMORY.exists():
        memory, limit = memory_bytes()
        findings.add("memory", f"{memory / GIB:.1f} GiB free" + (f", of {limit / GIB:.1f} GiB that this process may use" if limit else ""))
    disk = shutil.disk_usage(existing(run))
    findings.add("disk", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB, where {run} is or would be")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings.add("processor", f"{cores} cores for this process of {os.cpu_count()}, {platform.machine()}")
    if versions["torch"]:
        examine_torch(findings)
    examine_faiss(findings)
    vision = installed("torchvision")
    findings.add("images", f"torchvision {vision}" if vision else "preprocessed by Pillow: torchvision is not installed, and not required")
    absent = ", ".join(name for name in SERVE if installed(name) is None)
    findings.add("service", f"not available: {absent} not installed; pip install '.[serve]'" if absent else "FastAPI and uvicorn")
    return findings


def examine_torch(findings: Findings) -> None:
    import torch

    threads = f"threads: {torch.get_num_threads()}"
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    findings.add("GPUs", "; ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards) or "none visible to torch")
    if cards:
        device = f"the first of {len(cards)} GPUs; `accelerate launch` uses the others too"
    elif torch.backends.mps.is_available():
        device = "the GPU of this Mac (mps)"
    else:
        reason = "this build of torch is for CPUs" if torch.version.cuda is None and torch.version.hip is None else "torch finds no GPU"
        device = f"the CPU ({threads}): {reason}"
    findings.add("training, export", device)
    findings.add("recommending", f"the CPU ({threads}): a session takes milliseconds there")


def examine_faiss(findings: Findings) -> None:
    builds = [f"{name} {number}" for name in FAISS if (number := installed(name))]
    if find_spec("faiss") is None:
        findings.add("index", "FAISS is not installed")
        findings.missing.append("faiss: pip install -c constraints.txt '.[faiss-cpu]', or '.[faiss-gpu]'")
        return
    if len(builds) > 1:
        findings.missing.append(f"one FAISS instead of {' and '.join(builds)}, which overwrite each other: uninstall all, then install one")
    try:
        import faiss  # type: ignore[import-untyped]

        from recommender.retrieval.index import gpus
    except ImportError as error:
        findings.add("index", f"FAISS cannot be loaded: {error}")
        findings.missing.append("a FAISS that loads: uninstall it, and install it again")
        return
    options = faiss.get_compile_options().split()
    if gpus():
        device = f"indexes other than HNSW are built on {gpus()} GPUs, and searched on the CPU"
    else:
        reason = "FAISS sees none" if "GPU" in options else "this is the CPU build"
        device = f"built and searched on the CPU; the GPU branch is not available: {reason}"
    findings.add("index", f"{' and '.join(builds) or 'FAISS ' + faiss.__version__} ({', '.join(options)}): {device}")


def existing(path: Path) -> Path:
    """Returns the folder, or the nearest one above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def memory_bytes() -> tuple[int, int | None]:
    """Returns the free bytes, and the limit of the control group; None without a limit below the memory of the machine."""
    facts = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    free, total = (int(facts[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    for file, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit, usage = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (file, used))
        except (OSError, ValueError):  # no such group, or "max"
            continue
        if limit < total:
            return min(free, limit - usage), limit
    return free, None
