"""Runs the long tests of crashes, damage, attacks and random inputs, file by file, and counts what they tried.

    python benchmarks/robustness.py --work artifacts/robustness --out artifacts/robustness/robustness.json

A file whose tests have passed is not run again. Ends with exit code 1 where one fails. Run it on a machine of its own: the tests of the
service bound how long others wait.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
FILES = [
    *("crash/test_kill.py", "crash/test_disk.py", "crash/test_flips.py", "crash/test_writers.py", "export/test_export.py"),
    *("hostile/test_fuzz.py", "hostile/test_http.py", "hostile/test_inputs.py", "hostile/test_forged.py", "hostile/test_terminal.py"),
    *("hostile/test_formats.py", "hostile/test_static.py", "serving/test_serve.py"),
]


def read(report: Path) -> dict[str, float | str] | None:
    """The row of one file: its tests, their seconds and what they tried; None: not all have passed."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    if int(suite.attrib["failures"]) + int(suite.attrib["errors"]) or not int(suite.attrib["tests"]):
        return None
    tried: Counter[str] = Counter()
    worst: dict[str, float] = {}
    for entry in suite.iter("property"):
        name, value = entry.attrib["name"], float(entry.attrib["value"])
        if name.startswith("most "):
            worst[name] = max(value, worst.get(name, 0.0))
        else:
            tried[name] += int(value)
    told = ", ".join([*(f"{value:,} {name}" for name, value in tried.items()), *(f"{name} {value:g}" for name, value in worst.items())])
    passed = int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
    return {"passed": passed, "tried": told, "seconds": round(float(suite.attrib["time"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the reports, kept and gone on with")
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows: list[dict[str, float | str]] = []
    for file in options.files:
        report = (options.work / file.replace("/", "-")).with_suffix(".xml").resolve()
        if not report.exists() or read(report) is None:
            words = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", f"tests/{file}", f"--junitxml={report}"]
            subprocess.run([*words, "-p", "no:cacheprovider"], cwd=ROOT, check=False)
        row = read(report)
        if row is None:
            sys.exit(f"error: tests fail ({report}); see above")
        rows.append({"tests": f"tests/{file}"} | row)
        print(json.dumps(rows[-1]), flush=True)
        if options.out:
            options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
