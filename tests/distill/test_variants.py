"""The ablations: each leaves out what it says and nothing else, and those that share a phase share it to the bit."""

from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from helpers.runs import PHASES, STEPS, export_run, losses, same, settings, weights
from pipeline.core.config_file import load_config
from pipeline.core.distill_config import VariantName
from pipeline.core.errors import USAGE, UserError
from pipeline.data.embeddings import read_embeddings
from pipeline.distill.distill import distill
from pipeline.distill.variants import VARIANTS, varied
from recommender.serving.recommender import Recommender
from recommender.training.train import train_sbr


@pytest.fixture(scope="module")
def run(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """name of a variant -> its run, with embeddings; phases of the finished run are taken over where they are the same."""
    folder = tmp_path_factory.mktemp("variants")
    torch.set_num_threads(1)

    @cache
    def made(variant: str) -> Path:
        if variant == "full":
            return tiny_run
        changed = f"distill.variant={variant}"
        distill(settings(changed), folder / variant, tiny_data, siblings=[tiny_run])
        export_run(folder / variant, tiny_data, changed)
        return folder / variant

    return made


def final(run: Path, phase: str) -> Path:
    return run / "distill" / phase / f"step-{STEPS:06d}" / "tensors.safetensors"


def test_every_name_has_its_line() -> None:
    assert tuple(VARIANTS) == get_args(VariantName)


@pytest.mark.parametrize(
    ("variant", "shared", "off"),
    [
        ("no_generation", (), {phase: ["generation"] for phase in PHASES}),
        ("no_view", (), {"knowledge": ["view"]}),
        ("no_disentangle", ("knowledge",), {"transfer": ["disentangle"], "align": ["disentangle"]}),
        ("no_relation", ("knowledge", "transfer"), {"align": ["relation"]}),
    ],
)
def test_an_objective_left_out_weighs_nothing_and_earlier_phases_are_those_of_the_full_run(
    run, tiny_run: Path, variant: str, shared: tuple[str, ...], off: dict[str, list[str]]
) -> None:
    found = losses(run(variant))
    assert {phase for phase, _ in found} == set(PHASES) - set(shared)  # what was taken over was not trained again
    for phase in shared:
        assert final(run(variant), phase).samefile(final(tiny_run, phase))
    for (phase, _), line in found.items():
        assert all(line[name] == 0 for name in off.get(phase, []))
    full = [line for (phase, _), line in losses(tiny_run).items() if phase in off]
    assert all(any(line[name] for line in full if name in line) for names in off.values() for name in names)
    assert not same(weights(run(variant)), weights(tiny_run))


def test_without_generation_nothing_is_written_at_all() -> None:
    found = varied(settings("distill.variant=no_generation", "distill.transfer.intent=0.3", "distill.align.token_distill=0.5")).distill
    assert found.knowledge.generation == found.transfer.generation == found.align.generation == 0
    assert found.transfer.intent == found.align.token_distill == 0


def test_without_views_nothing_is_withheld_either() -> None:
    found = varied(settings("distill.variant=no_view")).distill
    assert {of.withhold_text for of in (found.transfer, found.align)} == {of.withhold_image for of in (found.transfer, found.align)} == {0}


@pytest.mark.parametrize(("variant", "half", "other"), [("knowledge", "knowledge", "transition"), ("transfer", "transition", "knowledge")])
def test_one_model_alone_gives_embeddings_of_one_half_on_which_sessions_are_learned(
    run, tiny_data: Path, variant: str, half: str, other: str
) -> None:
    found = read_embeddings(run(variant) / "embeddings")
    assert list(found.vectors) == found.version.manifest["halves"] == [half]
    columns = pq.read_schema(found.version.path / "part-00000.parquet").names
    assert half in columns and other not in columns
    card = (found.version.path / "README.md").read_text()
    assert f"`{half}`" in card and f"`{other}`" not in card
    train_sbr(settings("sbr.models=[full]", "sbr.epochs=1"), run(variant), tiny_data)
    assert len(Recommender.load(run(variant)).recommend(["p0001"], k=3).items) == 3


def test_side_by_side_is_k_alone_and_t_alone_in_one(run) -> None:
    both = read_embeddings(run("side_by_side") / "embeddings")
    assert "halves" not in both.version.manifest
    np.testing.assert_array_equal(both.knowledge, read_embeddings(run("knowledge") / "embeddings").knowledge)
    np.testing.assert_array_equal(both.transition, read_embeddings(run("transfer") / "embeddings").transition)


def test_merged_full_weights_are_the_mean_of_both(run) -> None:
    merged, known, transfer = (weights(run(variant)) for variant in ("merge", "knowledge", "transfer"))
    for name, weight in merged.items():
        if name.startswith("backbone."):
            torch.testing.assert_close(weight, (known[name] + transfer[name]) / 2, atol=1e-6, rtol=1e-5)
    for half, of in (("knowledge", known), ("transition", transfer)):
        assert all(torch.equal(merged[name], of[name]) for name in merged if name.startswith(f"heads.{half}."))


def test_merged_adapters_add_up_to_the_weighted_sum_of_what_they_add(tiny_data: Path, tmp_path: Path) -> None:
    lora = ["backbone.lora={rank: 2, alpha: 6}", "distill.merge.knowledge=0.25", "distill.merge.transfer=0.75"]

    def product(variant: str) -> tuple[torch.Tensor, int]:
        changed = [*lora, f"distill.variant={variant}"]
        distill(settings(*changed), tmp_path / variant, tiny_data, siblings=[tmp_path / "knowledge", tmp_path / "transfer"])
        found = weights(tmp_path / variant)
        a, b = (next(w for name, w in found.items() if "q_proj" in name and f"lora_{factor}" in name) for factor in "AB")
        return b @ a, len(a)

    known, transfer = product("knowledge")[0] * 3, product("transfer")[0] * 3  # alpha over rank
    merged, rank = product("merge")
    assert rank == 4
    assert transfer.abs().max() > 1e-5
    torch.testing.assert_close(merged, 0.25 * known + 0.75 * transfer, atol=1e-7, rtol=1e-4)
    export_run(tmp_path / "merge", tiny_data, *lora)
    assert read_embeddings(tmp_path / "merge" / "embeddings").knowledge.shape == (40, 16)


def test_frozen_trains_heads_only(run, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    frozen = weights(run("frozen"))
    distill(settings(*(f"distill.{phase}.steps=0" for phase in PHASES)), tmp_path, tiny_data)
    drawn = weights(tmp_path)
    assert frozen.keys() == drawn.keys()
    for name, weight in frozen.items():
        assert torch.equal(weight, drawn[name]) == name.startswith("backbone."), name


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_that_would_mix_the_factors_is_refused(method: str) -> None:
    with pytest.raises(UserError, match=r"distill\.merge\.method.*factors A and B") as error:
        load_config(None, [f"distill.merge.method={method}"])
    assert error.value.code == USAGE


def test_session_models_none_of_which_can_be_published_are_refused() -> None:
    with pytest.raises(UserError, match=r"sbr\.models.*full") as error:
        load_config(None, ["sbr.models=[content-only]"])
    assert error.value.code == USAGE
