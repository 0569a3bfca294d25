"""Defines the ablations in one table: the parts that each leaves out, and two ways to publish K and T without alignment.

A variant overrides settings before anything is fingerprinted, and says which phases are run and which model is published. So phases that
two variants share are equal to the bit.
"""

import copy
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from peft.tuners.lora import LoraModel
from torch import Tensor

from pipeline.core.config import Config
from pipeline.core.distill_config import VariantName
from pipeline.data.embeddings import HALVES
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.item_vectors import VECTORS
from pipeline.mllm.model import Mllm, SideBySide, load_trainable, trainable_state

Weights = Mapping[str, dict[str, Tensor]]  # phase -> its trained weights, by `trainable_state`


class Variant(NamedTuple):
    settings: Mapping[str, Mapping[str, float]] = MappingProxyType({})  # phase -> key -> value, in place of the config's
    last: Literal["knowledge", "transfer", "align"] = "align"  # the last phase; its model is published,
    published: Literal["last", "merge", "side_by_side"] = "last"  # unless K and T are united without alignment
    frozen: bool = False  # only heads train


UNMASKED = {"withhold_text": 0.0, "withhold_image": 0.0}  # no modality withheld
VARIANTS: dict[VariantName, Variant] = {
    "full": Variant(),
    "no_generation": Variant(
        {
            "knowledge": {"generation": 0.0},
            "transfer": {"generation": 0.0, "intent": 0.0},
            "align": {"generation": 0.0, "token_distill": 0.0},
        }
    ),
    "no_disentangle": Variant({phase: {"disentangle": 0.0} for phase in ("transfer", "align")}),
    "no_view": Variant({"knowledge": {"view": 0.0}, "transfer": UNMASKED, "align": UNMASKED}),
    "no_relation": Variant({"align": {"relation": 0.0}}),
    "knowledge": Variant(last="knowledge"),  # K alone: vectors of one half, k(v)
    "transfer": Variant(last="transfer"),  # T alone: t(v)
    "side_by_side": Variant(last="transfer", published="side_by_side"),  # k(v) and t(v) in two passes: the cost that alignment saves
    "merge": Variant(last="transfer", published="merge"),
    "frozen": Variant(frozen=True),
    "closed_form": Variant({phase: {"steps": 0} for phase in ("knowledge", "transfer", "align")}, frozen=True),
}


# of a backbone of vectors: k(v) is the vectors' main directions, T trains heads on blocks, p(v) is its head for t(v)
WITHOUT_LAYERS: dict[str, dict[str, float]] = {"knowledge": {"steps": 0}, "transfer": {"sessions": 0}, "align": {"steps": 0}}


def varied(config: Config) -> Config:
    """Applies the settings of the config's variant, and those of a backbone without layers."""
    settings = {name: dict(update) for name, update in VARIANTS[config.distill.variant].settings.items()}
    if config.backbone.name == VECTORS:
        for name, update in WITHOUT_LAYERS.items():
            settings[name] = settings.get(name, {}) | update
    phases = {name: getattr(config.distill, name).model_copy(update=update) for name, update in settings.items()}
    return config.model_copy(update={"distill": config.distill.model_copy(update=phases)})


def side_by_side(backbone: Backbone, weights: Weights, dim: int) -> SideBySide:
    """Joins K, for k(v), and T, for t(v), each with its own weights."""
    halves = {}
    for half, phase in zip(HALVES, ("knowledge", "transfer"), strict=True):
        halves[half] = Mllm(copy.deepcopy(backbone.model), [half], dim)
        load_trainable(halves[half], {name: weights[phase][name] for name in trainable_state(halves[half])}, phase)
    return SideBySide(halves)


def merged(config: Config, backbone: Backbone, base: dict[str, Tensor], weights: Weights) -> tuple[Config, Mllm]:
    """Merges K and T: the base weights plus a weighted sum of what K and T have learned (NaiveMC, DAMC, arXiv 2402.12750).

    k(v) comes from K's head, p(v) from T's. The two adapters become one of another rank, which the returned config has.
    """
    shares = {"knowledge": config.distill.merge.knowledge, "transfer": config.distill.merge.transfer}
    state: dict[str, Tensor] = {}
    if config.backbone.lora is None:
        for name, start in base.items():
            state[name] = start + sum(share * (weights[phase][name].to(start.device) - start) for phase, share in shares.items())
    else:
        rank = _merge_adapters(backbone.model, weights, shares, config.distill.merge.method)
        lora = config.backbone.lora.model_copy(update={"rank": rank, "alpha": rank})  # the scale is in the factors
        config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"lora": lora})})
    mllm = Mllm(backbone.model, HALVES, config.distill.dim)
    initial = trainable_state(mllm)
    for half, phase in zip(HALVES, shares, strict=True):
        state |= {name: weights[phase][name] for name in initial if name.startswith(f"heads.{half}.")}
    load_trainable(mllm, {name: state.get(name, initial[name].detach()) for name in initial}, "merge")
    return config, mllm


def _merge_adapters(model: Any, weights: Weights, shares: dict[str, float], method: str) -> int:
    """Replaces the model's adapter by the weighted sum of those in `weights`. Returns its rank."""
    settings = model.peft_config["default"]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of peft, about several adapters at once
        for phase in shares:
            tuner = LoraModel(model, copy.deepcopy(settings), phase)
            adapter = {name: p for name, p in model.named_parameters() if f".{phase}." in name}
            for name, parameter in adapter.items():
                parameter.data.copy_(weights[phase]["backbone." + name.replace(f".{phase}.", ".default.")])
        tuner.delete_adapter("default")
        tuner.add_weighted_adapter(list(shares), list(shares.values()), "default", combination_type=method)
        for phase in shares:
            tuner.delete_adapter(phase)
        tuner.set_adapter("default")
    return int(tuner.peft_config["default"].r)
