"""Artifacts of every format that was ever written: opened, or refused by the name of the command that makes them again.

`tests/kept/format-N` holds an MLLM, embeddings and a session model as tpad wrote them in that format. It is never written again: with a
new format, a folder is added, and the older ones stay as they are.
"""

import json
import shutil
from pathlib import Path

import pytest

from helpers.commands import tpad_here
from pipeline.core.artifact import FORMAT_VERSION, MANIFEST, open_verified
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import canonical_json, sha256_file
from pipeline.data.embeddings import read_embeddings
from pipeline.mllm.saved_mllm import load_mllm
from recommender.serving.recommender import Recommender

KEPT = sorted((Path(__file__).parents[1] / "kept").iterdir())
COMMANDS = {"mllm": "tpad distill", "embeddings": "tpad export-embeddings", "sbr": "tpad train-sbr"}


def test_each_format_up_to_the_present_one_is_kept() -> None:
    assert [folder.name for folder in KEPT] == [f"format-{number}" for number in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.name)
def test_a_kept_artifact_opens_or_names_what_makes_it_again(kept: Path, tmp_path: Path) -> None:
    run = shutil.copytree(kept, tmp_path / "run")
    for kind, command in COMMANDS.items():
        try:
            version = open_verified(run / kind, kind, f"run `{command}` first")
        except UserError as error:
            assert kept != KEPT[-1], str(error)
            assert error.code == ARTIFACT and f"run `{command}` again" in str(error)
            continue
        if kind == "mllm":
            assert load_mllm(version.path)[2]["heads"] == ["knowledge", "transition"]
        elif kind == "embeddings":
            assert len(read_embeddings(run / kind).item_ids) == 12
        else:
            answer = Recommender.load(run).recommend(["item-003"], 3)
            assert [item.rank for item in answer.items] == [1, 2, 3]


@pytest.mark.parametrize("number", [0, FORMAT_VERSION + 1])
def test_another_number_is_refused_by_name(tmp_path: Path, number: int) -> None:
    run = shutil.copytree(KEPT[-1], tmp_path / "run")
    for kind, command in COMMANDS.items():
        manifest = run / kind / "v0001" / MANIFEST
        manifest.write_bytes(canonical_json(json.loads(manifest.read_bytes()) | {"format_version": number}))
        (run / kind / "current").write_bytes(canonical_json({"version": "v0001", "manifest_sha256": sha256_file(manifest)}))
        with pytest.raises(UserError, match=f"format {number}, but this tpad reads format {FORMAT_VERSION}") as error:
            open_verified(run / kind, kind, f"run `{command}` first")
        assert error.value.code == ARTIFACT and f"run `{command}` again" in str(error.value)
    told = tpad_here("recommend", "--run", run)
    assert told.is_one_line and told.code == 4 and "`tpad train-sbr` again" in told.err
