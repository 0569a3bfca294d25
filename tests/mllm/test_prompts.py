"""Tests prompt templates: what an edited file changes, what it cannot change, and the errors for a wrong one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from helpers.processes import ROOT, contents
from helpers.runs import distill_run, export_run, published_folder, same, settings, weights
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.mllm.prompt_templates import Templates, load_templates
from pipeline.mllm.prompts import PromptPart, Prompts, View

OWN = 'instruction: "You know this shop."\nitem: "{text}, to be seen here: {image}"\ndescribe: "A product. {item}"\n'


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(OWN)
    return path


def refusal(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_templates(str(path))
    assert error.value.code == USAGE
    return str(error.value).replace(f"{tmp_path}/", "")


def test_the_shipped_file_is_the_built_in_wording() -> None:
    path = ROOT / "configs" / "prompts" / "default.yaml"
    assert load_templates(str(path)) == Templates()
    assert list(YAML(typ="safe").load(path)) == list(Templates.model_fields)


def test_an_item_and_a_session_are_worded_as_the_file_says(own: Path, tiny_data: Path) -> None:
    prompts = Prompts(load_catalog(tiny_data), settings(f"data.prompts={own}").data)
    begin = [PromptPart("words", "You know this shop.")]
    item = [PromptPart("text", prompts.text(3)), PromptPart("words", ", to be seen here:"), PromptPart("image", row=3)]
    assert prompts.item(3) == [*begin, PromptPart("words", "A product."), *item, PromptPart("turn"), PromptPart("read")]
    assert PromptPart("words", "no picture.") in prompts.item(3, View(image=False, text=True))
    assert prompts.session([3, 5])[:5] == [*begin, *item, PromptPart("words", "Next:")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'next: ""\nitem: "Item: {imge} {text}"',
            "`item` = 'Item: {imge} {text}': unknown placeholder {imge}, it takes {image} and {text} (mine.yaml:2)",
        ),
        ('item: "Item: {image}"', "`item` = 'Item: {image}': placeholder {text} is missing, it takes {image} and {text} (mine.yaml:1)"),
        ('item: "{image} {text} {image}"', "placeholder {image} is duplicated"),
        ('next: "{item!r} Next:"', "unknown placeholder {item!r}, it takes {item}"),
        ('next: "{item:>9} Next:"', "unknown placeholder {item:>9}"),
        ('no_image: "none of {item}"', "unknown placeholder {item}, it takes none"),
        ('no_text: "a { brace"', "write {{ or }} for a brace (mine.yaml:1)"),
        ('itm: "Item: {image} {text}"', "unknown key `itm` (mine.yaml:1); did you mean `item`?"),
        (
            'item: "{image}{text}"\nno_image: " "\nno_text: ""\nnext: "{item}"',
            "`next` has no words, nor have instruction, item, no_image, no_text: an item without image and text would be no prompt (mine",
        ),
        ("item: 3", "`item` = 3: input should be a valid string (mine.yaml:1)"),
    ],
)
def test_a_wrong_template_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, 'item: "{image}"\nknowledge: "{colum}:"\n')
    assert "(mine.yaml:1)" in message
    assert "unknown placeholder {colum}, it takes {column} (mine.yaml:2)" in message


def test_braces_and_names_in_braces_are_words_where_doubled(tmp_path: Path, tiny_data: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('no_image: "{{none}}"\nknowledge: "{{{column}}}"\n')
    prompts = Prompts(load_catalog(tiny_data), settings(f"data.prompts={path}").data)
    parts = prompts.item(0, View(image=False, text=True))
    assert "".join(part.text for part in parts[1:3]) == "{none}"


def test_editing_the_file_after_training_changes_no_export(own: Path, tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """An MLLM keeps the wording it was trained with; another wording needs another training."""
    run, setting = tmp_path / "run", f"data.prompts={own}"
    assert distill_run(run, tiny_data, setting)
    assert not same(weights(run), weights(tiny_run))
    other = Path(shutil.copytree(run, tmp_path / "other"))
    export_run(run, tiny_data, setting)
    exported = read_embeddings(run / "embeddings")
    assert exported.version.manifest["prompts"]["templates"] == load_templates(str(own)).model_dump()
    own.write_text(OWN.replace("product", "thing"))
    export_run(other, tiny_data, setting)
    assert contents(published_folder(other, "embeddings")) == contents(exported.version.path)
    with pytest.raises(UserError, match="other settings or data") as error:
        distill_run(run, tiny_data, setting)
    assert error.value.code == ARTIFACT
    own.unlink()
    export_run(run, tiny_data, setting)
    assert published_folder(run, "embeddings") == exported.version.path
    with pytest.raises(UserError, match=r"own\.yaml") as error:
        distill_run(run, tiny_data, setting)
    assert error.value.code == USAGE
    assert str(tmp_path) not in json.dumps(json.loads((published_folder(run, "mllm") / "mllm.json").read_text()))
