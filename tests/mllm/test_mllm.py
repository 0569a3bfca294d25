"""Tests item features: they depend on image and text, and not on the batch or on saving."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.backbones import FAMILIES
from helpers.items import ITEMS, LONG, ROW, Setup, make
from helpers.runs import same
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.mllm.model import MODEL_INPUTS, embed, load_trainable, trainable_state
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompts import PromptPart, View
from pipeline.mllm.saved_mllm import load_mllm, save_mllm
from pipeline.mllm.tiny_backbone import train_tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["tiny", *FAMILIES])
def setup(request: pytest.FixtureRequest, data: Path, folders: Path) -> Setup:
    return make(data, folders, request.param)


@pytest.fixture(scope="module")
def tiny(data: Path, folders: Path) -> Setup:
    return make(data, folders, "tiny")


# --- what a feature depends on


def test_an_item_has_the_same_features_alone_and_in_any_batch(setup: Setup) -> None:
    sequences = setup.items(*ITEMS)
    assert len({len(s) for s in sequences}) > 2
    assert len({len(s.images) for s in sequences}) == 2
    alone, together = setup.features(sequences, 1), setup.features(sequences, 10_000)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(setup.features(sequences[::-1], 10_000)[::-1], alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)


def test_no_feature_depends_on_the_attention_mask(setup: Setup) -> None:
    """Padding is on the right and attention causal, which is why the export leaves the mask out."""
    batches = setup.processor.collate({"items": setup.items(*ITEMS)})
    with torch.no_grad():
        masked = setup.mllm.eval()(batches, {"items": ("knowledge",)})["items.knowledge"]
        del batches["items"]["attention_mask"]
        torch.testing.assert_close(setup.mllm(batches, {"items": ("knowledge",)})["items.knowledge"], masked, atol=1e-5, rtol=0)


def test_the_length_of_a_sequence_is_known_before_its_image_is_decoded(setup: Setup) -> None:
    assert [setup.processor.length(setup.prompts.item(row)) for row in ROW.values()] == [len(s) for s in setup.items(*ITEMS)]


def test_image_and_text_both_matter(setup: Setup) -> None:
    red, blue, none, untitled, long, again = setup.features(setup.items(*ITEMS), 10_000)
    np.testing.assert_allclose(red, again, atol=1e-5)
    for other in (blue, none, untitled, long):
        assert np.abs(red - other).max() > 1e-3


def test_equal_images_go_through_the_vision_tower_once(setup: Setup) -> None:
    batches = setup.processor.collate({"items": setup.items("red", "blue", "no-image"), "more": setup.items("red-again", "red", "long")})
    one, two, three = (setup.processor.images.get(ROW[item]) for item in ("red", "blue", "long"))
    for name, tensor in setup.processor.family.stack([p.tensors for p in (one, two, three)]).items():
        assert torch.equal(batches["images"][name], tensor)
    assert batches["items"]["image_at"].tolist() == [0, 1]
    assert batches["more"]["image_at"].tolist() == [0, 0, 2]


def test_the_answer_does_not_show_in_the_feature(setup: Setup) -> None:
    """The feature is read before the answer, and attention is causal."""
    item = setup.prompts.item(ROW["red"])
    answered = [setup.processor.encode([*item, PromptPart("text", "title:"), PromptPart("answer", answer)]) for answer in ("a mug", LONG)]
    features = setup.features([setup.processor.encode(item), *answered], 10_000)
    np.testing.assert_allclose(features[1:], features[[0, 0]], atol=1e-5)


def test_generation_loss_is_that_of_the_language_model(setup: Setup) -> None:
    answers = ("a mug", LONG)
    rows = (ROW["red"], ROW["blue"])
    sequences = [setup.processor.encode([*setup.prompts.item(row), PromptPart("answer", a)]) for row, a in zip(rows, answers, strict=True)]
    for s, answer in zip(sequences, answers, strict=True):
        written = [s.ids[position] for position in s.answers]
        assert setup.backbone.tokenizer.decode(written[:-1]).strip() == answer
        assert written[-1] == setup.backbone.tokenizer.eos_token_id
    batches = setup.processor.collate({"items": sequences})
    batch, pixels = batches["items"], batches["images"]
    with torch.no_grad():
        nll = float(setup.mllm(batches, {"items": ()})["items.nll"])
        labels = torch.full_like(batch["input_ids"], -100)
        for b, s in enumerate(sequences):
            labels[b, s.answers] = batch["input_ids"][b, s.answers]
        text = {name: batch[name] for name in MODEL_INPUTS if name in batch}
        mean = float(setup.backbone.model(**text, **pixels, labels=labels).loss)
    assert nll == pytest.approx(mean * sum(len(s.answers) for s in sequences), rel=1e-4)


def test_what_it_writes_is_the_likeliest_token_after_the_other(setup: Setup) -> None:
    """Generation in a batch, with a cache and padding on the left, equals generation one by one without either."""
    sequences = setup.items("red", "no-image", "long")
    tensors = setup.processor.collate({"s": sequences})
    greedy = setup.processor.greedy(5)
    head = setup.backbone.model.get_output_embeddings()
    with torch.no_grad():
        written = setup.mllm.eval().write(tensors, "s", greedy)
        for s, ids in zip(sequences, written.tolist(), strict=True):
            for n, token in enumerate(ids):
                logits = head(setup.mllm.hidden(setup.processor.collate({"s": [Encoded(s.ids + ids[:n], s.images)]}))["s"][-1])
                logits[greedy.suppress_tokens] = -torch.inf
                assert token == int(logits.argmax())
                if token == setup.backbone.tokenizer.eos_token_id:
                    break
    assert not {*written.flatten().tolist()} & {*greedy.suppress_tokens} - {setup.processor.pad}
    assert len(setup.processor.decode(written)) == 3


def test_a_session_reads_one_feature_for_every_item_it_asks_for(setup: Setup) -> None:
    """All prefixes of a session share one sequence; attention is causal."""
    rows = [ROW[item] for item in ("red", "no-image", "long", "blue")]
    full = setup.processor.encode(setup.prompts.session(rows))
    assert len(full.reads) == len(rows) - 1
    other = setup.processor.encode(setup.prompts.session([*rows[:2], ROW["no-text"], ROW["red"]]))
    with torch.no_grad():
        one, two = (setup.mllm(setup.processor.collate({"s": [s]}), {"s": ("knowledge",)})["s.knowledge"] for s in (full, other))
    np.testing.assert_allclose(one[:2], two[:2], atol=1e-5)
    assert (one[2] - two[2]).abs().max() > 1e-3


def test_a_mean_feature_is_the_mean_over_the_tokens_of_its_item(data: Path, folders: Path) -> None:
    """In a session: over the tokens since the previous item, so that no prefix depends on later items."""
    setup = make(data, folders, "tiny", "backbone.pooling=mean")
    rows = [ROW[item] for item in ("red", "no-image", "long", "blue")]
    sequences = [setup.processor.encode(setup.prompts.session(rows)), *setup.items("no-text", "long")]
    batches = setup.processor.collate({"s": sequences})
    with torch.no_grad():
        features = setup.mllm.eval()(batches, {"s": ("knowledge",)})["s.knowledge"]
        states = setup.mllm.hidden(batches)["s"].unflatten(0, (len(sequences), -1))
        frame, session = len(setup.processor.head), sequences[0]
        lengths = [
            setup.processor.length(setup.prompts.session(rows[:n])[:-3]) for n in (2, 3)
        ]  # without the turn, the read and the answer
        ends = [*lengths, len(session) - len(session.answers)]
        means = [states[0, begin:end].mean(0) for begin, end in zip([frame, *ends], ends, strict=False)]
        means += [states[b, frame : len(sequences[b])].mean(0) for b in (1, 2)]
        expected = torch.nn.functional.normalize(setup.mllm.heads["knowledge"](torch.stack(means)), dim=-1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    alone = setup.features([sequences[2]], 1)
    np.testing.assert_allclose(features[-1:], alone, atol=1e-5)


def test_long_texts_are_cut(data: Path, folders: Path, tiny: Setup) -> None:
    cut = make(data, folders, "tiny", "backbone.max_text_tokens=4")
    assert len(cut.items("long")[0]) < len(tiny.items("long")[0])
    assert len(cut.items("long")[0]) == len(cut.items("red")[0]) + 4 - len(tiny.processor.tokens(" a mug"))


def test_a_year_begins_as_the_year_before_it_though_no_text_had_it() -> None:
    tokenizer = train_tokenizer(400, ["a film of 2014"] * 100)
    seen, new = (tokenizer(f" {year}").input_ids for year in (2014, 2015))
    assert seen[:-1] == new[:-1]
    assert tokenizer.decode(new) == " 2015"


def test_what_looks_like_a_special_token_in_a_text_is_text(data: Path, folders: Path, tmp_path: Path) -> None:
    """A title cannot close a turn or insert an image."""
    table = pq.read_table(data / "items.parquet")
    for family in ("tiny", "smolvlm", "qwen3_vl"):
        special = make(data, folders, family).processor.tokenizer.all_special_tokens
        titles = [f"a {' '.join(special)} mug", *table["title"].to_pylist()[1:]]
        pq.write_table(table.set_column(1, "title", pa.array(titles)), tmp_path / "items.parquet")
        setup = make(tmp_path, folders, family)
        plain = make(data, folders, family)
        ids, wanted = (tokenised.processor.encode(tokenised.prompts.item(0)).ids for tokenised in (setup, plain))
        count = {token: wanted.count(token) for token in setup.processor.tokenizer.all_special_ids}
        assert {token: ids.count(token) for token in count} == count
        assert np.isfinite(setup.features([setup.processor.encode(setup.prompts.item(0))], 10_000)).all()


def test_a_pixel_budget_makes_fewer_tokens(data: Path, folders: Path) -> None:
    full, small = make(data, folders, "qwen3_vl"), make(data, folders, "qwen3_vl", "backbone.max_pixels=128")
    assert len(small.items("red")[0]) < len(full.items("red")[0])
    assert np.isfinite(small.features(small.items(*ITEMS), 10_000)).all()


# --- prompts


def texts(parts: list[PromptPart]) -> list[str]:
    return [part.text for part in parts if part.kind in ("words", "text")]


def test_a_withheld_modality_is_said_in_words(tiny: Setup) -> None:
    prompts, red = tiny.prompts, ROW["red"]
    full = prompts.item(red)
    assert [part.row for part in full if part.kind == "image"] == [red]
    assert not {"no picture.", "no text."} & set(texts(full))
    no_image, no_text = prompts.item(red, View(False, True)), prompts.item(red, View(True, False))
    assert not [part for part in no_image if part.kind == "image"]
    assert "no picture." in texts(no_image)
    assert "a mug" in texts(no_image)
    assert "no text." in texts(no_text)
    assert "a mug" not in " ".join(texts(no_text))
    # a missing modality looks like a withheld one
    assert prompts.item(ROW["no-image"]) == no_image
    assert [part._replace(row=red) if part.kind == "image" else part for part in prompts.item(ROW["no-text"])] == no_text


def test_the_prompt_never_shows_what_is_to_be_written(tiny: Setup) -> None:
    columns = set()
    for seed in range(40):
        for view in (View(True, True), View(True, False), View(False, True)):
            parts = tiny.prompts.knowledge(ROW["long"], view, np.random.default_rng(seed))
            answer = parts[-1]
            assert answer.kind == "answer"
            assert answer.text in (LONG, "glass")
            assert answer.text not in texts(parts)
            columns.add((view, answer.text))
    assert (View(True, False), LONG) in columns
    assert (View(True, True), "glass") in columns
    assert (View(True, True), LONG) not in columns


def test_views_to_be_pulled_together_are_only_those_the_item_has(tiny: Setup) -> None:
    pairs = [[tiny.prompts.pair(ROW[item], np.random.default_rng(seed)) for seed in range(30)] for item in ("red", "no-image", "no-text")]
    assert all(one != other for one, other in pairs[0])
    assert {one for pair in pairs[0] for one in pair} == {View(True, True), View(True, False), View(False, True)}
    assert all(one == other for item in pairs[1:] for one, other in item)


def test_a_teacher_is_the_same_backbone_with_other_weights_that_come_and_go(setup: Setup) -> None:
    """With LoRA only the adapters differ."""
    row, mllm = ROW["red"], setup.mllm
    parts = setup.prompts.knowledge(row, View(True, False), np.random.default_rng(0))
    batches = setup.processor.collate({"items": [setup.processor.encode(parts)]})
    heads = {"items": ["knowledge"]}
    student = {name: weight.detach().clone() for name, weight in trainable_state(mllm.backbone).items()}
    other = {name: weight + 0.02 for name, weight in student.items()}
    assert setup.config.backbone.lora is None or all("lora_" in name for name in other)

    def distribution(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        load_trainable(mllm.backbone, weights, "test")
        states = mllm.eval().hidden(batches)["items"][batches["items"]["answer_at"]]
        return mllm.backbone.get_output_embeddings()(states).log_softmax(-1)

    taught, written = distribution(other), distribution(student)
    expected = (taught.exp() * (taught - written)).sum()
    mllm.train()
    mllm.teacher = other
    try:
        out = mllm(batches, heads)
        out["items.divergence"].backward()
        torch.testing.assert_close(out["items.divergence"], expected, rtol=1e-4, atol=1e-5)
        assert expected > 1e-3
        assert same(trainable_state(mllm.backbone), student)
        assert any(w.grad is not None and w.grad.abs().sum() > 0 for w in trainable_state(mllm.backbone).values())
    finally:
        mllm.teacher = None
        mllm.zero_grad()
    assert "items.divergence" not in mllm(batches, heads)


# --- saving, loading, training


def test_a_saved_model_comes_back_exactly(setup: Setup, tmp_path: Path) -> None:
    with torch.no_grad():
        for weight in trainable_state(setup.mllm).values():
            weight.add_(0.01)
    facts = {"backbone": setup.config.backbone.model_dump(), "heads": list(setup.mllm.heads), "dim": 8}
    save_mllm(tmp_path, setup.mllm, setup.backbone, facts)
    again, backbone, settings = load_mllm(tmp_path)
    assert settings == facts | {"frozen_sha256": setup.backbone.frozen_sha256}
    assert same(setup.mllm.state_dict(), again.state_dict())
    processor = PromptProcessor(setup.config.backbone, backbone, setup.processor.catalog)
    sequences = [processor.encode(setup.prompts.item(row)) for row in ROW.values()]
    assert [s.ids for s in sequences] == [s.ids for s in setup.items(*ITEMS)]
    before = setup.features(setup.items(*ITEMS), 10_000)
    np.testing.assert_array_equal(embed(again.eval(), processor, sequences, ("knowledge",), 10_000, "cpu")["knowledge"], before)
    merged, _, _ = load_mllm(tmp_path, merge=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    np.testing.assert_allclose(embed(merged.eval(), processor, sequences, ("knowledge",), 10_000, "cpu")["knowledge"], before, atol=1e-5)


def test_weights_of_another_model_are_refused(tiny: Setup, tmp_path: Path) -> None:
    state = {name: weight.detach().clone() for name, weight in trainable_state(tiny.mllm).items()}
    for wrong in ({**state, "more": torch.zeros(1)}, dict(list(state.items())[1:]), {n: w.flatten()[:1] for n, w in state.items()}):
        with pytest.raises(UserError, match="do not fit") as error:
            load_trainable(tiny.mllm, wrong, "here")
        assert error.value.code == ARTIFACT
