"""Settings chosen on held-out rows by successive halving: many trials begin, and the better ones go on.

After its first, third, ninth (and so on) epoch a trial is compared with what the others had at the same epoch, and one
that is not among the best third is given up (Optuna's SuccessiveHalvingPruner). The rows that a job is reported on are
not looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.run import make_job, run_job
from reft_kernels.jobs.run_folder import model_source, read_log, write_atomically
from reft_kernels.jobs.search_space import Space
from reft_kernels.jobs.trainer_arguments import RunOptions
from reft_kernels.recipes.settings import JobSettings
from reft_kernels.training.markdown import cell

if TYPE_CHECKING:
    import optuna

REDUCTION = 3
# What a trial is marked with, the machine and the process that run it, and a study with the trials cut short.
PROCESS, INTERRUPTED = "process", "interrupted"
JOURNAL_FILE, RESULTS_FILE, TABLE_FILE, BEST_FILE = "trials.log", "search.json", "search.md", "best.json"


def search(
    settings: JobSettings,
    space: Space,
    options: RunOptions,
    *,
    trials: int,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run trials until there are so many in the folder, and write `search.json`, `search.md` and `best.json`, a recipe.

    A search that was stopped goes on where it was. Adapters of trials are not kept.

    Args:
        settings: of every trial, where the space does not say otherwise.
        options: its output is the search's folder.
        trials: how many are to be finished or given up, those of earlier runs included.
        seconds: begin no trial after so long.

    Raises UserError naming the option, where optuna is missing, and where no trial was finished.
    """
    with user_errors("search needs the package optuna", (ImportError,)):
        import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if settings.held_out == "none":
        with user_errors("settings"):
            settings = settings.changed({"held_out": "share:0.1"})
    metric, more_is_better = make_job(settings).best
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    _check_same_search(folder, settings, space, options)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL_FILE)))
    study = optuna.create_study(
        study_name="search",
        storage=storage,
        load_if_exists=True,
        direction="maximize" if more_is_better else "minimize",
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION),
    )
    # One that goes on must not draw again what it drew before.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.trials))
    _take_over(study, folder)
    begin = time.perf_counter()
    while (number := len(_ended(study))) < trials:
        if seconds is not None and time.perf_counter() - begin > seconds:
            break
        # Of the trial's number, so that a search that goes on does not draw again what it began with.
        study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.get_trials(deepcopy=False)))
        trial = study.ask()
        trial.set_user_attr(PROCESS, [socket.gethostname(), os.getpid()])
        chosen = {name: part.suggest(trial, name) for name, part in space.items()}
        say(f"[{number + 1}/{trials}] " + ", ".join(f"{name} {value}" for name, value in chosen.items()))
        here = replace(options, output=folder / f"trial-{trial.number}")
        try:
            _run_trial(study, trial, settings, chosen, here, metric, say)
        except KeyboardInterrupt:
            _interrupt(study, trial.number, chosen)
            raise KeyboardInterrupt(f"{number} of {trials} trials are done; the same command goes on") from None
        results = summary(study, metric, settings)
        write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
        write_atomically(folder / TABLE_FILE, table(results))
    results = summary(study, metric, settings)
    finished = [entry for entry in results["trials"] if entry["state"] == "complete"]
    if not finished:
        failed = [entry["message"] for entry in results["trials"] if entry.get("message")]
        raise UserError("no trial was finished" + (f"; the first failed: {failed[0]}" if failed else ""))
    best = best_trial(finished, 1 if more_is_better else -1)
    values = {**settings.as_dict(), **best["settings"]}
    entry = {"title": f"The best of {len(results['trials'])} trials: {metric} {best['value']:.4f}", "settings": values}
    write_atomically(folder / BEST_FILE, json.dumps({"recipes": {"best": entry}}, indent=1) + "\n")
    return results


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that need not be run any more."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    interrupted = study.user_attrs.get(INTERRUPTED, ())
    return [trial for trial in study.get_trials(states=states) if trial.number not in interrupted]


def _interrupt(study: optuna.Study, number: int, chosen: Mapping[str, Any]) -> None:
    """Ends a trial that was cut short; its settings are tried again."""
    from optuna.trial import TrialState

    study.set_user_attr(INTERRUPTED, [*study.user_attrs.get(INTERRUPTED, ()), number])
    study.tell(number, state=TrialState.FAIL)
    study.enqueue_trial(dict(chosen))


def _take_over(study: optuna.Study, folder: Path) -> None:
    """Ends the trials of processes of this machine that have been killed. Those of others may be going on."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        host, process = trial.user_attrs.get(PROCESS, (None, 0))
        if host == socket.gethostname() and not _is_alive(process):
            _interrupt(study, trial.number, trial.params)
            shutil.rmtree(folder / f"trial-{trial.number}", ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _run_trial(
    study: optuna.Study, trial: optuna.Trial, settings: JobSettings, chosen: Mapping[str, Any], options: RunOptions,
    metric: str, say: Callable[[str], None],
) -> None:  # fmt: skip
    import optuna

    state = optuna.trial.TrialState
    quiet = replace(options, save_steps=0, report=False, progress=False, overwrite=options.output.exists())
    watcher = _watcher(trial, metric)
    try:
        try:
            log = run_job(settings.changed(chosen), quiet, callbacks=[watcher], evaluate=False, say=_unsaid)
            if watcher.value is None:
                raise UserError(f"held-out rows gave no {metric}")
        except optuna.TrialPruned:
            say(f"  given up after {watcher.epochs} epochs, {metric} {watcher.value:.4f}")
            study.tell(trial, state=state.PRUNED)
            return
        except (UserError, ValueError) as error:
            say(f"  failed: {error}")
            trial.set_user_attr("message", str(error))
            study.tell(trial, state=state.FAIL)
            return
        for name in ("ms_per_step", "seconds", "peak_memory_gib"):
            trial.set_user_attr(name, log.get(name))
        trial.set_user_attr("parameters", log["parameters"]["trained"] - log["parameters"]["head"])
        value = watcher.value
        if log["settings"]["best_epoch"]:  # which the adapter would be of
            value = (max if study.direction.name == "MAXIMIZE" else min)(watcher.values)
        study.tell(trial, value)
        say(f"  {metric} {value:.4f}, {log['parameters']['trained']:,} parameters, {log['seconds']:.0f} s")
    finally:
        shutil.rmtree(options.output, ignore_errors=True)


def _unsaid(line: str) -> None:
    del line


def _watcher(trial: optuna.Trial, metric: str) -> Any:
    import optuna
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Reports a trial's metric after every epoch, and gives it up where the study says so."""

        epochs = 0
        value: float | None = None

        def __init__(self) -> None:
            self.values: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is None or metric not in logs:
                return
            self.epochs = max(1, round(state.epoch))
            self.value = float(logs[metric])
            self.values.append(self.value)
            trial.report(self.value, self.epochs)
            if state.global_step < state.max_steps and trial.should_prune():
                raise optuna.TrialPruned

    return Watcher()


def _check_same_search(folder: Path, settings: JobSettings, space: Space, options: RunOptions) -> None:
    """Raises UserError where the folder's trials are of another model, of other settings or of another space."""
    own = {
        "settings": {**settings.as_dict(), "model": model_source(options.model), "dtype": options.dtype},
        "space": {name: repr(part) for name, part in space.items()},
    }
    path = folder / "search_settings.json"
    if not path.is_file():
        if any(folder.iterdir()):
            raise UserError(f"--output {folder}: the folder is in use, and holds no search to go on with")
        write_atomically(path, json.dumps(own, indent=1) + "\n")
        return
    if read_log(path) != own:
        raise UserError(
            f"--output {folder}: holds a search of another model, other settings or another space; name another folder"
        )


def summary(study: optuna.Study, metric: str, settings: JobSettings) -> dict[str, Any]:
    """Every trial with its settings, its value and its cost, and which of them no other beats in both."""
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value if trial.value is not None else _last(trial.intermediate_values),
            "epochs": max(trial.intermediate_values, default=0),
            "settings": dict(trial.params),
            **{name: value for name, value in trial.user_attrs.items() if name != PROCESS},
        }
        for trial in _ended(study)
    ]
    sign = 1 if study.direction.name == "MAXIMIZE" else -1
    finished = [entry for entry in trials if entry["state"] == "complete"]
    return {
        "metric": metric,
        "more_is_better": sign == 1,
        "trials": trials,
        "frontier": {cost: frontier(finished, cost, sign) for cost in ("parameters", "ms_per_step")},
        "settings": settings.as_dict(),
    }


def frontier(trials: Sequence[Mapping[str, Any]], cost: str, sign: int) -> list[int]:
    """Numbers of the trials that no other one beats: none is as good and cheaper, none better and as cheap; by cost."""
    kept: list[int] = []
    best = float("-inf")
    for trial in sorted(trials, key=lambda entry: (entry[cost], -sign * entry["value"])):
        if sign * trial["value"] > best:
            best = sign * trial["value"]
            kept.append(trial["number"])
    return kept


def best_trial(trials: Sequence[Mapping[str, Any]], sign: int) -> Mapping[str, Any]:
    """The trial with the best value; of equal ones the cheapest, which is on the frontier."""
    return min(trials, key=lambda entry: (-sign * entry["value"], entry["parameters"], entry["ms_per_step"]))


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


def table(results: Mapping[str, Any]) -> str:
    """The finished trials of the frontiers as a Markdown table, the best first."""
    chosen = {number for numbers in results["frontier"].values() for number in numbers}
    trials = [trial for trial in results["trials"] if trial["number"] in chosen]
    trials.sort(key=lambda trial: trial["value"], reverse=results["more_is_better"])
    names = list(dict.fromkeys(name for trial in trials for name in trial["settings"]))
    head = [results["metric"].removeprefix("eval_"), *names, "parameters", "ms/step"]
    lines = [head, ["---"] * len(head)]
    for trial in trials:
        values = [cell(_text(trial["settings"].get(name))) for name in names]
        lines.append([f"{trial['value']:.4f}", *values, f"{trial['parameters']:,}", f"{trial['ms_per_step']:.0f}"])
    states = [trial["state"] for trial in results["trials"]]
    counts = ", ".join(f"{states.count(state)} {word}" for state, word in
                       (("complete", "finished"), ("pruned", "given up"), ("fail", "failed")))  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{len(states)} trials: {counts}.\n"


def _text(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
