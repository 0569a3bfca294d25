"""Searches the settings of every model with optuna, on validation alone: `tpad train-sbr --search N`.

Each model of `sbr.models`, and each baseline of counts with settings, has its own study with the same number of trials and the same limit
of time, so that none is at a disadvantage. The first trial has the settings of the config, or a baseline's defaults; later ones are drawn
by TPE (Bergstra et al., NeurIPS 2011) from a seed and the earlier trials, and stopped after an epoch below the median of theirs. Studies
are stored in `sbr-train/search.db`: a killed search resumes its current trial at the last checkpoint, and a greater N adds trials. A study
is valid for one set of data and of initial settings. The best settings are written to `sbr-train/search.json`.
"""

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from pipeline.core.artifact import decoding
from pipeline.core.config import Config, SbrConfig
from pipeline.core.errors import ARTIFACT, ENVIRONMENT, UserError, note
from pipeline.core.files import canonical_json, read_sealed, remove, write_sealed
from recommender.baselines.registry import BASELINES, MODELS, build_baseline, chosen
from recommender.metrics.evaluator import baseline_ranks
from recommender.metrics.ranks import summarise
from recommender.session_model.windows import Windows
from recommender.training.dataset import TrainingData, model_fingerprint
from recommender.training.loss_log import Diverged
from recommender.training.trainer import train_model

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

SEAL = "sha256"  # user attribute of a trial
FOUND, STUDIES = "search.json", "search.db"  # in `sbr-train`
DECAYS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def space(name: str, settings: SbrConfig) -> "dict[str, BaseDistribution]":
    """Returns the search space of a model or a baseline: that of a model is around its initial `settings`, which lie inside."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if name in BASELINES:
        return {key: CategoricalDistribution(values) for key, values in BASELINES[name].space.items()}
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
        valid = name in best and best[name]["holds_for"] == holds_for(name, config, inputs)
        settings[name] = with_settings(config, best[name]["settings"] if valid else {})
    return settings


def baseline_settings(names: Iterable[str], config: Config, inputs: TrainingData, run: Path) -> dict[str, dict[str, float]]:
    """Returns the settings of each of these baselines that a search in this run found on the same data; empty: its defaults."""
    best = read_best(run / "sbr-train")
    return {
        name: best[name]["settings"] if name in best and best[name]["holds_for"] == holds_for(name, config, inputs) else {}
        for name in names
    }


def baseline_fingerprint(name: str, settings: Mapping[str, float], inputs: TrainingData) -> str:
    """Returns a hash of everything that a baseline depends on."""
    return hashlib.sha256(canonical_json([name, dict(settings), inputs.fingerprint])).hexdigest()


def holds_for(name: str, config: Config, inputs: TrainingData) -> str:
    """Returns a hash of what a search of a model or a baseline is valid for."""
    if name in BASELINES:
        return baseline_fingerprint(name, {}, inputs)
    return model_fingerprint(name, config.seed, config, inputs)


def budget(names: Iterable[str], config: Config, inputs: TrainingData, run: Path) -> dict[str, dict[str, Any]]:
    """Returns for each of these models and baselines with settings from a search its trials, seconds and limit in minutes (None: none)."""
    best = read_best(run / "sbr-train")
    keys = ("trials", "seconds", "minutes")
    valid = [name for name in names if name in best and best[name]["holds_for"] == holds_for(name, config, inputs)]
    return {name: {key: best[name].get(key) for key in keys} for name in valid}


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
    config: Config,
    inputs: TrainingData,
    windows: tuple[Windows, Windows],
    accelerator: Accelerator,
    run: Path,
    trials: int,
    minutes: float | None = None,
) -> None:
    """Runs `trials` trials of each model and baseline, minus those that are finished, and writes the best settings to `search.json`.

    `minutes`: limit of the time of each model or baseline, over all its trials; the one during which it runs out ends after its epoch and
    counts as it stands, and the first always counts. None: no limit."""
    folder = run / "sbr-train"
    for name in [*(name for name, baseline in BASELINES.items() if baseline.space), *chosen(config.sbr.models)]:
        of_data = holds_for(name, config, inputs)
        study = open_study(name, of_data, folder) if accelerator.is_main_process else None
        while _agree(None if study is None else len(finished(study)) < trials and seconds_left(study, minutes) > 0):
            one_trial(study, name, config, inputs, windows, accelerator, folder / "trials", minutes)
        if study is not None:
            best, done = study.best_trial, finished(study)
            pruned = sum(trial.state.name == "PRUNED" for trial in done)
            entry = {"trials": len(done), "stopped_early": pruned, config.sbr.select: best.value}
            entry |= {"settings": best.params, "holds_for": of_data, "seconds": seconds_of(study), "minutes": minutes}
            write_sealed(folder / FOUND, read_best(folder) | {name: entry})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in best.params.items())
            summary = f"validation {config.sbr.select} {best.value:.4f}, the best of {len(done)} trials, {pruned} of them stopped early"
            print(f"{name}: {summary}, {seconds_of(study):.0f} s: {shown}")
    if accelerator.is_main_process:
        remove(folder / "trials")  # checkpoints of abandoned studies
    accelerator.wait_for_everyone()


def seconds_of(study: "Study") -> float:
    """Returns the seconds of the finished trials of a study."""
    return float(sum(trial.user_attrs.get("seconds", 0.0) for trial in finished(study)))


def seconds_left(study: "Study", minutes: float | None) -> float:
    """Returns the seconds that a study has left. The first trial has as long as it takes."""
    return math.inf if minutes is None or not finished(study) else 60 * minutes - seconds_of(study)


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
    numbers = {key: float(number) for key, number in drawn.items()}  # 1 may come back as 1.0
    return hashlib.sha256(canonical_json([numbers, list(scores), None if value is None else float(value)])).hexdigest()


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
    minutes: float | None,
) -> None:
    """Runs the next trial of the study, which only the main process holds. A training that diverges scores 0."""
    began, left = time.monotonic(), math.inf
    trial, drawn = None, {}
    if study is not None:
        left = seconds_left(study, minutes)
        trial = next_trial(study, name, config)
        drawn = trial.params
    drawn = _agree(drawn)
    scores: list[float] = []
    value: float | None = None
    if name not in BASELINES:
        changed = with_settings(config, drawn)
        folder = folder / f"{name}-{model_fingerprint(name, config.seed, changed, inputs)[:16]}"
        value, scores = train_trial(trial, name, changed, inputs, windows, accelerator, folder, began + left)
    elif study is not None:
        scorer = build_baseline(name, inputs.split.train, len(inputs.counts), drawn)
        value = summarise(baseline_ranks(scorer, windows[1], available=inputs.available_in_validation))[config.sbr.select]
    accelerator.wait_for_everyone()
    if study is not None and trial is not None:
        end_trial(study, trial, drawn, scores, value, began)
        if name not in BASELINES:
            remove(folder)


def next_trial(study: "Study", name: str, config: Config) -> "Trial":
    """Draws the settings of the next trial; those of the config come first."""
    from optuna.samplers import TPESampler

    around, number = space(name, config.sbr), len(finished(study))
    study.sampler = TPESampler(seed=config.seed + number)  # the draw depends only on the earlier trials
    if number == 0:
        study.enqueue_trial(BASELINES[name].defaults if name in BASELINES else {key: getattr(config.sbr, key) for key in around})
    trial = study.ask(around)
    note(f"{name}: trial {number + 1}, {', '.join(f'{key} {value:.4g}' for key, value in trial.params.items())}")
    return trial


def train_trial(
    trial: "Trial | None",
    name: str,
    config: Config,
    inputs: TrainingData,
    windows: tuple[Windows, Windows],
    accelerator: Accelerator,
    folder: Path,
    until: float,
) -> tuple[float | None, list[float]]:
    """Trains a model with the settings of a trial, until `until` (monotonic seconds). Returns its best score, 0 for a training that
    diverges and None for one that was stopped early, and the scores of its epochs."""
    from optuna import TrialPruned

    reported: list[float] = []

    class OutOfTime(Exception):
        pass

    def watch(scores: list[float]) -> None:
        stop, late = False, time.monotonic() > until
        if trial is not None:
            for step in range(len(reported), len(scores)):
                trial.report(scores[step], step)
            stop = trial.should_prune()
        reported[:] = scores
        stop, late = _agree((stop, late))
        if stop:
            raise TrialPruned
        if late:
            raise OutOfTime

    try:
        with suppress(OutOfTime):
            train_model(name, config.seed, config, inputs, windows, accelerator, folder, False, watch)
        return max(reported), reported
    except TrialPruned:
        return None, reported
    except Diverged as reason:
        if accelerator.is_main_process:
            note(f"{name}: {reason}; the trial counts as 0")
        return 0.0, reported
    finally:
        accelerator.free_memory()  # it keeps a reference to every prepared model


def end_trial(study: "Study", trial: "Trial", drawn: dict[str, Any], scores: list[float], value: float | None, began: float) -> None:
    """Stores the result of a trial, its seconds and its hash. `value` None: it was stopped early."""
    from optuna.trial import TrialState

    trial.set_user_attr("seconds", time.monotonic() - began)
    told = value if value is not None else scores[-1] if scores else None  # of a pruned trial optuna takes its last
    trial.set_user_attr(SEAL, seal_of(drawn, scores, told))
    study.tell(trial, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)


def _agree(value: Any) -> Any:
    """Returns the value of the main process in every process."""
    return broadcast_object_list([value])[0]
