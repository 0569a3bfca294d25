"""The generated files say what the code says: settings in configs/shop.yaml and docs/configuration.md, options in docs/cli.md."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

from helpers.processes import ROOT
from pipeline.core.config import Config, LoraSettings
from pipeline.core.config_file import load_config
from pipeline.core.section import Section

GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


def sections(model: type[Section] = Config) -> Iterator[type[Section]]:
    yield model
    for field in model.model_fields.values():
        if section := GENERATE["section_of"](field):
            yield from sections(section)


def test_the_generated_files_are_current() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in GENERATE["contents"]().items() if not path.exists() or path.read_text() != text]
    assert not stale, f"not current: {', '.join(stale)}; run `python docs/generate.py` and commit what it writes"


def test_every_setting_and_section_is_described_in_the_fields_words() -> None:
    for model in sections():
        texts = {name: field.description for name, field in model.model_fields.items() if not isinstance(field.default, Section)}
        for name, text in (texts | {"": model.__doc__}).items():
            assert text, f"{model.__name__}.{name} has no description"
            assert not re.search("picture|by heart", text), f"{model.__name__}.{name}: {text}"


def test_the_lora_adapters_of_the_sample_file_are_ready_to_be_switched_on(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "shop.yaml").read_text(encoding="utf-8")
    head, block, rest = re.split(r"^  lora: null\n((?:  #.*\n)+?)(?=  # nf4)", text, flags=re.MULTILINE)
    path = tmp_path / "lora.yaml"
    path.write_text(head + re.sub("^  # ", "  ", block, flags=re.MULTILINE) + rest, encoding="utf-8")
    assert load_config(path).backbone.lora == LoraSettings()


def test_a_command_is_documented_with_the_options_it_takes() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    recommend = page.partition("## `tpad recommend`\n")[2].partition("\n## ")[0]
    for option in ("--session TEXT", "-k N", "--exclude-seen", "--json", "--filter COLUMN=VALUE", "--run PATH"):
        assert f"| `{option}` |" in recommend
    assert "tpad prepare --sessions PATH --out PATH [OPTIONS]" in page
