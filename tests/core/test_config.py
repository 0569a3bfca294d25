"""Tests settings: all mistakes are reported at once, with file, line and what to do; no value is read in a surprising way."""

from pathlib import Path

import pytest

from pipeline.core.config import Config
from pipeline.core.config_file import load_config, save_config
from pipeline.core.errors import USAGE, UserError
from pipeline.core.strict_yaml import MAX_BYTES


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> Config:
    path = tmp_path / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, list(overrides))


def refusal(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    """The message, with the file's path cut to its name."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert caught.value.code == USAGE
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_no_file_and_an_empty_file_give_the_defaults(tmp_path: Path) -> None:
    assert load_config() == load(tmp_path, "") == load(tmp_path, "# nothing yet\n") == Config()


def test_what_the_file_says_is_what_is_used(tmp_path: Path) -> None:
    config = load(tmp_path, "seed: 7\nsbr:\n  lr: 2e-3\n  epochs: 5\nbackbone:\n  lora: {rank: 4}\ndata:\n  text: [title]\n")
    assert (config.seed, config.sbr.lr, config.sbr.epochs, config.data.text) == (7, 0.002, 5, ["title"])
    assert config.backbone.lora is not None and config.backbone.lora.rank == 4
    assert config.sbr.batch == Config().sbr.batch and config.distill == Config().distill


def test_an_unknown_key_is_named_with_its_line_and_the_nearest_known_one(tmp_path: Path) -> None:
    text = "seed: 1\ndistill:\n  knowledge:\n    step: 3\n"
    assert refusal(tmp_path, text) == "unknown key `distill.knowledge.step` (my.yaml:4); did you mean `steps`?"
    assert refusal(tmp_path, "backbone:\n  lora:\n    rnk: 3") == "unknown key `backbone.lora.rnk` (my.yaml:3); did you mean `rank`?"
    assert refusal(tmp_path, "distil: {}") == "unknown key `distil` (my.yaml:1); did you mean `distill`?"
    assert "known here: seed, data, shop" in refusal(tmp_path, "qqqq: 1")
    assert "`sbr.epochs` (my.yaml:1)" in refusal(tmp_path, "sbr.epochs: 3")
    assert "`1`" in refusal(tmp_path, "1: 2")


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "seed: x\nsbr:\n  epoch: 3\n  lr: -1\nexport: {dtype: int4}\n", "data.valid=2", "shop.itms=3")
    for part in (
        "`seed` = 'x': input should be a valid integer (my.yaml:1)",
        "unknown key `sbr.epoch` (my.yaml:3); did you mean `epochs`?",
        "`sbr.lr` = -1: input should be greater than 0 (my.yaml:4)",
        "`export.dtype` = 'int4': input should be 'float32', 'float16' or 'int8' (my.yaml:5)",
        "`data.valid` = 2: input should be less than 1 (--set data.valid=2)",
        "unknown key `shop.itms` (--set shop.itms=3); did you mean `items`?",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1.0", "`seed` = 1.0: input should be a valid integer (my.yaml:1)"),
        ("seed: true", "`seed` = True: input should be a valid integer"),
        ("seed: '1'", "`seed` = '1': input should be a valid integer"),
        ("seed: -1", "`seed` = -1: input should be greater than or equal to 0"),
        ("seed: 99999999999999999999", "`seed` = 99999999999999999999: input should be less than"),
        ("seed: 0x10", "`seed` = '0x10'"),
        ("seed: 1_000", "`seed` = '1_000'"),
        ("sbr: {lr: true}", "`sbr.lr` = True: input should be a valid number"),
        ("sbr: {lr: 1e999}", "`sbr.lr` = inf: input should be a finite number"),
        ("sbr: {lr: .nan}", "`sbr.lr` = '.nan': input should be a valid number"),
        ("data: {text: title}", "`data.text` = 'title': input should be a valid list"),
        ("data: {text: [title, 3]}", "`data.text.1` = 3: input should be a valid string (my.yaml:1)"),
        ("data:\n  text:\n  - title\n  - 3\n", "`data.text.1` = 3: input should be a valid string (my.yaml:4)"),
        ("backbone: {gradient_checkpointing: 1}", "`backbone.gradient_checkpointing` = 1: input should be a valid boolean"),
        ("backbone: {lora: {targets: '('}}", "`backbone.lora.targets` = '(': value error, not a regular expression"),
        ("sbr: 3", "`sbr` = 3: input should be a valid dictionary"),
        ("shop: {items: 2}", "`shop.items` = 2: input should be greater than or equal to 20"),
        ("backbone: {tiny: {heads: 5}}", "dim = 128 is not a multiple of twice heads, 10"),
        ("backbone: {tiny: {merge: 3}}", "image_size = 48 is not a multiple of patch times merge, 36"),
        (
            "backbone: {dtype: bfloat16}",
            "`backbone.dtype` = 'bfloat16' with `backbone.lora` = None: every weight trains, and small steps are lost in it (my.yaml)",
        ),
        ("sbr: [" + "1, " * 10_000 + "1]", "`sbr` = [1, 1, 1,"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", ".001", "0.001", "1.e-3", "+1e-3", "10e-4"])
def test_numbers_are_read_as_people_write_them(tmp_path: Path, number: str) -> None:
    assert load(tmp_path, f"sbr: {{lr: {number}}}").sbr.lr == load(tmp_path, "", f"sbr.lr={number}").sbr.lr == 0.001


def test_weights_may_be_of_half_the_bytes_where_they_are_frozen(tmp_path: Path) -> None:
    half = "backbone: {dtype: bfloat16}"
    for more in ("backbone.lora.rank=2", "distill.variant=frozen"):
        assert load(tmp_path, half, more).backbone.dtype == "bfloat16"


def test_words_stay_words(tmp_path: Path) -> None:
    assert load(tmp_path, "data: {text: [no, on, yes, off, 2020-01-01, 12:30]}").data.text == [
        "no",
        "on",
        "yes",
        "off",
        "2020-01-01",
        "12:30",
    ]
    assert load(tmp_path, "backbone: {gradient_checkpointing: true, revision: null}").backbone.gradient_checkpointing is True
    assert (
        load(tmp_path, "sbr: {precision: no}").sbr.precision == load(tmp_path, "%YAML 1.1\n---\nsbr: {precision: no}").sbr.precision == "no"
    )
    assert "`backbone.gradient_checkpointing` = 'no'" in refusal(tmp_path, "backbone: {gradient_checkpointing: no}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nsbr: {}\nseed: 2\n", "key `seed` is duplicated (my.yaml:3)"),
        ("sbr:\n  lr: 1\n  lr: 2\n", "key `sbr.lr` is duplicated (my.yaml:3)"),
        ("sbr: {}\n'sbr': {lr: 1}\n", "key `sbr` is duplicated (my.yaml:2)"),
        ("seed: &a 1\n", "anchors and aliases are not supported (my.yaml:1)"),
        ("seed: 1\nsbr: *a\n", "anchors and aliases are not supported (my.yaml:2)"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n", "anchors and aliases are not supported (my.yaml:1)"),
        ("<<: {seed: 1}\n", "only plain keys are supported (my.yaml:1)"),
        ("? [a, b]\n: 1\n", "only plain keys are supported (my.yaml:1)"),
        ("seed: 1\nsbr: !!python/object/apply:os.system [true]\n", "tags are not supported (my.yaml:2)"),
        ("seed: !!float abc\n", "tags are not supported (my.yaml:1)"),
        ("sbr: {lr: [1}\n", "not valid YAML"),
        ("seed: 1\n\tsbr: 2\n", "(my.yaml:2)"),
        ("seed: 1\n---\nseed: 2\n", "not valid YAML: but found another document (my.yaml:2)"),
        ("- seed\n", "settings must be `key: value` pairs (my.yaml:1)"),
        ("just words", "settings must be `key: value` pairs (my.yaml:1)"),
        ("seed: 3\0", "not valid YAML"),
        ("seed: [1, 2", "not valid YAML"),
        ("%TAG ! tag:yaml.org,2002:\n---\nseed: !int 3\n", "tags are not supported (my.yaml:3)"),
        ("seed: " + "9" * 5000, "a number of too many digits (my.yaml:1)"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deep (my.yaml:1)"),
        ("{a: " * 5000 + "1" + "}" * 5000, "nested too deep (my.yaml:1)"),
        (b"seed: \xe9\n", "settings file is not UTF-8 text (my.yaml)"),
        ("seed: 1".encode("utf-16"), "settings file is not UTF-8 text (my.yaml)"),
        (b"#" * MAX_BYTES + b"\nseed: 1", "settings file is larger than 256 KB (my.yaml)"),
    ],
)
def test_yaml_that_could_be_misread_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_a_file_as_editors_save_it_is_read(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbfseed: 3\r\nsbr:\r\n  epochs: 4\r\n").sbr.epochs == 4
    assert load(tmp_path, "backbone: {name: modèle}").backbone.name == "modèle"
    assert load(tmp_path, "#" * (MAX_BYTES - 8) + "\nseed: 3").seed == 3


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory"), (Path("/dev/zero"), "larger than")]:
        with pytest.raises(UserError, match=message) as caught:
            load_config(path)
        assert caught.value.code == USAGE and str(path) in str(caught.value)


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    text = "sbr:\n  epochs: 5\n  lr: 1e-2\n"
    config = load(tmp_path, text, "sbr.epochs=6", "sbr.epochs=7", "data.text=[title, brand]", "backbone.lora.rank=2", "export.keep = 3")
    assert (config.sbr.epochs, config.sbr.lr, config.data.text, config.export.keep) == (7, 0.01, ["title", "brand"], 3)
    assert config.backbone.lora is not None and config.backbone.lora.rank == 2
    assert load(tmp_path, text, "sbr={epochs: 2}").sbr.lr == Config().sbr.lr
    assert load(tmp_path, "backbone: {lora: {rank: 2}}", "backbone.lora=null").backbone.lora is None
    assert load(tmp_path, "sbr:\n", "sbr.epochs=3").sbr.epochs == 3
    assert load_config(None, ["backbone.name=a=b"]).backbone.name == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sbr.epochs", "--set 'sbr.epochs' is not of the form a.b=value"),
        ("=3", "is not of the form"),
        ("sbr..epochs=3", "is not of the form"),
        ("sbr.epoch=3", "unknown key `sbr.epoch` (--set sbr.epoch=3); did you mean `epochs`?"),
        ("sbrr.epochs.x=3", "unknown key `sbrr` (--set sbrr.epochs.x=3); did you mean `sbr`?"),
        ("sbr.epochs=many", "`sbr.epochs` = 'many': input should be a valid integer (--set sbr.epochs=many)"),
        ("sbr.epochs=", "`sbr.epochs` = None"),
        ("seed.x=3", "`seed` holds a value, not a section (--set seed.x=3)"),
        ("sbr.epochs=[1", "not valid YAML"),
        ("sbr.epochs=&a 3", "anchors and aliases are not supported"),
        ("sbr={epochs: 1, epochs: 2}", "key `epochs` is duplicated (--set sbr={epochs: 1, epochs: 2}"),
        ("sbr={epoch: 1}", "unknown key `sbr.epoch` (--set sbr={epoch: 1})"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, "seed: 1\n", override)


def test_saved_settings_are_read_back_equal(tmp_path: Path) -> None:
    words = [
        "1e5",
        "12e4",
        "no",
        "true",
        "null",
        "007",
        "1_000",
        "é",
        "a: b",
        "",
        "1.5",
        "2020-01-01",
        "0x1f",
        "~",
        "=",
        "<<",
        "&a",
        "line\nbreak",
        "next\x85line",
        ".5",
        "word " * 99,
    ]
    text = load_config(None, ["sbr.lr=1e-7", "distill.critic.lr=12345678.5", "backbone.lora.rank=3"])
    config = text.model_copy(
        update={
            "data": text.data.model_copy(update={"text": words, "attributes": words}),
            "backbone": text.backbone.model_copy(update={"revision": "1234567e8"}),
        }
    )
    assert config.sbr.precision == "no"
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_settings_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().sbr.epochs = 3
