"""`tpad train-sbr --search N`: the settings of every model by optuna, judged on validation alone; the test is never looked at.

Each model of `sbr.models` has a study of its own with the same number of trials, so that no baseline is held back. The first
trial has the settings of the config; the later ones are drawn by TPE (Bergstra et al., NeurIPS 2011) from a seed and the
trials before, and stopped after an epoch that is below the median of theirs. Studies are kept in `sbr-train/search.db`: a
search that was killed goes on with the trial in hand, at its last checkpoint, and a greater N adds to the trials there are.
They hold for one set of inputs and of settings that are searched from. What was found best stands in `sbr-train/search.json`.
"""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.core.config import Config, SbrConfig
from pipeline.core.errors import ARTIFACT, ENVIRONMENT, UserError
from pipeline.core.files import remove, write_json
from recommender.baselines.registry import MODELS, chosen
from recommender.session_model.windows import Windows
from recommender.training.dataset import TrainingData, model_fingerprint
from recommender.training.loss_log import Diverged
from recommender.training.trainer import train_model

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

FOUND, STUDIES = "search.json", "search.db"  # in `sbr-train`
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def space(name: str, settings: SbrConfig) -> "dict[str, BaseDistribution]":
    """What is searched for a model: around the `settings` it starts from, which lie inside."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    recipe = MODELS[name]
    shares = ["dropout"] if recipe.encoder is not None else ["id_dropout"] * (recipe.content and recipe.ids)
    decay = {"content_decay": FloatDistribution(0.0, max(2.0, settings.content_decay))} if recipe.content else {}
    return {
        "lr": FloatDistribution(settings.lr / 10, settings.lr * 4, log=True),
        "weight_decay": CategoricalDistribution(sorted({*DECAYS, settings.weight_decay})),
        "epochs": IntDistribution(math.ceil(settings.epochs / 2), settings.epochs),
        **{key: CategoricalDistribution(_around(getattr(settings, key))) for key in ("dim", "batch")},
        **{key: FloatDistribution(0.0, max(0.5, getattr(settings, key))) for key in shares},
        **decay,
    }


def _around(size: int) -> list[int]:
    return sorted({max(1, size // 2), size, 2 * size})


def settings_for(names: list[str], config: Config, inputs: TrainingData, run: Path) -> dict[str, Config]:
    """The config of each of these models, with the settings that a search in this run has found, from the same inputs and config."""
    found = read_found(run / "sbr-train")
    settings = {}
    for name in names:
        holds = name in found and found[name]["holds_for"] == model_fingerprint(name, config.seed, config, inputs)
        settings[name] = with_settings(config, found[name]["settings"] if holds else {})
    return settings


def with_settings(config: Config, drawn: Mapping[str, Any]) -> Config:
    return config.model_copy(update={"sbr": config.sbr.model_copy(update=drawn)})


def read_found(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads((folder / FOUND).read_bytes())
        return {name: {"settings": dict(entry["settings"]), "holds_for": entry["holds_for"]} | entry for name, entry in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"not what a search has found ({folder / FOUND}); delete it, or search again with --fresh", ARTIFACT) from None


def forget(run: Path) -> None:
    for name in (FOUND, STUDIES, "trials"):
        remove(run / "sbr-train" / name)


def need_optuna() -> None:
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("optuna is not installed (tpad train-sbr --search); pip install '.[search]'", ENVIRONMENT) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def search(
    config: Config, inputs: TrainingData, windows: tuple[Windows, Windows], accelerator: Accelerator, run: Path, trials: int
) -> None:
    """So many trials of each model, less those that are done, and their best in `search.json`."""
    folder = run / "sbr-train"
    for name in chosen(config.sbr.models):
        holds_for = model_fingerprint(name, config.seed, config, inputs)
        study = open_study(name, holds_for, folder) if accelerator.is_main_process else None
        while _agree(None if study is None else len(finished(study))) < trials:
            one_trial(study, name, config, inputs, windows, accelerator, folder / "trials")
        if study is not None:
            best, done = study.best_trial, finished(study)
            pruned = sum(trial.state.name == "PRUNED" for trial in done)
            entry = {"trials": len(done), "stopped_early": pruned, config.sbr.select: best.value}
            entry |= {"settings": best.params, "holds_for": holds_for}
            write_json(folder / FOUND, read_found(folder) | {name: entry})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in best.params.items())
            told = f"validation {config.sbr.select} {best.value:.4f}, the best of {len(done)} trials, {pruned} of them stopped early"
            print(f"{name}: {told}: {shown}")
    if accelerator.is_main_process:
        remove(folder / "trials")  # those of a study that was given up
    accelerator.wait_for_everyone()


def open_study(name: str, holds_for: str, folder: Path) -> "Study":
    import optuna

    folder.mkdir(parents=True, exist_ok=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDIES).resolve()}")
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0)
    study = optuna.create_study(study_name=f"{name} {holds_for}", storage=storage, pruner=pruner, direction="maximize", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # a kill cut it short: it is drawn again
    return study


def finished(study: "Study") -> list[Any]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in ("COMPLETE", "PRUNED")]


def one_trial(
    study: "Study | None",
    name: str,
    config: Config,
    inputs: TrainingData,
    windows: tuple[Windows, Windows],
    accelerator: Accelerator,
    folder: Path,
) -> None:
    """The next trial of the study, which the main process has. A training that diverges has a score of 0."""
    import optuna

    drawn: dict[str, Any] = {}
    if study is not None:
        around, number = space(name, config.sbr), len(finished(study))
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + number)  # the draw depends on the trials before alone
        if number == 0:
            study.enqueue_trial({key: getattr(config.sbr, key) for key in around})
        trial = study.ask(around)
        drawn = trial.params
        print(f"{name}: trial {number + 1}, {', '.join(f'{key} {value:.4g}' for key, value in drawn.items())}", file=sys.stderr)
    drawn = _agree(drawn)
    told: list[float] = []

    def watch(scores: list[float]) -> None:
        stop = False
        if study is not None:
            for step in range(len(told), len(scores)):
                trial.report(scores[step], step)
            stop = trial.should_prune()
        told[:] = scores
        if _agree(stop):
            raise optuna.TrialPruned

    changed = with_settings(config, drawn)
    own = folder / f"{name}-{model_fingerprint(name, config.seed, changed, inputs)[:16]}"
    state, value = optuna.trial.TrialState.COMPLETE, 0.0
    try:
        train_model(name, config.seed, changed, inputs, windows, accelerator, own, False, watch)
        value = max(told)
    except optuna.TrialPruned:
        state = optuna.trial.TrialState.PRUNED
    except Diverged as reason:
        if accelerator.is_main_process:
            print(f"{name}: {reason}; the trial counts as 0", file=sys.stderr)
    accelerator.free_memory()  # it holds on to every model it has prepared
    accelerator.wait_for_everyone()
    if study is not None:
        study.tell(trial, value if state.name == "COMPLETE" else None, state=state)
        remove(own)


def _agree(value: Any) -> Any:
    """What the main process has, in every process."""
    return broadcast_object_list([value])[0]
