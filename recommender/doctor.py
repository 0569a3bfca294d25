"""`tpad doctor`: what is installed, what the machine has, and what tpad will use of it and why, in one screen."""

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

NEEDED = (  # and SERVE: as pyproject.toml has them, which is not there where the packages are
    *("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors", "numpy", "pyarrow", "pillow"),
    *("pydantic", "ruamel.yaml", "typer", "rich"),
)
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs")  # all of them are the module `faiss`
SERVE = ("fastapi", "uvicorn", "httptools", "uvloop", "prometheus-client", "threadpoolctl")
GIB = 2**30
MEMORY = Path("/proc/meminfo")  # of Linux


@dataclass
class Findings:
    lines: list[tuple[str, str]] = field(default_factory=list)  # what, and what of it
    missing: list[str] = field(default_factory=list)  # that tpad cannot do without, and where to get it

    def add(self, what: str, found: str) -> None:
        self.lines.append((what, found))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine(run: Path) -> Findings:
    findings = Findings()
    system = f"Python {platform.python_version()}, {platform.platform()}"
    findings.add("tpad", f"{installed('tpad') or 'not installed, run from its folder'}; {system}")
    found = {name: installed(name) for name in NEEDED}
    findings.add("packages", ", ".join(f"{name} {number}" for name, number in found.items() if number))
    lacking = [name for name, number in found.items() if number is None]
    if lacking:
        findings.missing.append(f"{', '.join(lacking)}: pip install -c constraints.txt .")
    if MEMORY.exists():
        memory, limit = memory_bytes()
        findings.add("memory", f"{memory / GIB:.1f} GiB free" + (f", of {limit / GIB:.1f} GiB that this process may use" if limit else ""))
    disk = shutil.disk_usage(existing(run))
    findings.add("disk", f"{disk.free / GIB:.1f} GiB free of {disk.total / GIB:.1f} GiB, where {run} is or would be")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings.add("processor", f"{cores} cores for this process of {os.cpu_count()}, {platform.machine()}")
    if found["torch"]:
        examine_torch(findings)
    examine_faiss(findings)
    vision = installed("torchvision")
    findings.add("pictures", f"torchvision {vision}" if vision else "prepared by Pillow: torchvision is not installed, nor needed")
    absent = ", ".join(name for name in SERVE if installed(name) is None)
    findings.add("service", f"not available: {absent} not installed; pip install '.[serve]'" if absent else "FastAPI and uvicorn")
    return findings


def examine_torch(findings: Findings) -> None:
    import torch

    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    findings.add("GPUs", "; ".join(f"{card.name}, {card.total_memory / GIB:.0f} GiB" for card in cards) or "none that torch sees")
    if cards:
        used = f"the first of {len(cards)} GPUs; `accelerate launch` uses the others too"
    elif torch.backends.mps.is_available():
        used = "the GPU of this Mac (mps)"
    else:
        why = "this build of torch is for CPUs" if torch.version.cuda is None and torch.version.hip is None else "torch finds no GPU"
        used = f"the CPU, with {torch.get_num_threads()} threads: {why}"
    findings.add("training, export", used)
    findings.add("recommending", f"the CPU, with {torch.get_num_threads()} threads: a session takes milliseconds there")


def examine_faiss(findings: Findings) -> None:
    builds = [f"{name} {number}" for name in FAISS if (number := installed(name))]
    if find_spec("faiss") is None:
        findings.add("index", "FAISS is not installed")
        findings.missing.append("faiss: pip install -c constraints.txt '.[faiss-cpu]', or '.[faiss-gpu]'")
        return
    if len(builds) > 1:
        findings.missing.append(f"one FAISS instead of {' and '.join(builds)}, which overwrite each other: uninstall all, install one")
    try:
        import faiss  # type: ignore[import-untyped]

        from recommender.retrieval.index import gpus
    except ImportError as error:
        findings.add("index", f"FAISS cannot be loaded: {error}")
        findings.missing.append("a FAISS that loads: uninstall it, and install it again")
        return
    options = faiss.get_compile_options().split()
    if gpus():
        used = f"indexes but HNSW are built on {gpus()} GPUs, and searched on the CPU"
    else:
        why = "FAISS sees none" if "GPU" in options else "this is the CPU build"
        used = f"built and searched on the CPU; the GPU branch is not available: {why}"
    findings.add("index", f"{' and '.join(builds) or 'FAISS ' + faiss.__version__} ({', '.join(options)}): {used}")


def existing(path: Path) -> Path:
    """The folder, or the first one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def memory_bytes() -> tuple[int, int | None]:
    """Free now; and the limit of the control group, where there is one below the machine's memory."""
    facts = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    free, total = (int(facts[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    for file, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit, taken = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (file, used))
        except (OSError, ValueError):  # no such group, or "max"
            continue
        if limit < total:
            return min(free, limit - taken), limit
    return free, None
