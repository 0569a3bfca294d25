"""What the first numbers of the exported vectors are worth: the session model on prefixes of k(v) and p(v), and on as many components.

    python benchmarks/prefixes.py --run artifacts/shop --lengths 16,32

A prefix is cut from each half and brought to length one again, as a store that keeps only the first numbers would have it. Components are
the principal ones, which `sbr.components` keeps. The session model is trained anew for each, with the settings of the run and one seed.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifact import OWN_KEYS, open_verified, stage
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.data.embeddings import HALVES, embeddings_schema, vector_columns, vectors_of, write_part
from pipeline.run_folder import find_data
from recommender.training.train import train_sbr


def cut(run: Path, to: Path, length: int) -> None:
    """Publishes the embeddings of `run` in the run `to`, of each half the first `length` numbers."""
    version = open_verified(run / "embeddings", "embeddings", "")
    schema = embeddings_schema(length, "float32")
    with stage(to / "embeddings", "embeddings") as staging:
        for part in version.manifest["parts"]:
            table = pq.read_table(version.path / part["name"])
            columns = {name: table[name] for name in schema.names if name in table.column_names}
            for half in HALVES:
                values = vectors_of(table, half)[:, :length].astype(np.float32)
                values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
                columns |= vector_columns(half, values, schema)
            write_part(staging.path / part["name"], pa.table({name: columns[name] for name in schema.names}, schema=schema))
        manifest = {key: value for key, value in version.manifest.items() if key not in OWN_KEYS}
        staging.publish(manifest | {"dim": length, "dtype": "float32"})


def figures(config: Config, run: Path, data: Path) -> dict[str, float]:
    """Trains the session model, and returns its test figures."""
    sbr = config.sbr.model_copy(update={"models": ["full"], "refit": False, "seeds": 1})
    version = train_sbr(config.model_copy(update={"sbr": sbr}), run, data).version
    metrics = json.loads((version.path / "metrics.json").read_bytes())
    means = metrics["results"]["full"]["mean"]
    return {name: float(means[kind][name.split()[-1]]) for kind, name in (("all", "HR@20"), ("cold", "cold HR@20"), ("all", "MRR@20"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--lengths", default="16,32")
    chosen = parser.parse_args()
    config, data = load_config(chosen.run / "config.yaml"), find_data(None, chosen.run)
    dim = open_verified(chosen.run / "embeddings", "embeddings", "").manifest["dim"]
    lengths = [int(length) for length in chosen.lengths.split(",")]
    rows = [("all", dim), *((kind, length) for length in sorted(lengths, reverse=True) for kind in ("components", "prefix"))]
    print("| vectors | numbers a half | HR@20 | cold HR@20 | MRR@20 |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    for kind, length in rows:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            if kind == "prefix":
                cut(chosen.run, run, length)
            else:
                shutil.copytree(chosen.run / "embeddings", run / "embeddings")
            sbr = config.sbr.model_copy(update={"components": length if kind == "components" else config.sbr.components})
            found = figures(config.model_copy(update={"sbr": sbr}), run, data)
        print(f"| {kind} | {length} | {found['HR@20']:.4f} | {found['cold HR@20']:.4f} | {found['MRR@20']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
