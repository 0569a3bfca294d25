"""Searches the settings of every model with optuna, on validation alone: `tpad train-sbr --search N`.

Each model of `sbr.models` has its own study with the same number of trials, so that no baseline is at a disadvantage. The first trial
has the settings of the config; later ones are drawn by TPE (Bergstra et al., NeurIPS 2011) from a seed and the earlier trials, and
stopped after an epoch below the median of theirs. Studies are stored in `sbr-train/search.db`: a killed search resumes its current
trial at the last checkpoint, and a greater N adds trials. A study is valid for one set of data and of initial settings. The best
settings are written to `sbr-train/search.json`.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.core.artifact import decoding
from pipeline.core.config import Config, SbrConfig
from pipeline.core.errors import ARTIFACT, ENVIRONMENT, UserError, note
from pipeline.core.files import canonical_json, read_sealed, remove, write_sealed
from recommender.baselines.registry import MODELS, chosen
from recommender.session_model.windows import Windows
from recommender.training.dataset import TrainingData, model_fingerprint
from recommender.training.loss_log import Diverged
from recommender.training.trainer import train_model

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution

SEAL = "sha256"  # user attribute of a trial
FOUND, STUDIES = "search.json", "search.db"  # in `sbr-train`
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def space(name: str, settings: SbrConfig) -> "dict[str, BaseDistribution]":
    """Returns the search space of a model, around its initial `settings`, which lie inside."""
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
    """Returns the config of each of these models, with the settings of a search in this run on the same data and config, if any."""
    best = read_best(run / "sbr-train")
    settings = {}
    for name in names:
        valid = name in best and best[name]["holds_for"] == model_fingerprint(name, config.seed, config, inputs)
        settings[name] = with_settings(config, best[name]["settings"] if valid else {})
    return settings


def with_settings(config: Config, drawn: Mapping[str, Any]) -> Config:
    """Returns a copy of the config with other `sbr` settings."""
    return config.model_copy(update={"sbr": config.sbr.model_copy(update=drawn)})


def read_best(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads search.json; empty without it. Raises `UserError` (4)."""
    try:
        best = read_sealed(folder / FOUND)
        return {name: {"settings": dict(entry["settings"]), "holds_for": entry["holds_for"]} | entry for name, entry in best.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"not the result of a search ({folder / FOUND}); delete it, or search again with --fresh", ARTIFACT) from None


def forget(run: Path) -> None:
    """Deletes the studies and the best settings of a run."""
    for name in (FOUND, STUDIES, "trials"):
        remove(run / "sbr-train" / name)


def need_optuna() -> None:
    """Checks that optuna is installed. Raises `UserError` (5)."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("optuna is not installed (tpad train-sbr --search); pip install '.[search]'", ENVIRONMENT) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def search(
    config: Config, inputs: TrainingData, windows: tuple[Windows, Windows], accelerator: Accelerator, run: Path, trials: int
) -> None:
    """Runs `trials` trials of each model, minus those that are finished, and writes the best settings to `search.json`."""
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
            write_sealed(folder / FOUND, read_best(folder) | {name: entry})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in best.params.items())
            summary = f"validation {config.sbr.select} {best.value:.4f}, the best of {len(done)} trials, {pruned} of them stopped early"
            print(f"{name}: {summary}: {shown}")
    if accelerator.is_main_process:
        remove(folder / "trials")  # checkpoints of abandoned studies
    accelerator.wait_for_everyone()


def open_study(name: str, holds_for: str, folder: Path) -> "Study":
    """Opens or creates a study; the trial that a kill cut short is discarded, and drawn again."""
    import optuna

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STUDIES
    with decoding(path, "run `tpad train-sbr --search` with --fresh"):
        if path.exists() and not path.is_file():
            raise ValueError("not a plain file")
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0)
        label = f"{name} {holds_for}"
        study = optuna.create_study(study_name=label, storage=storage, pruner=pruner, direction="maximize", load_if_exists=True)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # cut short by a kill
        for trial in finished(study):
            if trial.user_attrs.get(SEAL) != seal_of(trial.params, list(trial.intermediate_values.values()), trial.value):
                raise ValueError(f"trial {trial.number} is not as written")
    return study


def seal_of(drawn: Mapping[str, Any], scores: Sequence[float], value: float | None) -> str:
    """Hashes a trial: SQLite finds damage in its structure, but not in a number."""
    return hashlib.sha256(canonical_json([dict(drawn), list(scores), value])).hexdigest()


def finished(study: "Study") -> list[Any]:
    """Returns the trials of a study that ended, early or not."""
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
    """Runs the next trial of the study, which only the main process holds. A training that diverges scores 0."""
    import optuna

    drawn: dict[str, Any] = {}
    if study is not None:
        around, number = space(name, config.sbr), len(finished(study))
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + number)  # the draw depends only on the earlier trials
        if number == 0:
            study.enqueue_trial({key: getattr(config.sbr, key) for key in around})
        trial = study.ask(around)
        drawn = trial.params
        print(f"{name}: trial {number + 1}, {', '.join(f'{key} {value:.4g}' for key, value in drawn.items())}", file=sys.stderr)
    drawn = _agree(drawn)
    reported: list[float] = []

    def watch(scores: list[float]) -> None:
        stop = False
        if study is not None:
            for step in range(len(reported), len(scores)):
                trial.report(scores[step], step)
            stop = trial.should_prune()
        reported[:] = scores
        if _agree(stop):
            raise optuna.TrialPruned

    changed = with_settings(config, drawn)
    trial_folder = folder / f"{name}-{model_fingerprint(name, config.seed, changed, inputs)[:16]}"
    state, value = optuna.trial.TrialState.COMPLETE, 0.0
    try:
        train_model(name, config.seed, changed, inputs, windows, accelerator, trial_folder, False, watch)
        value = max(reported)
    except optuna.TrialPruned:
        state = optuna.trial.TrialState.PRUNED
    except Diverged as reason:
        if accelerator.is_main_process:
            note(f"{name}: {reason}; the trial counts as 0")
    accelerator.free_memory()  # it keeps a reference to every prepared model
    accelerator.wait_for_everyone()
    if study is not None:
        told = value if state.name == "COMPLETE" else reported[-1] if reported else None  # of a pruned trial optuna takes its last
        trial.set_user_attr(SEAL, seal_of(drawn, reported, told))
        study.tell(trial, value if state.name == "COMPLETE" else None, state=state)
        remove(trial_folder)


def _agree(value: Any) -> Any:
    """Returns the value of the main process in every process."""
    return broadcast_object_list([value])[0]
